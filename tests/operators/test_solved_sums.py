"""More than two Kronecker products are inverted by conjugate gradients, in few iterations."""

from __future__ import annotations

from unittest import mock

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlib.errors import ArgumentError, ConvergenceError, ShapeError
from curvlib.linalg.conjugate_gradient import conjugate_gradient
from curvlib.operators import (
    CG,
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Inverse,
    Kronecker,
    Layout,
    LowRank,
    Operator,
    OrthogonalBasis,
    Region,
    ScaledIdentity,
    Sum,
)
from curvlib.operators.inverse import solutions
from curvlib.pytree import Domain
from tests.operators.kronecker_sum_cases import big, dense_sum, eye, products, thoroughly
from tests.operators.operator_cases import (
    Random,
    assert_close,
    assert_number,
    generator,
)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@thoroughly
@given(data=st.data(), count=st.integers(2, 4), damping=st.sampled_from([1e-4, 0.1, 10.0]))
def test_conjugate_gradients_reach_the_stated_residual(data: st.DataObject, count: int, damping: float) -> None:
    total, dense = products(data, count)
    with big():
        inverse = total.inverse(damping)
    v = Random(generator(2)).normal(3, *total.domain.shapes[0])
    shifted = dense + damping * eye(dense)
    residual = v.reshape(3, -1) - inverse.matmat(v).reshape(3, -1) @ shifted
    assert bool((residual.norm(dim=1) <= 1.01e-8 * v.reshape(3, -1).norm(dim=1)).all())


def applications(operator: Operator, v: Tensor) -> int:
    """How many products with each vector an inverse takes."""
    assert isinstance(operator, Inverse)
    with mock.patch.object(
        type(operator.operator), "_apply", autospec=True, side_effect=type(operator.operator)._apply
    ) as count:
        operator @ v
    return int(count.call_count)


def decaying(width: int, seed: int) -> Dense:
    q = Random(generator(seed)).orthogonal(width)
    return Dense(q @ torch.diag(torch.arange(1, width + 1, dtype=torch.float64) ** -1.5) @ q.mT)


@pytest.mark.parametrize(("relative", "most"), [(10.0, 20), (1.0, 22), (0.1, 24), (1e-2, 16), (1e-4, 10), (1e-6, 7)])
def test_two_damped_products_take_few_iterations(relative: float, most: int) -> None:
    total = Kronecker(decaying(24, 0), decaying(20, 1)) + Kronecker(decaying(24, 2), decaying(20, 3))
    with big():
        inverse = total.inverse(relative * float(total.trace()) / total.domain.size)
    assert applications(inverse, Random(generator(4)).normal(24, 20)) <= most


def test_without_damping_the_rough_inverse_of_three_products_is_still_good() -> None:
    total = dense_sum(12, 10, count=3)
    with big():
        inverse = total.inverse()
    assert applications(inverse, Random(generator(4)).normal(12, 10)) <= 30


def other_sums() -> dict[str, Operator]:
    """Sums whose terms are not, or not only, products of dense sides."""
    random = Random(generator(0))

    def low_rank(width: int) -> LowRank:
        return LowRank(random.orthogonal(width)[:, :2], random.positive(2), random.positive(1)[0])

    def corrected() -> EigenKronecker:
        bases = [OrthogonalBasis(random.orthogonal(width)) for width in (5, 4)]
        return EigenKronecker(*bases, random.positive(5, 4))

    product = dense_sum(5, 4).terms[0]
    coarse = Kronecker(low_rank(5), low_rank(4)).damp(0.1)
    return {
        "low-rank sides": Kronecker(low_rank(5), low_rank(4)) + Kronecker(low_rank(5), low_rank(4)),
        "one low-rank side": product + Kronecker(low_rank(5), Dense(random.definite(4))),
        "corrected": corrected() + corrected(),
        "coarse": coarse + Diagonal(random.positive(5, 4)),
        "diagonal": product + Diagonal(random.positive(5, 4)),
        "corrected and product": product + corrected(),
        "matrices": Sum((Dense(random.definite(6)), Diagonal(random.positive(6)))),
    }


