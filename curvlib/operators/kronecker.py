"""Kronecker products V -> G V A, and operators that share their eigenbasis but not their eigenvalues."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curvlib.operators.base import Operator, powers, remembered
from curvlib.operators.bases import Basis
from curvlib.operators.cholesky import shifted_side
from curvlib.operators.damping import Damping, FactoredTikhonov, as_damping, shift
from curvlib.operators.matrices import Matrix, normal
from curvlib.operators.vectors import check_shape
from curvlib.pytree import Domain, register


class MatrixBlock(Operator):
    """A block whose vectors are matrices [m, n], or stacks of them, [groups, m, n], one operator a group."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of a vector, [*, m, n]."""

    @property
    def domain(self) -> Domain:
        return Domain.of_tensor(self.shape)

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return {"params": self}

    @property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        return {"params": ("params",)}


@register
class Kronecker(MatrixBlock):
    """G (x) A: V -> G V A on matrices V [m, n]; the matrix is ``torch.kron(G, A)`` for row-major V.

    Its powers are Kronecker products too; with `Tikhonov` damping it becomes an `EigenKronecker`. Its inverse with
    `FactoredTikhonov` damping takes Cholesky decompositions of dense sides, no eigendecomposition.

    Args:
        left: G, a `Matrix` on [*, m].
        right: A, a `Matrix` on [*, n].

    Example:
        >>> from curvlib.operators import Dense
        >>> curv = Kronecker(Dense(2 * torch.eye(2)), Dense(3 * torch.eye(4)))
        >>> curv.inverse(2.0) @ torch.ones(2, 4)
        tensor([[0.1250, 0.1250, 0.1250, 0.1250],
                [0.1250, 0.1250, 0.1250, 0.1250]])
    """

    left: Matrix
    right: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a vector, [*, m, n]."""
        front = torch.broadcast_shapes(self.left.shape[:-1], self.right.shape[:-1])
        return (*front, self.left.shape[-1], self.right.shape[-1])

    def _apply(self, vectors: Tensor, leading: int) -> Tensor:
        check_shape(vectors, leading, self.shape)
        return self.right.right(self.left.left(vectors))

    def to_dense(self) -> Tensor:
        *front, m, n = self.shape
        left = self.left.matrices().expand(*front, m, m).reshape(-1, m, m)
        right = self.right.matrices().expand(*front, n, n).reshape(-1, n, n)
        return torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for g, a in zip(left, right, strict=True)))

    def diag(self) -> Tensor:
        return self.left.diag().unsqueeze(-1) * self.right.diag().unsqueeze(-2)

    def trace(self) -> Tensor:
        return (self.left.traces() * self.right.traces()).sum()

    def frobenius_norm(self) -> Tensor:
        return (self.left.square_norms() * self.right.square_norms()).sum().sqrt()

    def _eigenvalues(self) -> Tensor:
        return self.eigen()._eigenvalues()

    @remembered
    def eigen(self) -> EigenKronecker:
        """The operator in its eigenbasis, with eigenvalues mu_i nu_j."""
        left, right = self.left.eigen(), self.right.eigen()
        return EigenKronecker(left.basis, right.basis, left.values.unsqueeze(-1) * right.values.unsqueeze(-2))

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenKronecker:
        return self.eigen().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> Operator:
        damping = as_damping(damping)
        if not isinstance(damping, FactoredTikhonov):
            return self.eigen().damp(damping)
        left_shift, right_shift = self.side_shifts(damping)
        return Kronecker(shifted_side(self.left, left_shift), shifted_side(self.right, right_shift))

    def side_shifts(self, damping: FactoredTikhonov) -> tuple[Tensor, Tensor]:
        """The multiples of the identity [*] that are added to G and to A."""
        means = [side.traces() / side.shape[-1] for side in (self.left, self.right)]
        strength = damping.strength
        if damping.relative:
            strength = strength * means[0] * means[1]
        root = torch.as_tensor(strength, dtype=means[0].dtype, device=means[0].device) ** 0.5
        usable = (means[0] > 0) & (means[1] > 0)
        one = torch.ones_like(means[0] * means[1])
        pi = (torch.where(usable, means[1], one) / torch.where(usable, means[0], one)) ** 0.5
        return root / pi, root * pi

    def _power(self, exponent: float, *, damped: bool) -> Kronecker:
        left, right = (side._power(exponent, damped=damped) for side in (self.left, self.right))
        assert isinstance(left, Matrix)
        assert isinstance(right, Matrix)
        return Kronecker(left, right)

    def _scale(self, factor: float | Tensor) -> Kronecker:
        left = self.left._scale(factor)
        assert isinstance(left, Matrix)
        return Kronecker(left, self.right)

    def _add(self, other: Operator) -> Operator | None:
        return None

    def _sample(self, generator: torch.Generator, n: int | None) -> Tensor:
        return self.eigen()._sample(generator, n)


@register
class EigenKronecker(MatrixBlock):
    """Q_L (l o (Q_L^T V Q_R)) Q_R^T: Kronecker eigenvectors with free eigenvalues l [m, n].

    A Kronecker product plus Tikhonov damping is one, and so is an eigenvalue-corrected curvature (George et al. 2018,
    arXiv 1806.03884). A side with a basis of k vectors and the rest has k + 1 eigenvalues in place of d, of which the
    last stands for d - k: its row or column of l is never spread out but to be applied to a vector.

    Args:
        left: the basis Q_L [*, m, m].
        right: the basis Q_R [*, n, n].
        values: the eigenvalues l [*, m, n].

    Example:
        >>> from curvlib.operators import Dense
        >>> curv = Kronecker(Dense(torch.eye(2)), Dense(torch.eye(3))).damp(1.0)
        >>> type(curv).__name__, curv.trace().round(decimals=4)
        ('EigenKronecker', tensor(12.))
    """

    left: Basis
    right: Basis
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a vector, [*, m, n]."""
        return (*self.values.shape[:-2], self.left.width, self.right.width)

    def analyse(self, v: Tensor) -> Tensor:
        """Q_L^T V Q_R: the coordinates of V."""
        return self.right.analyse_right(self.left.analyse_left(v))

    def synthesise(self, c: Tensor) -> Tensor:
        """Q_L C Q_R^T: the matrix with coordinates C."""
        return self.right.synthesise_right(self.left.synthesise_left(c))

    def spread(self, values: Tensor) -> Tensor:
        """One number a coordinate, from one an eigenvalue."""
        return self.left.spread(self.right.spread(values).mT).mT

    def total(self, values: Tensor) -> Tensor:
        """The sum of one number an eigenvalue over the spectrum, a 0-d tensor."""
        return self.left.total(self.right.total(values)).sum()

    def _apply(self, vectors: Tensor, leading: int) -> Tensor:
        check_shape(vectors, leading, self.shape)
        return self.synthesise(self.spread(self.values) * self.analyse(vectors))

    def to_dense(self) -> Tensor:
        *front, m, n = self.shape
        unit = torch.eye(m * n, dtype=self.values.dtype, device=self.values.device)
        stacked = unit.reshape(m * n, *(1,) * len(front), m, n).expand(m * n, *front, m, n)
        columns = self.synthesise(self.spread(self.values) * self.analyse(stacked)).reshape(m * n, -1, m * n)
        return torch.block_diag(*columns.unbind(1))

    def diag(self) -> Tensor:
        return self.right.square_right(self.left.square_left(self.values))

    def trace(self) -> Tensor:
        return self.total(self.values)

    def frobenius_norm(self) -> Tensor:
        return self.total(self.values.square()).sqrt()

    def _eigenvalues(self) -> Tensor:
        m, n = self.shape[-2:]
        return self.spread(self.values)[..., :m, :n].reshape(-1)

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenKronecker:
        return EigenKronecker(self.left, self.right, fn(self.values))

    def damp(self, damping: Damping | float | Tensor) -> EigenKronecker:
        mean = self.trace() / math.prod(self.shape)
        return EigenKronecker(self.left, self.right, self.values + shift(as_damping(damping), mean))

    def _power(self, exponent: float, *, damped: bool) -> EigenKronecker:
        values = powers(self.values.flatten(-2), exponent, damped=damped)
        return EigenKronecker(self.left, self.right, values.reshape(self.values.shape))

    def _scale(self, factor: float | Tensor) -> EigenKronecker:
        return EigenKronecker(self.left, self.right, factor * self.values)

    def _add(self, other: Operator) -> Operator | None:
        return None

    def _sample(self, generator: torch.Generator, n: int | None) -> Tensor:
        root = self.spread(powers(self.values.flatten(-2), 0.5, damped=False).reshape(self.values.shape))
        return self.synthesise(root * normal(root, generator, n))
