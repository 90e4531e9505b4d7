"""Checks of the numbers that transformations are made with."""

from __future__ import annotations

from curvlib.errors import ArgumentError


def at_least_zero(name: str, value: float) -> None:
    """Refuses a number that is negative or not a number.

    Raises:
        ArgumentError: names the argument.

    Example:
        >>> at_least_zero("eps", 0.0)
    """
    if not value >= 0:
        raise ArgumentError(f"{name} must not be negative, got {value}")


def above_zero(name: str, value: float) -> None:
    """Refuses a number that is not positive.

    Raises:
        ArgumentError: names the argument.

    Example:
        >>> above_zero("limit", 1.0)
    """
    if not value > 0:
        raise ArgumentError(f"{name} must be positive, got {value}")


def below_one(name: str, value: float) -> None:
    """Refuses a decay outside of [0, 1).

    Raises:
        ArgumentError: names the argument.

    Example:
        >>> below_one("decay", 0.9)
    """
    if not 0 <= value < 1:
        raise ArgumentError(f"{name} must lie in [0, 1), got {value}")
