"""Operators that are known by their products alone: their sums, their damping, and systems with them.

What needs every entry or the eigenvalues goes through the dense matrix, up to `MAX_DENSE` rows. Beyond that the
products remain, and with them sums, damping and inverses by conjugate gradients.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from curvlib.arguments import check_operator
from curvlib.errors import ArgumentError
from curvlib.operators import BlockDiagonal, Damping, Dense, FactoredTikhonov, Operator, Tikhonov
from curvlib.operators.base import remembered
from curvlib.operators.damping import as_damping, shift
from curvlib.operators.lazy import MAX_DENSE, Lazy
from curvlib.operators.solved import solutions
from curvlib.operators.whole import whole
from curvlib.pytree import Domain, Tree, flatten, register, scale, static, tree_map

ELEMENTS_AT_ONCE = 1 << 26  # of stacked vectors that are multiplied together


def ravel_rows(vectors: Tree) -> Tensor:
    """Vectors stacked along the leading axis of every leaf, as rows [k, D] in the order of `ravel`."""
    return torch.cat([leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1) for leaf in flatten(vectors)[0]], 1)


def unravel_rows(rows: Tensor, domain: Domain) -> Tree:
    """The inverse of `ravel_rows`."""
    parts = rows.split([math.prod(shape) for shape in domain.shapes], 1)
    return domain.tree([part.reshape(len(rows), *shape) for part, shape in zip(parts, domain.shapes, strict=True)])


class Implicit(Lazy):
    """An operator on pytrees that is known by its products.

    Subclasses implement `_apply`, `_scale`, `domain` and `like`.
    """

    @abstractmethod
    def _scale(self, factor: float | Tensor) -> Implicit:
        """Factor times the operator."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Some tensor that has the dtype and the device of a vector."""

    # --- sums, damping and inverses ------------------------------------------------------------------------------

    def inverse(
        self,
        damping: Damping | float | Tensor = 0.0,
        *,
        preconditioner: Operator | None = None,
        tolerance: float = 1e-8,
        max_iterations: int = 1000,
    ) -> ImplicitInverse:
        """(curv + damping)^-1, whose products are solved for: see `solve`. `matmat` solves for all vectors together.

        Args:
            damping: what makes the operator positive definite.
            preconditioner: an operator close to the inverse, such as ``cv.kfac(...).inverse(damping)``.
            tolerance: relative residual at which to stop.
            max_iterations: iterations after which to give up.

        Raises:
            ArgumentError: a tolerance that is not positive, or no iteration.
            DampingError: the damping is negative.
        """
        check_iteration(tolerance, max_iterations)
        inverse = self.power(-1, damping)
        assert isinstance(inverse, ImplicitInverse)
        return dataclasses.replace(
            inverse, preconditioner=preconditioner, tolerance=tolerance, max_iterations=max_iterations
        )

    def _add(self, other: Operator) -> Operator:
        terms = other.terms if isinstance(other, ImplicitSum) else (other,)
        zero = self.like.new_zeros((), dtype=other.dtype)  # both have been made equally wide
        return ImplicitSum((self, *terms), other.shift if isinstance(other, ImplicitSum) else zero)

    def damp(self, damping: Damping | float | Tensor) -> ImplicitSum:
        """The operator plus damping; only damping relative to the mean eigenvalue needs the trace."""
        damping = as_damping(damping)
        absolute = isinstance(damping, Tikhonov) or (isinstance(damping, FactoredTikhonov) and not damping.relative)
        strength = damping.strength if absolute else shift(damping, self.trace() / self.domain.size)
        return ImplicitSum((self,), torch.as_tensor(strength, dtype=self.dtype, device=self.like.device))

    def _power(self, exponent: float, *, damped: bool) -> Operator:
        if exponent == 1:
            return self
        if exponent == -1:
            return ImplicitInverse(self)
        return self.dense()._power(exponent, damped=damped)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        # unlike factors, data may hold integers, which keep their dtype
        moved: Self = tree_map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None), self)
        return moved

    # --- by way of the dense matrix --------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        step = max(1, ELEMENTS_AT_ONCE // self.domain.size)
        one = self.like.new_ones(())
        columns = torch.arange(self.domain.size, device=one.device)
        parts = []
        for numbers in columns.split(step):
            rows = (numbers.unsqueeze(1) == columns).to(one.dtype)
            parts.append(ravel_rows(self.matmat(unravel_rows(rows, self.domain))))
        return torch.cat(parts)

    @remembered
    def dense(self) -> BlockDiagonal:
        if self.domain.size > MAX_DENSE:
            raise ArgumentError(
                "an operator known by its products alone gives entries, eigenvalues and samples by way of the dense "
                f"matrix, up to {MAX_DENSE} parameters; this one has {self.domain.size}: use cv.spectrum.trace, "
                "cv.spectrum.diagonal or cv.diagonal, cv.spectrum.top_eigenvalues or cv.spectrum.density; "
                "curv.inverse(damping), which solves; or an approximation that has them (cv.low_rank, cv.kfac)"
            )
        dense = self.to_dense()
        return whole(Dense((dense + dense.mT) / 2), self.domain)

    def diag(self) -> Tree:
        return self.dense().diag()

    def trace(self) -> Tensor:
        return self.dense().trace()

    def frobenius_norm(self) -> Tensor:
        return self.dense().frobenius_norm()

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        return self.dense()._sample(generator, n)


