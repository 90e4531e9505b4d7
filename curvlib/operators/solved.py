"""Inverses that are applied by solving."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.errors import ConvergenceError
from curvlib.linalg.conjugate_gradient import conjugate_gradient
from curvlib.operators.base import Operator, remembered
from curvlib.operators.damping import Damping
from curvlib.operators.lazy import Lazy, dense_operator, domain_of
from curvlib.pytree import Domain, Tree, flatten, register, static, unflatten


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
        return domain_of(self.operator)

    def apply(self, vectors: Tree, leading: int) -> Tree:
        leaves, structure = flatten(vectors)
        front = leaves[0].shape[:leading]
        rows = [leaf.reshape(front.numel(), -1) for leaf in leaves]
        widths = [row.shape[1] for row in rows]

        def on_rows(operator: Operator) -> Callable[[Tensor], Tensor]:
            def product(stack: Tensor) -> Tensor:
                parts = stack.split(widths, 1)
                shaped = [part.reshape(-1, *leaf.shape[leading:]) for part, leaf in zip(parts, leaves, strict=True)]
                images = flatten(operator.apply(unflatten(structure, shaped), 1))[0]
                return torch.cat([image.flatten(1) for image in images], 1)

            return product

        try:
            solved = conjugate_gradient(
                on_rows(self.operator),
                torch.cat(rows, 1),
                preconditioner=on_rows(self.preconditioner),
                tolerance=max(self.tolerance, 8 * torch.finfo(rows[0].dtype).eps),
                max_iterations=self.max_iterations,
                stacked=True,
            )
        except ConvergenceError as error:
            raise ConvergenceError(f"{error}; merge_factors (or tied='merge') has an inverse in closed form") from error
        columns = zip(solved.split(widths, 1), leaves, strict=True)
        return unflatten(structure, [column.reshape(leaf.shape) for column, leaf in columns])

    @remembered
    def dense(self) -> Operator:
        """The inverse as an eigendecomposed matrix, where it is small enough."""
        operator = self.operator
        whole = operator.dense() if isinstance(operator, Lazy) else dense_operator(operator, "an operator")
        return whole.raised(-1, damped=True)

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

    def raised(self, exponent: float, *, damped: bool) -> Operator:
        return self.operator if exponent == -1 else self.dense().raised(exponent, damped=damped)

    def scaled(self, factor: float | Tensor) -> SolvedInverse:
        inverse, rough = self.operator.scaled(1 / factor), self.preconditioner.scaled(factor)
        return SolvedInverse(inverse, rough, self.tolerance, self.max_iterations)

    def plus(self, other: Operator) -> Operator | None:
        return None

    def sample(self, generator: torch.Generator, n: int | None = None) -> Tree:
        return self.dense().sample(generator, n)
