"""The Kronecker product nearest to an operator, in the Frobenius norm.

Van Loan's rearrangement makes it a singular value problem: with R(K)[(i, k), (j, l)] = K[(i, j), (k, l)],
||K - G (x) A||_F = ||R(K) - vec(G) vec(A)^T||_F. (Van Loan & Pitsianis 1993, Approximation with Kronecker products.)
Operators that are made of few products, or have a Kronecker eigenbasis, have a small problem of their own; others are
looked at through their products with vectors, see `curvlib.operators.rearranged`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, NotKroneckerError, ShapeError
from curvlib.linalg.eigh import eigh
from curvlib.operators.base import Operator
from curvlib.operators.bases import Basis, CanonicalBasis
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.matrices import Dense, Diagonal, EigenMatrix, Matrix, ScaledIdentity
from curvlib.operators.rearranged import leading_triples
from curvlib.operators.shifted import Shifted
from curvlib.operators.sum_inverses import as_product, identity
from curvlib.operators.sums import Sum, lazy_sum


def nearest_kronecker(
    operator: Operator,
    *,
    shape: tuple[int, ...] | None = None,
    terms: int = 1,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 100,
) -> Operator:
    """The Kronecker product G (x) A, or the sum of several, that is nearest to an operator in the Frobenius norm.

    A Kronecker product is returned as it is. Factors are symmetric, and those of a positive semidefinite operator are
    so too (the first product's: a second one only corrects it). Sums of r Kronecker products take an r x r singular
    value problem, and operators with a Kronecker eigenbasis that of their eigenvalues [m, n].

    All others take sweeps of power iteration on the rearranged operator, accelerated by block Lanczos: the error falls
    by (s_2 / s_1)^2 a sweep or faster, with s the singular values. A sweep applies the operator to all m n unit
    vectors, min(m, n) at a time. That costs what `to_dense` does, but needs memory for min(m, n) vectors only. It looks
    at values: not under `torch.func.vmap` or in a trace.

    Args:
        operator: a block on matrices [*, m, n] (leading axes are groups, with one operator each), or a `BlockDiagonal`,
            whose blocks on matrices are approximated and whose others stay.
        shape: [*, m, n], to view the vectors of one block by; None: as they are.
        terms: the number of products.
        generator: the source of the sweeps' start; None: a fresh one with seed 0.
        tolerance: of a singular triple's residual, relative to the largest singular value squared.
        max_iterations: sweeps after which to give up.

    Returns:
        A `Kronecker`, or a `Sum` of as many as asked for (fewer if fewer are exact), or a `BlockDiagonal` of them.

    Raises:
        ArgumentError: terms is not positive, or shape is given for several blocks.
        ShapeError: the shape does not have the vectors' number of elements.
        NotKroneckerError: the vectors are not matrices.
        ConvergenceError: the tolerance was not reached.

    Example:
        >>> one, two = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), Dense(torch.eye(3))
        >>> total = Kronecker(one, two) + Kronecker(Diagonal(torch.tensor([1.0, 0.0])), two)
        >>> nearest = nearest_kronecker(total)
        >>> type(nearest).__name__, float((nearest.to_dense() - total.to_dense()).norm()) < 1e-5
        ('Kronecker', True)
    """
    if terms < 1:
        raise ArgumentError(f"terms must be at least 1, got {terms}")
    if isinstance(operator, BlockDiagonal):
        if shape is not None:
            raise ArgumentError("shape is for one block; blocks of a curvature have shapes of their own")

        def approximate(block: Operator) -> Operator:
            if len(block.domain.shapes[0]) < 2:
                return block
            return nearest_kronecker(
                block, terms=terms, generator=generator, tolerance=tolerance, max_iterations=max_iterations
            )

        return operator.map_blocks(approximate)
    viewed = matrix_shape(operator, shape)
    exact = in_closed_form(operator, terms) if viewed == operator.domain.shapes[0] else None
    if exact is not None:
        return exact
    left, values, right = leading_triples(operator, viewed, terms, generator, tolerance, max_iterations)
    return assembled(left, values, right, 1e3 * max(tolerance, torch.finfo(values.dtype).eps))


def matrix_shape(operator: Operator, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape to view vectors by, checked."""
    if len(operator.domain.shapes) > 1:
        raise NotKroneckerError(
            f"the operator acts on {len(operator.domain.shapes)} tensors at once: take its blocks, or a BlockDiagonal"
        )
    own = operator.domain.shapes[0]
    viewed = own if shape is None else tuple(shape)
    if math.prod(viewed) != math.prod(own):
        raise ShapeError(f"vectors of shape {own} cannot be viewed as matrices {viewed}")
    if len(viewed) < 2:
        raise NotKroneckerError(f"vectors of shape {own} are not matrices: pass shape=(m, n)")
    return viewed


# --- closed forms ---------------------------------------------------------------------------------------------------


def in_closed_form(operator: Operator, terms: int) -> Operator | None:
    """The nearest products where that is a small problem."""
    match operator:
        case Kronecker():
            return operator
        case ScaledIdentity():
            return as_product(operator)
        case Diagonal(values=values):
            return separated(CanonicalBasis(values.shape[-2]), CanonicalBasis(values.shape[-1]), values, terms)
        case EigenKronecker(left=left, right=right, values=values):
            return separated(left, right, values, terms)
        case Sum():
            return combined([as_product(term) for term in operator.terms], terms)
        case Shifted(operator=Sum() as total, shift=shift):
            return combined([*map(as_product, total.terms), identity(shift, operator.domain.shapes[0])], terms)
    return None


