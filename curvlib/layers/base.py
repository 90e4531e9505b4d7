"""What a layer is to curvature: one use of parameters by one call, as a static, hashable description."""

from __future__ import annotations

import dataclasses
import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvlib.layers.rows import Rows, groups_first, mean_row
from curvlib.layers.wide import CompressedMoment, Wide
from curvlib.linalg.gram import augmented_gram, full_precision, gram
from curvlib.operators.layout import Layout, Region

Arguments = Mapping[str, Any]

VARIES = (
    "the parameter varies along the axis that counts examples, so that each example trains another part of it: index a "
    "table by the inputs (an embedding), or close over it in model_fn"
)


class Entries(enum.Enum):
    """What the entries of an axis are that counts rows.

    EXAMPLES: examples, each with as many entries as any other. CHOSEN: examples chosen by values, each at most once.
    LOOSE: rows chosen by values, of which an unknown number belong to one example.
    """

    EXAMPLES = "examples"
    CHOSEN = "chosen"
    LOOSE = "loose"


@dataclasses.dataclass(frozen=True)
class Axes:
    """The roles of a tensor's axes: which one counts examples, and which are groups, positions, features.

    ``batch`` is None for a tensor without examples (a table of positions): its rows are the same for each one.
    A batch axis of N*k entries is example-major: k joins the positions. If its ``entries`` are chosen by values, each
    is an example of its own, whatever the number of examples.
    """

    batch: int | None
    groups: tuple[int, ...]
    positions: tuple[int, ...]
    features: tuple[int, ...]
    entries: Entries = Entries.EXAMPLES

    def rows(self, tensor: Tensor, examples: int, leading: int = 0) -> Tensor:
        """[*lead, *axes] -> [*lead, N, (groups,) positions, features]."""
        front = tensor.shape[:leading]
        if self.batch is None:
            tensor = tensor.unsqueeze(leading).expand(*front, examples, *tensor.shape[leading:])
            batch, shift = 0, 1
        elif self.entries is not Entries.EXAMPLES:
            examples = tensor.shape[leading + self.batch]
            tensor = tensor.unsqueeze(leading + self.batch + 1)
            batch, shift = self.batch, self.batch
        else:
            tensor = tensor.unflatten(leading + self.batch, (examples, -1))
            batch, shift = self.batch, self.batch

        def at(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(leading + axis + (axis >= shift or self.batch is None) for axis in axes)

        extra = () if self.batch is None else (leading + self.batch + 1,)
        kinds = (at(self.groups), (*extra, *at(self.positions)), at(self.features))
        sizes = [math.prod(tensor.shape[axis] for axis in axes) for axes in kinds]
        tensor = tensor.permute(*range(leading), leading + batch, *kinds[0], *kinds[1], *kinds[2])
        return tensor.reshape(*front, examples, *sizes[0 if self.groups else 1 :])


class Layer(ABC):
    """One use of parameters by one call. Concrete layers are frozen dataclasses."""

    @property
    @abstractmethod
    def regions(self) -> tuple[Region, ...]:
        """The parameters' elements that this use accounts for."""


class KroneckerLayer(Layer):
    """z = W a + b at each position: a block G (x) A for [W, b], the bias being the last column.

    W is [*groups, d_out, d_in]; rows are [N, (groups,) T, d]. With T positions an example, ``sharing`` says what
    counts as one row (Eschenhagen et al. 2023, arXiv 2311.00636): ``expand`` takes every position, ``reduce`` one
    row an example, the mean of its inputs and the sum of its output gradients.
    """

    weight: Region
    bias: Region | None

    @property
    def regions(self) -> tuple[Region, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def layout(self) -> Layout:
        """The block's matrix [*groups, d_out, d_in (+ 1)]."""
        return Layout(self.regions)

    @abstractmethod
    def split(self) -> tuple[KroneckerLayer, Layer]:
        """The same use with weight and bias accounted for apart."""

    @abstractmethod
    def input_factor(
        self, x: Tensor, examples: int, sharing: str, mask: Tensor | None, wide: Wide
    ) -> tuple[Tensor | CompressedMoment, Tensor]:
        """Sum of a a^T over the rows that count, and their number.

        Args:
            x: the call's data operand.
            examples: N.
            sharing: "expand" or "reduce".
            mask: [N] or [N, T'] of booleans: which examples or positions count; None: all of them.
            wide: what is kept of a side that is too wide.

        Returns:
            [*groups, d, d], [*groups, d] for a diagonal factor, or another moment; and a 0-d tensor.
        """

    @abstractmethod
    def rows(self, x: Tensor, examples: int) -> Rows:
        """The rows a, with a one appended to each if there is a bias."""

    @abstractmethod
    def keep(self, x: Tensor, examples: int) -> Tensor | None:
        """What `output_rows` must know of the input."""

    @abstractmethod
    def output_rows(self, g: Tensor, kept: Tensor | None, examples: int) -> Tensor:
        """Gradients [K, *z.shape] -> rows g [K, N, (groups,) T, d_out]."""

    @abstractmethod
    def output_factor(
        self, g: Tensor, kept: Tensor | None, examples: int, sharing: str, wide: Wide
    ) -> Tensor | CompressedMoment:
        """Sum of g g^T over K vectors, N examples and (expand) T positions: [*groups, d_out, d_out] or diagonal."""


def positions_that_count(mask: Tensor | None, examples: int, positions: int) -> Tensor | None:
    """The mask [N, T] of a site with T positions.

    A mask over as many positions applies position by position; any other applies to examples: one with no
    position that counts is left out whole.
    """
    if mask is None:
        return None
    mask = mask.reshape(examples, -1)
    if mask.shape[1] != positions:
        mask = mask.any(1, keepdim=True).expand(examples, positions)
    return mask


def second_moment(rows: Tensor, weights: Tensor | None, wide: Wide, *, augmented: bool) -> Tensor | CompressedMoment:
    """Sum of a a^T over rows [*groups, n, d], a = [row; 1] if augmented, with weights 0 or 1."""
    if rows.shape[-2] == 0:
        return wide.zero(tuple(rows.shape[:-2]), rows.shape[-1] + augmented, full_precision(rows))
    if rows.shape[-1] + augmented <= wide.above:
        return augmented_gram(rows, weights=weights) if augmented else gram(rows, weights=weights)
    rows = full_precision(rows)
    rows = torch.nn.functional.pad(rows, (0, 1), value=1.0) if augmented else rows
    return wide.moment(rows if weights is None else rows * weights.unsqueeze(-1))


def output_moment(rows: Tensor, sharing: str, wide: Wide) -> Tensor | CompressedMoment:
    """`KroneckerLayer.output_factor` from rows g [K, N, (groups,) T, d]."""
    if sharing == "reduce":
        rows = rows.sum(-2, keepdim=True)
    return second_moment(groups_first(rows, 2), None, wide, augmented=False)


def input_moment(
    rows: Tensor, sharing: str, mask: Tensor | None, wide: Wide, *, augmented: bool
) -> tuple[Tensor | CompressedMoment, Tensor]:
    """`KroneckerLayer.input_factor` from rows a [N, (groups,) T, d]."""
    examples, positions = rows.shape[0], rows.shape[-2]
    counted = positions_that_count(mask, examples, positions)
    if sharing == "reduce":
        rows, positions = mean_row(rows, counted), 1
        counted = None if counted is None else counted.any(1, keepdim=True)
    weights = None
    count = torch.full((), examples * positions, device=rows.device)
    if counted is not None:
        count = counted.sum()
        weights = counted.reshape(-1).to(rows.dtype)
        if rows.ndim == 4:
            weights = weights.expand(rows.shape[1], -1)
    return second_moment(groups_first(rows, 1), weights, wide, augmented=augmented), count
