"""Two Kronecker products are inverted directly, and no matrix is decomposed twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlib.errors import SingularError
from curvlib.operators import (
    Dense,
    Diagonal,
    EigenKronecker,
    FactoredTikhonov,
    Inverse,
    Kronecker,
    Matrix,
    Operator,
    ScaledIdentity,
    Shifted,
    SimultaneousKronecker,
    Sum,
)
from tests.operators.kronecker_sum_cases import big, briefly, dense_sum, eye, products, seeds, thoroughly
from tests.operators.operator_cases import (
    Random,
    assert_close,
    assert_number,
    cases,
    generator,
)


@thoroughly
@given(data=st.data())
def test_the_inverse_of_two_products_is_exact_at_any_size(data: st.DataObject) -> None:
    total, dense = products(data, 2)
    with big():
        inverse = total.inverse()
    assert isinstance(inverse, (SimultaneousKronecker, EigenKronecker))
    exact, bound = torch.linalg.inv(dense), 1e-13 * float(torch.linalg.cond(dense))
    assert_close(inverse.to_dense(), exact, bound)
    v = Random(generator(1)).normal(2, *total.domain.shapes[0])
    assert_close(inverse.matmat(v).reshape(2, -1), v.reshape(2, -1) @ exact, bound)


@thoroughly
@given(data=st.data())
def test_numbers_of_the_inverse_of_two_products_are_those_of_the_dense_inverse(data: st.DataObject) -> None:
    total, dense = products(data, 2)
    inverse, exact = total.inverse(), torch.linalg.inv(dense)
    assert_close(inverse.diag().reshape(-1), exact.diagonal())
    assert_number(inverse.trace(), exact.trace())
    assert_number(inverse.frobenius_norm(), exact.norm())
    assert_number(inverse.logdet(), -torch.logdet(dense))
    assert_close(inverse.eigenvalues(), torch.linalg.eigvalsh(exact))
    assert_close(inverse._power(-1, damped=False).to_dense(), dense)
    assert_close(inverse.power(0.5).to_dense() @ inverse.power(0.5).to_dense(), exact)
    assert_close((3 * inverse).to_dense(), 3 * exact)
    assert_close(inverse.damp(0.2).to_dense(), exact + 0.2 * eye(exact))


def test_samples_of_the_inverse_have_it_as_covariance() -> None:
    inverse = dense_sum(2, 3).inverse()
    dense, n = inverse.to_dense(), 40_000
    draws = inverse.sample(generator(1), n).reshape(n, -1)
    spread = float((dense.trace() ** 2 + dense.norm() ** 2) / n) ** 0.5
    assert float((draws.mT @ draws / n - dense).norm()) <= 6 * spread


@pytest.mark.parametrize("exponent", [4, 8, 12])
def test_a_singular_side_is_no_obstacle_if_the_sum_is_definite(exponent: int) -> None:
    random = Random(generator(0))
    x, y = random.normal(6, 3), random.normal(6, 3)
    a = [random.definite(4) for _ in range(2)]
    faint = 10.0**-exponent
    total = Kronecker(Dense(x @ x.mT), Dense(a[0])) + Kronecker(Dense(faint * (y @ y.mT)), Dense(a[1]))
    dense = total.to_dense()
    inverse, v = total.inverse(), random.normal(6, 4)
    assert isinstance(inverse, SimultaneousKronecker)
    solved = inverse @ v
    residual = (dense @ solved.reshape(-1) - v.reshape(-1)).norm()
    assert float(residual) <= 1e-13 * float(dense.norm() * solved.norm())


def test_a_difference_of_products_is_inverted_too() -> None:
    total = dense_sum(4, 3)
    difference = total.terms[0] + (-0.3) * total.terms[1]
    inverse = difference.inverse()
    assert isinstance(inverse, SimultaneousKronecker)
    assert_close(inverse.to_dense(), torch.linalg.inv(difference.to_dense()), 1e-9)


def test_a_sum_that_is_singular_is_refused() -> None:
    half = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, 0.0], [0.0, 1.0])]
    mixed = Random(generator(0)).orthogonal(2)
    half = [mixed @ h @ mixed.mT for h in half]
    total = Kronecker(Dense(half[0]), Dense(half[0])) + Kronecker(Dense(half[1]), Dense(half[1]))
    rank_deficient = [Dense(x @ x.mT) for x in (Random(generator(s)).normal(5, 2) for s in (1, 2))]
    both = Kronecker(rank_deficient[0], Dense(half[0])) + Kronecker(rank_deficient[1], Dense(half[1]))
    for operator in (total, both):
        with pytest.raises(SingularError, match="pass damping > 0"):
            operator.inverse()
        assert_close(operator.damp(0.1).to_dense() @ operator.inverse(0.1).to_dense(), eye(operator.to_dense()))


@briefly
@given(seed=seeds, side=st.sampled_from(["left", "right", "both"]), damping=st.sampled_from([1e-3, 0.5]))
def test_damping_is_absorbed_by_a_product_with_the_identity_on_a_side(seed: int, side: str, damping: float) -> None:
    random = Random(generator(seed))
    identities = [ScaledIdentity(torch.tensor(0.7, dtype=torch.float64), (n,)) for n in (4, 3)]
    sides: list[Matrix] = [Dense(random.definite(4)), Dense(random.definite(3))]
    if side != "right":
        sides[0] = identities[0]
    if side != "left":
        sides[1] = identities[1]
    total = Kronecker(Dense(random.definite(4)), Dense(random.definite(3))) + Kronecker(sides[0], sides[1])
    with big():
        inverse = total.inverse(damping)
    assert not isinstance(inverse, Inverse)
    dense = total.to_dense()
    assert_close(inverse.to_dense() @ (dense + damping * eye(dense)), eye(dense))


def test_products_damped_one_by_one_are_two_products() -> None:
    one, two = dense_sum(5, 4).terms
    damped = one.damp(FactoredTikhonov(0.1)) + two.damp(FactoredTikhonov(0.1))
    inverse = damped.inverse()
    assert isinstance(inverse, SimultaneousKronecker)
    assert_close(inverse.to_dense(), torch.linalg.inv(damped.to_dense()), 1e-9)


@pytest.mark.parametrize("strength", [1e-2, 1.0])
def test_wide_sides_in_single_precision_have_a_direct_inverse_too(strength: float) -> None:
    random = Random(generator(0))
    width, tokens = 320, 40
    factors = [x @ x.mT / width for x in (random.normal(width, 200) for _ in range(2))]  # singular
    counts = [random.positive(tokens) * (torch.arange(tokens) < 9), random.positive(tokens)]
    total = Sum(tuple(Kronecker(Dense(m), Diagonal(d)) for m, d in zip(factors, counts, strict=True)))
    damping, v = FactoredTikhonov(strength, relative=True), random.normal(width, tokens)
    inverse = total.to(dtype=torch.float32).inverse(damping)
    assert isinstance(inverse, SimultaneousKronecker)
    residual = total.damp(damping) @ (inverse @ v.float()).double() - v
    assert float(residual.norm()) <= 1e-4 * float(v.norm())


def test_the_inverse_of_two_products_goes_through_transforms() -> None:
    total = dense_sum(3, 4)
    v = Random(generator(1)).normal(2, 3, 4)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    solved = torch.func.vmap(lambda s, w: (s * total).inverse() @ w)(scales, v)
    expected = total.inverse().matmat(v) / scales[:, None, None]
    assert_close(solved, expected, 1e-11)
    random = Random(generator(2))
    g, a = random.definite(3), random.definite(4)
    gradient = torch.func.grad(lambda g: (Kronecker(Dense(g), Dense(a)) + total.terms[0]).inverse().quadratic(v[0]))(g)
    u = (Kronecker(Dense(g), Dense(a)) + total.terms[0]).inverse() @ v[0]
    assert_close((gradient + gradient.mT) / 2, -(u @ a @ u.mT), 1e-9)


# --- what is remembered -------------------------------------------------------------------------------------------


def eigendecompositions(fn: Callable[[], Any]) -> int:
    with mock.patch("torch.linalg.eigh", wraps=torch.linalg.eigh) as counter:
        fn()
    return int(counter.call_count)


def test_a_sum_is_decomposed_once_for_all_dampings() -> None:
    total = dense_sum(3, 4, count=3)

    def derive() -> None:
        for damping in (0.0, 0.1, 0.5):
            total.inverse(damping).trace(), total.power(-0.5, damping), total.damp(damping).logdet()

    assert eigendecompositions(derive) == 1
    assert eigendecompositions(derive) == 0


def test_a_direct_inverse_decomposes_one_matrix_a_side_and_its_products_none() -> None:
    total = dense_sum(3, 4)
    made: list[Operator] = []
    assert eigendecompositions(lambda: made.append(total.inverse())) == 2
    inverse, v = made[0], torch.ones(3, 4, dtype=torch.float64)

    def work() -> None:
        inverse @ v, inverse.diag(), inverse.trace(), inverse.logdet(), inverse.frobenius_norm()

    assert eigendecompositions(work) == 0
    assert eigendecompositions(lambda: [inverse.eigenvalues(), inverse.power(0.5)]) == 1


def test_a_solved_inverse_decomposes_when_it_is_made_and_its_dense_form_once() -> None:
    total = dense_sum(3, 4)
    with big():
        made: list[Operator] = []
        assert eigendecompositions(lambda: made.append(total.inverse(0.1))) == 2
    inverse, v = made[0], torch.ones(5, 3, 4, dtype=torch.float64)
    assert eigendecompositions(lambda: inverse.matmat(v)) == 0
    assert eigendecompositions(lambda: [inverse.diag(), inverse.trace(), inverse.eigenvalues()]) == 1
    assert eigendecompositions(inverse.trace) == 0


@briefly
@given(data=st.data(), damping=st.sampled_from([0.2, 1.0]))
def test_a_damped_sum_adds_up(data: st.DataObject, damping: float) -> None:
    case = data.draw(cases("sum"))
    damped = case.operator.damp(damping)
    assert isinstance(damped, Shifted)
    dense = case.dense + damping * eye(case.dense)
    assert_number(damped.frobenius_norm(), dense.norm())
    assert_number(damped.logdet(), torch.logdet(dense))
    assert_close(damped.damp(0.5).to_dense(), dense + 0.5 * eye(dense))
    for total in (damped + case.operator, case.operator + damped):
        assert isinstance(total, Shifted)
        assert_close(total.to_dense(), dense + case.dense)
    assert_close((damped + damped).to_dense(), 2 * dense)
