"""Gradients of a model as observations of a curvature: one a batch, or one an example.

Per-example gradients are formed in chunks, from what layers read and what is pulled back to their outputs. One batch is
held, so that it can be gone through again at the cost of the products; a data set is walked through each time.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from curvlib.arguments import check_model
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn, Pullback
from curvlib.capture.plan import Block, Placement
from curvlib.errors import naming
from curvlib.estimators.correction import GradientSquares, Moment, MomentCollector
from curvlib.estimators.elementwise import ElementwiseCollector
from curvlib.estimators.gradients import Advance, Place, Start, begin, step
from curvlib.estimators.passes import measure_all
from curvlib.estimators.statistics import Collector, Options, Pass, Statistics, check_finite
from curvlib.gradients.data import Batch, DataSet, batches, repeatable
from curvlib.gradients.objective import objective_gradient
from curvlib.gradients.plans import Plans
from curvlib.gradients.uses import WeightUse, in_chunks
from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.rows import across_rows, summed
from curvlib.layers.wide import Wide
from curvlib.losses import Loss, check_loss
from curvlib.operators import BlockDiagonal
from curvlib.pytree import Domain, Tree

# --- one observation a batch --------------------------------------------------------------------------------------


def places_of_plan(plan: Plan) -> tuple[Place, ...]:
    """The blocks that `kfac` has: [W, b] with two factors."""
    return tuple(
        Place(block.name, block.layout, block.layout.shape[-2:] if block.kronecker else ()) for block in plan.blocks
    )


def of_objective(
    model_fn: ModelFn,
    params: Tree,
    data: Batch | DataSet,
    start: Start,
    advance: Advance,
    *,
    loss: Loss,
    elementwise: str,
    wide: Wide,
    engine: str | None,
    plan: Plan | Plans | None,
) -> BlockDiagonal:
    """The running mean over batches of g g^T, g the gradient of the reduced objective on a batch.

    Raises:
        NonFiniteError: a block is not finite; names it.
    """
    check_model(model_fn, params)
    check_loss(loss)
    domain = Domain.of(params)
    curv: BlockDiagonal | None = None
    for count, (inputs, targets) in enumerate(batches(data)):
        gradient = objective_gradient(model_fn, params, inputs, targets, loss, engine)
        if curv is None:
            known = Plans.of(plan).fitting(model_fn, params, inputs)
            leaves, places = domain.leaves(gradient), places_of_plan(known)
            curv = begin(leaves, places, domain, start, elementwise=elementwise, wide=wide)
        else:
            curv = step(curv, gradient, count / (count + 1), advance)
    assert curv is not None
    for name, _, block in curv.items():
        with naming(name):
            check_finite(block)
    return curv


# --- one observation an example -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeldUses:
    """The uses of a weight in one batch, a list for each stack of vectors."""

    stacks: tuple[tuple[WeightUse, ...], ...]

    def __add__(self, other: HeldUses) -> HeldUses:
        return HeldUses(self.stacks + other.stacks)


class HeldCollector(Collector):
    """Holds rows and gradients of every use of a weight."""

    def __init__(self, now: Pass) -> None:
        self.now = now
        self.uses: dict[Placement, list[WeightUse]] = {}

    def record(self, placement: Placement, layer: Layer, operand: Tensor | None, z: Tensor) -> Any:
        assert isinstance(layer, KroneckerLayer)
        assert operand is not None
        return layer.rows(operand, self.now.examples), layer.keep(operand, self.now.examples)

    def consume(self, placement: Placement, layer: Layer, kept: Any, g: Tensor) -> None:
        assert isinstance(layer, KroneckerLayer)
        rows, extra = kept
        g = layer.output_rows(g, extra, self.now.examples)
        self.uses.setdefault(placement, []).append(WeightUse(rows, g.clone(), placement.transposed))

    def sums(self, block: Block, run: Pullback) -> HeldUses:
        stacks = [self.uses.pop(p) for p in block.placements if p in self.uses]
        return HeldUses(tuple(zip(*stacks, strict=True)))


@dataclasses.dataclass(frozen=True)
class Sandwiches(Moment):
    """sum_n D_n X D_n^T, or sum_n D_n^T X D_n.

    Attributes:
        side: 0 for the left side, with X on the right one, or 1.
        middles: X by block, [*groups, d, d], or [*groups, d] of a diagonal one; none for a block that is left out.
        options: say which sides are wide, and get the diagonal of the sum only.
        factored: the middles are W with X = W^T W, so that no rounding makes the sum indefinite.
    """

    side: int
    middles: Mapping[str, Tensor]
    options: Options
    factored: bool = False

    def of(self, block: Block, uses: Sequence[WeightUse]) -> tuple[Tensor, ...]:
        middle = self.middles[block.name]
        wide, other_wide = (wide_sides(block, self.options)[side] for side in (self.side, 1 - self.side))
        parts = []
        for gradients in in_chunks(uses):
            rows = gradients if self.side else gradients.mT  # [K, N, (groups,) d, d'], d that of the middle
            weighted = middle.unsqueeze(-1) * rows if other_wide else middle @ rows
            rows = weighted if self.factored else rows
            parts.append((weighted * rows).sum(-2).sum((0, 1)) if wide else across_rows(weighted, rows, 2))
        total = summed(parts)
        return ((total if wide else (total + total.mT) / 2),)

    def zero(self, block: Block, like: Tensor) -> tuple[Tensor, ...]:
        *groups, _, _ = block.layout.shape
        width = block.layout.shape[self.side - 2]
        return (like.new_zeros(*groups, *(width,) * (1 if wide_sides(block, self.options)[self.side] else 2)),)


def wide_sides(block: Block, options: Options) -> tuple[bool, bool]:
    """Which sides of a block have diagonal factors."""
    rows, columns = (width > options.wide.above for width in block.layout.shape[-2:])
    return rows, columns


class Observations(ABC):
    """Per-example gradients D_n of every weight, with E[.] the mean or sum that the loss's reduction asks for.

    Attributes:
        options: what was asked for.
        statistics: measured along with them, of which the elementwise blocks are made.
    """

    options: Options
    statistics: Statistics

    @abstractmethod
    def moments(self, moment: Moment, names: Sequence[str]) -> dict[str, Tensor]:
        """The first tensor of a moment's sums, by block, for the blocks of these names."""

    @property
    def blocks(self) -> dict[str, Block]:
        """The blocks of weights by name."""
        return {block.name: block for block in self.statistics.blocks if block.kronecker}

    def mean_squares(self) -> dict[str, Tensor]:
        """The mean over all entries of E[D o D], [*groups] by block."""
        squares = self.moments(GradientSquares(), list(self.blocks))
        divisor = self.statistics.divisor()
        return {name: x.mean((-2, -1)) / divisor for name, x in squares.items()}

    def sandwiches(self, side: int, middles: Mapping[str, Tensor], *, factored: bool) -> dict[str, Tensor]:
        """E[D X D^T] (side 0) or E[D^T X D] (side 1) by block, see `Sandwiches`."""
        divisor = self.statistics.divisor()
        found = self.moments(Sandwiches(side, middles, self.options, factored), list(middles))
        return {name: x / divisor for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class OneBatch(Observations):
    """The gradients of one batch, whose rows are held."""

    options: Options
    statistics: Statistics

    def moments(self, moment: Moment, names: Sequence[str]) -> dict[str, Tensor]:
        result = {}
        sums = self.statistics.sums
        for name in names:
            with naming(name):
                parts = [moment.of(self.blocks[name], uses)[0] for uses in sums[name].stacks]
                like = self.statistics.normalizer
                result[name] = summed(parts) if parts else moment.zero(self.blocks[name], like)[0]
        return result


@dataclasses.dataclass(frozen=True)
class Walks(Observations):
    """The gradients of a data set, which is gone through for every moment."""

    options: Options
    statistics: Statistics
    walk: Callable[[Moment], Statistics]

    def moments(self, moment: Moment, names: Sequence[str]) -> dict[str, Tensor]:
        found = self.walk(moment)
        return {name: found.sums[name].tensors[0] for name in names}


def observe(
    model_fn: ModelFn, params: Tree, batch: Batch | DataSet, options: Options, plan: Plan | Plans | None
) -> Observations:
    """Per-example gradients of one batch or of a data set.

    Raises:
        ArgumentError: the data set can be read only once.
    """
    repeatable(batch)
    if isinstance(batch, DataSet):
        elementwise = measure_all(model_fn, params, batch, options, None, plan)

        def walk(moment: Moment) -> Statistics:
            return measure_all(
                model_fn, params, batch, options, None, plan, lambda now: (MomentCollector(now, moment), None)
            )

        return Walks(options, elementwise, walk)
    held = measure_all(
        model_fn, params, batch, options, None, plan, lambda now: (HeldCollector(now), ElementwiseCollector(now))
    )
    return OneBatch(options, held)
