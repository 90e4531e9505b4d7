"""Inverses that are applied by solving."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.errors import ConvergenceError
from curvlib.linalg.conjugate_gradient import conjugate_gradient
from curvlib.operators.base import Operator, remembered
from curvlib.operators.damping import Damping
from curvlib.operators.lazy import Lazy, dense_operator
from curvlib.operators.vectors import at_least_single, vector_leaves, widest
from curvlib.pytree import Domain, Tree, flatten, register, static, unflatten

ELEMENTS_AT_ONCE = 1 << 26  # of vectors whose systems are solved together


@register
class SolvedInverse(Lazy):
    """The inverse of an operator, applied by preconditioned conjugate gradients; stacked vectors are solved together.

    A system is solved when its residual is ``tolerance`` times as long as the vector (8 eps times in dtypes that do not
    reach it). Applying it looks at values: not under `torch.func.vmap` or in a trace.

    Args:
        operator: what is to be inverted.
        preconditioner: an approximation of its inverse, positive definite.
        tolerance: the relative residual.
        max_iterations: steps after which to give up.

    Raises:
        ConvergenceError: the tolerance was not reached (when applied).

    Example:
        >>> from curvlib.operators import Diagonal
        >>> curv = Diagonal(torch.tensor([1.0, 4.0]))
        >>> SolvedInverse(curv, Diagonal(torch.ones(2))) @ torch.tensor([1.0, 1.0])
        tensor([1.0000, 0.2500])
    """

    operator: Operator
    preconditioner: Operator
    tolerance: float = static(default=1e-8)
    max_iterations: int = static(default=1000)

    @property
    def domain(self) -> Domain:
        return self.operator.domain

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        eps = torch.finfo(at_least_single(flatten(vectors)[0][0].dtype)).eps
        try:
            return solutions(
                self.operator,
                vectors,
                leading,
                preconditioner=self.preconditioner,
                tolerance=max(self.tolerance, 8 * eps),
                max_iterations=self.max_iterations,
            )
        except ConvergenceError as error:
            raise ConvergenceError(f"{error}; merge_factors (or tied='merge') has an inverse in closed form") from error

    @remembered
    def dense(self) -> Operator:
        """The inverse as an eigendecomposed matrix, where it is small enough."""
        operator = self.operator
        whole = operator.dense() if isinstance(operator, Lazy) else dense_operator(operator, "an operator")
        return whole._power(-1, damped=True)

    def to_dense(self) -> Tensor:
        return self.dense().to_dense()

    def diag(self) -> Tree:
        return self.dense().diag()

    def trace(self) -> Tensor:
        return self.dense().trace()

    def frobenius_norm(self) -> Tensor:
        return self.dense().frobenius_norm()

    def damp(self, damping: Damping | float | Tensor) -> Operator:
        return self.dense().damp(damping)

    def _power(self, exponent: float, *, damped: bool) -> Operator:
        return self.operator if exponent == -1 else self.dense()._power(exponent, damped=damped)

    def _scale(self, factor: float | Tensor) -> SolvedInverse:
        inverse, rough = self.operator._scale(1 / factor), self.preconditioner._scale(factor)
        return SolvedInverse(inverse, rough, self.tolerance, self.max_iterations)

    def _add(self, other: Operator) -> Operator | None:
        return None

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        return self.dense()._sample(generator, n)


def solutions(
    operator: Operator,
    vectors: Tree,
    leading: int,
    *,
    preconditioner: Operator | None,
    tolerance: float,
    max_iterations: int,
) -> Tree:
    """Solves operator x = v for vectors with leading axes, by conjugate gradients, many of them at a time.

    Each system is iterated until its own relative residual is at the tolerance, in the widest of the dtypes of the
    operator and the vectors, and in float32 at least.

    Raises:
        ConvergenceError: the tolerance was not reached.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> curv, vectors = Diagonal(torch.tensor([1.0, 4.0])), torch.ones(3, 2)
        >>> solutions(curv, vectors, 1, preconditioner=None, tolerance=1e-6, max_iterations=9)[0]
        tensor([1.0000, 0.2500])
    """
    leaves, structure = flatten(vectors)
    number, shapes = leaves[0].shape[:leading].numel(), [leaf.shape[leading:] for leaf in leaves]
    widths = [shape.numel() for shape in shapes]
    dtype = at_least_single(widest([operator.dtype, *(leaf.dtype for leaf in vector_leaves(vectors))]))

    def on_rows(operator: Operator) -> Callable[[Tensor], Tensor]:
        operator = operator.widened(widest([dtype, operator.dtype]))

        def product(stack: Tensor) -> Tensor:
            parts = [x.reshape(len(stack), *shape) for x, shape in zip(stack.split(widths, 1), shapes, strict=True)]
            images = flatten(operator.matmat(unflatten(structure, parts)))[0]
            return torch.cat([x.reshape(len(stack), width) for x, width in zip(images, widths, strict=True)], 1)

        return product

    rows = torch.cat([leaf.reshape(number, width) for leaf, width in zip(leaves, widths, strict=True)], 1).to(dtype)
    solved = [
        conjugate_gradient(
            on_rows(operator),
            part,
            preconditioner=None if preconditioner is None else on_rows(preconditioner),
            tolerance=tolerance,
            max_iterations=max_iterations,
            stacked=True,
        )
        for part in rows.split(max(1, ELEMENTS_AT_ONCE // max(1, sum(widths))))
    ]
    columns = zip(torch.cat(solved).split(widths, 1), leaves, strict=True)
    return unflatten(structure, [column.reshape(leaf.shape).to(leaf.dtype) for column, leaf in columns])
