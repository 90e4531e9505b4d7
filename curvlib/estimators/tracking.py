"""Kronecker products of rank one that track a second moment of gradients: DyKAF's blocks and their steps.

A block is scale * L (x) R with factors of Frobenius norm one. The factor of a wide side is diagonal, and a column
[*, n, 1] in here: that of the nearest product among those with such a factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.estimators.gradients import (
    Number,
    block_of,
    entries,
    is_diagonal,
    mode_gram,
    modes_of,
    parts_of,
    wide_axes,
)
from curvlib.layers.wide import Wide
from curvlib.linalg.middle_gram import middle_gram
from curvlib.linalg.precision import highest_matmul
from curvlib.linalg.projector_splitting import Rearranged, bug, ksl, unit
from curvlib.linalg.rank_one import leading_direction, leading_pair, projection
from curvlib.linalg.tensor_splitting import hopm
from curvlib.operators import Dense, Diagonal, Kronecker, Matrix, ScaledPower

INTEGRATORS = ("ksl", "bug")
STARTS = ("svd", "random", "identity")

Flags = tuple[bool, ...]  # which factors are diagonal


@dataclasses.dataclass(frozen=True)
class Rule:
    """How blocks are made and updated; diagonal factors are columns [*, n, 1]."""

    integrator: str
    sweeps: int
    beginning: str
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        for name, value, allowed in (("integrator", self.integrator, INTEGRATORS), ("start", self.beginning, STARTS)):
            if value not in allowed:
                raise ArgumentError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.sweeps < 1 or (self.integrator == "bug" and self.sweeps > 1):
            raise ArgumentError(f"sweeps must be at least 1, and 1 for integrator='bug', got {self.sweeps}")

    def start(self, gradient: Tensor, order: int, wide: Wide) -> Kronecker:
        """The block of one gradient D [*, n_1, ..., n_d]."""
        diagonal = wide_axes(gradient, order, wide)
        if self.beginning == "svd" and order == 2 and not any(diagonal):
            scale, left, right = leading_pair(gradient)
            return block_with(scale, (left, right), diagonal)
        grams = [
            columns(mode_gram(gradient, i, order, diagonal=flag), diagonal=flag) for i, flag in enumerate(diagonal)
        ]
        scale, units = self.first_units(grams, diagonal)
        scale, units = fit(scale, units, diagonal, gradient, 0.0, 1.0, "ksl", 1)
        return block_with(scale, units, diagonal)

    def first_units(self, grams: Sequence[Tensor], diagonal: Flags) -> tuple[Tensor, Sequence[Tensor]]:
        """A scale of zero, and units to start from, given the second moment along every axis."""
        units = []
        generator = self.generator or torch.Generator(grams[0].device).manual_seed(0)
        for gram, flag in zip(grams, diagonal, strict=True):
            plain = identity(gram, diagonal=flag)
            if self.beginning == "random":
                shape = gram.shape[:-1] + gram.shape[-2:-1]
                draws = torch.randn(shape, generator=generator, dtype=gram.dtype, device=gram.device)
                plain, _ = unit(draws.square().sum(-1, keepdim=True) if flag else middle_gram(draws), plain)
            elif self.beginning == "svd" and flag:
                plain, _ = unit(gram, plain)
            elif self.beginning == "svd":
                plain = projection(leading_direction(gram), gram.abs().amax((-2, -1), keepdim=True) == 0)
            units.append(plain)
        return torch.zeros_like(grams[0][..., 0, 0]), units

    def advance(self, block: Kronecker, gradient: Tensor, old: Number, new: Number) -> Kronecker:
        """The block after one more gradient."""
        modes = modes_of(block)
        bases, scales, exponents = zip(*map(parts_of, modes), strict=True)
        if set(exponents) != {1.0}:
            raise ArgumentError(
                "these are not DyKAF's factors; update the curvature that dykaf, init or update returned, and take "
                "powers and inverses of the result"
            )
        diagonal = tuple(map(is_diagonal, bases))
        factors = [columns(entries(base), diagonal=flag) for base, flag in zip(bases, diagonal, strict=True)]
        pairs = [unit(x, identity(x, diagonal=flag)) for x, flag in zip(factors, diagonal, strict=True)]
        units, norms = zip(*pairs, strict=True)
        scale = torch.stack(list(torch.broadcast_tensors(*scales, *norms))).prod(0)
        return block_with(*fit(scale, units, diagonal, gradient, old, new, self.integrator, self.sweeps), diagonal)


def fit(
    scale: Tensor,
    units: Sequence[Tensor],
    diagonal: Flags,
    gradient: Tensor,
    old: Number,
    new: Number,
    integrator: str,
    sweeps: int,
) -> tuple[Tensor, Sequence[Tensor]]:
    """A step towards old * F + new * g g^T for a gradient D [*, n_1, ..., n_d].

    Raises:
        ArgumentError: there is no such step for tensors of this order, or with diagonal factors.
    """
    if len(units) == 2:
        return stepped(scale, units, target_of(gradient, diagonal), old, new, integrator, sweeps)
    if integrator == "bug":
        raise ArgumentError(f"integrator='bug' is for matrices, and this is a tensor of order {len(units)}; use 'ksl'")
    if any(diagonal):
        raise ArgumentError(
            f"a tensor of order {len(units)} has an axis too wide for a dense factor; reshape it to a matrix, or give "
            "`wide` a greater width"
        )
    return hopm(scale, tuple(units), gradient, old, new, sweeps=sweeps)


def stepped(
    scale: Tensor,
    units: Sequence[Tensor],
    target: Rearranged,
    old: Number,
    new: Number,
    integrator: str,
    sweeps: int,
) -> tuple[Tensor, Sequence[Tensor]]:
    """A step towards old * F + new * target for matrices."""
    left, right = units
    if integrator == "bug":
        scale, left, right = bug(scale, left, right, target, old, new)
    else:
        scale, left, right = ksl(scale, left, right, target, old, new, sweeps=sweeps)
    return scale, (left, right)


def target_of(gradient: Tensor, diagonal: Flags) -> Rearranged:
    """The rearranged g g^T of a matrix D [*, m, n], cut to the diagonal on wide sides."""
    left, right = diagonal
    return Rearranged(
        lambda x: sandwich(gradient, x, middle_diagonal=right, diagonal=left),
        lambda y: sandwich(gradient.mT, y, middle_diagonal=left, diagonal=right),
    )


def sandwich(gradient: Tensor, middle: Tensor, *, middle_diagonal: bool, diagonal: bool) -> Tensor:
    """D X D^T [*, m, m], or its diagonal as a column [*, m, 1]; X may be diagonal, a column as well."""
    if not diagonal:
        return middle_gram(gradient, middle.squeeze(-1) if middle_diagonal else middle)
    weighted = gradient * middle.mT if middle_diagonal else highest_matmul(gradient, middle)
    return (weighted * gradient).sum(-1, keepdim=True)


def identity(like: Tensor, *, diagonal: bool) -> Tensor:
    """The multiple of the identity of norm one, [*, n, n], or as a column [*, n, 1]."""
    size = like.shape[-2]
    ones = like.new_full((size,), size**-0.5)
    return (ones.unsqueeze(-1) if diagonal else torch.diag(ones)).expand_as(like)


def columns(values: Tensor, *, diagonal: bool) -> Tensor:
    """Diagonal factors [*, n] as columns [*, n, 1]; others as they are."""
    return values.unsqueeze(-1) if diagonal else values


def block_with(scale: Tensor, units: Sequence[Tensor], diagonal: Flags) -> Kronecker:
    """The block scale * L (x) R of unit factors."""
    left, *right = (Diagonal(x.squeeze(-1)) if flag else Dense(x) for x, flag in zip(units, diagonal, strict=True))
    modes: list[Matrix] = [ScaledPower(left, scale, 1.0), *right]
    return block_of(modes)
