"""Projections R o curv: a sketch folded into the factors of an operator.

For a Kronecker block, R_left and R_right act on the two sides, so that the projection of V is the small matrix
M_left V M_right^T with M_left = R_left G and M_right = R_right A. With curv = K^(-1/2), the inner product of two
projected gradients estimates g^T K^-1 h. Of a gradient that is a sum over positions of g a^T, it is the sum of
(M_left g) (M_right a)^T.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from curvlib.errors import naming
from curvlib.operators.base import Operator
from curvlib.operators.blocks import BlockDiagonal, Layouts
from curvlib.operators.layout import Layout, Region
from curvlib.operators.sketch import Compressor, Sides
from curvlib.operators.summary import tensors_by_block
from curvlib.operators.vectors import cast, vector_leaves, widest
from curvlib.pytree import Domain, Tree, register, static


@runtime_checkable
class Projectable(Protocol):
    """What is projected from the form it is kept in, such as the gradients of examples, which are kept as rows."""

    def projected_by(self, projection: Projection) -> dict[str, Tensor]:
        """Their projections, by block, with axes of their own in front."""


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

    def __call__(self, v: Tree | Projectable) -> dict[str, Tensor]:
        """{block: M_left V M_right^T [*, p, q]}, or {block: M v [p]} for a block without sides.

        As for products with an operator, the result has the dtype of the vector (of per-example gradients, theirs).

        Args:
            v: a vector, a pytree like params; or the gradients of N examples, `per_example_gradients`, whose
                projections have N rows, [N, *, p, q].

        Raises:
            PytreeError, ShapeError: v is not a vector of the domain; the message names the leaf.
            DtypeError: a leaf is not of a floating dtype; names it.

        Example:
            >>> import curvlib as cv
            >>> params = {"w": torch.ones(3, 4)}
            >>> model_fn, batch = lambda p, x: x @ p["w"], (torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
            >>> projection = cv.kfac(model_fn, params, batch).power(-0.5, 0.1).project(cv.EigenSketch(rank=2))
            >>> projection(cv.per_example_gradients(model_fn, params, batch))["w"].shape
            torch.Size([9, 2, 2])
        """
        if isinstance(v, Projectable):
            return v.projected_by(self)
        vector_leaves(v)
        leaves = self.domain.leaves(v)
        return {name: projected(self.sides[name], layout.gather(leaves), 0) for name, layout in self.layouts}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every block's projection of one vector."""
        return {name: projected_shape(self.sides[name], layout) for name, layout in self.layouts}


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
