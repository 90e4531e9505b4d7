"""The exact diagonal of the GGN and of the Fisher, from layer inputs and output gradients.

The gradient of one example for a weight is D_n = sum_t g_nt a_nt^T; the diagonal sums its squares over examples and
backpropagated vectors. Where a layer has one position, D_n o D_n = (g o g) (a o a)^T and the sum is one product (as in
BackPACK, Dangel et al. 2020, arXiv 1912.10985); elsewhere the gradients are formed in chunks of examples. Jacobians
are never formed.
"""

from __future__ import annotations

from typing import Any

import torch

from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.capture.plan import Block
from curvlib.errors import ArgumentError
from curvlib.estimators.correction import GradientSquares, MomentCollector
from curvlib.estimators.elementwise import ElementwiseCollector, elementwise_block
from curvlib.estimators.factors import assemble
from curvlib.estimators.options import Options
from curvlib.estimators.statistics import measure_all
from curvlib.gradients.data import Batch, DataSet
from curvlib.gradients.plans import Plans
from curvlib.layers.wide import WideDiagonal
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators import BlockDiagonal, Diagonal, Operator
from curvlib.pytree import Domain, Tree

FISHERS = ("type-2", "mc", "empirical")


def diagonal(
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
) -> BlockDiagonal:
    """The exact diagonal of the GGN or Fisher of the reduced objective, without Jacobians.

    Exact for every kind of layer, for weights shared by positions and for tied weights. It costs about as much as
    `kfac` with the same ``fisher``: ``type-2`` backpropagates one vector for each output element of an example.

    Args:
        model_fn: pure function (params, inputs) -> outputs [N, ...].
        params: pytree of floating-point tensors.
        batch: (inputs, targets) with N examples, or a whole data set `over` a loader.
        loss: the objective.
        fisher: ``type-2``: the diagonal of the GGN; ``mc``: of the Fisher with ``mc_samples`` drawn targets an
            example; ``empirical``: of the Fisher with the given targets.
        mc_samples: draws an example for ``mc``.
        generator: randomness for ``mc``; None means a fresh generator with seed 0.
        engine: "functional" or "autograd"; None: functional under a `torch.func` transform or a trace, else autograd.
        plan: the model's `plan`, if already made for inputs of these shapes.

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
    if fisher not in FISHERS:
        raise ArgumentError(f"fisher must be one of {', '.join(FISHERS)}, got {fisher!r}")
    options = Options(
        loss=loss,
        fisher=fisher,
        sharing="expand",
        mc_samples=mc_samples,
        elementwise="diagonal",
        tied="sum",
        wide=WideDiagonal(),
        engine=engine,
    )
    statistics = measure_all(
        model_fn,
        params,
        batch,
        options,
        generator,
        plan,
        lambda now: (MomentCollector(now, GradientSquares()), ElementwiseCollector(now)),
    )

    def make(block: Block, sums: Any) -> Operator:
        if not block.kronecker:
            return elementwise_block(block, sums, statistics, options)
        return Diagonal(sums.tensors[0] / statistics.divisor(options))

    return assemble(statistics, Domain.of(params), make)
