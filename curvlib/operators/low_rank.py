"""Matrices with a few eigenvectors of their own and one eigenvalue for all other directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.errors import ShapeError
from curvlib.linalg.low_rank import LowRankFactor, low_rank_gram, low_rank_update
from curvlib.operators.base import Operator, powers
from curvlib.operators.bases import LowRankBasis
from curvlib.operators.damping import Damping, as_damping, shift
from curvlib.operators.matrices import EigenMatrix, Matrix
from curvlib.pytree import register


@register
class LowRank(Matrix):
    """U diag(l) U^T + tau (I - U U^T): every operation in closed form, in memory O(d k).

    As a side of a `Kronecker` product it has k + 1 eigenvalues; products of two have (k + 1)^2, damped or not.

    Args:
        vectors: U [*, d, k], orthonormal columns; this is not checked.
        values: the eigenvalues l [*, k], in any order.
        remainder: tau [*], the eigenvalue of every vector that is orthogonal to U.

    Raises:
        ShapeError: the shapes do not fit each other, or there are as many vectors as rows.

    Example:
        >>> curv = LowRank(torch.eye(3)[:, :1], torch.tensor([4.0]), torch.tensor(1.0))
        >>> curv.eigenvalues(), curv.trace()
        (tensor([1., 1., 4.]), tensor(6.))
        >>> curv.inverse(1.0) @ torch.ones(3)
        tensor([0.2000, 0.5000, 0.5000])
    """

    vectors: Tensor
    values: Tensor
    remainder: Tensor

    def __post_init__(self) -> None:
        width, rank = self.vectors.shape[-2:]
        fits = self.values.shape[-1] == rank and self.values.shape[:-1] == self.remainder.shape
        if not fits:
            raise ShapeError(
                f"vectors {tuple(self.vectors.shape)}, values {tuple(self.values.shape)} and remainder "
                f"{tuple(self.remainder.shape)} should have the shapes [*, d, k], [*, k] and [*]"
            )
        if rank >= width:
            raise ShapeError(f"{rank} vectors of width {width} leave no remainder; use EigenMatrix, or Dense")

    @classmethod
    def of_rows(cls, rows: Tensor, rank: int, *, generator: torch.Generator | None = None) -> LowRank:
        """The second moment X^T X / n of rows [*, n, d], to a rank; see `low_rank_gram`.

        Example:
            >>> LowRank.of_rows(torch.eye(4), 2).trace().round(decimals=3)
            tensor(1.)
        """
        return cls(*low_rank_gram(rows, rank, generator=generator))

    def updated(self, rows: Tensor, decay: float | Tensor, *, generator: torch.Generator | None = None) -> LowRank:
        """The exponential moving average decay M + (1 - decay) X^T X / n, to the same rank; see `low_rank_update`.

        Example:
            >>> LowRank.of_rows(torch.eye(4), 2).updated(torch.ones(1, 4), 0.5).trace()
            tensor(2.5000)
        """
        return LowRank(*low_rank_update(self.factor(), rows, decay, generator=generator))

    def factor(self) -> LowRankFactor:
        """Its tensors."""
        return LowRankFactor(self.vectors, self.values, self.remainder)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.vectors.shape[-2])

    def excess(self) -> Tensor:
        """L - tau [*, k]: the matrix is tau I + U diag(l - tau) U^T."""
        return self.values - self.remainder.unsqueeze(-1)

    def left(self, v: Tensor) -> Tensor:
        inside = self.excess().unsqueeze(-1) * (self.vectors.mT @ v)
        return self.remainder[..., None, None] * v + self.vectors @ inside

    def right(self, v: Tensor) -> Tensor:
        inside = (v @ self.vectors) * self.excess().unsqueeze(-2)
        return self.remainder[..., None, None] * v + inside @ self.vectors.mT

    def diag(self) -> Tensor:
        return self.eigen().diag()

    def traces(self) -> Tensor:
        return self.eigen().traces()

    def square_norms(self) -> Tensor:
        return self.eigen().square_norms()

    def inner(self, other: Matrix) -> Tensor:
        inside = (self.vectors * other.left(self.vectors)).sum(-2)  # u_i^T N u_i
        return self.remainder * other.traces() + (self.excess() * inside).sum(-1)

    def eigen(self) -> EigenMatrix:
        return EigenMatrix(LowRankBasis(self.vectors), self.joined())

    def joined(self) -> Tensor:
        """All k + 1 eigenvalues [*, k + 1], the remainder last."""
        return torch.cat([self.values, self.remainder.unsqueeze(-1)], -1)

    def with_values(self, joined: Tensor) -> LowRank:
        """The same vectors with other eigenvalues [*, k + 1]."""
        return LowRank(self.vectors, joined[..., :-1], joined[..., -1])

    def matrices(self) -> Tensor:
        return self.eigen().matrices()

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> LowRank:
        return self.with_values(fn(self.joined()))

    def damp(self, damping: Damping | float | Tensor) -> LowRank:
        return self.with_values(self.joined() + shift(as_damping(damping), self.mean_eigenvalue()))

    def _power(self, exponent: float, *, damped: bool) -> LowRank:
        return self.with_values(powers(self.joined(), exponent, damped=damped))

    def _scale(self, factor: float | Tensor) -> LowRank:
        return self.with_values(factor * self.joined())

    def _add(self, other: Operator) -> Operator | None:
        return None
