"""Damping: what is added to an operator before it is inverted. A number means `Tikhonov`."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from curvlib.errors import DampingError


def check(strength: float | Tensor) -> None:
    """Refuses a negative number; a tensor is not looked at."""
    if not isinstance(strength, Tensor) and not strength >= 0:
        raise DampingError(f"damping must not be negative, got {strength}")


@dataclasses.dataclass(frozen=True)
class Tikhonov:
    """curv + d I, exactly: every eigenvalue of the joint spectrum grows by d.

    Args:
        strength: d >= 0, a number or a 0-d tensor.

    Raises:
        DampingError: d is negative.

    Example:
        >>> import torch, curvlib as cv
        >>> cv.Dense(torch.eye(2)).damp(cv.Tikhonov(0.5)).trace().round(decimals=4)
        tensor(3.)
    """

    strength: float | Tensor

    def __post_init__(self) -> None:
        check(self.strength)


@dataclasses.dataclass(frozen=True)
class FactoredTikhonov:
    """(G + sqrt(d) / pi I) (x) (A + pi sqrt(d) I), pi^2 = (tr A / d_A) / (tr G / d_G): stays a Kronecker product.

    With ``relative``, d is that many times the block's mean eigenvalue, which amounts to adding sqrt(r) times its own
    mean eigenvalue to either side. A block without sides gets d I. Every Kronecker product in a sum is damped so, with
    the pi and the mean eigenvalue of its own, and the sum of the other terms gets d I: a tied weight with k uses gets
    k d I and what its sides add. (Martens & Grosse 2015, section 6.3.)

    Args:
        strength: d >= 0 (or r), a number or a 0-d tensor.
        relative: measure the strength in units of the block's mean eigenvalue.

    Raises:
        DampingError: the strength is negative.

    Example:
        >>> import torch, curvlib as cv
        >>> curv = cv.Kronecker(cv.Dense(torch.eye(2)), cv.Dense(torch.eye(3)))
        >>> curv.damp(cv.FactoredTikhonov(0.25)).trace()  # (1 + .5) * 2 * (1 + .5) * 3
        tensor(13.5000)
    """

    strength: float | Tensor
    relative: bool = False

    def __post_init__(self) -> None:
        check(self.strength)


@dataclasses.dataclass(frozen=True)
class RelativeTikhonov:
    """curv + d I with d = r times the block's mean eigenvalue.

    Args:
        strength: r >= 0, a number or a 0-d tensor.

    Raises:
        DampingError: r is negative.

    Example:
        >>> import torch, curvlib as cv
        >>> cv.Dense(3 * torch.eye(2)).damp(cv.RelativeTikhonov(0.5)).trace()
        tensor(9.)
    """

    strength: float | Tensor

    def __post_init__(self) -> None:
        check(self.strength)


Damping = Tikhonov | FactoredTikhonov | RelativeTikhonov


def as_damping(damping: Damping | float | Tensor) -> Damping:
    """A number or 0-d tensor means `Tikhonov`."""
    if isinstance(damping, (Tikhonov, FactoredTikhonov, RelativeTikhonov)):
        return damping
    if not isinstance(damping, (int, float, Tensor)):
        raise DampingError(
            f"damping must be a number, Tikhonov, FactoredTikhonov or RelativeTikhonov, got {type(damping).__name__}"
        )
    return Tikhonov(damping)


def shift(damping: Damping, mean_eigenvalue: Tensor) -> float | Tensor:
    """The multiple of the identity that a block without sides is damped by; a tensor has the block's dtype."""
    strength = damping.strength
    if isinstance(strength, Tensor):
        strength = strength.to(mean_eigenvalue.dtype)
    if isinstance(damping, Tikhonov) or (isinstance(damping, FactoredTikhonov) and not damping.relative):
        return strength
    return strength * mean_eigenvalue
