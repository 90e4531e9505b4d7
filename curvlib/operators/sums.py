"""Sums of operators, exact and lazy, and the solution of systems with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, PytreeError
from curvlib.linalg.conjugate_gradient import conjugate_gradient
from curvlib.operators.base import Operator, remembered
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.damping import Damping, Tikhonov, as_damping, shift
from curvlib.operators.kronecker import Kronecker
from curvlib.operators.layout import Layout, Region
from curvlib.operators.matrices import Dense, ScaledIdentity
from curvlib.pytree import Domain, Tree, add, flatten, ravel, register, unflatten, unravel

MAX_DENSE = 2048  # the largest sum that is eigendecomposed by way of its dense matrix


def lazy_sum(*operators: Operator) -> Operator:
    """The sum of operators that act on the same vectors, without a closed form."""
    terms: tuple[Operator, ...] = ()
    for operator in operators:
        terms += operator.terms if isinstance(operator, Sum) else (operator,)
    if len({term.shapes for term in terms}) > 1:
        raise PytreeError(f"the operators to be added act on vectors of shapes {[term.shapes for term in terms]}")
    return Sum(terms)


@register
class Sum(Operator):
    """The exact sum of operators on the same vectors: applied term by term, never merged.

    What needs eigenvalues goes through the dense matrix up to `MAX_DENSE` rows; larger sums can be damped and
    inverted, which solves each system by preconditioned conjugate gradients.

    Args:
        terms: the operators.

    Example:
        >>> a = Kronecker(Dense(torch.eye(2)), Dense(torch.eye(2)))
        >>> (a + a).trace()
        tensor(8.)
    """

    terms: tuple[Operator, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.terms[0].shapes

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return {"params": self}

    @property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        return dict.fromkeys(self.terms[0].parameters, ("params",))

    def apply(self, vectors: Tree, leading: int) -> Tree:
        total = self.terms[0].apply(vectors, leading)
        for term in self.terms[1:]:
            total = add(total, term.apply(vectors, leading))
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
        sides = [[getattr(term, side).matrices() for term in self.terms] for side in ("left", "right")]
        products = [
            (g * h).sum((-2, -1)) * (a * b).sum((-2, -1))
            for g, a in zip(*sides, strict=True)
            for h, b in zip(*sides, strict=True)
        ]
        return torch.stack([product.sum() for product in products]).sum().clamp(min=0).sqrt()

    @remembered
    def dense(self) -> Operator:
        """The same operator as one dense matrix.

        Raises:
            ArgumentError: it has more than `MAX_DENSE` rows.
        """
        if self.size > MAX_DENSE:
            raise ArgumentError(
                f"the eigenvalues of a sum of {len(self.terms)} operators with {self.size} rows have no closed form; "
                "use merge_factors (or tied='merge') for an approximation that does, or inverse(damping)"
            )
        first = self.terms[0]
        domain = first.domain if isinstance(first, BlockDiagonal) else Domain.of_tensor(self.shapes[0])
        wholes = [Region.whole(i, shape) for i, shape in enumerate(domain.shapes)]
        layout = Layout(tuple(region.reshape(region.numel) for region in wholes))
        return BlockDiagonal({"params": Dense(self.to_dense())}, (("params", layout),), domain)

    def spectrum(self) -> Tensor:
        return self.dense().spectrum()

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> Operator:
        return self.dense().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> Sum:
        trace = self.trace()
        strength = shift(as_damping(damping), trace / self.size)
        first = self.terms[0]
        if isinstance(first, BlockDiagonal):
            return Sum((first.damp(Tikhonov(strength)), *self.terms[1:]))
        scale = torch.as_tensor(strength, dtype=trace.dtype, device=trace.device)
        return Sum((*self.terms, ScaledIdentity(scale, self.shapes[0])))

    def raised(self, exponent: float, *, damped: bool) -> Operator:
        if exponent == 1:
            return self
        if self.size > MAX_DENSE and exponent == -1:
            return SolvedInverse(self, merged(self).raised(-1, damped=damped))
        return self.dense().raised(exponent, damped=damped)

    def scaled(self, factor: float | Tensor) -> Sum:
        return Sum(tuple(term.scaled(factor) for term in self.terms))

    def plus(self, other: Operator) -> Operator | None:
        return None

    def sample(self, generator: torch.Generator, n: int | None = None) -> Tree:
        total = self.terms[0].sample(generator, n)
        for term in self.terms[1:]:
            total = add(total, term.sample(generator, n))
        return total


def merged(total: Sum) -> Operator:
    """An approximation of a sum that can be inverted: its Kronecker products merged, all else added.

    sum_i G_i (x) A_i is replaced by (sum_i G_i) (x) (mean_i A_i).
    """
    if isinstance(total.terms[0], BlockDiagonal):
        return total.terms[0]
    products = [term for term in total.terms if isinstance(term, Kronecker)]
    others = [term for term in total.terms if not isinstance(term, Kronecker)]
    if not products:
        return others[0]
    left = torch.stack(torch.broadcast_tensors(*(term.left.matrices() for term in products))).sum(0)
    right = torch.stack(torch.broadcast_tensors(*(term.right.matrices() for term in products))).mean(0)
    result: Operator = Kronecker(Dense(left), Dense(right))
    for other in others:
        if isinstance(other, ScaledIdentity):
            result = result.damp(Tikhonov(other.scale))
    return result


@register
class SolvedInverse(Operator):
    """The inverse of an operator, applied by preconditioned conjugate gradients to a relative residual of 1e-8.

    Args:
        operator: what is to be inverted.
        preconditioner: an approximation of its inverse.
    """

    operator: Operator
    preconditioner: Operator

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.operator.shapes

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return {"params": self}

    @property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        return self.operator.parameters

    def solve(self, vector: Tree) -> Tree:
        """One system."""

        def flat(operator: Operator) -> Callable[[Tensor], Tensor]:
            return lambda v: ravel(operator.apply(unravel(v, vector), 0))

        b = ravel(vector)
        return unravel(
            conjugate_gradient(
                flat(self.operator), b, preconditioner=flat(self.preconditioner), tolerance=1e-8, max_iterations=1000
            ),
            vector,
        )

    def apply(self, vectors: Tree, leading: int) -> Tree:
        if leading == 0:
            return self.solve(vectors)
        leaves, structure = flatten(vectors)
        solved = [flatten(self.solve(unflatten(structure, row)))[0] for row in zip(*leaves, strict=True)]
        return unflatten(structure, [torch.stack(column) for column in zip(*solved, strict=True)])

    def dense(self) -> Operator:
        """The inverse as an eigendecomposed matrix, where it is small enough."""
        return Sum((self.operator,)).dense().raised(-1, damped=True)

    def to_dense(self) -> Tensor:
        return self.dense().to_dense()

    def diag(self) -> Tree:
        return self.dense().diag()

    def trace(self) -> Tensor:
        return self.dense().trace()

    def frobenius_norm(self) -> Tensor:
        return self.dense().frobenius_norm()

    def spectrum(self) -> Tensor:
        return self.dense().spectrum()

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> Operator:
        return self.dense().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> Operator:
        return self.dense().damp(damping)

    def raised(self, exponent: float, *, damped: bool) -> Operator:
        return self.operator if exponent == -1 else self.dense().raised(exponent, damped=damped)

    def scaled(self, factor: float | Tensor) -> SolvedInverse:
        return SolvedInverse(self.operator.scaled(1 / factor), self.preconditioner.scaled(factor))

    def plus(self, other: Operator) -> Operator | None:
        return None

    def sample(self, generator: torch.Generator, n: int | None = None) -> Tree:
        return self.dense().sample(generator, n)
