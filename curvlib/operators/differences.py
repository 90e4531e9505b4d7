"""Differences of operators: products and numbers are exact, and nothing is taken for positive definite."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import SingularError
from curvlib.operators.base import Operator, remembered
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.damping import Damping
from curvlib.operators.interfaces import QuadraticForm
from curvlib.operators.lazy import MAX_DENSE, Invertible
from curvlib.operators.matrices import Matrix
from curvlib.operators.shifted import Shifted, shifted
from curvlib.operators.sums import Sum, lazy_sum
from curvlib.pytree import Domain, Tree, register


def difference(a: Operator, b: Operator) -> Operator:
    """A - b for operators on the same vectors: block by block, in closed form where there is one."""
    match a, b:
        case BlockDiagonal(), BlockDiagonal() if (a.layouts, a.domain) == (b.layouts, b.domain):
            blocks = {name: block - b.operators[name] for name, _, block in a.items()}
            return BlockDiagonal(blocks, a.layouts, a.domain)
        case Matrix(), Matrix():
            negative = b._scale(-1.0)
            total = a._add(negative)
            total = total if total is not None else negative._add(a)
            if total is not None:
                return total
        case (_, Difference()):
            return a + Difference(b.subtrahend, b.minuend)
        case (Difference(), _):
            return Difference(a.minuend, a.subtrahend + b)
    return Difference(a, b)


@register
class Difference(Invertible, QuadraticForm):
    """The exact difference of two operators on the same vectors, which may be indefinite.

    Products, sums, the diagonal and the trace are those of the parts. What needs eigenvalues, inverses and powers above
    all, goes through the dense matrix, up to `MAX_DENSE` rows, and is refused beyond.

    Args:
        minuend: what is subtracted from.
        subtrahend: what is subtracted.

    Example:
        >>> from curvlib.operators import Dense, Kronecker
        >>> a = Kronecker(Dense(2 * torch.eye(2)), Dense(torch.eye(2)))
        >>> b = Kronecker(Dense(torch.eye(2)), Dense(torch.eye(2)))
        >>> (a - b).trace(), (a - b).inverse().trace()
        (tensor(4.), tensor(4.))
    """

    minuend: Operator
    subtrahend: Operator

    @property
    def domain(self) -> Domain:
        return self.minuend.domain

    def total(self) -> Sum:
        """The sum with the negative subtrahend."""
        total = lazy_sum(self.minuend, self.subtrahend._scale(-1.0))
        assert isinstance(total, Sum)
        return total

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        return self.total()._apply(vectors, leading)

    def _quadratic(self, v: Tree) -> Tensor:
        return self.minuend.quadratic(v) - self.subtrahend.quadratic(v)

    def to_dense(self) -> Tensor:
        return self.total().to_dense()

    def diag(self) -> Tree:
        return self.total().diag()

    def trace(self) -> Tensor:
        return self.minuend.trace() - self.subtrahend.trace()

    def frobenius_norm(self) -> Tensor:
        return self.total().frobenius_norm()

    @remembered
    def dense(self) -> Operator:
        if self.domain.size > MAX_DENSE:
            raise SingularError(
                f"a difference of operators may be indefinite: eigenvalues, inverses, powers and samples of it go "
                f"through the dense matrix, up to {MAX_DENSE} rows, and this one has {self.domain.size}; add damping "
                "and solve, inverse(damping, solver=cv.CG()), which finds out"
            )
        return self.total().dense()

    def damp(self, damping: Damping | float | Tensor) -> Shifted:
        return shifted(self, damping)

    def _inverse(self, shift: Tensor | None, *, damped: bool) -> Operator:
        dense = self.dense()
        return (dense if shift is None else dense.damp(shift))._power(-1, damped=False)

    def _scale(self, factor: float | Tensor) -> Difference:
        return Difference(self.minuend._scale(factor), self.subtrahend._scale(factor))

    def _add(self, other: Operator) -> Operator | None:
        if isinstance(other, Difference):
            return Difference(self.minuend + other.minuend, self.subtrahend + other.subtrahend)
        return Difference(self.minuend + other, self.subtrahend)

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        return self.dense()._sample(generator, n)
