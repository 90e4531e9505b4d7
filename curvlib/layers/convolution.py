"""Convolutions in one, two and three dimensions: rows are the patches under the kernel, positions are pixels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.layers.base import Axes, KroneckerLayer, Layer, input_moment, output_moment
from curvlib.layers.contraction import bias_shift
from curvlib.layers.rows import DenseRows, Rows
from curvlib.layers.table import Inspection, Use, entry
from curvlib.layers.wide import CompressedMoment, Wide
from curvlib.linalg.patch_gram import patch_gram, patches
from curvlib.operators.layout import Region


@dataclasses.dataclass(frozen=True)
class Convolution(KroneckerLayer):
    """z = conv(x, W) + b, with one block a group: W is [(groups,) C_out / groups, C_in / groups * kernel].

    ``padding`` holds (before, after) for each spatial axis; the input has its examples first.
    """

    weight: Region
    bias: Region | None
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def output_axes(self) -> Axes:
        """Roles of the axes of z [N, C_out, *spatial] (with C_out split into groups, where there are any)."""
        spatial = len(self.kernel)
        if self.groups == 1:
            return Axes(0, (), tuple(range(2, 2 + spatial)), (1,))
        return Axes(0, (1,), tuple(range(3, 3 + spatial)), (2,))

    def split(self) -> tuple[KroneckerLayer, Layer]:
        assert self.bias is not None
        positions = tuple(range(2, 2 + len(self.kernel)))
        return dataclasses.replace(self, bias=None), bias_shift(self.bias, Axes(0, (), positions, (1,)))

    def rows(self, x: Tensor, examples: int) -> Rows:
        return DenseRows.of(self.input_rows(x, examples), augmented=self.bias is not None)

    def keep(self, x: Tensor, examples: int) -> Tensor | None:
        return None

    def padded(self, x: Tensor) -> Tensor:
        """The input with its zero padding made explicit."""
        widths = [width for pair in reversed(self.padding) for width in pair]
        return torch.nn.functional.pad(x, widths) if any(widths) else x

    def lengths(self, sizes: Sequence[int]) -> list[int]:
        """The spatial sizes of the output for a padded input of these spatial sizes."""
        along = zip(sizes, self.kernel, self.stride, self.dilation, strict=True)
        return [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in along]

    def patches(self, x: Tensor) -> Tensor:
        """The patches as a strided view [images, groups, C_in / groups, *positions, *kernel]."""
        return patches(self.padded(x), self.kernel, self.stride, self.dilation).unflatten(1, (self.groups, -1))

    def input_rows(self, x: Tensor, examples: int) -> Tensor:
        """The rows a [N, (groups,) positions, C_in / groups * kernel]."""
        spatial = len(self.kernel)
        positions = tuple(range(3, 3 + spatial))
        kernel = tuple(range(3 + spatial, 3 + 2 * spatial))
        groups, features = ((1,), (2, *kernel)) if self.groups > 1 else ((), (1, 2, *kernel))
        return Axes(0, groups, positions, features).rows(self.patches(x), examples)

    def input_means(self, x: Tensor, examples: int) -> Tensor:
        """The mean patch of each image [N, (groups,) images, C_in / groups * kernel]."""
        means = self.patches(x).mean(tuple(range(3, 3 + len(self.kernel)))).flatten(2)  # [images, groups, d_in]
        rows = means.unflatten(0, (examples, -1)).transpose(1, 2)
        return rows if self.groups > 1 else rows.squeeze(1)

    def input_factor(
        self, x: Tensor, examples: int, sharing: str, mask: Tensor | None, wide: Wide
    ) -> tuple[Tensor | CompressedMoment, Tensor]:
        augmented = self.bias is not None
        images = None if mask is None else mask.reshape(examples, -1).any(1)
        sizes = [size + sum(pair) for size, pair in zip(x.shape[2:], self.padding, strict=True)]
        positions = math.prod(self.lengths(sizes)) * x.shape[0] // examples
        pixelwise = mask is not None and mask.numel() == examples * positions
        if sharing == "reduce" and not pixelwise:
            return input_moment(self.input_means(x, examples), sharing, images, wide, augmented=augmented)
        symmetric = all(before == after for before, after in self.padding)
        if pixelwise or self.groups > 1 or not symmetric or self.weight.shape[-1] + augmented > wide.above:
            return input_moment(self.input_rows(x, examples), sharing, mask, wide, augmented=augmented)
        padding = [before for before, _ in self.padding]
        counted = None if images is None else images.repeat_interleave(x.shape[0] // examples)
        return patch_gram(x, self.kernel, self.stride, padding, self.dilation, counted=counted, augmented=augmented)

    def output_rows(self, g: Tensor, kept: Tensor | None, examples: int) -> Tensor:
        if self.groups > 1:
            g = g.unflatten(2, (self.groups, -1))
        return self.output_axes.rows(g, examples, leading=1)

    def output_factor(
        self, g: Tensor, kept: Tensor | None, examples: int, sharing: str, wide: Wide
    ) -> Tensor | CompressedMoment:
        positions, width = math.prod(g.shape[3:]), g.shape[2] // self.groups
        if sharing == "reduce" or width > wide.above or positions < width:
            return output_moment(self.output_rows(g, kept, examples), sharing, wide)
        images = g.reshape(-1, self.groups, width, positions)  # pixels stay where they are
        factor = (images @ images.mT).sum(0)
        return factor if self.groups > 1 else factor.squeeze(0)


@entry(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    call: Inspection,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Use | None:
    kernel = tuple(weight.shape[2:])
    region, shift = call.region(weight), call.region(bias)
    if region is None and shift is None:
        return None
    if input.ndim != weight.ndim or call.batch != 0:
        raise CaptureError(
            "a convolution needs an input [N, C, *spatial] whose first axis counts the examples: transpose it before "
            "the call"
        )
    if region is None:
        assert shift is not None
        return Use(bias_shift(shift, call.axes((1,))))
    spatial = len(kernel)

    def each(value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * spatial if len(values) == 1 else values

    steps, spacing = each(stride), each(dilation)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, spacing, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in each(0 if isinstance(padding, str) else padding))
    front = (groups,) if groups > 1 else ()
    d_out, d_in = weight.shape[0] // groups, math.prod(weight.shape[1:])
    return Use(
        Convolution(
            weight=region.reshape(*front, d_out, d_in),
            bias=None if shift is None else shift.reshape(*front, d_out, 1),
            kernel=kernel,
            stride=steps,
            padding=pads,
            dilation=spacing,
            groups=groups,
        ),
        "input",
    )
