"""What becomes of a side that is too wide for a dense factor: a vocabulary, say.

The default keeps the diagonal of the factor, which for the inputs of an embedding is all of it. No choice ever makes a
matrix of width x width.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.eager import may_look_at
from curvlib.linalg.gram import gram
from curvlib.linalg.low_rank import LowRankFactor, low_rank_gram, low_rank_sum
from curvlib.operators import Dense, DenseBlocks, Diagonal, LowRank, Matrix, ScaledIdentity, ScaledPower
from curvlib.operators.block_side import block_runs, cut_columns
from curvlib.pytree import register, static


class CompressedMoment(ABC):
    """A sum of outer products over rows that is kept in less than a dense matrix; moments add up over batches."""

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """The moment of both sets of rows."""

    @abstractmethod
    def __mul__(self, weight: float | Tensor) -> Self:
        """The moment of rows of this weight, a number."""

    @abstractmethod
    def __truediv__(self, count: Tensor) -> Self:
        """The moment, divided by a number, or by one a group."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The moment in another dtype."""

    @abstractmethod
    def side(self) -> Matrix:
        """The side of a Kronecker product that it is."""


def nonnegative(weight: float | Tensor) -> float | Tensor:
    """The weight of a moment that cannot be subtracted from another.

    Raises:
        ArgumentError: it is negative; looked at on the CPU, outside of every transform.
    """
    if (may_look_at(weight) if isinstance(weight, Tensor) else True) and weight < 0:
        raise ArgumentError(
            f"rows and eigenpairs can be weighted, but not subtracted: the weight must not be negative, got {weight}"
        )
    return weight


@register
class LowRankMoment(CompressedMoment):
    """The leading eigenpairs of a sum of outer products, and the mean of the others."""

    vectors: Tensor
    values: Tensor
    remainder: Tensor

    def __add__(self, other: LowRankMoment) -> LowRankMoment:
        factors = [LowRankFactor(x.vectors, x.values, x.remainder) for x in (self, other)]
        return LowRankMoment(*low_rank_sum(factors, [1.0, 1.0], self.vectors.shape[-1]))

    def __mul__(self, weight: float | Tensor) -> LowRankMoment:
        weight = nonnegative(weight)
        return LowRankMoment(self.vectors, self.values * weight, self.remainder * weight)

    def __truediv__(self, count: Tensor) -> LowRankMoment:
        return LowRankMoment(self.vectors, self.values / count.unsqueeze(-1), self.remainder / count)

    def to(self, dtype: torch.dtype) -> LowRankMoment:
        return LowRankMoment(*(x.to(dtype) for x in (self.vectors, self.values, self.remainder)))

    def side(self) -> LowRank:
        return LowRank(self.vectors, self.values, self.remainder)


@register
class BlockMoment(CompressedMoment):
    """The diagonal blocks of a sum of outer products: stacks [*, b, w, w] of blocks of equal width."""

    stacks: tuple[Tensor, ...]

    def __add__(self, other: BlockMoment) -> BlockMoment:
        return BlockMoment(tuple(a + b for a, b in zip(self.stacks, other.stacks, strict=True)))

    def __mul__(self, weight: float | Tensor) -> BlockMoment:
        return BlockMoment(tuple(stack * weight for stack in self.stacks))

    def __truediv__(self, count: Tensor) -> BlockMoment:
        return BlockMoment(tuple(stack / count[..., None, None, None] for stack in self.stacks))

    def to(self, dtype: torch.dtype) -> BlockMoment:
        return BlockMoment(tuple(stack.to(dtype) for stack in self.stacks))

    def side(self) -> DenseBlocks:
        return DenseBlocks(self.stacks)


@register
class IsotropicMoment(CompressedMoment):
    """The trace of a sum of outer products, spread over all directions."""

    trace: Tensor
    width: int = static()

    def __add__(self, other: IsotropicMoment) -> IsotropicMoment:
        return IsotropicMoment(self.trace + other.trace, self.width)

    def __mul__(self, weight: float | Tensor) -> IsotropicMoment:
        return IsotropicMoment(self.trace * weight, self.width)

    def __truediv__(self, count: Tensor) -> IsotropicMoment:
        return IsotropicMoment(self.trace / count, self.width)

    def to(self, dtype: torch.dtype) -> IsotropicMoment:
        return IsotropicMoment(self.trace.to(dtype), self.width)

    def side(self) -> Matrix:
        mean = self.trace / self.width
        if not mean.ndim:
            return ScaledIdentity(mean, (self.width,))
        return ScaledPower(ScaledIdentity(mean.new_ones(()), (*mean.shape, self.width)), mean, 1.0)


@functools.cache
def announce(width: int, above: int) -> None:
    """Says once for each width that a factor loses its off-diagonal entries."""
    logging.getLogger("curvlib").warning(
        "a side of width %d is wider than %d: only the diagonal of its factor is kept; see `wide`",
        width,
        above,
    )


