"""DyKAF's factors against the integrators they are, and its optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib.optim as optim
from curvlib.errors import ArgumentError
from curvlib.factors.dykaf import balanced_gram
from curvlib.factors.rule import Factors, Observation
from curvlib.linalg.middle_gram import middle_gram
from curvlib.linalg.projector_splitting import bug, ksl, rearranged
from curvlib.linalg.rank_one import leading_pair, rank_one_moment
from curvlib.linalg.tensor_splitting import hopm
from curvlib.optim import Every
from tests.optim.optimizers_cases import stack_of


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(gradient: Tensor) -> Observation:
    return Observation(gradient, gradient, gradient)


def units(factors: Factors) -> tuple[Tensor, ...]:
    assert factors.norms is not None
    return tuple(m / norm[:, None, None] for m, norm in zip(factors.matrices, factors.norms, strict=True))


def states(transformation: optim.GradientTransformation, grads: list[Any]) -> tuple[list[Any], list[Any]]:
    state, updates, after = transformation.init(grads[0]), [], []
    for g in grads:
        update, state = transformation.update(g, state)
        updates.append(update)
        after.append(state)
    return updates, after


def assert_product(factors: Factors, scale: Tensor, expected: tuple[Tensor, ...], terms: Tensor | None = None) -> None:
    """``terms``: the size of what a scale is a sum of, and to which it is exact."""
    size = scale if terms is None else scale.maximum(terms)
    assert ((factors.scale - scale).abs() <= 1e-11 * size).all(), (factors.scale, scale)
    for unit, other in zip(units(factors), expected, strict=True):
        torch.testing.assert_close(unit, other, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(4, 4), (6, 3), (2, 7), (5, 1)]),
    decay=st.sampled_from([0.95, 0.5, 0.0, None]),
    sweeps=st.integers(1, 3),
    integrator=st.sampled_from(["ksl", "bug"]),
    size=st.sampled_from([1.0, 1e-12, 1e6]),
)
def test_factors_of_matrices_are_those_of_the_integrators(
    seed: int, shape: tuple[int, ...], decay: float | None, sweeps: int, integrator: Any, size: float
) -> None:
    rule = optim.DyKAFFactors(integrator, sweeps, start="svd")
    grads = [size * random(seed + i, 2, *shape) for i in range(5)]
    grads[3][0] = 0
    factors = rule.begin(seen(grads[0]), (0, 1))
    scale, left, right = leading_pair(grads[0])
    assert_product(factors, scale, (left, right))
    kept, weight = (1.0, 1.0) if decay is None else (decay, 1 - decay)
    for g in grads[1:4] if decay == 0 else grads[1:]:  # with no memory, what follows a zero gradient is arbitrary
        factors = rule.update(factors, seen(g), (0, 1), (), decay)
        if integrator == "ksl":
            scale, left, right = ksl(scale, left, right, rearranged(g), kept, weight, sweeps=sweeps)
        else:
            scale, left, right = bug(scale, left, right, rearranged(g), kept, weight)
        # what a pair of factors leaves of a gradient may be tiny: where it forgets all that came before, say
        assert_product(factors, scale, (left, right), terms=weight * g.square().sum((-2, -1)))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), decay=st.sampled_from([0.9, None]), sweeps=st.integers(1, 2))
def test_factors_of_tensors_are_those_of_the_power_method(seed: int, decay: float | None, sweeps: int) -> None:
    rule, modes = optim.DyKAFFactors(sweeps=sweeps), (0, 1, 2)
    grads = [random(seed + i, 2, 3, 2, 4) for i in range(4)]
    factors = rule.first(seen(grads[0]), modes, None)
    identity = tuple((torch.eye(n, dtype=torch.float64) / n**0.5).expand(2, n, n) for n in (3, 2, 4))
    small = 1e-3 * grads[0].square().sum((1, 2, 3))
    scale, expected = hopm(small, identity, grads[0], 1.0, 1.0, sweeps=sweeps)
    assert_product(factors, scale, expected)
    kept, weight = (1.0, 1.0) if decay is None else (decay, 1 - decay)
    for g in grads[1:]:
        factors = rule.update(factors, seen(g), modes, (), decay)
        scale, expected = hopm(scale, expected, g, kept, weight, sweeps=sweeps)
        assert_product(factors, scale, expected)


def test_a_mode_without_a_factor_counts_as_observations() -> None:
    grads = [random(i, 1, 3, 5, 4) for i in range(4)]
    rule = optim.DyKAFFactors()
    factors = rule.first(seen(grads[0]), (0, 2), None)
    alone = rule.first(seen(grads[0]), (1,), None)
    scale = 1e-3 * grads[0].square().sum().reshape(1)
    left, right = ((torch.eye(n, dtype=torch.float64) / n**0.5).unsqueeze(0) for n in (3, 4))
    mean = scale * torch.eye(5, dtype=torch.float64) / 5**0.5
    for i, g in enumerate(grads):
        kept, weight = (0.9, 0.1) if i else (1.0, 1.0)
        target = rearranged(g.transpose(1, 2), observations=1)
        scale, left, right = ksl(scale, left, right, target, kept, 5 * weight)
        mean = kept * mean + weight * torch.einsum("xabc,xadc->bd", g, g)
        if i:
            factors = rule.update(factors, seen(g), (0, 2), (), 0.9)
            alone = rule.update(alone, seen(g), (1,), (), 0.9)
        assert_product(factors, scale, (left, right))
        torch.testing.assert_close(alone.scale[0] * units(alone)[0][0], mean)


@pytest.mark.parametrize(("m", "n"), [(20, 300), (7, 129), (300, 20)])
def test_wide_grams_are_symmetric_products(m: int, n: int) -> None:
    gradient, root = random(0, 2, m, n), random(1, 2, n, n)
    middle = root @ root.mT
    found = balanced_gram(gradient, middle)
    torch.testing.assert_close(found, gradient @ middle @ gradient.mT, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found, middle_gram(gradient, middle), rtol=1e-12, atol=1e-9)


def test_factors_stay_positive_semidefinite_through_spikes_in_float32() -> None:
    rule = optim.DyKAFFactors()
    factors = rule.first(seen(random(0, 2, 6, 5).float()), (0, 1), 0.95)
    for i in range(60):
        spike = 1e4 if i % 7 == 3 else 1.0
        factors = rule.update(factors, seen(spike * random(i, 2, 6, 5).float()), (0, 1), (), 0.95)
        assert factors.scale is not None
        assert bool((factors.scale > 0).all())
        for unit in units(factors):
            assert float(torch.linalg.eigvalsh(unit).min()) > -1e-6


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000))
def test_rotating_the_parameters_rotates_the_updates(seed: int) -> None:
    left, right = (torch.linalg.qr(random(seed + i, 4, 4))[0] for i in range(2))
    grads = [random(seed + 10 + i, 4, 4) for i in range(5)]
    dykaf = optim.scale_by_dykaf(refresh=Every(2), start="identity")
    updates, _ = states(dykaf, grads)
    rotated, _ = states(dykaf, [left @ g @ right.T for g in grads])
    for update, image in zip(updates, rotated, strict=True):
        torch.testing.assert_close(left @ update @ right.T, image, rtol=0, atol=1e-6)


def test_a_rank_one_moment_is_that_of_the_projected_gradients() -> None:
    grads = [random(i, 4, 3) for i in range(5)]
    _, after = states(optim.scale_by_dykaf(betas=(0.9, 0.8), second_moment="rank-1", refresh=Every(100)), grads)
    scale, left, right = (x.clone() for x in stack_of(after[0]).second)
    for g, state in zip(grads[1:], after[1:], strict=True):
        stack = stack_of(state)
        projected = stack.bases[0].mT @ g @ stack.bases[1]
        scale, left, right = rank_one_moment(scale, left, right, projected**2, 0.8)
        for found, expected in zip(stack.second, (scale, left, right), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_rank_one_moment_stays_a_product_of_unit_vectors_when_the_basis_changes() -> None:
    grads = [random(i, 4, 3, 2) for i in range(6)]
    _, after = states(optim.scale_by_dykaf(second_moment="rank-1", refresh=Every(1)), grads)
    for state in after:
        _, left, right = stack_of(state).second
        for vector in (left, right):
            torch.testing.assert_close(vector.norm(), torch.tensor(1.0, dtype=torch.float64))
            assert bool((vector >= 0).all())


def test_leaves_of_one_shape_have_rank_one_moments_of_their_own_when_the_basis_changes() -> None:
    grads = [{"a": random(i, 4, 3), "b": 5 * random(i + 9, 4, 3)} for i in range(6)]
    dykaf = optim.scale_by_dykaf(second_moment="rank-1", start="identity", refresh=Every(1))
    together, _ = states(dykaf, grads)
    for name in ("a", "b"):
        alone, _ = states(dykaf, [g[name] for g in grads])
        torch.testing.assert_close([update[name] for update in together], alone)


def test_a_rank_one_moment_does_not_blow_up_where_it_is_blind() -> None:
    grads = [torch.diag(torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64))] * 30
    updates, _ = states(optim.scale_by_dykaf(second_moment="rank-1"), grads)
    assert all(float(torch.linalg.matrix_norm(update, 2)) < 3 + 1e-6 for update in updates)


def test_zero_gradients_wait_for_the_first_that_is_not() -> None:
    zero = torch.zeros(4, 3, dtype=torch.float64)
    updates, after = states(optim.scale_by_dykaf(refresh=Every(2)), [zero, zero, *(random(i, 4, 3) for i in range(4))])
    assert float(stack_of(after[1]).factors.scale) == 0
    assert float(stack_of(after[-1]).factors.scale) > 0
    assert all(bool(update.isfinite().all()) for update in updates)


@pytest.mark.parametrize(
    ("argument", "value"), [("integrator", "euler"), ("start", "zero"), ("sweeps", 0), ("second_moment", "half")]
)
def test_arguments_out_of_range_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError):
        optim.scale_by_dykaf(**{argument: value})


def test_tensors_that_it_cannot_follow_are_refused_by_name() -> None:
    params = {"kernel": torch.zeros(4, 3, 2, 2)}
    for options in ({"max_dimension": 3}, {"integrator": "bug"}):
        with pytest.raises(ArgumentError, match=r"'kernel'.*merge_dimensions"):
            optim.scale_by_dykaf(**options).init(params)
        optim.scale_by_dykaf(merge_dimensions=12, **options).init(params)
