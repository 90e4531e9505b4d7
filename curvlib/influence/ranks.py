"""Ranks, and the correlations made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import NonFiniteError


def ranks(values: Tensor) -> Tensor:
    """The rank of each value along the last axis, from 1; equal values share the mean of their ranks.

    Args:
        values: [*, n], without nan.

    Returns:
        float64 tensor [*, n].

    Example:
        >>> ranks(torch.tensor([30.0, 10.0, 20.0, 10.0]))
        tensor([4.0000, 1.5000, 3.0000, 1.5000], dtype=torch.float64)
    """
    values = values.contiguous()
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).double() / 2


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation along the last axis, in float64; nan where a side is constant.

    Args:
        a: [*, n].
        b: [*, n].

    Returns:
        float64 tensor [*].

    Example:
        >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 1.0, 5.0]))
        tensor(-0.5000, dtype=torch.float64)
    """
    return (standardized(a) * standardized(b)).sum(-1).clamp(-1, 1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation along the last axis: Pearson's of the ranks; nan where a side is constant.

    Args:
        a: [*, n], without nan.
        b: [*, n], without nan.

    Returns:
        float64 tensor [*].

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([5.0, 90.0, 11.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    return pearson(ranks(a), ranks(b))


def standardized(values: Tensor) -> Tensor:
    """Values minus their mean, brought to length one, along the last axis; nan where they are constant."""
    centred = values.double() - values.double().mean(-1, keepdim=True)
    # rounding of the mean must not make a direction out of constant values
    constant = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    return torch.where(constant, torch.nan, centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True))


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor in float64 on the CPU, if it is finite."""
    tensor = tensor.detach().cpu().double()
    if not tensor.isfinite().all():
        raise NonFiniteError(f"{name} are not finite")
    return tensor
