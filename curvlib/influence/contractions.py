"""Inner products and quadratic forms of per-example gradients with vectors and operators of one block.

A vector of a block is a matrix P [m, n]. Where it is a sum of few products, P = sum_k l_k r_k^T, and the gradient is
one of rows, D = sum_t g_t a_t^T, nothing of the size m n is needed:

    <P, D> = sum_kt (l_k . g_t) (r_k . a_t),    K T (m + n) multiplications in place of m n.

The coordinates Q_L^T D Q_R in a Kronecker eigenbasis are sum_t (Q_L^T g_t) (Q_R^T a_t)^T: few rows stand for a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.gradients.block_gradients import BlockGradients, RowGradients, by_position
from curvlib.gradients.uses import WeightUse
from curvlib.layers.rows import GRADIENTS_AT_ONCE, DenseRows, OneHotRows, Rows, chunks, summed
from curvlib.operators import EigenKronecker
from curvlib.operators.bases import CanonicalBasis


class BlockVectors(ABC):
    """Q vectors of a block, to be contracted with the gradients of examples."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """How many numbers are held."""

    @abstractmethod
    def inner(self, gradients: BlockGradients) -> Tensor:
        """<P_q, D_n>: [Q, N]."""

    @abstractmethod
    def position_inner(self, gradients: BlockGradients) -> Tensor:
        """<P_q, g_nt a_nt^T>, what each position of the layer's rows has of it: [Q, N, T]."""

    @abstractmethod
    def whole(self) -> Whole:
        """The vectors as tensors."""


class Whole(BlockVectors):
    """Vectors as tensors.

    Args:
        values: P [Q, *shape].
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def elements(self) -> int:
        return self.values.numel()

    def inner(self, gradients: BlockGradients) -> Tensor:
        return gradients.inner(self.values)

    def position_inner(self, gradients: BlockGradients) -> Tensor:
        return gradients.position_inner(self.values)

    def whole(self) -> Whole:
        return self


class Products(BlockVectors):
    """Vectors that are sums of K products, P_q = sum_k l_qk r_qk^T.

    Args:
        left: l [Q, (groups,) K, m].
        right: r [Q, (groups,) K, n].
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """(l, r)."""
        return self.left, self.right

    @property
    def elements(self) -> int:
        return self.left.numel() + self.right.numel()

    def whole(self) -> Whole:
        return Whole(self.left.mT @ self.right)

    def inner(self, gradients: BlockGradients) -> Tensor:
        if not isinstance(gradients, RowGradients) or not self.cheaper(gradients.uses):
            return self.whole().inner(gradients)
        return summed([self.of_use(use, positions=False) for use in gradients.uses])

    def position_inner(self, gradients: BlockGradients) -> Tensor:
        if not isinstance(gradients, RowGradients):
            return self.whole().position_inner(gradients)
        return by_position([self.of_use(use, positions=True) for use in gradients.uses])

    def cheaper(self, uses: Sequence[WeightUse]) -> bool:
        """Whether rows take fewer multiplications a pair than the matrices."""
        m, n = self.left.shape[-1], self.right.shape[-1]
        positions = sum(use.rows.shape[-2] for use in uses)
        return self.left.shape[-2] * positions * (m + n) < m * n

    def of_use(self, use: WeightUse, *, positions: bool) -> Tensor:
        """[Q, N], or [Q, N, T]: the part that is due to one use of the weight."""
        left, right = (self.right, self.left) if use.transposed else (self.left, self.right)
        queries, terms = left.shape[0], left.shape[-2]
        left, right = (rows.movedim(0, -3).flatten(-3, -2) for rows in (left, right))  # [(groups,) Q K, d]
        examples = use.rows.shape[0]
        step = max(1, GRADIENTS_AT_ONCE // max(1, use.rows.shape[1:-1].numel() * queries * terms))
        parts = []
        for start in range(0, examples, step):
            stop = min(start + step, examples)
            g = use.g[0, start:stop] @ left.mT  # [N, (groups,) T, Q K]
            products = (g * against(use.rows.part(start, stop), right)).unflatten(-1, (queries, terms)).sum(-1)
            if products.ndim == 4:
                products = products.sum(1)
            parts.append(products if positions else products.sum(1))
        return torch.cat(parts).movedim(-1, 0)


def joined(stacks: Sequence[BlockVectors]) -> BlockVectors:
    """All vectors of a block in one stack; where some have fewer products than others, they get zeros."""
    products = [stack for stack in stacks if isinstance(stack, Products)]
    if len(products) < len(stacks):
        return Whole(torch.cat([stack.whole().values for stack in stacks]))
    terms = max(stack.left.shape[-2] for stack in products)

    def padded(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0, 0, terms - rows.shape[-2]))

    left, right = (
        torch.cat([padded(rows) for rows in side]) for side in zip(*(x.sides for x in products), strict=True)
    )
    return Products(left, right)


def against(rows: Rows, matrix: Tensor) -> Tensor:
    """The rows' inner products with those of a matrix [(groups,) R, d]: [N, (groups,) T, R]."""
    if isinstance(rows, OneHotRows):
        return torch.nn.functional.embedding(rows.index, matrix.mT)
    assert isinstance(rows, DenseRows)
    return rows.values @ matrix.mT


# --- rows in a Kronecker eigenbasis --------------------------------------------------------------------------------


def rotatable(gradients: BlockGradients, eigen: EigenKronecker) -> WeightUse | None:
    """The one use whose rows it takes fewer multiplications to rotate than gradients [m, n], or None."""
    if not isinstance(gradients, RowGradients) or len(gradients.uses) > 1:
        return None
    use = gradients.uses[0]
    if not isinstance(use.rows, DenseRows):  # one-hot rows, which only the canonical basis keeps so
        return use if isinstance(eigen.left if use.transposed else eigen.right, CanonicalBasis) else None
    m, n = eigen.shape[-2:]
    return use if use.rows.shape[-2] * (m**2 + n**2) <= m * n * (m + n) else None


def rotated(eigen: EigenKronecker, use: WeightUse) -> WeightUse:
    """The use in the coordinates of the eigenbasis."""
    left, right = (eigen.right, eigen.left) if use.transposed else (eigen.left, eigen.right)
    return WeightUse(use.rows.in_basis(right, use.g), left.analyse_right(use.g), use.transposed)


def product(eigen: EigenKronecker, use: WeightUse, start: int, stop: int) -> Tensor:
    """The operator applied to the gradients of these examples: [n, *shape]."""
    part = rotated(eigen, WeightUse(use.rows.part(start, stop), use.g[:, start:stop], use.transposed))
    return eigen.synthesise(eigen.spread(eigen.values) * part.gradients(0, stop - start)[0])


def quadratic(eigen: EigenKronecker, use: WeightUse) -> Tensor:
    """sum_ij l_ij (Q_L^T D_n Q_R)_ij^2 for every example: [N]."""
    values, use = eigen.spread(eigen.values), rotated(eigen, use)
    if isinstance(use.rows, DenseRows) and use.rows.shape[-2] == 1:  # (g a^T) o (g a^T) = (g o g) (a o a)^T
        g, a = use.g[0].square(), use.rows.values.square()  # [N, (groups,) 1, d]
        g = g.movedim(0, -2).squeeze(-3) @ (values.mT if use.transposed else values)  # one product a group
        return (g * a.movedim(0, -2).squeeze(-3)).sum(-1).reshape(-1, len(a)).sum(0)
    parts = [
        (use.gradients(start, stop)[0].square() * values).flatten(1).sum(1)
        for start, stop in chunks(use.rows.shape, use.g)
    ]
    return torch.cat(parts)
