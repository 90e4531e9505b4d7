"""Random sketches: small matrices R with E[R^T R] = I, one a side of every block.

Entries come from a counter-based generator on the CPU: they are the same on every device, and those of a smaller
rank are the first rows of a larger one (before the scale).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, NotKroneckerError, PytreeError
from curvlib.operators.base import Operator
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.matrices import Matrix
from curvlib.operators.summary import place
from curvlib.pytree import Domain, Tree

SketchKind = Literal["rademacher", "normal", "orthogonal"]
KINDS = get_args(SketchKind)

Sides = tuple[Tensor, ...]
Ranks = int | Mapping[str, int]  # p, for all blocks or by block


def check_ranks(ranks: Ranks) -> None:
    """Raises ArgumentError if a rank is below 1."""
    for rank in ranks.values() if isinstance(ranks, Mapping) else (ranks,):
        if rank < 1:
            raise ArgumentError(f"rank must be at least 1, got {rank}")


def rank_of(ranks: Ranks, block: str) -> int:
    """The rank of a block.

    Raises:
        ArgumentError: ranks are given by block, but not for this one.
    """
    if not isinstance(ranks, Mapping):
        return ranks
    if block not in ranks:
        raise ArgumentError(f"rank has no entry for block {block!r}, only for {', '.join(ranks)}; give every block one")
    return ranks[block]


def sketch_shape(block: Operator, rank: int) -> tuple[int, ...]:
    """The shape of the sketch of a block's vector; a side of width <= rank is kept whole.

    Raises:
        NotKroneckerError: the block has no sides.
    """
    match block:
        case Kronecker() | EigenKronecker():
            *front, m, n = block.shape
            return (*front, min(rank, m), min(rank, n))
        case Matrix():
            return (min(rank, block.domain.size),)
    raise NotKroneckerError(f"a {type(block).__name__} has no sides to be sketched; of a tied weight, use tied='merge'")


class Compressor(ABC):
    """What an operator may be composed with by `Operator.project`: a small matrix R a side of every block."""

    @abstractmethod
    def check(self, domain: Domain) -> None:
        """Refuses operators on other parameters.

        Raises:
            PytreeError: it was made for parameters of another structure or shape.
        """

    @abstractmethod
    def fold(self, block: Operator, name: str) -> Sides:
        """R o block as small matrices; see `Projection` for what they are.

        Raises:
            NotKroneckerError: the block has no sides, or not what is needed of them.
        """


@dataclasses.dataclass(frozen=True)
class Sketch(Compressor):
    """A description of random matrices; they are made when an operator is projected. See `sketch`."""

    rank: Ranks
    kind: SketchKind
    seed: int
    domain: Domain

    def __repr__(self) -> str:
        return f"Sketch(rank={self.rank}, kind={self.kind!r}, seed={self.seed}) on {place(self.domain)}"

    def check(self, domain: Domain) -> None:
        if domain != self.domain:
            raise PytreeError(
                "the sketch was made for a pytree of another structure or other shapes; make it from params"
            )

    def fold(self, block: Operator, name: str) -> Sides:
        match block:
            case Kronecker(left=left, right=right):
                sides = ("left", left), ("right", right)
                return tuple(
                    side.right(self.matrix(name, label, side.shape[-1], side.diag())) for label, side in sides
                )
            case Matrix():
                rows = self.matrix(name, "rows", block.domain.size, block.diag())
                return (block._apply(rows.reshape(-1, *block.shape), 1),)
        reason = (
            "its eigenvalues do not factor" if isinstance(block, EigenKronecker) else "it is not a Kronecker product"
        )
        raise NotKroneckerError(
            f"a {type(block).__name__} has no factor a side to fold a sketch into ({reason}): use FactoredTikhonov "
            "damping in place of a number, or apply the operator to the full vector first and sketch the result "
            "(R @ curv); an EigenSketch folds into every operator that has an eigenbasis a side"
        )

    def matrix(self, block: str, side: str, width: int, like: Tensor) -> Tensor:
        """R [p, width] for one side of a block, p = min(rank, width); R = I where p = width."""
        rank = rank_of(self.rank, block)
        if rank >= width:
            return torch.eye(width, dtype=like.dtype, device=like.device)
        key = int.from_bytes(hashlib.sha256(f"{self.seed}/{block}/{side}".encode()).digest()[:8], "big", signed=True)
        if self.kind == "rademacher":
            rows = 1.0 - 2.0 * (bits(key, rank, width) >> 63 & 1).double()
            scale = 1 / math.sqrt(rank)
        else:
            rows = normal(key, rank, width)
            scale = 1 / math.sqrt(rank)
            if self.kind == "orthogonal":
                q, r = torch.linalg.qr(rows.mT)
                rows, scale = (q * r.diagonal().sign()).mT, math.sqrt(width / rank)
        return (scale * rows).to(dtype=like.dtype, device=like.device)


def sketch(params: Tree, *, rank: Ranks = 64, kind: SketchKind = "rademacher", seed: int = 0) -> Sketch:
    """Random matrices R with E[R^T R] = I, for every side of every block of a curvature on ``params``.

    Args:
        params: pytree of tensors that the curvature acts on.
        rank: rows a side, for all blocks or {block: rows}; a side that is not wider is kept as it is (R = I).
        kind: "rademacher" (entries +-1 / sqrt(p)), "normal" (N(0, 1/p)), or "orthogonal" (orthonormal rows times
            sqrt(d / p), which approximates best).
        seed: equal seeds give equal matrices on every device.

    Returns:
        A sketch, to be given to ``curv.project``.

    Raises:
        ArgumentError: an unknown kind or a rank below 1.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(8, 6, bias=False))
        >>> curv = cv.kfac(model_fn, params, (torch.randn(5, 8), torch.randn(5, 6)), loss=cv.MSE())
        >>> P = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(params, rank=2))
        >>> P(params)["weight"].shape
        torch.Size([2, 2])
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_ranks(rank)
    return Sketch(dict(rank) if isinstance(rank, Mapping) else rank, kind, seed, Domain.of(params))


def bits(key: int, rows: int, columns: int, stream: int = 0) -> Tensor:
    """64 random bits for each entry [rows, columns], a function of key, row, column and stream (SplitMix64)."""
    row, column = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    z = mix(mix(mix(torch.tensor(key) + stream) + row) + column)
    return mix(z)


def mix(z: Tensor) -> Tensor:
    """SplitMix64's step and finalizer, in wrapping 64-bit arithmetic."""
    z = z + signed(0x9E3779B97F4A7C15)
    z = (z ^ shift_right(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift_right(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ shift_right(z, 31)


def signed(value: int) -> int:
    """A 64-bit pattern as a signed integer."""
    return value - (1 << 64) if value >> 63 else value


def shift_right(z: Tensor, count: int) -> Tensor:
    """Logical shift of signed 64-bit integers."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def normal(key: int, rows: int, columns: int) -> Tensor:
    """Standard normal numbers [rows, columns] in float64, by Box and Muller."""
    first, second = (shift_right(bits(key, rows, columns, stream), 11).double() for stream in (1, 2))
    radius = (-2 * ((first + 1) * 2.0**-53).log()).sqrt()
    return radius * (2 * math.pi * 2.0**-53 * second).cos()
