"""The exact diagonal of the GGN and of the Fisher, from layer inputs and output gradients.

The gradient of one example for a weight is D_n = sum_t g_nt a_nt^T; the diagonal sums its squares over examples and
backpropagated vectors. Where a layer has one position, D_n o D_n = (g o g) (a o a)^T and the sum is one product (as in
BackPACK, Dangel et al. 2020, arXiv 1912.10985); elsewhere the gradients are formed in chunks of examples. Jacobians
are never formed.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.capture.plan import Block
from curvlib.errors import ArgumentError
from curvlib.estimators.correction import GradientSquares, MomentCollector, Totals
from curvlib.estimators.elementwise import LayerwiseOptions
from curvlib.estimators.passes import measure_all
from curvlib.estimators.statistics import Pass, Statistics, then_assemble
from curvlib.gradients.data import Batch, DataSet
from curvlib.gradients.plans import Plans
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators import Diagonal
from curvlib.pytree import Tree

FISHERS = ("type-2", "mc", "empirical")


@dataclasses.dataclass(frozen=True)
class DiagonalOptions(LayerwiseOptions):
    """The options of `diagonal`."""

    estimator: ClassVar[str] = "cv.diagonal"

    def __post_init__(self) -> None:
        if self.fisher not in FISHERS:
            raise ArgumentError(f"fisher must be one of {', '.join(FISHERS)}, got {self.fisher!r}")
        super().__post_init__()

    def collector(self, now: Pass) -> MomentCollector:
        return MomentCollector(now, GradientSquares())

    def product(self, block: Block, sums: Totals, statistics: Statistics, *, reuse: bool) -> Diagonal:
        return Diagonal(sums.tensors[0] / statistics.divisor())


@dataclasses.dataclass(frozen=True)
class DiagonalEstimator:
    """The exact diagonal of the GGN or Fisher of the reduced objective, without Jacobians.

    Exact for every kind of layer, for weights shared by positions and for tied weights. It costs about as much as
    `kfac` with the same ``fisher``: ``type-2`` backpropagates one vector for each output element of an example.

    Args:
        model_fn: as for `kfac`, as are the arguments not named here.
        fisher: ``type-2``: the diagonal of the GGN; ``mc``: of the Fisher with ``mc_samples`` drawn targets an
            example; ``empirical``: of the Fisher with the given targets.

    Returns:
        A `BlockDiagonal` of `Diagonal` blocks.

    Raises:
        ArgumentError: an unknown ``fisher``.
        CaptureError: a parameter is used by a call that is not understood.
        UnusedParameterError: a parameter is never used.
        TargetError: the targets do not fit the loss.
        EmptyBatchError: there is no example.
        NonFiniteError: a block is not finite; names it.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.ones(4, 3)
        >>> diagonal(model_fn, params, (x, None), loss=cv.Identity("sum")).diag()["weight"]
        tensor([[4., 4., 4.],
                [4., 4., 4.]])
    """

    def measure(
        self,
        model_fn: ModelFn,
        params: Tree,
        batch: Batch | DataSet,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        fisher: str = "type-2",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        engine: str | None = None,
        plan: Plan | Plans | None = None,
    ) -> Statistics:
        """What the curvature is made of; the arguments are those of the class."""
        options = DiagonalOptions(loss, fisher, mc_samples=mc_samples, engine=engine)
        return measure_all(model_fn, params, batch, options, generator, plan)

    __call__ = then_assemble(measure)


diagonal = DiagonalEstimator()
