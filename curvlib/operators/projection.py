"""Projections R o curv: a sketch folded into the factors of an operator.

For a Kronecker block, R_left and R_right act on the two sides, so that the projection of V is the small matrix
M_left V M_right^T with M_left = R_left G and M_right = R_right A. With curv = K^(-1/2), the inner product of two
projected gradients estimates g^T K^-1 h. Of a gradient that is a sum over positions of g a^T, it is the sum of
(M_left g) (M_right a)^T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.errors import PytreeError, naming
from curvlib.operators.base import Operator
from curvlib.operators.blocks import BlockDiagonal, Layouts
from curvlib.operators.layout import Layout, Region
from curvlib.operators.sketch import Compressor, Sides
from curvlib.operators.summary import tensors_by_block
from curvlib.operators.vectors import cast, floating_dtype, vector_leaves, widest
from curvlib.pytree import Domain, Tree, register, static

if TYPE_CHECKING:
    from curvlib.gradients.per_example import BlockGradients, ExampleGradients
    from curvlib.losses import Loss


@register
class Projection:
    """The map from vectors to small tensors, one a block.

    Args:
        sides: (M_left [*, p, m], M_right [*, q, n]) of a Kronecker block; with weights [*, p, q] that entries are
            multiplied by if the eigenvalues do not factor; or (M [p, *shape],) of a block without sides.
        layouts: which elements of which parameters make up each block.
        domain: structure, names and shapes of the parameters.

    Example:
        >>> import torch, curvlib as cv
        >>> params = {"w": torch.ones(3, 4)}
        >>> curv = cv.kfac(lambda p, x: x @ p["w"], params, (torch.randn(9, 3), torch.zeros(9, dtype=torch.long)))
        >>> projection = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(params, rank=2))
        >>> projection(params)["w"].shape
        torch.Size([2, 2])
    """

    sides: dict[str, Sides]
    layouts: Layouts = static()
    domain: Domain = static()

    def __repr__(self) -> str:
        return tensors_by_block("Projection", self.domain, self.sides)

    def __call__(self, v: Tree) -> dict[str, Tensor]:
        """{block: M_left V M_right^T [*, p, q]}, or {block: M v [p]} for a block without sides.

        As for products with an operator, the result has the dtype of the vector (of per-example gradients, theirs).

        Raises:
            PytreeError, ShapeError: v is not a vector of the domain; the message names the leaf.
            DtypeError: a leaf is not of a floating dtype; names it.
        """
        vector_leaves(v)
        leaves = self.domain.leaves(v)
        return {name: projected(self.sides[name], layout.gather(leaves), 0) for name, layout in self.layouts}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every block's projection of one vector."""
        return {name: projected_shape(self.sides[name], layout) for name, layout in self.layouts}

    def per_example(
        self, model_fn: Callable[[Any, Any], Any], params: Tree, batch: Any, *, loss: Loss | None = None
    ) -> dict[str, Tensor]:
        """The projections of per-example gradients, each that of the example's own, unreduced loss term.

        They are made of what layers read and of gradients of their outputs; a gradient of a weight is formed only where
        that takes fewer multiplications, or where the operator's blocks are others than the model's layers.

        Args:
            model_fn: pure function (params, inputs) -> outputs [N, ...].
            params: pytree of tensors, like those that the curvature was made for.
            batch: (inputs, targets) with N examples, or a whole data set `over` a loader.
            loss: the objective; None: `CrossEntropy`.

        Returns:
            {block: [N, *, p, q]}, or {block: [N, p]} for a block without sides.

        Raises:
            PytreeError: the curvature was made for other parameters.
            CaptureError: a parameter is used by a call that is not understood.
            TargetError: the targets do not fit the loss.
            ArgumentError: the loader is in random order.

        Example:
            >>> import curvlib as cv
            >>> from curvlib.operators import EigenSketch
            >>> params = {"w": torch.ones(3, 4)}
            >>> model_fn, batch = lambda p, x: x @ p["w"], (torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
            >>> root = cv.kfac(model_fn, params, batch).power(-0.5, 0.1)
            >>> root.project(EigenSketch(rank=2)).per_example(model_fn, params, batch)["w"].shape
            torch.Size([9, 2, 2])
        """
        from curvlib.estimators.observations import planned  # estimators are made of operators
        from curvlib.gradients.data import check_order
        from curvlib.gradients.per_example import example_gradients
        from curvlib.losses import CrossEntropy

        if Domain.of(params) != self.domain:
            raise PytreeError("the projection was made for params of another structure or other shapes")
        check_order(batch, "projections have one row an example, in the order of the data")
        parts = []
        for plan, inputs, targets in planned(model_fn, params, batch, None):
            loss = CrossEntropy() if loss is None else loss
            gradients = example_gradients(model_fn, params, (inputs, targets), loss=loss, plan=plan)
            parts.append(self.of_examples(gradients))
        return {name: torch.cat([part[name] for part in parts]) for name, _ in self.layouts}

    def of_examples(self, gradients: ExampleGradients) -> dict[str, Tensor]:
        """The projections of per-example gradients that are already there."""
        known = {name: sequences(layout) for name, layout in gradients.layouts}
        other = [(name, layout) for name, layout in self.layouts if known.get(name) != sequences(layout)]
        found: dict[str, list[Tensor]] = {name: [] for name, _ in other}
        for start, stop in gradients.ranges() if other else ():
            leaves = self.domain.leaves(gradients.tree(start, stop), 1)
            for name, layout in other:
                found[name].append(projected(self.sides[name], layout.gather(leaves), 1))
        return {
            name: torch.cat(found[name]) if name in found else of_rows(self.sides[name], gradients.blocks[name])
            for name, _ in self.layouts
        }


def sequences(layout: Layout) -> tuple[object, ...]:
    """Equal for layouts that gather the same tensor."""
    return tuple(piece.sequence for piece in layout.pieces)


def projected_shape(sides: Sides, layout: Layout) -> tuple[int, ...]:
    """The shape of the projection of one of a block's vectors."""
    if len(sides) == 1:
        return (sides[0].shape[0],)
    left, right, *_ = sides
    front = torch.broadcast_shapes(layout.shape[:-2], left.shape[:-2], right.shape[:-2])
    return (*front, left.shape[-2], right.shape[-2])


def projected(sides: Sides, vectors: Tensor, leading: int) -> Tensor:
    """The projections of a block's vectors [*lead, *shape], in their dtype."""
    dtype = vectors.dtype
    vectors, sides = cast((vectors, sides), widest([dtype, *(side.dtype for side in sides)]))
    match sides:
        case (left, right, weights):
            return (weights * (left @ vectors @ right.mT)).to(dtype)
        case (left, right):
            return (left @ vectors @ right.mT).to(dtype)
        case (rows,):
            flat = rows.flatten(1)
            return (vectors.flatten(leading) @ flat.mT if leading else flat @ vectors.reshape(-1)).to(dtype)
    raise AssertionError(f"a block has one to three tensors, not {len(sides)}")


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
            return gradients.inner(rows).mT.to(dtype)
    raise AssertionError(f"a block has one to three tensors, not {len(sides)}")


def project(curv: Operator, compressor: Compressor) -> Projection:
    """R o curv, block by block."""
    if not isinstance(curv, BlockDiagonal):
        region = Region.whole(0, curv.domain.shapes[0])
        curv = BlockDiagonal({"params": curv}, (("params", Layout((region,))),), curv.domain)
    compressor.check(curv.domain)
    sides = {}
    for name, _, block in curv.items():
        with naming(name):
            sides[name] = compressor.fold(block, name)
    return Projection(sides, curv.layouts, curv.domain)
