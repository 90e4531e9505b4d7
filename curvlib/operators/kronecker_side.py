"""A side that is itself a Kronecker product, for tensors with more than two axes.

The vectors of a `Kronecker` block are matrices [m, n]. A tensor [a, b, c] with one factor an axis is the matrix
[a, b * c], whose right side is F_b (x) F_c. Products, powers and eigenvalues go axis by axis: what has b * c rows and
columns is never formed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, ShapeError
from curvlib.operators.base import Operator, remembered
from curvlib.operators.bases import Basis
from curvlib.operators.damping import Damping
from curvlib.operators.matrices import EigenMatrix, Matrix
from curvlib.pytree import register

Map = Callable[[Tensor], Tensor]


def by_rows(maps: Sequence[Map], widths: Sequence[int], v: Tensor) -> Tensor:
    """Applies one map [*, w, k] -> [*, w, k] an axis of the rows of V [*, d, n], d = prod w.

    Each turn takes the first axis and puts it behind the others, so that after all of them the order is the old one.
    """
    for apply, width in zip(maps, widths, strict=True):
        others = v.shape[-2] // width
        columns = v.shape[-1]
        v = apply(v.unflatten(-2, (width, others)).flatten(-2))
        v = v.unflatten(-1, (others, columns)).transpose(-3, -2).flatten(-3, -2)
    return v


def by_columns(maps: Sequence[Map], widths: Sequence[int], v: Tensor) -> Tensor:
    """Applies one map [*, k, w] -> [*, k, w] an axis of the columns of V [*, n, d], d = prod w."""
    for apply, width in zip(maps, widths, strict=True):
        others = v.shape[-1] // width
        v = v.unflatten(-1, (width, others)).transpose(-2, -1)
        v = apply(v.flatten(-3, -2)).unflatten(-2, (-1, others)).flatten(-2)
    return v


def outer(vectors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product [*, prod d] of vectors [*, d]."""
    return functools.reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), vectors)


def product(numbers: Sequence[Tensor]) -> Tensor:
    """The product of numbers [*]."""
    return functools.reduce(torch.mul, numbers)


