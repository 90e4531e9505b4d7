"""When eigenbases are refreshed: policies that are values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from curvlib.errors import ArgumentError


class Refresh(ABC):
    """Decides after which steps eigenbases are refreshed. A value: no state, no memory."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether there is a refresh, or a check, after this step; the first step is 1."""

    @abstractmethod
    def limit(self, step: int) -> float | None:
        """The off-diagonality up to which a basis is kept at this step; None: all are refreshed unseen."""

    @property
    @abstractmethod
    def looks(self) -> bool:
        """Whether any step has a limit."""


@dataclass(frozen=True)
class Every(Refresh):
    """All bases are refreshed after every ``steps`` steps. Looks at no value.

    Raises:
        ArgumentError: ``steps`` is not positive.

    Example:
        >>> [step for step in range(1, 31) if Every(10).due(step)]
        [10, 20, 30]
    """

    steps: int = 10

    def __post_init__(self) -> None:
        at_least_one("steps", self.steps)

    def due(self, step: int) -> bool:
        return step % self.steps == 0

    def limit(self, step: int) -> float | None:
        return None

    @property
    def looks(self) -> bool:
        return False


@dataclass(frozen=True)
class Adaptive(Refresh):
    """Refreshes only the bases whose factor is off-diagonal by more than ``tolerance`` in them.

    The measure is ||offdiag(Q^T M Q)||_F / ||M||_F. A check costs one matrix product a factor. Which bases to refresh
    is one tensor of flags for all of them, which the host reads once a check; in traces, where nothing may be read, all
    are computed and the flags select.

    Args:
        tolerance: between 0 and 1.
        every: checked after every so many steps.

    Raises:
        ArgumentError: a negative tolerance, or ``every`` is not positive.

    Source:
        Eschenhagen et al. 2025, Purifying Shampoo, arXiv 2506.03595 (the criterion).

    Example:
        >>> Adaptive(0.1, every=5).due(10), Adaptive(0.1, every=5).limit(10)
        (True, 0.1)
    """

    tolerance: float
    every: int = 1

    def __post_init__(self) -> None:
        at_least_one("every", self.every)
        if not self.tolerance >= 0:
            raise ArgumentError(f"tolerance must not be negative, got {self.tolerance}")

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def limit(self, step: int) -> float | None:
        return self.tolerance

    @property
    def looks(self) -> bool:
        return True


@dataclass(frozen=True)
class Warmup(Refresh):
    """All bases after each of the first ``steps`` steps; from then on as the policy ``then`` says.

    Raises:
        ArgumentError: ``steps`` is not positive.

    Example:
        >>> [step for step in range(1, 31) if Warmup(3).due(step)]
        [1, 2, 3, 10, 20, 30]
    """

    steps: int
    then: Refresh = field(default_factory=Every)

    def __post_init__(self) -> None:
        at_least_one("steps", self.steps)

    def due(self, step: int) -> bool:
        return step <= self.steps or self.then.due(step)

    def limit(self, step: int) -> float | None:
        return None if step <= self.steps else self.then.limit(step)

    @property
    def looks(self) -> bool:
        return self.then.looks


def at_least_one(name: str, steps: int) -> None:
    """Refuses a period that is not positive."""
    if steps < 1:
        raise ArgumentError(f"{name} must be a positive number of steps, got {steps}")
