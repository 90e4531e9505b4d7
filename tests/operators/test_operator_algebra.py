"""What every operator can do, against its dense twin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlib.operators import Damping, Dense, Kronecker, Operator, RelativeTikhonov
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    Case,
    Random,
    assert_close,
    assert_number,
    cases,
    conjugated,
    every_closed_kind,
    every_damping,
    every_kind,
    generator,
    matrix_function,
    moderately,
    sparingly,
)

exponents = st.sampled_from([-2, -1, -0.5, 0.25, 0.5, 1, 1.5, 2])


@every_kind
@moderately
@given(data=st.data())
def test_to_dense_is_the_twin(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    assert_close(case.operator.to_dense(), case.dense)
    assert case.operator.domain.size == len(case.dense)


@every_kind
@moderately
@given(data=st.data())
def test_matvec_is_the_twins_product(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    v = case.vector()
    expected = case.dense @ flat(v)
    assert_close(flat(case.operator.matvec(v)), expected, case.tolerance)
    assert_close(flat(case.operator @ v), expected, case.tolerance)


@every_kind
@moderately
@given(data=st.data(), stacked=st.integers(1, 4))
def test_matmat_is_matvec_of_every_vector_along_the_leading_axis(kind: str, data: st.DataObject, stacked: int) -> None:
    case = data.draw(cases(kind))
    v = case.vector(stacked=stacked)
    product = flat(case.operator.matmat(v), stacked=True)
    assert_close(product, flat(v, stacked=True) @ case.dense, case.tolerance)


@every_kind
@moderately
@given(data=st.data())
def test_quadratic_is_the_inner_product_with_the_image(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    v = case.vector()
    value = case.operator.quadratic(v)
    assert value.shape == ()
    assert_close(value, flat(v) @ case.dense @ flat(v), case.tolerance)


@every_kind
@moderately
@given(data=st.data(), p=exponents, q=exponents)
def test_power_is_additive(kind: str, data: st.DataObject, p: float, q: float) -> None:
    case = data.draw(cases(kind))
    v = case.vector()
    twice = case.operator.power(p) @ (case.operator.power(q) @ v)
    # p = 1 is the operator itself; Inverse then has errors of its tolerance
    size = max(float(torch.linalg.norm(flat(twice))), 1.0)
    error = torch.linalg.norm(flat(twice) - flat(case.operator.power(p + q) @ v))
    assert float(error) <= 10 * case.tolerance * size
    assert_close(case.operator.power(p).to_dense(), matrix_function(case.dense, lambda x: x**p))


@every_kind
@moderately
@given(data=st.data())
def test_power_zero_is_the_identity(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    v = case.vector()
    assert_close(flat(case.operator.power(0) @ v), flat(v))


@every_kind
@every_damping
@sparingly
@given(data=st.data())
def test_damp_adds_what_the_formulas_say(kind: str, damping: Damping | float, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    assert_close(case.operator.damp(damping).to_dense(), case.damped(damping))


@every_kind
@every_damping
@sparingly
@given(data=st.data())
def test_damped_operator_times_inverse_is_the_identity(
    kind: str, damping: Damping | float, data: st.DataObject
) -> None:
    case = data.draw(cases(kind))
    v = case.vector()
    inverse = case.operator.inverse(damping)
    assert_close(case.damped(damping) @ flat(inverse @ v), flat(v))
    assert_close(case.damped(damping) @ inverse.to_dense(), torch.eye(len(case.dense), dtype=torch.float64))


@every_kind
@moderately
@given(data=st.data())
def test_inverse_without_damping_solves(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    v = case.vector()
    assert_close(case.dense @ flat(case.operator.inverse() @ v), flat(v))


@every_kind
@every_damping
@sparingly
@given(data=st.data(), p=exponents)
def test_power_is_that_of_the_damped_operator(
    kind: str, damping: Damping | float, data: st.DataObject, p: float
) -> None:
    case = data.draw(cases(kind))
    expected = matrix_function(case.damped(damping), lambda x: x**p)
    assert_close(case.operator.power(p, damping).to_dense(), expected)


@every_kind
@moderately
@given(data=st.data())
def test_damping_may_be_a_tensor(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    v = flat(case.vector())
    for damping in (torch.tensor(0.3, dtype=torch.float64), RelativeTikhonov(torch.tensor(0.2, dtype=torch.float64))):
        number = RelativeTikhonov(0.2) if isinstance(damping, RelativeTikhonov) else 0.3
        inverse = case.operator.inverse(damping)
        assert_close(case.damped(number) @ flat(inverse @ case.vector()), v)


def assert_numbers_agree(operator: Operator, dense: Tensor) -> None:
    """Everything that is read off an operator, against its dense matrix."""
    assert_close(flat(operator.diag()), dense.diagonal())
    assert_number(operator.trace(), dense.trace())
    assert_number(operator.frobenius_norm(), dense.norm())
    assert_close(operator.eigenvalues(), torch.linalg.eigvalsh(dense))
    assert_number(operator.logdet(), torch.linalg.slogdet(dense)[1])


@every_kind
@moderately
@given(data=st.data())
def test_diag_trace_norm_eigenvalues_and_logdet_are_the_twins(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    assert_numbers_agree(case.operator, case.dense)


@every_kind
@every_damping
@sparingly
@given(data=st.data())
def test_diag_trace_norm_eigenvalues_and_logdet_of_the_inverse_are_the_twins(
    kind: str, damping: Damping | float, data: st.DataObject
) -> None:
    case = data.draw(cases(kind))
    assert_numbers_agree(case.operator.inverse(damping), torch.linalg.inv(case.damped(damping)))


@every_kind
@moderately
@given(data=st.data())
def test_eigenvalues_ascend(kind: str, data: st.DataObject) -> None:
    values = data.draw(cases(kind)).operator.eigenvalues()
    assert bool((values.diff() >= 0).all())


@every_kind
@moderately
@given(data=st.data())
def test_map_eigenvalues_keeps_the_eigenvectors(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    mapped = case.operator.map_eigenvalues(lambda x: x / (x + 0.5))
    assert_close(mapped.to_dense(), matrix_function(case.dense, lambda x: x / (x + 0.5)))


@every_kind
@moderately
@given(data=st.data(), factor=st.sampled_from([0.25, 3.0]), as_tensor=st.booleans())
def test_scaling_scales_from_both_sides(kind: str, data: st.DataObject, factor: float, as_tensor: bool) -> None:
    case = data.draw(cases(kind))
    number = torch.tensor(factor, dtype=torch.float64) if as_tensor else factor
    assert_close((case.operator * number).to_dense(), factor * case.dense)
    assert_close((number * case.operator).to_dense(), factor * case.dense)
    v = case.vector()
    assert_close(flat((number * case.operator) @ v), factor * case.dense @ flat(v), case.tolerance)


def sample_case(case: Case) -> None:
    n, size = 40_000, len(case.dense)
    draws = flat(case.operator.sample(generator(1), n), stacked=True)
    assert draws.shape == (n, size)
    # E ||S - M||^2 = (tr(M)^2 + ||M||^2) / n for n draws of a normal distribution; six times its root is out of reach
    spread = math.sqrt(float(case.dense.trace() ** 2 + case.dense.norm() ** 2) / n)
    assert float((draws.mT @ draws / n - case.dense).norm()) <= 6 * spread
    assert float(draws.mean(0).norm()) <= 6 * math.sqrt(float(case.dense.trace()) / n)


@every_kind
@moderately
@given(data=st.data())
def test_samples_have_the_operator_as_covariance(kind: str, data: st.DataObject) -> None:
    sample_case(data.draw(cases(kind)))


@every_kind
@moderately
@given(data=st.data())
def test_one_sample_is_a_vector_that_the_generator_decides(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    first, again, other = (flat(case.operator.sample(generator(seed))) for seed in (3, 3, 4))
    assert first.shape == (len(case.dense),)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_closed_kind
@moderately
@given(data=st.data())
def test_parameters_and_blocks_name_each_other(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    holders = {name for names in operator.parameters.values() for name in names}
    assert holders == set(operator.blocks)
    assert len(operator.parameters) == len(operator.domain.shapes)
    if kind == "block diagonal":
        assert sum(block.domain.size for block in operator.blocks.values()) == operator.domain.size


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_powers_of_indefinite_operators_are_taken_where_they_exist(sign: float) -> None:
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    values = torch.tensor([sign, 2.0, 3.0], dtype=torch.float64)
    operator = Dense(conjugated(q, values))
    assert_close(operator.power(-1).to_dense(), conjugated(q, 1 / values))
    assert_close(operator.power(2).to_dense(), conjugated(q, values**2))


@pytest.mark.parametrize("width", [2, 3])
def test_factors_may_lie_in_memory_in_any_order(width: int) -> None:
    random = Random(generator(0))
    g, a, v = random.definite(3).mT, random.definite(width), random.normal(3, width)
    for left, right in ((g, a), (g, a.mT), (g.mT, a.mT)):
        operator = Kronecker(Dense(left), Dense(right))
        dense = torch.einsum("ik,jl->ijkl", left, right).reshape(3 * width, 3 * width)
        assert_close((operator @ v).reshape(-1), dense @ v.reshape(-1))
        assert_close(operator.to_dense(), dense)
