"""Truncation: the leading eigenpairs of every side, and the mean of the other eigenvalues for the rest."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.eager import is_eager
from curvlib.operators.base import Operator
from curvlib.operators.bases import Basis, LowRankBasis, OrthogonalBasis
from curvlib.operators.block_side import BlockBasis
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.low_rank import LowRank
from curvlib.operators.matrices import Matrix
from curvlib.operators.sums import Sum
from curvlib.pytree import flatten
from curvlib.tables import aligned


@dataclasses.dataclass(frozen=True)
class TruncationRule:
    """How many eigenpairs to keep: a number, or a share of the trace."""

    rank: int | None
    energy: float | None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ArgumentError(f"give either rank or energy, got rank={self.rank} and energy={self.energy}")
        if self.rank is not None and self.rank < 1:
            raise ArgumentError(f"rank must be at least 1, got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ArgumentError(f"energy must lie in (0, 1], got {self.energy}")
        if self.energy is not None and not is_eager():
            raise ArgumentError("energy decides on values, which a transform or a trace cannot look at; give a rank")

    def kept(self, shares: Tensor, traces: Tensor) -> int:
        """How many of the shares [*, d] of traces [*], the largest first, to keep; one number for all groups."""
        if self.rank is not None:
            return self.rank
        assert self.energy is not None
        # rounding must not make the sum of all shares less than the trace
        held, enough = shares.cumsum(-1), self.energy * (1 - 4 * torch.finfo(shares.dtype).eps) * traces
        return 1 + int((held < enough.unsqueeze(-1)).sum(-1).amax())


def truncate(curv: Operator, rank: int | None, energy: float | None) -> Operator:
    """`Operator.truncate`, by class."""
    return truncated(curv, TruncationRule(rank, energy))


def truncated(curv: Operator, rule: TruncationRule) -> Operator:
    """An operator truncated by a rule.

    Raises:
        ArgumentError: it is of a class that has no eigenpairs to keep.
    """
    match curv:
        case BlockDiagonal():
            return curv.map_blocks(lambda block: truncated(block, rule))
        case Sum():
            return Sum(tuple(truncated(term, rule) for term in curv.terms))
        case Kronecker():
            return Kronecker(truncated_matrix(curv.left, rule), truncated_matrix(curv.right, rule))
        case EigenKronecker():
            # the share of a vector of one side is the trace on its products with all vectors of the other
            right, values = coarsened(curv.right, curv.values, curv.left.total(curv.values.mT), rule)
            left, values = coarsened(curv.left, values.mT, right.total(values), rule)
            return EigenKronecker(left, right, values.mT)
        case Matrix():
            return truncated_matrix(curv, rule)
    raise ArgumentError(f"a {type(curv).__name__} cannot be truncated; truncate the operator that it is made from")


def truncated_matrix(side: Matrix, rule: TruncationRule) -> Matrix:
    """A matrix truncated by a rule; one that is diagonal, or of that rank already, as it is."""
    eigen = side.eigen()
    basis, values = coarsened(eigen.basis, eigen.values.unsqueeze(-2), eigen.values, rule)
    match basis:
        case LowRankBasis():
            return LowRank(basis.vectors, values[..., 0, :-1], values[..., 0, -1])
        case OrthogonalBasis():
            return eigen
    return side


def coarsened(basis: Basis, values: Tensor, shares: Tensor, rule: TruncationRule) -> tuple[Basis, Tensor]:
    """The vectors with the largest shares of the trace, and the rest; values [*, m, r] are averaged over the latter.

    Args:
        basis: of r vectors, or of r - 1 and the rest.
        values: eigenvalues [*, m, r].
        shares: [*, r], of the trace.
        rule: how many vectors to keep.
    """
    match basis:
        case OrthogonalBasis() | LowRankBasis():
            *front, width, named = basis.vectors.shape
            most = min(named, width)
        case BlockBasis():
            front, named = list(basis.vectors[0].shape[:-3]), basis.width
            most = max(width for _, width in basis.runs)  # as many vectors of full length take the memory of all blocks
        case _:
            return basis, values  # unit vectors take no memory
    shares = shares.sum_to_size(*front, shares.shape[-1])  # groups that share a basis
    largest, order = shares[..., :named].sort(-1, descending=True)
    kept = rule.kept(largest, basis.total(shares))
    if kept >= most:
        return basis, values
    order = order[..., :kept]
    where = order.unsqueeze(-2).expand(*values.shape[:-1], kept)
    others = basis.total(values.scatter(-1, where, 0.0)) / (basis.width - kept)
    vectors = basis.rows(order, values).mT.contiguous()
    return LowRankBasis(vectors), torch.cat([values.gather(-1, where), others.unsqueeze(-1)], -1)


@dataclasses.dataclass(frozen=True)
class BlockTruncation:
    """What a truncation did to one block."""

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    widths: tuple[int, ...]
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class TruncationReport:
    """What a truncation did to every block; printable. See `truncation_report`."""

    blocks: tuple[BlockTruncation, ...]

    @property
    def bytes_before(self) -> int:
        """The size of all tensors before."""
        return sum(block.bytes_before for block in self.blocks)

    @property
    def bytes_after(self) -> int:
        """The size of all tensors after."""
        return sum(block.bytes_after for block in self.blocks)

    def __str__(self) -> str:
        rows = [("block", "shape", "rank / width", "bytes before", "after", "ratio")]
        for block in self.blocks:
            sides = " x ".join(f"{k}/{d}" for k, d in zip(block.ranks, block.widths, strict=True))
            rows.append((block.name, str(block.shape), sides, *sizes(block.bytes_before, block.bytes_after)))
        rows.append(("all", "", "", *sizes(self.bytes_before, self.bytes_after)))
        return aligned(rows)


def truncation_report(curv: Operator, truncated: Operator) -> TruncationReport:
    """Ranks and bytes of every block, before and after a truncation.

    Args:
        curv: an operator.
        truncated: what ``curv.truncate`` made of it.

    Raises:
        ArgumentError: the operators do not have the same blocks.

    Example:
        >>> from curvlib.operators import Dense
        >>> curv = Kronecker(Dense(torch.eye(20)), Dense(torch.eye(10)))
        >>> print(truncation_report(curv, curv.truncate(rank=2)))
        block   shape     rank / width  bytes before  after  ratio
        params  (20, 10)  2/20 x 2/10   2000          264    7.6
        all                             2000          264    7.6
    """
    before, after = curv.blocks, truncated.blocks
    if list(before) != list(after) or any(before[name].domain.shapes != after[name].domain.shapes for name in before):
        raise ArgumentError(f"the operators have different blocks: {list(before)} and {list(after)}")
    blocks = []
    for name, block in after.items():
        matrices = sides(block)
        ranks, widths = zip(*matrices, strict=True) if matrices else ((), ())
        blocks.append(BlockTruncation(name, block.domain.shapes[0], ranks, widths, size(before[name]), size(block)))
    return TruncationReport(tuple(blocks))


def sizes(before: int, after: int) -> tuple[str, str, str]:
    """Two numbers of bytes and their ratio, to be printed."""
    return str(before), str(after), f"{before / max(after, 1):.1f}"


def size(operator: Operator) -> int:
    """The bytes of the storage that holds an operator's tensors."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in flatten(operator)[0]}
    return sum(storages.values())


def sides(operator: Operator) -> list[tuple[int, int]]:
    """(rank, width) of every side of an operator."""
    match operator:
        case BlockDiagonal():
            return [pair for block in operator.operators.values() for pair in sides(block)]
        case Sum():
            return [pair for term in operator.terms for pair in sides(term)]
        case Kronecker():
            return sides(operator.left) + sides(operator.right)
        case EigenKronecker():
            return [rank(operator.left), rank(operator.right)]
        case LowRank():
            return [(operator.vectors.shape[-1], operator.shape[-1])]
        case Matrix():
            return [(operator.shape[-1], operator.shape[-1])]
    return []


def rank(basis: Basis) -> tuple[int, int]:
    """(rank, width) of a basis."""
    return basis.rank if isinstance(basis, LowRankBasis) else basis.width, basis.width
