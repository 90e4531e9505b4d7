"""Operators that are known by their products alone.

What needs every entry or the eigenvalues goes through the dense matrix, up to `MAX_DENSE` rows. Beyond that the
products remain, and with them sums, damping and inverses by conjugate gradients.
"""

from __future__ import annotations

from torch import Tensor

from curvlib.operators.base import Operator, remembered
from curvlib.operators.damping import Damping
from curvlib.operators.interfaces import MatrixFreePart
from curvlib.operators.inverse import CG, Inverse
from curvlib.operators.lazy import KnownByProducts, dense_by_products, dense_operator
from curvlib.operators.shifted import Shifted, shifted


class Implicit(KnownByProducts, MatrixFreePart):
    """An operator on pytrees that is known by its products.

    Subclasses implement `_apply`, `_scale`, `domain`, `model_dtype` and `_recast`.
    """

    def damp(self, damping: Damping | float | Tensor) -> Shifted:
        """The operator plus damping; only damping relative to the mean eigenvalue needs the trace."""
        return shifted(self, damping)

    def _inverse(self, shift: Tensor | None, *, damped: bool) -> Operator:
        return Inverse(self if shift is None else Shifted(self, shift), CG())

    def to_dense(self) -> Tensor:
        return dense_by_products(self)

    @remembered
    def dense(self) -> Operator:
        return dense_operator(self, "an operator")