@register
class ImplicitSum(Implicit):
    """The exact sum of operators on the same pytrees and a multiple of the identity: T_1 + T_2 + ... + shift I.

    Args:
        terms: the operators; the first is an `Implicit` one.
        shift: 0-d tensor.

    Example:
        >>> import curvlib as cv
        >>> from curvlib.estimators import ggn
        >>> model_fn, params = cv.functional(torch.nn.Linear(2, 1))
        >>> batch = (torch.randn(5, 2), torch.randn(5, 1))
        >>> total = ggn(model_fn, params, batch, loss=cv.MSE()) + cv.kfac(model_fn, params, batch, loss=cv.MSE())
        >>> torch.allclose(total.damp(0.5).trace(), total.trace() + 0.5 * 3)
        True
    """

    terms: tuple[Operator, ...]
    shift: Tensor

    @property
    def domain(self) -> Domain:
        return self.terms[0].domain

    @property
    def like(self) -> Tensor:
        return self.shift.to(self.dtype)

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        total = scale(self.shift, self.domain.tree(self.domain.leaves(vectors, leading)))
        for term in self.terms:
            total = tree_map(torch.add, total, term._apply(vectors, leading))
        return total

    def _scale(self, factor: float | Tensor) -> ImplicitSum:
        return ImplicitSum(tuple(term._scale(factor) for term in self.terms), factor * self.shift)


@register
class ImplicitInverse(Implicit):
    """The inverse of an operator: products solve systems by conjugate gradients, stacked vectors together. See `solve`.

    Args:
        operator: what is to be inverted; positive definite.
        preconditioner: an approximation of its inverse.
        tolerance: relative residual at which to stop.
        max_iterations: products with the operator after which to give up.
    """

    operator: Implicit
    preconditioner: Operator | None = None
    tolerance: float = static(default=1e-8)
    max_iterations: int = static(default=1000)

    @property
    def domain(self) -> Domain:
        return self.operator.domain

    @property
    def like(self) -> Tensor:
        return self.operator.like

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        return solutions(
            self.operator,
            self.domain.tree(self.domain.leaves(vectors, leading)),
            leading,
            preconditioner=self.preconditioner,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )

    def _scale(self, factor: float | Tensor) -> ImplicitInverse:
        preconditioner = None if self.preconditioner is None else self.preconditioner._scale(factor)
        return dataclasses.replace(self, operator=self.operator._scale(1 / factor), preconditioner=preconditioner)


def solve(
    operator: Operator,
    vector: Tree,
    *,
    preconditioner: Operator | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
) -> Tree:
    """Solves operator x = vector by preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    The operator must be positive definite: damp it first. Each iteration takes one product with the operator and one
    with the preconditioner.

    Args:
        operator: any operator.
        vector: a vector of its domain.
        preconditioner: an operator close to the inverse, such as ``cv.kfac(...).inverse(damping)``.
        tolerance: relative residual ||vector - operator x|| / ||vector|| at which to stop.
        max_iterations: iterations after which to give up.

    Returns:
        x, a pytree like the vector.

    Raises:
        ConvergenceError: the tolerance was not reached.
        ArgumentError: a tolerance that is not positive, or no iteration.

    Example:
        >>> import curvlib as cv
        >>> from curvlib.estimators import ggn
        >>> model_fn, params = cv.functional(torch.nn.Linear(2, 1))
        >>> batch = (torch.randn(5, 2), torch.randn(5, 1))
        >>> curv = ggn(model_fn, params, batch, loss=cv.MSE()).damp(0.1)
        >>> x = solve(curv, params, preconditioner=cv.kfac(model_fn, params, batch, loss=cv.MSE()).inverse(0.1))
        >>> torch.allclose(cv.ravel(curv @ x), cv.ravel(params), atol=1e-5)
        True
    """
    check_operator(operator)
    check_iteration(tolerance, max_iterations)
    return solutions(
        operator, vector, 0, preconditioner=preconditioner, tolerance=tolerance, max_iterations=max_iterations
    )


def check_iteration(tolerance: float, max_iterations: int) -> None:
    """Refuses what no iteration can reach."""
    if not tolerance > 0 or max_iterations < 1:
        raise ArgumentError(
            f"the tolerance must be positive and max_iterations at least 1, got {tolerance} and {max_iterations}"
        )
