"""Curvature from gradients: what Shampoo, KL-Shampoo and DyKAF share.

A block's gradient is a matrix or a tensor D [n_1, ..., n_d] with one factor an axis, or mode; the curvature is a
running mean of g g^T, g = vec D, of which only the factors are kept. For d = 2 that is a `Kronecker` product, for d > 2
one whose right side is a `KroneckerSide`. Vectors and scalars have their second moment itself, or its diagonal.

Where gradients come from is another matter: see `observations` for those of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, naming
from curvlib.factors.axes import entrywise
from curvlib.layers.wide import Wide, WideDiagonal, announce, as_side
from curvlib.linalg.low_rank import LowRankFactor, low_rank_gram, low_rank_sum
from curvlib.linalg.middle_gram import middle_gram
from curvlib.operators import (
    BlockDiagonal,
    Dense,
    DenseBlocks,
    Diagonal,
    Kronecker,
    KroneckerSide,
    Layout,
    LowRank,
    Matrix,
    Operator,
    Region,
    ScaledIdentity,
    ScaledPower,
)
from curvlib.operators.block_side import cut_columns
from curvlib.operators.vectors import at_least_single, widest
from curvlib.pytree import Domain, Tree

Number = float | Tensor
Modes = tuple[Matrix, ...]  # the factor of every axis
Start = Callable[
    [Tensor, int, Wide, Number | None], Kronecker
]  # D [*, n_1, ..., n_d], d, what is kept of wide sides, b
Advance = Callable[[Kronecker, Tensor, Number, Number], Kronecker]  # F, D, a, w -> a F + w g g^T


# --- blocks and their factors -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block is in the parameters, and the widths of its factors: none for an elementwise one."""

    name: str
    layout: Layout
    widths: tuple[int, ...]


