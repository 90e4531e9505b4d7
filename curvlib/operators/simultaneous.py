"""Two Kronecker products diagonalised at once, and what several have nearly in common.

For definite M there is W with W^T M W = I and W^T G W diagonal. With M = G_1 + G_2 on the left, and likewise Z on the
right, W^T G_k W = diag(g_k) and Z^T A_k Z = diag(a_k), so that (Van Loan & Golub, Matrix Computations, section 8.7)

    G_1 (x) A_1 + G_2 (x) A_2 = (W (x) Z)^-T diag(g_1 a_1^T + g_2 a_2^T) (W (x) Z)^-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curvlib.linalg.eager import is_eager
from curvlib.linalg.eigh import eigh
from curvlib.linalg.gram import full_precision
from curvlib.operators.base import Operator, powers, remembered
from curvlib.operators.bases import CanonicalBasis, OrthogonalBasis
from curvlib.operators.block_side import BlockBasis, Runs, block_runs_of, diagonal_blocks
from curvlib.operators.cholesky import CholeskyInverse, ShiftedDense
from curvlib.operators.damping import Damping
from curvlib.operators.interfaces import Determinant
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.lazy import Lazy, dense_operator
from curvlib.operators.matrices import Dense, Diagonal, EigenMatrix, Matrix, ScaledIdentity, normal
from curvlib.operators.vectors import check_shape
from curvlib.pytree import Domain, register

Columns = CanonicalBasis | OrthogonalBasis | BlockBasis  # of any invertible matrix: orthonormal or not


@register
class SimultaneousKronecker(Lazy, Determinant):
    """(W (x) Z) diag(l) (W (x) Z)^T with invertible W, Z: V -> W (l o (W^T V Z)) Z^T.

    The inverse of a sum of two Kronecker products is one. Its products, diagonal, trace, norm, determinant and inverse
    are exact and cost what those of an `EigenKronecker` do; l are not its eigenvalues.

    Args:
        left: the columns of W [*, m, m], not necessarily orthonormal.
        right: the columns of Z [*, n, n], not necessarily orthonormal.
        values: l [*, m, n].

    Example:
        >>> from curvlib.operators import Dense
        >>> one, two = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), Dense(torch.diag(torch.tensor([1.0, 3.0])))
        >>> total = Kronecker(one, two) + Kronecker(two, one)
        >>> inverse = total.inverse()
        >>> type(inverse).__name__, inverse.shape
        ('SimultaneousKronecker', (2, 2))
        >>> torch.allclose(total @ (inverse @ torch.eye(2)), torch.eye(2), atol=1e-5)
        True
    """

    left: Columns
    right: Columns
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a vector, [*, m, n]."""
        return tuple(self.values.shape)

    @property
    def domain(self) -> Domain:
        return Domain.of_tensor(self.shape)

    def form(self) -> EigenKronecker:
        """The same formula as that of an operator with orthonormal bases: what does not use them being orthonormal."""
        return EigenKronecker(self.left, self.right, self.values)

    def _apply(self, vectors: Tensor, leading: int) -> Tensor:
        check_shape(vectors, leading, self.shape)
        return self.form()._apply(vectors, leading)

    def to_dense(self) -> Tensor:
        return self.form().to_dense()

    def diag(self) -> Tensor:
        return self.form().diag()

    def trace(self) -> Tensor:
        return self.diag().sum()

    def frobenius_norm(self) -> Tensor:
        # ||W D W^T||^2 = <D, (P o P) D> for the Gram matrix P = W^T W
        left, right = (mapped(basis, lambda w: (w.mT @ w).square()) for basis in (self.left, self.right))
        squares = right.synthesise_right(left.synthesise_left(self.values))
        return (self.values * squares).sum().clamp(min=0).sqrt()

    @remembered
    def dense(self) -> Operator:
        return dense_operator(self, "the inverse of a sum of two Kronecker products")

    def _logdet(self) -> Tensor:
        """Log det, a 0-d tensor, in closed form: sum log l + 2 n log |det W| + 2 m log |det Z|."""
        *_, m, n = self.shape
        volumes = n * log_volume(self.left, self.values) + m * log_volume(self.right, self.values)
        return self.values.log().sum() + (2 * volumes.expand(self.shape[:-2])).sum()

    def damp(self, damping: Damping | float | Tensor) -> Operator:
        return self.dense().damp(damping)

    def _power(self, exponent: float, *, damped: bool) -> Operator:
        if exponent == 1:
            return self
        if exponent != -1:
            return self.dense()._power(exponent, damped=damped)
        values = powers(self.values.flatten(-2), -1, damped=damped).reshape(self.shape)
        return SimultaneousKronecker(dual(self.left), dual(self.right), values)

    def _scale(self, factor: float | Tensor) -> SimultaneousKronecker:
        return SimultaneousKronecker(self.left, self.right, factor * self.values)

    def _add(self, other: Operator) -> Operator | None:
        return None

    def _sample(self, generator: torch.Generator, n: int | None) -> Tensor:
        root = powers(self.values.flatten(-2), 0.5, damped=False).reshape(self.shape)
        return self.form().synthesise(root * normal(self.values, generator, n))


