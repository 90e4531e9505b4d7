"""Kronecker factors: sums of a a^T and g g^T for each use of a weight, and the blocks made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.capture.engines import Pullback
from curvlib.capture.plan import Block, Placement
from curvlib.errors import ArgumentError
from curvlib.estimators.statistics import Collector, Pass, Statistics
from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.rows import summed
from curvlib.layers.wide import CompressedMoment, as_side
from curvlib.linalg.gram import full_precision, writes_in_place
from curvlib.linalg.low_rank import LowRankFactor, low_rank_sum
from curvlib.operators import (
    Dense,
    DenseBlocks,
    Diagonal,
    Kronecker,
    LowRank,
    Matrix,
    Operator,
    ScaledIdentity,
    Sum,
)
from curvlib.operators.block_side import diagonal_blocks
from curvlib.pytree import register


@register
class FactorSums:
    """One use of a weight: sum of a a^T, the number of rows in it, and sum of g g^T (None: forward-only)."""

    inputs: Tensor | CompressedMoment
    rows: Tensor
    outputs: Tensor | CompressedMoment | None

    def __add__(self, other: FactorSums) -> FactorSums:
        outputs = None if self.outputs is None else summed([self.outputs, other.outputs])
        return FactorSums(summed([self.inputs, other.inputs]), self.rows + other.rows, outputs)

    def __mul__(self, weight: float | Tensor) -> FactorSums:
        outputs = None if self.outputs is None else self.outputs * weight
        return FactorSums(self.inputs * weight, self.rows * weight, outputs)


@register
class UseSums:
    """The sums of all uses of one weight."""

    uses: tuple[FactorSums, ...]

    def __add__(self, other: UseSums) -> UseSums:
        return UseSums(tuple(a + b for a, b in zip(self.uses, other.uses, strict=True)))

    def __mul__(self, weight: float | Tensor) -> UseSums:
        return UseSums(tuple(use * weight for use in self.uses))


class FactorCollector(Collector):
    """Forms input factors in the forward pass, and output factors as gradients arrive."""

    needs_examples = False

    def __init__(self, now: Pass) -> None:
        self.now = now
        self.outputs: dict[Placement, Any] = {}

    def record(self, placement: Placement, layer: Layer, operand: Tensor | None, z: Tensor) -> Any:
        assert isinstance(layer, KroneckerLayer)
        assert operand is not None
        options, examples = self.now.options, self.now.examples
        full = full_precision(operand)
        factor, rows = layer.input_factor(full, examples, options.sharing, self.now.mask, options.wide)
        return factor, rows, layer.keep(operand, examples)

    def consume(self, placement: Placement, layer: Layer, kept: Any, g: Tensor) -> None:
        assert isinstance(layer, KroneckerLayer)
        options = self.now.options
        factor = layer.output_factor(g, kept[2], self.now.examples, options.sharing, options.wide)
        previous = self.outputs.get(placement)
        self.outputs[placement] = factor if previous is None else previous + factor

    def sums(self, block: Block, run: Pullback) -> UseSums:
        return self.of(block, run, [run.kept[p.site][p.layer] for p in block.placements])

    def of(self, block: Block, run: Pullback, kept: Sequence[Any]) -> UseSums:
        """The sums of all uses of a weight, from what was kept at each."""
        return UseSums(tuple(self.use(p, run, k) for p, k in zip(block.placements, kept, strict=True)))

    def use(self, placement: Placement, run: Pullback, kept: Any) -> FactorSums:
        """The sums of one use of a weight."""
        inputs, rows = kept[0].to(self.now.dtype), kept[1].to(self.now.dtype)
        if self.now.options.fisher == "forward-only":
            return FactorSums(inputs, rows, None)
        outputs = self.outputs.get(placement)
        if outputs is None:  # the layer's output does not reach the model's
            layer = self.now.plan.sites[placement.site].layers[placement.layer]
            assert isinstance(layer, KroneckerLayer)
            *groups, width, _ = layer.weight.shape
            outputs = self.now.options.wide.zero(tuple(groups), width, run.outputs.new_zeros((), dtype=self.now.dtype))
        return FactorSums(inputs, rows, outputs)


def kronecker_block(block: Block, sums: UseSums, statistics: Statistics, *, reuse: bool) -> Operator:
    """G (x) A for the curvature of the reduced objective, summed over the uses of the weight."""
    uses = routed_together(block, sums.uses)
    one_orientation = not any(placement.transposed for placement in block.placements)
    merge = statistics.options.tied == "merge"
    if merge and one_orientation:
        uses = {block.placements[0]: summed(list(uses.values()))}
    groups = len(block.layout.shape) - 2
    terms: list[Kronecker] = []
    for placement, use in uses.items():
        rows = torch.where(use.rows > 0, use.rows, torch.ones_like(use.rows))
        inputs = as_side(divide(use.inputs, rows, reuse=reuse), groups)
        outputs = output_side(block, placement, use, statistics.divisor(), reuse=reuse)
        terms.append(Kronecker(inputs, outputs) if placement.transposed else Kronecker(outputs, inputs))
    if len(terms) > 1 and merge:
        return merged(terms)
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def routed_together(block: Block, uses: Sequence[FactorSums]) -> dict[Placement, FactorSums]:
    """The sums of each use, where all rows that are routed to a weight by values belong together.

    Which call they come with is a matter of how the model is written, and may differ from batch to batch.
    """
    together: dict[Placement, FactorSums] = {}
    routed: dict[bool, Placement] = {}
    for placement, use in zip(block.placements, uses, strict=True):
        first = routed.setdefault(placement.transposed, placement) if placement.chosen else placement
        together[first] = together[first] + use if first in together else use
    return together


def merged(terms: Sequence[Kronecker]) -> Kronecker:
    """One product L (x) R / t with the partial traces L = sum_i L_i tr R_i, R = sum_i R_i tr L_i and trace t of a sum.

    It is the sum itself where the terms have a side in common, up to a factor.
    """
    lefts, rights = [term.left.traces() for term in terms], [term.right.traces() for term in terms]
    total = summed([left * right for left, right in zip(lefts, rights, strict=True)])
    share = torch.where(total > 0, 1 / total, torch.ones_like(total))
    left = added([times(term.left, trace) for term, trace in zip(terms, rights, strict=True)])
    right = added([times(term.right, trace * share) for term, trace in zip(terms, lefts, strict=True)])
    return Kronecker(left, right)


def times(side: Matrix, factor: Tensor) -> Matrix:
    """A side, or its diagonal if that is all there is to it, times one number a group."""
    if isinstance(side, (Diagonal, ScaledIdentity)):
        return Diagonal(side.diag() * factor.unsqueeze(-1))
    if isinstance(side, DenseBlocks):
        return side.map_stacks(lambda stack: stack * factor[..., None, None, None])
    if isinstance(side, LowRank):
        return LowRank(side.vectors, side.values * factor.unsqueeze(-1), side.remainder * factor)
    return Dense(side.matrices() * factor[..., None, None])


def added(sides: Sequence[Matrix]) -> Matrix:
    """The sum of sides of Kronecker products, in the form that both have; a diagonal one fits into blocks.

    Raises:
        ArgumentError: a low-rank side meets one of another form.
    """
    if all(isinstance(side, (Diagonal, ScaledIdentity)) for side in sides):
        return Diagonal(summed([side.diag() for side in sides]))
    blocks = next((side for side in sides if isinstance(side, DenseBlocks)), None)
    if blocks is not None:
        stacks = zip(*(diagonal_blocks(side, blocks.runs) for side in sides), strict=True)
        return DenseBlocks(tuple(summed(list(parts)) for parts in stacks))
    low_rank = [side for side in sides if isinstance(side, LowRank)]
    if low_rank and len(low_rank) == len(sides):
        parts = [LowRankFactor(side.vectors, side.values, side.remainder) for side in low_rank]
        return LowRank(*low_rank_sum(parts, [1.0] * len(parts), low_rank[0].values.shape[-1]))
    if low_rank:
        raise ArgumentError(
            "a weight whose uses have a low-rank factor and a diagonal one on the same wide side has no factor for "
            "both: take wide=WideBlocks(...) or WideDiagonal(), or tied='sum' in cv.kfac"
        )
    return Dense(summed([side.matrices() for side in sides]))


def divide(moment: Tensor | CompressedMoment, count: Tensor, *, reuse: bool) -> Tensor | CompressedMoment:
    """Sums over the data to means; if the sums are not needed any more, in their memory where possible."""
    if reuse and isinstance(moment, Tensor) and writes_in_place(moment) and moment.is_floating_point():
        return moment.div_(count)
    return moment / count


def output_side(block: Block, placement: Placement, use: FactorSums, divisor: Tensor, *, reuse: bool) -> Matrix:
    """G: the normalized second moment of the output gradients, or the identity for forward-only."""
    *groups, rows, columns = block.layout.shape
    if use.outputs is not None:
        return as_side(divide(use.outputs, divisor, reuse=reuse), len(groups))
    return ScaledIdentity(1 / divisor, (columns if placement.transposed else rows,))
