"""Projections R o curv: a sketch folded into the factors of an operator.

For a Kronecker block, R_left and R_right act on the two sides, so that the projection of V is the small matrix
M_left V M_right^T with M_left = R_left G and M_right = R_right A. With curv = K^(-1/2), the inner product of two
projected gradients estimates g^T K^-1 h.
"""

from __future__ import annotations

from torch import Tensor

from curvlib.errors import NotKroneckerError, PytreeError, naming
from curvlib.operators.base import Operator
from curvlib.operators.blocks import BlockDiagonal, Layouts
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.layout import Layout, Region
from curvlib.operators.matrices import Matrix
from curvlib.operators.sketch import Sketch
from curvlib.pytree import Domain, Tree, register, static

Sides = tuple[Tensor, ...]


@register
class Projection:
    """The map from vectors to small tensors, one a block.

    Args:
        sides: (M_left [*, p, m], M_right [*, q, n]) of a Kronecker block, or (M [p, *shape],) of a block without sides.
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

    def __call__(self, v: Tree) -> dict[str, Tensor]:
        """{block: M_left V M_right^T [*, p, q]}, or {block: M v [p]} for a block without sides.

        Raises:
            PytreeError, ShapeError: v is not a vector of the domain; the message names the leaf.
        """
        leaves = self.domain.leaves(v)
        projected = {}
        for name, layout in self.layouts:
            vector = layout.gather(leaves)
            match self.sides[name]:
                case (left, right):
                    projected[name] = left @ vector @ right.mT
                case (rows,):
                    projected[name] = rows.flatten(1) @ vector.reshape(-1)
        return projected


def project(curv: Operator, sketch: Sketch) -> Projection:
    """R o curv, block by block."""
    if not isinstance(curv, BlockDiagonal):
        domain = Domain.of_tensor(curv.shapes[0])
        region = Region.whole(0, curv.shapes[0])
        curv = BlockDiagonal({"params": curv}, (("params", Layout((region,))),), domain)
    if curv.domain != sketch.domain:
        raise PytreeError("the sketch was made for a pytree of another structure or other shapes; make it from params")
    sides = {}
    for name, _, block in curv.items():
        with naming(name):
            sides[name] = fold(block, name, sketch)
    return Projection(sides, curv.layouts, curv.domain)


def fold(block: object, name: str, sketch: Sketch) -> Sides:
    """R o block as small matrices.

    Raises:
        NotKroneckerError: the block has no factor a side.
    """
    match block:
        case Kronecker(left=left, right=right):
            sides = ("left", left), ("right", right)
            return tuple(side.right(sketch.matrix(name, label, side.shape[-1], like(side))) for label, side in sides)
        case Matrix():
            rows = sketch.matrix(name, "rows", block.size, like(block))
            return (block.apply(rows.reshape(-1, *block.shape), 1),)
    reason = "its eigenvalues do not factor" if isinstance(block, EigenKronecker) else "it is not a Kronecker product"
    raise NotKroneckerError(
        f"a {type(block).__name__} has no factor a side to fold a sketch into ({reason}): use FactoredTikhonov damping "
        "in place of a number, or apply the operator to the full vector first and sketch the result (R @ curv)"
    )


def like(side: Matrix) -> Tensor:
    """A tensor with the side's dtype and device."""
    return side.diagonals()
