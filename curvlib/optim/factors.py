"""Rules for the Kronecker factors of gradients: what Shampoo and KL-Shampoo differ in (and DyKAF, see `dykaf_factors`).

A rule turns the factors of a stack of gradients and a new stack into the next factors. A mode (dimension) without a
factor counts as the identity. ``decay`` b makes an exponential moving average, F <- b F + (1 - b) new; None a sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.gram import writes_in_place
from curvlib.linalg.middle_gram import middle_gram
from curvlib.linalg.orthogonal_iteration import rayleigh
from curvlib.optim.modes import mode_product, mode_rows, outer
from curvlib.pytree import register

Modes = tuple[int, ...]


class Observation(NamedTuple):
    """A stack of gradients, as far as it has been projected anyway.

    Args:
        gradient: D [k, n_1, ..., n_d].
        partial: D in the bases of all modes that have one, but the first of them.
        squares: the squared entries of D in all bases.
    """

    gradient: Tensor
    partial: Tensor
    squares: Tensor


@register
class Factors:
    """The factors of a stack.

    Args:
        matrices: for each mode with a factor, [k, n_i, n_i].
        eigenvalues: for each of them, diag(Q^T M Q) [k, n_i] in its basis Q; None: not kept.
        norms: for each of them, the Frobenius norms [k] that the matrices are divided by before they are multiplied;
            None: they are multiplied as they are.
        scale: [k], which multiplies their product; None: one.
    """

    matrices: tuple[Tensor, ...]
    eigenvalues: tuple[Tensor, ...] | None = None
    norms: tuple[Tensor, ...] | None = None
    scale: Tensor | None = None


class FactorRule(ABC):
    """How the factors of gradients are made."""

    @abstractmethod
    def check(self, shape: Sequence[int], modes: Modes) -> None:
        """Refuses members of this shape and with factors for these modes, if the rule is not defined for them."""

    @abstractmethod
    def empty(self, stack: Tensor, modes: Modes) -> Factors:
        """Zeros in the shapes of the factors of this stack of gradients."""

    @abstractmethod
    def start(self, seen: Observation, modes: Modes, decay: float | None) -> Factors:
        """The factors of the first gradient; all bases are the identity."""

    @abstractmethod
    def update(
        self, factors: Factors, seen: Observation, modes: Modes, bases: Sequence[Tensor], decay: float | None
    ) -> Factors:
        """The factors with one more gradient."""

    @abstractmethod
    def rebased(self, factors: Factors, bases: Sequence[Tensor]) -> Factors:
        """The same factors, for other bases."""


@dataclass(frozen=True)
class ShampooFactors(FactorRule):
    """Shampoo's factors: for each mode the Gram matrix of the gradient's rows along it, D D^T and D^T D for a matrix.

    Source:
        Gupta, Koren and Singer 2018, Shampoo, arXiv 1802.09568.

    Example:
        >>> gradient = torch.tensor([[[1.0, 2.0]]])
        >>> ShampooFactors().start(Observation(gradient, gradient, gradient**2), (0, 1), None).matrices[1]
        tensor([[[1., 2.],
                 [2., 4.]]])
    """

    def check(self, shape: Sequence[int], modes: Modes) -> None:
        pass

    def empty(self, stack: Tensor, modes: Modes) -> Factors:
        return Factors(zeros(stack, modes))

    def start(self, seen: Observation, modes: Modes, decay: float | None) -> Factors:
        return self.update(self.empty(seen.gradient, modes), seen, modes, (), decay)

    def update(
        self, factors: Factors, seen: Observation, modes: Modes, bases: Sequence[Tensor], decay: float | None
    ) -> Factors:
        return Factors(
            tuple(
                averaged(matrix, middle_gram(mode_rows(seen.gradient, mode)), decay)
                for matrix, mode in zip(factors.matrices, modes, strict=True)
            )
        )

    def rebased(self, factors: Factors, bases: Sequence[Tensor]) -> Factors:
        return factors


@dataclass(frozen=True)
class KLFactors(FactorRule):
    """Factors that minimise the Kullback-Leibler divergence between Gaussians: L <- b L + (1 - b)/n D R^-1 D^T.

    And R <- b R + (1 - b)/m D^T L^-1 D with the old L. Inverses are taken in the current bases as Q diag(1/l) Q^T with
    l = diag(Q^T R Q), which is R^-1 as far as Q diagonalises R. These eigenvalues are kept: their moving average needs
    the projected gradient only, and is exact. Starts from L (x) R = mean(D^2) I (from I, if the first gradient is 0).

    Args:
        damping: relative to the mean eigenvalue of a factor, added to its eigenvalues where they are inverted.

    Raises:
        ArgumentError: the damping is negative.

    Source:
        Lin et al. 2025, Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization,
        arXiv 2509.03378.

    Example:
        >>> gradient = torch.tensor([[[3.0, 4.0]]])
        >>> factors = KLFactors().start(Observation(gradient, gradient, gradient**2), (0, 1), 0.5)
        >>> torch.allclose(factors.matrices[0], factors.eigenvalues[0])
        True
    """

    damping: float = 1e-8

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ArgumentError(f"the damping of KLFactors must not be negative, got {self.damping}")

    def check(self, shape: Sequence[int], modes: Modes) -> None:
        pass

    def empty(self, stack: Tensor, modes: Modes) -> Factors:
        matrices = zeros(stack, modes)
        return Factors(matrices, tuple(matrix.new_zeros(matrix.shape[:2]) for matrix in matrices))

    def start(self, seen: Observation, modes: Modes, decay: float | None) -> Factors:
        mean = seen.gradient.square().flatten(1).mean(1)
        size = torch.where(mean > 0, mean, 1.0) ** (1 / len(modes))
        eigenvalues = tuple(size.unsqueeze(1).expand(-1, seen.gradient.shape[mode + 1]) for mode in modes)
        isotropic = Factors(tuple(map(torch.diag_embed, eigenvalues)), eigenvalues)
        return self.update(isotropic, seen, modes, (), decay)

    def update(
        self, factors: Factors, seen: Observation, modes: Modes, bases: Sequence[Tensor], decay: float | None
    ) -> Factors:
        assert factors.eigenvalues is not None
        inverses = [1 / self.damped(values) for values in factors.eigenvalues]
        matrices, eigenvalues = [], []
        for i, mode in enumerate(modes):
            others = [j for j in range(len(modes)) if j != i]
            half = seen.partial
            if i > 0:
                half = seen.gradient
                for j in others[::-1] if bases else ():
                    half = mode_product(half, bases[j], modes[j])
            rows = mode_rows(half, mode)
            share = rows.new_full((), 1 / rows.shape[-1])
            weights = share.expand(rows.shape[0], rows.shape[-1])
            if others:
                product = outer([inverses[j] for j in others], [modes[j] for j in others], half.ndim - 1)
                spread = product.expand([1 if axis == mode + 1 else n for axis, n in enumerate(half.shape)])
                weights = share * mode_rows(spread, mode).squeeze(1)
            matrices.append(averaged(factors.matrices[i], middle_gram(rows, weights), decay))
            diagonal = (mode_rows(seen.squares, mode) @ weights.unsqueeze(-1)).squeeze(-1)
            eigenvalues.append(averaged(factors.eigenvalues[i], diagonal, decay))
        return Factors(tuple(matrices), tuple(eigenvalues))

    def damped(self, eigenvalues: Tensor) -> Tensor:
        """Positive, however small the eigenvalues are."""
        floor = self.damping * eigenvalues.mean(-1, keepdim=True) + torch.finfo(eigenvalues.dtype).tiny
        return eigenvalues.clamp(min=0) + floor

    def rebased(self, factors: Factors, bases: Sequence[Tensor]) -> Factors:
        pairs = zip(factors.matrices, bases, strict=True)
        return Factors(factors.matrices, tuple(rayleigh(matrix, basis)[1] for matrix, basis in pairs))


def zeros(stack: Tensor, modes: Modes) -> tuple[Tensor, ...]:
    """Zero matrices [k, n_i, n_i] for these modes."""
    return tuple(stack.new_zeros(len(stack), stack.shape[mode + 1], stack.shape[mode + 1]) for mode in modes)


def averaged(old: Tensor, new: Tensor, decay: float | None) -> Tensor:
    """The moving average or sum of an old tensor and a new one that nobody else holds."""
    into = new if writes_in_place(old, new) else None
    if decay is None:
        return torch.add(old, new, out=into)
    return torch.lerp(old, new, 1 - decay, out=into)
