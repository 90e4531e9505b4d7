"""Adam: gradients divided by the root of their mean squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlib.optim.arguments import at_least_zero, below_one
from curvlib.optim.momentum import zeros
from curvlib.optim.transformation import GradientTransformation, PerLeaf, first_step, gradients_like, own_state
from curvlib.pytree import Tree, register, unflatten


@register
class AdamState:
    """Number of steps and moments.

    Args:
        count: 0-d int64 tensor on the CPU.
        first, second: moving averages of g and g * g, a tensor a leaf (float32 for half precision).
    """

    count: Tensor
    first: PerLeaf
    second: PerLeaf


def scale_by_adam(
    *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, bias_correction: bool = True
) -> GradientTransformation:
    """Updates are m' / (sqrt(v') + eps), with the moments m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g * g.

    In step t = 1, 2, ... the bias correction makes m' = m / (1 - b1^t) and v' = v / (1 - b2^t); without it m' = m and
    v' = v. Where eps stands is the convention of `torch.optim.AdamW`.

    Args:
        betas: (b1, b2), in [0, 1).
        eps: what keeps the denominator away from 0.
        bias_correction: whether averages are divided by the sum of their weights.

    Raises:
        ArgumentError: a number is out of its range.

    Source: Kingma and Ba, Adam, ICLR 2015.

    Example:
        >>> transformation = scale_by_adam()
        >>> params = torch.zeros(2)
        >>> update, _ = transformation.update(torch.tensor([3.0, -0.1]), transformation.init(params))
        >>> torch.allclose(update, torch.tensor([1.0, -1.0]))
        True
    """
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        below_one(name, beta)
    at_least_zero("eps", eps)

    def init(params: Tree) -> AdamState:
        return AdamState(first_step(), zeros(params), zeros(params))

    def update(grads: Tree, state: AdamState, params: Tree | None = None, **extra: Any) -> tuple[Tree, AdamState]:
        old = own_state(state, AdamState, "scale_by_adam").first.entries
        leaves, structure = gradients_like(grads, state.first, params)
        gradients = [g.to(m.dtype) for g, m in zip(leaves, old, strict=True)]
        firsts = [torch.lerp(m, g, 1 - betas[0]) for m, g in zip(old, gradients, strict=True)]
        seconds = [
            torch.addcmul(betas[1] * v, g, g, value=1 - betas[1])
            for v, g in zip(state.second.entries, gradients, strict=True)
        ]
        step = state.count + 1
        if bias_correction:
            factor, shift = corrections(step, betas, eps)
            updates = [factor * m / (v.sqrt() + shift) for m, v in zip(firsts, seconds, strict=True)]
        else:
            updates = [m / (v.sqrt() + eps) for m, v in zip(firsts, seconds, strict=True)]
        return unflatten(structure, updates), AdamState(step, PerLeaf(tuple(firsts)), PerLeaf(tuple(seconds)))

    return GradientTransformation(init, update)


def corrections(step: Tensor, betas: tuple[float, float], eps: float) -> tuple[Tensor, Tensor]:
    """(c, e), 0-d float64 tensors, with which the corrected update is c m / (sqrt(v) + e).

    Example:
        >>> factor, shift = corrections(torch.tensor(1), (0.5, 0.75), 1.0)
        >>> factor.item(), shift.item()
        (1.0, 0.5)
    """
    t = step.double()
    root = (1 - betas[1] ** t).sqrt()
    return root / (1 - betas[0] ** t), eps * root
