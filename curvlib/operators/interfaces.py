"""What some operators know better than it is derived from the primitives: interfaces that `Operator` asks for.

No method of an operator overrides another one, so that each has one meaning; an exception is an interface of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlib.pytree import Tree

if TYPE_CHECKING:
    from curvlib.operators.base import Operator
    from curvlib.operators.damping import FactoredTikhonov


class QuadraticForm(ABC):
    """An operator whose quadratic forms take less than a product."""

    @abstractmethod
    def _quadratic(self, v: Tree) -> Tensor:
        """v^T curv v for a vector of the operator's dtype."""


class Determinant(ABC):
    """An operator whose determinant takes less than its eigenvalues."""

    @abstractmethod
    def _logdet(self) -> Tensor:
        """Log det curv, of an operator in float32 at least."""


class FactoredTerms(ABC):
    """An operator with terms that `FactoredTikhonov` damps one by one."""

    @abstractmethod
    def _damp_terms(self, damping: FactoredTikhonov) -> Operator | None:
        """The operator with its Kronecker products damped, and d I for the other terms; None: there are no products."""


class Recast(ABC):
    """An operator that is another one in another dtype than that of its tensors, cast."""

    @abstractmethod
    def _recast(self, dtype: torch.dtype) -> Operator | None:
        """The operator in another dtype; None: cast its tensors after all."""


class MatrixFreePart(Recast):
    """An operator that is known by its products alone, which are computed in the dtype of a model."""

    @property
    @abstractmethod
    def model_dtype(self) -> torch.dtype:
        """The dtype that products with the model have."""
