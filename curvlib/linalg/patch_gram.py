"""Patches of convolutions and their Gram matrices, by the cheapest route."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlib.linalg.difference_gram import difference_gram
from curvlib.linalg.gram import augmented_gram, bordered, gram


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Patches of a padded input [N, C, *spatial] as a strided view [N, C, *positions, *kernel]."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return x


def patch_gram(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    augmented: bool = False,
) -> Tensor:
    """P^T P for the patches P [N * positions, C * prod(kernel)] of a convolution's input.

    Args:
        x: [N, C, *spatial].
        kernel: sizes of the kernel.
        stride: steps of the window.
        padding: zeros before and after each spatial axis.
        dilation: spacing within the kernel.
        augmented: append a one to every patch.

    Returns:
        [C * prod(kernel), C * prod(kernel)], channels outermost, or one larger if ``augmented``.

    Example:
        >>> import torch
        >>> patch_gram(torch.ones(1, 1, 3), (2,), (1,), (0,), (1,))
        tensor([[2., 2.],
                [2., 2.]])
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if shares_differences(x, kernel, stride, padding, dilation):
        inner = difference_gram(x, (kernel[0], kernel[1]), (padding[0], padding[1]))
        if not augmented:
            return inner
        total = F.pad(x.sum(0, keepdim=True), (padding[1], padding[1], padding[0], padding[0]))
        windows = patches(total, kernel, stride, dilation)[0]  # [C, *positions, *kernel]
        count = x.shape[0] * windows.shape[1] * windows.shape[2]
        return bordered(inner, windows.sum((1, 2)).reshape(-1), inner.new_full((), count))
    widths = [p for pair in zip(reversed(padding), reversed(padding), strict=True) for p in pair]
    x = F.pad(x, widths) if any(widths) else x
    spatial = len(kernel)
    order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    rows = patches(x, kernel, stride, dilation).permute(order).reshape(-1, x.shape[1] * math.prod(kernel))
    return augmented_gram(rows) if augmented else gram(rows)


def shares_differences(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether the differences are worth sharing: 2-D, unit steps, a core, and enough channels for fast products."""
    if len(kernel) != 2 or math.prod(kernel) == 1 or any(step != 1 for step in (*stride, *dilation)):
        return False
    lengths = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, kernel, strict=True)]
    return x.shape[1] >= 16 and all(length >= 2 * k for length, k in zip(lengths, kernel, strict=True))
