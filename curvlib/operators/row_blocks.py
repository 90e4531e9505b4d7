"""Sums of Kronecker products whose sides are diagonal on one side: one small matrix a row.

The curvature of a table that is embedding and head is D_1 (x) M_1 + D_2 (x) M_2, with the frequencies of the tokens in
D_1. Row i of a matrix V is multiplied by d_1i M_1 + d_2i M_2. Where one term is not zero, its eigenbasis is that of the
row, with damping or without; only the other rows, few where few tokens occur, need a matrix of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlib.linalg.eager import is_eager
from curvlib.operators.base import Operator
from curvlib.operators.bases import CanonicalBasis
from curvlib.operators.cholesky import shifted_side
from curvlib.operators.damping import Damping, Tikhonov, as_damping, shift
from curvlib.operators.interfaces import Recast
from curvlib.operators.kronecker import EigenKronecker, Kronecker, MatrixBlock
from curvlib.operators.matrices import Dense, Diagonal, Matrix
from curvlib.operators.simultaneous import is_diagonal
from curvlib.operators.vectors import check_shape
from curvlib.pytree import register, static

MAX_ROW_ELEMENTS = 1 << 27  # of the matrices of all rows that need one of their own


@register
class RowBlocks(MatrixBlock, Recast):
    """Operators on groups of the rows of a matrix [m, n], or of its columns; no two groups interact.

    Args:
        parts: one operator a group, on the matrix [r, n] of its rows, or [r, m] of its columns.
        order: the numbers of the rows or columns, group by group, [m] or [n].
        columns: whether the groups are of columns.

    Example:
        >>> parts = tuple(Diagonal(torch.full((rows, 2), float(rows))) for rows in (1, 2))
        >>> RowBlocks(parts, torch.tensor([1, 0, 2]), False) @ torch.ones(3, 2)
        tensor([[2., 2.],
                [1., 1.],
                [2., 2.]])
    """

    parts: tuple[Operator, ...]
    order: Tensor
    columns: bool = static()

    @property
    def sizes(self) -> list[int]:
        """The number of rows of every group."""
        return [part.domain.shapes[0][-2] for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a vector, [m, n]."""
        rows, width = sum(self.sizes), self.parts[0].domain.shapes[0][-1]
        return (width, rows) if self.columns else (rows, width)

    def _recast(self, dtype: torch.dtype) -> RowBlocks:
        return RowBlocks(tuple(part.widened(dtype) for part in self.parts), self.order, self.columns)

    def gather(self, v: Tensor) -> tuple[Tensor, ...]:
        """The rows of every group, of V [*, m, n]."""
        rows = v.mT if self.columns else v
        return rows.index_select(-2, self.order).split(self.sizes, -2)

    def scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """V [*, m, n] of the rows of every group."""
        rows = torch.cat(list(parts), -2).index_select(-2, self.order.argsort())
        return rows.mT if self.columns else rows

    def map_parts(self, fn: Callable[[Operator], Operator]) -> RowBlocks:
        """The operator with ``fn`` applied to that of every group."""
        return RowBlocks(tuple(map(fn, self.parts)), self.order, self.columns)

    def _apply(self, vectors: Tensor, leading: int) -> Tensor:
        check_shape(vectors, leading, self.shape)
        pairs = zip(self.parts, self.gather(vectors), strict=True)
        return self.scatter([part._apply(rows, leading) for part, rows in pairs])

    def to_dense(self) -> Tensor:
        matrix = torch.block_diag(*(part.to_dense() for part in self.parts))
        numbers = torch.arange(len(matrix), device=matrix.device).reshape(self.shape)
        order = torch.cat([rows.flatten() for rows in self.gather(numbers)]).argsort()
        return matrix[order][:, order]

    def diag(self) -> Tensor:
        return self.scatter([part.diag() for part in self.parts])

    def trace(self) -> Tensor:
        return torch.stack([part.trace() for part in self.parts]).sum()

    def frobenius_norm(self) -> Tensor:
        return torch.stack([part.frobenius_norm().square() for part in self.parts]).sum().sqrt()

    def _eigenvalues(self) -> Tensor:
        return torch.cat([part._eigenvalues() for part in self.parts])

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> RowBlocks:
        return self.map_parts(lambda part: part.map_eigenvalues(fn))

    def damp(self, damping: Damping | float | Tensor) -> RowBlocks:
        mean = self.trace() / self.domain.size
        added = torch.as_tensor(shift(as_damping(damping), mean), dtype=mean.dtype, device=mean.device)
        return self.map_parts(lambda x: shifted_side(x, added) if isinstance(x, Dense) else x.damp(Tikhonov(added)))

    def _power(self, exponent: float, *, damped: bool) -> RowBlocks:
        return self.map_parts(lambda part: part._power(exponent, damped=damped))

    def _scale(self, factor: float | Tensor) -> RowBlocks:
        return self.map_parts(lambda part: part._scale(factor))

    def _add(self, other: Operator) -> Operator | None:
        return None

    def _sample(self, generator: torch.Generator, n: int | None) -> Tensor:
        return self.scatter([part._sample(generator, n) for part in self.parts])


