"""Dense layers: any product of an input with one weight, brought into the form z[.., o] = sum_i W[o, i] x[.., i].

`F.linear`, `matmul`, `addmm` and `einsum` differ only in which axes are summed, kept or shared; labels of axes,
as in einsum, say all of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.layers.base import VARIES, Axes, Entries, KroneckerLayer, Layer, input_moment, output_moment
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.loose_rows import LooseRows
from curvlib.layers.rows import DenseRows, Rows
from curvlib.layers.wide import CompressedMoment, Wide
from curvlib.operators.layout import Region


@dataclasses.dataclass(frozen=True)
class Contraction(KroneckerLayer):
    """A weight that is contracted with the input; axes of W, x and z that all three share make groups."""

    weight: Region
    bias: Region | None
    input_axes: Axes
    output_axes: Axes
    summed: tuple[int, ...] = ()

    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """The rows a [N, (groups,) T, d_in]."""
        if self.summed:
            x = x.sum(self.summed, keepdim=True)
        axes = dataclasses.replace(self.input_axes, positions=self.input_axes.positions + self.summed)
        return axes.rows(x, examples)

    def input_factor(
        self, x: Tensor, examples: int, sharing: str, mask: Tensor | None, wide: Wide
    ) -> tuple[Tensor | CompressedMoment, Tensor]:
        rows = self.input_rows(x, examples)
        return input_moment(rows, sharing, mask, wide, augmented=self.bias is not None)

    def rows(self, x: Tensor, examples: int) -> Rows:
        rows = DenseRows.of(self.input_rows(x, examples), augmented=self.bias is not None)
        return LooseRows(rows) if self.input_axes.entries is Entries.LOOSE else rows

    def keep(self, x: Tensor, examples: int) -> Tensor | None:
        return None

    def output_rows(self, g: Tensor, kept: Tensor | None, examples: int) -> Tensor:
        return self.output_axes.rows(g, examples, leading=1)

    def output_factor(
        self, g: Tensor, kept: Tensor | None, examples: int, sharing: str, wide: Wide
    ) -> Tensor | CompressedMoment:
        return output_moment(self.output_rows(g, kept, examples), sharing, wide)

    def split(self) -> tuple[KroneckerLayer, Layer]:
        assert self.bias is not None
        return dataclasses.replace(self, bias=None), bias_shift(self.bias, self.output_axes)


def bias_shift(bias: Region, axes: Axes) -> Elementwise:
    """The use of a bias [*groups, d_out, 1] on its own: one shift an output feature."""
    features = (*axes.groups, *axes.features)
    return Elementwise(Axes(axes.batch, (), axes.positions, features), None, bias.reshape(bias.numel))


def contract(
    weight: Region,
    bias: Region | None,
    input_labels: Sequence[Hashable],
    weight_labels: Sequence[Hashable],
    output_labels: Sequence[Hashable],
    batch: Hashable,
) -> Contraction:
    """The contraction that these labels of axes describe; the output's axis ``batch`` counts the examples.

    Axes of W are *groups* where x and z have them too, *outputs* where only z has, *inputs* where only x has.
    Axes of x and z that W lacks are positions; axes of x alone are summed beforehand.

    Raises:
        CaptureError: an axis repeats, the weight has an axis that is summed alone or that counts the examples.
    """
    x, z = list(input_labels), list(output_labels)
    if any(len(set(labels)) != len(labels) for labels in (x, z, weight_labels)):
        raise CaptureError(
            "an operand with a repeated axis (a diagonal) is not understood: take the diagonal before the call"
        )
    sizes = {label: n for label, n in zip(weight_labels, weight.shape, strict=True) if n > 1}
    w = list(sizes)
    if any(label not in x and label not in z for label in w):
        raise CaptureError("the parameter is summed along an axis of its own: sum it outside of model_fn")
    if batch in w:
        raise CaptureError(VARIES)
    groups = [label for label in w if label in x and label in z]
    outputs = [label for label in w if label in z and label not in x]
    inputs = [label for label in w if label in x and label not in z]
    positions = [label for label in z if label not in w and label != batch]
    front = (math.prod(sizes[label] for label in groups),) if groups else ()
    d_out, d_in = (math.prod(sizes[label] for label in labels) for labels in (outputs, inputs))
    if bias is not None and bias.numel != math.prod(front) * d_out:
        raise CaptureError(
            f"the bias has {bias.numel} elements where the layer has {math.prod(front) * d_out} outputs: add it in a "
            "call of its own"
        )

    order = [list(weight_labels).index(label) for label in (*groups, *outputs, *inputs)]
    order += [axis for axis in range(len(weight.shape)) if axis not in order]

    def axes(labels: list[Hashable], features: list[Hashable]) -> Axes:
        def at(wanted: list[Hashable]) -> tuple[int, ...]:
            return tuple(labels.index(label) for label in wanted if label in labels)

        return Axes(labels.index(batch) if batch in labels else None, at(groups), at(positions), at(features))

    return Contraction(
        weight=weight.permute(*order).reshape(*front, d_out, d_in),
        bias=None if bias is None else bias.reshape(*front, d_out, 1),
        input_axes=axes(x, inputs),
        output_axes=axes(z, outputs),
        summed=tuple(i for i, label in enumerate(x) if label not in w and label not in z),
    )
