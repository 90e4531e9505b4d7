"""Dense sides that are damped, and their inverses by Cholesky decomposition: L L^T = M + d I.

An inverse takes d^3 / 3 multiplications, a tenth or less of the time of an eigendecomposition, and as many as a product
with a dense matrix to be applied. What an inverse alone does not need, powers, eigenvalues and samples, is computed
when it is asked for, from the eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.linalg.cholesky import cholesky
from curvlib.linalg.eager import is_eager
from curvlib.linalg.eigh import eigh
from curvlib.operators.base import Operator, powers, remembered
from curvlib.operators.bases import OrthogonalBasis
from curvlib.operators.damping import Damping, as_damping, shift
from curvlib.operators.matrices import Dense, Diagonal, EigenMatrix, Matrix
from curvlib.operators.vectors import at_least_single
from curvlib.pytree import register


def shifted_side(side: Matrix, added: Tensor) -> Matrix:
    """A side plus one multiple of the identity a group, without an eigendecomposition if it is dense or diagonal.

    Args:
        side: M on [*, d].
        added: c [*].

    Example:
        >>> shifted_side(Diagonal(torch.tensor([1.0, 2.0])), torch.tensor(0.5)).diag()
        tensor([1.5000, 2.5000])
    """
    match side:
        case Dense():
            return ShiftedDense(side, added)
        case Diagonal(values=values):
            return Diagonal(values + added.unsqueeze(-1))
    eigen = side.eigen()
    return EigenMatrix(eigen.basis, eigen.values + added.unsqueeze(-1))


@register
class ShiftedDense(Matrix):
    """M + c I for a dense M. Every damping of a matrix shares its eigendecomposition; its inverse needs none.

    Args:
        base: M on [*, d].
        shift: c [*], 0-d or one number a group.

    Example:
        >>> damped = ShiftedDense(Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), torch.tensor(1.0))
        >>> damped.eigenvalues().round(decimals=4), damped.trace()
        (tensor([2., 4.]), tensor(6.))
    """

    base: Dense
    shift: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        *front, width = self.base.shape
        return (*torch.broadcast_shapes(tuple(front), self.shift.shape), width)

    def left(self, v: Tensor) -> Tensor:
        return self.base.left(v) + self.shift[..., None, None] * v

    def right(self, v: Tensor) -> Tensor:
        return self.base.right(v) + self.shift[..., None, None] * v

    def diag(self) -> Tensor:
        return self.base.diag() + self.shift.unsqueeze(-1)

    def traces(self) -> Tensor:
        return self.base.traces() + self.shape[-1] * self.shift

    def square_norms(self) -> Tensor:
        return self.matrices().square().sum((-2, -1))

    def inner(self, other: Matrix) -> Tensor:
        return self.base.inner(other) + self.shift * other.traces()

    def eigen(self) -> EigenMatrix:
        eigen = self.base.eigen()
        return EigenMatrix(eigen.basis, eigen.values + self.shift.unsqueeze(-1))

    def matrices(self) -> Tensor:
        matrix = self.base.matrix
        return matrix + torch.diag_embed(self.shift.unsqueeze(-1).expand(*self.shape).to(matrix.dtype))

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenMatrix:
        return self.eigen().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> ShiftedDense:
        return ShiftedDense(self.base, self.shift + shift(as_damping(damping), self.mean_eigenvalue()))

    def _power(self, exponent: float, *, damped: bool) -> Matrix:
        if exponent == 1:
            return self
        if exponent == -1 and damped:
            return self.inverted()
        return self.eigen()._power(exponent, damped=damped)

    def inverted(self) -> Matrix:
        """(M + c I)^-1, by the eigendecomposition of M where M + c I is indefinite, be it by rounding.

        Under a transform or a trace, where nothing can be looked at, that is not a number.

        Raises:
            SingularError: it is singular.
            NonFiniteError: it has an entry that is not finite.
        """
        matrix = self.matrices()
        factor, failed = cholesky(matrix.to(at_least_single(matrix.dtype)))
        if is_eager() and not bool((failed == 0).all() & factor.diagonal(dim1=-2, dim2=-1).isfinite().all()):
            return self.eigen()._power(-1, damped=True)
        return CholeskyInverse(factor, torch.ones_like(self.shift))

    def _scale(self, factor: float | Tensor) -> ShiftedDense:
        return ShiftedDense(self.base._scale(factor), factor * self.shift)

    def _add(self, other: Operator) -> Operator | None:
        return None


@register
class CholeskyInverse(Matrix):
    """c (L L^T)^-1, applied by solving with two triangular matrices.

    Args:
        factor: L [*, d, d], lower triangular with a positive diagonal.
        scale: c [*], 0-d or one number a group.

    Example:
        >>> factor = torch.linalg.cholesky(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> inverse = CholeskyInverse(factor, torch.tensor(3.0))
        >>> (inverse @ torch.ones(2)).round(decimals=4), inverse.inverse().trace().round(decimals=4)
        (tensor([1., 1.]), tensor(1.3333))
    """

    factor: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        *front, width = self.factor.shape[:-1]
        return (*torch.broadcast_shapes(tuple(front), self.scale.shape), width)

    def left(self, v: Tensor) -> Tensor:
        return self.scale[..., None, None] * solve(self.factor, v)

    def right(self, v: Tensor) -> Tensor:
        return self.left(v.mT).mT

    @remembered
    def root(self) -> Tensor:
        """L^-1, whose columns give the diagonal of L^-T L^-1."""
        factor = self.factor.to(at_least_single(self.factor.dtype))
        unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, unit, upper=False).to(self.factor.dtype)

    def diag(self) -> Tensor:
        return self.scale.unsqueeze(-1) * self.root().square().sum(-2)

    def traces(self) -> Tensor:
        return self.scale * self.root().square().sum((-2, -1))

    def square_norms(self) -> Tensor:
        return self.matrices().square().sum((-2, -1))

    def inner(self, other: Matrix) -> Tensor:
        return (self.matrices() * other.matrices()).sum((-2, -1))

    def original(self) -> Tensor:
        """L L^T."""
        return self.factor @ self.factor.mT

    @remembered
    def eigen(self) -> EigenMatrix:
        values, vectors = eigh(self.original())
        return EigenMatrix(OrthogonalBasis(vectors), self.scale.unsqueeze(-1) * powers(values, -1, damped=True))

    def matrices(self) -> Tensor:
        root = self.root()
        return self.scale[..., None, None] * (root.mT @ root)

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenMatrix:
        return self.eigen().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> EigenMatrix:
        return self.eigen().damp(damping)

    def _power(self, exponent: float, *, damped: bool) -> Matrix:
        if exponent == 1:
            return self
        if exponent == -1:
            scale = powers(self.scale.unsqueeze(-1), -1, damped=damped).unsqueeze(-1)
            return Dense(scale * self.original())
        return self.eigen()._power(exponent, damped=damped)

    def _scale(self, factor: float | Tensor) -> CholeskyInverse:
        return CholeskyInverse(self.factor, factor * self.scale)

    def _add(self, other: Operator) -> Operator | None:
        return None


def solve(factor: Tensor, v: Tensor) -> Tensor:
    """(L L^T)^-1 V for V [.., *, d, n]; what is stacked in front of L's axes is solved as further columns.

    Example:
        >>> solve(2 * torch.eye(2), torch.ones(3, 2, 1)).unique()
        tensor([0.2500])
    """
    dtype = at_least_single(v.dtype)
    stacked = max(v.ndim - factor.ndim, 0)
    wide = v.to(dtype).movedim(tuple(range(stacked)), tuple(range(-stacked, 0)))
    solved = torch.cholesky_solve(wide.flatten(-1 - stacked), factor.to(dtype))
    solved = solved.unflatten(-1, wide.shape[-1 - stacked :])
    return solved.movedim(tuple(range(-stacked, 0)), tuple(range(stacked))).to(v.dtype)
