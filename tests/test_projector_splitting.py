"""Projector splitting against brute force on the rearranged matrix, and what makes it fit to run for a long time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.errors import ArgumentError, ShapeError
from curvlib.linalg.middle_gram import middle_gram
from curvlib.linalg.projector_splitting import bug, ksl, rearranged, unit
from curvlib.linalg.rank_one import leading_pair
from tests.operators.operator_cases import assert_close, generator

Triple = tuple[Tensor, Tensor, Tensor]
few = settings(deadline=None, max_examples=12)
seeds = st.integers(0, 2**16)
sizes = st.integers(1, 6)
STEPS = {"ksl": ksl, "two sweeps": lambda *arguments: ksl(*arguments, sweeps=2), "bug": bug}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def unit_psd(*front: int, size: int, seed: int, rank: int | None = None) -> Tensor:
    root = normal(*front, size, size if rank is None else rank, seed=seed)
    matrix = root @ root.mT
    return matrix / torch.linalg.matrix_norm(matrix, keepdim=True)


def state(m: int, n: int, *front: int, seed: int = 5) -> Triple:
    scale = torch.rand(front, generator=generator(seed), dtype=torch.float64) * 5
    return scale, unit_psd(*front, size=m, seed=seed + 1), unit_psd(*front, size=n, seed=seed + 2)


def kron(triple: Triple) -> Tensor:
    scale, left, right = triple
    return scale * torch.kron(left, right)


def rearrangement(matrix: Tensor, m: int, n: int) -> Tensor:
    """The matrix [m^2, n^2] in which vec(L) vec(R)^T stands for L (x) R, from its definition."""
    return matrix.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)


def second_moment(gradients: Tensor) -> Tensor:
    """The mean over the leading axis of vec D vec D^T."""
    rows = gradients.flatten(1)
    return rows.mT @ rows / len(rows)


def alternating_least_squares(matrix: Tensor, right: Tensor, sweeps: int) -> Tensor:
    """The rank-one matrix after least squares for one vector and then the other, for an explicit matrix."""
    for _ in range(sweeps):
        left = matrix @ right / (right @ right)
        right = matrix.mT @ left / (left @ left)
    return torch.outer(left, right)


@few
@given(m=sizes, n=sizes, count=st.integers(1, 3), sweeps=st.integers(1, 3), decay=st.floats(0.1, 1), seed=seeds)
def test_ksl_is_alternating_least_squares_from_the_right_factor(
    m: int, n: int, count: int, sweeps: int, decay: float, seed: int
) -> None:
    start, gradients = state(m, n, seed=seed), normal(count, m, n, seed=seed + 9)
    full = decay * kron(start) + 0.3 * second_moment(gradients)
    expected = alternating_least_squares(rearrangement(full, m, n), start[2].flatten(), sweeps)
    found = ksl(*start, rearranged(gradients, observations=1), decay, 0.3, sweeps=sweeps)
    assert_close(rearrangement(kron(found), m, n), expected, 1e-12)
    assert_close(torch.stack([found[1].norm(), found[2].norm()]), torch.ones(2, dtype=torch.float64), 1e-14)


@few
@given(m=sizes, n=sizes, count=st.integers(1, 3), seed=seeds)
def test_bug_projects_the_sum_on_factors_made_from_the_old_ones(m: int, n: int, count: int, seed: int) -> None:
    start, gradients = state(m, n, seed=seed), normal(count, m, n, seed=seed + 9)
    matrix = rearrangement(0.7 * kron(start) + 0.3 * second_moment(gradients), m, n)
    left, right = matrix @ start[2].flatten(), matrix.mT @ start[1].flatten()
    left, right = left / left.norm(), right / right.norm()
    expected = (left @ matrix @ right) * torch.outer(left, right)
    found = bug(*start, rearranged(gradients, observations=1), 0.7, 0.3)
    assert_close(rearrangement(kron(found), m, n), expected, 1e-12)


def test_many_sweeps_give_the_best_kronecker_product_of_the_one_step_target() -> None:
    start, gradients = state(5, 4), normal(3, 5, 4, seed=9)
    u, s, vt = torch.linalg.svd(rearrangement(0.7 * kron(start) + 0.3 * second_moment(gradients), 5, 4))
    found = ksl(*start, rearranged(gradients, observations=1), 0.7, 0.3, sweeps=200)
    assert_close(rearrangement(kron(found), 5, 4), s[0] * torch.outer(u[:, 0], vt[0]), 1e-12)


@every_step
def test_a_fisher_that_stays_of_rank_one_is_followed_exactly(step: Callable[..., Triple]) -> None:
    roots = normal(4, 2, seed=1), normal(3, 3, seed=2)
    vectors = torch.stack([torch.outer(a, b) for a in roots[0].mT for b in roots[1].mT])  # sums to a Kronecker product
    target = rearranged(vectors, observations=1)
    found = (torch.zeros((), dtype=torch.float64), *(torch.eye(k, dtype=torch.float64) / k**0.5 for k in (4, 3)))
    full = torch.zeros(12, 12, dtype=torch.float64)
    for weight in (1.0, 0.3, 2.0, 0.1):
        found = step(*found, target, 0.9, weight)
        full = 0.9 * full + weight * second_moment(vectors)
        assert_close(kron(found), full, 1e-13)


def follow(gradients: Tensor, decay: float) -> dict[str, tuple[Tensor, ...]]:
    """All methods over gradients [steps, repetitions, m, n], and the full second moment."""
    first = gradients[0]
    states: dict[str, tuple[Tensor, ...]] = {"ksl": leading_pair(first), "bug": leading_pair(first)}
    left, right = middle_gram(first), middle_gram(first.mT)
    full = middle_gram(first.flatten(1).unsqueeze(-1))
    for gradient in gradients[1:]:
        target = rearranged(gradient)
        states = {name: STEPS[name](*states[name], target, decay, 1 - decay) for name in states}
        left = decay * left + (1 - decay) * middle_gram(gradient)
        right = decay * right + (1 - decay) * middle_gram(gradient.mT)
        full = decay * full + (1 - decay) * middle_gram(gradient.flatten(1).unsqueeze(-1))
    trace = left.diagonal(dim1=-2, dim2=-1).sum(-1)
    return {**states, "shampoo with exact trace": (1 / trace, left, right), "full": (full,)}


def test_errors_of_the_methods_on_gradients_that_are_nearly_separable() -> None:
    # 12 x 8, eigenvalues i^-1.28 on both sides, the standard deviation of each entry varied by 2 percent, 400 steps of
    # decay 0.99, all started at the first gradient, mean of 8 repetitions. Errors are relative, in the Frobenius norm.
    m, n, repetitions, draw = 12, 8, 8, generator(0)
    spectra = [torch.arange(1, k + 1, dtype=torch.float64) ** -0.64 for k in (m, n)]
    uneven = 1 + 0.02 * torch.randn(m, n, generator=draw, dtype=torch.float64)
    noise = torch.randn(400, repetitions, m, n, generator=draw, dtype=torch.float64)
    found = follow(spectra[0][:, None] * uneven * noise * spectra[1], 0.99)
    (full,) = found.pop("full")

    def mean_error(products: list[Tensor]) -> float:
        pairs = zip(products, full, strict=True)
        return sum(float((product - matrix).norm() / matrix.norm()) for product, matrix in pairs) / repetitions

    errors = {name: mean_error([kron(one) for one in zip(*triple, strict=True)]) for name, triple in found.items()}
    spectrum = torch.stack([torch.linalg.svdvals(rearrangement(matrix, m, n)) for matrix in full])
    best = float((spectrum[:, 1:].norm(dim=1) / spectrum.norm(dim=1)).mean())
    assert (best, errors["bug"], errors["ksl"]) == pytest.approx((0.2534, 0.2547, 0.2550), abs=2e-4)
    assert errors["shampoo with exact trace"] == pytest.approx(0.2631, abs=2e-4)
    assert best < errors["bug"] < errors["ksl"] < errors["shampoo with exact trace"]


@every_step
@few
@given(m=sizes, n=sizes, seed=seeds, spike=st.sampled_from([1.0, 1e4]))
def test_factors_stay_positive_semidefinite_in_float32_through_spikes(
    step: Callable[..., Triple], m: int, n: int, seed: int, spike: float
) -> None:
    gradients = normal(12, m, n, seed=seed).float()
    gradients[5] *= spike
    found = leading_pair(gradients[0])
    for gradient in gradients[1:]:
        found = step(*found, rearranged(gradient), 0.9, 0.1)
        assert found[0] >= 0
        for factor in found[1:]:
            values = torch.linalg.eigvalsh(factor.double())
            assert values.min() >= -1e-6 * values.max()


def test_the_middle_step_does_not_cancel_as_its_equal_form_does() -> None:
    # After a spike, || r L + C || - <L', C> is the difference of two numbers that agree in all digits.
    (_, left, right), spike = state(6, 5), 1e4 * normal(6, 5, seed=9)
    r, moment = 1.0, middle_gram(spike, right)
    exact = r * (unit(r * left + moment, left)[0] * left).sum()

    def forms(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        small, large = left.to(dtype), moment.to(dtype)
        new, norm = unit(r * small + large, small)
        return r * (new * small).sum(), norm - (new * large).sum()

    product, difference = forms(torch.float32)
    assert abs(product - exact) < 1e-6 * exact < exact < abs(difference - exact)
    assert abs(forms(torch.float64)[1] - exact) < 1e-6 * exact  # the forms are equal


def test_what_a_spike_does_not_touch_keeps_its_digits_in_float32() -> None:
    start, spike = state(6, 5), torch.zeros(6, 5, dtype=torch.float64)
    spike[0, 0] = 1e4
    expected = ksl(*start, rearranged(spike), 0.9, 0.1)
    found = ksl(*(x.float() for x in start), rearranged(spike.float()), 0.9, 0.1)
    for one, other in zip(
        found[1:], expected[1:], strict=True
    ):  # the rest is 1e-8 of the whole and s times the old one
        assert_close(one[1:, 1:].double(), other[1:, 1:], 1e-6)


@few
@given(exponent=st.integers(-16, 17))
def test_gradients_of_any_size_are_followed_in_float32(exponent: int) -> None:
    (scale, left, right), gradient, size = state(6, 5), normal(6, 5, seed=9), 10.0**exponent
    expected = ksl(scale, left, right, rearranged(gradient), 0.9, 0.1)
    arguments = (size**2 * scale).float(), left.float(), right.float(), rearranged((size * gradient).float())
    found = ksl(*arguments, 0.9, 0.1)
    for one, other in zip((found[0].double() / size**2, *found[1:]), expected, strict=True):
        assert_close(one.double(), other, 1e-5)


@every_step
@few
@given(m=sizes, n=sizes, seed=seeds)
def test_factors_rotate_with_the_gradient(step: Callable[..., Triple], m: int, n: int, seed: int) -> None:
    start, gradient = state(m, n, seed=seed), normal(m, n, seed=seed + 9)
    u, v = (torch.linalg.qr(normal(k, k, seed=seed + k)).Q for k in (m, n))
    scale, left, right = step(*start, rearranged(gradient), 0.9, 0.1)
    turned = step(start[0], u @ start[1] @ u.mT, v.mT @ start[2] @ v, rearranged(u @ gradient @ v), 0.9, 0.1)
    for found, expected in zip(turned, (scale, u @ left @ u.mT, v.mT @ right @ v), strict=True):
        assert_close(found, expected, 1e-12)


@every_step
def test_zero_gradients_shrink_the_scale_and_leave_the_factors(step: Callable[..., Triple]) -> None:
    start, zero = state(4, 3), torch.zeros(4, 3, dtype=torch.float64)
    scale, left, right = step(*start, rearranged(zero), 0.9, 0.1)
    for found, expected in zip((scale, left, right), (0.9 * start[0], *start[1:]), strict=True):
        assert_close(found, expected, 1e-14)
    young = leading_pair(zero)
    assert all(torch.equal(a, b) for a, b in zip(step(*young, rearranged(zero), 0.9, 0.1), young, strict=True))
    gradient = normal(4, 3)  # a first gradient that comes later is found from there
    found = step(*young, rearranged(gradient), 0.9, 0.1)
    for _ in range(30):
        found = step(*found, rearranged(gradient), 0.0, 1.0)
    assert_close(kron(found), kron(leading_pair(gradient)), 1e-10)


@every_step
def test_stacks_are_loops(step: Callable[..., Triple]) -> None:
    stack, gradients = state(5, 4, 2, 3), normal(2, 3, 7, 5, 4, seed=9)
    gradients[1, 2] = 0
    decay = torch.rand(2, 3, generator=generator(3), dtype=torch.float64)
    found = step(*stack, rearranged(gradients, observations=1), decay, 1 - decay)
    for i in range(2):
        for j in range(3):
            target = rearranged(gradients[i, j], observations=1)
            one = step(*(x[i, j] for x in stack), target, float(decay[i, j]), 1 - float(decay[i, j]))
            for a, b in zip(found, one, strict=True):
                assert_close(a[i, j], b, 1e-13)


@every_step
def test_no_value_is_looked_at_and_no_argument_changed(step: Callable[..., Triple]) -> None:
    def both(scale: Tensor, left: Tensor, right: Tensor, gradient: Tensor) -> Triple:
        start = leading_pair(gradient)
        return step(scale + start[0], left, right, rearranged(gradient), 0.9, 0.1)

    start, gradient = state(150, 4), normal(150, 4, seed=9)
    before = [x.clone() for x in (*start, gradient)]
    expected = both(*start, gradient)
    assert all(torch.equal(x, y) for x, y in zip(before, (*start, gradient), strict=True))
    traced = make_fx(both, tracing_mode="fake")(*state(150, 4, seed=1), torch.zeros_like(gradient))
    for a, b in zip(traced(*start, gradient), expected, strict=True):
        assert_close(a, b, 1e-12)


@few
@given(exponent=st.integers(-37, 37))
def test_norms_do_not_leave_the_range_of_float32(exponent: int) -> None:
    matrix = normal(5, 4).float()
    found, norm = unit(10.0**exponent * matrix, torch.zeros_like(matrix))
    assert_close(found, matrix / matrix.norm(), 1e-6)
    assert_close(norm, 10.0**exponent * matrix.norm(), 1e-6)


def test_undefined_gradients_are_not_hidden() -> None:
    scale, left, _ = ksl(*state(3, 2), rearranged(torch.full((3, 2), torch.nan, dtype=torch.float64)), 0.9, 0.1)
    assert scale.isnan()
    assert left.isnan().all()


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ArgumentError, match="sweeps=0"):
        ksl(*state(3, 2), rearranged(normal(3, 2)), 0.9, 0.1, sweeps=0)
    with pytest.raises(ArgumentError, match="flatten"):
        rearranged(normal(2, 2, 3, 2), observations=2)
    with pytest.raises(ShapeError, match="matrices"):
        rearranged(normal(3, 2), observations=1)
