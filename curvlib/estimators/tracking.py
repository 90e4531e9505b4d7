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
    modes_of,
    parts_of,
    weights,
    wide_axes,
)
from curvlib.factors.axes import entrywise, mode_gram
from curvlib.factors.dykaf import SMALL, DyKAFFactors
from curvlib.factors.rule import Factors
from curvlib.layers.wide import Wide
from curvlib.linalg.middle_gram import middle_gram
from curvlib.linalg.projector_splitting import Rearranged, bug, ksl, unit
from curvlib.linalg.rank_one import leading_direction, leading_pair, projection
from curvlib.operators import Dense, Diagonal, Kronecker, Matrix, ScaledPower

INTEGRATORS = ("ksl", "bug")
STARTS = ("svd", "random", "identity")

Flags = tuple[bool, ...]  # which factors are diagonal


@dataclasses.dataclass(frozen=True)
class DyKAFRule:
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

    def start(self, gradient: Tensor, order: int, wide: Wide, decay: Number | None = None) -> Kronecker:
        """The block of the first gradient D [*, n_1, ..., n_d]: one that it makes, in which it then counts."""
        diagonal = wide_axes(gradient, order, wide)
        if self.beginning == "svd" and order == 2 and not any(diagonal):
            scale, left, right = leading_pair(gradient)
            return block_with(scale, (left, right), diagonal)
        if self.beginning == "identity":
            plain = [identity(gram_like(gradient, i, order, flag), diagonal=flag) for i, flag in enumerate(diagonal)]
            scale = SMALL * gradient.square().flatten(-order).sum(-1)
            return block_with(*fit(scale, plain, diagonal, gradient, *weights(decay), "ksl", 1), diagonal)
        grams = [
            columns(mode_gram(gradient, i, order, diagonal=flag), diagonal=flag) for i, flag in enumerate(diagonal)
        ]
        scale, units = self.first_units(grams, diagonal)
        scale, units = fit(scale, units, diagonal, gradient, 0.0, weights(decay)[1], "ksl", 1)
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
    """The step of `DyKAFFactors` towards old * F + new * g g^T for a gradient D [*, n_1, ..., n_d].

    Raises:
        ArgumentError: there is no such step for tensors of this order, or with diagonal factors.
    """
    order = len(units)
    if order > 2 and integrator == "bug":
        raise ArgumentError(f"integrator='bug' is for matrices, and this is a tensor of order {order}; use 'ksl'")
    if order > 2 and any(diagonal):
        raise ArgumentError(
            f"a tensor of order {order} has an axis too wide for a dense factor; reshape it to a matrix, or give "
            "`wide` a greater width"
        )
    rule = DyKAFFactors(integrator, sweeps)  # type: ignore[arg-type]
    stacks = [x.squeeze(-1) if flag else x for x, flag in zip(units, diagonal, strict=True)]
    stacks = [x.reshape(-1, *x.shape[scale.ndim :]) for x in stacks]
    flat, ones = scale.reshape(-1), tuple(torch.ones_like(scale.reshape(-1)) for _ in units)
    rows = gradient.reshape(-1, *gradient.shape[-order:])
    old, new = (x.reshape(-1) if isinstance(x, Tensor) and x.ndim else x for x in (old, new))
    found = rule.step(Factors(tuple(stacks), None, ones, flat), rows, tuple(range(order)), old, new)
    assert found.norms is not None
    assert found.scale is not None
    matrices = [m / entrywise(norm, m) for m, norm in zip(found.matrices, found.norms, strict=True)]
    shaped = [
        columns(m.reshape(*scale.shape, *m.shape[1:]), diagonal=flag)
        for m, flag in zip(matrices, diagonal, strict=True)
    ]
    return found.scale.reshape(scale.shape), shaped


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


def gram_like(gradient: Tensor, axis: int, order: int, flag: bool) -> Tensor:
    """A tensor of the shape of a factor: [*, n, n], or [*, n, 1] of a diagonal one."""
    n = gradient.shape[axis - order]
    return gradient.new_empty(*gradient.shape[:-order], n, 1 if flag else n)


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
