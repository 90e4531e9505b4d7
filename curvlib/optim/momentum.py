"""Momentum: heavy ball and Nesterov's, by the conventions of `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.linalg.gram import full_precision
from curvlib.optim.arguments import below_one
from curvlib.optim.transformation import GradientTransformation, first_step, leaves_like
from curvlib.pytree import Tree, flatten, register, tree_map, unflatten


@register
class MomentumState:
    """Number of steps and velocity.

    Args:
        count: 0-d int64 tensor on the CPU.
        velocity: pytree like params (float32 for half precision).
    """

    count: Tensor
    velocity: Tree


def heavy_ball(decay: float, *, dampening: float = 0.0) -> GradientTransformation:
    """Updates are the velocity v <- decay v + (1 - dampening) g, which starts as the first gradient, undampened.

    With ``dampening=decay`` it is the exponential moving average of gradients.

    Args:
        decay: of the velocity, in [0, 1).
        dampening: what is taken off each gradient but the first, in [0, 1).

    Raises:
        ArgumentError: a number is not in [0, 1).

    Source: Polyak, Some methods of speeding up the convergence of iteration methods, 1964; `torch.optim.SGD`.

    Example:
        >>> transformation = heavy_ball(0.5)
        >>> updates, state = transformation.update(torch.ones(1), transformation.init(torch.zeros(1)))
        >>> transformation.update(torch.ones(1), state)[0]
        tensor([1.5000])
    """
    return with_velocity(decay, dampening, lambda gradient, velocity: velocity)


def nesterov(decay: float) -> GradientTransformation:
    """Updates are g + decay v with the velocity v <- decay v + g.

    Args:
        decay: of the velocity, in [0, 1).

    Raises:
        ArgumentError: ``decay`` is not in [0, 1).

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013;
    `torch.optim.SGD` with ``nesterov=True``.

    Example:
        >>> transformation = nesterov(0.5)
        >>> transformation.update(torch.ones(1), transformation.init(torch.zeros(1)))[0]
        tensor([1.5000])
    """
    return with_velocity(decay, 0.0, lambda gradient, velocity: torch.add(gradient, velocity, alpha=decay))


def with_velocity(
    decay: float, dampening: float, combined: Callable[[Tensor, Tensor], Tensor]
) -> GradientTransformation:
    """The transformation whose updates are made of a gradient and the new velocity, leaf by leaf."""
    below_one("decay", decay)
    below_one("dampening", dampening)

    def init(params: Tree) -> MomentumState:
        return MomentumState(first_step(), tree_map(zeros, params))

    def update(grads: Tree, state: MomentumState, params: Tree | None = None) -> tuple[Tree, MomentumState]:
        old, structure = flatten(state.velocity)
        gradients = [g.to(v.dtype) for g, v in zip(leaves_like(state.velocity, grads), old, strict=True)]
        pushes = gradients
        if dampening:
            weight = 1 - dampening * (state.count > 0).double()
            pushes = [weight.to(g.dtype) * g for g in gradients]  # a scalar leaf would become float64
        new = [torch.add(push, v, alpha=decay) for push, v in zip(pushes, old, strict=True)]
        updates = [combined(g, v) for g, v in zip(gradients, new, strict=True)]
        return unflatten(structure, updates), MomentumState(state.count + 1, unflatten(structure, new))

    return GradientTransformation(init, update)


def zeros(param: Tensor) -> Tensor:
    """Where an average over steps starts: zeros like a parameter, float32 for half precision.

    Example:
        >>> zeros(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return torch.zeros_like(full_precision(param.detach()))
