"""Gradients of several batches for one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.eager import may_look_at
from curvlib.optim.momentum import zeros
from curvlib.optim.transformation import (
    GradientTransformation,
    PerLeaf,
    State,
    first_step,
    gradients_like,
    own_state,
)
from curvlib.pytree import Tree, register, tree_map, unflatten


@register
class MultiStepsState:
    """The gradients that are being collected, and the state of the transformation.

    Args:
        mini_step: gradients collected, 0-d int64 on the CPU.
        gradient_step: steps of the transformation so far, likewise.
        accumulated: their mean or sum, a tensor a leaf (float32 for half precision).
        inner: of the transformation.
    """

    mini_step: Tensor
    gradient_step: Tensor
    accumulated: PerLeaf
    inner: State


def multi_steps(
    inner: GradientTransformation, every_k_schedule: int | Callable[[int], int], *, use_grad_mean: bool = True
) -> GradientTransformation:
    """Every k-th update is that of ``inner`` for the mean of the last k gradients; the others are zero.

    Args:
        inner: the transformation; it sees every k-th call only, with the params and the extra arguments of that call.
        every_k_schedule: k, or a function of the number of steps that ``inner`` has made.
        use_grad_mean: False: the sum instead of the mean.

    Raises:
        ArgumentError: k is not positive; or, under a trace, update is called without ``step=``, the number of the call,
            or k is a function.

    Source: optax.MultiSteps.

    Example:
        >>> import curvlib.optim as optim
        >>> transformation = multi_steps(optim.scale(-1.0), 2)
        >>> state = transformation.init(torch.ones(1))
        >>> first, state = transformation.update(torch.tensor([1.0]), state)
        >>> second, state = transformation.update(torch.tensor([2.0]), state)
        >>> first, second
        (tensor([0.]), tensor([-1.5000]))
    """
    if not callable(every_k_schedule):
        positive(every_k_schedule)

    def init(params: Tree) -> MultiStepsState:
        return MultiStepsState(first_step(), first_step(), zeros(params), inner.init(params))

    def counts(state: MultiStepsState, step: int | None) -> tuple[int, int, int]:
        if may_look_at(state.mini_step):
            done = int(state.gradient_step)
            k = every_k_schedule(done) if callable(every_k_schedule) else every_k_schedule
            return int(state.mini_step) + 1, done, positive(k)
        if step is None or callable(every_k_schedule):
            raise ArgumentError(
                "the number of gradients collected cannot be read under a transform or a trace: give a fixed k, and "
                "the number of this call, update(grads, state, params, step=...), which is 1 for the first"
            )
        done, collected = divmod(step - 1, every_k_schedule)
        return collected + 1, done, every_k_schedule

    def update(
        grads: Tree, state: MultiStepsState, params: Tree | None = None, *, step: int | None = None, **extra: Any
    ) -> tuple[Tree, MultiStepsState]:
        old = own_state(state, MultiStepsState, "multi_steps").accumulated.entries
        collected, done, k = counts(state, step)
        leaves, structure = gradients_like(grads, state.accumulated, params)
        weight = 1 / collected if use_grad_mean else 1.0
        kept = 1.0 if not use_grad_mean else 1 - weight
        sums = [torch.add(kept * a, g.to(a.dtype), alpha=weight) for a, g in zip(old, leaves, strict=True)]
        if collected < k:
            updates = unflatten(structure, [torch.zeros_like(leaf) for leaf in sums])
            new = MultiStepsState(state.mini_step + 1, state.gradient_step, PerLeaf(tuple(sums)), state.inner)
            return updates, new
        if step is not None:
            extra["step"] = done + 1
        updates, kept_inside = inner.update(unflatten(structure, sums), state.inner, params, **extra)
        empty = tree_map(torch.zeros_like, state.accumulated)
        return updates, MultiStepsState(
            torch.zeros_like(state.mini_step), state.gradient_step + 1, empty, kept_inside
        )

    return GradientTransformation(init, update)


def positive(k: int) -> int:
    """The number of gradients in a step.

    Raises:
        ArgumentError: it is not positive.

    Example:
        >>> positive(4)
        4
    """
    if k < 1:
        raise ArgumentError(f"every_k_schedule must be a positive number of gradients, got {k}")
    return k
