"""Elementwise scale and shift, y = w * x + b with broadcasting: norm layers, positional embeddings, lone biases.

The gradient of one example is formed and squared (or its outer product taken): no approximation is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.layers.base import Axes, Layer
from curvlib.linalg.gram import full_precision
from curvlib.operators.layout import Region


@dataclasses.dataclass(frozen=True)
class Elementwise(Layer):
    """y = w * x + sign * b, where ``axes.features`` are the axes of y along which w and b vary.

    Regions are flattened in the order of those axes. The gradients of example n are
    sum_t g_nt * x_nt for w and sign * sum_t g_nt for b.
    """

    axes: Axes
    scale: Region | None
    shift: Region | None
    sign: int = 1

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(region for region in (self.scale, self.shift) if region is not None)

    def gradients(self, x: Tensor | None, g: Tensor, examples: int) -> dict[int, Tensor]:
        """Per-example gradients of the leaves used: {leaf number: [K, N, *leaf.shape]}.

        Args:
            x: what w multiplies, broadcastable to y; None when there is no scale.
            g: [K, *y.shape].
            examples: N.
        """
        result: dict[int, Tensor] = {}

        def collect(region: Region, values: Tensor) -> None:
            leaf = region.scatter(values)
            result[region.leaf] = result[region.leaf] + leaf if region.leaf in result else leaf

        rows = self.axes.rows(g, examples, leading=1)  # [K, N, T, d]
        if self.scale is not None:
            assert x is not None
            inputs = self.axes.rows(x.expand(g.shape[1:]), examples).to(rows.dtype)  # [N, T, d]
            collect(self.scale, torch.einsum("kntd,ntd->knd", rows, inputs))
        if self.shift is not None:
            collect(self.shift, self.sign * rows.sum(2))
        return result

    def forward_only(self, x: Tensor | None, z: Tensor, examples: int) -> dict[int, Tensor]:
        """Sums of (dy/dw)^2 over all N T rows: {leaf number: [*leaf.shape]}."""
        sums: dict[int, Tensor] = {}

        def collect(region: Region, derivative: Tensor) -> None:
            leaf = region.scatter(self.axes.rows(derivative, examples).square().sum((0, 1)))
            sums[region.leaf] = sums[region.leaf] + leaf if region.leaf in sums else leaf

        if self.scale is not None:
            assert x is not None
            collect(self.scale, x.expand(z.shape))
        if self.shift is not None:
            collect(self.shift, torch.ones_like(z, dtype=full_precision(z).dtype))
        return sums

    def positions(self, shape: Sequence[int], examples: int) -> float:
        """T, the rows an example of an output of this shape."""
        return math.prod(n for axis, n in enumerate(shape) if axis not in self.axes.features) / examples
