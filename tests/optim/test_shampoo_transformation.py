"""Shampoo's updates against inverse roots of explicit factors."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib as cv
import curvlib.optim as optim
from curvlib.errors import ArgumentError
from curvlib.optim import Adaptive, Every, Warmup
from tests.optim.optimizers_cases import stack_of


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def after(transformation: optim.GradientTransformation, grads: list[Any]) -> tuple[list[Any], Any]:
    state, updates = transformation.init(grads[0]), []
    for g in grads:
        update, state = transformation.update(g, state)
        updates.append(update)
    return updates, state


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(3, 4), (4, 4), (2, 3, 4), (2, 2, 3, 2)]),
    beta=st.sampled_from([None, 0.9]),
    corrected=st.booleans(),
    exponent=st.sampled_from([None, 0.5, 0.3]),
)
def test_every_mode_is_multiplied_by_its_inverse_root(
    seed: int, shape: tuple[int, ...], beta: float | None, corrected: bool, exponent: float | None
) -> None:
    grads = [random(seed + i, *shape) for i in range(5)]
    eps = 1e-3
    shampoo = optim.scale_by_shampoo(
        factor_beta=beta, eps=eps, bias_correction=corrected, exponent=exponent, refresh=Every(1)
    )
    updates, _ = after(shampoo, grads)
    weights = [1.0 if beta is None else (1 - beta) * beta ** (4 - i) for i in range(5)]
    if corrected and beta is not None:
        weights = [weight / sum(weights) for weight in weights]
    expected = grads[-1]
    for mode, width in enumerate(shape):
        rows = [g.movedim(mode, 0).flatten(1) for g in grads]
        factor = sum((w * r @ r.T for w, r in zip(weights, rows, strict=True)), torch.zeros(1, dtype=torch.float64))
        damped = factor + eps * torch.eye(width, dtype=torch.float64)
        root = power(damped, -exponent if exponent else -1 / (2 * len(shape)))
        expected = torch.tensordot(root, expected, dims=[[1], [mode]]).movedim(0, mode)
    torch.testing.assert_close(updates[-1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["coupled-newton", "newton-schulz"])
def test_iterative_roots_are_those_of_eigendecompositions(method: Any) -> None:
    grads = [random(i, 4, 3) for i in range(4)]
    expected, _ = after(optim.scale_by_shampoo(eps=1e-2, refresh=Every(1)), grads)
    found, _ = after(optim.scale_by_shampoo(eps=1e-2, refresh=Every(1), method=method), grads)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["coupled-newton", "newton-schulz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_iterative_roots_bear_gradients_of_low_rank(method: Any, dtype: torch.dtype, size: float) -> None:
    left, right = random(0, 30, 2), random(1, 2, 20)
    grads = [(size * (left * random(i, 2)) @ right).to(dtype) for i in range(25)]
    updates, state = after(optim.scale_by_shampoo(method=method, refresh=Every(5)), grads)
    assert all(int(counter.sum()) == 0 for counter in stack_of(state).failures)
    eps = 1e-5 if dtype == torch.float32 else 1e-12  # of what the gradients span, whitening does not see the damping
    double = [g.double() / size for g in grads]
    expected, _ = after(optim.scale_by_shampoo(eps=eps, refresh=Every(5)), double)
    for update, other in zip(updates, expected, strict=True):
        assert float((update.double() - other).norm()) <= 0.01 * float(other.norm())


def test_a_root_that_the_iteration_does_not_find_is_a_failed_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    shampoo = optim.scale_by_shampoo(method="coupled-newton", refresh=Every(1))
    grads = [random(i, 4, 3) for i in range(3)]
    state = shampoo.init(grads[0])
    monkeypatch.setattr(
        sys.modules["curvlib.optim.shampoo"], "inverse_root", lambda matrix, *rest, **options: 0.9 * matrix
    )
    for g in grads[:2]:
        _, state = shampoo.update(g, state)
    assert all(counter.tolist() == [2] for counter in stack_of(state).failures)
    with pytest.raises(cv.errors.NonFiniteError, match="root found"):
        shampoo.update(grads[2], state)


def test_one_side_alone_is_whitened_by_an_inverse_square_root() -> None:
    grads = [random(i, 3, 5) for i in range(4)]
    updates, state = after(optim.scale_by_shampoo(factor_beta=None, one_sided=True, refresh=Every(1)), grads)
    factor = sum((g @ g.T for g in grads), torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(stack_of(state).factors.matrices[0][0], factor)
    torch.testing.assert_close(updates[-1], power(factor, -0.5) @ grads[-1], rtol=0, atol=1e-9)


def test_roots_stay_between_refreshes_and_factors_do_not() -> None:
    grads = [random(i, 4, 4) for i in range(6)]
    _, early = after(optim.scale_by_shampoo(refresh=Warmup(2, Every(5))), grads[:3])
    _, late = after(optim.scale_by_shampoo(refresh=Warmup(2, Every(5))), grads[:4])
    _, new = after(optim.scale_by_shampoo(refresh=Warmup(2, Every(5))), grads[:5])
    assert torch.equal(stack_of(early).roots[0], stack_of(late).roots[0])
    assert not torch.equal(stack_of(early).factors.matrices[0], stack_of(late).factors.matrices[0])
    assert not torch.equal(stack_of(late).roots[0], stack_of(new).roots[0])
    assert int(new.refreshes) == 3


@pytest.mark.parametrize("beta", [None, 0.9])
def test_vectors_are_divided_by_the_root_of_their_squares(beta: float | None) -> None:
    grads = [{"b": random(i, 3), "s": random(i + 9)} for i in range(3)]
    updates, _ = after(optim.scale_by_shampoo(factor_beta=beta, eps=0.0), grads)
    for name in ("b", "s"):
        weights = [1.0] * 3 if beta is None else [(1 - beta) * beta ** (2 - i) / (1 - beta**3) for i in range(3)]
        squares = sum(
            (w * g[name] ** 2 for w, g in zip(weights, grads, strict=True)), torch.zeros((), dtype=torch.float64)
        )
        torch.testing.assert_close(updates[-1][name], grads[-1][name] / squares.sqrt())


def test_before_its_first_root_a_grafted_shampoo_is_its_graft() -> None:
    grads = [{"w": random(i, 4, 3), "b": random(i + 9, 3)} for i in range(4)]
    waiting = optim.scale_by_shampoo(start_step=10)
    plain, _ = after(optim.graft(waiting, optim.identity()), grads)
    torch.testing.assert_close(plain, grads)
    grafted, _ = after(optim.graft(waiting, optim.scale_by_adam()), grads)
    adam, _ = after(optim.scale_by_adam(), grads)
    for update, magnitude, g in zip(grafted, adam, grads, strict=True):
        for name in g:
            torch.testing.assert_close(update[name], g[name] * magnitude[name].norm() / g[name].norm())
    started, _ = after(optim.scale_by_shampoo(start_step=3, factor_beta=None), grads)
    torch.testing.assert_close(started[:3], grads[:3])
    expected, _ = after(optim.scale_by_shampoo(factor_beta=None, refresh=Every(1)), grads)
    torch.testing.assert_close(started[3], expected[3])


def test_shampoo_has_the_step_sizes_of_adam_without_a_first_moment() -> None:
    grads = [{"w": random(i, 4, 3), "b": random(i + 9, 3)} for i in range(4)]
    shampoo = optim.shampoo(0.1, momentum=0.0, weight_decay=0.0, refresh=Every(1))
    state = shampoo.init(grads[0])
    adam, _ = after(optim.scale_by_adam(betas=(0.0, 0.95)), grads)
    for g, magnitude in zip(grads, adam, strict=True):
        update, state = shampoo.update(g, state, g)
        for name in g:
            torch.testing.assert_close(update[name].norm(), 0.1 * magnitude[name].norm())


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000))
def test_rotating_the_parameters_rotates_the_updates(seed: int) -> None:
    left, right = (torch.linalg.qr(random(seed + i, n, n))[0] for i, n in enumerate((4, 3)))
    grads = [random(seed + i, 4, 3) for i in range(4)]
    shampoo = optim.scale_by_shampoo(refresh=Every(2), eps=1e-6)
    updates, _ = after(shampoo, grads)
    rotated, _ = after(shampoo, [left @ g @ right.T for g in grads])
    for update, image in zip(updates, rotated, strict=True):
        torch.testing.assert_close(left @ update @ right.T, image, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("factor_beta", 1.0),
        ("eps", -1.0),
        ("exponent", 0.0),
        ("method", "svd"),
        ("start_step", -1),
        ("refresh", Adaptive(0.1)),
        ("refresh", Warmup(3, Adaptive(0.1))),
    ],
)
def test_arguments_out_of_range_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError):
        optim.scale_by_shampoo(**{argument: value})
