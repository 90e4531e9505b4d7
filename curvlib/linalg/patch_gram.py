"""Patches of convolutions and their Gram matrices, by the cheapest route."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlib.linalg.difference_gram import difference_gram
from curvlib.linalg.gram import bordered, full_precision, gram


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
    counted: Tensor | None = None,
    augmented: bool = False,
) -> tuple[Tensor, Tensor]:
    """P^T P for the patches P [N * positions, C * prod(kernel)] of a convolution's input.

    Args:
        x: [N, C, *spatial].
        kernel: sizes of the kernel.
        stride: steps of the window.
        padding: zeros before and after each spatial axis.
        dilation: spacing within the kernel.
        counted: [N] of booleans: whose patches count; None: everyone's.
        augmented: append a one to every patch.

    Returns:
        [C * prod(kernel), C * prod(kernel)], channels outermost, or one larger if ``augmented``; and the number of
        patches, 0-d.

    Example:
        >>> import torch
        >>> patch_gram(torch.ones(1, 1, 3), (2,), (1,), (0,), (1,))
        (tensor([[2., 2.],
                [2., 2.]]), tensor(2))
    """
    if len(kernel) == 1:
        flat = ((1, *kernel), (1, *stride), (0, *padding), (1, *dilation))
        return patch_gram(x.unsqueeze(2), *flat, counted=counted, augmented=augmented)
    x = full_precision(x)
    if counted is not None:
        x = torch.where(counted.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    widths = [p for p in reversed(padding) for _ in range(2)]
    # for the sums of patches, the sum of all images will do
    windows = patches(F.pad(x.sum(0, keepdim=True), widths), kernel, stride, dilation)[0]  # [C, *positions, *kernel]
    positions = tuple(range(1, 1 + len(kernel)))
    images = torch.full((), x.shape[0], device=x.device) if counted is None else counted.sum()
    count = images * math.prod(windows.shape[i] for i in positions)
    if shares_differences(x, kernel, stride, padding, dilation):
        inner = difference_gram(x, (kernel[0], kernel[1]), (padding[0], padding[1]))
    else:
        views = patches(F.pad(x, widths) if any(widths) else x, kernel, stride, dilation)
        kernels = tuple(range(2 + len(kernel), 2 + 2 * len(kernel)))
        rows = views.permute(0, *(1 + i for i in positions), 1, *kernels)
        inner = gram(rows.reshape(-1, x.shape[1] * math.prod(kernel)))
    if augmented:
        inner = bordered(inner, windows.sum(positions).reshape(-1), count.to(inner.dtype))
    return inner, count


def shares_differences(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether `difference_gram` applies and pays: a two-dimensional window of unit steps, at most half the image."""
    if len(kernel) != 2 or math.prod(kernel) == 1 or any(step != 1 for step in (*stride, *dilation)):
        return False
    lengths = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, kernel, strict=True)]
    return all(length >= 2 * k for length, k in zip(lengths, kernel, strict=True) if k > 1)
