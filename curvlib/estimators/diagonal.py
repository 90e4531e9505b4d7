"""The exact diagonal of the GGN and of the Fisher, from layer inputs and output gradients.

The gradient of one example for a weight is D_n = sum_t g_nt a_nt^T; the diagonal sums its squares over examples and
backpropagated vectors. Where a layer has one position, D_n o D_n = (g o g) (a o a)^T and the sum is one product (as in
BackPACK, Dangel et al. 2020, arXiv 1912.10985); elsewhere the gradients are formed in chunks of examples. Jacobians
are never formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn, Pullback
from curvlib.capture.plan import Block, Placement
from curvlib.errors import ArgumentError
from curvlib.estimators.data import Batch, DataSet
from curvlib.estimators.elementwise import ElementwiseCollector, elementwise_block
from curvlib.estimators.factors import assemble
from curvlib.estimators.options import Options
from curvlib.estimators.statistics import Collector, Pass, measure_all
from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.rows import GRADIENTS_AT_ONCE, Rows
from curvlib.layers.wide import WideDiagonal
from curvlib.linalg.gram import full_precision
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
    plan: Plan | None = None,
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
        model_fn, params, batch, options, generator, plan, lambda now: (SquareCollector(now), ElementwiseCollector(now))
    )

    def make(block: Block, sums: Tensor) -> Operator:
        if not block.kronecker:
            return elementwise_block(block, sums, statistics, options)
        return Diagonal(sums / statistics.divisor(options))

    return assemble(statistics, Domain.of(params), make)


class SquareCollector(Collector):
    """Sums of squares of per-example weight gradients.

    The gradients of a tied weight's uses add up before they are squared: the output gradients of one stack of vectors
    wait until all of its uses have been seen, which is when the next stack, or the end, comes.
    """

    def __init__(self, now: Pass) -> None:
        self.now = now
        self.squares: dict[str, Tensor] = {}
        self.waiting: dict[str, dict[Placement, tuple[Rows, Tensor]]] = {}
        self.block_of = {placement: block for block in now.plan.blocks for placement in block.placements}

    def record(self, placement: Placement, layer: Layer, operand: Tensor | None, z: Tensor) -> Any:
        assert isinstance(layer, KroneckerLayer)
        assert operand is not None
        return layer.rows(operand, self.now.examples), layer.keep(operand, self.now.examples)

    def consume(self, placement: Placement, layer: Layer, kept: Any, g: Tensor) -> None:
        assert isinstance(layer, KroneckerLayer)
        rows, mask = kept
        block, gradients = self.block_of[placement], layer.output_rows(g, mask, self.now.examples)
        if len(block.placements) == 1:
            self.add(block, rows.squares(gradients))
            return
        if placement in self.waiting.get(block.name, {}):
            self.square(block)
        self.waiting.setdefault(block.name, {})[placement] = rows, gradients

    def add(self, block: Block, squares: Tensor) -> None:
        """Adds to the sum of a block."""
        self.squares[block.name] = self.squares[block.name] + squares if block.name in self.squares else squares

    def square(self, block: Block) -> None:
        """Adds the squared sum of the gradients that wait for a tied weight."""
        uses = self.waiting.pop(block.name, {})
        if not uses:
            return
        vectors = next(iter(uses.values()))[1].shape[0]
        for (first, last), (start, stop) in chunks(vectors, self.now.examples, block.layout.numel):
            total: Tensor | None = None
            for placement, (rows, g) in uses.items():
                gradients = rows.part(start, stop).gradients(g[first:last, start:stop])
                gradients = gradients.mT if placement.transposed else gradients
                total = gradients if total is None else total + gradients
            assert total is not None
            self.add(block, total.square().sum((0, 1)))

    def sums(self, block: Block, run: Pullback) -> Tensor:
        self.square(block)
        if block.name in self.squares:
            return self.squares[block.name]
        return full_precision(run.outputs).new_zeros(block.layout.shape)  # no vector reached it


def chunks(vectors: int, examples: int, size: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of vectors and of examples whose gradients, ``size`` elements each, fit into memory together."""
    together = max(1, GRADIENTS_AT_ONCE // max(1, size))
    k = min(vectors, together)
    n = max(1, together // k)
    for first in range(0, vectors, k):
        for start in range(0, examples, n):
            yield (first, min(first + k, vectors)), (start, min(start + n, examples))
