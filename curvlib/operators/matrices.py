"""Symmetric matrices on the last axis: blocks in their own right, and sides of Kronecker products."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curvlib.linalg.eigh import eigh
from curvlib.operators.base import Operator, powers, remembered
from curvlib.operators.bases import Basis, CanonicalBasis, OrthogonalBasis
from curvlib.operators.damping import Damping, Tikhonov, as_damping, shift
from curvlib.operators.vectors import check_shape
from curvlib.pytree import Domain, register, static


class Matrix(Operator):
    """A symmetric matrix M [d, d] on vectors [d], or one a group, M [*, d, d] on [*, d]."""

    @abstractmethod
    def left(self, v: Tensor) -> Tensor:
        """M V for V [*, d, n]."""

    @abstractmethod
    def right(self, v: Tensor) -> Tensor:
        """V M for V [*, n, d]."""

    @abstractmethod
    def traces(self) -> Tensor:
        """Tr M, [*]."""

    @abstractmethod
    def square_norms(self) -> Tensor:
        """||M||_F^2, [*]."""

    @abstractmethod
    def inner(self, other: Matrix) -> Tensor:
        """Tr(M N) with another matrix on the same vectors, [*]."""

    @abstractmethod
    def eigen(self) -> EigenMatrix:
        """The matrix in its eigenbasis."""

    @abstractmethod
    def matrices(self) -> Tensor:
        """M [*, d, d]. For small problems and tests."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of a vector, [*, d]."""

    @property
    def domain(self) -> Domain:
        return Domain.of_tensor(self.shape)

    def _apply(self, vectors: Tensor, leading: int) -> Tensor:
        check_shape(vectors, leading, self.shape)
        return self.right(vectors.unsqueeze(-2)).squeeze(-2)

    def to_dense(self) -> Tensor:
        matrices = self.matrices()
        return torch.block_diag(*matrices.reshape(-1, *matrices.shape[-2:]))

    def trace(self) -> Tensor:
        return self.traces().sum()

    def frobenius_norm(self) -> Tensor:
        return self.square_norms().sum().sqrt()

    def _eigenvalues(self) -> Tensor:
        eigen = self.eigen()
        return eigen.basis.spread(eigen.values)[..., : eigen.basis.width].reshape(-1)

    def _sample(self, generator: torch.Generator, n: int | None) -> Tensor:
        eigen = self.eigen()
        root = eigen.basis.spread(powers(eigen.values, 0.5, damped=False))
        return eigen.basis.synthesise_right((root * normal(root, generator, n)).unsqueeze(-2)).squeeze(-2)

    def mean_eigenvalue(self) -> Tensor:
        """Tr M / d over all groups."""
        return self.trace() / math.prod(self.shape)

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return {"params": self}

    @property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        return {"params": ("params",)}


def normal(like: Tensor, generator: torch.Generator, n: int | None) -> Tensor:
    """Standard normal numbers shaped like a tensor, with a leading axis n if given."""
    shape = like.shape if n is None else (n, *like.shape)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


