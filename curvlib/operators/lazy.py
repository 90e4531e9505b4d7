"""Operators without eigenvalues in closed form: what needs them goes through the dense matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.operators.base import Operator
from curvlib.operators.matrices import Dense
from curvlib.operators.whole import whole
from curvlib.pytree import Tree, flatten

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


class Invertible(Lazy):
    """A lazy operator that can be inverted, alone or with a multiple of the identity added; other powers are dense."""

    @abstractmethod
    def _inverse(self, shift: Tensor | None, *, damped: bool) -> Operator:
        """(curv + shift I)^-1; without a shift, curv^-1."""

    def _power(self, exponent: float, *, damped: bool) -> Operator:
        if exponent == 1:
            return self
        return self._inverse(None, damped=damped) if exponent == -1 else self.dense()._power(exponent, damped=damped)


class KnownByProducts(Invertible):
    """An invertible operator whose entries and samples are those of its dense matrix: nothing else gives them."""

    def diag(self) -> Tree:
        return self.dense().diag()

    def trace(self) -> Tensor:
        return self.dense().trace()

    def frobenius_norm(self) -> Tensor:
        return self.dense().frobenius_norm()

    def _add(self, other: Operator) -> Operator | None:
        return None

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        return self.dense()._sample(generator, n)


def zero_like(operator: Operator) -> Tensor:
    """A 0-d zero that has the dtype and the device of an operator."""
    first = next(x for x in flatten(operator)[0] if x.is_floating_point())
    return first.new_zeros((), dtype=operator.dtype)


def dense_operator(operator: Operator, what: str) -> Operator:
    """An operator as one dense matrix on the same vectors; ``what`` it is called in the error.

    Raises:
        ArgumentError: it has more than `MAX_DENSE` rows.
    """
    size, matrix_free = operator.domain.size, operator._matrix_free
    if size > MAX_DENSE and matrix_free:
        raise ArgumentError(
            "an operator known by its products alone gives entries, eigenvalues and samples by way of the dense "
            f"matrix, up to {MAX_DENSE} parameters; this one has {size}: use cv.spectrum.trace, "
            "cv.spectrum.diagonal or cv.diagonal, cv.spectrum.top_eigenvalues or cv.spectrum.density; "
            "curv.inverse(damping), which solves; or an approximation that has them (cv.low_rank, cv.kfac)"
        )
    if size > MAX_DENSE:
        raise ArgumentError(
            f"the eigenvalues of {what} with {size} rows have no closed form; "
            "use merge_factors (or tied='merge') for an approximation that does, or inverse(damping)"
        )
    dense = operator.to_dense()
    return whole(Dense((dense + dense.mT) / 2 if matrix_free else dense), operator.domain)


def dense_by_products(operator: Operator) -> Tensor:
    """The matrix [D, D] of an operator, from its products with the unit vectors, many at a time."""
    domain, zero = operator.domain, zero_like(operator)
    columns = torch.arange(domain.size, device=zero.device)
    parts = []
    for numbers in columns.split(max(1, ELEMENTS_AT_ONCE // domain.size)):
        units = (numbers.unsqueeze(1) == columns).to(zero.dtype)
        parts.append(domain.rows(operator.matmat(domain.stacked(units))))
    return torch.cat(parts)


ELEMENTS_AT_ONCE = 1 << 26  # of stacked vectors that are multiplied together