def places_of_leaves(domain: Domain) -> tuple[Place, ...]:
    """One block a leaf: a leaf of order d >= 2 as the matrix [n_1, n_2 ... n_d], others as a vector."""
    places = []
    for number, (name, shape) in enumerate(zip(domain.names, domain.shapes, strict=True)):
        region = Region.whole(number, shape)
        matrix = (shape[0], region.numel // max(1, shape[0])) if len(shape) > 1 else (region.numel,)
        places.append(Place(name, Layout((region.reshape(*matrix),)), shape if len(shape) > 1 else ()))
    return tuple(places)


def modes_of(block: Kronecker) -> Modes:
    """The factors of a block, one an axis."""
    match block.right:
        case KroneckerSide(factors=factors):
            return (block.left, *factors)
    return block.left, block.right


def block_of(modes: Sequence[Matrix]) -> Kronecker:
    """The block with these factors."""
    left, *right = modes
    return Kronecker(left, right[0] if len(right) == 1 else KroneckerSide(tuple(right)))


def parts_of(side: Matrix) -> tuple[Matrix, Tensor, float]:
    """M, c and p of a side c M^p."""
    match side:
        case ScaledPower(base=base, scale=scale, exponent=exponent):
            return base, scale, exponent
    like = side.diag()
    return side, like.new_ones(like.shape[:-1]), 1.0


def entries(matrix: Matrix) -> Tensor:
    """The numbers of a factor: [*, n, n], or [*, n] of a diagonal one.

    Raises:
        ArgumentError: it is in another form.
    """
    match matrix:
        case Dense(matrix=values) | Diagonal(values=values):
            return values
    raise ArgumentError(
        f"a {type(matrix).__name__} has no factors to update; update the curvature that init, update or the estimator "
        "returned, and take powers and inverses of the result"
    )


def factor_like(matrix: Matrix, values: Tensor) -> Matrix:
    """A factor of the same form."""
    return Diagonal(values) if isinstance(matrix, Diagonal) else Dense(values)


def is_diagonal(matrix: Matrix) -> bool:
    """Whether a factor is that of a wide side."""
    return isinstance(matrix, Diagonal)


def factor_of(rows: Tensor, groups: int, wide: Wide) -> Matrix:
    """The sum of r r^T over rows [*groups, n, d], or what is kept of it."""
    return Dense(middle_gram(rows.mT)) if rows.shape[-1] <= wide.above else as_side(wide.moment(rows), groups)


def advanced(factor: Matrix, old: Tensor, rows: Tensor, new: Number) -> Matrix:
    """Old [*] times a factor, plus ``new`` times the sum of r r^T over rows [*, n, d], in the form of the factor.

    Raises:
        ArgumentError: the factor is in another form than those of `factor_of`.
    """
    match factor:
        case Dense(matrix=matrix):
            return Dense(entrywise(old, matrix) * matrix + new * middle_gram(rows.mT))
        case Diagonal(values=values):
            return Diagonal(entrywise(old, values) * values + new * rows.square().sum(-2))
        case DenseBlocks():
            parts = cut_columns(rows, factor.runs)
            return factor.map_stacks(lambda x, part: entrywise(old, x) * x + new * middle_gram(part.mT), parts)
        case LowRank(vectors=vectors, values=values, remainder=remainder):
            kept = LowRankFactor(vectors, entrywise(old, values) * values, old * remainder)
            seen, rank = low_rank_gram(rows, vectors.shape[-1]), vectors.shape[-1]
            return LowRank(*low_rank_sum([kept, seen], [1.0, new * rows.shape[-2]], rank))
        case ScaledIdentity(scale=scale):
            return ScaledIdentity(old * scale + new * rows.square().sum() / rows.shape[-1], factor.vector)
        case ScaledPower(base=ScaledIdentity() as one, scale=scale):
            return ScaledPower(one, old * scale + new * rows.square().sum((-2, -1)) / rows.shape[-1], 1.0)
    raise ArgumentError(
        f"a {type(factor).__name__} has no factors to update; update the curvature that init, update or the estimator "
        "returned, and take powers and inverses of the result"
    )


# --- running means ----------------------------------------------------------------------------------------------


def begin(
    leaves: Sequence[Tensor],
    places: Sequence[Place],
    domain: Domain,
    start: Start,
    *,
    elementwise: str,
    wide: Wide,
    decay: Number | None = None,
) -> BlockDiagonal:
    """The curvature of the first gradient.

    Args:
        leaves: the gradient, in the order of the domain.
        places: the blocks.
        domain: of the parameters.
        start: makes a block of its gradient.
        elementwise: ``diagonal`` or ``dense``.
        wide: what is kept of factors that are too wide.
        decay: of the moving average that it begins; None: the gradient counts alone.
    """
    _, new = weights(decay)
    if elementwise not in ("diagonal", "dense"):
        raise ArgumentError(f"elementwise must be one of diagonal, dense, got {elementwise!r}")
    blocks: dict[str, Operator] = {}
    dtype = at_least_single(widest(leaf.dtype for leaf in leaves))
    for place in places:
        gradient = place.layout.gather(leaves).to(dtype)
        with naming(place.name):
            if place.widths:
                gradient = gradient.reshape(*gradient.shape[:-2], *place.widths)
                blocks[place.name] = start(gradient, len(place.widths), wide, decay)
            elif elementwise == "dense":
                blocks[place.name] = factor_of(new**0.5 * gradient.unsqueeze(0), 0, wide)
            else:
                blocks[place.name] = Diagonal(new * gradient.square())
    return BlockDiagonal(blocks, tuple((place.name, place.layout) for place in places), domain)


def wide_axes(gradient: Tensor, order: int, wide: Wide) -> tuple[bool, ...]:
    """Which axes have diagonal factors; says so, once a width."""
    widths = gradient.shape[-order:]
    for width in widths:
        if width > wide.above:
            announce(width, wide.above)
    return tuple(width > wide.above for width in widths)


def check_diagonal(wide: Wide, estimator: str) -> None:
    """Refuses choices that steps of an estimator cannot keep.

    Raises:
        ArgumentError: wide sides are to have factors that are not diagonal.
    """
    if not isinstance(wide, WideDiagonal):
        raise ArgumentError(
            f"{estimator} makes the factors of one side from those of the other in every step, and can only keep "
            f"those of wide sides diagonal: wide must be a WideDiagonal, got {wide!r}; a WideDiagonal of a greater "
            "width keeps them dense, and kfac, ekfac, tkfac and shampoo take every choice"
        )


def weights(decay: Number | None) -> tuple[Number, Number]:
    """What the curvature and the new gradient count: (decay, 1 - decay), or (1, 1) for a sum.

    Raises:
        ArgumentError: the decay is a number that is not between 0 and 1.
    """
    if decay is None:
        return 1.0, 1.0
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ArgumentError(f"decay must lie between 0 and 1, or be None for a sum, got {decay}")
    return decay, 1 - decay


def step(curv: BlockDiagonal, grads: Tree, decay: Number | None, advance: Advance) -> BlockDiagonal:
    """The curvature after one more gradient: decay * F + (1 - decay) g g^T, or F + g g^T.

    Raises:
        ArgumentError: the decay is out of range, or a block has no factors to update; names it.
        PytreeError, ShapeError: the gradient is not a vector of the curvature's domain; names the leaf.
    """
    old, new = weights(decay)
    dtype = at_least_single(curv.dtype)
    curv = curv if curv.dtypes == {dtype} else curv.to(dtype=dtype)
    blocks: dict[str, Operator] = {}
    gradients = curv.gather(grads, 0)
    for name, _, block in curv.items():
        gradient = gradients[name].to(dtype)
        with naming(name):
            match block:
                case Matrix():
                    one = torch.ones((), dtype=gradient.dtype, device=gradient.device)
                    blocks[name] = advanced(block, old * one, gradient.unsqueeze(0), new)
                case Kronecker():
                    widths = [mode.shape[-1] for mode in modes_of(block)]
                    gradient = gradient.reshape(*gradient.shape[:-2], *widths)
                    blocks[name] = advance(block, gradient, old, new)
                case _:
                    raise ArgumentError(
                        f"a {type(block).__name__} cannot be updated; update the curvature that init, update or the "
                        "estimator returned, and take powers and inverses of the result"
                    )
    return BlockDiagonal(blocks, curv.layouts, curv.domain)
