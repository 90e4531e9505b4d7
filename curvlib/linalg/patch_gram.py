"""Gram matrices of convolution patches, without im2col where that pays.

Entry ((c, i), (c', j)) of the patch Gram matrix is a correlation of channels c and c' at the offset difference
j - i, summed over a window that depends on i. With stride and dilation 1, all pairs (i, j) of one difference share
the sum over a common window, and differ by strips along its border. Of the k^4 pairs of a k x k kernel only
(2k - 1)^2 differences are distinct, half of them by symmetry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from curvlib.linalg.gram import augmented_gram, gram


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
    widths = [p for pair in zip(reversed(padding), reversed(padding), strict=True) for p in pair]
    x = F.pad(x, widths) if any(widths) else x
    spatial = len(kernel)
    view = patches(x, kernel, stride, dilation)
    order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    rows = view.permute(order).reshape(-1, x.shape[1] * math.prod(kernel))
    return augmented_gram(rows) if augmented else gram(rows)
