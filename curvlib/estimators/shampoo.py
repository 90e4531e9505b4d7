"""Shampoo's curvature: one second moment of the gradient an axis.

For gradients D [m, n] of a weight, L = E[D D^T] and R = E[D^T D], and the curvature is

    (L (x) R)^(1/2),    so that its power -1/2 takes D to L^(-1/4) D R^(-1/4)

(Gupta, Koren and Singer 2018, arXiv 1802.09568). A tensor with d axes has one factor F_i = E[D_(i) D_(i)^T] for the
unfolding along each, and the exponent 1/d in place of 1/2. Shampoo squared is F_1 (x) ... (x) F_d / tr^(d-1), the
better estimate of E[g g^T], g = vec D, whose trace it has exactly (Morwani et al. 2024, arXiv 2406.17748). All factors
have that trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvlib.arguments import check_grads
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.capture.plan import Block
from curvlib.errors import ArgumentError
from curvlib.estimators.correction import MomentCollector, Totals, TraceMoments
from curvlib.estimators.elementwise import LayerwiseOptions
from curvlib.estimators.gradients import (
    Number,
    advanced,
    begin,
    block_of,
    factor_of,
    modes_of,
    parts_of,
    places_of_leaves,
    step,
    weights,
)
from curvlib.estimators.observations import of_objective
from curvlib.estimators.passes import measure_all
from curvlib.estimators.statistics import Pass, Statistics, assemble
from curvlib.factors.axes import unfolded
from curvlib.gradients.data import Batch, DataSet
from curvlib.gradients.plans import Plans
from curvlib.layers.wide import Wide, WideDiagonal, as_side
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators import BlockDiagonal, Dense, Diagonal, Kronecker, LowRank, Matrix, ScaledPower
from curvlib.pytree import Domain, Tree, flatten


@dataclasses.dataclass(frozen=True)
class ShampooEstimator:
    """Shampoo's curvature, from a model and data or from gradients alone; see `curvlib.shampoo`.

    Called with a model it estimates the curvature of the reduced objective ``loss`` at ``params``.

    Example:
        >>> import torch, curvlib as cv
        >>> from curvlib.estimators import shampoo
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> curv = shampoo(model_fn, params, batch, per_example=True)
        >>> step = curv.power(-0.5, 1e-3) @ params
        >>> curv = shampoo.init({"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]])})
        >>> curv = shampoo.update(curv, {"w": torch.eye(2)}, 0.5)
        >>> curv.blocks["w"].left.base.matrix.diagonal()  # (9 + 1) / 2, (16 + 1) / 2
        tensor([5.0000, 8.5000])
    """

    def __call__(
        self,
        model_fn: ModelFn,
        params: Tree,
        batch: Batch | DataSet,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        per_example: bool = False,
        squared: bool = False,
        elementwise: str = "diagonal",
        wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
        engine: str | None = None,
        plan: Plan | Plans | None = None,
    ) -> BlockDiagonal:
        """Curvature of a model's objective, with the blocks of `kfac`: [W, b], the bias being the last column.

        Args:
            model_fn: pure function (params, inputs) -> outputs [N, ...].
            params: pytree of floating-point tensors.
            batch: (inputs, targets), or a whole data set `over` a loader.
            loss: the objective.
            per_example: False: one observation g a batch, the gradient of the reduced objective; of a data set, the
                mean over its batches. True: the gradient of each example's own term, with E[g g^T] the empirical
                Fisher of the reduced objective: (1/N) sum_n g_n g_n^T for a mean, sum_n g_n g_n^T for a sum.
            squared: L (x) R / tr L in place of (L (x) R)^(1/2); for each example that is `tkfac`, ``empirical``.
            elementwise: scales, shifts and lone biases have the ``diagonal`` of E[g g^T], or the ``dense`` matrix.
            wide: what is kept of the factors of sides that are too wide for a dense one, as for `kfac`.
            engine: "functional" or "autograd"; None: functional under a `torch.func` transform or a trace, else
                autograd.
            plan: the model's `plan`, if already made for inputs of these shapes.

        Returns:
            `Kronecker` blocks, whose sides are `ScaledPower` of L and R.

        Raises:
            CaptureError: a parameter is used by a call that is not understood.
            TargetError: the targets do not fit the loss.
            NonFiniteError: a factor is not finite; names its block.
        """
        given: dict[str, Any] = {"elementwise": elementwise, "wide": wide, "engine": engine, "plan": plan}
        if per_example:
            found = self.measure(model_fn, params, batch, loss=loss, per_example=True, squared=squared, **given)
            return assemble(found, reuse=True)
        rule = ShampooRule(squared)
        return of_objective(model_fn, params, batch, rule.start, rule.advance, loss=loss, **given)

    def measure(
        self,
        model_fn: ModelFn,
        params: Tree,
        batch: Batch | DataSet,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        per_example: bool = False,
        squared: bool = False,
        elementwise: str = "diagonal",
        wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
        engine: str | None = None,
        plan: Plan | Plans | None = None,
    ) -> Statistics:
        """What the curvature is made of; the arguments are those of `ShampooEstimator.__call__`.

        Raises:
            ArgumentError: ``per_example`` is False: one gradient after the other makes a curvature that is no sum.
        """
        if not per_example:
            raise ArgumentError(
                "only the gradients of single examples make sums, which cv.shampoo.measure(..., per_example=True) "
                "gives; from gradients of batches write cv.shampoo.init and cv.shampoo.update"
            )
        options = ShampooOptions(loss, "empirical", elementwise=elementwise, wide=wide, engine=engine, squared=squared)
        return measure_all(model_fn, params, batch, options, None, plan)

    def init(
        self,
        grads: Tree,
        decay: Number | None = None,
        *,
        squared: bool = False,
        elementwise: str = "diagonal",
        wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
    ) -> BlockDiagonal:
        """The curvature of the first gradient: a block a leaf, with a factor an axis for leaves of order two and more.

        Args:
            grads: pytree of floating-point tensors.
            decay: b: factors begin as (1 - b) D_(i) D_(i)^T, as those of a moving average that starts from zero and as
                those of the optimizer; after t gradients their weights add up to 1 - b^t. None: as D_(i) D_(i)^T.
            squared: see `ShampooEstimator.__call__`.
            elementwise: leaves of order one and zero have g o g on the ``diagonal``, or the ``dense`` g g^T.
            wide: what is kept of factors that are too wide to be dense, now and in updates (`WideDiagonal`,
                `WideBlocks`, `WideLowRank`, `WideIdentity`).

        Returns:
            An operator on pytrees like ``grads``, in float32 for half-precision gradients.

        Raises:
            ArgumentError: a tensor of order three or more would have a low-rank factor that is not the first; names it.
            PytreeError, DtypeError: not a pytree of floating-point tensors; names the leaf.
        """
        check_grads(grads)
        domain = Domain.of(grads)
        leaves, places = flatten(grads)[0], places_of_leaves(domain)
        rule = ShampooRule(squared)
        return begin(leaves, places, domain, rule.start, elementwise=elementwise, wide=wide, decay=decay)

    def update(self, curv: BlockDiagonal, grads: Tree, decay: Number | None) -> BlockDiagonal:
        """The curvature after one more gradient: every factor becomes decay * F_i + (1 - decay) D_(i) D_(i)^T.

        Args:
            curv: what `init`, `update` or the estimator returned.
            grads: pytree like params.
            decay: between 0 and 1; None: the sum F_i + D_(i) D_(i)^T.

        Raises:
            ArgumentError: the decay is out of range, or ``curv`` is a power or in eigen-form; names the block.
            PytreeError, ShapeError: the gradient does not fit ``curv``.
        """

        def advance(block: Kronecker, gradient: Tensor, old: Number, new: Number) -> Kronecker:
            exponents = {parts_of(mode)[2] for mode in modes_of(block)}
            return ShampooRule(exponents == {1.0}).advance(block, gradient, old, new)

        return step(curv, grads, decay, advance)


@dataclasses.dataclass(frozen=True)
class ShampooRule:
    """How blocks are made and updated.

    Attributes:
        squared: F_1 (x) ... / tr^(d-1) in place of F_1^(1/d) (x) ...
    """

    squared: bool

    def start(self, gradient: Tensor, order: int, wide: Wide, decay: Number | None = None) -> Kronecker:
        """The block of the first gradient D [*, n_1, ..., n_d].

        Raises:
            ArgumentError: a tensor of order three or more would have a low-rank factor that is not the first.
        """
        groups, gradient = gradient.ndim - order, weights(decay)[1] ** 0.5 * gradient
        factors = [factor_of(unfolded(gradient, axis, order).mT, groups, wide) for axis in range(order)]
        if order > 2 and any(isinstance(factor, LowRank) for factor in factors[1:]):
            raise ArgumentError(
                f"a tensor of order {order} has an axis that is wider than {wide.above}, and only its first axis may "
                "have a low-rank factor: reshape it to a matrix, or keep WideBlocks, WideDiagonal or WideIdentity"
            )
        return self.of(factors)

    def of(self, factors: Sequence[Matrix]) -> Kronecker:
        """The block with these second moments, all of one trace."""
        order = len(factors)
        trace = factors[0].traces()
        one = torch.ones_like(trace)
        if not self.squared:
            return block_of([ScaledPower(factor, one, 1 / order) for factor in factors])
        share = torch.where(trace > 0, 1 / trace, one)
        return block_of([ScaledPower(factors[0], one, 1.0), *(ScaledPower(x, share, 1.0) for x in factors[1:])])

    def advance(self, block: Kronecker, gradient: Tensor, old: Number, new: Number) -> Kronecker:
        """The block after one more gradient."""
        modes = modes_of(block)
        order = len(modes)
        bases, scales, exponents = zip(*map(parts_of, modes), strict=True)
        wanted = {1.0 if self.squared else 1 / order}
        if set(exponents) != wanted or not all(isinstance(mode, ScaledPower) for mode in modes):
            raise ArgumentError(
                "these are not Shampoo's factors; update the curvature that shampoo, init or update returned, and take "
                "powers and inverses of the result"
            )
        factors: list[Matrix] = []
        for axis, (base, strength) in enumerate(zip(bases, self.strengths(bases, scales), strict=True)):
            factors.append(advanced(base, old * strength, unfolded(gradient, axis, order).mT, new))
        return self.of(factors)

    def strengths(self, bases: Sequence[Matrix], scales: Sequence[Tensor]) -> list[Tensor]:
        """What second moments must be multiplied with for the block to be `of` them: 1, if nobody has scaled it."""
        if not self.squared:
            return [torch.stack(list(torch.broadcast_tensors(*scales))).prod(0)] * len(bases)
        traces = torch.stack(list(torch.broadcast_tensors(*(base.traces() for base in bases))))
        total = torch.stack([scale * trace for scale, trace in zip(scales, traces, strict=True)]).prod(0)
        return [torch.where(trace > 0, total / trace, torch.ones_like(trace)) for trace in traces]


@dataclasses.dataclass(frozen=True)
class ShampooOptions(LayerwiseOptions):
    """The options of `shampoo` for each example."""

    estimator: ClassVar[str] = "cv.shampoo"

    squared: bool = False

    def collector(self, now: Pass) -> MomentCollector:
        return MomentCollector(now, TraceMoments(self.wide))

    def product(self, block: Block, sums: Totals, statistics: Statistics, *, reuse: bool) -> Kronecker:
        groups = len(block.layout.shape) - 2
        sides = [as_side(moment / statistics.divisor(), groups) for moment in sums.tensors]
        return ShampooRule(self.squared).of([whole(side, self.wide) for side in sides])


def whole(factor: Matrix, wide: Wide) -> Matrix:
    """A factor in the form that updates need: dense, if it is not too wide and only happens to be diagonal."""
    narrow = factor.shape[-1] <= wide.above
    return Dense(factor.matrices()) if narrow and isinstance(factor, Diagonal) else factor


shampoo = ShampooEstimator()
