"""Options of parameter groups as plain data: what `torch.load` reads without knowing this library."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from curvlib.optim.dykaf_factors import DyKAFFactors
from curvlib.optim.factors import KLFactors, ShampooFactors
from curvlib.optim.refresh import Adaptive, Every, Warmup

VALUES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Adaptive, Every, Warmup, DyKAFFactors, KLFactors, ShampooFactors)
}

# for a whole optimizer that is pickled, and for wrappers that keep groups of their own, as ZeroRedundancyOptimizer does
torch.serialization.add_safe_globals(list(VALUES.values()))


def plain(value: Any) -> Any:
    """An option as numbers, strings, tuples and dictionaries: one of curvlib's values becomes (name, arguments).

    Example:
        >>> plain(Warmup(5, then=Every(10)))
        ('Warmup', {'steps': 5, 'then': ('Every', {'steps': 10})})
    """
    if type(value) in VALUES.values():
        arguments = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value).__name__, arguments
    return value


def revived(value: Any) -> Any:
    """The inverse of `plain`.

    Example:
        >>> revived(("Warmup", {"steps": 5, "then": ("Every", {"steps": 10})}))
        Warmup(steps=5, then=Every(steps=10))
    """
    match value:
        case (str(name), dict(arguments)) if name in VALUES:
            return VALUES[name](**{argument: revived(given) for argument, given in arguments.items()})
    return value


def comparable(value: Any) -> Any:
    """An option by whose value transformations are told apart: lists as tuples, 0-d tensors as numbers.

    Example:
        >>> comparable([0.9, torch.tensor(0.5)])
        (0.9, 0.5)
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.item()
    value = revived(value)
    return tuple(map(comparable, value)) if isinstance(value, (tuple, list)) else value
