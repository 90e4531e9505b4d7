"""DyKAF's factors: a Kronecker product that follows F <- b F + (1 - b) vec(D) vec(D)^T by projector splitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.factors.axes import entrywise, unfolded
from curvlib.factors.rule import FactorRule, Factors, Modes, Observation, zeros
from curvlib.linalg.gram import panels, writes_in_place
from curvlib.linalg.middle_gram import middle_gram, summed_middle_gram
from curvlib.linalg.precision import highest_matmul, product_eps
from curvlib.linalg.rank_one import leading_pair
from curvlib.linalg.tensor_splitting import hopm

Number = float | Tensor
SMALL = 1e-3  # of the first gradient's share, the identity that factors start from
LEAST = 1e-18  # share of the old factors that always stays: below rounding, and its square is a float32


@dataclass(frozen=True)
class DyKAFFactors(FactorRule):
    """Factors L, R and a scale: F ~ scale * L / ||L|| (x) R / ||R||, one sweep of alternating least squares a step.

    Matrices are followed by the integrators `curvlib.linalg.projector_splitting.ksl` or ``bug``, tensors by ``hopm``.
    Modes without a factor count as observations, which are added; one mode alone has the moving average of its Gram
    matrix. The norms stay beside the matrices, near one but not one: dividing by them is a number in the next step's
    formulas, and not one more pass over memory.

    Args:
        integrator: "ksl", or "bug", whose two halves are independent (matrices only).
        sweeps: of ksl and hopm.
        start: "identity": a small multiple of the identity, 1e-3 ||D||^2 with the first gradient D, which keeps the
            factors positive definite; "svd": the product nearest to the first vec(D) vec(D)^T, from its leading
            singular pair, for matrices. Tensors start from the identity.

    Raises:
        ArgumentError: an unknown integrator or start, or no sweep.

    Source:
        Yudin et al. 2025, arXiv 2511.06477.

    Example:
        >>> gradient = torch.tensor([[[3.0, 4.0]]])
        >>> factors = DyKAFFactors(start="svd").first(Observation(gradient, gradient, gradient**2), (0, 1), 0.95)
        >>> factors.scale.round(decimals=3), factors.matrices[0].round(decimals=3)
        (tensor([25.]), tensor([[[1.]]]))
    """

    integrator: Literal["ksl", "bug"] = "ksl"
    sweeps: int = 1
    start: Literal["identity", "svd"] = "identity"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("integrator", self.integrator, ("ksl", "bug")),
            ("start", self.start, ("identity", "svd")),
        ):
            if value not in choices:
                raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if self.sweeps < 1:
            raise ArgumentError(f"at least one sweep is needed, got sweeps={self.sweeps}")

    def check(self, shape: Sequence[int], modes: Modes) -> None:
        if 2 < len(modes) < len(shape):
            raise ArgumentError(
                f"DyKAF follows a tensor only if all of its sides have a factor, or at most two; of {tuple(shape)} the "
                f"sides {modes} have one: set merge_dimensions or block_size, or a larger max_dimension"
            )
        if len(modes) > 2 and self.integrator == "bug":
            raise ArgumentError(
                f"integrator='bug' is for matrices, and a block has the shape {tuple(shape)}: set merge_dimensions, or "
                "use integrator='ksl'"
            )

    def empty(self, stack: Tensor, modes: Modes) -> Factors:
        ones = tuple(stack.new_ones(len(stack)) for _ in modes)
        return Factors(zeros(stack, modes), None, ones, stack.new_zeros(len(stack)))

    def begin(self, seen: Observation, modes: Modes) -> Factors:
        gradient = seen.gradient
        none = self.empty(gradient, modes)
        if self.from_pair(gradient, modes):
            scale, left, right = leading_pair(gradient)
            return Factors((left, right), None, none.norms, scale)
        units = tuple(
            (torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) / x.shape[-1] ** 0.5).expand_as(x)
            for x in none.matrices
        )
        return Factors(units, None, none.norms, SMALL * gradient.square().flatten(1).sum(1))

    def from_pair(self, gradient: Tensor, modes: Modes) -> bool:
        """Whether factors start from a singular pair."""
        return self.start == "svd" and modes == (0, 1) and gradient.ndim == 3

    def first(self, seen: Observation, modes: Modes, decay: float | None) -> Factors:
        """The factors of the first gradient; without a decay, the nearest product is not counted twice."""
        if decay is None and self.from_pair(seen.gradient, modes):
            return self.begin(seen, modes)
        return super().first(seen, modes, decay)

    def update(
        self, factors: Factors, seen: Observation, modes: Modes, bases: Sequence[Tensor], decay: float | None
    ) -> Factors:
        kept, weight = (1.0, 1.0) if decay is None else (decay, 1 - decay)
        return self.step(factors, seen.gradient, modes, kept, weight)

    def step(self, factors: Factors, gradient: Tensor, modes: Modes, kept: Number, weight: Number) -> Factors:
        """A step towards kept * F + weight * vec(D) vec(D)^T.

        Factors of matrices may be diagonals [k, n_i]; they stay so, and the product is the nearest among those.
        """
        assert factors.norms is not None
        assert factors.scale is not None
        if len(modes) > 2:
            scale, units = hopm(factors.scale, factors.matrices, gradient, kept, weight, sweeps=self.sweeps)
            return Factors(units, None, factors.norms, scale)
        if len(modes) == 1:
            rows = unfolded(gradient, modes[0], gradient.ndim - 1)
            return averaged(Balance.of(kept * factors.scale, rows, weight), factors.matrices[0], factors.norms[0])
        gradient = gradient.movedim([mode + 1 for mode in modes], [-2, -1])
        if gradient.ndim > 3:
            gradient = gradient.flatten(1, -3)  # [k, N, m, n]: the modes without a factor are N observations
        balance = Balance.of(kept * factors.scale, gradient, weight)
        (left, right), (left_norm, right_norm) = factors.matrices, factors.norms
        if self.integrator == "bug":
            return in_parallel(balance, left, right, left_norm, right_norm)
        return in_turn(balance, left, right, left_norm, right_norm, self.sweeps)

    def rebased(self, factors: Factors, bases: Sequence[Tensor]) -> Factors:
        return factors


class Balance(NamedTuple):
    """The target old * L (x) R + weight * vec(D) vec(D)^T, divided by ``total``, so that all numbers are near one.

    Args:
        gradient: D [k, m, n], or observations [k, N, m, n] whose terms are added.
        total: old + weight ||D||^2 [k].
        old: the share of the old product [k].
        root: what D is multiplied by, so that vec(D) vec(D)^T is the rest: [k].
    """

    gradient: Tensor
    total: Tensor
    old: Tensor
    root: Tensor

    @classmethod
    def of(cls, old: Tensor, gradient: Tensor, weight: Number) -> Balance:
        """The balance of a product of size old [k] and unit factors, and a gradient."""
        size = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        total = old + weight * size.square()
        divisor = torch.where(total > 0, total, 1)
        share = torch.where(total > 0, old / divisor, 1).clamp(min=LEAST)
        return cls(gradient, total, share, (weight / divisor).sqrt())

    def left(self, middle: Tensor, norm: Tensor, like: Tensor) -> Tensor:
        """D X D^T for the gradient's share of the target and a right factor X of this norm, in the form of ``like``."""
        return balanced_gram(self.scaled(norm), middle, diagonal=like.ndim == 2)

    def right(self, middle: Tensor, norm: Tensor, like: Tensor) -> Tensor:
        """D^T Y D for the gradient's share of the target and a left factor Y of this norm, in the form of ``like``."""
        return balanced_gram(self.scaled(norm).mT, middle, diagonal=like.ndim == 2)

    def scaled(self, norm: Tensor) -> Tensor:
        """The gradient times the root of its share, over the root of a factor's norm."""
        return entrywise(self.root * norm.rsqrt(), self.gradient) * self.gradient


