"""Preconditioned conjugate gradients on one tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.errors import ConvergenceError


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    right_hand_side: Tensor,
    *,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
) -> Tensor:
    """Solves M x = b for symmetric positive definite M, until ||b - M x|| <= tolerance ||b||.

    Args:
        matvec: v -> M v, for tensors of the shape of ``right_hand_side``.
        right_hand_side: b, of any shape.
        preconditioner: r -> P r with P close to the inverse of M.
        tolerance: relative residual at which to stop.
        max_iterations: steps after which to give up.

    Raises:
        ConvergenceError: the tolerance was not reached.

    Example:
        >>> conjugate_gradient(lambda v: 2 * v, torch.tensor([2.0, 4.0]))
        tensor([1., 2.])
    """
    x = torch.zeros_like(right_hand_side)
    residual = right_hand_side
    target = tolerance * right_hand_side.norm()
    direction = torch.zeros_like(residual)
    previous = torch.ones((), dtype=residual.dtype, device=residual.device)
    for _ in range(max_iterations):
        if residual.norm() <= target:
            return x
        z = residual if preconditioner is None else preconditioner(residual)
        inner = (residual * z).sum()
        direction = z + (inner / previous) * direction
        product = matvec(direction)
        step = inner / (direction * product).sum()
        x, residual, previous = x + step * direction, residual - step * product, inner
    if residual.norm() <= target:
        return x
    relative = float(residual.norm() / right_hand_side.norm())
    raise ConvergenceError(
        f"conjugate gradients reached a relative residual of {relative:.1e} after {max_iterations} iterations, not "
        f"{tolerance:.1e}; add damping or use a preconditioner"
    )