@register
class Dense(Matrix):
    """A dense symmetric matrix.

    Args:
        matrix: M [*, d, d]. Only symmetric matrices make sense; this is not checked.

    Example:
        >>> Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).eigenvalues().round(decimals=4)
        tensor([1., 3.])
    """

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape[:-1])

    def left(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def right(self, v: Tensor) -> Tensor:
        return v @ self.matrix

    def diag(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def traces(self) -> Tensor:
        return self.diag().sum(-1)

    def square_norms(self) -> Tensor:
        return self.matrix.square().sum((-2, -1))

    def inner(self, other: Matrix) -> Tensor:
        return (self.matrix * other.matrices()).sum((-2, -1))

    @remembered
    def eigen(self) -> EigenMatrix:
        values, vectors = eigh(self.matrix)
        return EigenMatrix(OrthogonalBasis(vectors), values)

    def matrices(self) -> Tensor:
        return self.matrix

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenMatrix:
        return self.eigen().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> EigenMatrix:
        return self.eigen().damp(damping)

    def _power(self, exponent: float, *, damped: bool) -> EigenMatrix:
        return self.eigen()._power(exponent, damped=damped)

    def _scale(self, factor: float | Tensor) -> Dense:
        return Dense(factor * self.matrix)

    def _add(self, other: Operator) -> Operator | None:
        return Dense(self.matrix + other.matrix) if isinstance(other, Dense) else None


@register
class Diagonal(Matrix):
    """A diagonal matrix.

    Args:
        values: its diagonal [*, d]; as a block it acts elementwise on tensors of this shape.

    Example:
        >>> Diagonal(torch.tensor([1.0, 4.0])).power(0.5) @ torch.ones(2)
        tensor([1., 2.])
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def left(self, v: Tensor) -> Tensor:
        return self.values.unsqueeze(-1) * v

    def right(self, v: Tensor) -> Tensor:
        return v * self.values.unsqueeze(-2)

    def diag(self) -> Tensor:
        return self.values

    def traces(self) -> Tensor:
        return self.values.sum(-1)

    def square_norms(self) -> Tensor:
        return self.values.square().sum(-1)

    def inner(self, other: Matrix) -> Tensor:
        return (self.values * other.diag()).sum(-1)

    def eigen(self) -> EigenMatrix:
        return EigenMatrix(CanonicalBasis(self.values.shape[-1]), self.values)

    def matrices(self) -> Tensor:
        return torch.diag_embed(self.values)

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> Diagonal:
        return Diagonal(fn(self.values))

    def damp(self, damping: Damping | float | Tensor) -> Diagonal:
        return Diagonal(self.values + shift(as_damping(damping), self.mean_eigenvalue()))

    def _power(self, exponent: float, *, damped: bool) -> Diagonal:
        return Diagonal(powers(self.values, exponent, damped=damped))

    def _scale(self, factor: float | Tensor) -> Diagonal:
        return Diagonal(factor * self.values)

    def _add(self, other: Operator) -> Operator | None:
        return Diagonal(self.values + other.values) if isinstance(other, Diagonal) else None


@register
class ScaledIdentity(Matrix):
    """scale * I.

    Args:
        scale: 0-d tensor.
        vector: the shape of a vector.

    Example:
        >>> ScaledIdentity(torch.tensor(2.0), (3,)).trace()
        tensor(6.)
    """

    scale: Tensor
    vector: tuple[int, ...] = static()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.vector

    def left(self, v: Tensor) -> Tensor:
        return self.scale[..., None, None] * v

    def right(self, v: Tensor) -> Tensor:
        return self.scale[..., None, None] * v

    def diag(self) -> Tensor:
        return self.scale[(..., *(None,) * len(self.vector))].expand(*self.scale.shape, *self.vector)

    def traces(self) -> Tensor:
        return self.diag().sum(-1)

    def square_norms(self) -> Tensor:
        return self.diag().square().sum(-1)

    def inner(self, other: Matrix) -> Tensor:
        return (self.diag() * other.diag()).sum(-1)

    def eigen(self) -> EigenMatrix:
        return EigenMatrix(CanonicalBasis(self.vector[-1]), self.diag())

    def matrices(self) -> Tensor:
        return torch.diag_embed(self.diag())

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> ScaledIdentity:
        return ScaledIdentity(fn(self.scale), self.vector)

    def damp(self, damping: Damping | float | Tensor) -> ScaledIdentity:
        return ScaledIdentity(self.scale + shift(as_damping(damping), self.scale), self.vector)

    def _power(self, exponent: float, *, damped: bool) -> ScaledIdentity:
        return ScaledIdentity(powers(self.scale.unsqueeze(-1), exponent, damped=damped).squeeze(-1), self.vector)

    def _scale(self, factor: float | Tensor) -> ScaledIdentity:
        return ScaledIdentity(factor * self.scale, self.vector)

    def _add(self, other: Operator) -> Operator | None:
        return other.damp(Tikhonov(self.scale))


@register
class EigenMatrix(Matrix):
    """Q diag(l) Q^T, kept in its eigenbasis: two products an application, none to take a power.

    Args:
        basis: Q.
        values: the eigenvalues l [*, d].
    """

    basis: Basis
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.basis.width)

    def left(self, v: Tensor) -> Tensor:
        return self.basis.synthesise_left(self.basis.spread(self.values).unsqueeze(-1) * self.basis.analyse_left(v))

    def right(self, v: Tensor) -> Tensor:
        return self.basis.synthesise_right(self.basis.analyse_right(v) * self.basis.spread(self.values).unsqueeze(-2))

    def diag(self) -> Tensor:
        return self.basis.square_right(self.values.unsqueeze(-2)).squeeze(-2)

    def traces(self) -> Tensor:
        return self.basis.total(self.values)

    def square_norms(self) -> Tensor:
        return self.basis.total(self.values.square())

    def inner(self, other: Matrix) -> Tensor:
        return (self.values * self.basis.forms(other)).sum(-1)

    def eigen(self) -> EigenMatrix:
        return self

    def matrices(self) -> Tensor:
        return self.left(torch.eye(self.basis.width, dtype=self.values.dtype, device=self.values.device))

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenMatrix:
        return EigenMatrix(self.basis, fn(self.values))

    def damp(self, damping: Damping | float | Tensor) -> EigenMatrix:
        return EigenMatrix(self.basis, self.values + shift(as_damping(damping), self.mean_eigenvalue()))

    def _power(self, exponent: float, *, damped: bool) -> EigenMatrix:
        return EigenMatrix(self.basis, powers(self.values, exponent, damped=damped))

    def _scale(self, factor: float | Tensor) -> EigenMatrix:
        return EigenMatrix(self.basis, factor * self.values)

    def _add(self, other: Operator) -> Operator | None:
        return None
