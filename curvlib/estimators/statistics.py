"""Sums over the data from which Kronecker factors are made: what is measured on a batch, added, and normalized."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.capture import Plan, execute
from curvlib.capture.discover import tensors_in
from curvlib.capture.engines import ModelFn, Pullback, examples_in
from curvlib.capture.plan import Block, Placement
from curvlib.errors import ArgumentError, CaptureError, NonFiniteError, naming
from curvlib.estimators.data import Batch
from curvlib.layers.base import KroneckerLayer
from curvlib.layers.elementwise import Elementwise
from curvlib.linalg.eager import may_look_at
from curvlib.linalg.gram import full_precision, gram, writes_in_place
from curvlib.losses import Loss
from curvlib.operators import BlockDiagonal, Dense, Diagonal, Kronecker, Matrix, Operator, ScaledIdentity, Sum
from curvlib.pytree import Domain, Tree

FISHERS = ("type-2", "mc", "empirical", "forward-only")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `kfac` was asked for."""

    loss: Loss
    fisher: str
    sharing: str
    mc_samples: int
    elementwise: str
    tied: str
    max_dense: int
    engine: str | None

    def __post_init__(self) -> None:
        allowed = {
            "fisher": FISHERS,
            "sharing": ("expand", "reduce"),
            "elementwise": ("diagonal", "dense"),
            "tied": ("sum", "merge"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ArgumentError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if (self.elementwise, self.fisher) == ("dense", "forward-only"):
            raise ArgumentError("elementwise='dense' needs backpropagated vectors; fisher='forward-only' has none")
        if self.mc_samples < 1:
            raise ArgumentError(f"mc_samples must be at least 1, got {self.mc_samples}")


@dataclasses.dataclass(frozen=True)
class FactorSums:
    """One use of a weight: sum of a a^T, the number of rows in it, and sum of g g^T (None: forward-only)."""

    inputs: Tensor
    rows: Tensor
    outputs: Tensor | None

    def __add__(self, other: FactorSums) -> FactorSums:
        outputs = None if self.outputs is None or other.outputs is None else self.outputs + other.outputs
        return FactorSums(self.inputs + other.inputs, self.rows + other.rows, outputs)


BlockSums = tuple[FactorSums, ...] | Tensor


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over the examples seen so far, by block: one `FactorSums` a use, or the sum of squared gradients."""

    blocks: tuple[Block, ...]
    sums: tuple[BlockSums, ...]
    normalizer: Tensor
    examples: int

    def __add__(self, other: Statistics) -> Statistics:
        if self.blocks != other.blocks:
            raise CaptureError(
                "the batches of a data set do not use the parameters in the same way; their plans differ"
            )
        return Statistics(
            self.blocks,
            tuple(add(a, b) for a, b in zip(self.sums, other.sums, strict=True)),
            self.normalizer + other.normalizer,
            self.examples + other.examples,
        )


def add(a: BlockSums, b: BlockSums) -> BlockSums:
    """Adds the sums of one block."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a + b
    assert isinstance(a, tuple)
    assert isinstance(b, tuple)
    return tuple(x + y for x, y in zip(a, b, strict=True))


def measure(
    plan: Plan, model_fn: ModelFn, params: Tree, batch: Batch, options: Options, generator: torch.Generator | None
) -> Statistics:
    """Runs the model once on a batch and sums what its layers saw."""
    inputs, targets = batch
    loss, examples = options.loss, examples_in(inputs)
    expected = torch.empty(plan.output_shape(examples), device="meta")
    loss.check(expected, targets)
    mask = loss.mask(expected, targets)
    if mask is not None and may_look_at(mask) and mask.all():
        mask = None

    def record(number: int, operand: Tensor | None, z: Tensor) -> list[Any]:
        kept: list[Any] = []
        for layer in plan.sites[number].layers:
            if isinstance(layer, KroneckerLayer):
                assert operand is not None
                full = full_precision(operand)
                factor, rows = layer.input_factor(full, examples, options.sharing, mask, options.max_dense)
                kept.append((factor, rows, layer.keep(operand, examples)))
            elif isinstance(layer, Elementwise):
                x = None if operand is None or layer.scale is None else full_precision(operand)
                kept.append(layer.forward_only(x, z, examples) if options.fisher == "forward-only" else x)
        return kept

    run = execute(plan, model_fn, params, inputs, record, options.engine)
    collector = Collector(plan, run, options, examples)
    if options.fisher != "forward-only":
        run.pull(vectors(run, targets, options, generator), collector.consume)
    count = loss.positions if options.fisher == "forward-only" else loss.normalizer
    normalizer = count(run.outputs, targets)
    return Statistics(plan.blocks, tuple(map(collector.sums, plan.blocks)), normalizer, examples)


def vectors(run: Pullback, targets: Any, options: Options, generator: torch.Generator | None) -> Iterator[Tensor]:
    """The backpropagated vectors, in stacks that the engine can hold: [K, *outputs.shape]."""
    loss, outputs = options.loss, run.outputs
    if options.fisher == "empirical":
        yield loss.gradient(outputs, targets).unsqueeze(0)
    elif options.fisher == "mc":
        assert generator is not None
        yield from loss.sample(outputs, targets, generator, options.mc_samples).split(run.width)
    else:
        columns = loss.columns(outputs)
        for start in range(0, columns, run.width):
            yield loss.sqrt_hessian(outputs, targets, start, min(start + run.width, columns))


class Collector:
    """Receives output gradients site by site and adds up each block's second moments."""

    def __init__(self, plan: Plan, run: Pullback, options: Options, examples: int) -> None:
        self.plan, self.run, self.options, self.examples = plan, run, options, examples
        self.outputs: dict[Placement, Tensor] = {}
        self.gradients: dict[Placement, list[dict[int, Tensor]]] = {}
        self.squares: dict[str, Tensor] = {}
        self.block_of = {(p.site, p.layer): (block, p) for block in plan.blocks for p in block.placements}

    def consume(self, number: int, kept: Any, g: Tensor) -> None:
        """Takes gradients g [K, *z.shape] at a site."""
        g = full_precision(g)
        for index, layer in enumerate(self.plan.sites[number].layers):
            block, placement = self.block_of[number, index]
            if isinstance(layer, KroneckerLayer):
                factor = layer.output_factor(
                    g, kept[index][2], self.examples, self.options.sharing, self.options.max_dense
                )
                previous = self.outputs.get(placement)
                self.outputs[placement] = factor if previous is None else previous + factor
            elif isinstance(layer, Elementwise):
                gradients = layer.gradients(kept[index], g, self.examples)
                if len(block.placements) == 1:
                    self.square(block, gradients)
                else:
                    self.gradients.setdefault(placement, []).append(gradients)

    def square(self, block: Block, gradients: dict[int, Tensor]) -> None:
        """Adds the second moment of per-example gradients {leaf: [K, N, *leaf.shape]}."""
        like = next(iter(gradients.values()))
        front, shapes = like.shape[:2], self.plan.domain.shapes
        leaves = {piece.leaf: like.new_zeros(*front, *shapes[piece.leaf]) for piece in block.layout.pieces}
        rows = block.layout.gather({**leaves, **gradients}).flatten(0, 1)
        moment = gram(rows) if is_dense(block, self.options) else rows.square().sum(0)
        previous = self.squares.get(block.name)
        self.squares[block.name] = moment if previous is None else previous + moment

    def sums(self, block: Block) -> BlockSums:
        """The sums of one block, once everything has been pulled back."""
        if block.kronecker:
            return tuple(self.factor_sums(placement) for placement in block.placements)
        if self.options.fisher == "forward-only":
            return self.forward_only(block)
        leaves: dict[int, Tensor]
        stacks = [self.gradients[p] for p in block.placements if p in self.gradients]
        for parts in zip(*stacks, strict=True):  # the uses of one leaf add up before they are squared
            leaves = {}
            for part in parts:
                for leaf, gradient in part.items():
                    leaves[leaf] = leaves[leaf] + gradient if leaf in leaves else gradient
            self.square(block, leaves)
        if block.name in self.squares:
            return self.squares[block.name]
        dense = is_dense(block, self.options)
        return self.run.outputs.new_zeros((block.layout.numel,) * (2 if dense else 1))

    def forward_only(self, block: Block) -> Tensor:
        """The sums of an elementwise block with G = I: over examples, of means over positions."""
        leaves: dict[int, Tensor] = {}
        for placement in block.placements:
            site = self.plan.sites[placement.site]
            layer = site.layers[placement.layer]
            assert isinstance(layer, Elementwise)
            positions = layer.positions(site.output_shape(self.examples), self.examples)
            for leaf, total in self.run.kept[placement.site][placement.layer].items():
                leaves[leaf] = leaves[leaf] + total / positions if leaf in leaves else total / positions
        return block.layout.gather(leaves)

    def factor_sums(self, placement: Placement) -> FactorSums:
        """The sums of one use of a weight."""
        inputs, rows, _ = self.run.kept[placement.site][placement.layer]
        if self.options.fisher == "forward-only":
            return FactorSums(inputs, rows, None)
        outputs = self.outputs.get(placement)
        if outputs is None:  # the layer's output does not reach the model's
            layer = self.plan.sites[placement.site].layers[placement.layer]
            assert isinstance(layer, KroneckerLayer)
            *groups, width, _ = layer.weight.shape
            sides = 2 if width <= self.options.max_dense else 1
            outputs = full_precision(self.run.outputs).new_zeros(*groups, *(width,) * sides)
        return FactorSums(inputs.to(outputs.dtype), rows, outputs)


def is_dense(block: Block, options: Options) -> bool:
    """Whether an elementwise block keeps its whole second moment."""
    return options.elementwise == "dense" and block.layout.numel <= options.max_dense


def assemble(statistics: Statistics, domain: Domain, options: Options) -> BlockDiagonal:
    """Normalizes the sums to factors and makes the operator."""
    one = torch.ones_like(statistics.normalizer)
    if options.fisher == "forward-only":  # G = I for a mean; a sum is as many means as there are positions
        normalizer = one if options.loss.reduction == "mean" else 1 / statistics.normalizer
    else:
        normalizer = one if options.loss.reduction == "sum" else statistics.normalizer
    statistics = dataclasses.replace(statistics, normalizer=normalizer)
    blocks: dict[str, Operator] = {}
    for block, sums in zip(statistics.blocks, statistics.sums, strict=True):
        with naming(block.name):
            blocks[block.name] = make_block(block, sums, statistics, options)
            check_finite(blocks[block.name])
    layouts = tuple((block.name, block.layout) for block in statistics.blocks)
    return BlockDiagonal(blocks, layouts, domain)


def make_block(block: Block, sums: BlockSums, statistics: Statistics, options: Options) -> Operator:
    """One block of the curvature of the reduced objective."""
    if isinstance(sums, Tensor):
        scale = 1 / statistics.normalizer
        if options.fisher == "forward-only":
            scale = scale / statistics.examples
        return Dense(sums * scale) if is_dense(block, options) else Diagonal(sums * scale)
    if options.tied == "merge" and len(sums) > 1:
        if any(placement.transposed for placement in block.placements):
            raise ArgumentError("tied='merge' needs a weight that is used in one orientation; use tied='sum'")
        merged = sums[0]
        for other in sums[1:]:
            merged = merged + other
        sums = (merged,)
    groups = len(block.layout.shape) - 2
    terms: list[Operator] = []
    for placement, use in zip(block.placements, sums, strict=False):
        inputs = side(divide(use.inputs, use.rows.clamp(min=1)), groups)
        outputs = output_side(block, placement, use, statistics, options)
        terms.append(Kronecker(inputs, outputs) if placement.transposed else Kronecker(outputs, inputs))
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def divide(total: Tensor, count: Tensor) -> Tensor:
    """Sums over the data to means; the sums are not needed any more, and their memory is used again where possible."""
    if writes_in_place(total) and total.is_floating_point():
        return total.div_(count)
    return total / count


def side(factor: Tensor, groups: int) -> Dense | Diagonal:
    """A factor [*groups, d, d], or its diagonal [*groups, d], as one side of a Kronecker product."""
    return Dense(factor) if factor.ndim == groups + 2 else Diagonal(factor)


def output_side(
    block: Block, placement: Placement, use: FactorSums, statistics: Statistics, options: Options
) -> Matrix:
    """G: the normalized second moment of the output gradients, or the identity for forward-only."""
    *groups, rows, columns = block.layout.shape
    if use.outputs is not None:
        return side(divide(use.outputs, statistics.normalizer), len(groups))
    scale = (1 / statistics.normalizer).to(use.inputs.dtype)
    return ScaledIdentity(scale, (columns if placement.transposed else rows,))


def check_finite(block: Operator) -> None:
    """Refuses a block with an infinite or undefined entry, where its values may be looked at."""
    for tensor in tensors_in(block):
        if may_look_at(tensor) and not tensor.sum().isfinite():
            raise NonFiniteError(
                "the factor is not finite: the inputs, the parameters or the outputs contain inf or nan, or no "
                "target counts"
            )