def in_turn(
    balance: Balance, left: Tensor, right: Tensor, left_norm: Tensor, right_norm: Tensor, sweeps: int
) -> Factors:
    """A step of `curvlib.linalg.projector_splitting.ksl`, with matrices divided by their norms where they are used."""
    new_right, new_right_norm, overlap = right, right_norm, torch.ones_like(balance.old)
    for sweep in range(sweeps):
        if sweep > 0:
            overlap = inner(new_right, right) / (new_right_norm * right_norm)
        new_left = plus(balance.left(new_right, new_right_norm, left), balance.old * overlap / left_norm, left)
        new_left_norm = frobenius(new_left)
        overlap = inner(new_left, left) / (new_left_norm * left_norm)
        new_right = plus(balance.right(new_left, new_left_norm, right), balance.old * overlap / right_norm, right)
        new_right_norm = frobenius(new_right)
    scale = balance.total * new_right_norm
    return Factors((new_left, new_right), None, (new_left_norm, new_right_norm), scale)


def in_parallel(balance: Balance, left: Tensor, right: Tensor, left_norm: Tensor, right_norm: Tensor) -> Factors:
    """A step of `curvlib.linalg.projector_splitting.bug`."""
    new_left = plus(balance.left(right, right_norm, left), balance.old / left_norm, left)
    new_right = plus(balance.right(left, left_norm, right), balance.old / right_norm, right)
    norms = frobenius(new_left), frobenius(new_right)
    kept = inner(new_left, left) / (norms[0] * left_norm) * inner(new_right, right) / (norms[1] * right_norm)
    seen = inner(new_left, balance.left(new_right, norms[1], left)) / norms[0]
    return Factors((new_left, new_right), None, norms, balance.total * (balance.old * kept + seen))


