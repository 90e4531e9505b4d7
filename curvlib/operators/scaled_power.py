"""A side that is a multiple of a power of a matrix, and remembers the matrix.

Shampoo's operator has the sides L^(1/2) and R^(1/2), but it is L and R that go on being averaged. DyKAF keeps one
number apart from two factors of norm one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.linalg.eager import is_eager
from curvlib.operators.base import Operator, powers, remembered
from curvlib.operators.block_side import DenseBlocks
from curvlib.operators.damping import Damping
from curvlib.operators.interfaces import Recast
from curvlib.operators.kronecker_side import KroneckerSide
from curvlib.operators.matrices import Dense, Diagonal, EigenMatrix, Matrix, ScaledIdentity
from curvlib.pytree import register, static


@register
class ScaledPower(Matrix, Recast):
    """c M^p, by way of the eigendecomposition of M, or directly if p = 1.

    Its powers are of this class too, and all share the eigendecomposition of M.

    Args:
        base: the matrix M on [*, d], positive semi-definite unless p is an integer.
        scale: c [*], 0-d or one number a group.
        exponent: p.

    Example:
        >>> from curvlib.operators import Dense
        >>> root = ScaledPower(Dense(torch.diag(torch.tensor([4.0, 9.0]))), torch.tensor(2.0), 0.5)
        >>> (root @ torch.ones(2)).round(decimals=4), root.power(2).to_dense()
        (tensor([4., 6.]), tensor([[16.,  0.],
                [ 0., 36.]]))
        >>> root.base.matrix.diagonal()
        tensor([4., 9.])
    """

    base: Matrix
    scale: Tensor
    exponent: float = static()

    def _recast(self, dtype: torch.dtype) -> ScaledPower | None:
        # what is rounding in M is known in its own dtype only: a root in a wider one would meet negative eigenvalues
        if self.exponent == 1:
            return None
        return ScaledPower(self.base.eigen().widened(dtype), self.scale.to(dtype), self.exponent)

    @remembered
    def powered(self) -> Matrix:
        """M^p.

        Raises:
            SingularError: p needs positive eigenvalues, and M has others.
        """
        if self.exponent == 1:
            return self.base
        power = self.base._power(self.exponent, damped=False)
        return as_matrix(power.widened(self.base.dtype))  # half precision has been decomposed in float32

    @property
    def shape(self) -> tuple[int, ...]:
        *front, width = self.base.shape
        return (*torch.broadcast_shapes(tuple(front), tuple(self.scale.shape)), width)

    def left(self, v: Tensor) -> Tensor:
        return self.scale[..., None, None] * self.powered().left(v)

    def right(self, v: Tensor) -> Tensor:
        return self.scale[..., None, None] * self.powered().right(v)

    def diag(self) -> Tensor:
        return self.scale.unsqueeze(-1) * self.powered().diag()

    def traces(self) -> Tensor:
        return self.scale * self.powered().traces()

    def square_norms(self) -> Tensor:
        return self.scale.square() * self.powered().square_norms()

    def inner(self, other: Matrix) -> Tensor:
        return self.scale * self.powered().inner(other)

    @remembered
    def eigen(self) -> EigenMatrix:
        eigen = self.powered().eigen()
        return EigenMatrix(eigen.basis, self.scale.unsqueeze(-1) * eigen.values)

    def matrices(self) -> Tensor:
        return self.scale[..., None, None] * self.powered().matrices()

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenMatrix:
        return self.eigen().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> EigenMatrix:
        return self.eigen().damp(damping)

    def _power(self, exponent: float, *, damped: bool) -> ScaledPower:
        if exponent == 1:
            return self
        scale = powers(self.scale.unsqueeze(-1), exponent, damped=damped).squeeze(-1)
        total = self.exponent * exponent
        if is_eager():  # what counts as zero is measured on M itself: a root would make rounding look larger
            values = self.base.eigen().values
            powers(values, total, damped=damped)
            if exponent != int(exponent) or self.exponent != int(self.exponent):
                powers(values, 0.5, damped=damped)
        return ScaledPower(self.base, scale, total)

    def _scale(self, factor: float | Tensor) -> ScaledPower:
        return ScaledPower(self.base, factor * self.scale, self.exponent)

    def _add(self, other: Operator) -> Operator | None:
        return None

    def absorbed(self) -> Matrix:
        """c^(1/p) M, the matrix whose power it is; p must not be 0."""
        return times(self.base, self.scale ** (1 / self.exponent))


def as_matrix(operator: Operator) -> Matrix:
    """An operator that is known to be a matrix."""
    assert isinstance(operator, Matrix)
    return operator


def times(matrix: Matrix, factor: Tensor) -> Matrix:
    """A matrix times one number a group, factor [*].

    Example:
        >>> times(Dense(torch.eye(2).expand(2, 2, 2)), torch.tensor([1.0, 3.0])).traces()
        tensor([2., 6.])
    """
    match matrix:
        case Dense():
            return Dense(factor[..., None, None] * matrix.matrix)
        case Diagonal() | ScaledIdentity():
            return Diagonal(factor.unsqueeze(-1) * matrix.diag())
        case DenseBlocks():
            return matrix.map_stacks(lambda stack: factor[..., None, None, None] * stack)
        case KroneckerSide(factors=(first, *others)):
            return KroneckerSide((times(first, factor), *others))
        case ScaledPower():
            return matrix._scale(factor)
    eigen = matrix.eigen()
    return EigenMatrix(eigen.basis, factor.unsqueeze(-1) * eigen.values)
