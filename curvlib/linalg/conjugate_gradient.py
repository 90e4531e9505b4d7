"""Preconditioned conjugate gradients, on one tensor or on many at once."""

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
    stacked: bool = False,
) -> Tensor:
    """Solves M x = b for symmetric positive definite M, until ||b - M x|| <= tolerance ||b||.

    Args:
        matvec: v -> M v, for tensors of the shape of ``right_hand_side``.
        right_hand_side: b, of any shape.
        preconditioner: r -> P r with P close to the inverse of M.
        tolerance: relative residual at which to stop.
        max_iterations: steps after which to give up.
        stacked: the first axis counts systems. Each has steps of its own and leaves the stack when it is solved, so
            ``matvec`` and ``preconditioner`` are given stacks that become shorter.

    Raises:
        ConvergenceError: the tolerance was not reached, or M is not positive definite.

    Example:
        >>> conjugate_gradient(lambda v: 2 * v, torch.tensor([2.0, 4.0]))
        tensor([1., 2.])
    """
    if not stacked:
        return conjugate_gradient(
            lambda v: matvec(v[0])[None],
            right_hand_side[None],
            preconditioner=None if preconditioner is None else lambda r: preconditioner(r[0])[None],
            tolerance=tolerance,
            max_iterations=max_iterations,
            stacked=True,
        )[0]
    solution = torch.zeros_like(right_hand_side)
    sizes = inner(right_hand_side, right_hand_side).sqrt()
    unsolved = torch.arange(len(right_hand_side), device=right_hand_side.device)
    x, residual, direction, previous = solution, right_hand_side, solution, torch.ones_like(sizes)
    for iteration in range(max_iterations + 1):
        solved = inner(residual, residual).sqrt() <= tolerance * sizes[unsolved]
        if solved.any():
            solution = solution.index_copy(0, unsolved[solved], x[solved])
            unsolved, x, residual, direction, previous = (
                tensor[~solved] for tensor in (unsolved, x, residual, direction, previous)
            )
        if not len(unsolved):
            return solution
        if iteration == max_iterations:
            break
        z = residual if preconditioner is None else preconditioner(residual)
        product = inner(residual, z)
        direction = z + along(product / previous, direction)
        image = matvec(direction)
        curvature = inner(direction, image)
        if not (curvature > 0).all():
            raise ConvergenceError(
                f"conjugate gradients met a direction v with v^T M v = {float(curvature.min()):.1e} after {iteration} "
                "iterations: the operator is not positive definite; add damping"
            )
        step = product / curvature
        x, residual, previous = x + along(step, direction), residual - along(step, image), product
    relative = float((inner(residual, residual).sqrt() / sizes[unsolved]).amax())
    which = f" in {len(unsolved)} of {len(sizes)} systems" if len(sizes) > 1 else ""
    raise ConvergenceError(
        f"conjugate gradients reached a relative residual of {relative:.1e}{which} after {max_iterations} iterations, "
        f"not {tolerance:.1e}; add damping or use a preconditioner"
    )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of the members of two stacks, [k]."""
    return (a * b).reshape(len(a), -1).sum(-1)


def along(factors: Tensor, stack: Tensor) -> Tensor:
    """Every member of a stack times its factor."""
    return factors.reshape(-1, *(1,) * (stack.ndim - 1)) * stack
