"""Input rows of a layer, and second moments of per-example gradients D_n = sum_t g_nt a_nt^T made from them.

The moments are formed without the gradients where that is possible, and in chunks of examples where it is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvlib.linalg.gram import full_precision
from curvlib.operators.bases import Basis, CanonicalBasis
from curvlib.pytree import register, static

Summed = TypeVar("Summed", bound=Any)

GRADIENTS_AT_ONCE = 1 << 23  # elements of per-example gradients that may be alive together


class Rows(ABC):
    """The rows a [N, (groups,) T, d] of one use of a weight. Gradients g are [K, N, (groups,) T, d_out]."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """[N, (groups,) T, d]."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Rows:
        """The rows of these examples."""

    @abstractmethod
    def in_basis(self, basis: Basis, like: Tensor) -> Rows:
        """The coordinates a Q, in the dtype of ``like``."""

    @abstractmethod
    def mean(self, like: Tensor, counted: Tensor | None) -> DenseRows:
        """The mean row of each example over the positions that count, see `mean_row`: T = 1."""

    @abstractmethod
    def gradients(self, g: Tensor) -> Tensor:
        """D_n for every vector and example: [K, N, (groups,) d_out, d]."""

    @abstractmethod
    def squares(self, g: Tensor) -> Tensor:
        """sum_kn D_kn o D_kn: [(groups,) d_out, d]."""

    @abstractmethod
    def position_squares(self, g: Tensor) -> Tensor:
        """sum_knt (g o g) (a o a)^T, as if every position were an example: [(groups,) d_out, d]."""

    @abstractmethod
    def left_moment(self, g: Tensor) -> Tensor:
        """sum_kn D_kn D_kn^T = sum g_t (a_t . a_t') g_t'^T: [(groups,) d_out, d_out]."""

    @abstractmethod
    def right_moment(self, g: Tensor) -> Tensor:
        """sum_kn D_kn^T D_kn: [(groups,) d, d], or its diagonal [d] where one-hot rows make it diagonal."""


@register
class DenseRows(Rows):
    """Rows as a tensor [N, (groups,) T, d]."""

    values: Tensor

    @classmethod
    def of(cls, rows: Tensor, *, augmented: bool) -> DenseRows:
        """Rows in full precision, with a one appended to each if ``augmented``; a copy that the model cannot change."""
        rows = full_precision(rows)
        return cls(torch.nn.functional.pad(rows, (0, 1), value=1.0) if augmented else rows.clone())

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def part(self, start: int, stop: int) -> DenseRows:
        return DenseRows(self.values[start:stop])

    def in_basis(self, basis: Basis, like: Tensor) -> DenseRows:
        return DenseRows(basis.analyse_right(self.values))

    def mean(self, like: Tensor, counted: Tensor | None) -> DenseRows:
        return DenseRows(mean_row(self.values, counted))

    def gradients(self, g: Tensor) -> Tensor:
        return g.mT @ self.values

    def squares(self, g: Tensor) -> Tensor:
        if self.shape[-2] == 1:
            return self.position_squares(g)
        return summed([sum_of_squares(self.part(i, j).gradients(g[:, i:j])) for i, j in chunks(self.shape, g)])

    def position_squares(self, g: Tensor) -> Tensor:
        return across_rows(g.square().sum(0), self.values.square(), 1)

    def left_moment(self, g: Tensor) -> Tensor:
        return across_rows(g, self.values @ (self.values.mT @ g), 2)

    def right_moment(self, g: Tensor) -> Tensor:
        a = self.values.expand(g.shape[0], *self.shape)
        return across_rows(a, g @ (g.mT @ a), 2)


