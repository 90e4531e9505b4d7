"""Sums of operators, exact and lazy, and their inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import PytreeError
from curvlib.operators.base import Operator, remembered
from curvlib.operators.damping import Damping, FactoredTikhonov
from curvlib.operators.interfaces import FactoredTerms, QuadraticForm
from curvlib.operators.inverse import CG, Inverse
from curvlib.operators.kronecker import Kronecker
from curvlib.operators.lazy import MAX_DENSE, Invertible, dense_operator
from curvlib.operators.row_blocks import row_blocks
from curvlib.operators.shifted import Shifted, shifted
from curvlib.operators.sum_inverses import as_product, direct_inverse, rough_inverse
from curvlib.pytree import Domain, Tree, add, register


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
class Sum(Invertible, QuadraticForm, FactoredTerms):
    """The exact sum of operators on the same vectors: applied term by term, never merged.

    A sum of two Kronecker products is inverted in closed form, see `SimultaneousKronecker`, and so is a damped one if
    the damping can be added to a side, because the other side of its product is a multiple of the identity. With
    `FactoredTikhonov` every product is damped on its own, and two remain two. Products that are all diagonal on one
    side, such as those of a table of tokens, have one matrix a row, see `RowBlocks`. What else needs eigenvalues goes
    through the dense matrix up to `MAX_DENSE` rows; larger sums are inverted by conjugate gradients, see
    `CG`.

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

    def _quadratic(self, v: Tree) -> Tensor:
        return torch.stack([term.quadratic(v) for term in self.terms]).sum()

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
    def by_rows(self) -> Operator | None:
        """The same operator with one matrix a row, if there are `row_blocks`."""
        products = [product for product in map(as_product, self.terms) if product is not None]
        return row_blocks(products, Sum) if len(products) == len(self.terms) else None

    @remembered
    def dense(self) -> Operator:
        rows = self.by_rows()
        return rows if rows is not None else dense_operator(self, f"a sum of {len(self.terms)} operators")

    def damp(self, damping: Damping | float | Tensor) -> Operator:
        damped = self._damp_terms(damping) if isinstance(damping, FactoredTikhonov) else None
        return shifted(self, damping) if damped is None else damped

    def _damp_terms(self, damping: FactoredTikhonov) -> Operator | None:
        products = [term.damp(damping) for term in self.terms if isinstance(term, Kronecker)]
        others = [term for term in self.terms if not isinstance(term, Kronecker)]
        if products and others:
            return lazy_sum(*products) + lazy_sum(*others).damp(damping)
        return lazy_sum(*products) if products else None

    def _inverse(self, shift: Tensor | None, *, damped: bool) -> Operator:
        if shift is None and not damped:
            return self.undamped_inverse()
        return inverse(self, shift, damped=damped)

    @remembered
    def undamped_inverse(self) -> Operator:
        """The inverse of the sum as it is."""
        return inverse(self, None, damped=False)

    def _scale(self, factor: float | Tensor) -> Sum:
        return Sum(tuple(term._scale(factor) for term in self.terms))

    def _add(self, other: Operator) -> Operator | None:
        return None

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        if self._matrix_free:  # a term may be indefinite
            return self.dense()._sample(generator, n)
        total = self.terms[0]._sample(generator, n)
        for term in self.terms[1:]:
            total = add(total, term._sample(generator, n))
        return total


def inverse(total: Sum, shift: Tensor | None, *, damped: bool) -> Operator:
    """The inverse of a sum and shift I: direct, dense or by rows, or by conjugate gradients."""
    operator = total if shift is None else Shifted(total, shift)
    if total._matrix_free:
        return Inverse(operator, CG())
    direct = direct_inverse(total.terms, shift, damped=damped)
    if direct is not None:
        return direct
    if total.domain.size <= MAX_DENSE or total.by_rows() is not None:
        return operator.dense()._power(-1, damped=damped)
    return Inverse(operator, CG(rough_inverse(total.terms, shift, damped=damped)))
