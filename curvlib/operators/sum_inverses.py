"""Inverses of sums: direct for what amounts to two Kronecker products, approximate for more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.linalg.low_rank import low_rank_sum
from curvlib.operators.base import Operator, powers
from curvlib.operators.block_side import DenseBlocks, block_runs_of, diagonal_blocks
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.damping import Tikhonov
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.low_rank import LowRank
from curvlib.operators.matrices import Dense, Diagonal, EigenMatrix, Matrix, ScaledIdentity
from curvlib.operators.simultaneous import Columns, SimultaneousKronecker, frames, inverse_of_two, mapped, values_in

Terms = tuple[Operator, ...]
Form = tuple[Columns, Columns, Tensor]  # bases, and a value for each pair of their vectors


def direct_inverse(terms: Terms, shift: Tensor | None, *, damped: bool) -> Operator | None:
    """The inverse of the sum of the terms and shift I, if that is a sum of two Kronecker products.

    The identity is a Kronecker product, so that G (x) A + d I is one; and it is absorbed by a product with a multiple
    of the identity on one side.

    Raises:
        SingularError: the sum is singular.
    """
    products = [product for product in map(as_product, terms) if product is not None]
    if len(products) < len(terms) or has_low_rank(products):
        return None
    if shift is not None:
        absorbed = (absorb(product, shift) for product in products)
        first = next(((i, product) for i, product in enumerate(absorbed) if product is not None), None)
        if first is None:
            products.append(identity(shift, products[0].shape))
        else:
            products[first[0]] = first[1]
    return inverse_of_two(products, damped=damped) if len(products) == 2 else None


def has_low_rank(terms: Sequence[Operator]) -> bool:
    """Whether a side is low-rank: a dense matrix of its width may be too large to make."""
    return any(
        isinstance(side, LowRank) for term in terms if isinstance(term, Kronecker) for side in (term.left, term.right)
    )


def as_product(term: Operator) -> Kronecker | None:
    """A term as a Kronecker product, if it is one."""
    match term:
        case Kronecker():
            return term
        case ScaledIdentity() if len(term.shape) > 1:
            return identity(term.scale, term.shape)
    return None


def identity(scale: Tensor, shape: tuple[int, ...]) -> Kronecker:
    """Scale times the identity on tensors of this shape, [*, m, n]."""
    return Kronecker(ScaledIdentity(scale, shape[:-1]), ScaledIdentity(torch.ones_like(scale), shape[-1:]))


def absorb(product: Kronecker, shift: Tensor) -> Kronecker | None:
    """G (x) c I + d I = (c G + d I) (x) I, if a side is a multiple of the identity."""
    match product.left, product.right:
        case ScaledIdentity() as left, ScaledIdentity() as right:
            return identity(left.scale * right.scale + shift, product.shape)
        case left, ScaledIdentity() as right:
            return Kronecker(moved(left, right.scale, shift), ScaledIdentity(torch.ones_like(right.scale), right.shape))
        case ScaledIdentity() as left, right:
            return Kronecker(ScaledIdentity(torch.ones_like(left.scale), left.shape), moved(right, left.scale, shift))
    return None


def moved(side: Matrix, factor: Tensor, shift: Tensor) -> Matrix:
    """Factor * side + shift I, without an eigendecomposition."""
    match side:
        case Diagonal(values=values):
            return Diagonal(factor * values + shift)
        case EigenMatrix(basis=basis, values=values):
            return EigenMatrix(basis, factor * values + shift)
        case DenseBlocks():
            shifts = diagonal_blocks(ScaledIdentity(shift, side.shape), side.runs)
            return side.map_stacks(lambda stack, added: factor * stack + added, shifts)
    matrices = side.matrices()
    unit = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return Dense(factor * matrices + shift * unit)


def rough_inverse(terms: Terms, shift: Tensor | None, *, damped: bool) -> Operator:
    """An approximation of the inverse of the sum of the terms and shift I, to precondition with.

    Kronecker products are diagonal, or nearly so, in a `frame`; everything else is projected to the frame's diagonal.
    The frame is made for the damping: what is added to a side's metric is half the root of the relative damping, of the
    order of what `FactoredTikhonov` adds. With two products and little damping that is next to exact, and with much
    damping the frame is next to orthonormal. Without a Kronecker product an operator with a Kronecker eigenbasis gives
    the frame, and without either the diagonal must do. Products with low-rank sides are merged, and of curvatures with
    different blocks the first is taken.

    Raises:
        SingularError: nothing is added to singular terms.
    """
    if isinstance(terms[0], BlockDiagonal):
        rough = terms[0] if shift is None else terms[0].damp(Tikhonov(shift))
        return rough._power(-1, damped=damped)
    products = [term for term in terms if isinstance(term, Kronecker)]
    if has_low_rank(products):
        return merged(products, shift)._power(-1, damped=damped)
    corrected = [term for term in terms if isinstance(term, EigenKronecker)][:1]
    kept = {id(term) for term in products or corrected}
    rest = total_diagonal([term for term in terms if id(term) not in kept], shift, terms[0])
    form = kronecker_form(products, rest) if products else eigen_form(corrected)
    if form is None:
        return Diagonal(total_diagonal(terms, shift, terms[0]))._power(-1, damped=damped)
    left, right, values = form
    values = values + projected(rest, left, right)
    return SimultaneousKronecker(left, right, powers(values.flatten(-2), -1, damped=damped).reshape(values.shape))


def total_diagonal(terms: Sequence[Operator], shift: Tensor | None, like: Operator) -> Tensor:
    """The diagonal of the sum of the terms and shift I, which act on the tensors that ``like`` acts on."""
    diagonal = sum((term.diag() for term in terms), torch.zeros_like(like.diag()))
    return diagonal if shift is None else diagonal + shift


def kronecker_form(products: Sequence[Kronecker], rest: Tensor) -> Form | None:
    """The frame of products to which a diagonal is added, and their values in it."""
    mean = torch.stack([product.trace() for product in products]).sum() / rest.numel()
    relative = torch.where(mean > 0, rest.mean() / mean, 1).clamp(min=0)
    both = frames(products, 0.5 * relative.sqrt() + torch.finfo(rest.dtype).eps ** 0.5)
    if both is None:
        return None
    left, right = both[0].basis, both[1].basis
    return left, right, values_in(products, left, right)


def eigen_form(terms: Sequence[EigenKronecker]) -> Form | None:
    """The bases and eigenvalues of the first term, if there is one and its bases are not low-rank."""
    for term in terms:
        if isinstance(term.left, Columns) and isinstance(term.right, Columns):
            return term.left, term.right, term.values
    return None


def merged(products: Sequence[Kronecker], shift: Tensor | None) -> Operator:
    """(sum_i G_i) (x) (mean_i A_i) + shift I in place of the sum of products; low-rank sides stay low-rank."""
    left, right = (merged_side(sides) for sides in ([x.left for x in products], [x.right for x in products]))
    result = Kronecker(left, right)._scale(1 / len(products))
    return result if shift is None else result.damp(Tikhonov(shift))


def merged_side(sides: Sequence[Matrix]) -> Matrix:
    """The sum of sides; an approximation of it if one is low-rank or of blocks, never a dense matrix then."""
    runs = next((found for found in map(block_runs_of, sides) if found is not None), None)
    if runs is not None:
        stacks = zip(*(diagonal_blocks(side, runs) for side in sides), strict=True)
        return DenseBlocks(tuple(torch.stack(torch.broadcast_tensors(*blocks)).sum(0) for blocks in stacks))
    low_rank = [side for side in sides if isinstance(side, LowRank)]
    if not low_rank:
        return Dense(torch.stack(torch.broadcast_tensors(*(side.matrices() for side in sides))).sum(0))
    if len(low_rank) == len(sides):
        ranks = [side.vectors.shape[-1] for side in low_rank]
        return LowRank(*low_rank_sum([side.factor() for side in low_rank], [1.0] * len(ranks), max(ranks)))
    return Diagonal(torch.stack(torch.broadcast_tensors(*(side.diag() for side in sides))).sum(0))


def projected(diagonal: Tensor, left: Columns, right: Columns) -> Tensor:
    """The diagonal of (W (x) Z)^T diag(D) (W (x) Z), [*, m, n]: (W o W)^T D (Z o Z)."""
    squared = [mapped(basis, lambda w: w.square().mT) for basis in (left, right)]
    return squared[1].synthesise_right(squared[0].synthesise_left(diagonal))
