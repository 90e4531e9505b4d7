"""Updates times a number: fixed, or a learning rate that follows a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvlib.linalg.eager import may_look_at
from curvlib.optim.arguments import at_least_zero
from curvlib.optim.transformation import GradientTransformation, first_step, own_state, stateless
from curvlib.pytree import Tree, register, tree_map
from curvlib.pytree import scale as scaled

LearningRate = float | Tensor | Callable[[Any], Any]


def scale(factor: float | Tensor) -> GradientTransformation:
    """Updates are ``factor`` times the gradients.

    Example:
        >>> import torch
        >>> transformation = scale(0.5)
        >>> transformation.update(torch.ones(2), transformation.init(torch.ones(2)))[0]
        tensor([0.5000, 0.5000])
    """
    return multiplied("scale", factor)


def multiplied(name: str, factor: float | Tensor) -> GradientTransformation:
    """The transformation of this name that multiplies by a number."""
    return stateless(name, lambda grads, params: scaled(factor, grads))


@register
class ScheduleState:
    """The number of steps taken, a 0-d int64 tensor on the CPU."""

    count: Tensor


def scale_by_learning_rate(learning_rate: LearningRate) -> GradientTransformation:
    """Updates are -lr times the gradients: the end of a chain, after which updates are added to params.

    Args:
        learning_rate: a number, a 0-d tensor, or a function of the number of the step, which is 0 first: a `Schedule`,
            or any other. It is called with an int; under a transform or a trace, where no number can be read, with a
            0-d float64 tensor.

    Raises:
        ArgumentError: a negative number.

    Example:
        >>> import torch
        >>> transformation = scale_by_learning_rate(lambda step: 0.5 ** step)
        >>> params = torch.zeros(1)
        >>> updates, state = transformation.update(torch.ones(1), transformation.init(params))
        >>> updates, transformation.update(torch.ones(1), state)[0]
        (tensor([-1.]), tensor([-0.5000]))
    """
    constant = "scale_by_learning_rate with a number"
    if isinstance(learning_rate, Tensor):
        return multiplied(constant, -learning_rate)
    if not callable(learning_rate):
        at_least_zero("learning_rate", learning_rate)
        return multiplied(constant, -learning_rate)
    schedule = learning_rate

    def update(
        grads: Tree, state: ScheduleState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ScheduleState]:
        state = own_state(state, ScheduleState, "scale_by_learning_rate with a schedule")
        rate = schedule(int(state.count) if may_look_at(state.count) else state.count.double())
        return tree_map(lambda leaf: -rate * leaf, grads), ScheduleState(state.count + 1)

    return GradientTransformation(lambda params: ScheduleState(first_step()), update)
