"""Grids of options: by default a part in which every pair of values meets; the rest runs with -m slow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def pairwise(*options: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Choices of one value of each option, such that every two values of two options are chosen together.

    Greedy: starting from a pair that has not met, each further option takes the value that meets most others anew.
    """
    values = [list(x) for x in options]
    if len(values) == 1:
        return [(x,) for x in values[0]]
    columns = range(len(values))
    pairs = itertools.combinations(columns, 2)
    missing = {(i, a, j, b): None for i, j in pairs for a in range(len(values[i])) for b in range(len(values[j]))}
    found = []
    while missing:
        i, a, j, b = next(iter(missing))
        row = {i: a, j: b}
        for column in columns:
            if column not in row:
                news = [sum(pair in missing for pair in meet(row, column, c)) for c in range(len(values[column]))]
                row[column] = news.index(max(news))
        for column, value in row.items():
            for pair in meet(row, column, value):
                missing.pop(pair, None)
        found.append(tuple(values[column][row[column]] for column in columns))
    return found


def meet(row: dict[int, int], column: int, value: int) -> list[tuple[int, int, int, int]]:
    """The pairs that a value of a column makes with those of the other columns."""
    ordered = (((column, value), (k, c)) if column < k else ((k, c), (column, value)) for k, c in row.items())
    return [(*one, *two) for one, two in ordered if one[0] != two[0]]


def every_pair(names: str, *options: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes by the product of the options; what `pairwise` leaves out is slow."""
    values = [list(x) for x in options]
    chosen = set(pairwise(*(range(len(x)) for x in values)))
    rows = itertools.product(*(range(len(x)) for x in values))
    parameters = [
        pytest.param(*(x[k] for x, k in zip(values, row, strict=True)), marks=() if row in chosen else pytest.mark.slow)
        for row in rows
    ]
    return pytest.mark.parametrize(names, parameters)
