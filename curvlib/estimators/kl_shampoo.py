"""KL-Shampoo: the Kronecker product that is closest to E[g g^T] in the sense of Kullback and Leibler.

For gradients D [m, n] that were draws of N(0, L (x) R), the likelihood is greatest where

    L = E[D R^-1 D^T] / n,    R = E[D^T L^-1 D] / m,

and a running mean of it is (Lin et al. 2025, arXiv 2509.03378)

    L <- b L + (1 - b)/n D R^-1 D^T,    R <- b R + (1 - b)/m D^T L^-1 D,

with the old factors on the right-hand sides. A tensor with d axes has one factor an axis, and n_i / (n_1 ... n_d) in
place of 1/n. Inverses in it are those of M + 10 eps tr(M) I, with eps the precision of the dtype: that is rounding for
factors that can be inverted, and keeps singular ones finite.

The greatest likelihood of many gradients at once is reached by solving for L and R by turns. With few gradients it is
reached by singular factors only, so that inverses are those of M_d = M + d I, with d = sqrt(eps) times the mean
eigenvalue of M, and 1/n becomes 1 / tr(R R_d^-1), one over the dimension of what R spans: a second moment that is a
Kronecker product is found exactly, whatever d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.arguments import check_grads
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.errors import ArgumentError
from curvlib.estimators.elementwise import ElementwiseOptions
from curvlib.estimators.gradients import (
    Number,
    begin,
    block_of,
    check_diagonal,
    entries,
    factor_like,
    is_diagonal,
    modes_of,
    parts_of,
    places_of_leaves,
    step,
    weights,
    wide_axes,
)
from curvlib.estimators.observations import Observations, observe, of_objective, wide_sides
from curvlib.estimators.statistics import assemble
from curvlib.factors.axes import entrywise
from curvlib.factors.kl_shampoo import isotropic, mean_square, whitening, with_inverses
from curvlib.gradients.data import Batch, DataSet
from curvlib.gradients.plans import Plans
from curvlib.layers.wide import Wide, WideDiagonal
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators import BlockDiagonal, Dense, Diagonal, Kronecker, Matrix, ScaledPower
from curvlib.pytree import Domain, Tree, flatten


@dataclasses.dataclass(frozen=True)
class KLShampooEstimator:
    """KL-Shampoo's curvature, from a model and data or from gradients alone; see `curvlib.kl_shampoo`.

    Called with a model it estimates the curvature of the reduced objective ``loss`` at ``params``.

    Example:
        >>> import torch, curvlib as cv
        >>> from curvlib.estimators import kl_shampoo
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(20, 3), torch.randint(2, (20,)))
        >>> curv = kl_shampoo(model_fn, params, batch, per_example=True)
        >>> step = curv.inverse(1e-3) @ params
        >>> curv = kl_shampoo.init({"w": torch.tensor([[2.0, 0.0], [0.0, 2.0]])})
        >>> curv.diag()["w"].round(decimals=4)  # the mean of g o g
        tensor([[2., 2.],
                [2., 2.]])
        >>> kl_shampoo.update(curv, {"w": torch.eye(2)}, 0.5).trace()
        tensor(3.1250)
    """

    def __call__(
        self,
        model_fn: ModelFn,
        params: Tree,
        batch: Batch | DataSet,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        per_example: bool = False,
        sweeps: int = 10,
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
            per_example: False: one observation g a batch, the gradient of the reduced objective. Of a data set, the
                running mean over its batches, which depends on their order; the first one only sets the scale, as in
                `init`. True: the gradient of each example's own term, with E[g g^T] the empirical Fisher of the
                reduced objective, and ``sweeps`` towards the greatest likelihood of all of them, in no order. A data
                set is then gone through twice a sweep, and once before.
            sweeps: how often L and then R is solved for; used with ``per_example``.
            elementwise: scales, shifts and lone biases have the ``diagonal`` of E[g g^T], or the ``dense`` matrix.
            wide: the width beyond which a side has a diagonal factor; a `WideDiagonal`.
            engine: "functional" or "autograd"; None: functional under a `torch.func` transform or a trace, else
                autograd.
            plan: the model's `plan`, if already made for inputs of these shapes.

        Returns:
            `Kronecker` blocks.

        Raises:
            ArgumentError: ``sweeps`` is less than 1; ``wide`` is no `WideDiagonal`; or a data set that can be read only
                once, with ``per_example``.
            CaptureError: a parameter is used by a call that is not understood.
            TargetError: the targets do not fit the loss.
            NonFiniteError: a factor is not finite; names its block.
        """
        check_diagonal(wide, "kl_shampoo")
        if not per_example:
            return of_objective(
                model_fn,
                params,
                batch,
                start,
                advance,
                loss=loss,
                elementwise=elementwise,
                wide=wide,
                engine=engine,
                plan=plan,
            )
        if sweeps < 1:
            raise ArgumentError(f"sweeps must be at least 1, got {sweeps}")
        options = ElementwiseOptions(loss, "empirical", elementwise=elementwise, wide=wide, engine=engine)
        observations = observe(model_fn, params, batch, options, plan)
        factors = likeliest(observations, sweeps)
        return assemble(observations.statistics, {name: block_with(pair) for name, pair in factors.items()})

    def init(
        self,
        grads: Tree,
        decay: Number | None = None,
        *,
        elementwise: str = "diagonal",
        wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
    ) -> BlockDiagonal:
        """The curvature of the first gradient: a block a leaf, with a factor an axis.

        Args:
            grads: pytree of floating-point tensors.
            decay: b: the isotropic curvature mean(g o g) I, in which the gradient then counts with 1 - b like every
                other one, as in the optimizer (and in the authors' code). None: the isotropic curvature, which counts
                as that of one gradient.
            elementwise: leaves of order one and zero have g o g on the ``diagonal``, or the ``dense`` g g^T.
            wide: the width beyond which a factor is diagonal; a `WideDiagonal`.

        Returns:
            An operator on pytrees like ``grads``, in float32 for half-precision gradients.

        Raises:
            ArgumentError: ``wide`` is no `WideDiagonal`.
            PytreeError, DtypeError: not a pytree of floating-point tensors; names the leaf.
        """
        check_diagonal(wide, "kl_shampoo")
        check_grads(grads)
        domain = Domain.of(grads)
        leaves, places = flatten(grads)[0], places_of_leaves(domain)
        return begin(leaves, places, domain, start, elementwise=elementwise, wide=wide, decay=decay)

    def update(self, curv: BlockDiagonal, grads: Tree, decay: Number | None) -> BlockDiagonal:
        """The curvature after one more gradient: L <- b L + (1 - b)/n D R^-1 D^T, and R likewise.

        A gradient of zeros makes both factors smaller, and so the curvature by decay^2. A curvature that is zero, as
        after gradients of zeros only, starts with the next gradient, as in `init` with this
        decay (if it is None, the next one counts in addition).

        Args:
            curv: what `init`, `update` or the estimator returned.
            grads: pytree like params.
            decay: b, between 0 and 1; None: the sum, t + 1 times the mean of t + 1 gradients, of which ``curv`` is t.

        Raises:
            ArgumentError: the decay is out of range, or ``curv`` is a power or in eigen-form; names the block.
            PytreeError, ShapeError: the gradient does not fit ``curv``.
        """
        return step(curv, grads, decay, advance)