@register
class KroneckerBasis(Basis):
    """The basis of a Kronecker product of sides: all products of their vectors.

    Args:
        bases: one a factor, each with as many vectors as rows.

    Example:
        >>> from curvlib.operators import CanonicalBasis, OrthogonalBasis
        >>> basis = KroneckerBasis((OrthogonalBasis(torch.eye(2).flip(0)), CanonicalBasis(2)))
        >>> basis.width, basis.analyse_left(torch.arange(4.0).unsqueeze(1)).mT
        (4, tensor([[2., 3., 0., 1.]]))
    """

    bases: tuple[Basis, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every factor."""
        return tuple(basis.width for basis in self.bases)

    @property
    def width(self) -> int:
        return math.prod(self.widths)

    def spread(self, values: Tensor) -> Tensor:
        return values

    def total(self, values: Tensor) -> Tensor:
        return values.sum(-1)

    def analyse_left(self, v: Tensor) -> Tensor:
        return by_rows([basis.analyse_left for basis in self.bases], self.widths, v)

    def synthesise_left(self, c: Tensor) -> Tensor:
        return by_rows([basis.synthesise_left for basis in self.bases], self.widths, c)

    def analyse_right(self, v: Tensor) -> Tensor:
        return by_columns([basis.analyse_right for basis in self.bases], self.widths, v)

    def synthesise_right(self, c: Tensor) -> Tensor:
        return by_columns([basis.synthesise_right for basis in self.bases], self.widths, c)

    def square_left(self, c: Tensor) -> Tensor:
        return by_rows([basis.square_left for basis in self.bases], self.widths, c)

    def square_right(self, c: Tensor) -> Tensor:
        return by_columns([basis.square_right for basis in self.bases], self.widths, c)

    def forms(self, matrix: Matrix) -> Tensor:
        if isinstance(matrix, KroneckerSide) and matrix.widths == self.widths:
            return outer([basis.forms(factor) for basis, factor in zip(self.bases, matrix.factors, strict=True)])
        like = matrix.diag()
        vectors = self.synthesise_left(torch.eye(self.width, dtype=like.dtype, device=like.device))
        return (vectors * matrix.left(vectors)).sum(-2)

    def rows(self, index: Tensor, like: Tensor) -> Tensor:
        parts = []
        for basis, width in zip(reversed(self.bases), reversed(self.widths), strict=True):
            parts.append(basis.rows(index % width, like))
            index = index // width
        return outer(parts[::-1])


@register
class KroneckerSide(Matrix):
    """F_1 (x) F_2 (x) ...: a side of width n_1 n_2 ..., in memory O(n_1^2 + n_2^2 + ...).

    With it, a tensor [n_0, n_1, n_2, ...] is a matrix [n_0, n_1 n_2 ...] with a `Kronecker` block, and has its algebra.
    Truncation leaves it as it is.

    Args:
        factors: the `Matrix` F_i on [*, n_i]; not of the class `LowRank`.

    Raises:
        ShapeError: there is no factor.

    Example:
        >>> from curvlib.operators import Dense, Diagonal
        >>> side = KroneckerSide((Diagonal(torch.tensor([1.0, 2.0])), Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))))
        >>> side.eigenvalues().round(decimals=4), side.trace(), side @ torch.tensor([1.0, 0.0, 2.0, 0.0])
        (tensor([1., 2., 3., 6.]), tensor(12.), tensor([2., 1., 8., 4.]))
    """

    factors: tuple[Matrix, ...]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ShapeError("a Kronecker product of sides needs at least one factor")

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every factor."""
        return tuple(factor.shape[-1] for factor in self.factors)

    @property
    def shape(self) -> tuple[int, ...]:
        front = torch.broadcast_shapes(*(factor.shape[:-1] for factor in self.factors))
        return (*front, math.prod(self.widths))

    def left(self, v: Tensor) -> Tensor:
        return by_rows([factor.left for factor in self.factors], self.widths, v)

    def right(self, v: Tensor) -> Tensor:
        return by_columns([factor.right for factor in self.factors], self.widths, v)

    def diag(self) -> Tensor:
        return outer([factor.diag() for factor in self.factors])

    def traces(self) -> Tensor:
        return product([factor.traces() for factor in self.factors])

    def square_norms(self) -> Tensor:
        return product([factor.square_norms() for factor in self.factors])

    def inner(self, other: Matrix) -> Tensor:
        if isinstance(other, KroneckerSide) and other.widths == self.widths:
            return product([mine.inner(theirs) for mine, theirs in zip(self.factors, other.factors, strict=True)])
        return self.eigen().inner(other)

    @remembered
    def eigen(self) -> EigenMatrix:
        parts = [factor.eigen() for factor in self.factors]
        for part in parts:
            if part.values.shape[-1] != part.basis.width:
                raise ArgumentError(
                    f"a factor of width {part.basis.width} has {part.values.shape[-1]} eigenvalues, the last of which "
                    "stands for all others; use factors that have one a row"
                )
        return EigenMatrix(KroneckerBasis(tuple(part.basis for part in parts)), outer([part.values for part in parts]))

    def matrices(self) -> Tensor:
        def kron(a: Tensor, b: Tensor) -> Tensor:
            return (a[..., :, None, :, None] * b[..., None, :, None, :]).flatten(-4, -3).flatten(-2)

        return functools.reduce(kron, [factor.matrices() for factor in self.factors])

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenMatrix:
        return self.eigen().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> EigenMatrix:
        return self.eigen().damp(damping)

    def _power(self, exponent: float, *, damped: bool) -> KroneckerSide:
        return self.with_factors([factor._power(exponent, damped=damped) for factor in self.factors])

    def _scale(self, factor: float | Tensor) -> KroneckerSide:
        first, *others = self.factors
        return self.with_factors([first._scale(factor), *others])

    def with_factors(self, factors: Sequence[Operator]) -> KroneckerSide:
        """The product of other factors."""
        return KroneckerSide(tuple(factor for factor in factors if isinstance(factor, Matrix)))

    def _add(self, other: Operator) -> Operator | None:
        return None
