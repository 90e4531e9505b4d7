"""Gram matrices of convolution patches from one product a distinct offset difference, without im2col.

Entry ((c, i), (c', j)) of the patch Gram matrix is the correlation of channels c and c' at the offset difference
delta = j - i, summed over the window [i, i + L) of L output positions:

    sum_{u in [i, i + L)} x_c[u] x_c'[u + delta].

All windows share the core [k - 1, L), so that along each axis the sum is one term (core, delta), which depends on the
difference alone, plus single edge rows (u, delta). In two dimensions the terms are products of an axis's terms with
the other's. Of the k^4 pairs of a k x k kernel only (2k - 1)^2 differences are distinct, half of them by symmetry:
13 large products in place of 81 for 3 x 3, with exact edges and nothing subtracted.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class AxisTerms:
    """The terms along one axis, for pairs of offsets (i, j) with j - i >= lowest.

    Attributes:
        kernel: k.
        padding: zeros before and after the axis.
        length: L, the number of output positions.
        deltas: differences that occur; each makes a term with the core.
        edges: (u, delta) of the terms with a single row u; rows that are or meet padding are zero and left out.
        pairs: the pairs (i, j).
        incidence: 0/1 matrix [pairs, deltas + edges]: which terms add up to which pair.
    """

    kernel: int
    padding: int
    length: int
    deltas: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int], ...]
    incidence: Tensor

    @classmethod
    def of(cls, size: int, kernel: int, padding: int, lowest: int) -> AxisTerms:
        """The terms along an axis of ``size`` entries."""
        length = size + 2 * padding - kernel + 1
        deltas = tuple(range(lowest, kernel))
        pairs = tuple((i, j) for i in range(kernel) for j in range(kernel) if j - i >= lowest)
        edges_of = []
        for i, j in pairs:
            outside = [*range(i, kernel - 1), *range(length, length + i)]
            ends = [(min(u, u + j - i), max(u, u + j - i)) for u in outside]
            real = [padding <= low and high < padding + size for low, high in ends]
            edges_of.append([(u, j - i) for u, keep in zip(outside, real, strict=True) if keep])
        edges = tuple(dict.fromkeys(edge for group in edges_of for edge in group))
        rows = [
            [float(j - i == delta) for delta in deltas] + [float(edge in group) for edge in edges]
            for (i, j), group in zip(pairs, edges_of, strict=True)
        ]
        return cls(kernel, padding, length, deltas, edges, pairs, torch.tensor(rows))


def difference_gram(x: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The patch Gram matrix of a convolution with unit steps.

    Args:
        x: [N, C, H, W].
        kernel: k1, k2; the outputs must be at least as long as the kernel along both axes.
        padding: zeros before and after H, and W.

    Returns:
        [C k1 k2, C k1 k2], channels outermost.

    Example:
        >>> difference_gram(torch.arange(4.0).reshape(1, 1, 1, 4), (1, 2), (0, 0))
        tensor([[ 5.,  8.],
                [ 8., 14.]])
    """
    (k1, k2), channels = kernel, x.shape[1]
    rows = AxisTerms.of(x.shape[2], k1, padding[0], 0)  # j1 < i1 follows by symmetry
    columns = AxisTerms.of(x.shape[3], k2, padding[1], 1 - k2)
    terms = correlations(x, rows, columns)  # [row terms, column terms, C, C]
    by_row = (rows.incidence.to(terms) @ terms.flatten(1)).unflatten(1, terms.shape[1:])
    table = (columns.incidence.to(terms) @ by_row.flatten(2)).reshape(len(rows.pairs), k2, k2, channels, channels)
    rising = torch.ones(k2, k2, dtype=torch.bool, device=x.device).triu()[:, :, None, None]

    def entries(i: int, j: int) -> Tensor:
        if i > j:
            return entries(j, i).permute(1, 0, 3, 2)
        found = table[rows.pairs.index((i, j))]
        return torch.where(rising, found, found.permute(1, 0, 3, 2)) if i == j else found

    full = torch.stack([torch.stack([entries(i, j) for j in range(k1)]) for i in range(k1)])  # [i1, j1, i2, j2, C, C]
    return full.permute(4, 0, 2, 5, 1, 3).reshape(channels * k1 * k2, channels * k1 * k2)


def correlations(x: Tensor, rows: AxisTerms, columns: AxisTerms) -> Tensor:
    """The products X_u^T X_{u + delta} for all terms of both axes: [row terms, column terms, C, C].

    Those with the core of rows, difference 0 along rows and a negative one along columns are zero: not needed.
    """
    examples, channels, _, width = x.shape
    # [H + 2 p1 + 2, W + 2 p2, N, C]: a shift by rows or columns is a shift in memory; one row more at either end
    # keeps shifts by columns inside.
    p1, p2 = rows.padding, columns.padding
    stacked = F.pad(x.permute(2, 3, 0, 1), (0, 0, 0, 0, p2, p2, p1 + 1, p1 + 1)).contiguous()
    inside = torch.zeros(width + 2 * p2, dtype=x.dtype, device=x.device)
    inside[columns.kernel - 1 : columns.length] = 1
    masked = stacked * inside[:, None, None]  # zero outside the core of columns, so that whole rows can be multiplied
    flat = stacked.reshape(-1, channels)

    def lines(row: int, count: int, shift: int) -> Tensor:
        """``count`` whole rows from ``row`` on, shifted by columns: [count * (W + 2 p2) * N, C]."""
        start = ((row + 1) * (width + 2 * p2) + shift) * examples
        return flat[start : start + count * (width + 2 * p2) * examples]

    def core(tensor: Tensor, delta: int) -> Tensor:
        return tensor[rows.kernel + delta : rows.length + 1 + delta]

    count = rows.length + 1 - rows.kernel
    left = core(masked, 0).reshape(-1, channels).mT
    unneeded = left.new_zeros(channels, channels)
    near = [stacked_rows([core(stacked, 0)[:, u] for u, _ in columns.edges])] if columns.edges else []
    terms = []
    for d1 in rows.deltas:
        shifts = [lines(rows.kernel - 1 + d1, count, d2) if d1 > 0 or d2 >= 0 else None for d2 in columns.deltas]
        parts = [torch.stack([unneeded if far is None else left @ far for far in shifts])]
        if columns.edges:
            parts.append(near[0].mT @ stacked_rows([core(stacked, d1)[:, u + d2] for u, d2 in columns.edges]))
        terms.append(torch.cat(parts))
    if rows.edges:
        above = stacked_rows([masked[u + 1] for u, _ in rows.edges])
        fars = [torch.stack([lines(u + d1, 1, d2) for u, d1 in rows.edges]) for d2 in columns.deltas]
        parts = [torch.stack([above.mT @ far for far in fars], 1)]
        if columns.edges:
            corners = [(u1 + 1, d1, u2, d2) for u1, d1 in rows.edges for u2, d2 in columns.edges]
            here = torch.stack([stacked[u1, u2] for u1, _, u2, _ in corners])
            there = torch.stack([stacked[u1 + d1, u2 + d2] for u1, d1, u2, d2 in corners])
            parts.append((here.mT @ there).unflatten(0, (len(rows.edges), len(columns.edges))))
        terms += list(torch.cat(parts, 1))
    return torch.stack(terms)


def stacked_rows(parts: list[Tensor]) -> Tensor:
    """Tensors [.., N, C] as matrices [parts, rows, C]."""
    return torch.stack(parts).flatten(1, 2)
