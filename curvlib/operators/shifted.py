"""An operator plus a multiple of the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.operators.base import Operator
from curvlib.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping, shift
from curvlib.operators.interfaces import FactoredTerms, QuadraticForm
from curvlib.operators.lazy import Invertible, zero_like
from curvlib.operators.matrices import normal
from curvlib.pytree import Domain, Tree, add, inner, register, scale, tree_map


@register
class Shifted(Invertible, QuadraticForm):
    """K + d I. Every damping of an operator shares what the operator remembers, its eigendecomposition above all.

    Args:
        operator: K.
        shift: d, a 0-d tensor.

    Example:
        >>> from curvlib.operators import Dense, Kronecker
        >>> a = Kronecker(Dense(torch.eye(2)), Dense(torch.eye(2)))
        >>> (a + a).damp(0.5).trace()
        tensor(10.)
    """

    operator: Invertible
    shift: Tensor

    @property
    def domain(self) -> Domain:
        return self.operator.domain

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        return add(self.operator._apply(vectors, leading), scale(self.shift, vectors))

    def _quadratic(self, v: Tree) -> Tensor:
        return self.operator.quadratic(v) + self.shift * inner(v, v)

    def to_dense(self) -> Tensor:
        dense = self.operator.to_dense()
        return dense + self.shift * torch.eye(len(dense), dtype=dense.dtype, device=dense.device)

    def diag(self) -> Tree:
        return tree_map(lambda x: x + self.shift, self.operator.diag())

    def trace(self) -> Tensor:
        return self.operator.trace() + self.domain.size * self.shift

    def frobenius_norm(self) -> Tensor:
        # ||K + d I||^2 = ||K||^2 + 2 d tr K + d^2 D
        cross = self.shift * (2 * self.operator.trace() + self.domain.size * self.shift)
        return (self.operator.frobenius_norm().square() + cross).clamp(min=0).sqrt()

    def dense(self) -> Operator:
        return self.operator.dense().damp(self.shift)

    def damp(self, damping: Damping | float | Tensor) -> Operator:
        if isinstance(damping, FactoredTikhonov) and isinstance(self.operator, FactoredTerms):
            damped = self.operator._damp_terms(damping)
            if damped is not None:
                return damped.damp(Tikhonov(self.shift))
        return Shifted(self.operator, self.shift + shifted(self, damping).shift)

    def _inverse(self, shift: Tensor | None, *, damped: bool) -> Operator:
        return self.operator._inverse(self.shift if shift is None else self.shift + shift, damped=damped)

    def _scale(self, factor: float | Tensor) -> Operator:
        return self.operator._scale(factor).damp(Tikhonov(factor * self.shift))

    def _add(self, other: Operator) -> Operator | None:
        return (self.operator + other).damp(Tikhonov(self.shift))

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        from curvlib.operators.differences import Difference  # which may be indefinite, as may what is matrix-free

        if self._matrix_free or isinstance(self.operator, Difference):
            return self.dense()._sample(generator, n)
        draws = self.operator._sample(generator, n)
        return tree_map(lambda x: x + self.shift.sqrt() * normal(x, generator, None), draws)


def shifted(operator: Invertible, damping: Damping | float | Tensor) -> Shifted:
    """An operator without factors of its own plus damping; only relative damping needs its trace."""
    damping, zero = as_damping(damping), zero_like(operator)
    absolute = isinstance(damping, Tikhonov) or (isinstance(damping, FactoredTikhonov) and not damping.relative)
    strength = shift(damping, zero if absolute else operator.trace() / operator.domain.size)
    return Shifted(operator, torch.as_tensor(strength, dtype=zero.dtype, device=zero.device))