def averaged(balance: Balance, matrix: Tensor, norm: Tensor) -> Factors:
    """A single factor, which is the moving average itself."""
    new = plus(middle_gram(balance.scaled(torch.ones_like(norm))), balance.old / norm, matrix)
    size = frobenius(new)
    return Factors((new,), None, (size,), balance.total * size)


def balanced_gram(gradient: Tensor, middle: Tensor, *, diagonal: bool = False) -> Tensor:
    """D X D^T [k, m, m] for D [k, m, n] or its ``diagonal`` [k, m], or their sum over observations [k, N, m, n].

    X is [k, n, n], or the diagonal [k, n] of a diagonal matrix.

    With X = B + B^T this is W + W^T for W = D B D^T. Of a block-triangular B half is zero: where n is larger than m,
    this saves more in D B than it costs that W is not symmetric.
    """
    if diagonal:
        across = gradient.ndim == 4
        middle = middle.unsqueeze(1) if across else middle
        weighted = highest_matmul(gradient, middle) if middle.ndim == gradient.ndim else gradient * middle.unsqueeze(-2)
        return (weighted * gradient).sum((1, -1) if across else -1)
    if gradient.ndim == 4:
        return summed_middle_gram(gradient, middle)
    if middle.ndim == 2:
        return middle_gram(gradient, middle)
    m, n = gradient.shape[-2:]
    count = panels(n, gradient.device)
    if count == 1 or 2 * n <= 3 * m or not writes_in_place(gradient, middle) or rounds(gradient):
        return middle_gram(gradient, middle)
    half, step = torch.empty_like(gradient.mT, memory_format=torch.contiguous_format), -(-n // count)
    for start in range(0, n, step):
        stop = min(start + step, n)
        rows, block = half[:, start:stop], middle[:, start:stop]
        if start > 0:
            torch.bmm(block[..., :start], gradient.mT[:, :start], out=rows)
        corner = block[..., start:stop], gradient.mT[:, start:stop]
        torch.baddbmm(rows, *corner, beta=int(start > 0), alpha=0.5, out=rows)
    product = gradient @ half
    return product + product.mT


def rounds(tensor: Tensor) -> bool:
    """Whether products of such tensors need the care of `middle_gram`."""
    return product_eps(tensor) > torch.finfo(tensor.dtype).eps


def plus(fresh: Tensor, weight: Tensor, old: Tensor) -> Tensor:
    """``fresh + weight * old`` for weights [k], written over ``fresh``, which nobody else holds."""
    return torch.addcmul(fresh, old, entrywise(weight, old), out=fresh if writes_in_place(fresh, old, weight) else None)


def frobenius(stack: Tensor) -> Tensor:
    """Norms [k], positive."""
    return torch.linalg.vector_norm(stack.flatten(1), dim=1).clamp(min=torch.finfo(stack.dtype).tiny)


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products [k] of the members of two stacks."""
    if writes_in_place(first, second) and first.device.type == "cpu":  # one pass, and no product in memory
        return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(first, second, strict=True)])
    return (first * second).flatten(1).sum(1)
