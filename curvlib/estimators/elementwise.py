"""Blocks of scales, shifts and lone biases: second moments of per-example gradients, which are exact."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from curvlib.capture.engines import Pullback
from curvlib.capture.plan import Block, Placement
from curvlib.estimators.statistics import Collector, Options, Pass, Statistics
from curvlib.layers.base import Layer, second_moment
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.wide import as_side
from curvlib.linalg.gram import full_precision
from curvlib.operators import Operator


class ElementwiseCollector(Collector):
    """Sums of squares of per-example gradients, or of their outer products."""

    def __init__(self, now: Pass) -> None:
        self.now = now
        self.gradients: dict[Placement, list[dict[int, Tensor]]] = {}
        self.moments: dict[str, Any] = {}
        self.block_of = {placement: block for block in now.plan.blocks for placement in block.placements}

    def record(self, placement: Placement, layer: Layer, operand: Tensor | None, z: Tensor) -> Any:
        assert isinstance(layer, Elementwise)
        x = None if operand is None or layer.scale is None else full_precision(operand)
        if self.now.options.fisher == "forward-only":
            return layer.forward_only(x, z, self.now.examples)
        return None if x is None else x.clone()  # the model may change its own in place

    def consume(self, placement: Placement, layer: Layer, kept: Any, g: Tensor) -> None:
        assert isinstance(layer, Elementwise)
        gradients = layer.gradients(kept, g, self.now.examples)
        block = self.block_of[placement]
        if len(block.placements) == 1:
            self.add(block, gradients)
        else:
            self.gradients.setdefault(placement, []).append(gradients)

    def add(self, block: Block, gradients: dict[int, Tensor]) -> None:
        """Adds the second moment of per-example gradients {leaf: [K, N, *leaf.shape]}."""
        like = next(iter(gradients.values()))
        front, shapes = like.shape[:2], self.now.plan.domain.shapes
        leaves = {piece.leaf: like.new_zeros(*front, *shapes[piece.leaf]) for piece in block.layout.pieces}
        rows = block.layout.gather({**leaves, **gradients}).flatten(0, 1)
        if self.now.options.elementwise == "dense":
            moment = second_moment(rows, None, self.now.options.wide, augmented=False)
        else:
            moment = rows.square().sum(0)
        previous = self.moments.get(block.name)
        self.moments[block.name] = moment if previous is None else previous + moment

    def sums(self, block: Block, run: Pullback) -> Any:
        if self.now.options.fisher == "forward-only":
            return self.forward_only(block, run)
        stacks = [self.gradients[p] for p in block.placements if p in self.gradients]
        for parts in zip(*stacks, strict=True):  # the uses of one leaf add up before they are squared
            leaves: dict[int, Tensor] = {}
            for part in parts:
                for leaf, gradient in part.items():
                    leaves[leaf] = leaves[leaf] + gradient if leaf in leaves else gradient
            self.add(block, leaves)
        if block.name in self.moments:
            return self.moments[block.name]
        like, width = run.outputs.new_empty((), dtype=self.now.dtype), block.layout.numel
        dense = self.now.options.elementwise == "dense"
        return self.now.options.wide.zero((), width, like) if dense else like.new_zeros(width)

    def forward_only(self, block: Block, run: Pullback) -> Tensor:
        """The sums with G = I: over examples, of means over positions."""
        leaves: dict[int, Tensor] = {}
        for placement in block.placements:
            site = self.now.plan.sites[placement.site]
            layer = site.layers[placement.layer]
            assert isinstance(layer, Elementwise)
            positions = layer.positions(site.output_shape(self.now.examples), self.now.examples)
            for leaf, total in run.kept[placement.site][placement.layer].items():
                leaves[leaf] = leaves[leaf] + total / positions if leaf in leaves else total / positions
        return block.layout.gather(leaves)


@dataclasses.dataclass(frozen=True)
class LayerwiseOptions(Options):
    """Of estimators that measure the blocks of weights in their own way, and elementwise ones as they are here."""

    @abstractmethod
    def collector(self, now: Pass) -> Collector | None:
        """The collector of the blocks of weights; None leaves them out."""

    @abstractmethod
    def product(self, block: Block, sums: Any, statistics: Statistics, *, reuse: bool) -> Operator:
        """The block of a weight."""

    def collectors(self, now: Pass) -> tuple[Collector | None, Collector | None]:
        return self.collector(now), ElementwiseCollector(now)

    def block(self, block: Block, statistics: Statistics, *, reuse: bool) -> Operator:
        sums = statistics.sums[block.name]
        if block.kronecker:
            return self.product(block, sums, statistics, reuse=reuse)
        count = statistics.divisor()
        return as_side(sums / (count * statistics.examples if self.fisher == "forward-only" else count), 0)


@dataclasses.dataclass(frozen=True)
class ElementwiseOptions(LayerwiseOptions):
    """Of estimators that make the blocks of weights of something else than sums, and hand them to `assemble`."""

    estimator: ClassVar[str] = "elementwise blocks"

    def collector(self, now: Pass) -> None:
        return None

    def product(self, block: Block, sums: Any, statistics: Statistics, *, reuse: bool) -> Operator:
        raise NotImplementedError(block.name)