def block_with(factors: Sequence[Matrix], scale: Tensor | None = None) -> Kronecker:
    """The block with these factors, and a scale that says how many gradients count in it."""
    one = torch.ones_like(factors[0].traces()) if scale is None else scale
    return block_of([ScaledPower(factors[0], one, 1.0), *factors[1:]])


def start(gradient: Tensor, order: int, wide: Wide, decay: Number | None = None) -> Kronecker:
    """The block mean(D o D) I, in which D then counts if there is a decay."""
    diagonal = wide_axes(gradient, order, wide)
    block = block_with(scaled_identities(mean_square(gradient, order), gradient.shape[-order:], diagonal))
    return block if decay is None else advance(block, gradient, *weights(decay))


def scaled_identities(mean: Tensor, widths: Sequence[int], diagonal: Sequence[bool]) -> list[Matrix]:
    """Equal multiples of the identity whose product is mean [*] times the identity."""
    pairs = zip(isotropic(mean, widths), diagonal, strict=True)
    return [Diagonal(values) if flag else Dense(torch.diag_embed(values)) for values, flag in pairs]


def advance(block: Kronecker, gradient: Tensor, old: Number, new: Number) -> Kronecker:
    """The block s L (x) R after one more gradient D [*, n_1, ..., n_d]: all factors from the old ones."""
    bases, scales, exponents = zip(*map(parts_of, modes_of(block)), strict=True)
    if set(exponents) != {1.0}:
        raise ArgumentError(
            "these are not KL-Shampoo's factors; update the curvature that kl_shampoo, init or update returned, and "
            "take powers and inverses of the result"
        )
    scale = torch.stack(list(torch.broadcast_tensors(*scales))).prod(0)
    total = old * scale + new  # how many gradients count: 1 in a moving average
    share = torch.where(total > 0, 1 / total, torch.ones_like(total))
    factors = with_inverses(
        [entries(base) for base in bases],
        [is_diagonal(base) for base in bases],
        gradient,
        old * scale * share,
        new * share,
    )
    return block_with([factor_like(base, values) for base, values in zip(bases, factors, strict=True)], total)


def likeliest(observations: Observations, sweeps: int) -> dict[str, tuple[Matrix, Matrix]]:
    """L and R of every block by turns, each with the greatest likelihood given the other."""
    factors: dict[str, tuple[Matrix, Matrix]] = {}
    for name, mean in observations.mean_squares().items():
        block = observations.blocks[name]
        left, right = scaled_identities(mean, block.layout.shape[-2:], wide_sides(block, observations.options))
        factors[name] = left, right
    for _ in range(sweeps):
        for side in (0, 1):
            others = {name: pair[1 - side] for name, pair in factors.items()}
            roots = {
                name: whitening(entries(other), guard_of(other), diagonal=is_diagonal(other))
                for name, other in others.items()
            }
            for name, moment in observations.sandwiches(side, roots, factored=True).items():
                span = spanned(others[name], roots[name])
                new = factor_like(factors[name][side], moment / entrywise(span, moment))
                factors[name] = (new, others[name]) if side == 0 else (others[name], new)
    return factors


def guard_of(factor: Matrix) -> float:
    """sqrt(eps) / n, by which the trace is multiplied to give d."""
    values = entries(factor)
    return float(torch.finfo(values.dtype).eps ** 0.5) / values.shape[-1]


def spanned(factor: Matrix, root: Tensor) -> Tensor:
    """tr(M W^T W) [*], the dimension of what a factor spans; 1 if that is nothing."""
    values = entries(factor)
    dimension = (root * values * root).sum(-1) if is_diagonal(factor) else (root @ values * root).sum((-2, -1))
    return torch.where(dimension > 0, dimension, torch.ones_like(dimension))


kl_shampoo = KLShampooEstimator()
