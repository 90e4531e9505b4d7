"""The nearest Kronecker product is that of the rearranged dense matrix's singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.errors import ArgumentError, ConvergenceError, NotKroneckerError, ShapeError
from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Kronecker,
    Layout,
    LowRank,
    Operator,
    OrthogonalBasis,
    Region,
    ScaledIdentity,
    Sum,
    merge_factors,
    nearest_kronecker,
    rearranged,
)
from curvlib.pytree import Domain
from tests.operators.operator_cases import FACTORS, Random, assert_close, cases, generator, kronecker_block

seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))
thoroughly = settings(deadline=None, max_examples=20)
briefly = settings(deadline=None, max_examples=8)


def rearrange(dense: Tensor, m: int, n: int) -> Tensor:
    return dense.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)


def symmetric_part(m: int) -> Tensor:
    """The projector on vectors of symmetric matrices."""
    eye = torch.eye(m * m, dtype=torch.float64)
    return (eye + eye.reshape(m, m, m * m).transpose(0, 1).reshape(m * m, m * m)) / 2


def best_error(dense: Tensor, m: int, n: int, terms: int = 1) -> float:
    """The distance of the nearest sum of products of symmetric factors."""
    matrix = rearrange(dense, m, n)
    kept = symmetric_part(m) @ matrix @ symmetric_part(n)
    left_out = torch.linalg.svdvals(kept)[terms:].square().sum() + (matrix - kept).square().sum()
    return float(left_out.sqrt())


def distance(operator: Operator, dense: Tensor) -> float:
    return float((operator.to_dense() - dense).norm())


def definite(size: int, seed: int) -> Tensor:
    x = Random(generator(seed)).normal(size, size)
    return x @ x.mT / size


# --- against the singular value decomposition ---------------------------------------------------------------------


@thoroughly
@given(shape=shapes, seed=seeds)
def test_the_nearest_product_of_a_matrix_is_the_leading_singular_pair(shape: tuple[int, int], seed: int) -> None:
    m, n = shape
    dense = definite(m * n, seed)
    nearest = nearest_kronecker(Dense(dense), shape=shape)
    assert isinstance(nearest, Kronecker)
    u, s, vh = torch.linalg.svd(rearrange(dense, m, n))
    expected = torch.kron(u[:, 0].reshape(m, m), vh[0].reshape(n, n)) * s[0]
    assert_close(nearest.to_dense(), expected, 1e-8)
    assert abs(distance(nearest, dense) - best_error(dense, m, n)) <= 1e-8 * float(dense.norm())


@thoroughly
@given(shape=shapes, seed=seeds, terms=st.integers(2, 4))
def test_several_products_are_as_near_as_any_with_symmetric_factors(
    shape: tuple[int, int], seed: int, terms: int
) -> None:
    m, n = shape
    dense = definite(m * n, seed)
    nearest = nearest_kronecker(Dense(dense), shape=shape, terms=terms)
    assert abs(distance(nearest, dense) - best_error(dense, m, n, terms)) <= 1e-8 * float(dense.norm())


@thoroughly
@given(shape=shapes, seed=seeds)
def test_definite_operators_have_symmetric_semidefinite_factors(shape: tuple[int, int], seed: int) -> None:
    nearest = nearest_kronecker(Dense(definite(shape[0] * shape[1], seed)), shape=shape)
    assert isinstance(nearest, Kronecker)
    for side in (nearest.left, nearest.right):
        matrix = side.matrices()
        assert_close(matrix, matrix.mT, 1e-14)
        values = torch.linalg.eigvalsh(matrix)
        assert float(values.min()) >= -1e-14 * float(values.max())


@briefly
@given(shape=shapes, seed=seeds)
def test_indefinite_operators_have_the_best_symmetric_factors(shape: tuple[int, int], seed: int) -> None:
    m, n = shape
    x = Random(generator(seed)).normal(m * n, m * n)
    dense = x + x.mT
    nearest = nearest_kronecker(Dense(dense), shape=shape, max_iterations=200)
    assert abs(distance(nearest, dense) - best_error(dense, m, n)) <= 1e-7 * float(dense.norm())


# --- operators with a closed form ---------------------------------------------------------------------------------


@briefly
@given(data=st.data())
def test_kronecker_products_are_returned_as_they_are(data: st.DataObject) -> None:
    operator = data.draw(cases("kronecker")).operator
    assert nearest_kronecker(operator) is operator


@thoroughly
@given(shape=shapes, seed=seeds, data=st.data(), damped=st.booleans(), terms=st.integers(1, 3))
def test_sums_of_products_take_the_problem_of_their_span(
    shape: tuple[int, int], seed: int, data: st.DataObject, damped: bool, terms: int
) -> None:
    random = Random(generator(seed))
    blocks = [kronecker_block(data.draw, shape, random, FACTORS) for _ in range(data.draw(st.integers(2, 3)))]
    total: Operator = Sum(tuple(block[0] for block in blocks))
    total = total.damp(0.3) if damped else total
    dense = total.to_dense()
    nearest = nearest_kronecker(total, terms=terms)
    assert abs(distance(nearest, dense) - best_error(dense, *shape, terms)) <= 1e-8 * float(dense.norm())
    if terms == 1:
        assert isinstance(nearest, Kronecker)
        assert float(nearest.to_dense().diagonal().min()) >= 0


def test_as_many_products_as_the_sum_has_are_exact() -> None:
    random = Random(generator(0))
    total = Sum(tuple(Kronecker(Dense(random.definite(4)), Dense(random.definite(3))) for _ in range(3)))
    assert_close(nearest_kronecker(total, terms=3).to_dense(), total.to_dense(), 1e-12)
    assert_close(nearest_kronecker(total, terms=9).to_dense(), total.to_dense(), 1e-12)


@thoroughly
@given(data=st.data(), terms=st.integers(1, 3))
def test_a_kronecker_eigenbasis_is_kept(data: st.DataObject, terms: int) -> None:
    case = data.draw(cases("eigen kronecker"))
    if len(case.operator.domain.shapes[0]) > 2:
        return
    nearest = nearest_kronecker(case.operator, terms=terms)
    expected = best_error(case.dense, *case.operator.domain.shapes[0], terms)
    assert abs(distance(nearest, case.dense) - expected) <= 1e-8 * float(case.dense.norm())


def test_low_rank_eigenvalues_count_as_often_as_they_occur() -> None:
    random = Random(generator(0))
    left, right = (LowRank(random.orthogonal(n)[:, :2], random.positive(2), random.positive(1)[0]) for n in (5, 4))
    operator = Kronecker(left, right).damp(0.4)
    nearest = nearest_kronecker(operator)
    dense = operator.to_dense()
    assert abs(distance(nearest, dense) - best_error(dense, 5, 4)) <= 1e-8 * float(dense.norm())


@briefly
@given(shape=shapes, seed=seeds)
def test_diagonals_have_diagonal_factors_and_identities_are_products(shape: tuple[int, int], seed: int) -> None:
    values = Random(generator(seed)).positive(*shape)
    nearest = nearest_kronecker(Diagonal(values))
    assert isinstance(nearest, Kronecker)
    assert isinstance(nearest.left, Diagonal)
    dense = torch.diag(values.reshape(-1))
    assert abs(distance(nearest, dense) - best_error(dense, *shape)) <= 1e-8 * float(dense.norm())
    identity = ScaledIdentity(torch.tensor(2.0, dtype=torch.float64), shape)
    assert_close(nearest_kronecker(identity).to_dense(), identity.to_dense())


@briefly
@given(seed=seeds, count=st.integers(2, 3))
def test_it_is_never_farther_than_merged_factors(seed: int, count: int) -> None:
    random = Random(generator(seed))
    terms = [Kronecker(Dense(random.definite(4)), Dense(random.definite(3))) for _ in range(count)]
    merged: Operator = terms[0]
    for i, term in enumerate(terms[1:], 1):
        merged = merge_factors(merged, term, weights=(i / (i + 1), 1 / (i + 1)))
    total = Sum(tuple(terms))
    assert distance(nearest_kronecker(total), total.to_dense()) <= distance(count * merged, total.to_dense())


# --- sweeps -------------------------------------------------------------------------------------------------------


def mixed(shape: tuple[int, ...], seed: int = 0) -> tuple[Operator, Tensor]:
    """A sum without a closed form: a product and a correction in another eigenbasis."""
    random = Random(generator(seed))
    *front, m, n = shape
    corrected = EigenKronecker(
        OrthogonalBasis(random.orthogonal(*front, m)),
        OrthogonalBasis(random.orthogonal(*front, n)),
        random.positive(*shape),
    )
    total = Kronecker(Dense(random.definite(*front, m)), Dense(random.definite(*front, n))) + corrected
    return total, total.to_dense()


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (1, 4), (4, 1), (5, 5)])
@pytest.mark.parametrize("terms", [1, 2])
def test_sweeps_agree_with_the_dense_decomposition(shape: tuple[int, int], terms: int) -> None:
    operator, dense = mixed(shape)
    nearest = nearest_kronecker(operator, terms=terms)
    assert abs(distance(nearest, dense) - best_error(dense, *shape, terms)) <= 1e-8 * float(dense.norm())


def test_every_group_has_its_own_nearest_product() -> None:
    operator, dense = mixed((2, 4, 3))
    nearest = nearest_kronecker(operator)
    assert nearest.domain.shapes == operator.domain.shapes
    groups = [dense[i * 12 : (i + 1) * 12, i * 12 : (i + 1) * 12] for i in range(2)]
    expected = sum(best_error(group, 4, 3) ** 2 for group in groups) ** 0.5
    assert abs(distance(nearest, dense) - expected) <= 1e-8 * float(dense.norm())


def test_a_sweep_applies_the_operator_to_few_vectors_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[int] = []
    apply = Sum._apply

    def counted(self: Sum, vectors: Tensor, leading: int) -> Tensor:
        stacks.append(len(vectors))
        return apply(self, vectors, leading)

    operator, _ = mixed((8, 3))
    monkeypatch.setattr(Sum, "_apply", counted)
    monkeypatch.setattr(Sum, "to_dense", None)
    nearest_kronecker(operator)
    assert set(stacks) == {3}
    assert len(stacks) % 8 == 0
    assert len(stacks) // 8 <= 6


def test_the_generator_only_decides_the_start() -> None:
    operator, _ = mixed((4, 4))
    first, again = (nearest_kronecker(operator).to_dense() for _ in range(2))
    assert torch.equal(first, again)
    state = torch.get_rng_state()
    assert_close(nearest_kronecker(operator, generator=generator(7)).to_dense(), first, 1e-8)
    assert torch.equal(state, torch.get_rng_state())


def test_packing_keeps_inner_products() -> None:
    x = Random(generator(0)).normal(3, 4, 4)
    x = x + x.mT
    vectors = rearranged.packed(x)
    assert_close(vectors @ vectors.mT, x.flatten(1) @ x.flatten(1).mT)
    assert_close(rearranged.unpacked(vectors, 4), x)


# --- curvatures and errors ----------------------------------------------------------------------------------------


def test_blocks_are_approximated_one_by_one_and_vectors_stay() -> None:
    operator, _ = mixed((3, 2))
    like = {"bias": torch.zeros(3, dtype=torch.float64), "weight": torch.zeros(3, 2, dtype=torch.float64)}
    places = tuple((name, Layout((Region.whole(i, like[name].shape),))) for i, name in enumerate(like))
    bias = Dense(definite(3, 1))
    nearest = nearest_kronecker(BlockDiagonal({"bias": bias, "weight": operator}, places, Domain.of(like)))
    assert nearest.blocks["bias"] is bias
    block = nearest.blocks["weight"]
    assert isinstance(block, Kronecker)
    assert_close(block.to_dense(), nearest_kronecker(operator).to_dense())
    with pytest.raises(ArgumentError, match="shape is for one block"):
        nearest_kronecker(nearest, shape=(3, 2))


def test_what_has_no_matrix_shape_is_refused() -> None:
    operator = Dense(definite(6, 0))
    with pytest.raises(NotKroneckerError, match=r"vectors of shape \(6,\) are not matrices: pass shape=\(m, n\)"):
        nearest_kronecker(operator)
    with pytest.raises(ShapeError, match=r"vectors of shape \(6,\) cannot be viewed as matrices \(2, 2\)"):
        nearest_kronecker(operator, shape=(2, 2))
    with pytest.raises(ArgumentError, match="terms must be at least 1, got 0"):
        nearest_kronecker(operator, shape=(2, 3), terms=0)


def test_no_convergence_names_residual_sweeps_and_singular_values() -> None:
    with pytest.raises(
        ConvergenceError,
        match=r"relative residual of .*e-\d+ after 1 sweeps, not 1\.0e-10: singular values .* raise max",
    ):
        nearest_kronecker(mixed((6, 6))[0], max_iterations=1)
