"""Sides of dense blocks beyond what holds of every operator: their blocks, their basis, their sums, their memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.errors import ArgumentError, PytreeError, ShapeError
from curvlib.operators import (
    BlockBasis,
    Dense,
    DenseBlocks,
    EigenKronecker,
    EigenMatrix,
    FactoredTikhonov,
    Inverse,
    Kronecker,
    LowRank,
    Matrix,
    Operator,
    RelativeTikhonov,
    ScaledIdentity,
    SimultaneousKronecker,
    ema,
    merge_factors,
    sketch,
)
from curvlib.operators.block_side import diagonal_blocks
from tests.operators.operator_cases import (
    Random,
    assert_close,
    assert_number,
    conjugated,
    factored,
    generator,
    matrix_function,
    side,
)
from tests.operators.test_low_rank import LargestTensor, low_rank

moderately = settings(deadline=None, max_examples=6)
seeds = st.integers(0, 2**31)
OTHERS = ("dense", "diagonal", "scaled identity", "eigen", "canonical eigen", "dense blocks", "block eigen", "low rank")


def zeroed(matrix: Tensor, size: int) -> Tensor:
    """The matrix without the entries that join two blocks."""
    block = torch.arange(matrix.shape[-1]) // size
    return matrix * (block[:, None] == block)


def blocks(width: int, size: int, seed: int = 0, front: tuple[int, ...] = ()) -> tuple[DenseBlocks, Tensor]:
    matrix = Random(generator(seed)).definite(*front, width)
    return DenseBlocks.of_matrix(matrix, size), zeroed(matrix, size)


@pytest.mark.parametrize(
    ("width", "size", "stacks"), [(6, 3, 1), (7, 3, 2), (5, 1, 1), (4, 4, 1), (4, 9, 1), (5, 4, 2)]
)
@pytest.mark.parametrize("front", [(), (2,)])
def test_the_matrix_is_that_without_the_entries_between_blocks(
    width: int, size: int, stacks: int, front: tuple[int, ...]
) -> None:
    curv, dense = blocks(width, size, front=front)
    assert len(curv.stacks) == stacks
    assert sum(stack[..., 0, 0].numel() for stack in curv.stacks) == -(-width // size) * max(1, len(front) * 2)
    assert_close(curv.matrices(), dense)
    assert_close(curv.inverse(0.1).sample(generator(0), 2).new_tensor(curv.shape), dense.new_tensor((*front, width)))


@moderately
@given(seed=seeds, size=st.integers(1, 4), damping=st.sampled_from([0.3, RelativeTikhonov(0.2), FactoredTikhonov(0.1)]))
def test_a_side_that_fits_into_one_block_is_the_dense_side(seed: int, size: int, damping: float) -> None:
    random = Random(generator(seed))
    g, a = random.definite(4), random.definite(3)
    one = Kronecker(DenseBlocks.of_matrix(g, 3 + size), Dense(a))
    two = Kronecker(Dense(g), Dense(a))
    v = random.normal(4, 3)
    assert_close(one @ v, two @ v)
    for power in (-1, -0.5, 0.5):
        assert_close(one.power(power, damping) @ v, two.power(power, damping) @ v)
    assert_number(one.damp(damping).logdet(), two.damp(damping).logdet())


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("in_basis", [False, True])
@moderately
@given(seed=seeds, size=st.integers(1, 5))
def test_inner_products_are_the_twins(other: str, in_basis: bool, seed: int, size: int) -> None:
    random = Random(generator(seed))
    two, n = low_rank((2, 5), 3, random) if other == "low rank" else side(other, (2, 5), random)
    one, m = blocks(5, size, seed)
    first, second = (x.eigen() if in_basis else x for x in (one, two))
    assert_close(first.inner(second), (m * n).sum((-2, -1)))
    assert_close(second.inner(first), (m * n).sum((-2, -1)))
    expected = DenseBlocks.of_matrix(n, size).stacks
    for found, stack in zip(diagonal_blocks(second, one.runs), expected, strict=True):
        assert_close(found.expand_as(stack), stack)


@pytest.mark.parametrize("front", [(), (2,)])
def test_rows_of_the_basis_are_eigenvectors_with_the_eigenvalues_of_their_numbers(front: tuple[int, ...]) -> None:
    curv, dense = blocks(7, 3, front=front)
    eigen = curv.eigen()
    assert isinstance(eigen.basis, BlockBasis)
    index = torch.tensor([6, 0, 4]).expand(*front, 3)
    rows = eigen.basis.rows(index, eigen.values)
    assert_close(rows @ rows.mT, torch.eye(3, dtype=torch.float64).expand(*front, 3, 3))
    assert_close(rows @ dense, eigen.values.gather(-1, index).unsqueeze(-1) * rows)
    assert_close(eigen.basis.forms(curv), eigen.values)


def test_powers_stay_in_the_basis_of_the_blocks() -> None:
    curv, dense = blocks(7, 3)
    for power in (curv.inverse(0.1), curv.power(-0.5), curv.damp(RelativeTikhonov(0.1)).power(2)):
        assert isinstance(power, EigenMatrix)
        assert isinstance(power.basis, BlockBasis)
    assert_close(curv.power(-0.5).to_dense(), matrix_function(dense, lambda x: x**-0.5))


def test_sums_with_blocks_and_diagonals_have_a_closed_form() -> None:
    random = Random(generator(5))
    one, m = blocks(7, 3, 0)
    for two, n in (blocks(7, 3, 1), *(side(kind, (7,), random) for kind in ("diagonal", "scaled identity"))):
        assert isinstance(one + two, DenseBlocks)
        assert_close((one + two).to_dense(), m + n)
        assert_close((two + one).to_dense(), m + n)
    other, n = blocks(7, 4)
    assert not isinstance(one + other, DenseBlocks)
    assert_close((one + other).to_dense(), m + n)


def test_blocks_are_merged_with_blocks_of_the_same_widths_only() -> None:
    (one, m), (two, n) = blocks(7, 3, 0), blocks(7, 3, 1)
    assert_close(merge_factors(one, two, weights=(0.2, 3.0)).to_dense(), 0.2 * m + 3 * n)
    assert_close(ema(one, two, 0.9).to_dense(), 0.9 * m + 0.1 * n)
    with pytest.raises(PytreeError, match="same size"):
        merge_factors(one, blocks(7, 4)[0])


def truncated_by_hand(dense: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(dense)
    mean = values[:-rank].mean().expand(len(values) - rank)
    return conjugated(vectors, torch.cat([mean, values[-rank:]]))


def test_truncation_takes_pairs_from_all_blocks_or_keeps_the_blocks() -> None:
    curv, dense = blocks(8, 3)
    for truncated in (curv.truncate(rank=2), curv.damp(0.0).truncate(rank=2)):
        assert isinstance(truncated, LowRank)
        assert_close(truncated.to_dense(), truncated_by_hand(dense, 2))
    assert curv.truncate(rank=3) is curv
    assert curv.truncate(energy=1.0) is curv
    product = Kronecker(curv, Dense(torch.eye(2, dtype=torch.float64)))
    assert_close(product.inverse(0.1).truncate(rank=8).to_dense(), product.inverse(0.1).to_dense())
    assert_number(product.inverse(0.1).truncate(rank=1).trace(), product.inverse(0.1).trace())


@pytest.mark.parametrize("damp", [False, True])
@pytest.mark.parametrize("other", ["same blocks", "diagonal", "scaled identity", "dense"])
def test_the_inverse_of_two_products_is_exact_and_in_blocks(other: str, damp: bool) -> None:
    random = Random(generator(2))
    two, n = blocks(7, 3, 1) if other == "same blocks" else side(other, (7,), random)
    (one, m), a, b = blocks(7, 3, 0), random.definite(2), random.definite(2)
    terms: list[Operator] = [Kronecker(one, Dense(a)), Kronecker(two, Dense(b))]
    expected = torch.kron(m, a) + torch.kron(n, b)
    if damp:
        terms = [term.damp(FactoredTikhonov(0.1)) for term in terms]
        expected = factored(m, a, 0.1, relative=False) + factored(n, b, 0.1, relative=False)
    with mock.patch("curvlib.operators.sums.MAX_DENSE", 0):
        inverse = (terms[0] + terms[1]).inverse()
    assert isinstance(inverse, (SimultaneousKronecker, EigenKronecker))
    assert isinstance(inverse.left, BlockBasis) == (other != "dense")
    assert_close(inverse.to_dense(), torch.linalg.inv(expected))
    assert_number(inverse.logdet(), -torch.logdet(expected))
    assert_number(inverse.frobenius_norm(), torch.linalg.inv(expected).norm())
    assert_close(inverse.inverse().to_dense(), expected)


def test_sums_without_blocks_in_common_are_solved_without_a_square_matrix() -> None:
    width = 300
    one, two = (Kronecker(blocks(width, size, size)[0], Dense(torch.eye(2).double())) for size in (20, 30))
    v = Random(generator(0)).normal(width, 2)
    with mock.patch("curvlib.operators.sums.MAX_DENSE", 0), LargestTensor() as largest:
        inverse = (one + two).inverse(0.1)
        solved = inverse @ v
    assert isinstance(inverse, Inverse)
    assert_close((one + two) @ solved + 0.1 * solved, v, 1e-7)
    assert largest.numel <= width * 30


def every_operation(curv: Operator, v: Tensor) -> None:
    few = sketch(v, rank=5)
    for damping in (0.1, FactoredTikhonov(0.1), RelativeTikhonov(0.1)):
        damped = curv.damp(damping)
        for operator in (damped, damped._power(-1, damped=True), damped._power(-0.5, damped=True)):
            operator @ v, operator.diag(), operator.trace(), operator.logdet(), operator.frobenius_norm()
            operator.sample(generator(0)), operator.eigenvalues(), operator.map_eigenvalues(torch.exp)
    curv.power(-0.5, FactoredTikhonov(0.1)).project(few)(v)
    curv.truncate(rank=3) @ v


def test_no_method_makes_a_matrix_as_large_as_a_wide_side() -> None:
    width, size = 450, 32
    random = Random(generator(0))
    first, second = (blocks(width, size, seed)[0] for seed in (0, 1))
    frequencies = side("diagonal", (width,), random)[0]
    sides: list[Matrix] = [first, second, frequencies, ScaledIdentity(torch.tensor(2.0).double(), (width,))]
    products = [Kronecker(x, side("dense", (2,), random)[0]) for x in sides]
    v = random.normal(width, 2)
    with LargestTensor() as largest:
        every_operation(products[0], v)
        every_operation(Kronecker(products[0].right, first), v.mT)
        for other in products[1:]:
            total = products[0] + other
            total @ v, total.frobenius_norm(), total.diag(), total.sample(generator(0)), total.trace()
            damped = products[0].damp(FactoredTikhonov(0.1)) + other.damp(FactoredTikhonov(0.1))
            damped.frobenius_norm(), damped @ v
            with mock.patch("curvlib.operators.sums.MAX_DENSE", 0):
                for inverse in (total.inverse(), damped.inverse(), total.inverse(0.1)):
                    inverse @ v
        merge_factors(products[0], products[1]).inverse(0.1) @ v
        first.inner(second.inverse()), first.inverse().inner(frequencies.eigen()), first._add(frequencies)
    assert largest.numel <= 2 * width * size  # a square has seven times as many entries


def test_shapes_that_are_no_blocks_are_refused() -> None:
    for stacks in ((), (torch.ones(2, 3),), (torch.ones(1, 2, 3),), (torch.ones(1, 2, 2), torch.ones(2, 1, 1, 1))):
        with pytest.raises(ShapeError, match=r"\[\*, b, w, w\]"):
            DenseBlocks(stacks)
    with pytest.raises(ArgumentError, match="at least 1, got 0"):
        DenseBlocks.of_matrix(torch.eye(3), 0)
