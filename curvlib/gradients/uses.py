"""What is kept of a weight in a pass over a batch: the rows that each of its uses reads, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvlib.layers.rows import Rows, chunks, summed
from curvlib.layers.wide import nonnegative
from curvlib.operators.vectors import at_least_single, widest
from curvlib.pytree import Tree, flatten, register, static


@register
class WeightUse:
    """One use of a weight in one pass: rows a, gradients g [K, N, (groups,) T, d_out], and its orientation."""

    rows: Rows
    g: Tensor
    transposed: bool = static()

    def __mul__(self, weight: float | Tensor) -> WeightUse:
        """Rows whose second moments have this weight."""
        return WeightUse(self.rows, self.g * nonnegative(weight) ** 0.5, self.transposed)

    def gradients(self, start: int, stop: int) -> Tensor:
        """The part of D_n of these examples that is due to this use, in the orientation of the block."""
        found = self.rows.part(start, stop).gradients(self.g[:, start:stop])
        return found.mT if self.transposed else found


def in_chunks(uses: Sequence[WeightUse]) -> Iterator[Tensor]:
    """D_n, added over all uses, for as many examples at a time as fit into memory."""
    for start, stop in chunks(uses[0].rows.shape, uses[0].g):
        yield summed([use.gradients(start, stop) for use in uses])


def curvature_dtype(params: Tree) -> torch.dtype:
    """The dtype of a curvature: the widest of its parameters, and float32 at least; layers may compute in others."""
    return at_least_single(widest(leaf.dtype for leaf in flatten(params)[0]))


def as_wide_as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """What flows through a layer in the dtype of the curvature; half precision is widened where it is used."""
    if tensor.dtype == dtype or not tensor.is_floating_point() or at_least_single(tensor.dtype) == dtype:
        return tensor
    return tensor.to(dtype)
