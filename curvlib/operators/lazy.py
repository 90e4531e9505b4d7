"""Operators without eigenvalues in closed form: what needs them goes through the dense matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.operators.base import Operator
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.layout import Layout, Region
from curvlib.operators.matrices import Dense
from curvlib.pytree import Domain

MAX_DENSE = 2048  # the largest operator that is eigendecomposed by way of its dense matrix


class Lazy(Operator):
    """An operator whose products are exact and whose eigenvalues need its dense matrix, up to `MAX_DENSE` rows."""

    @property
    @abstractmethod
    def domain(self) -> Domain:
        """Structure, names and shapes of its vectors."""

    @abstractmethod
    def dense(self) -> Operator:
        """The same operator as one matrix, which is eigendecomposed at most once.

        Raises:
            ArgumentError: it has more than `MAX_DENSE` rows.
        """

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.domain.shapes

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return {"params": self}

    @property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        return dict.fromkeys(self.domain.names, ("params",))

    def spectrum(self) -> Tensor:
        return self.dense().spectrum()

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> Operator:
        return self.dense().map_eigenvalues(fn)


def domain_of(operator: Operator) -> Domain:
    """The domain of any operator: those on params know it, a block's is that of one tensor.

    Raises:
        ArgumentError: it acts on several leaves, but does not know the pytree they belong to.
    """
    domain = getattr(operator, "domain", None)  # a field of some operators, a property of others
    if isinstance(domain, Domain):
        return domain
    if len(operator.shapes) == 1:
        return Domain.of_tensor(operator.shapes[0])
    raise ArgumentError(
        f"{type(operator).__name__} does not say which pytree its {len(operator.shapes)} leaves belong to; "
        "pass like=params"
    )


def dense_operator(operator: Operator, what: str) -> Operator:
    """An operator as one dense matrix on the same vectors; ``what`` it is called in the error.

    Raises:
        ArgumentError: it has more than `MAX_DENSE` rows.
    """
    if operator.size > MAX_DENSE:
        raise ArgumentError(
            f"the eigenvalues of {what} with {operator.size} rows have no closed form; "
            "use merge_factors (or tied='merge') for an approximation that does, or inverse(damping)"
        )
    domain = domain_of(operator)
    wholes = [Region.whole(i, shape) for i, shape in enumerate(domain.shapes)]
    layout = Layout(tuple(region.reshape(region.numel) for region in wholes))
    return BlockDiagonal({"params": Dense(operator.to_dense())}, (("params", layout),), domain)
