"""Second moments of per-example gradients D_n = sum_t g_nt a_nt^T, which need a and g of a layer together."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from curvlib.capture.engines import Pullback
from curvlib.capture.plan import Block, Placement
from curvlib.estimators.factors import FactorCollector, UseSums
from curvlib.estimators.statistics import Collector, Pass
from curvlib.gradients.uses import WeightUse, in_chunks
from curvlib.layers.base import KroneckerLayer, Layer, positions_that_count, second_moment
from curvlib.layers.rows import DenseRows, Rows, groups_first, sum_of_squares, summed
from curvlib.layers.wide import CompressedMoment, Wide, nonnegative
from curvlib.linalg.gram import gram
from curvlib.linalg.row_space import row_space
from curvlib.operators import LowRank, LowRankBasis
from curvlib.operators.bases import Basis
from curvlib.pytree import register

SMALLEST_SPANNED = 256  # factors of narrower sides are formed, and decomposed whole

Bases = tuple[Basis, Basis]


class Moment(ABC):
    """A second moment of per-example gradients; a tuple of what is added over examples and vectors."""

    @abstractmethod
    def of(self, block: Block, uses: Sequence[WeightUse]) -> tuple[Any, ...]:
        """The moment of a block, from all uses of its weight in one stack of vectors."""

    @abstractmethod
    def zero(self, block: Block, like: Tensor) -> tuple[Any, ...]:
        """The moment of a block that does not reach the outputs."""


@register
class Totals:
    """Moments that are added one by one."""

    tensors: tuple[Any, ...]

    def __add__(self, other: Totals) -> Totals:
        return Totals(tuple(starmap(plus, zip(self.tensors, other.tensors, strict=True))))

    def __mul__(self, weight: float | Tensor) -> Totals:
        return Totals(tuple(x * weight for x in self.tensors))


def plus(a: Any, b: Any) -> Any:
    """The sum of two moments, of which one may be the diagonal [d] of a matrix [d, d] that is diagonal."""
    if isinstance(a, Tensor) and a.ndim != b.ndim:
        return torch.diag_embed(a) + b if a.ndim < b.ndim else a + torch.diag_embed(b)
    return a + b


class MomentCollector(Collector):
    """Keeps the rows of every layer, and forms a moment as soon as all uses of a weight have their gradients.

    A tied weight's uses in one stack of vectors wait for each other: until the next stack, or the end, comes.
    """

    def __init__(self, now: Pass, moment: Moment) -> None:
        self.now, self.moment = now, moment
        self.totals: dict[str, Totals] = {}
        self.waiting: dict[str, dict[Placement, WeightUse]] = {}
        self.block_of = {placement: block for block in now.plan.blocks for placement in block.placements}

    def record(self, placement: Placement, layer: Layer, operand: Tensor | None, z: Tensor) -> Any:
        assert isinstance(layer, KroneckerLayer)
        assert operand is not None
        return layer.rows(operand, self.now.examples), layer.keep(operand, self.now.examples)

    def consume(self, placement: Placement, layer: Layer, kept: Any, g: Tensor) -> None:
        assert isinstance(layer, KroneckerLayer)
        rows, extra = kept
        g = layer.output_rows(g, extra, self.now.examples)
        if self.now.options.sharing == "reduce":
            counted = positions_that_count(self.now.mask, self.now.examples, rows.shape[-2])
            rows, g = rows.mean(g, counted), g.sum(-2, keepdim=True)
        use = WeightUse(rows, g, placement.transposed)
        block = self.block_of[placement]
        if len(block.placements) == 1:
            self.add(block, [use])
            return
        if placement in self.waiting.get(block.name, {}):
            self.release(block)
        self.waiting.setdefault(block.name, {})[placement] = use

    def release(self, block: Block) -> None:
        """Forms the moment of the uses that wait."""
        uses = self.waiting.pop(block.name, {})
        if uses:
            self.add(block, list(uses.values()))

    def add(self, block: Block, uses: Sequence[WeightUse]) -> None:
        """Adds the moment of one stack of vectors."""
        found = Totals(self.moment.of(block, uses))
        self.totals[block.name] = self.totals[block.name] + found if block.name in self.totals else found

    def sums(self, block: Block, run: Pullback) -> Totals:
        self.release(block)
        if block.name in self.totals:
            return self.totals[block.name]
        return Totals(self.moment.zero(block, run.outputs.new_zeros((), dtype=self.now.dtype)))


@register
class FactorsAndUses:
    """What one pass yields for a weight: the sums for its factors, and its uses, a list for each stack of vectors."""

    factors: UseSums
    stacks: tuple[tuple[WeightUse, ...], ...]

    def __add__(self, other: FactorsAndUses) -> FactorsAndUses:
        return FactorsAndUses(self.factors + other.factors, self.stacks + other.stacks)

    def __mul__(self, weight: float | Tensor) -> FactorsAndUses:
        stacks = tuple(tuple(use * weight for use in stack) for stack in self.stacks)
        return FactorsAndUses(self.factors * weight, stacks)


@register
class FewRows(CompressedMoment):
    """A sum of outer products that is kept as its rows [n, d], far fewer than their width: nothing is lost."""

    rows: Tensor

    @staticmethod
    def suffice(rows: Tensor) -> bool:
        """Whether rows [*, d] are fewer than half their width, and the width is worth the trouble."""
        width = rows.shape[-1]
        return width >= SMALLEST_SPANNED and 0 < 2 * rows.numel() <= width**2

    def __add__(self, other: FewRows | Tensor) -> FewRows | Tensor:  # type: ignore[override]
        if isinstance(other, Tensor):
            return gram(self.rows) + other
        rows = torch.cat([self.rows, other.rows])
        return FewRows(rows) if self.suffice(rows) else gram(rows)

    __radd__ = __add__

    def __mul__(self, weight: float | Tensor) -> FewRows:
        return FewRows(self.rows * nonnegative(weight) ** 0.5)

    def __truediv__(self, count: Tensor) -> FewRows:
        return FewRows(self.rows / count.sqrt())

    def to(self, dtype: torch.dtype) -> FewRows:
        return FewRows(self.rows.to(dtype))

    def side(self) -> LowRank:
        vectors, values = row_space(self.rows)
        return LowRank(vectors, values, values.new_zeros(()))


class HoldingCollector(Collector):
    """Makes factors, and holds rows and gradients until eigenbases are known: one pass in place of two.

    Rows that are few are their own factor.
    """

    def __init__(self, now: Pass) -> None:
        self.now, self.factors = now, FactorCollector(now)
        self.uses: dict[Placement, list[WeightUse]] = {}
        self.alone = {block.placements[0] for block in now.plan.blocks if len(block.placements) == 1}

    def suffice(self, placement: Placement, rows: Tensor) -> bool:
        """Whether rows [*, N, T, d] are all there is to a factor, and few."""
        plain = rows.shape[-2] == 1 or self.now.options.sharing == "expand"
        plain = plain and self.now.mask is None and placement in self.alone and not placement.transposed
        return plain and rows.shape[-1] <= self.now.options.wide.above and FewRows.suffice(rows)

    def record(self, placement: Placement, layer: Layer, operand: Tensor | None, z: Tensor) -> Any:
        assert isinstance(layer, KroneckerLayer)
        assert operand is not None
        rows = layer.rows(operand, self.now.examples)
        if isinstance(rows, DenseRows) and rows.values.ndim == 3 and self.suffice(placement, rows.values):
            flat = rows.values.flatten(0, 1)
            count = torch.full((), len(flat), device=flat.device)
            return (FewRows(flat), count, layer.keep(operand, self.now.examples)), rows
        return self.factors.record(placement, layer, operand, z), rows

    def consume(self, placement: Placement, layer: Layer, kept: Any, g: Tensor) -> None:
        assert isinstance(layer, KroneckerLayer)
        factors, rows = kept
        held = layer.output_rows(g, factors[2], self.now.examples).clone()
        if held.ndim == 4 and self.suffice(placement, held):
            few, previous = FewRows(held.flatten(0, 2)), self.factors.outputs.get(placement)
            self.factors.outputs[placement] = few if previous is None else previous + few
        else:
            self.factors.consume(placement, layer, factors, g)
        self.uses.setdefault(placement, []).append(WeightUse(rows, held, placement.transposed))

    def sums(self, block: Block, run: Pullback) -> FactorsAndUses:
        kept = [run.kept[p.site][p.layer][0] for p in block.placements]
        stacks = [self.uses.pop(p) for p in block.placements if p in self.uses]
        return FactorsAndUses(self.factors.of(block, run, kept), tuple(zip(*stacks, strict=True)))


@dataclasses.dataclass(frozen=True)
class EigenSquares(Moment):
    """sum_n (Q_L^T D_n Q_R)^2 entrywise, in each block's Kronecker eigenbasis (George et al. 2018, eq. 11).

    Attributes:
        bases: (Q_L, Q_R) by block.
        positionwise: take each position for an example, which drops the cross terms of D_n's sum.
    """

    bases: dict[str, Bases]
    positionwise: bool

    def of(self, block: Block, uses: Sequence[WeightUse]) -> tuple[Tensor, ...]:
        left, right = self.bases[block.name]
        return (averaged(averaged(self.squares(uses, left, right), right).mT, left).mT,)

    def squares(self, uses: Sequence[WeightUse], left: Basis, right: Basis) -> Tensor:
        """The moment of every coordinate."""
        if self.positionwise:
            parts = [self.projected(use, left, right) for use in uses]
            found = [rows.position_squares(g) for rows, g in parts]
            return summed([x.mT if use.transposed else x for use, x in zip(uses, found, strict=True)])
        if len(uses) == 1 and not uses[0].transposed and self.rows_are_cheaper(uses[0]):
            rows, g = self.projected(uses[0], left, right)
            return rows.squares(g)
        return summed([sum_of_squares(right.analyse_right(left.analyse_left(d))) for d in in_chunks(uses)])

    def projected(self, use: WeightUse, left: Basis, right: Basis) -> tuple[Rows, Tensor]:
        """Rows and gradients in the coordinates of the bases."""
        if use.transposed:
            left, right = right, left
        return use.rows.in_basis(right, use.g), left.analyse_right(use.g)

    def rows_are_cheaper(self, use: WeightUse) -> bool:
        """Whether it takes fewer multiplications to rotate the T rows than the gradient [d_out, d_in]."""
        if not isinstance(use.rows, DenseRows):
            return True
        positions, d_in, d_out = use.rows.shape[-2], use.rows.shape[-1], use.g.shape[-1]
        return positions * (d_in**2 + d_out**2) <= d_in * d_out * (d_in + d_out)

    def zero(self, block: Block, like: Tensor) -> tuple[Tensor, ...]:
        *groups, _, _ = block.layout.shape
        sizes = [x.rank + 1 if isinstance(x, LowRankBasis) else x.width for x in self.bases[block.name]]
        return (like.new_zeros(*groups, *sizes),)


def averaged(values: Tensor, basis: Basis) -> Tensor:
    """One value for each eigenvalue, of values [*, c] for each coordinate: the best fit where several share one."""
    if not isinstance(basis, LowRankBasis):
        return values
    inside, rest = values.split([basis.rank, basis.width], -1)
    return torch.cat([inside, rest.sum(-1, keepdim=True) / (basis.width - basis.rank)], -1)


@dataclasses.dataclass(frozen=True)
class GradientSquares(Moment):
    """sum_n D_n o D_n: the diagonal."""

    def of(self, block: Block, uses: Sequence[WeightUse]) -> tuple[Tensor, ...]:
        if len(uses) == 1 and not uses[0].transposed:
            return (uses[0].rows.squares(uses[0].g),)
        return (summed([sum_of_squares(gradients) for gradients in in_chunks(uses)]),)

    def zero(self, block: Block, like: Tensor) -> tuple[Tensor, ...]:
        return (like.new_zeros(block.layout.shape),)


@dataclasses.dataclass(frozen=True)
class TraceMoments(Moment):
    """sum_n D_n D_n^T and sum_n D_n^T D_n, the factors of TKFAC: of a wide side, what is kept of it."""

    wide: Wide

    def of(self, block: Block, uses: Sequence[WeightUse]) -> tuple[Tensor | CompressedMoment, ...]:
        if len(uses) == 1 and not uses[0].transposed and max(block.layout.shape[-2:]) <= self.wide.above:
            return uses[0].rows.left_moment(uses[0].g), uses[0].rows.right_moment(uses[0].g)
        parts = [(self.moment(gradients.mT), self.moment(gradients)) for gradients in in_chunks(uses)]
        lefts, rights = zip(*parts, strict=True)
        return summed(lefts), summed(rights)

    def moment(self, matrices: Tensor) -> Tensor | CompressedMoment:
        """The sum of M^T M over M [K, N, *groups, m, n]: that of the rows of all of them."""
        return second_moment(groups_first(matrices, 2), None, self.wide, augmented=False)

    def zero(self, block: Block, like: Tensor) -> tuple[Tensor | CompressedMoment, ...]:
        *groups, rows, columns = block.layout.shape
        left, right = (self.wide.zero(tuple(groups), width, like) for width in (rows, columns))
        return left, right
