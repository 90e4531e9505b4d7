"""Sums are exact; means of factors are what they say."""

from __future__ import annotations

from unittest import mock

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlib.errors import ArgumentError, CurvlibError, NotKroneckerError, PytreeError
from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Inverse,
    Kronecker,
    Operator,
    ScaledIdentity,
    SimultaneousKronecker,
    Sum,
    ema,
    merge_factors,
)
from curvlib.operators import sums as sums_module
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    Random,
    assert_close,
    block_diagonal,
    cases,
    domains,
    every_kind,
    every_mergeable_kind,
    generator,
    moderately,
    sum_block,
    tensor_case,
)

random = Random(generator(0))
seeds = st.integers(0, 2**31)


@every_kind
@moderately
@given(data=st.data())
def test_a_sum_with_another_curvature_of_the_same_domain_is_exact(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    other = case.operator.inverse(0.4)
    twin = case.dense + torch.linalg.inv(case.damped(0.4))
    for total in (case.operator + other, other + case.operator):
        assert_close(total.to_dense(), twin)
        assert_close(flat(total @ case.vector()), twin @ flat(case.vector()), case.tolerance)
    assert_close((case.operator + case.operator).to_dense(), 2 * case.dense)


@every_kind
@moderately
@given(data=st.data())
def test_adding_a_scaled_identity_is_damping(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    if len(case.operator.domain.shapes) > 1:
        return
    identity = ScaledIdentity(torch.tensor(0.7, dtype=torch.float64), case.operator.domain.shapes[0])
    for total in (case.operator + identity, identity + case.operator):
        assert_close(total.to_dense(), case.damped(0.7))


@moderately
@given(data=st.data())
def test_equally_laid_out_block_diagonals_are_added_block_by_block(data: st.DataObject) -> None:
    case = data.draw(cases("block diagonal"))
    other = optree.tree_map(lambda x: 2 * x, case.operator, namespace="curvlib")
    total = case.operator + other
    assert isinstance(total, BlockDiagonal)
    assert_close(total.to_dense(), case.dense + other.to_dense())


@moderately
@given(data=st.data(), seed=seeds)
def test_differently_laid_out_block_diagonals_have_an_exact_sum(data: st.DataObject, seed: int) -> None:
    domain, source = data.draw(domains()), Random(generator(seed))
    a, b, c = (block_diagonal(data.draw, domain, source) for _ in range(3))
    total = a.operator + b.operator + 0.5 * c.operator
    twin = a.dense + b.dense + 0.5 * c.dense
    assert_close(total.to_dense(), twin)
    assert_close(flat(total @ a.vector()), twin @ flat(a.vector()))


@pytest.mark.parametrize("kind", ["dense", "diagonal", "scaled identity"])
@moderately
@given(data=st.data())
def test_sums_that_have_a_closed_form_stay_in_their_class(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    assert type(operator + operator) is type(operator)


def test_a_sum_of_kronecker_products_is_not_merged() -> None:
    a, b = (Kronecker(Dense(random.definite(2)), Dense(random.definite(3))) for _ in range(2))
    total = a + b
    assert isinstance(total, Sum)
    assert total.terms == (a, b)
    assert isinstance(total + a, Sum)
    assert (total + a).terms == (a, b, a)


@moderately
@given(data=st.data(), seed=seeds, damping=st.sampled_from([0.05, 1.0]))
def test_the_inverse_of_a_big_sum_is_direct_or_solved_by_conjugate_gradients(
    data: st.DataObject, seed: int, damping: float
) -> None:
    shape = data.draw(st.sampled_from([(2, 3), (4, 4), (2, 2, 3)]))
    case = tensor_case(sum_block(data.draw, shape, Random(generator(seed))))
    with mock.patch.object(sums_module, "MAX_DENSE", 1):
        inverse = case.operator.inverse(damping)
    assert isinstance(inverse, (Inverse, SimultaneousKronecker, EigenKronecker))  # damping may be absorbed
    b = case.vector()
    residual = flat(b) - case.damped(damping) @ flat(inverse @ b)
    assert float(residual.norm()) <= 1.01e-8 * float(flat(b).norm())


@moderately
@given(data=st.data(), seed=seeds)
def test_the_inverse_of_a_big_sum_of_curvatures_solves_by_conjugate_gradients(data: st.DataObject, seed: int) -> None:
    domain, source = data.draw(domains()), Random(generator(seed))
    a, b = (block_diagonal(data.draw, domain, source) for _ in range(2))
    with mock.patch.object(sums_module, "MAX_DENSE", domain.size - 1):
        inverse = Sum((a.operator, b.operator)).inverse(0.1)
    assert isinstance(inverse, Inverse)
    v = a.vector(stacked=2)
    shifted = a.dense + b.dense + 0.1 * torch.eye(domain.size, dtype=torch.float64)
    solved = flat(inverse.matmat(v), stacked=True)
    residual = flat(v, stacked=True) - solved @ shifted
    assert float(residual.norm()) <= 1.01e-8 * float(flat(v).norm())


def test_the_inverse_of_a_big_sum_takes_sides_that_groups_share() -> None:
    apart = Kronecker(Dense(random.definite(2, 2)), Dense(random.definite(2, 3)))
    shared = Kronecker(Dense(random.definite(2)), Dense(random.definite(2, 3)))
    v = random.normal(2, 2, 3)
    with mock.patch.object(sums_module, "MAX_DENSE", 1):
        solved = (apart + shared).inverse(0.1) @ v
    dense = apart.to_dense() + shared.to_dense() + 0.1 * torch.eye(12, dtype=torch.float64)
    assert_close(dense @ solved.reshape(-1), v.reshape(-1), 1.01e-8)


def test_eigenvalues_of_a_big_sum_are_refused_with_a_way_out() -> None:
    operator = Kronecker(Dense(random.definite(50)), Dense(random.definite(50)))
    with pytest.raises(ArgumentError, match=r"2500 rows have no closed form; use merge_factors .* or inverse"):
        (operator + operator).logdet()


# --- means of factors ---------------------------------------------------------------------------------------------


def squared(operator: Operator) -> Operator:
    """Another operator of the same structure: its factors squared elementwise, which keeps them positive."""
    return optree.tree_map(torch.square, operator, namespace="curvlib")


@every_mergeable_kind
@moderately
@given(data=st.data(), decay=st.sampled_from([0.0, 0.3, 0.95, 1.0]), as_tensor=st.booleans())
def test_ema_averages_every_factor(kind: str, data: st.DataObject, decay: float, as_tensor: bool) -> None:
    old = data.draw(cases(kind, mergeable=True)).operator
    new = squared(old)
    average = ema(old, new, torch.tensor(decay, dtype=torch.float64) if as_tensor else decay)
    expected = optree.tree_map(lambda x, y: decay * x + (1 - decay) * y, old, new, namespace="curvlib")
    assert type(average) is type(old)
    assert_close(average.to_dense(), expected.to_dense())


@every_mergeable_kind
@moderately
@given(data=st.data())
def test_merge_factors_weighs_every_factor(kind: str, data: st.DataObject) -> None:
    a = data.draw(cases(kind, mergeable=True)).operator
    b = squared(a)
    for weights, (wa, wb) in ((None, (0.5, 0.5)), ((2.0, 0.25), (2.0, 0.25))):
        expected = optree.tree_map(lambda x, y, wa=wa, wb=wb: wa * x + wb * y, a, b, namespace="curvlib")
        assert_close(merge_factors(a, b, weights=weights).to_dense(), expected.to_dense())


def test_merged_kronecker_products_are_the_product_of_the_mean_factors() -> None:
    (g1, a1), (g2, a2) = ((random.definite(2), random.definite(3)) for _ in range(2))
    merged = merge_factors(Kronecker(Dense(g1), Dense(a1)), Kronecker(Dense(g2), Dense(a2)), weights=(0.2, 0.8))
    assert_close(merged.to_dense(), torch.kron(0.2 * g1 + 0.8 * g2, 0.2 * a1 + 0.8 * a2))


@pytest.mark.parametrize("kind", ["eigen", "canonical eigen", "eigen kronecker"])
@moderately
@given(data=st.data())
def test_eigen_forms_have_no_factors_to_average(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    with pytest.raises(NotKroneckerError, match=r"no factors left to merge; merge the factors\s+first"):
        ema(operator, operator, 0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_ema_refuses_a_decay_outside_the_unit_interval(decay: float) -> None:
    operator = Dense(random.definite(2))
    with pytest.raises(ArgumentError, match="decay must lie between 0 and 1"):
        ema(operator, operator, decay)


@pytest.mark.parametrize(
    "other", [Dense(random.definite(3)), Diagonal(random.positive(2)), Dense(random.definite(2, 2))]
)
def test_operators_of_different_class_or_shape_are_not_averaged(other: Operator) -> None:
    with pytest.raises(PytreeError, match=r"cannot merge a Dense on \(\(2,\),\) with a"):
        merge_factors(Dense(random.definite(2)), other)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Dense(random.definite(2)), Dense(random.definite(3))),
        (Dense(random.definite(1)), Dense(random.definite(3))),
        (Diagonal(random.positive(1)), Diagonal(random.positive(3))),
        (Diagonal(random.positive(3)), Diagonal(random.positive(2, 3))),
        (ScaledIdentity(random.positive(1)[0], (2,)), Dense(random.definite(3))),
        (ScaledIdentity(random.positive(1)[0], (2,)), ScaledIdentity(random.positive(1)[0], (3,))),
        (Diagonal(random.positive(3)), Dense(random.definite(2))),
    ],
    ids=["dense", "dense that broadcasts", "diagonal", "groups", "identity", "identities", "mixed"],
)
def test_operators_on_different_vectors_are_not_added(a: Operator, b: Operator) -> None:
    for first, second in ((a, b), (b, a)):
        with pytest.raises(CurvlibError) as caught:
            first + second
        assert str(first.domain.shapes[0]) in str(caught.value)
        assert str(second.domain.shapes[0]) in str(caught.value)