def row_blocks(products: Sequence[Kronecker], add: Callable[[tuple[Operator, ...]], Operator]) -> Operator | None:
    """The sum of products on matrices [m, n] that are all diagonal on the left, or all on the right, row by row.

    Rows are told apart by their values, in eager mode only; under a transform or a trace each has a matrix of its own.

    Args:
        products: on the same vectors.
        add: makes a sum of operators without a closed form.

    Returns:
        The sum, in which rows that need matrices of their own remain a sum if those have more than `MAX_ROW_ELEMENTS`.
        None: neither the left sides nor the right ones are all diagonal, or all rows would remain a sum.

    Example:
        >>> from curvlib.operators import Sum
        >>> tables = [Kronecker(Diagonal(torch.tensor([float(k), 1.0])), Dense(k * torch.eye(2))) for k in (0, 1)]
        >>> [type(part).__name__ for part in row_blocks(tables, Sum).parts]
        ['EigenKronecker', 'Dense']
    """
    if any(len(product.shape) > 2 for product in products):
        return None
    lefts, rights = [product.left for product in products], [product.right for product in products]
    columns = not all(map(is_diagonal, lefts))
    outer, inner = (rights, lefts) if columns else (lefts, rights)
    if not all(map(is_diagonal, outer)):
        return None
    if all(map(is_diagonal, inner)):
        return Diagonal(torch.stack([product.diag() for product in products]).sum(0))
    weights = torch.stack(torch.broadcast_tensors(*(side.diag() for side in outer)))  # [k, m]
    groups = rows_by_term(weights)
    owned = enumerate(groups[:-1])
    parts: list[Operator] = [one_term(weights[k, rows], inner[k]) for k, rows in owned if len(rows)]
    mixed = groups[-1]
    if len(mixed):
        if len(mixed) * inner[0].shape[-1] ** 2 <= MAX_ROW_ELEMENTS:
            parts.append(Dense(sum_of_terms(weights[:, mixed], inner)))
        elif parts:
            parts.append(add(tuple(Kronecker(Diagonal(w[mixed]), m) for w, m in zip(weights, inner, strict=True))))
        else:
            return None
    return RowBlocks(tuple(parts), torch.cat(groups), columns)


def rows_by_term(weights: Tensor) -> list[Tensor]:
    """The rows in which only term k is not zero, for every k, and those where several are not; weights [k, m].

    Example:
        >>> rows_by_term(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 1.0, 0.0]]))
        [tensor([0, 3]), tensor([1]), tensor([2])]
    """
    count, width = weights.shape
    everything = torch.arange(width, device=weights.device)
    if not is_eager():
        return [everything[:0]] * count + [everything]
    nonzero = weights != 0
    owner = torch.where(nonzero.sum(0) > 1, count, nonzero.int().argmax(0))
    return [everything[owner == k] for k in range(count + 1)]


def one_term(weights: Tensor, side: Matrix) -> EigenKronecker:
    """Diag(w) (x) M in its eigenbasis; weights [r]."""
    eigen = side.eigen()
    return EigenKronecker(CanonicalBasis(len(weights)), eigen.basis, weights.unsqueeze(-1) * eigen.values)


def sum_of_terms(weights: Tensor, sides: Sequence[Matrix]) -> Tensor:
    """sum_k w_ki M_k for every row i, [r, n, n]; weights [k, r]."""
    return torch.tensordot(weights.mT, torch.stack([side.matrices() for side in sides]), 1)
