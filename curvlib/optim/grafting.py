"""Grafting: the direction of one method with the step size of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.optim.clipping import norm
from curvlib.optim.transformation import GradientTransformation, State, own_state
from curvlib.pytree import Tree, register, tree_map


@register
class GraftState:
    """The states of both transformations."""

    direction: State
    magnitude: State


def graft(direction: GradientTransformation, magnitude: GradientTransformation) -> GradientTransformation:
    """Updates are d ||m|| / ||d||, leaf by leaf, with the updates d and m that the two make of the same gradients.

    A leaf whose d is zero has a zero update.

    Args:
        direction: what gives d.
        magnitude: what gives m, of which only the Euclidean norm of each leaf counts.

    Source: Agarwal et al., Disentangling adaptive gradient methods from learning rates, 2020 (arXiv 2002.11803).

    Example:
        >>> import curvlib.optim as optim
        >>> transformation = graft(optim.scale(100.0), optim.scale_by_adam())
        >>> grads = {"w": torch.tensor([3.0, 4.0]), "b": torch.zeros(1)}
        >>> transformation.update(grads, transformation.init(grads))[0]
        {'w': tensor([0.8485, 1.1314]), 'b': tensor([0.])}
    """

    def init(params: Tree) -> GraftState:
        return GraftState(direction.init(params), magnitude.init(params))

    def update(grads: Tree, state: GraftState, params: Tree | None = None, **extra: Any) -> tuple[Tree, GraftState]:
        state = own_state(state, GraftState, "graft")
        directions, direction_state = direction.update(grads, state.direction, params, **extra)
        magnitudes, magnitude_state = magnitude.update(grads, state.magnitude, params, **extra)
        return tree_map(with_norm_of, directions, magnitudes), GraftState(direction_state, magnitude_state)

    return GradientTransformation(init, update)


def with_norm_of(direction: Tensor, magnitude: Tensor) -> Tensor:
    """The tensor in the direction of one whose norm is that of the other; zero if the direction is.

    Example:
        >>> with_norm_of(torch.tensor([3.0, 4.0]), torch.tensor([1.0]))
        tensor([0.6000, 0.8000])
    """
    size = norm(direction)
    ratio = norm(magnitude) / torch.where(size > 0, size, 1.0)
    return direction * ratio.to(direction.dtype)
