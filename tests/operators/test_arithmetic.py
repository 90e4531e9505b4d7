"""Differences, negatives, quotients and sums of operators; blocks by name; what is printed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import curvlib as cv
from curvlib.errors import ArgumentError, BlockNameError, CurvlibError, PytreeError, SingularError
from curvlib.operators import BlockDiagonal, Dense, Diagonal, Difference, Kronecker, Operator, Sum
from curvlib.pytree import flatten
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    Case,
    Random,
    assert_close,
    assert_number,
    block_diagonal,
    cases,
    domains,
    every_kind,
    generator,
    moderately,
)

random = Random(generator(0))
seeds = st.integers(0, 2**31)



def eye(matrix: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype)


def two_products() -> tuple[Kronecker, Kronecker]:
    a, b = (Kronecker(Dense(random.definite(3)), Dense(random.definite(2))) for _ in range(2))
    return a, b


# --- differences --------------------------------------------------------------------------------------------------


def check_difference(total: Operator, dense: torch.Tensor, case: Case) -> None:
    scale = float(dense.norm()) + 1e-3
    v = case.vector()
    assert_close(total.to_dense(), dense)
    assert_close(flat(total @ v), dense @ flat(v))
    assert_number(total.quadratic(v), flat(v) @ dense @ flat(v))
    assert_close(flat(total.diag()), dense.diagonal())
    assert_number(total.trace(), dense.trace())
    assert_number(total.frobenius_norm(), dense.norm())
    shift = 2 * scale  # larger than every eigenvalue
    shifted = dense + shift * eye(dense)
    assert_close(total.inverse(shift).to_dense(), shifted.inverse(), 1e-8)
    assert_number(total.damp(shift).logdet(), torch.logdet(shifted))
    assert_close((2 * total).to_dense(), 2 * dense)


@every_kind
@moderately
@given(data=st.data())
def test_a_difference_is_that_of_the_matrices(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    if case.tolerance > 1e-10:  # an inverse that is solved for
        return
    check_difference(case.operator - 0.25 * case.operator, 0.75 * case.dense, case)
    check_difference(case.operator - 1.5 * case.operator, -0.5 * case.dense, case)


@moderately
@given(data=st.data(), seed=seeds)
def test_differences_and_sums_mix(data: st.DataObject, seed: int) -> None:
    domain, source = data.draw(domains()), Random(generator(seed))
    a, b, c = (block_diagonal(data.draw, domain, source) for _ in range(3))
    A, B, C = (x.dense for x in (a, b, c))
    check_difference(a.operator - b.operator + c.operator, A - B + C, a)
    check_difference(a.operator - (b.operator - c.operator), A - B + C, a)
    check_difference((a.operator - b.operator) - c.operator, A - B - C, a)
    check_difference((a.operator - b.operator) + (c.operator - a.operator), C - B, a)
    check_difference(a.operator.damp(0.1) - b.operator.damp(0.2), A - B - 0.1 * eye(A), a)


def test_a_difference_with_a_closed_form_keeps_its_class() -> None:
    a, b = random.definite(4), random.definite(4)
    assert isinstance(Dense(a) - Dense(b), Dense)
    assert isinstance(Diagonal(a.diagonal()) - Diagonal(b.diagonal()), Diagonal)
    assert isinstance(Dense(a) - Diagonal(b.diagonal()), Difference)


def test_powers_and_samples_of_an_indefinite_difference_are_refused_and_its_inverse_is_exact() -> None:
    a, b = two_products()
    total = a - 3 * a + b - b
    for make in (lambda: total.power(0.5), lambda: total.sample(generator(0)), lambda: total.power(-0.5)):
        with pytest.raises(SingularError):
            make()
    assert_close(total.inverse().to_dense(), (-2 * a.to_dense()).inverse())
    positive = a - 0.5 * a
    assert_close(positive.power(0.5).to_dense() @ positive.power(0.5).to_dense(), 0.5 * a.to_dense())
    draws = positive.sample(generator(0), 20_000).reshape(20_000, -1)
    assert_close(draws.mT @ draws / 20_000, 0.5 * a.to_dense(), 0.1)


def test_a_large_difference_has_products_and_says_what_it_does_not_have() -> None:
    a, b = (Kronecker(Dense(random.definite(50)), Dense(random.definite(50))) for _ in range(2))
    total = a - b
    v = random.normal(50, 50)
    assert_close(total @ v, a @ v - b @ v)
    assert_number(total.trace(), a.trace() - b.trace())
    for operator in (total, total.damp(0.1)):
        for make in (operator.inverse, operator.eigenvalues, lambda x=operator: x.sample(generator(0))):
            with pytest.raises(SingularError, match="may be indefinite"):
                make()
    solved = (a - 0.5 * a).inverse(1.0, solver=cv.CG(tolerance=1e-10))
    assert_close((0.5 * a).damp(1.0) @ (solved @ v), v, 1e-9)
    with pytest.raises(CurvlibError, match="not positive definite"):
        (a - 2 * a).inverse(0.0, solver=cv.CG()) @ v


def test_operators_on_different_vectors_are_not_subtracted() -> None:
    with pytest.raises(PytreeError, match="act on different vectors"):
        Dense(random.definite(2)) - Dense(random.definite(3))
    with pytest.raises(TypeError):
        Dense(random.definite(2)) - 1.0  # type: ignore[operator]


# --- negatives, quotients, sums -----------------------------------------------------------------------------------


@every_kind
@moderately
@given(data=st.data())
def test_negatives_and_quotients_are_those_of_the_matrices(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    assert_close((-case.operator).to_dense(), -case.dense, max(case.tolerance, 1e-10))
    for divisor in (4.0, torch.tensor(4.0)):
        assert_close((case.operator / divisor).to_dense(), case.dense / 4, max(case.tolerance, 1e-10))


def test_an_operator_is_divided_by_numbers_only() -> None:
    a, b = two_products()
    with pytest.raises(ArgumentError, match="divided by a number"):
        a / b  # type: ignore[operator]
    with pytest.raises(ZeroDivisionError):
        a / 0


def test_sum_starts_with_zero() -> None:
    a, b = two_products()
    total = sum([a, b])
    assert isinstance(total, Sum)
    assert_close(total.to_dense(), a.to_dense() + b.to_dense())
    with pytest.raises(TypeError):
        1 + a  # type: ignore[operator]


# --- blocks and text ----------------------------------------------------------------------------------------------


def layers(number: int) -> BlockDiagonal:
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(number))).double()
    model_fn, params = cv.functional(model)
    batch = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    return cv.kfac(model_fn, params, batch, loss=cv.MSE())


def test_a_block_is_had_by_its_name_and_an_unknown_one_lists_those_near() -> None:
    curv = layers(3)
    assert curv["1.weight"] is curv.blocks["1.weight"]
    with pytest.raises(BlockNameError, match=r"no block '1.wieght' among 3; the nearest are '1.weight'") as caught:
        curv["1.wieght"]
    assert isinstance(caught.value, KeyError)
    with pytest.raises(TypeError):
        list(curv)


def test_what_is_printed_is_a_short_table_without_numbers() -> None:
    curv = layers(40)
    texts = {
        "curvature": repr(curv),
        "inverse": repr(curv.inverse(0.1)),
        "projection": repr(curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.EigenSketch(2))),
    }
    for text in texts.values():
        assert "tensor(" not in text
        assert "... 28 more" in text
        assert len(text.splitlines()) == 15
    total = sum(x.nbytes for x in flatten(curv)[0])
    assert "480 parameters in 80 tensors, float64, " + f"{total / 1000:.3g} kB" in texts["curvature"]
    assert "0.weight  Kronecker(Dense, Dense)  (3, 4)  float64" in texts["curvature"]


@every_kind
@moderately
@given(data=st.data())
def test_every_operator_is_printed_in_a_few_lines(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    text = repr(operator)
    assert type(operator).__name__ in text
    assert "float64" in text
    assert "tensor(" not in text
    assert len(text) < 1000
    strange = torch.utils._pytree.tree_map(lambda x: object(), operator)
    assert type(operator).__name__ in repr(strange)
