"""Orthonormal bases Q of one side of a matrix V: coordinates Q^T V on the left, V Q on the right.

A full basis has d coordinates, and an operator has one eigenvalue for each. A `LowRankBasis` names k vectors only: all
directions orthogonal to them share one more eigenvalue, and its coordinates are U^T V, and V - U U^T V for the rest.
That map is an isometry too, so that what follows from Q^T Q = I holds for it: synthesis is the adjoint of analysis,
norms are those of the coordinates, and Q diag(l) Q^T is analysis, one factor a coordinate, synthesis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlib.pytree import register, static

if TYPE_CHECKING:
    from curvlib.operators.matrices import Matrix


class Basis(ABC):
    """An orthonormal basis; its vectors are the columns of Q [*, d, d]. Leading axes are groups.

    With r eigenvalues: r = d, or k + 1 for a basis of k vectors and the rest. With c coordinates: c = d, or k + d.
    """

    @property
    @abstractmethod
    def width(self) -> int:
        """The number d of rows."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """The eigenvalue [*, c] of every coordinate, of eigenvalues [*, r]; the first d of them are the spectrum."""

    @abstractmethod
    def total(self, values: Tensor) -> Tensor:
        """The sum [*] of eigenvalues [*, r], each counted as often as it occurs."""

    @abstractmethod
    def analyse_left(self, v: Tensor) -> Tensor:
        """Q^T V."""

    @abstractmethod
    def synthesise_left(self, c: Tensor) -> Tensor:
        """Q C."""

    @abstractmethod
    def analyse_right(self, v: Tensor) -> Tensor:
        """V Q."""

    @abstractmethod
    def synthesise_right(self, c: Tensor) -> Tensor:
        """C Q^T."""

    @abstractmethod
    def square_left(self, c: Tensor) -> Tensor:
        """(Q o Q) C for C [*, r, n]; a column for the rest holds the row sums of its squares."""

    @abstractmethod
    def square_right(self, c: Tensor) -> Tensor:
        """C (Q o Q)^T for C [*, n, r]."""

    @abstractmethod
    def forms(self, matrix: Matrix) -> Tensor:
        """q^T M q [*, r] for every basis vector; for the rest, the trace of M on it."""

    @abstractmethod
    def rows(self, index: Tensor, like: Tensor) -> Tensor:
        """The basis vectors of these numbers as rows [*, k, d]."""


@register
class OrthogonalBasis(Basis):
    """A dense basis.

    Args:
        vectors: Q [*, d, d].
    """

    vectors: Tensor

    @property
    def width(self) -> int:
        return self.vectors.shape[-1]

    def spread(self, values: Tensor) -> Tensor:
        return values

    def total(self, values: Tensor) -> Tensor:
        return values.sum(-1)

    def analyse_left(self, v: Tensor) -> Tensor:
        return self.vectors.mT @ v

    def synthesise_left(self, c: Tensor) -> Tensor:
        return self.vectors @ c

    def analyse_right(self, v: Tensor) -> Tensor:
        return v @ self.vectors

    def synthesise_right(self, c: Tensor) -> Tensor:
        return c @ self.vectors.mT

    def square_left(self, c: Tensor) -> Tensor:
        return self.vectors.square() @ c

    def square_right(self, c: Tensor) -> Tensor:
        return c @ self.vectors.square().mT

    def forms(self, matrix: Matrix) -> Tensor:
        return (self.vectors * matrix.left(self.vectors)).sum(-2)

    def rows(self, index: Tensor, like: Tensor) -> Tensor:
        return torch.take_along_dim(self.vectors.mT, index.unsqueeze(-1), -2)


@register
class CanonicalBasis(Basis):
    """The unit vectors: the basis of a diagonal side.

    Args:
        size: d.
    """

    size: int = static()

    @property
    def width(self) -> int:
        return self.size

    def spread(self, values: Tensor) -> Tensor:
        return values

    def total(self, values: Tensor) -> Tensor:
        return values.sum(-1)

    def analyse_left(self, v: Tensor) -> Tensor:
        return v

    def synthesise_left(self, c: Tensor) -> Tensor:
        return c

    def analyse_right(self, v: Tensor) -> Tensor:
        return v

    def synthesise_right(self, c: Tensor) -> Tensor:
        return c

    def square_left(self, c: Tensor) -> Tensor:
        return c

    def square_right(self, c: Tensor) -> Tensor:
        return c

    def forms(self, matrix: Matrix) -> Tensor:
        return matrix.diag()

    def rows(self, index: Tensor, like: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(index, self.size).to(like.dtype)


@register
class LowRankBasis(Basis):
    """A few vectors, and the orthogonal complement of their span, which is not stored.

    Args:
        vectors: U [*, d, k], orthonormal columns, k < d.

    Example:
        >>> basis = LowRankBasis(torch.tensor([[1.0], [0.0], [0.0]]))
        >>> basis.spread(torch.tensor([5.0, 2.0])), basis.total(torch.tensor([5.0, 2.0]))
        (tensor([5., 2., 2., 2.]), tensor(9.))
    """

    vectors: Tensor

    @property
    def width(self) -> int:
        return self.vectors.shape[-2]

    @property
    def rank(self) -> int:
        """The number k of vectors."""
        return self.vectors.shape[-1]

    def spread(self, values: Tensor) -> Tensor:
        rest = values[..., -1:].expand(*values.shape[:-1], self.width)
        return torch.cat([values[..., :-1], rest], -1)

    def total(self, values: Tensor) -> Tensor:
        return values[..., :-1].sum(-1) + (self.width - self.rank) * values[..., -1]

    def analyse_left(self, v: Tensor) -> Tensor:
        inside = self.vectors.mT @ v
        return torch.cat([inside, v - self.vectors @ inside], -2)

    def synthesise_left(self, c: Tensor) -> Tensor:
        inside, rest = c[..., : self.rank, :], c[..., self.rank :, :]
        return rest + self.vectors @ (inside - self.vectors.mT @ rest)

    def analyse_right(self, v: Tensor) -> Tensor:
        inside = v @ self.vectors
        return torch.cat([inside, v - inside @ self.vectors.mT], -1)

    def synthesise_right(self, c: Tensor) -> Tensor:
        inside, rest = c[..., : self.rank], c[..., self.rank :]
        return rest + (inside - rest @ self.vectors) @ self.vectors.mT

    def squares(self) -> Tensor:
        """[*, d, k + 1]: U o U, and for each row the square of what U leaves of its unit vector."""
        inside = self.vectors.square()
        return torch.cat([inside, (1 - inside.sum(-1, keepdim=True)).clamp(min=0)], -1)

    def square_left(self, c: Tensor) -> Tensor:
        return self.squares() @ c

    def square_right(self, c: Tensor) -> Tensor:
        return c @ self.squares().mT

    def forms(self, matrix: Matrix) -> Tensor:
        inside = (self.vectors * matrix.left(self.vectors)).sum(-2)
        return torch.cat([inside, (matrix.traces() - inside.sum(-1)).unsqueeze(-1)], -1)

    def rows(self, index: Tensor, like: Tensor) -> Tensor:
        return torch.take_along_dim(self.vectors.mT, index.unsqueeze(-1), -2)
