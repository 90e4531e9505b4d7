"""Embedding tables: one-hot inputs, hence a diagonal input factor that holds the token frequencies."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.layers.base import Axes, KroneckerLayer, Layer, output_moment, positions_that_count, second_moment
from curvlib.layers.rows import OneHotRows, Rows
from curvlib.layers.table import Inspection, Use, entry
from curvlib.layers.wide import CompressedMoment, Wide
from curvlib.operators.layout import Region


@dataclasses.dataclass(frozen=True)
class Embedding(KroneckerLayer):
    """z = W^T e(index): with W [V, d], the block's matrix is W^T [d, V].

    Under ``expand`` the input factor is exactly diag(token frequencies). Under ``reduce`` a row is the mean of an
    example's one-hot vectors and the factor is dense (or what `Wide` keeps of it). Positions that
    hold ``padding_index`` do not train the table and do not count.
    """

    weight: Region
    output_axes: Axes
    index_axes: Axes
    padding_index: int | None = None
    bias: None = None

    def split(self) -> tuple[KroneckerLayer, Layer]:
        raise AssertionError("an embedding has no bias")

    def rows(self, x: Tensor, examples: int) -> Rows:
        return OneHotRows(self.index_axes.rows(x, examples).squeeze(-1).clone(), self.weight.shape[-1])

    def keep(self, x: Tensor, examples: int) -> Tensor | None:
        if self.padding_index is None:
            return None
        return self.index_axes.rows(x, examples).squeeze(-1) != self.padding_index  # [N, T]

    def input_factor(
        self, x: Tensor, examples: int, sharing: str, mask: Tensor | None, wide: Wide
    ) -> tuple[Tensor | CompressedMoment, Tensor]:
        index = self.index_axes.rows(x, examples).squeeze(-1)  # [N, T]
        counted = positions_that_count(mask, *index.shape)
        if self.padding_index is not None:
            real = index != self.padding_index
            counted = real if counted is None else counted & real
        weights = torch.ones_like(index) if counted is None else counted.to(index.dtype)
        width = self.weight.shape[-1]
        if sharing == "expand" or index.shape[1] == 1:
            frequencies = torch.zeros(width, dtype=weights.dtype, device=index.device)
            return frequencies.index_add(0, index.reshape(-1), weights.reshape(-1)), weights.sum()
        counts = torch.zeros(examples, width, dtype=weights.dtype, device=index.device).scatter_add(1, index, weights)
        rows = counts.double() / weights.sum(1, keepdim=True).clamp(min=1)
        return second_moment(rows, None, wide, augmented=False), (weights.sum(1) > 0).sum()

    def output_rows(self, g: Tensor, kept: Tensor | None, examples: int) -> Tensor:
        rows = self.output_axes.rows(g, examples, leading=1)
        return rows if kept is None else rows * kept.unsqueeze(-1)

    def output_factor(
        self, g: Tensor, kept: Tensor | None, examples: int, sharing: str, wide: Wide
    ) -> Tensor | CompressedMoment:
        return output_moment(self.output_rows(g, kept, examples), sharing, wide)


@entry(F.embedding)
def embedding(
    call: Inspection,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    table = call.region(weight)
    if table is None:
        return None
    if max_norm is not None or scale_grad_by_freq:
        raise CaptureError(
            "embedding with max_norm (which changes the table) or scale_grad_by_freq (by which the gradient of an "
            "example depends on the others) is not understood: leave them out"
        )
    vocabulary = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % vocabulary
    last = call.output.ndim - 1
    extra = last - input.ndim
    index = Axes(
        None if call.batch < extra else call.batch - extra,
        (),
        tuple(i for i in range(input.ndim) if i + extra != call.batch),
        (),
    )
    return Use(Embedding(table.permute(1, 0), call.axes((last,)), index, padding), "input")