def as_side(moment: Tensor | CompressedMoment, groups: int) -> Matrix:
    """A moment [*groups, d, d], its diagonal [*groups, d], or what stands for it, as a side of a Kronecker product."""
    if isinstance(moment, CompressedMoment):
        return moment.side()
    return Dense(moment) if moment.ndim == groups + 2 else Diagonal(moment)


class Wide(ABC):
    """What is kept of a factor whose side is wider than ``above``. Choices are frozen dataclasses."""

    above: int

    @abstractmethod
    def moment(self, rows: Tensor) -> Tensor | CompressedMoment:
        """The sum of outer products of rows [*groups, n, d], in less than d x d numbers."""

    def zero(self, groups: tuple[int, ...], width: int, like: Tensor) -> Tensor | CompressedMoment:
        """The moment of no rows."""
        if width <= self.above:
            return like.new_zeros(*groups, width, width)
        return self.moment(like.new_zeros(*groups, 1, width))


@dataclasses.dataclass(frozen=True)
class WideDiagonal(Wide):
    """The diagonal of the factor: the default.

    Args:
        above: the width beyond which a side counts as wide.

    Example:
        >>> import torch, curvlib as cv
        >>> params = {"w": torch.zeros(3, 40)}
        >>> batch = (torch.randn(9, 3), torch.randint(40, (9,)))
        >>> curv = cv.kfac(lambda p, x: x @ p["w"], params, batch, wide=cv.WideDiagonal(above=32))
        >>> type(curv.blocks["w"].left).__name__, type(curv.blocks["w"].right).__name__
        ('Diagonal', 'Dense')
    """

    above: int = 8192

    def moment(self, rows: Tensor) -> Tensor:
        announce(rows.shape[-1], self.above)
        return rows.square().sum(-2)


@dataclasses.dataclass(frozen=True)
class WideLowRank(Wide):
    """The leading eigenpairs of the factor and the mean of the others: trace exact, memory O(d k).

    Args:
        rank: k. Over several batches the pairs are those of a running sum that is cut to this rank each time.
        above: the width beyond which a side counts as wide.

    Example:
        >>> import torch, curvlib as cv
        >>> params = {"w": torch.zeros(3, 40)}
        >>> batch = (torch.randn(9, 3), torch.randint(40, (9,)))
        >>> curv = cv.kfac(lambda p, x: x @ p["w"], params, batch, wide=cv.WideLowRank(4, above=32))
        >>> curv.blocks["w"].left.vectors.shape
        torch.Size([40, 4])
    """

    rank: int
    above: int = 8192

    def moment(self, rows: Tensor) -> LowRankMoment:
        vectors, values, remainder = low_rank_gram(rows, self.rank)
        return LowRankMoment(vectors, values * rows.shape[-2], remainder * rows.shape[-2])


@dataclasses.dataclass(frozen=True)
class WideBlocks(Wide):
    """The diagonal blocks of the factor, of neighbouring rows: memory O(d size).

    Everything within a block is exact: over several batches the blocks are those of all rows. Entries outside of them
    are left out, as those outside of the diagonal are by `WideDiagonal`, which is ``size=1``.

    Args:
        size: the width of a block. The last one is narrower if the side's width is no multiple of it.
        above: the width beyond which a side counts as wide.

    Raises:
        ArgumentError: the size is not positive.

    Example:
        >>> import torch, curvlib as cv
        >>> params = {"w": torch.zeros(3, 40)}
        >>> batch = (torch.randn(9, 3), torch.randint(40, (9,)))
        >>> curv = cv.kfac(lambda p, x: x @ p["w"], params, batch, wide=WideBlocks(16, above=32))
        >>> [tuple(stack.shape) for stack in curv.blocks["w"].left.stacks]
        [(2, 16, 16), (1, 8, 8)]
    """

    size: int
    above: int = 8192

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ArgumentError(f"the width of a block must be at least 1, got size={self.size}")

    def moment(self, rows: Tensor) -> BlockMoment:
        parts = cut_columns(rows, block_runs(rows.shape[-1], self.size))
        return BlockMoment(tuple(gram(part) for part in parts))


@dataclasses.dataclass(frozen=True)
class WideIdentity(Wide):
    """A multiple of the identity with the factor's trace: one number.

    Args:
        above: the width beyond which a side counts as wide.

    Example:
        >>> import torch, curvlib as cv
        >>> params = {"w": torch.zeros(3, 40)}
        >>> batch = (torch.randn(9, 3), torch.randint(40, (9,)))
        >>> curv = cv.kfac(lambda p, x: x @ p["w"], params, batch, wide=cv.WideIdentity(above=32))
        >>> curv.blocks["w"].left.scale.shape
        torch.Size([])
    """

    above: int = 8192

    def moment(self, rows: Tensor) -> IsotropicMoment:
        return IsotropicMoment(rows.square().sum((-2, -1)), rows.shape[-1])
