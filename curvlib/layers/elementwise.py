"""Elementwise scale and shift, y = w * x + b with broadcasting: norm layers, positional embeddings, lone biases.

The gradient of one example is formed and squared (or its outer product taken): no approximation is made.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from curvlib.layers.base import Axes, Layer
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
        """Mean over positions of (dy/dw)^2, example by example: {leaf number: [1, N, *leaf.shape]}."""
        rows = self.axes.rows(torch.ones_like(z), examples)  # [N, T, d]
        result: dict[int, Tensor] = {}
        if self.scale is not None:
            assert x is not None
            inputs = self.axes.rows(x.expand(z.shape), examples)
            result[self.scale.leaf] = self.scale.scatter(inputs.square().mean(1).unsqueeze(0))
        if self.shift is not None:
            ones = self.shift.scatter(rows.mean(1).unsqueeze(0))
            leaf = self.shift.leaf
            result[leaf] = result[leaf] + ones if leaf in result else ones
        return result
