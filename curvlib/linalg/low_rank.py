"""Symmetric matrices of low rank plus a multiple of the identity on the rest: made from rows, added, averaged.

No function here forms a d x d matrix, and all of them keep the trace: what a rank leaves out is replaced by its mean.
Nothing looks at values, so that everything works under `torch.func` and in traces.

Sources: Brand 2006, Fast low-rank modifications of the thin singular value decomposition (the update); Halko,
Martinsson and Tropp 2011, arXiv 0909.4061 (the randomized range finder).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, ShapeError
from curvlib.linalg.eigh import eigh
from curvlib.linalg.gram import full_precision

OVERSAMPLING = 8  # directions beyond the rank that a range is searched in
ITERATIONS = 2  # products with X^T X that sharpen a random range


class LowRankFactor(NamedTuple):
    """U diag(l) U^T + tau (I - U U^T), as tensors.

    Args:
        vectors: U [*, d, k], orthonormal columns.
        eigenvalues: l [*, k], descending.
        remainder: tau [*].
    """

    vectors: Tensor
    eigenvalues: Tensor
    remainder: Tensor


def low_rank_gram(rows: Tensor, rank: int, *, generator: torch.Generator | None = None) -> LowRankFactor:
    """The second moment X^T X / n of rows, to a rank, with its trace.

    The eigenvalues kept are those of X^T X / n on a range of k + 8 directions. Few rows (fewer than d and at most
    4 (k + 8)) have their range read off the n x n Gram matrix, which is exact. Of many rows it is that of
    (X^T X)^2 X^T S for a random S, which is exact for rows of rank at most k + 8 and nearly so if eigenvalues decay.
    Costs O(n d k).

    Args:
        rows: X [*, n, d].
        rank: k < d.
        generator: draws a normal S (under vmap that needs ``randomness="same"``); None: S is fixed, see `chirps`.

    Returns:
        A `LowRankFactor` of k vectors, in full precision.

    Raises:
        ArgumentError: the rank is not between 1 and d - 1.
        ShapeError: there are no rows.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
        >>> factor = low_rank_gram(rows, 1)
        >>> factor.eigenvalues.round(decimals=4), factor.remainder  # the trace is 3
        (tensor([2.]), tensor(0.5000))
    """
    rows = full_precision(rows)
    n, width = rows.shape[-2:]
    check_rank(rank, width)
    if n == 0:
        raise ShapeError("rows are needed to form a second moment; there are none")
    searched = min(rank + OVERSAMPLING, width)
    few = n < width and n <= 4 * searched
    basis = range_of_few(rows, searched) if few else range_of_many(rows, searched, generator)
    inside = rows @ basis
    values, vectors = descending(inside.mT @ inside / n)
    kept = values[..., :rank]
    trace = rows.square().sum((-2, -1)) / n
    return LowRankFactor(basis @ vectors[..., :rank], kept, rest(trace, kept, width))


def low_rank_sum(factors: Sequence[LowRankFactor], weights: Sequence[float | Tensor], rank: int) -> LowRankFactor:
    """The leading eigenpairs of sum_i w_i F_i, exact where it has at most ``rank`` eigenvalues besides its remainder.

    Args:
        factors: the F_i; leading axes broadcast.
        weights: the w_i >= 0, numbers or 0-d tensors.
        rank: k < d.

    Returns:
        A `LowRankFactor` of k vectors with the trace of the sum.

    Raises:
        ArgumentError: the rank is not between 1 and d - 1.

    Example:
        >>> factor = low_rank_gram(torch.eye(3)[:1], 1)
        >>> low_rank_sum([factor, factor], [0.5, 2.0], 1).eigenvalues
        tensor([2.5000])
    """
    check_rank(rank, factors[0].vectors.shape[-2])
    terms = [
        (factor.vectors, weight * (factor.eigenvalues - factor.remainder.unsqueeze(-1)))
        for factor, weight in zip(factors, weights, strict=True)
    ]
    scaled = [weight * factor.remainder for factor, weight in zip(factors, weights, strict=True)]
    floor = torch.stack(torch.broadcast_tensors(*scaled)).sum(0)
    return leading(terms, floor, rank)


def low_rank_update(
    factor: LowRankFactor, rows: Tensor, decay: float | Tensor, *, generator: torch.Generator | None = None
) -> LowRankFactor:
    """The exponential moving average decay F + (1 - decay) X^T X / n, to the rank of F and with its trace.

    Exact, in factor and rows of any number, as long as the result has at most k eigenvalues besides its remainder.
    More than k + 8 rows are replaced by their `low_rank_gram` of rank k + 8 first.

    Args:
        factor: F.
        rows: X [*, n, d].
        decay: between 0 and 1.
        generator: for `low_rank_gram`.

    Returns:
        A `LowRankFactor` of as many vectors.

    Raises:
        ArgumentError: the decay is not between 0 and 1.
        ShapeError: the rows are not as wide as the factor, or there are none.

    Example:
        >>> factor = low_rank_gram(torch.tensor([[2.0, 0.0, 0.0]]), 1)
        >>> updated = low_rank_update(factor, torch.tensor([[0.0, 1.0, 0.0]]), 0.5)
        >>> updated.eigenvalues.round(decimals=4), updated.remainder
        (tensor([2.]), tensor(0.2500))
    """
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ArgumentError(f"decay must lie between 0 and 1, got {decay}")
    width, rank = factor.vectors.shape[-2:]
    if rows.ndim < 2 or rows.shape[-1] != width or rows.shape[-2] == 0:
        raise ShapeError(f"expected rows of shape [*, n, {width}] with n > 0, got {tuple(rows.shape)}")
    rows = full_precision(rows)
    n = rows.shape[-2]
    searched = min(rank + OVERSAMPLING, width - 1)
    if n > searched:
        seen = low_rank_gram(rows, searched, generator=generator)
        return low_rank_sum([factor, seen], [decay, 1 - decay], rank)
    share = torch.as_tensor((1 - decay) / n, dtype=rows.dtype, device=rows.device).expand(n)
    old = decay * (factor.eigenvalues - factor.remainder.unsqueeze(-1))
    return leading([(factor.vectors, old), (rows.mT, share)], decay * factor.remainder, rank)


def leading(terms: Sequence[tuple[Tensor, Tensor]], floor: Tensor, rank: int) -> LowRankFactor:
    """The leading eigenpairs of floor I + sum_i W_i diag(c_i) W_i^T, for columns W_i [*, d, r_i] of any lengths.

    With Q R = [W_1, W_2, ...], the eigenvectors are Q times those of the small matrix R diag(c) R^T. One QR of all
    columns, in place of Brand's of the residual, stays orthonormal where columns depend on each other.
    """
    front = torch.broadcast_shapes(floor.shape, *(w.shape[:-2] for w, _ in terms), *(c.shape[:-1] for _, c in terms))
    columns = torch.cat([w.expand(*front, *w.shape[-2:]) for w, _ in terms], -1)
    weights = torch.cat([c.expand(*front, c.shape[-1]) for _, c in terms], -1)
    width = columns.shape[-2]
    trace = (weights * columns.square().sum(-2)).sum(-1) + width * floor
    basis, triangle = torch.linalg.qr(padded(columns, rank))
    weights = torch.nn.functional.pad(weights, (0, triangle.shape[-1] - weights.shape[-1]))
    values, vectors = descending((triangle * weights.unsqueeze(-2)) @ triangle.mT)
    kept = values[..., :rank] + floor.unsqueeze(-1)
    return LowRankFactor(basis @ vectors[..., :rank], kept, rest(trace, kept, width))


def range_of_few(rows: Tensor, count: int) -> Tensor:
    """Orthonormal columns [*, d, count] that span the leading right singular vectors of few rows."""
    _, combinations = descending(rows @ rows.mT)
    return torch.linalg.qr(padded(rows.mT @ combinations[..., :count], count))[0]


def range_of_many(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Orthonormal columns [*, d, count] of a range that holds most of what the rows span."""
    n = rows.shape[-2]
    if generator is None:
        start = chirps(n, count).to(rows)
    else:
        start = torch.randn(n, count, generator=generator, dtype=rows.dtype, device=rows.device)
    basis = torch.linalg.qr(rows.mT @ start)[0]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(rows.mT @ (rows @ basis))[0]
    return basis


