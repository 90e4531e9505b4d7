"""Per-example gradients of a batch, block by block, in the form that each block has them in.

The gradient of example n for a weight is D_n = sum_t g_nt a_nt^T. It is kept as rows a and g, of which inner products
and projections are made with or without D_n itself, whichever takes fewer multiplications. What would not fit into
memory at once is done in chunks of examples.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

import curvlib.layers.rows as layer_rows
from curvlib.arguments import check_model
from curvlib.capture import Plan, execute
from curvlib.capture.engines import ModelFn, Pullback, examples_in
from curvlib.errors import ArgumentError, PytreeError, ShapeError
from curvlib.gradients.block_gradients import (
    BlockGradients,
    DenseGradients,
    ElementwiseGradients,
    RowGradients,
    elementwise_rows,
)
from curvlib.gradients.data import Batch, DataSet, batches
from curvlib.gradients.plans import Plans, require_examples
from curvlib.gradients.row_assignment import OutputVectors, pull_with_owners
from curvlib.gradients.uses import WeightUse, as_wide_as, curvature_dtype
from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.elementwise import Elementwise
from curvlib.linalg.eager import differentiable, ordinary
from curvlib.linalg.gram import full_precision
from curvlib.losses import CrossEntropy, Loss, check_loss
from curvlib.losses.base import check_device
from curvlib.operators.blocks import Layouts
from curvlib.operators.layout import Region
from curvlib.operators.projection import Projection, projected, sequences
from curvlib.operators.sketch import Sides
from curvlib.operators.vectors import cast, floating_dtype, widest
from curvlib.pytree import Domain, Tree, register, static, tree_map

Place = tuple[int, int]  # a site and one of its layers
Pulled = Literal["gradient", "type-2", "outputs"]
PULLED = ("gradient", "type-2", "outputs")


@register
class PerExampleGradients:
    """The gradients of the N examples of a batch, kept as rows a and g; none is formed before it is asked for.

    With several vectors an example (see `per_example_gradients`) there is an axis for them behind that of the examples:
    (K) in the shapes of results.

    Args:
        blocks: by block.
        layouts: which elements of which parameters make up each block.
        domain: structure, names and shapes of the parameters.
        examples: N.
        vectors: K; None: one gradient an example, and no axis for it.
    """

    blocks: dict[str, BlockGradients]
    layouts: Layouts = static()
    domain: Domain = static()
    examples: int = static()
    vectors: int | None = static()

    def __len__(self) -> int:
        return self.examples

    def __iter__(self) -> Iterator[Tree]:
        """Yields each example's gradient, a pytree like params (with an axis (K) in front); formed in chunks."""
        for start, stop in self.ranges():
            chunk = self.tree(start, stop)
            for n in range(stop - start):
                yield tree_map(lambda leaf, n=n: leaf[n], chunk)

    def __repr__(self) -> str:
        vectors = "" if self.vectors is None else f", {self.vectors} vectors each"
        first = [f"{name} {list(layout.shape)}" for name, layout in self.layouts[:4]]
        shapes = ", ".join(first + [f"{len(self.layouts) - 4} more blocks"] * (len(self.layouts) > 4))
        return f"PerExampleGradients({self.examples} examples{vectors}; {shapes})"

    def tree(self, start: int = 0, stop: int | None = None) -> Tree:
        """The gradients of these examples, a pytree like params with axes [n, (K)] in front."""
        stop = self.examples if stop is None else stop
        leaves: dict[int, Tensor] = {}
        for name, layout in self.layouts:
            for leaf, value in layout.scatter(self.blocks[name].dense(start, stop)).items():
                leaves[leaf] = leaves[leaf] + value if leaf in leaves else value
        return self.domain.tree([leaves[i] for i in range(len(self.domain.names))])

    def ranges(self, most: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges (start, stop) of examples whose whole gradients fit into memory together, of at most so many."""
        each = sum(map(math.prod, self.domain.shapes)) * (self.vectors or 1)
        step = max(1, layer_rows.GRADIENTS_AT_ONCE // max(1, each))
        step = step if most is None else min(step, most)
        for start in range(0, self.examples, step):
            yield start, min(start + step, self.examples)

    def inner(self, vectors: Tree) -> Tensor:
        """Inner products <v_q, g_n> with vectors that are stacked along a leading axis of every leaf: [Q, N, (K)].

        Raises:
            PytreeError, ShapeError: the vectors are not like params; the message names the leaf.
        """
        leaves = self.domain.leaves(vectors, 1)
        return layer_rows.summed([self.blocks[name].inner(layout.gather(leaves)) for name, layout in self.layouts])

    def gram(self, other: PerExampleGradients | None = None) -> Tensor:
        """Inner products <g_n, h_m> with the gradients of other examples, or of these: [N, (K), M, (L)].

        Of the rows of one Jacobian (``vectors="outputs"``) it is the neural tangent kernel (Jacot et al. 2018).

        Raises:
            PytreeError: the others are gradients of other parameters.
        """
        other = self if other is None else other
        if other.domain != self.domain:
            raise PytreeError("the gradients are of parameters of another structure or other shapes")
        parts = []
        for start, stop in self.ranges():
            chunk = self.tree(start, stop)
            if self.vectors is not None:
                chunk = tree_map(lambda leaf: leaf.flatten(0, 1), chunk)
            parts.append(other.inner(chunk))
        found = torch.cat(parts)
        return found if self.vectors is None else found.unflatten(0, (self.examples, self.vectors))

    def norms(self) -> Tensor:
        """|g_n|, the Euclidean norm over all parameters: [N, (K)]."""
        return layer_rows.summed([self.blocks[name].squared_norms() for name, _ in self.layouts]).sqrt()

    def projected_by(self, projection: Projection) -> dict[str, Tensor]:
        """Their projections, {block: [N, (K,) *, p, q]}, or [N, (K,) p] of a block without sides: ``projection(self)``.

        A gradient of a weight is formed only where that takes fewer multiplications, or where the operator's blocks are
        others than the model's layers.

        Raises:
            PytreeError: the projection was made for other parameters.
        """
        if self.domain != projection.domain:
            raise PytreeError("the projection was made for params of another structure or other shapes")
        known = {name: sequences(layout) for name, layout in self.layouts}
        other = [(name, layout) for name, layout in projection.layouts if known.get(name) != sequences(layout)]
        found: dict[str, list[Tensor]] = {name: [] for name, _ in other}
        leading = 1 if self.vectors is None else 2
        for start, stop in self.ranges() if other else ():
            leaves = self.domain.leaves(self.tree(start, stop), leading)
            for name, layout in other:
                found[name].append(projected(projection.sides[name], layout.gather(leaves), leading))
        return {
            name: torch.cat(found[name]) if name in found else of_rows(projection.sides[name], self.blocks[name])
            for name, _ in projection.layouts
        }


def of_rows(sides: Sides, gradients: BlockGradients) -> Tensor:
    """The projections of a block's per-example gradients, in their dtype."""
    dtype = floating_dtype(gradients)
    wide = widest([dtype, *(side.dtype for side in sides)])
    gradients, sides = cast(gradients, wide), cast(sides, wide)
    match sides:
        case (left, right, weights):
            return (weights * gradients.projected(left, right)).to(dtype)
        case (left, right):
            return gradients.projected(left, right).to(dtype)
        case (rows,):
            return gradients.inner(rows).movedim(0, -1).to(dtype)
    raise AssertionError(f"a block has one to three tensors, not {len(sides)}")


def per_example_gradients(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    vectors: Pulled = "gradient",
    engine: str | None = None,
    plan: Plan | Plans | None = None,
) -> PerExampleGradients:
    """The gradient of every example's own, unreduced loss term, whatever the loss's reduction is.

    With J_n [K, P] the Jacobian of an example's outputs f_n, as rows, and l_n its loss term, they are the rows of

        ``gradient``: (dl_n/df) J_n, one row;   ``type-2``: S_n^T J_n with S_n S_n^T = d^2 l_n/df^2;   ``outputs``: J_n.

    So gradients with ``type-2`` sum to the generalized Gauss-Newton matrix, sum_n S_n J_n J_n^T S_n^T, and covariances
    of ``outputs`` under a Gaussian on the parameters are J_n Sigma J_n^T.

    It takes one forward and one backward pass through the layers, and no gradient of a weight is formed. Positions that
    the loss ignores contribute nothing. Rows that a model chooses by values (a mixture of experts) are given back to
    their examples, which takes log2 N times as many vectors to be pulled back.

    Args:
        model_fn: pure function (params, inputs) -> outputs [N, ...], each example's from its own inputs.
        params: pytree of floating-point tensors.
        batch: (inputs, targets) with N examples.
        loss: the objective; it is not looked at for ``outputs``, which need no targets.
        vectors: which vectors are pulled back: ``gradient``, ``type-2``, or ``outputs``. The last two have K elements
            of an example's outputs, and an axis for them.
        engine: "functional" or "autograd"; None: functional under a `torch.func` transform or a trace, else autograd.
        plan: the model's `plan`, if already made for inputs of these shapes; or `Plans`.

    Returns:
        Gradients of N examples.

    Raises:
        ArgumentError: the batch is a data set, or no pair; or ``vectors`` is not documented.
        CaptureError: a parameter is used by a call that is not understood, or examples depend on each other.
        UnusedParameterError: a parameter is never used.
        TargetError: the targets do not fit the loss.
        ShapeError: ``outputs`` of a model whose outputs have no axis of examples in front.
        EmptyBatchError: there is no example.

    Example:
        >>> import curvlib as cv
        >>> params, inputs = {"w": torch.ones(3, 2)}, torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> model_fn = lambda p, x: x @ p["w"]
        >>> found = per_example_gradients(model_fn, params, (inputs, None), loss=cv.Identity())
        >>> found
        PerExampleGradients(2 examples; w [2, 3])
        >>> found.tree(1, 2)["w"]  # x f^T
        tensor([[[0., 0.],
                 [4., 4.],
                 [0., 0.]]])
        >>> found.inner({"w": torch.ones(1, 3, 2)})
        tensor([[2., 8.]])
        >>> jacobians = per_example_gradients(model_fn, params, (inputs, None), vectors="outputs")
        >>> jacobians.tree()["w"].shape
        torch.Size([2, 2, 3, 2])
    """
    check_model(model_fn, params)
    check_loss(loss)
    if vectors not in PULLED:
        raise ArgumentError(f"vectors must be one of {', '.join(PULLED)}, got {vectors!r}")
    if isinstance(batch, DataSet):
        raise ArgumentError("per-example gradients are those of one batch; loop over the batches of the data set")
    [(inputs, targets)] = batches(batch)
    plan = Plans.of(plan).fitting(model_fn, params, inputs)
    return gradients_under(plan, model_fn, params, (inputs, targets), loss, vectors, engine)


@differentiable()
def gradients_under(
    plan: Plan, model_fn: ModelFn, params: Tree, batch: Batch, loss: Loss, vectors: Pulled, engine: str | None
) -> PerExampleGradients:
    """`per_example_gradients` under a plan; arguments have been checked."""
    require_examples(plan)
    inputs, targets = ordinary(batch)
    examples, dtype = examples_in(inputs), curvature_dtype(params)
    if vectors != "outputs":
        loss.check(torch.empty(plan.output_shape(examples), device="meta"), targets)
    uses: dict[Place, list[WeightUse]] = collections.defaultdict(list)
    elementwise: dict[Place, list[list[tuple[Region, Tensor]]]] = collections.defaultdict(list)
    transposed = {(p.site, p.layer): p.transposed for block in plan.blocks for p in block.placements}

    def record(number: int, operand: Tensor | None, z: Tensor) -> list[Any]:
        operand = None if operand is None else as_wide_as(dtype, operand)
        return [kept(layer, operand, examples) for layer in plan.sites[number].layers]

    def consume(number: int, recorded: Any, g: Tensor) -> None:
        g = g.to(dtype)
        for index, (layer, part) in enumerate(zip(plan.sites[number].layers, recorded, strict=True)):
            if isinstance(layer, KroneckerLayer):
                rows, extra = part
                held = layer.output_rows(g, extra, examples).clone()
                uses[number, index].append(WeightUse(rows, held, transposed[number, index]))
            elif isinstance(layer, Elementwise):
                elementwise[number, index].append(elementwise_rows(layer, part, g, examples))

    run = execute(plan, model_fn, params, inputs, record, engine)
    pulled = pulled_back(vectors, loss, run, targets)
    owners = pull_with_owners(plan, run, pulled, examples, consume)
    several = vectors != "gradient"
    blocks: dict[str, BlockGradients] = {}
    for block in plan.blocks:
        places = [(p.site, p.layer) for p in block.placements]
        found = [owners.use(place[0], together(uses[place])) for place in places if place in uses]
        stacks = [(place[0], column) for place in places for column in zip(*elementwise.get(place, ()), strict=True)]
        rows = [(column[0][0], owners.rows(site, torch.cat([x for _, x in column]))) for site, column in stacks]
        if found:
            blocks[block.name] = RowGradients.of(found, several=several)
        elif rows:
            blocks[block.name] = ElementwiseGradients.of(rows, block.layout, several=several)
        else:  # the block does not reach the outputs
            zero = run.outputs.new_zeros((), dtype=dtype)
            blocks[block.name] = DenseGradients(zero.expand(pulled.count, examples, *block.layout.shape), several)
    layouts = tuple((block.name, block.layout) for block in plan.blocks)
    return PerExampleGradients(blocks, layouts, plan.domain, examples, pulled.count if several else None)


def pulled_back(vectors: Pulled, loss: Loss, run: Pullback, targets: Any) -> OutputVectors:
    """The vectors for the outputs of each example."""
    outputs = run.outputs
    if vectors == "outputs":
        if outputs.ndim == 0:
            raise ShapeError("vectors='outputs' needs outputs [N, ...], got a number")
        shape, width = outputs.shape, math.prod(outputs.shape[1:])

        def units(start: int, stop: int) -> Tensor:
            rows = torch.eye(width, dtype=outputs.dtype, device=outputs.device)[start:stop]
            return rows.reshape(-1, 1, *shape[1:]).expand(-1, *shape)

        return OutputVectors(units, width, run.width)
    check_device(targets, outputs.device)
    if vectors == "type-2":
        columns = loss.columns(outputs)
        return OutputVectors(lambda start, stop: loss.sqrt_hessian(outputs, targets, start, stop), columns, run.width)
    gradient = loss.gradient(outputs, targets)
    return OutputVectors(lambda start, stop: gradient.unsqueeze(0), 1, 1)


def together(stacks: list[WeightUse]) -> WeightUse:
    """A use with the gradients of all stacks of vectors."""
    if len(stacks) == 1:
        return stacks[0]
    return WeightUse(stacks[0].rows, torch.cat([use.g for use in stacks]), stacks[0].transposed)


def kept(layer: Layer, operand: Tensor | None, examples: int) -> Any:
    """What is to be kept of a layer's input."""
    if isinstance(layer, KroneckerLayer):
        assert operand is not None
        return layer.rows(operand, examples), layer.keep(operand, examples)
    assert isinstance(layer, Elementwise)
    if operand is None or layer.scale is None:
        return None
    return full_precision(operand).clone()  # the model may change its own in place
