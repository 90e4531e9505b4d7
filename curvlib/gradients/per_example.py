"""Per-example gradients of a batch, block by block, in the form that each block has them in.

The gradient of example n for a weight is D_n = sum_t g_nt a_nt^T. It is kept as rows a and g, of which inner products
and projections are made with or without D_n itself, whichever takes fewer multiplications. What would not fit into
memory at once is done in chunks of examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import curvlib.layers.rows as layer_rows
from curvlib.arguments import check_model
from curvlib.capture import Plan, execute
from curvlib.capture import plan as make_plan
from curvlib.capture.engines import ModelFn, examples_in
from curvlib.errors import ArgumentError
from curvlib.estimators.correction import Use
from curvlib.estimators.statistics import as_wide_as, curvature_dtype, require_examples
from curvlib.gradients.block_gradients import (
    BlockGradients,
    DenseGradients,
    ElementwiseGradients,
    RowGradients,
    elementwise_rows,
)
from curvlib.gradients.data import Batch, DataSet, batches
from curvlib.gradients.row_assignment import pull_with_owners
from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.elementwise import Elementwise
from curvlib.linalg.eager import differentiable, ordinary
from curvlib.linalg.gram import full_precision
from curvlib.losses import CrossEntropy, Loss, check_loss
from curvlib.losses.base import check_device
from curvlib.operators.blocks import Layouts
from curvlib.operators.layout import Region
from curvlib.pytree import Domain, Tree, register, static

Place = tuple[int, int]  # a site and one of its layers

__all__ = [
    "BlockGradients",
    "DenseGradients",
    "ElementwiseGradients",
    "ExampleGradients",
    "RowGradients",
    "example_gradients",
]


@register
class ExampleGradients:
    """The gradients of the N examples of a batch.

    Args:
        blocks: by block.
        layouts: which elements of which parameters make up each block.
        domain: structure, names and shapes of the parameters.
        examples: N.
    """

    blocks: dict[str, BlockGradients]
    layouts: Layouts = static()
    domain: Domain = static()
    examples: int = static()

    def tree(self, start: int = 0, stop: int | None = None) -> Tree:
        """The gradients of these examples, as vectors of the domain stacked along a leading axis."""
        stop = self.examples if stop is None else stop
        leaves: dict[int, Tensor] = {}
        for name, layout in self.layouts:
            for leaf, value in layout.scatter(self.blocks[name].dense(start, stop)).items():
                leaves[leaf] = leaves[leaf] + value if leaf in leaves else value
        return self.domain.tree([leaves[i] for i in range(len(self.domain.names))])

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges (start, stop) of examples whose whole gradients fit into memory together."""
        step = max(1, layer_rows.GRADIENTS_AT_ONCE // max(1, sum(map(math.prod, self.domain.shapes))))
        for start in range(0, self.examples, step):
            yield start, min(start + step, self.examples)

    def inner(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inner products with vectors {block: [Q, *shape]}, block by block: {block: [Q, N]}."""
        return {name: self.blocks[name].inner(vectors[name]) for name, _ in self.layouts}


@differentiable()
def example_gradients(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    engine: str | None = None,
    plan: Plan | None = None,
) -> ExampleGradients:
    """The gradient of every example's own, unreduced loss term, whatever the loss's reduction is.

    It takes one forward and one backward pass through the layers, and no gradient of a weight is formed. Positions that
    the loss ignores contribute nothing. Rows that a model chooses by values (a mixture of experts) are given back to
    their examples, which takes log2 N further vectors to be pulled back.

    Args:
        model_fn: pure function (params, inputs) -> outputs [N, ...], each example's from its own inputs.
        params: pytree of floating-point tensors.
        batch: (inputs, targets) with N examples.
        loss: the objective.
        engine: "functional" or "autograd"; None: functional under a `torch.func` transform or a trace, else autograd.
        plan: the model's `plan`, if already made for inputs of these shapes.

    Returns:
        Gradients of N examples.

    Raises:
        ArgumentError: the batch is a data set, or no pair.
        CaptureError: a parameter is used by a call that is not understood.
        UnusedParameterError: a parameter is never used.
        TargetError: the targets do not fit the loss.
        EmptyBatchError: there is no example.

    Example:
        >>> import curvlib as cv
        >>> params, inputs = {"w": torch.ones(3, 2)}, torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> found = example_gradients(lambda p, x: x @ p["w"], params, (inputs, None), loss=cv.Identity())
        >>> found.tree(1, 2)["w"]  # x f^T
        tensor([[[0., 0.],
                 [4., 4.],
                 [0., 0.]]])
        >>> found.inner({"w": torch.ones(1, 2, 3)})["w"]
        tensor([[2., 8.]])
    """
    check_model(model_fn, params)
    check_loss(loss)
    if isinstance(batch, DataSet):
        raise ArgumentError("per-example gradients are those of one batch; loop over the batches of the data set")
    [pair] = batches(batch)
    params, (inputs, targets) = ordinary((params, pair))
    plan = make_plan(model_fn, params, inputs) if plan is None else plan
    require_examples(plan)
    examples, dtype = examples_in(inputs), curvature_dtype(params)
    loss.check(torch.empty(plan.output_shape(examples), device="meta"), targets)
    uses: dict[Place, Use] = {}
    elementwise: dict[Place, list[tuple[Region, Tensor]]] = {}
    transposed = {(p.site, p.layer): p.transposed for block in plan.blocks for p in block.placements}

    def record(number: int, operand: Tensor | None, z: Tensor) -> list[Any]:
        operand = None if operand is None else as_wide_as(dtype, operand)
        return [kept(layer, operand, examples) for layer in plan.sites[number].layers]

    def consume(number: int, recorded: Any, g: Tensor) -> None:
        g = full_precision(as_wide_as(dtype, g))
        for index, (layer, part) in enumerate(zip(plan.sites[number].layers, recorded, strict=True)):
            if isinstance(layer, KroneckerLayer):
                rows, extra = part
                held = layer.output_rows(g, extra, examples).clone()
                uses[number, index] = Use(rows, held, transposed[number, index])
            elif isinstance(layer, Elementwise):
                elementwise[number, index] = elementwise_rows(layer, part, g, examples)

    run = execute(plan, model_fn, params, inputs, record, engine)
    check_device(targets, run.outputs.device)
    owners = pull_with_owners(plan, run, loss.gradient(run.outputs, targets), consume)
    blocks: dict[str, BlockGradients] = {}
    for block in plan.blocks:
        places = [(p.site, p.layer) for p in block.placements]
        found = [owners.use(place[0], uses[place]) for place in places if place in uses]
        rows = [(region, owners.rows(place[0], x)) for place in places for region, x in elementwise.get(place, [])]
        if found:
            blocks[block.name] = RowGradients.of(found)
        elif rows:
            blocks[block.name] = ElementwiseGradients.of(rows, block.layout)
        else:  # the block does not reach the outputs
            zero = run.outputs.new_zeros((), dtype=dtype)
            blocks[block.name] = DenseGradients(zero.expand(examples, *block.layout.shape))
    layouts = tuple((block.name, block.layout) for block in plan.blocks)
    return ExampleGradients(blocks, layouts, plan.domain, examples)


def kept(layer: Layer, operand: Tensor | None, examples: int) -> Any:
    """What is to be kept of a layer's input."""
    if isinstance(layer, KroneckerLayer):
        assert operand is not None
        return layer.rows(operand, examples), layer.keep(operand, examples)
    assert isinstance(layer, Elementwise)
    if operand is None or layer.scale is None:
        return None
    return full_precision(operand).clone()  # the model may change its own in place
