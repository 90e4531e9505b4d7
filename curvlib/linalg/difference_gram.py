"""Gram matrices of convolution patches from one correlation a distinct offset difference, without im2col.

Entry ((c, i), (c', j)) of the patch Gram matrix is the correlation of channels c and c' at the offset difference
delta = j - i, summed over the window [i, i + L) of L output positions:

    sum_{u in [i, i + L)} x_c[u] x_c'[u + delta].

All windows share the core [k - 1, L), so that along each axis the sum has one large part, which depends on the
difference alone, and single edge rows. In two dimensions the parts are products of an axis's parts with the other's.
Of the k^4 pairs of a k x k kernel only (2k - 1)^2 differences are distinct, and k (2k - 1) of them give the others by
symmetry: 15 large products in place of 81 for 3 x 3, with exact edges and nothing subtracted. The correlations at all
differences together are the weight gradient of a convolution, for which every backend has a fast kernel.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis, in coordinates that count its padding.

    Attributes:
        kernel: k.
        parts: ranges [start, stop) that make up the windows: the core, and each edge row that is not padding.
        windows: for each offset i, the numbers of the parts that its window consists of.
    """

    kernel: int
    parts: tuple[tuple[int, int], ...]
    windows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, size: int, kernel: int, padding: int) -> Axis:
        """The parts of an axis of ``size`` entries."""
        length = size + 2 * padding - kernel + 1
        edges = [*range(kernel - 1), *range(length, length + kernel - 1)]
        parts = [(kernel - 1, length), *((u, u + 1) for u in edges if padding <= u < padding + size)]
        windows = [
            tuple(number for number, (start, stop) in enumerate(parts) if i <= start and stop <= i + length)
            for i in range(kernel)
        ]
        return cls(kernel, tuple(parts), tuple(windows))


def difference_gram(x: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The patch Gram matrix of a convolution with unit steps.

    Args:
        x: [N, C, H, W].
        kernel: k1, k2; the output must be at least as long as the kernel along both axes.
        padding: zeros before and after H, and W.

    Returns:
        [C k1 k2, C k1 k2], channels outermost.

    Example:
        >>> difference_gram(torch.arange(4.0).reshape(1, 1, 1, 4), (1, 2), (0, 0))
        tensor([[ 5.,  8.],
                [ 8., 14.]])
    """
    (k1, k2), (p1, p2), channels = kernel, padding, x.shape[1]
    rows, columns = Axis.of(x.shape[2], k1, p1), Axis.of(x.shape[3], k2, p2)
    padded = F.pad(x, (p2 + k2 - 1, p2 + k2 - 1, p1, p1 + k1 - 1))
    terms = [[correlations(padded, part, other, kernel) for other in columns.parts] for part in rows.parts]

    def window(i1: int, i2: int) -> Tensor:
        """[C, C, k1 - i1, k2]: what belongs to the pairs (i1, j1 >= i1), (i2, j2)."""
        first, *others = [
            terms[row][column][:, :, : k1 - i1, k2 - 1 - i2 : 2 * k2 - 1 - i2]
            for row in rows.windows[i1]
            for column in columns.windows[i2]
        ]
        return sum(others, first)

    windows = [[window(i1, i2) for i2 in range(k2)] for i1 in range(k1)]

    def entries(i1: int, i2: int, j1: int, j2: int) -> Tensor:
        if i1 > j1:  # not by recursion: a function that refers to itself would keep the windows alive
            return windows[j1][j2][:, :, i1 - j1, i2].mT
        return windows[i1][i2][:, :, j1 - i1, j2]

    offsets = [(i1, i2) for i1 in range(k1) for i2 in range(k2)]
    blocks = [torch.stack([entries(*i, *j) for j in offsets], -1) for i in offsets]  # of [C, C, k1 k2]
    return torch.stack(blocks, 1).reshape(channels * k1 * k2, channels * k1 * k2)


def correlations(padded: Tensor, rows: tuple[int, int], columns: tuple[int, int], kernel: tuple[int, int]) -> Tensor:
    """sum_{n, u in rows x columns} x[n, c, u] x[n, c', u + delta] for all differences: [C, C, k1, 2 k2 - 1].

    Differences are 0 to k1 - 1 along rows, and 1 - k2 to k2 - 1 along columns, where ``padded`` has k2 - 1 zeros more.
    """
    (k1, k2), channels = kernel, padded.shape[1]
    left = padded[:, :, rows[0] : rows[1], columns[0] + k2 - 1 : columns[1] + k2 - 1]
    right = padded[:, :, rows[0] : rows[1] + k1 - 1, columns[0] : columns[1] + 2 * (k2 - 1)]
    weight = padded.new_empty(()).expand(channels, channels, k1, 2 * k2 - 1)
    options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
    gradient: Tensor = torch.ops.aten.convolution_backward(left, right, weight, None, *options)[1]
    return gradient
