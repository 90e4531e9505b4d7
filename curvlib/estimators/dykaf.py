"""DyKAF: the Kronecker product that is nearest to E[g g^T] in Frobenius norm, followed from gradient to gradient.

For gradients D [m, n] of a weight and g = vec D, F = E[g g^T] becomes, rearranged, the linear map X -> E[D X D^T], and
s L (x) R becomes the rank-one map s L <R, X>. A step of a rank-one projector-splitting integrator takes the product
nearest to F to one near b F + (1 - b) g g^T, at the cost of Shampoo's factors and one product a side more (Yudin et al.
2025, arXiv 2511.06477). It starts with the product nearest to the first g g^T: sigma_1^2 u_1 u_1^T (x) v_1 v_1^T from
the leading singular triple of D. Ranks then grow like Fibonacci's numbers, so that a young curvature is singular: its
inverse needs damping. A tensor with d axes has one factor an axis, and its step is a sweep of the higher-order power
method.

Factors have Frobenius norm one, and the scale s is kept apart from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from curvlib.arguments import check_grads
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.capture.plan import Block
from curvlib.errors import naming
from curvlib.estimators.elementwise import ElementwiseOptions
from curvlib.estimators.gradients import Number, begin, check_diagonal, places_of_leaves, step
from curvlib.estimators.observations import Observations, Sandwiches, observe, of_objective, wide_sides
from curvlib.estimators.statistics import Options, Statistics, assemble
from curvlib.estimators.tracking import DyKAFRule, Flags, block_with, columns, identity, stepped
from curvlib.gradients.data import Batch, DataSet
from curvlib.gradients.plans import Plans, planned
from curvlib.layers.wide import Wide, WideDiagonal
from curvlib.linalg.projector_splitting import Rearranged
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators import BlockDiagonal
from curvlib.pytree import Domain, Tree, flatten


@dataclasses.dataclass(frozen=True)
class DyKAFEstimator:
    """DyKAF's curvature, from a model and data or from gradients alone; see `curvlib.dykaf`.

    Called with a model it estimates the curvature of the reduced objective ``loss`` at ``params``.

    Example:
        >>> import torch, curvlib as cv
        >>> from curvlib.estimators import dykaf
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(20, 3), torch.randint(2, (20,)))
        >>> curv = dykaf(model_fn, params, batch, per_example=True)
        >>> step = curv.power(-0.5, 1e-3) @ params
        >>> curv = dykaf.init({"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])})
        >>> curv.diag()["w"].round(decimals=4)  # the leading singular value's square
        tensor([[9., 0.],
                [0., 0.]])
        >>> updated = dykaf.update(curv, {"w": torch.tensor([[0.0, 0.0], [0.0, 3.0]])}, 0.5)
        >>> updated.diag()["w"].round(decimals=4)  # what is orthogonal is not seen
        tensor([[4.5000, 0.0000],
                [0.0000, 0.0000]])
    """

    def __call__(
        self,
        model_fn: ModelFn,
        params: Tree,
        batch: Batch | DataSet,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        per_example: bool = False,
        integrator: str = "ksl",
        sweeps: int = 1,
        start: str = "svd",
        generator: torch.Generator | None = None,
        elementwise: str = "diagonal",
        wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
        engine: str | None = None,
        plan: Plan | Plans | None = None,
    ) -> BlockDiagonal:
        """Curvature of a model's objective, with the blocks of `kfac`: [W, b], the bias being the last column.

        Of a data set it is a running mean over its batches, which depends on their order.

        Args:
            model_fn: pure function (params, inputs) -> outputs [N, ...].
            params: pytree of floating-point tensors.
            batch: (inputs, targets), or a whole data set `over` a loader.
            loss: the objective.
            per_example: False: one observation g a batch, the gradient of the reduced objective. True: the gradient of
                each example's own term, with E[g g^T] the empirical Fisher of the reduced objective, all examples of a
                batch in one step.
            integrator: see `update`.
            sweeps: see `update`; with ``per_example``, the first batch has as many too.
            start: see `init`.
            generator: randomness for a ``random`` start; None: a fresh generator with seed 0.
            elementwise: scales, shifts and lone biases have the ``diagonal`` of E[g g^T], or the ``dense`` matrix.
            wide: the width beyond which a side has a diagonal factor; a `WideDiagonal`.
            engine: "functional" or "autograd"; None: functional under a `torch.func` transform or a trace, else
                autograd.
            plan: the model's `plan`, if already made for inputs of these shapes.

        Returns:
            `Kronecker` blocks: a `ScaledPower` with the scale on the left, a factor of norm one on the right.

        Raises:
            ArgumentError: an unknown integrator or start, no sweep, or ``wide`` is no `WideDiagonal`.
            CaptureError: a parameter is used by a call that is not understood.
            TargetError: the targets do not fit the loss.
            NonFiniteError: a factor is not finite; names its block.
        """
        check_diagonal(wide, "dykaf")
        rule = DyKAFRule(integrator, sweeps, start, generator)
        if not per_example:
            return of_objective(
                model_fn,
                params,
                batch,
                rule.start,
                rule.advance,
                loss=loss,
                elementwise=elementwise,
                wide=wide,
                engine=engine,
                plan=plan,
            )
        options = ElementwiseOptions(loss, "empirical", elementwise=elementwise, wide=wide, engine=engine)
        return of_examples(model_fn, params, batch, options, plan, rule)

    def init(
        self,
        grads: Tree,
        decay: Number | None = None,
        *,
        start: str = "svd",
        generator: torch.Generator | None = None,
        elementwise: str = "diagonal",
        wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
    ) -> BlockDiagonal:
        """The curvature of the first gradient: a block a leaf, with a factor an axis for leaves of order two and more.

        Args:
            grads: pytree of floating-point tensors.
            decay: b: the start, in which the gradient then counts with 1 - b like every other one, as in the optimizer.
                None: it counts with 1.
            start: ``svd``: the product nearest to g g^T, from the leading singular vectors (of each unfolding, for
                tensors). Or one sweep towards it, from ``random`` positive semidefinite factors, or from the
                ``identity``, a small multiple of it, which keeps the factors positive definite and is what the
                optimizer starts from.
            generator: randomness for ``random``; None: a fresh generator with seed 0.
            elementwise: leaves of order one and zero have g o g on the ``diagonal``, or the ``dense`` g g^T.
            wide: the width beyond which a factor of a matrix is diagonal; a `WideDiagonal`.

        Returns:
            An operator on pytrees like ``grads``, in float32 for half-precision gradients.

        Raises:
            ArgumentError: an unknown start; ``wide`` is no `WideDiagonal`; or a tensor of order three or more has a
                wide axis; names it.
            PytreeError, DtypeError: not a pytree of floating-point tensors; names the leaf.
        """
        check_diagonal(wide, "dykaf")
        check_grads(grads)
        rule, domain = DyKAFRule("ksl", 1, start, generator), Domain.of(grads)
        leaves, places = flatten(grads)[0], places_of_leaves(domain)
        return begin(leaves, places, domain, rule.start, elementwise=elementwise, wide=wide, decay=decay)

    def update(
        self, curv: BlockDiagonal, grads: Tree, decay: Number | None, *, integrator: str = "ksl", sweeps: int = 1
    ) -> BlockDiagonal:
        """The curvature after one more gradient: near decay * F + (1 - decay) g g^T.

        A curvature that is zero, as after gradients of zeros only, starts with the next gradient, from the identity.

        Args:
            curv: what `init`, `update` or the estimator returned.
            grads: pytree like params.
            decay: between 0 and 1; None: near the sum F + g g^T.
            integrator: ``ksl``: one factor after the other, which is a sweep of alternating least squares; ``bug``:
                both at once, for matrices only.
            sweeps: of ``ksl``; many lead to the nearest product.

        Raises:
            ArgumentError: the decay is out of range, an unknown integrator, no sweep, or ``curv`` is a power or in
                eigen-form; names the block.
            PytreeError, ShapeError: the gradient does not fit ``curv``.
        """
        return step(curv, grads, decay, DyKAFRule(integrator, sweeps, "svd", None).advance)


State = tuple[Tensor, Sequence[Tensor]]  # the scale, and the units of both sides


def of_examples(
    model_fn: ModelFn, params: Tree, data: Batch | DataSet, options: Options, plan: Plan | Plans | None, rule: DyKAFRule
) -> BlockDiagonal:
    """The curvature of per-example gradients: a step a batch towards their sum, which is divided at the end."""
    total: Statistics | None = None
    states: dict[str, State] = {}
    for known, inputs, targets in planned(model_fn, params, data, plan):
        observations = observe(model_fn, params, (inputs, targets), options, known)
        for name, block in observations.blocks.items():
            with naming(name):
                states[name] = after(states.get(name), observations, block, rule)
        seen = observations.statistics
        sums = {block.name: seen.sums[block.name] for block in seen.blocks if not block.kronecker}
        seen = dataclasses.replace(seen, sums=sums)  # the rows are held no longer
        total = seen if total is None else total + seen
    assert total is not None
    blocks = {block.name: block for block in total.blocks}
    made = {
        name: block_with(scale / total.divisor(), units, wide_sides(blocks[name], options))
        for name, (scale, units) in states.items()
    }
    return assemble(total, made)


def after(state: State | None, observations: Observations, block: Block, rule: DyKAFRule) -> State:
    """The state of a block after one batch of examples."""
    diagonal = wide_sides(block, observations.options)
    target = target_of(observations, block, diagonal)
    if state is not None:
        return stepped(*state, target, 1.0, 1.0, rule.integrator, rule.sweeps)
    like = observations.statistics.normalizer
    *groups, m, n = block.layout.shape
    plain = [
        identity(like.new_empty(*groups, d, 1 if flag else d), diagonal=flag)
        for d, flag in zip((m, n), diagonal, strict=True)
    ]
    grams = [target.left(plain[1]), target.right(plain[0])]
    return stepped(*rule.first_units(grams, diagonal), target, 0.0, 1.0, "ksl", rule.sweeps)


def target_of(observations: Observations, block: Block, diagonal: Flags) -> Rearranged:
    """The rearranged sum of g g^T over the examples of a batch, cut to the diagonal on wide sides."""

    def moment(middle: Tensor, side: int) -> Tensor:
        middle = middle.squeeze(-1) if diagonal[1 - side] else middle
        sandwiches = Sandwiches(side, {block.name: middle}, observations.options)
        return columns(observations.moments(sandwiches, [block.name])[block.name], diagonal=diagonal[side])

    return Rearranged(partial(moment, side=0), partial(moment, side=1))


dykaf = DyKAFEstimator()
