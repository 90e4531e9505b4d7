"""Truncation: what is kept, exact traces, memory, and the report."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib as cv
from curvlib.errors import ArgumentError
from curvlib.operators import (
    CG,
    Dense,
    Diagonal,
    EigenKronecker,
    EigenMatrix,
    Inverse,
    Kronecker,
    LowRank,
    Operator,
    ScaledIdentity,
    Sum,
    truncation_report,
)
from curvlib.operators.bases import CanonicalBasis, OrthogonalBasis
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    Random,
    assert_close,
    assert_number,
    cases,
    conjugated,
    generator,
    tensors,
)

moderately = settings(deadline=None, max_examples=10)
every_kind = pytest.mark.parametrize(
    "kind", ["dense", "eigen", "kronecker", "eigen kronecker", "sum", "block diagonal"]
)


def by_hand(matrix: Tensor, rank: int) -> Tensor:
    """The k leading eigenpairs and the mean of the other eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    if rank >= values.shape[-1]:
        return matrix
    others = values[..., :-rank].mean(-1, keepdim=True).expand_as(values[..., :-rank])
    return conjugated(vectors, torch.cat([others, values[..., -rank:]], -1))


def spd(width: int, seed: int = 0) -> Dense:
    return Dense(Random(generator(seed)).definite(width))


def decaying(width: int, seed: int = 0) -> Dense:
    q = Random(generator(seed)).orthogonal(width)
    return Dense(conjugated(q, torch.arange(1, width + 1).double() ** -2.0))


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("front", [(), (2,)])
def test_a_matrix_keeps_its_leading_eigenpairs(rank: int, front: tuple[int, ...]) -> None:
    matrix = Random(generator(0)).definite(*front, 5)
    truncated = Dense(matrix).truncate(rank)
    assert_close(truncated.matrices(), by_hand(matrix, rank))
    assert isinstance(truncated, LowRank if rank < 5 else EigenMatrix)
    assert_close(truncated.truncate(1).matrices(), by_hand(by_hand(matrix, rank), 1))


@moderately
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6), shared=st.booleans())
def test_a_kronecker_product_is_truncated_a_side(seed: int, rank: int, shared: bool) -> None:
    random = Random(generator(seed))
    g, a = random.definite(3) if shared else random.definite(2, 3), random.definite(2, 5)
    curv = Kronecker(Dense(g), Dense(a))
    truncated = curv.truncate(rank=rank)
    expected = Kronecker(Dense(by_hand(g, rank)), Dense(by_hand(a, rank))).to_dense()
    assert_close(truncated.to_dense(), expected)
    solution = torch.linalg.solve(expected + 0.1 * torch.eye(30).double(), torch.ones(30).double())
    assert_close((truncated.inverse(0.1) @ torch.ones(2, 3, 5).double()).reshape(-1), solution)


@every_kind
@moderately
@given(data=st.data(), rank=st.integers(1, 5))
def test_the_trace_is_exact(kind: str, data: st.DataObject, rank: int) -> None:
    case = data.draw(cases(kind))
    for truncated in (case.operator.truncate(rank=rank), case.operator.truncate(energy=0.7)):
        assert_number(truncated.trace(), case.dense.trace())
        assert truncated.domain.shapes == case.operator.domain.shapes
        assert_number(truncated.to_dense().trace(), case.dense.trace())


