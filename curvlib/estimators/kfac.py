"""KFAC: Kronecker-factored approximate curvature.

The GGN's block of a layer z = W a is the mean over examples of (g g^T) (x) (a a^T), summed over backpropagated
vectors; KFAC replaces the mean of products by the product of means (Martens & Grosse 2015, arXiv 1503.05671),

    G (x) A,    A = 1/R sum_r a_r a_r^T,    G = 1/c sum_r sum_k g_rk g_rk^T,

over R rows (examples, or positions of examples, see ``sharing``), K backpropagated vectors (see ``fisher``) and the
loss's normalizer c (1 for sums). Scaling as in "KFAC from scratch" (Dangel et al. 2025, arXiv 2507.05127).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.capture.plan import Block
from curvlib.estimators.elementwise import LayerwiseOptions
from curvlib.estimators.factors import FactorCollector, UseSums, kronecker_block
from curvlib.estimators.passes import measure_all
from curvlib.estimators.statistics import Pass, Statistics, then_assemble
from curvlib.gradients.data import Batch, DataSet
from curvlib.gradients.plans import Plans
from curvlib.layers.wide import Wide, WideDiagonal
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators import Operator
from curvlib.pytree import Tree


@dataclasses.dataclass(frozen=True)
class KFACOptions(LayerwiseOptions):
    """The options of `kfac`."""

    estimator: ClassVar[str] = "cv.kfac"

    def collector(self, now: Pass) -> FactorCollector:
        return FactorCollector(now)

    def product(self, block: Block, sums: UseSums, statistics: Statistics, *, reuse: bool) -> Operator:
        return kronecker_block(block, sums, statistics, reuse=reuse)


@dataclasses.dataclass(frozen=True)
class KFACEstimator:
    """Kronecker-factored curvature of a model's objective at ``params``.

    One block a weight, G (x) A on the matrix [W, b]: A [d_in (+ 1), d_in (+ 1)] from the layer's inputs, G
    [d_out, d_out] from backpropagated vectors. The curvature is that of the reduced objective ``loss`` (mean or sum).

    Args:
        model_fn: pure function (params, inputs) -> outputs [N, ...].
        params: pytree of floating-point tensors.
        batch: (inputs, targets) with N examples, or a whole data set `over` a loader.
        loss: the objective.
        fisher: which vectors are backpropagated. ``type-2``: columns of the square root of the loss's Hessian, which
            is exact but takes one vector for each output element of an example; ``mc``: gradients at ``mc_samples``
            targets drawn from the model's likelihood; ``empirical``: the gradient at the given targets;
            ``forward-only``: none, G = I (for a sum, times the number of loss terms).
        sharing: how positions that share a weight (tokens, pixels) count: ``expand``: each as an example; ``reduce``:
            the mean of an example's inputs and the sum of its gradients.
        mc_samples: draws an example for ``mc``.
        generator: randomness for ``mc``; None means a fresh generator with seed 0, hence the same draws at each call:
            pass your own where estimates are averaged.
        elementwise: curvature of scales, shifts and lone biases from per-example gradients: its exact ``diagonal``, or
            a ``dense`` block a layer.
        tied: a weight that several calls use gets the exact ``sum`` of their Kronecker products, or one product that
            ``merge``s them: as if they were positions, or by partial traces where one call uses the transpose.
        wide: what is kept of the factors of sides that are too wide for a dense one (`WideDiagonal`, `WideBlocks`,
            `WideLowRank`, `WideIdentity`); by default the diagonal, beyond 8192.
        engine: "functional" or "autograd"; None: functional under a `torch.func` transform or a trace, else autograd.
        plan: the model's `plan`, if already made for inputs of these shapes.

    Returns:
        A `BlockDiagonal` operator on ``params``, with factors in float32 for half-precision models.

    Raises:
        CaptureError: a parameter is used by a call that is not understood.
        UnusedParameterError: a parameter is never used.
        TargetError: the targets do not fit the loss.
        EmptyBatchError: there is no example.
        NonFiniteError: a factor is not finite; names its block.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> curv = cv.kfac(model_fn, params, batch)
        >>> curv.blocks["weight"].left.matrix.shape, curv.blocks["weight"].right.matrix.shape
        (torch.Size([2, 2]), torch.Size([4, 4]))
        >>> step = curv.inverse(1e-3) @ params
    """

    def measure(
        self,
        model_fn: ModelFn,
        params: Tree,
        batch: Batch | DataSet,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        fisher: str = "mc",
        sharing: str = "expand",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        elementwise: str = "diagonal",
        tied: str = "sum",
        wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
        engine: str | None = None,
        plan: Plan | Plans | None = None,
    ) -> Statistics:
        """What the curvature is made of; the arguments are those of the class."""
        options = KFACOptions(loss, fisher, sharing, mc_samples, elementwise, tied, wide, engine)
        return measure_all(model_fn, params, batch, options, generator, plan)

    __call__ = then_assemble(measure)


kfac = KFACEstimator()