def chirps(n: int, count: int) -> Tensor:
    """Columns cos(2 pi x r^2) over rows r, each of another rate x: a start without randomness, that any trace can hold.

    Such columns agree with nothing that is constant, periodic or smooth in r, as the rows of a batch may be. Rates are
    multiples of the golden ratio modulo 1, which keeps them apart.
    """
    squares = torch.arange(n, dtype=torch.float64).square().unsqueeze(1)
    rates = (torch.arange(1, count + 1, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)).frac()
    return (2 * math.pi * (squares * rates).frac()).cos()


def descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix, the largest first."""
    values, vectors = eigh(matrix)
    return values.flip(-1), vectors.flip(-1)


def padded(columns: Tensor, count: int) -> Tensor:
    """At least ``count`` columns: zeros are appended, for which a Householder QR finds directions of its own."""
    return torch.nn.functional.pad(columns, (0, max(count - columns.shape[-1], 0)))


def rest(trace: Tensor, kept: Tensor, width: int) -> Tensor:
    """The mean of the eigenvalues that were not kept; rounding does not make it negative."""
    return ((trace - kept.sum(-1)) / (width - kept.shape[-1])).clamp(min=0)


def check_rank(rank: int, width: int) -> None:
    """Refuses a rank that leaves no remainder."""
    if not 1 <= rank < width:
        raise ArgumentError(
            f"the rank of a low-rank factor of width {width} must lie between 1 and {width - 1}, got {rank}"
        )
