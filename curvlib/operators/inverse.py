"""Inverses that are applied by solving, and how systems are solved."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, ConvergenceError
from curvlib.linalg.conjugate_gradient import conjugate_gradient
from curvlib.operators.base import Operator, check_operator, is_zero, remembered
from curvlib.operators.damping import Damping
from curvlib.operators.interfaces import Determinant
from curvlib.operators.lazy import MAX_DENSE, KnownByProducts, Lazy, dense_operator
from curvlib.operators.shifted import Shifted, shifted
from curvlib.operators.vectors import Params, at_least_single, vector_leaves, widest
from curvlib.pytree import Domain, Tree, register, static, tree_map

ELEMENTS_AT_ONCE = 1 << 26  # of vectors whose systems are solved together


class Solver(ABC):
    """How an operator is inverted: a value that `Operator.inverse` is given."""

    @abstractmethod
    def inverse(self, operator: Operator, damping: Damping | float | Tensor) -> Operator:
        """(operator + damping)^-1, for an operator in float32 at least."""


@register
class CG(Solver):
    """Preconditioned conjugate gradients (Hestenes & Stiefel 1952), for any positive definite operator.

    Each iteration takes one product with the operator and one with the preconditioner; stacked vectors are solved
    together. A system is solved when its residual is ``tolerance`` times as long as the vector (8 eps times in dtypes
    that do not reach it). Products look at values: not under `torch.func.vmap` or in a trace.

    Args:
        preconditioner: an operator close to the inverse, such as ``cv.kfac(...).inverse(damping)``; positive definite.
        tolerance: the relative residual.
        max_iterations: steps after which to give up.

    Raises:
        ArgumentError: a tolerance that is not positive, or no iteration.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(2, 1))
        >>> batch = (torch.randn(5, 2), torch.randn(5, 1))
        >>> rough = cv.kfac(model_fn, params, batch, loss=cv.MSE()).inverse(0.1)
        >>> curv = cv.ggn(model_fn, params, batch, loss=cv.MSE())
        >>> inverse = curv.inverse(0.1, solver=cv.CG(rough, tolerance=1e-6))
        >>> torch.allclose(cv.ravel(curv.damp(0.1) @ (inverse @ params)), cv.ravel(params), atol=1e-5)
        True
    """

    preconditioner: Operator | None = None
    tolerance: float = static(default=1e-8)
    max_iterations: int = static(default=1000)

    def __post_init__(self) -> None:
        if not self.tolerance > 0 or self.max_iterations < 1:
            raise ArgumentError(
                f"the tolerance must be positive and max_iterations at least 1, got {self.tolerance} and "
                f"{self.max_iterations}"
            )

    def inverse(self, operator: Operator, damping: Damping | float | Tensor) -> Inverse:
        return Inverse(operator if is_zero(damping) else operator.damp(damping), self)


@register
class Inverse(KnownByProducts, Determinant):
    """The inverse of an operator, which is applied by solving systems.

    Args:
        operator: what is to be inverted; positive definite.
        solver: how.

    Raises:
        ConvergenceError: the tolerance was not reached (when applied).

    Example:
        >>> from curvlib.operators import Diagonal
        >>> Inverse(Diagonal(torch.tensor([1.0, 4.0])), CG()) @ torch.tensor([1.0, 1.0])
        tensor([1.0000, 0.2500])
    """

    operator: Operator
    solver: CG

    @property
    def domain(self) -> Domain:
        return self.operator.domain

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        eps = torch.finfo(at_least_single(self.domain.leaves(vectors, leading)[0].dtype)).eps
        solver = dataclasses.replace(self.solver, tolerance=max(self.solver.tolerance, 8 * eps))
        try:
            return solutions(self.operator, vectors, leading, solver)
        except ConvergenceError as error:
            if self._matrix_free:
                raise
            raise ConvergenceError(f"{error}; merge_factors (or tied='merge') has an inverse in closed form") from error

    def _inverse(self, shift: Tensor | None, *, damped: bool) -> Operator:
        if shift is None:
            return self.operator
        if self._matrix_free or self.domain.size > MAX_DENSE:
            return Inverse(Shifted(self, shift), CG())
        return self.dense().damp(shift)._power(-1, damped=damped)

    @remembered
    def dense(self) -> Operator:
        """The inverse as an eigendecomposed matrix, where it is small enough."""
        operator = self.operator
        whole = operator.dense() if isinstance(operator, Lazy) else dense_operator(operator, "an operator")
        return whole._power(-1, damped=True)

    def to_dense(self) -> Tensor:
        return self.dense().to_dense()

    def _logdet(self) -> Tensor:
        return -self.operator.logdet()

    def damp(self, damping: Damping | float | Tensor) -> Shifted:
        return shifted(self, damping)

    def _scale(self, factor: float | Tensor) -> Inverse:
        rough = self.solver.preconditioner
        solver = dataclasses.replace(self.solver, preconditioner=None if rough is None else rough._scale(factor))
        return Inverse(self.operator._scale(1 / factor), solver)


def solve(
    operator: Operator,
    vector: Params,
    *,
    preconditioner: Operator | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
) -> Params:
    """Solves operator x = vector by preconditioned conjugate gradients, see `CG`, in one go.

    Args:
        operator: any operator that is positive definite: damp it first.
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
        >>> model_fn, params = cv.functional(torch.nn.Linear(2, 1))
        >>> batch = (torch.randn(5, 2), torch.randn(5, 1))
        >>> curv = cv.ggn(model_fn, params, batch, loss=cv.MSE()).damp(0.1)
        >>> x = solve(curv, params, preconditioner=cv.kfac(model_fn, params, batch, loss=cv.MSE()).inverse(0.1))
        >>> torch.allclose(cv.ravel(curv @ x), cv.ravel(params), atol=1e-5)
        True
    """
    check_operator(operator)
    solution: Params = solutions(operator, vector, 0, CG(preconditioner, tolerance, max_iterations))
    return solution


def solutions(operator: Operator, vectors: Tree, leading: int, solver: CG) -> Tree:
    """Solves operator x = v for vectors with leading axes, many of them at a time.

    Each system is iterated until its own relative residual is at the tolerance, in the widest of the dtypes of the
    operator and the vectors, and in float32 at least.

    Raises:
        ConvergenceError: the tolerance was not reached.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> solutions(Diagonal(torch.tensor([1.0, 4.0])), torch.ones(3, 2), 1, CG(tolerance=1e-6))[0]
        tensor([1.0000, 0.2500])
    """
    domain = operator.domain
    dtype = at_least_single(widest([operator.dtype, *(leaf.dtype for leaf in vector_leaves(vectors))]))
    front = domain.leaves(vectors, leading)[0].shape[:leading]

    def on_rows(operator: Operator) -> Callable[[Tensor], Tensor]:
        operator = operator.widened(widest([dtype, operator.dtype]))
        return lambda stack: domain.rows(operator.matmat(domain.stacked(stack)))

    rows = domain.rows(vectors, leading).to(dtype)
    solved = [
        conjugate_gradient(
            on_rows(operator),
            part,
            preconditioner=None if solver.preconditioner is None else on_rows(solver.preconditioner),
            tolerance=solver.tolerance,
            max_iterations=solver.max_iterations,
            stacked=True,
        )
        for part in rows.split(max(1, ELEMENTS_AT_ONCE // max(1, domain.size)))
    ]
    solution = domain.stacked(torch.cat(solved), front)
    return tree_map(lambda x, v: x.to(v.dtype), solution, vectors)
