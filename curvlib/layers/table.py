"""The layer table: which torch function is which layer. This is the one place where a new kind is added.

An entry stands for a torch function and has its signature, with an `Inspection` of the call in front. It says
what the call does with the parameters, and which operand the layer reads (a name, or a function of the arguments).
`torch.nn.functional.prelu`, say, multiplies negative inputs by one slope a channel::

    def negative_part(arguments):
        return arguments["input"].clamp(max=0)

    @entry(F.prelu)
    def prelu(call, input, weight):
        if (slope := call.region(weight)) is None:
            return None
        channels = (1,) if slope.numel > 1 else ()
        return Use(Elementwise(call.axes(features=channels), slope.reshape(slope.numel), None), negative_part)

A parameter that an entry does not account for becomes an error that names it, never a silent miss.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvlib.layers.base import Arguments, Axes, Layer
from curvlib.operators.layout import Region

Operand = str | Callable[[Arguments], Tensor] | None


@dataclasses.dataclass(frozen=True)
class Use:
    """What one call does with parameters, and the operand that the layer reads."""

    layer: Layer
    operand: Operand = None

    def read(self, arguments: Arguments) -> Tensor | None:
        """The operand of a call with these arguments."""
        if self.operand is None:
            return None
        value: Tensor = arguments[self.operand] if isinstance(self.operand, str) else self.operand(arguments)
        return value


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A call under inspection.

    Attributes:
        region: finds the parameter's elements that a tensor is a view of; None for any other object.
        output: the call's output (a fake tensor).
        batch: the axis of the output that counts examples.
    """

    region: Callable[[Any], Region | None]
    output: Tensor
    batch: int

    def axes(self, features: tuple[int, ...]) -> Axes:
        """Roles of the output's axes when parameters vary along ``features`` only."""
        positions = tuple(i for i in range(self.output.ndim) if i != self.batch and i not in features)
        return Axes(self.batch, (), positions, features)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kind of call."""

    name: str
    match: Callable[..., Use | None]
    signature: inspect.Signature

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name; those not given are absent."""
        return self.signature.bind(*args, **kwargs).arguments


TABLE: dict[Any, Entry] = {}


def entry(*functions: Any) -> Callable[[Callable[..., Use | None]], Callable[..., Use | None]]:
    """Enters a matching function into the table, for all these spellings of one torch function."""

    def register(match: Callable[..., Use | None]) -> Callable[..., Use | None]:
        parameters = list(inspect.signature(match).parameters.values())[1:]
        for function in functions:
            TABLE[function] = Entry(match.__name__, match, inspect.Signature(parameters))
        return match

    return register


REWRITES: dict[Any, Callable[..., Any]] = {}


def rewrite(function: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters a function that computes the same as a torch function, in calls that the table knows."""

    def register(replacement: Callable[..., Any]) -> Callable[..., Any]:
        REWRITES[function] = replacement
        return replacement

    return register