@every_kind
@moderately
@given(data=st.data())
def test_a_rank_as_large_as_every_side_changes_nothing(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    for truncated in (case.operator.truncate(rank=case.operator.domain.size), case.operator.truncate(energy=1.0)):
        assert_close(truncated.to_dense(), case.dense)
        v = case.vector()
        assert_close(flat(truncated @ v), case.dense @ flat(v))


def averaged(grid: Tensor, axis: int, rank: int) -> Tensor:
    """Eigenvalues [*, m, n] whose rows or columns of the smallest sums are replaced by their mean."""
    shares = grid.sum(-3 - axis).reshape(-1, grid.shape[axis]).sum(0)
    out = shares.argsort(descending=True)[rank:]
    mean = grid.index_select(axis, out).mean(axis, keepdim=True)
    return grid.index_copy(axis, out, mean.expand_as(grid.index_select(axis, out)))


@pytest.mark.parametrize("front", [(), (2,)])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("canonical", [False, True])
def test_free_eigenvalues_are_averaged_over_what_is_left_out(
    front: tuple[int, ...], rank: int, canonical: bool
) -> None:
    random = Random(generator(0))
    values = random.positive(*front, 4, 6)
    left = CanonicalBasis(4) if canonical else OrthogonalBasis(random.orthogonal(4))  # groups share their bases
    right = OrthogonalBasis(random.orthogonal(6))
    truncated = EigenKronecker(left, right, values).truncate(rank=rank)
    grid = averaged(values, -1, rank)
    grid = grid if canonical else averaged(grid, -2, rank)
    assert_close(truncated.to_dense(), EigenKronecker(left, right, grid).to_dense())
    assert truncated.values.shape == (*front, 4 if canonical else rank + 1, rank + 1)
    again = truncated.truncate(rank=1)
    grid = averaged(values, -1, 1)
    grid = grid if canonical else averaged(grid, -2, 1)
    assert_close(again.to_dense(), EigenKronecker(left, right, grid).to_dense())


def test_corrected_eigenvalues_are_truncated_with_their_basis() -> None:
    curv = Kronecker(decaying(12), decaying(9, seed=1))
    damped, truncated = curv.damp(0.1).truncate(rank=3), curv.truncate(rank=3).damp(0.1)
    assert_close(damped.to_dense(), truncated.to_dense())


def test_sides_without_eigenvectors_stay_as_they_are() -> None:
    diagonal = Diagonal(torch.arange(1.0, 5.0))
    identity = ScaledIdentity(torch.tensor(2.0), (3,))
    assert diagonal.truncate(rank=1) is diagonal
    curv = Kronecker(diagonal, identity)
    truncated = curv.truncate(energy=0.5)
    assert truncated.left is diagonal
    assert truncated.right is identity
    low = LowRank(torch.eye(4)[:, :2], torch.tensor([3.0, 2.0]), torch.tensor(1.0))
    assert torch.equal(low.truncate(rank=3).to_dense(), low.to_dense())


# --- energy -------------------------------------------------------------------------------------------------------


@moderately
@given(seed=st.integers(0, 2**31), energy=st.floats(0.05, 0.999))
def test_energy_is_reached_by_the_smallest_rank(seed: int, energy: float) -> None:
    matrix = Random(generator(seed)).definite(3, 8)
    values = torch.linalg.eigvalsh(matrix).flip(-1)
    held = (values.cumsum(-1) / values.sum(-1, keepdim=True)).amin(0)  # every group reaches it
    expected = int((held < energy).sum()) + 1
    truncated = Dense(matrix).truncate(energy=energy)
    assert truncated.eigen().basis.spread(truncated.eigen().values).shape[-1] == (expected + 8 if expected < 8 else 8)
    one = Kronecker(Dense(matrix), Dense(matrix)).truncate(energy=energy)
    assert_close(one.left.matrices(), truncated.matrices())


def test_energy_counts_what_a_remainder_holds() -> None:
    low = LowRank(torch.eye(6)[:, :2].double(), torch.tensor([6.0, 2.0]).double(), torch.tensor(1.0).double())
    assert low.truncate(energy=0.5).vectors.shape[-1] == 1  # 6 of 12
    assert low.truncate(energy=0.6).vectors.shape[-1] == 2
    assert low.truncate(energy=0.99).vectors.shape[-1] == 2  # no more vectors are known
    assert Dense(torch.zeros(4, 4)).truncate(energy=0.9).vectors.shape[-1] == 1


def test_energy_is_refused_where_values_cannot_be_looked_at() -> None:
    matrix = torch.stack([spd(4).matrix, spd(4, 1).matrix])
    with pytest.raises(ArgumentError, match="give a rank"):
        torch.func.vmap(lambda m: Dense(m).truncate(energy=0.9).trace())(matrix)
    traces = torch.func.vmap(lambda m: Dense(m).truncate(rank=2).trace())(matrix)
    assert_close(traces, matrix.diagonal(dim1=-2, dim2=-1).sum(-1))


# --- memory and the report ----------------------------------------------------------------------------------------


def test_the_state_is_as_small_as_the_ranks_say() -> None:
    width, other = 200, 150
    curv = Kronecker(decaying(width), decaying(other, 1))
    for percent, at_least in ((10, 9.9), (20, 4.9)):
        left, right = curv.left.truncate(rank=width * percent // 100), curv.right.truncate(rank=other * percent // 100)
        truncated = Kronecker(left, right)
        dense = Kronecker(curv.left.eigen(), curv.right.eigen())
        assert bytes_of(dense) >= at_least * bytes_of(truncated)
        # what is kept for inverses: with free eigenvalues for pairs of vectors, of which a damped product has as many
        assert bytes_of(dense.damp(0.1)) >= 5 * bytes_of(truncated.damp(0.1))
        assert bytes_of(truncated) == 8 * sum(d * k + k + 1 for d, k in ranks_of(truncated))


def bytes_of(operator: Operator) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(operator)}.values())


def ranks_of(curv: Kronecker) -> list[tuple[int, int]]:
    return [tuple(side.vectors.shape) for side in (curv.left, curv.right)]


def test_the_report_says_what_a_network_saves() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4)).double()
    model_fn, params = cv.functional(net)
    x = torch.randn(50, 30, generator=generator(0), dtype=torch.float64)
    curv = cv.kfac(model_fn, params, (x, torch.arange(50) % 4), fisher="type-2")
    truncated = curv.truncate(rank=4)
    report = truncation_report(curv, truncated)
    first, last = report.blocks
    assert (first.name, first.shape, first.ranks, first.widths) == ("0.weight", (20, 31), (4, 4), (20, 31))
    assert (last.ranks, last.widths) == ((4, 4), (4, 21))
    assert report.bytes_before == sum(bytes_of(block) for block in curv.blocks.values())
    assert report.bytes_after == sum(bytes_of(block) for block in truncated.blocks.values())
    assert "4/20 x 4/31" in str(report)
    assert len(str(report).splitlines()) == 4
    assert_number(truncated.trace(), curv.trace())
    assert float(truncated.inverse(0.1).quadratic(params)) > 0
    total = Sum((curv, curv))
    assert truncation_report(total, total.truncate(rank=4)).blocks[0].ranks == (4, 4, 4, 4) * 2
    with pytest.raises(ArgumentError, match="different blocks"):
        truncation_report(curv, curv.blocks["0.weight"])


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either rank or energy"),
        ({"rank": 2, "energy": 0.5}, "either rank or energy"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 0.0}, r"\(0, 1\]"),
        ({"energy": 1.5}, r"\(0, 1\]"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, float], message: str) -> None:
    for curv in (spd(3), Kronecker(spd(3), spd(2)), Diagonal(torch.ones(3))):
        with pytest.raises(ArgumentError, match=message):
            curv.truncate(**arguments)


def test_what_has_no_eigenpairs_cannot_be_truncated() -> None:
    total = Sum((Kronecker(spd(3), spd(2)), Kronecker(spd(3, 1), spd(2, 1))))
    with pytest.raises(ArgumentError, match="Inverse cannot be truncated"):
        Inverse(total, CG(Kronecker(spd(3), spd(2)).inverse())).truncate(rank=1)
