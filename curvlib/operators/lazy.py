"""Operators without eigenvalues in closed form: what needs them goes through the dense matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.operators.base import Operator
from curvlib.operators.matrices import Dense
from curvlib.operators.whole import whole

MAX_DENSE = 2048  # the largest operator that is eigendecomposed by way of its dense matrix


class Lazy(Operator):
    """An operator whose products are exact and whose eigenvalues need its dense matrix, up to `MAX_DENSE` rows."""

    @abstractmethod
    def dense(self) -> Operator:
        """The same operator as one matrix, which is eigendecomposed at most once.

        Raises:
            ArgumentError: it has more than `MAX_DENSE` rows.
        """

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return {"params": self}

    @property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        return dict.fromkeys(self.domain.names, ("params",))

    def _eigenvalues(self) -> Tensor:
        return self.dense()._eigenvalues()

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> Operator:
        return self.dense().map_eigenvalues(fn)


def dense_operator(operator: Operator, what: str) -> Operator:
    """An operator as one dense matrix on the same vectors; ``what`` it is called in the error.

    Raises:
        ArgumentError: it has more than `MAX_DENSE` rows.
    """
    if operator.domain.size > MAX_DENSE:
        raise ArgumentError(
            f"the eigenvalues of {what} with {operator.domain.size} rows have no closed form; "
            "use merge_factors (or tied='merge') for an approximation that does, or inverse(damping)"
        )
    return whole(Dense(operator.to_dense()), operator.domain)
