"""Sums of operators, exact and lazy, and the solution of systems with them."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import PytreeError
from curvlib.operators.base import Operator, remembered
from curvlib.operators.damping import Damping, Tikhonov, as_damping, shift
from curvlib.operators.kronecker import Kronecker
from curvlib.operators.lazy import MAX_DENSE, Lazy, dense_operator
from curvlib.operators.matrices import normal
from curvlib.operators.solved import SolvedInverse
from curvlib.operators.sum_inverses import direct_inverse, rough_inverse
from curvlib.pytree import Domain, Tree, add, register, tree_map
from curvlib.pytree import scale as scale_tree


def lazy_sum(*operators: Operator) -> Operator:
    """The sum of operators that act on the same vectors, without a closed form."""
    terms: tuple[Operator, ...] = ()
    for operator in operators:
        terms += operator.terms if isinstance(operator, Sum) else (operator,)
    shapes = [term.domain.shapes for term in terms]
    if len(set(shapes)) > 1:
        raise PytreeError(f"the operators to be added act on vectors of shapes {shapes}")
    return Sum(terms)


@register
class Sum(Lazy):
    """The exact sum of operators on the same vectors: applied term by term, never merged.

    A sum of two Kronecker products is inverted in closed form, see `SimultaneousKronecker`, and so is a damped one if
    the damping can be added to a side, because the other side of its product is a multiple of the identity. Products
    that are damped one by one, with `FactoredTikhonov`, and then added, remain two. What else needs eigenvalues goes
    through the dense matrix up to `MAX_DENSE` rows; larger sums are inverted by conjugate gradients, see
    `SolvedInverse`.

    Args:
        terms: the operators.

    Example:
        >>> from curvlib.operators import Dense
        >>> a = Kronecker(Dense(torch.eye(2)), Dense(torch.eye(2)))
        >>> (a + a).trace()
        tensor(8.)
    """

    terms: tuple[Operator, ...]

    @property
    def domain(self) -> Domain:
        return self.terms[0].domain

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        total = self.terms[0]._apply(vectors, leading)
        for term in self.terms[1:]:
            total = add(total, term._apply(vectors, leading))
        return total

    def to_dense(self) -> Tensor:
        return torch.stack([term.to_dense() for term in self.terms]).sum(0)

    def diag(self) -> Tree:
        total = self.terms[0].diag()
        for term in self.terms[1:]:
            total = add(total, term.diag())
        return total

    def trace(self) -> Tensor:
        return torch.stack([term.trace() for term in self.terms]).sum()

    def frobenius_norm(self) -> Tensor:
        if not all(isinstance(term, Kronecker) for term in self.terms):
            return self.dense().frobenius_norm()
        # ||sum_i G_i (x) A_i||^2 = sum_ij <G_i, G_j> <A_i, A_j>
        sides = [[getattr(term, side) for term in self.terms] for side in ("left", "right")]
        products = [g.inner(h) * a.inner(b) for g, a in zip(*sides, strict=True) for h, b in zip(*sides, strict=True)]
        return torch.stack([product.sum() for product in products]).sum().clamp(min=0).sqrt()

    @remembered
    def dense(self) -> Operator:
        return dense_operator(self, f"a sum of {len(self.terms)} operators")

    def damp(self, damping: Damping | float | Tensor) -> DampedSum:
        trace = self.trace()
        strength = shift(as_damping(damping), trace / self.domain.size)
        return DampedSum(self, torch.as_tensor(strength, dtype=trace.dtype, device=trace.device))

    def _power(self, exponent: float, *, damped: bool) -> Operator:
        if exponent == 1:
            return self
        if exponent == -1:
            return inverse(self, self.terms, None, damped=True) if damped else self.undamped_inverse()
        return self.dense()._power(exponent, damped=damped)

    @remembered
    def undamped_inverse(self) -> Operator:
        """The inverse of the sum as it is."""
        return inverse(self, self.terms, None, damped=False)

    def _scale(self, factor: float | Tensor) -> Sum:
        return Sum(tuple(term._scale(factor) for term in self.terms))

    def _add(self, other: Operator) -> Operator | None:
        return None

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        total = self.terms[0]._sample(generator, n)
        for term in self.terms[1:]:
            total = add(total, term._sample(generator, n))
        return total


@register
class DampedSum(Lazy):
    """A sum plus d I. Every damping of a sum shares what the sum remembers, its eigendecomposition above all.

    Args:
        total: the sum.
        shift: d, a 0-d tensor.

    Example:
        >>> from curvlib.operators import Dense
        >>> a = Kronecker(Dense(torch.eye(2)), Dense(torch.eye(2)))
        >>> (a + a).damp(0.5).trace()
        tensor(10.)
    """

    total: Sum
    shift: Tensor

    @property
    def domain(self) -> Domain:
        return self.total.domain

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        return add(self.total._apply(vectors, leading), scale_tree(self.shift, vectors))

    def to_dense(self) -> Tensor:
        dense = self.total.to_dense()
        return dense + self.shift * torch.eye(len(dense), dtype=dense.dtype, device=dense.device)

    def diag(self) -> Tree:
        return tree_map(lambda x: x + self.shift, self.total.diag())

    def trace(self) -> Tensor:
        return self.total.trace() + self.domain.size * self.shift

    def frobenius_norm(self) -> Tensor:
        # ||K + d I||^2 = ||K||^2 + 2 d tr K + d^2 D
        cross = self.shift * (2 * self.total.trace() + self.domain.size * self.shift)
        squares = self.total.frobenius_norm().square() + cross
        return squares.clamp(min=0).sqrt()

    def dense(self) -> Operator:
        return self.total.dense().damp(self.shift)

    def damp(self, damping: Damping | float | Tensor) -> DampedSum:
        return DampedSum(self.total, self.shift + shift(as_damping(damping), self.trace() / self.domain.size))

    def _power(self, exponent: float, *, damped: bool) -> Operator:
        if exponent == 1:
            return self
        if exponent == -1:
            return inverse(self, self.total.terms, self.shift, damped)
        return self.dense()._power(exponent, damped=damped)

    def _scale(self, factor: float | Tensor) -> DampedSum:
        return DampedSum(self.total._scale(factor), factor * self.shift)

    def _add(self, other: Operator) -> Operator | None:
        return (self.total + other).damp(Tikhonov(self.shift))

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        draws = self.total._sample(generator, n)
        return tree_map(lambda x: x + self.shift.sqrt() * normal(x, generator, None), draws)


def inverse(operator: Sum | DampedSum, terms: tuple[Operator, ...], shift: Tensor | None, damped: bool) -> Operator:
    """The inverse of ``operator``, the sum of the terms and shift I: direct, dense, or by conjugate gradients."""
    direct = direct_inverse(terms, shift, damped=damped)
    if direct is not None:
        return direct
    if operator.domain.size <= MAX_DENSE:
        return operator.dense()._power(-1, damped=damped)
    return SolvedInverse(operator, rough_inverse(terms, shift, damped=damped))
