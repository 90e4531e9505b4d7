"""Every pair of values is in the part of a grid that runs by default."""

from __future__ import annotations

import itertools

import pytest
from pairwise import every_pair, pairwise


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (4, 2, 3), (3, 3, 3, 3), (5, 1, 2, 2, 6)])
def test_every_two_values_of_two_options_meet(sizes: tuple[int, ...]) -> None:
    options = [[f"{column}{value}" for value in range(size)] for column, size in enumerate(sizes)]
    rows = pairwise(*options)
    for one, two in itertools.combinations(range(len(sizes)), 2):
        assert {(row[one], row[two]) for row in rows} == set(itertools.product(options[one], options[two]))
    assert [sorted(set(column)) for column in zip(*rows, strict=True)] == options
    assert len(rows) == len(set(rows)) < max(3, 2 * sorted(sizes)[-1] * sorted([1, *sizes])[-2])


def test_a_grid_keeps_all_of_its_product() -> None:
    mark = every_pair("a, b, c", "xyz", "xyz", "xyz")
    rows = mark.args[1]
    assert [row.values for row in rows] == list(itertools.product("xyz", repeat=3))
    assert {row.values for row in rows if not row.marks} == set(pairwise("xyz", "xyz", "xyz"))
    assert 9 <= sum(not row.marks for row in rows) <= 12
