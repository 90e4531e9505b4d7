"""Momentum: heavy ball and Nesterov's, by the conventions of `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlib.linalg.gram import full_precision
from curvlib.optim.arguments import below_one
from curvlib.optim.transformation import GradientTransformation, PerLeaf, first_step, gradients_like, own_state
from curvlib.pytree import Tree, flatten, register, unflatten


@register
class MomentumState:
    """Number of steps and velocity.

    Args:
        count: 0-d int64 tensor on the CPU.
        velocity: a tensor a leaf (float32 for half precision).
    """

    count: Tensor
    velocity: PerLeaf


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
    return with_velocity("heavy_ball", decay, dampening, lambda gradient, velocity: velocity)


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
    return with_velocity("nesterov", decay, 0.0, lambda gradient, velocity: torch.add(gradient, velocity, alpha=decay))


def with_velocity(
    name: str, decay: float, dampening: float, combined: Callable[[Tensor, Tensor], Tensor]
) -> GradientTransformation:
    """The transformation whose updates are made of a gradient and the new velocity, leaf by leaf."""
    below_one("decay", decay)
    below_one("dampening", dampening)

    def init(params: Tree) -> MomentumState:
        return MomentumState(first_step(), zeros(params))

    def update(
        grads: Tree, state: MomentumState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, MomentumState]:
        old = own_state(state, MomentumState, name).velocity.entries
        leaves, structure = gradients_like(grads, state.velocity, params)
        gradients = [g.to(v.dtype) for g, v in zip(leaves, old, strict=True)]
        pushes = gradients
        if dampening:
            weight = 1 - dampening * (state.count > 0).double()
            pushes = [weight.to(g.dtype) * g for g in gradients]  # a scalar leaf would become float64
        new = [torch.add(push, v, alpha=decay) for push, v in zip(pushes, old, strict=True)]
        updates = [combined(g, v) for g, v in zip(gradients, new, strict=True)]
        return unflatten(structure, updates), MomentumState(state.count + 1, PerLeaf(tuple(new)))

    return GradientTransformation(init, update)


def zeros(params: Tree) -> PerLeaf:
    """Where an average over steps starts: zeros like every parameter, float32 for half precision.

    Example:
        >>> zeros({"w": torch.ones(2, dtype=torch.bfloat16)}).entries
        (tensor([0., 0.]),)
    """
    return PerLeaf(tuple(torch.zeros_like(full_precision(param.detach())) for param in flatten(params)[0]))
