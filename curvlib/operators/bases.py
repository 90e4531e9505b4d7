"""Orthonormal bases Q of one side of a matrix V: coordinates Q^T V on the left, V Q on the right."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from curvlib.pytree import register, static


class Basis(ABC):
    """An orthonormal basis; its vectors are the columns of Q [*, d, d]. Leading axes are groups."""

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
        """(Q o Q) C."""

    @abstractmethod
    def square_right(self, c: Tensor) -> Tensor:
        """C (Q o Q)^T."""

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

    def rows(self, index: Tensor, like: Tensor) -> Tensor:
        return torch.take_along_dim(self.vectors.mT, index.unsqueeze(-1), -2)


@register
class CanonicalBasis(Basis):
    """The unit vectors: the basis of a diagonal side.

    Args:
        size: d.
    """

    size: int = static()

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

    def rows(self, index: Tensor, like: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(index, self.size).to(like.dtype)
