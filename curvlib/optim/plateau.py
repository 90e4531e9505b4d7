"""Updates that become smaller when the loss no longer does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.optim.arguments import at_least_zero
from curvlib.optim.transformation import GradientTransformation, first_step, own_state
from curvlib.pytree import Tree, register, tree_map


@register
class ReduceOnPlateauState:
    """What is known of the loss: 0-d tensors on the CPU.

    Args:
        scale: what updates are multiplied by.
        best_value: the lowest average of the loss so far.
        plateau_count: averages in a row that were no improvement.
        cooldown_count: averages that are still to be left alone.
        count: values in the average that is being formed.
        avg_value: that average.
    """

    scale: Tensor
    best_value: Tensor
    plateau_count: Tensor
    cooldown_count: Tensor
    count: Tensor
    avg_value: Tensor


def reduce_on_plateau(
    *,
    factor: float = 0.1,
    patience: int = 10,
    rtol: float = 1e-4,
    atol: float = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: float = 0.0,
) -> GradientTransformation:
    """Updates are s g, where s is multiplied by ``factor`` whenever the loss has not improved for a while.

    ``update`` needs the loss, ``value=``. The mean l of every ``accumulation_size`` values counts as one:

        improved: l < (1 - rtol) best - atol, and then best <- l;  n <- 0 if improved, n + 1 otherwise
        n = patience:  s <- max(factor s, min_scale),  n <- 0, and the next ``cooldown`` means leave n at 0

    It stands behind the learning rate in a chain; `torch.optim.lr_scheduler.ReduceLROnPlateau` with a patience of one
    less does the same to the rate itself.

    Args:
        factor: in (0, 1).
        patience: how many means in a row may be no improvement.
        rtol: by which part of the best mean a mean must be lower to be an improvement.
        atol: by how much more it must be lower.
        cooldown: means after a reduction that are not counted.
        accumulation_size: values that are averaged.
        min_scale: the lowest s.

    Raises:
        ArgumentError: a number is out of its range; or update is called without ``value``.

    Source: optax.contrib, of the same name.

    Example:
        >>> transformation = reduce_on_plateau(factor=0.5, patience=2)
        >>> params = torch.ones(1)
        >>> state = transformation.init(params)
        >>> for loss in (1.0, 2.0, 2.0):
        ...     updates, state = transformation.update(torch.ones(1), state, params, value=loss)
        ...     print(updates)
        tensor([1.])
        tensor([1.])
        tensor([0.5000])
    """
    if not 0 < factor < 1:
        raise ArgumentError(f"factor must lie in (0, 1), got {factor}")
    for name, length in (("patience", patience), ("accumulation_size", accumulation_size)):
        if length < 1:
            raise ArgumentError(f"{name} must be a positive number of values, got {length}")
    for name, bound in (("rtol", rtol), ("atol", atol), ("cooldown", cooldown), ("min_scale", min_scale)):
        at_least_zero(name, bound)

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device="cpu")

    def init(params: Tree) -> ReduceOnPlateauState:
        return ReduceOnPlateauState(
            number(1.0), number(float("inf")), first_step(), first_step(), first_step(), number(0.0)
        )

    def update(
        grads: Tree, state: ReduceOnPlateauState, params: Tree | None = None, *, value: Any = None, **extra: Any
    ) -> tuple[Tree, ReduceOnPlateauState]:
        state = own_state(state, ReduceOnPlateauState, "reduce_on_plateau")
        if value is None:
            raise ArgumentError("reduce_on_plateau needs the loss: call update(grads, state, params, value=loss)")
        count = state.count + 1
        loss = torch.as_tensor(value).detach().to(state.avg_value)
        average = state.avg_value + (loss - state.avg_value) / count
        full = count == accumulation_size
        improved = full & (average < (1 - rtol) * state.best_value - atol)
        cooling = state.cooldown_count > 0
        waited = torch.where(improved | cooling, 0, state.plateau_count + 1)
        reduced = full & (waited == patience)
        rest = (state.cooldown_count - 1).clamp(min=0)
        new = ReduceOnPlateauState(
            torch.where(reduced, (state.scale * factor).clamp(min=min_scale), state.scale),
            torch.where(improved, average, state.best_value),
            torch.where(full, torch.where(reduced, 0, waited), state.plateau_count),
            torch.where(full, torch.where(reduced, cooldown, rest), state.cooldown_count),
            torch.where(full, 0, count),
            torch.where(full, 0.0, average),
        )
        return tree_map(lambda leaf: leaf * new.scale.to(leaf.dtype), grads), new

    return GradientTransformation(init, update)