@register
class OneHotRows(Rows):
    """Rows e(index) of an embedding: index [N, T] into a table of ``width`` entries."""

    index: Tensor
    width: int = static()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.index.shape, self.width))

    def part(self, start: int, stop: int) -> OneHotRows:
        return OneHotRows(self.index[start:stop], self.width)

    def in_basis(self, basis: Basis, like: Tensor) -> Rows:
        if isinstance(basis, CanonicalBasis):
            return self
        return DenseRows(basis.analyse_right(self.vectors(like)))

    def vectors(self, like: Tensor) -> Tensor:
        """The one-hot vectors themselves [N, T, width]."""
        numbers = torch.arange(self.width, device=self.index.device)
        return (self.index.unsqueeze(-1) == numbers).to(like.dtype)  # torch's one_hot looks at values: no trace

    def mean(self, like: Tensor, counted: Tensor | None) -> DenseRows:
        return DenseRows(mean_row(self.vectors(like), counted))

    def gradients(self, g: Tensor) -> Tensor:
        result = g.new_zeros(*g.shape[:2], g.shape[-1], self.width)
        index = self.index[None, :, None, :].expand(*g.shape[:2], g.shape[-1], -1)
        return result.scatter_add(-1, index, g.mT)

    def totals(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """h_t = sum of g over an example's positions with the token of t, [K, N, T, d], and their number [N, T, 1]."""
        same = (self.index.unsqueeze(-1) == self.index.unsqueeze(-2)).to(g.dtype)
        return same @ g, same.sum(-1, keepdim=True)

    def by_token(self, values: Tensor) -> Tensor:
        """Sums values [N, T, d] over the positions of each token: [d, width]."""
        flat = values.flatten(0, 1)
        return flat.new_zeros(self.width, flat.shape[-1]).index_add(0, self.index.flatten(), flat).mT

    def squares(self, g: Tensor) -> Tensor:
        totals, counts = self.totals(g)
        return self.by_token(totals.square().sum(0) / counts)

    def position_squares(self, g: Tensor) -> Tensor:
        return self.by_token(g.square().sum(0))

    def left_moment(self, g: Tensor) -> Tensor:
        return across_rows(g, self.totals(g)[0], 2)

    def right_moment(self, g: Tensor) -> Tensor:
        if self.index.shape[1] == 1:  # no example has two tokens
            return self.squares(g).sum(0)
        pairs = self.index.unsqueeze(2) * self.width + self.index.unsqueeze(1)  # [N, T, T]
        products = (g @ g.mT).sum(0).flatten()
        return g.new_zeros(self.width**2).index_add(0, pairs.flatten(), products).unflatten(0, (self.width, -1))


def sum_of_squares(matrices: Tensor) -> Tensor:
    """Entrywise, over the first two axes."""
    return matrices.square().sum((0, 1))


def mean_row(rows: Tensor, counted: Tensor | None) -> Tensor:
    """The mean over an example's positions of rows [N, (groups,) T, d], the axis kept, or over those of [N, T] only.

    Where no position of an example counts it is zero.
    """
    if counted is None:
        return rows.mean(-2, keepdim=True)
    share = counted.to(rows.dtype) / counted.sum(1, keepdim=True).clamp(min=1).to(rows.dtype)
    share = share if rows.ndim == 3 else share.unsqueeze(1)
    return (rows * share.unsqueeze(-1)).sum(-2, keepdim=True)


def groups_first(rows: Tensor, leading: int) -> Tensor:
    """[*lead, (groups,) T, d] -> [(groups,) *lead * T, d]."""
    if rows.ndim == leading + 2:
        return rows.reshape(-1, rows.shape[-1])
    return rows.movedim(-3, 0).reshape(rows.shape[-3], -1, rows.shape[-1])


def across_rows(left: Tensor, right: Tensor, leading: int) -> Tensor:
    """Sum l r^T over the rows of [*lead, (groups,) T, d]: [(groups,) d, d']."""
    return groups_first(left, leading).mT @ groups_first(right, leading)


def chunks(shape: Sequence[int], g: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose gradients fit into memory together."""
    each = g.shape[0] * g[0, 0, ..., 0, :].numel() * shape[-1]
    step = max(1, GRADIENTS_AT_ONCE // max(1, each))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def summed(parts: Sequence[Summed]) -> Summed:
    """The sum of things of one kind."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
