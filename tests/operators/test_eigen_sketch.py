"""Leading eigen-directions in place of random sketches: which they are, and that all of them are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import curvlib as cv
from curvlib.errors import ArgumentError, NotKroneckerError
from curvlib.operators import EigenSketch, OrthogonalBasis
from tests.operators.operator_cases import Random, assert_close, conjugated, generator, moderately
from tests.operators.test_operator_projection import network, vector_of

random = Random(generator(0))
DAMPINGS: dict[str, float | cv.FactoredTikhonov] = {"tikhonov": 0.1, "factored": cv.FactoredTikhonov(0.1)}


def products(found: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    return torch.stack([(found[name] * other[name]).sum() for name in found]).sum()


@moderately
@given(p=st.integers(1, 6), seed=st.integers(0, 2**20), factored=st.booleans())
def test_the_directions_are_those_in_which_the_factors_are_largest(p: int, seed: int, factored: bool) -> None:
    source = Random(generator(seed))
    g, a, d = source.definite(4), source.definite(6), 0.3
    curv = cv.Kronecker(cv.Dense(g), cv.Dense(a))
    root = curv.power(-0.5, cv.FactoredTikhonov(d) if factored else d)
    (mu, u), (nu, v) = (tuple(part.flip(-1) for part in torch.linalg.eigh(x)) for x in (g, a))
    pi = ((nu.sum() / 6) / (mu.sum() / 4)) ** 0.5
    values = torch.outer(mu + d**0.5 / pi, nu + d**0.5 * pi) if factored else torch.outer(mu, nu) + d
    x, y = source.normal(4, 6), source.normal(4, 6)
    projection = root.project(EigenSketch(rank=p))
    terms = ((u.mT @ x @ v) * (u.mT @ y @ v) / values)[:p, :p]
    assert projection(x)["params"].shape == terms.shape
    assert_close(products(projection(x), projection(y)), terms.sum())


def test_corrected_eigenvalues_decide_by_their_sums_along_the_other_side() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [9.0, 0.0, 0.0], [0.0, 4.0, 0.5]]).double()
    u, v = random.orthogonal(3), random.orthogonal(3)
    curv = cv.EigenKronecker(OrthogonalBasis(u), OrthogonalBasis(v), values)
    x = random.normal(3, 3)
    coordinates = u.mT @ x @ v
    rows, columns = [1, 2], [0, 1]  # sums 9 and 4.5; 10 and 5
    weights = (values + 0.1) ** -0.5
    found = curv.power(-0.5, 0.1).project(EigenSketch(rank=2))(x)["params"]
    assert_close(found.abs(), (weights * coordinates)[rows][:, columns].abs())
    largest = curv.project(EigenSketch(rank=2, which="largest"))(x)["params"]
    assert_close(largest.abs(), (values * coordinates)[rows][:, columns].abs())


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_of_the_curvature_itself_the_largest_eigenvalues_are_taken_on_demand(exponent: float) -> None:
    g, a = random.definite(4), random.definite(5)
    for block in (cv.Kronecker(cv.Dense(g), cv.Dense(a)), cv.Kronecker(cv.Dense(g), cv.Dense(a)).damp(0.5)):
        inverse = block.power(-exponent).project(EigenSketch(rank=2))
        itself = block.power(exponent).project(EigenSketch(rank=2, which="largest"))
        whole = itself.sides["params"][1], inverse.sides["params"][1]
        spans = [torch.linalg.qr(side.mT)[0] for side in whole]
        assert_close(spans[0] @ spans[0].mT, spans[1] @ spans[1].mT)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_directions_are_nested_in_the_rank_also_where_eigenvalues_are_equal(damping: str) -> None:
    left = cv.Dense(conjugated(random.orthogonal(6), torch.tensor([1.0, 1, 1, 2, 2, 3]).double()))
    root = cv.Kronecker(left, cv.Diagonal(torch.ones(5).double())).power(-0.5, DAMPINGS[damping])
    x = random.normal(6, 5)
    most = root.project(EigenSketch(rank=4))(x)["params"]
    for rank in (1, 2, 3):
        assert torch.equal(root.project(EigenSketch(rank=rank))(x)["params"], most[:rank, :rank])


@pytest.mark.parametrize("damping", DAMPINGS)
def test_every_group_has_its_own_directions(damping: str) -> None:
    g, a, x = random.definite(3, 4), random.definite(3, 5), random.normal(3, 4, 5)
    together = cv.Kronecker(cv.Dense(g), cv.Dense(a)).power(-0.5, 0.1).project(EigenSketch(rank=2))(x)["params"]
    assert together.shape == (3, 2, 2)
    for i in range(3):
        root = cv.Kronecker(cv.Dense(g[i]), cv.Dense(a[i])).power(-0.5, 0.1)
        assert_close(together[i].abs(), root.project(EigenSketch(rank=2))(x[i])["params"].abs())


def test_groups_may_share_a_side() -> None:
    g, a, x = random.definite(3, 4), random.definite(5), random.normal(3, 4, 5)
    for damping in DAMPINGS.values():
        curv, apart = (cv.Kronecker(cv.Dense(g), cv.Dense(side)) for side in (a, a.expand(3, 5, 5)))
        one, other = (op.power(-0.5, damping).project(EigenSketch(rank=2))(x)["params"] for op in (curv, apart))
        assert_close(one.abs(), other.abs())


@pytest.mark.parametrize("width", [4, 6])
def test_a_low_rank_side_has_its_own_vectors_and_is_whole_if_asked_for_all(width: int) -> None:
    values = torch.tensor([3.0, 7.0, 5.0]).double()
    side = cv.LowRank(random.orthogonal(width)[:, :3], values, torch.tensor(9.0).double())
    curv = cv.Kronecker(side, cv.Dense(random.definite(4)))
    x, y = random.normal(width, 4), random.normal(width, 4)
    for damping in DAMPINGS.values():
        root = curv.power(-0.5, damping)
        for rank, kept in ((1, [1]), (2, [1, 2]), (3, [1, 2, 0]), (width - 1, [1, 2, 0])):
            left = root.project(EigenSketch(rank=rank)).sides["params"][0]
            assert_close(torch.nn.functional.normalize(left), side.vectors.mT[kept])
        whole = root.project(EigenSketch(rank=width))
        assert_close(products(whole(x), whole(y)), (x * (curv.inverse(damping) @ y)).sum())


def test_a_block_without_sides_has_its_leading_directions() -> None:
    dense, values = random.definite(6), random.positive(2, 5)
    low = cv.LowRank(random.orthogonal(4)[:, :3], torch.tensor([3.0, 7, 5]).double(), torch.tensor(9.0).double())
    curv, params = network(dense=cv.Dense(dense), diagonal=cv.Diagonal(values), low=low)
    v = vector_of(params)
    found = curv.power(-0.5, 0.1).project(EigenSketch(rank=3))(v)
    mu, q = torch.linalg.eigh(dense)
    assert_close(found["dense"].abs(), ((q.mT @ v["dense"]) / (mu + 0.1).sqrt()).flip(0)[:3].abs())
    order = values.flatten().argsort(descending=True)[:3]
    assert_close(found["diagonal"], (v["diagonal"] / (values + 0.1).sqrt()).flatten()[order])
    assert_close(found["low"], (low.vectors.mT @ v["low"] / (low.values + 0.1).sqrt())[[1, 2, 0]])
    whole = curv.power(-0.5, 0.1).project(EigenSketch(rank=10))
    assert_close(products(whole(v), whole(v)), curv.inverse(0.1).quadratic(v))


def test_operators_without_an_eigenbasis_a_side_are_refused_by_name() -> None:
    term = cv.Kronecker(cv.Dense(random.definite(4)), cv.Dense(random.definite(5)))
    other: Any = "middle"
    curv, _ = network(layer=term + cv.Kronecker(cv.Dense(random.definite(4)), cv.Dense(random.definite(5))))
    with pytest.raises(NotKroneckerError, match=r"block 'layer': a Sum has no eigenbasis a side"):
        curv.project(EigenSketch(rank=2))
    with pytest.raises(ArgumentError, match="rank must be at least 1, got 0"):
        EigenSketch(rank=0)
    with pytest.raises(ArgumentError, match="which must be one of smallest, largest, got 'middle'"):
        EigenSketch(which=other)
