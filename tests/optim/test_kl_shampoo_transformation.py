"""KL-Shampoo's factors, eigenvalues and updates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib.optim as optim
from curvlib.errors import ArgumentError
from curvlib.optim import Every
from tests.optim.optimizers_cases import stack_of


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(transformation: optim.GradientTransformation, grads: list[Any]) -> tuple[list[Any], list[Any]]:
    state, updates, seen = transformation.init(grads[0]), [], []
    for g in grads:
        update, state = transformation.update(g, state)
        updates.append(update)
        seen.append(state)
    return updates, seen


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(4,) * 2, (3, 5), (2, 3, 4)]),
    form=st.sampled_from([optim.scale_by_kl_shampoo, lambda **o: optim.scale_by_soap(factors=optim.KLFactors(), **o)]),
    every=st.integers(1, 5),
)
def test_eigenvalues_are_the_diagonals_of_the_rotated_factors(
    seed: int, shape: tuple[int, ...], form: Any, every: int
) -> None:
    _, seen = states(form(refresh=Every(every)), [random(seed + i, *shape) for i in range(9)])
    for state in seen:
        stack = stack_of(state)
        for matrix, basis, values in zip(stack.factors.matrices, stack.bases, stack.factors.eigenvalues, strict=True):
            exact = (basis.mT @ matrix @ basis).diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(values, exact, rtol=1e-8, atol=1e-12)


def test_factors_follow_the_formula_with_inverses_in_the_basis() -> None:
    grads, b = [random(i, 3, 4) for i in range(6)], 0.9
    _, seen = states(optim.scale_by_kl_shampoo(betas=(0.9, b), damping=0.0, refresh=Every(3)), grads)
    mean = grads[0].square().mean().sqrt()
    left, right = mean * torch.eye(3, dtype=torch.float64), mean * torch.eye(4, dtype=torch.float64)
    inverse_left, inverse_right = torch.linalg.inv(left), torch.linalg.inv(right)
    for g, state in zip(grads, seen, strict=True):
        old_inverse_left = inverse_left
        left = b * left + (1 - b) / 4 * g @ inverse_right @ g.T
        right = b * right + (1 - b) / 3 * g.T @ old_inverse_left @ g
        stack = stack_of(state)
        torch.testing.assert_close(stack.factors.matrices[0][0], left, rtol=0, atol=1e-10)
        torch.testing.assert_close(stack.factors.matrices[1][0], right, rtol=0, atol=1e-10)
        inverse_left, inverse_right = (
            q[0] @ torch.diag(1 / (q[0].T @ factor @ q[0]).diagonal()) @ q[0].T
            for q, factor in zip(stack.bases, (left, right), strict=True)
        )


def test_the_update_is_whitened_by_both_factors() -> None:
    grads = [random(i, 4, 3) for i in range(5)]
    whitening = optim.scale_by_kl_shampoo(betas=(0.0, 0.9), eps=0.0, refresh=Every(100))
    updates, seen = states(whitening, grads)
    assert float(updates[0].abs().max()) == 0
    for g, update, state in zip(grads[1:], updates[1:], seen[1:], strict=True):
        stack = stack_of(state)
        roots = [
            q[0] @ torch.diag((q[0].T @ matrix[0] @ q[0]).diagonal() ** -0.5) @ q[0].T
            for q, matrix in zip(stack.bases, stack.factors.matrices, strict=True)
        ]
        torch.testing.assert_close(update, roots[0] @ g @ roots[1], rtol=0, atol=1e-9)


def test_the_mean_of_whitened_gradients_of_a_kronecker_covariance_is_white() -> None:
    roots = [torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([5.0, 1.0, 0.2], [3.0, 0.5])]
    roots = [
        q @ root @ q.T
        for q, root in zip((torch.linalg.qr(random(i, n, n))[0] for i, n in ((1, 3), (2, 2))), roots, strict=True)
    ]
    whitening = optim.scale_by_kl_shampoo(betas=(0.0, 0.99), refresh=Every(5))
    updates, seen = states(whitening, list(roots[0] @ random(0, 1500, 3, 2) @ roots[1]))
    covariance = torch.stack(updates[500:]).flatten(1).T.cov()
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), rtol=0, atol=0.15)
    product = torch.kron(*(factor[0] for factor in stack_of(seen[-1]).factors.matrices))
    expected = torch.kron(*(root @ root for root in roots))
    assert float((product - expected).norm() / expected.norm()) < 0.15


def test_the_first_moment_is_averaged_in_parameter_coordinates() -> None:
    grads = [random(i, 4, 3) for i in range(8)]
    _, seen = states(optim.scale_by_kl_shampoo(betas=(0.8, 0.9), refresh=Every(2)), grads)
    mean = torch.zeros(4, 3, dtype=torch.float64)
    for g in grads[1:]:
        mean = 0.8 * mean + 0.2 * g
    stack = stack_of(seen[-1])
    found = stack.bases[0][0] @ stack.first[0] @ stack.bases[1][0].T
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2)])
@pytest.mark.parametrize("late", [1, 40])
def test_it_starts_with_the_first_gradient_that_is_not_zero(shape: tuple[int, ...], late: int) -> None:
    grads = [random(i, *shape) for i in range(5)]
    zeros = [torch.zeros(shape, dtype=torch.float64)] * late
    whitening = optim.scale_by_kl_shampoo(betas=(0.0, 0.9), refresh=Every(100))
    _, seen = states(whitening, grads)
    updates, waited = states(whitening, zeros + grads)
    assert all(float(x.abs().max()) == 0 for x in updates[:late])
    assert all(float(m.abs().max()) == 0 for m in stack_of(waited[late - 1]).factors.matrices)
    for one, two in zip(stack_of(seen[0]).factors.matrices, stack_of(waited[late]).factors.matrices, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    size = math.prod(shape) ** 0.5  # whitened
    assert all(0.3 * size < float(x.norm()) < 5 * size for x in updates[late:])


@pytest.mark.parametrize(("argument", "value"), [("damping", -1.0), ("betas", (0.9, 1.0)), ("eps", -1.0)])
def test_arguments_out_of_range_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError):
        optim.scale_by_kl_shampoo(**{argument: value})