# --- bases that need not be orthonormal -----------------------------------------------------------------------------


def mapped(basis: Columns, fn: Callable[[Tensor], Tensor]) -> Columns:
    """The columns of fn(W), for a function that keeps the identity, and blocks on the diagonal, where they are."""
    match basis:
        case OrthogonalBasis(vectors=vectors):
            return OrthogonalBasis(fn(vectors))
        case BlockBasis(vectors=stacks):
            return BlockBasis(tuple(fn(stack) for stack in stacks))
    return basis


def log_volume(basis: Columns, like: Tensor) -> Tensor:
    """Log |det W|, [*]."""
    match basis:
        case OrthogonalBasis(vectors=vectors):
            return torch.linalg.slogdet(vectors).logabsdet
        case BlockBasis(vectors=stacks):
            return torch.stack([torch.linalg.slogdet(stack).logabsdet.sum(-1) for stack in stacks]).sum(0)
    return like.new_zeros(())


def dual(basis: Columns) -> Columns:
    """The columns of W^-T."""
    return mapped(basis, lambda w: torch.linalg.inv(w).mT)


# --- frames ---------------------------------------------------------------------------------------------------------


class JointEigenbasis(NamedTuple):
    """The columns W in which sides are diagonal, or nearly so."""

    basis: Columns
    orthonormal: bool


def frame(sides: Sequence[Matrix], damping: float | Tensor = 0.0) -> JointEigenbasis | None:
    """A basis in which two sides are diagonal, and more than two nearly.

    The mean of the sides, each divided by its trace, is the metric; damping, in units of its mean eigenvalue, is added
    to it. W diagonalises it together with the principal component of the sides' differences from it. Sides that are
    diagonal anyway, or one matrix among multiples of the identity, have an orthonormal basis. Sides of the same blocks
    have a frame a block, in which every block counts as a side of its own.

    Returns:
        The frame, or None where the metric is not positive definite (looked at in eager mode only), or where sides of
        blocks have nothing but a dense matrix in common.
    """
    if all(map(is_diagonal, sides)):
        return JointEigenbasis(CanonicalBasis(sides[0].shape[-1]), True)
    varying = {id(side): side for side in sides if not isinstance(side, ScaledIdentity)}
    if len(varying) == 1:
        basis = next(iter(varying.values())).eigen().basis
        if isinstance(basis, Columns):
            return JointEigenbasis(basis, True)
    runs = {found for found in map(block_runs_of, sides) if found is not None}
    if runs and not any(map(is_dense, sides)):
        shared = len(runs) == 1 and all(is_diagonal(side) or block_runs_of(side) for side in sides)
        return block_frame(sides, next(iter(runs)), damping) if shared else None
    matrices = full_precision(torch.stack(torch.broadcast_tensors(*(side.matrices() for side in sides))))
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    unit = matrices / torch.where(traces == 0, 1, traces)
    mean, size = unit.mean(0), unit.shape[-1]
    metric = mean + damping / size * torch.eye(size, dtype=mean.dtype, device=mean.device)
    lower, failed = torch.linalg.cholesky_ex(metric)
    if is_eager() and bool(failed.any()):
        return None
    half = torch.linalg.solve_triangular(lower, unit - mean, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.mT, upper=False)  # L^-1 (G_k - mean) L^-T
    vectors = torch.linalg.solve_triangular(lower.mT, eigh(principal(whitened))[1], upper=True)
    if is_eager() and not bool((congruence_error(metric, vectors) < 0.01).all()):
        return None
    return JointEigenbasis(OrthogonalBasis(vectors), False)