@pytest.mark.parametrize("name", other_sums())
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_sums_of_other_operators_are_solved_too(name: str, damping: float) -> None:
    total = other_sums()[name]
    with big():
        inverse = total.inverse(damping)
    v = Random(generator(3)).normal(*total.domain.shapes[0])
    dense = total.to_dense() + damping * eye(total.to_dense())
    assert relative_error(dense @ (inverse @ v).reshape(-1), v.reshape(-1)) <= 1.01e-8


def test_vectors_are_solved_together_and_leave_when_they_are_done() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    b = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.float64)
    sizes: list[int] = []

    def product(v: Tensor) -> Tensor:
        sizes.append(len(v))
        return v @ matrix

    assert_close(conjugate_gradient(product, b, stacked=True), b / matrix.diagonal())
    assert sizes == [3, 2, 1, 1]


def test_a_sum_of_curvatures_on_several_tensors_is_solved_and_has_numbers() -> None:
    random = Random(generator(0))
    like = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}
    place = tuple((name, Layout((Region.whole(i, like[name].shape),))) for i, name in enumerate(like))
    curvatures = []
    for _ in range(2):
        blocks = {"a": Kronecker(Dense(random.definite(2)), Dense(random.definite(3))), "b": Dense(random.definite(4))}
        curvatures.append(BlockDiagonal(dict(blocks), place, Domain.of(like)))
    total = Sum(tuple(curvatures))
    with big():
        inverse = total.inverse(0.1)
    dense = total.to_dense() + 0.1 * eye(total.to_dense())
    v = optree.tree_map(lambda x: random.normal(2, *x.shape), like)
    solved = inverse.matmat(v)
    rows = [torch.cat([tree[name].reshape(2, -1) for name in ("a", "b")], 1) for tree in (v, solved)]
    assert relative_error(rows[1] @ dense, rows[0]) <= 1.01e-8
    assert_number(inverse.trace(), torch.linalg.inv(dense).trace())


def test_no_convergence_says_residual_steps_and_what_to_do() -> None:
    total = dense_sum(6, 5, count=3).damp(0.1)
    rough = ScaledIdentity(torch.ones((), dtype=torch.float64), (6, 5))
    inverse = Inverse(total, CG(rough, max_iterations=2))
    with pytest.raises(
        ConvergenceError,
        match=r"relative residual of .*e-?\d+ in 3 of 3 systems after 2 iterations, not 1\.0e-08; add damping .*merge",
    ):
        inverse.matmat(Random(generator(1)).normal(3, 6, 5))


def test_an_indefinite_operator_is_named_as_such() -> None:
    operator = Diagonal(torch.tensor([1.0, -1.0], dtype=torch.float64))
    rough = Diagonal(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ConvergenceError, match=r"v\^T M v = -?\d.* the operator is not positive definite; add damping"):
        Inverse(operator, CG(rough)) @ torch.tensor([0.0, 1.0], dtype=torch.float64)


def test_single_precision_is_solved_to_what_it_can_reach() -> None:
    total = dense_sum(6, 5, count=3)
    with big():
        inverse = total.to(dtype=torch.float32).inverse(0.1)
    v = Random(generator(1)).normal(6, 5)
    dense = total.damp(0.1).to_dense()
    assert relative_error(dense @ (inverse @ v.float()).double().reshape(-1), v.reshape(-1)) <= 1e-5


def test_vectors_of_another_shape_and_too_many_rows_are_refused() -> None:
    total = dense_sum(3, 4)
    with pytest.raises(ShapeError, match=r"expected a vector of shape \(3, 4\), got \(4, 3\)"):
        total.inverse() @ torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"inverse of a sum of two Kronecker products with 2500 rows"):
        dense_sum(50, 50).inverse().eigenvalues()


def test_systems_without_unknowns_have_solutions_without_entries() -> None:
    nothing = Diagonal(torch.ones(0, dtype=torch.float64))
    found = solutions(nothing, torch.zeros(3, 0).double(), 1, CG(tolerance=1e-9, max_iterations=9))
    assert found.shape == (3, 0)
