"""Rules for the Kronecker factors of gradients, of which estimators make operators and optimizers preconditioners.

A rule turns the factors of a stack of gradients and a new stack into the next factors. A mode (dimension) without a
factor counts as the identity. ``decay`` b makes an exponential moving average, F <- b F + (1 - b) new; None a sum.

The first gradient makes the start, and then counts like every other: the factors of gradients 1, ..., t are

    F_0 = begin(gradient 1),   F_i = update(F_(i-1), gradient i)   for i = 1, ..., t.

`FactorRule.first` is F_1; without a decay, where F_0 is itself made of one gradient, it is F_0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curvlib.linalg.gram import writes_in_place
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
    def begin(self, seen: Observation, modes: Modes) -> Factors:
        """The factors before the first gradient, of which they may take their size; all bases are the identity."""

    @abstractmethod
    def update(
        self, factors: Factors, seen: Observation, modes: Modes, bases: Sequence[Tensor], decay: float | None
    ) -> Factors:
        """The factors with one more gradient."""

    def first(self, seen: Observation, modes: Modes, decay: float | None) -> Factors:
        """The factors of the first gradient."""
        return self.update(self.begin(seen, modes), seen, modes, (), decay)

    @abstractmethod
    def rebased(self, factors: Factors, bases: Sequence[Tensor]) -> Factors:
        """The same factors, for other bases."""


def zeros(stack: Tensor, modes: Modes) -> tuple[Tensor, ...]:
    """Zero matrices [k, n_i, n_i] for these modes."""
    return tuple(stack.new_zeros(len(stack), stack.shape[mode + 1], stack.shape[mode + 1]) for mode in modes)


def averaged(old: Tensor, new: Tensor, decay: float | None) -> Tensor:
    """The moving average or sum of an old tensor and a new one that nobody else holds."""
    into = new if writes_in_place(old, new) else None
    if decay is None:
        return torch.add(old, new, out=into)
    return torch.lerp(old, new, 1 - decay, out=into)
