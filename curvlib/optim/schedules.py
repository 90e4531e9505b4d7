"""Learning rates that depend on the number of the step, as values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from curvlib.errors import ArgumentError


@dataclass(frozen=True)
class Schedule:
    """A number that rises from 0, stays at its peak, and falls to its final value, where it stays.

    The first step has number 0. Step s has the value min(s / warmup, 1) (k peak + (1 - k) final), where k falls from 1
    to 0 as f = (s - start) / (end - start) runs from 0 to 1: 1 - f ("linear"), 1 - sqrt(f) ("sqrt") or
    (1 + cos(pi f)) / 2 ("cosine").

    Args:
        peak: the highest value.
        final: the value from step ``end`` on.
        warmup: the number of steps of the linear rise.
        start: the last step with the peak value, at least ``warmup``.
        end: the first step with the final value, after ``start``.
        shape: of the fall.

    Raises:
        ArgumentError: the steps are not in this order, or there is no such shape.

    Example:
        >>> Schedule(peak=1.0, final=0.5, warmup=2, start=3, end=5, shape="linear")(4)
        0.75
    """

    peak: float
    final: float
    warmup: int
    start: int
    end: int
    shape: Literal["linear", "sqrt", "cosine"]

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= self.start < self.end:
            raise ArgumentError(
                "a schedule warms up for 0 or more steps and then decays over at least one; this one warms up for "
                f"{self.warmup} steps and decays from step {self.start} to step {self.end}"
            )
        if self.shape not in ("linear", "sqrt", "cosine"):
            raise ArgumentError(f"shape must be 'linear', 'sqrt' or 'cosine', got {self.shape!r}")

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: int | Tensor) -> float | Tensor:
        """The value at a step; of a tensor, which may be traced, a float64 tensor."""
        if not isinstance(step, Tensor):
            return float(self(torch.tensor(step)))
        step = step.to(torch.float64)
        passed = ((step - self.start) / (self.end - self.start)).clamp(0, 1)
        match self.shape:
            case "linear":
                kept = 1 - passed
            case "sqrt":
                kept = 1 - passed.sqrt()
            case "cosine":
                kept = (1 + (math.pi * passed).cos()) / 2
        value = kept * self.peak + (1 - kept) * self.final
        return value * (step / self.warmup).clamp(max=1) if self.warmup else value


def constant(value: float) -> Schedule:
    """The same value at every step.

    Example:
        >>> constant(0.1)(0), constant(0.1)(1000)
        (0.1, 0.1)
    """
    return Schedule(value, value, 0, 0, 1, "linear")


def warmup_cosine(peak: float, warmup: int, total: int, *, final: float = 0.0) -> Schedule:
    """A linear rise from 0 over ``warmup`` steps, and half a cosine from there to ``final`` at step ``total``.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017 (without restarts).

    Args:
        peak: the value at step ``warmup``.
        warmup: steps of the rise; 0: the first step has the peak value.
        total: the first step with the value ``final``.
        final: the value from then on.

    Raises:
        ArgumentError: ``warmup`` is negative or not below ``total``.

    Example:
        >>> schedule = warmup_cosine(1.0, 10, 110, final=0.1)
        >>> [round(schedule(step), 3) for step in (0, 5, 10, 60, 110, 200)]
        [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    return Schedule(peak, final, warmup, warmup, total, "cosine")


def warmup_stable_decay(
    peak: float,
    warmup: int,
    stable: int,
    decay: int,
    *,
    final: float = 0.0,
    shape: Literal["linear", "sqrt"] = "linear",
) -> Schedule:
    """A linear rise from 0 over ``warmup`` steps, ``stable`` steps at the peak, and ``decay`` steps down to ``final``.

    Source: Hu et al., MiniCPM, 2024; the shape "sqrt", which falls as 1 - sqrt(f), is of Haegele et al., NeurIPS 2024.

    Args:
        peak: the value of the plateau.
        warmup: steps of the rise; 0: the first step has the peak value.
        stable: steps of the plateau.
        decay: steps of the fall.
        final: the value from step warmup + stable + decay on.
        shape: of the fall.

    Raises:
        ArgumentError: a number of steps is negative, ``decay`` is 0, or there is no such shape.

    Example:
        >>> schedule = warmup_stable_decay(1.0, 10, 80, 16, shape="sqrt")
        >>> [schedule(step) for step in (0, 5, 10, 90, 94, 106)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    return Schedule(peak, final, warmup, warmup + stable, warmup + stable + decay, shape)