def congruence_error(metric: Tensor, vectors: Tensor) -> Tensor:
    """The largest entry of W^T M W - I: rounding, eps times the condition number of M."""
    product = vectors.mT @ (metric @ vectors)
    return (product - torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)).abs().amax((-2, -1))


def is_dense(side: Matrix) -> bool:
    """Whether a side is kept as a dense matrix."""
    orthogonal = isinstance(side, EigenMatrix) and isinstance(side.basis, OrthogonalBasis)
    return orthogonal or isinstance(side, (Dense, ShiftedDense, CholeskyInverse))


def is_diagonal(side: Matrix) -> bool:
    """Whether a side is kept as a diagonal."""
    canonical = isinstance(side, EigenMatrix) and isinstance(side.basis, CanonicalBasis)
    return canonical or isinstance(side, (Diagonal, ScaledIdentity))


def block_frame(sides: Sequence[Matrix], runs: Runs, damping: float | Tensor) -> JointEigenbasis | None:
    """A frame for every block of sides that are zero outside of the blocks."""
    stacks = []
    for blocks in zip(*(diagonal_blocks(side, runs) for side in sides), strict=True):
        found = frame([Dense(block) for block in blocks], damping)
        if found is None or not isinstance(found.basis, OrthogonalBasis):
            return None
        stacks.append(found.basis.vectors)
    return JointEigenbasis(BlockBasis(tuple(stacks)), False)


def principal(differences: Tensor) -> Tensor:
    """The linear combination of symmetric matrices [r, *, d, d] that has most of their squares."""
    if len(differences) == 2:  # they are opposite
        combination = differences[0]
    else:
        flat = differences.flatten(-2).movedim(0, -2)
        weights = eigh(flat @ flat.mT)[1][..., -1]  # [*, r]
        combination = (weights.movedim(-1, 0)[..., None, None] * differences).sum(0)
    return (combination + combination.mT) / 2


# --- inverses -------------------------------------------------------------------------------------------------------


def frames(
    products: Sequence[Kronecker], damping: float | Tensor = 0.0
) -> tuple[JointEigenbasis, JointEigenbasis] | None:
    """A frame for the left sides and one for the right ones."""
    left = frame([product.left for product in products], damping)
    right = frame([product.right for product in products], damping) if left is not None else None
    return None if left is None or right is None else (left, right)


def values_in(products: Sequence[Kronecker], left: Columns, right: Columns) -> Tensor:
    """The diagonal of (W (x) Z)^T (sum_k G_k (x) A_k) (W (x) Z), [*, m, n]."""
    outer = [left.forms(product.left).unsqueeze(-1) * right.forms(product.right).unsqueeze(-2) for product in products]
    return torch.stack(torch.broadcast_tensors(*outer)).sum(0)


def inverse_of_two(products: Sequence[Kronecker], *, damped: bool) -> Operator | None:
    """(G_1 (x) A_1 + G_2 (x) A_2)^-1, or None where a side's sum is singular or indefinite.

    Raises:
        SingularError: the sum is singular though the sums of its sides are not.
    """
    both = frames(products)
    if both is None:
        return None
    left, right = both
    values = values_in(products, left.basis, right.basis)
    if left.orthonormal and right.orthonormal:
        return EigenKronecker(left.basis, right.basis, values)._power(-1, damped=damped)
    inverted = powers(values.flatten(-2), -1, damped=damped).reshape(values.shape)
    return SimultaneousKronecker(left.basis, right.basis, inverted)
