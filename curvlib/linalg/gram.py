"""Gram matrices X^T X of rows, with each symmetric pair of blocks computed once."""

from __future__ import annotations

import torch
from torch import Tensor

# Splitting saves a quarter of the multiplications at each level, and pays from this width on.
SPLIT = 256


def gram(rows: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The Gram matrix sum_r w_r x_r x_r^T.

    Half precision is accumulated in float32.

    Args:
        rows: [*, n, d].
        weights: [*, n], nonnegative; None: all ones.

    Returns:
        [*, d, d].

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[1., 2.],
                [2., 5.]])
    """
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    return symmetric_product(rows, rows if weights is None else rows * weights.unsqueeze(-1))


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right [*, d, d] for [*, n, d] with a symmetric result: the lower blocks mirror the upper ones."""
    width = left.shape[-1]
    if width < SPLIT:
        return left.mT @ right
    half = width // 2
    upper = symmetric_product(left[..., :half], right[..., :half])
    lower = symmetric_product(left[..., half:], right[..., half:])
    corner = left[..., :half].mT @ right[..., half:]
    return torch.cat([torch.cat([upper, corner], -1), torch.cat([corner.mT, lower], -1)], -2)


def augmented_gram(rows: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The Gram matrix of rows [x; 1], without appending the ones: its border holds sum w x and sum w.

    Args:
        rows: [*, n, d].
        weights: [*, n], nonnegative; None: all ones.

    Returns:
        [*, d + 1, d + 1].

    Example:
        >>> augmented_gram(torch.tensor([[1.0], [3.0]]))
        tensor([[10.,  4.],
                [ 4.,  2.]])
    """
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    inner = gram(rows, weights=weights)
    weighted = rows if weights is None else rows * weights.unsqueeze(-1)
    total = inner.new_full((), rows.shape[-2]) if weights is None else weights.sum(-1).to(inner.dtype)
    return bordered(inner, weighted.sum(-2), total)


def bordered(inner: Tensor, sums: Tensor, total: Tensor) -> Tensor:
    """[[inner, sums], [sums^T, total]] from [*, d, d], [*, d] and [*]."""
    corner = total.expand(sums.shape[:-1])[..., None, None]
    top = torch.cat([inner, sums.unsqueeze(-1)], -1)
    return torch.cat([top, torch.cat([sums.unsqueeze(-2), corner], -1)], -2)