def separated(left: Basis, right: Basis, values: Tensor, terms: int) -> Operator:
    """An operator with a Kronecker eigenbasis: the singular value problem of its eigenvalues [*, m, n]."""
    rows, columns = (multiplicities(basis, values.shape[axis], values) for basis, axis in ((left, -2), (right, -1)))
    u, s, vh = torch.linalg.svd(rows.sqrt().unsqueeze(-1) * values * columns.sqrt(), full_matrices=False)
    products = []
    for i in range(min(terms, s.shape[-1])):
        mu, nu = u[..., :, i] / rows.sqrt(), vh[..., i, :] / columns.sqrt()
        root = s[..., i, None].sqrt() * sign(left.total(mu)).unsqueeze(-1)
        sides = [root * mu, root * nu]
        if i == 0:
            sides = [without_rounding(side, side.shape[-1] * torch.finfo(side.dtype).eps) for side in sides]
        products.append(Kronecker(in_basis(left, sides[0]), in_basis(right, sides[1])))
    return summed(products)


def multiplicities(basis: Basis, count: int, like: Tensor) -> Tensor:
    """How often each of a basis's eigenvalues occurs, [r]."""
    return basis.total(torch.eye(count, dtype=like.dtype, device=like.device))


def in_basis(basis: Basis, values: Tensor) -> Matrix:
    """The matrix with these eigenvectors and eigenvalues."""
    return Diagonal(values) if isinstance(basis, CanonicalBasis) else EigenMatrix(basis, values)


def combined(products: list[Kronecker | None], terms: int) -> Operator | None:
    """A sum of r products by fewer: R(K) = P Q^T with vec(G_k), vec(A_k) in the columns, and a core of r x r."""
    known = [product for product in products if product is not None]
    if len(known) < len(products):
        return None
    (p, left_diagonal), (q, right_diagonal) = (
        coordinates(sides) for sides in ([x.left for x in known], [x.right for x in known])
    )
    (p, left_core), (q, right_core) = torch.linalg.qr(p), torch.linalg.qr(q)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    count = min(terms, s.shape[-1])
    left, right = (p @ u[..., :count]).mT, (q @ vh.mT[..., :count]).mT
    if not left_diagonal:
        left = left.unflatten(-1, (known[0].left.shape[-1], -1))
    if not right_diagonal:
        right = right.unflatten(-1, (known[0].right.shape[-1], -1))
    return assembled(left, s[..., :count], right, 16 * torch.finfo(s.dtype).eps, left_diagonal, right_diagonal)


def coordinates(sides: list[Matrix]) -> tuple[Tensor, bool]:
    """The sides' entries [*, d * d, r], or their diagonals [*, d, r] and True where they have no other entries."""
    diagonal = all(isinstance(side, (Diagonal, ScaledIdentity)) for side in sides)
    entries = [side.diag() if diagonal else side.matrices().flatten(-2) for side in sides]
    return torch.stack(torch.broadcast_tensors(*entries), -1), diagonal


# --- from singular triples to products ------------------------------------------------------------------------------


def assembled(
    left: Tensor,
    values: Tensor,
    right: Tensor,
    rounding: float,
    left_diagonal: bool = False,
    right_diagonal: bool = False,
) -> Operator:
    """The sum of s_i X_i (x) Y_i for X [*, r, m, m], s [*, r], Y [*, r, n, n]; a diagonal side is [*, r, d].

    Of the two signs of a triple, that with a positive trace on the left is taken.
    """
    products = []
    for i in range(values.shape[-1]):
        x, y = (
            side.select(-2 if diagonal else -3, i)
            for side, diagonal in ((left, left_diagonal), (right, right_diagonal))
        )
        entries = x if left_diagonal else x.diagonal(dim1=-2, dim2=-1)
        root, orientation = values[..., i].sqrt(), sign(entries.sum(-1))
        limit = rounding if i == 0 else None
        products.append(
            Kronecker(
                as_side(x, root * orientation, left_diagonal, limit),
                as_side(y, root * orientation, right_diagonal, limit),
            )
        )
    return summed(products)


def as_side(entries: Tensor, factor: Tensor, diagonal: bool, limit: float | None) -> Matrix:
    """Factor times the entries as a side; with a limit, negative eigenvalues of that relative size are rounding."""
    if diagonal:
        values = factor.unsqueeze(-1) * entries
        return Diagonal(values if limit is None else without_rounding(values, limit * values.shape[-1]))
    matrix = factor[..., None, None] * (entries + entries.mT) / 2
    if limit is None:
        return Dense(matrix)
    eigenvalues, vectors = eigh(matrix)
    rounded = without_rounding(eigenvalues, limit * eigenvalues.shape[-1])
    return Dense(matrix + (vectors * (rounded - eigenvalues).unsqueeze(-2)) @ vectors.mT)


def without_rounding(values: Tensor, limit: float) -> Tensor:
    """Values [*, d] in which negative ones, down to the limit times the largest magnitude, are 0."""
    floor = -limit * values.abs().amax(-1, keepdim=True)
    return torch.where((values < 0) & (values >= floor), 0, values)


def sign(trace: Tensor) -> Tensor:
    """1 or -1."""
    return torch.where(trace < 0, -1.0, 1.0).to(trace.dtype)


def summed(products: list[Kronecker]) -> Operator:
    """The sum of products."""
    return products[0] if len(products) == 1 else lazy_sum(*products)
