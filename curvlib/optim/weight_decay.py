"""Decoupled weight decay."""

from __future__ import annotations

from typing import Any

import torch

from curvlib.errors import ArgumentError
from curvlib.optim.arguments import at_least_zero
from curvlib.optim.partition import Rule, for_each_leaf
from curvlib.optim.transformation import GradientTransformation, PerLeaf, gradients_like, own_state
from curvlib.pytree import Tree, flatten, register, static, unflatten


@register
class Decays:
    """Whether a leaf decays (static)."""

    yes: bool = static()


@register
class WeightDecayState:
    """Which leaves decay, as init found it."""

    decays: PerLeaf


def add_decayed_weights(rate: float, *, mask: Rule | Tree | None = None) -> GradientTransformation:
    """Updates are u + rate * params.

    Between a preconditioner and `scale_by_learning_rate` it is the decoupled decay of AdamW, by lr * rate a step.

    Args:
        rate: what a parameter is multiplied by.
        mask: which leaves decay: a function (name, leaf) -> bool, which is called by init only, or a pytree of bools
            like params. None: all.

    Raises:
        ArgumentError: a negative rate; or update is called without params.
        PytreeError: init finds a mask that is not a pytree like params.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019.

    Example:
        >>> transformation = add_decayed_weights(0.1, mask=lambda name, leaf: leaf.ndim >= 2)
        >>> params = {"w": torch.ones(1, 1), "b": torch.ones(1)}
        >>> grads = {"w": torch.zeros(1, 1), "b": torch.zeros(1)}
        >>> transformation.update(grads, transformation.init(params), params)[0]
        {'w': tensor([[0.1000]]), 'b': tensor([0.])}
    """
    at_least_zero("rate", rate)

    def init(params: Tree) -> WeightDecayState:
        if mask is None:
            return WeightDecayState(PerLeaf((Decays(True),) * len(flatten(params)[0])))
        return WeightDecayState(PerLeaf(tuple(Decays(bool(yes)) for yes in for_each_leaf(params, mask, "mask"))))

    def update(
        grads: Tree, state: WeightDecayState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, WeightDecayState]:
        decays = own_state(state, WeightDecayState, "add_decayed_weights").decays
        if params is None:
            raise ArgumentError("weight decay needs the parameters: call update(grads, state, params)")
        gradients, structure = gradients_like(grads, decays, params)
        updates = [
            torch.add(u, p.to(u.dtype), alpha=rate) if decay.yes else u
            for u, p, decay in zip(gradients, flatten(params)[0], decays.entries, strict=True)
        ]
        return unflatten(structure, updates), state

    return GradientTransformation(init, update)
