"""Steps that are left out where gradients are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.linalg.eager import is_eager
from curvlib.optim.arguments import at_least_zero
from curvlib.optim.transformation import GradientTransformation, State, first_step, own_state
from curvlib.pytree import Tree, flatten, register, tree_map


@register
class ApplyIfFiniteState:
    """What is known of the gradients so far: 0-d tensors on the CPU, and the state of the transformation.

    Args:
        notfinite_count: steps in a row, up to the last, whose gradients were not finite.
        last_finite: whether those of the last step were.
        total_notfinite: steps whose gradients were not.
        inner: of the transformation.
    """

    notfinite_count: Tensor
    last_finite: Tensor
    total_notfinite: Tensor
    inner: State


def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: int) -> GradientTransformation:
    """Updates are those of ``inner`` if all gradients are finite; otherwise they are zero and its state stays.

    After ``max_consecutive_errors`` such steps in a row the gradients are passed on as they are, so that what is wrong
    is seen. Eagerly the host reads one flag a step.

    Args:
        inner: gets the finite gradients. It counts its own steps: ``step=`` is not passed on.
        max_consecutive_errors: how many steps in a row may be left out.

    Raises:
        ArgumentError: ``max_consecutive_errors`` is negative.

    Source: optax, of the same name.

    Example:
        >>> import curvlib.optim as optim
        >>> transformation = apply_if_finite(optim.scale(-1.0), 5)
        >>> state = transformation.init(torch.ones(1))
        >>> updates, state = transformation.update(torch.tensor([float("nan")]), state)
        >>> updates, state.notfinite_count
        (tensor([0.]), tensor(1))
    """
    at_least_zero("max_consecutive_errors", max_consecutive_errors)

    def init(params: Tree) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(first_step(), torch.tensor(True, device="cpu"), first_step(), inner.init(params))

    def update(
        grads: Tree, state: ApplyIfFiniteState, params: Tree | None = None, *, step: int | None = None, **extra: Any
    ) -> tuple[Tree, ApplyIfFiniteState]:
        state = own_state(state, ApplyIfFiniteState, "apply_if_finite")
        finite = all_finite(grads)
        in_a_row = torch.where(finite, 0, state.notfinite_count + 1)
        applied = finite | (in_a_row > max_consecutive_errors)
        if is_eager() and not applied:
            updates, kept = tree_map(torch.zeros_like, grads), state.inner
        else:
            updates, kept = inner.update(grads, state.inner, params, **extra)
            if not is_eager():
                updates = tree_map(lambda leaf: torch.where(applied.to(leaf.device), leaf, 0), updates)
                kept = tree_map(lambda new, old: torch.where(applied.to(new.device), new, old), kept, state.inner)
        total = torch.where(finite, state.total_notfinite, state.total_notfinite + 1)
        return updates, ApplyIfFiniteState(in_a_row, finite, total, kept)

    return GradientTransformation(init, update)


def all_finite(tree: Tree) -> Tensor:
    """Whether every element of every leaf is finite: a 0-d tensor on the CPU.

    Example:
        >>> all_finite({"w": torch.ones(2), "b": torch.tensor([float("inf")])})
        tensor(False)
    """
    flags = [torch.isfinite(leaf).all() for leaf in flatten(tree)[0]]
    if not flags:
        return torch.tensor(True, device="cpu")
    return torch.stack([flag.to(flags[0].device, non_blocking=True) for flag in flags]).all().cpu()
