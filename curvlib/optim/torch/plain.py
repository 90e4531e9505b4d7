"""Options of parameter groups as plain data: what `torch.load` reads without knowing this library."""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import FormatError
from curvlib.factors.dykaf import DyKAFFactors
from curvlib.factors.kl_shampoo import KLFactors
from curvlib.factors.shampoo import ShampooFactors
from curvlib.optim.refresh import Adaptive, Every, Warmup

VALUES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Adaptive, Every, Warmup, DyKAFFactors, KLFactors, ShampooFactors)
}

# for a whole optimizer that is pickled, and for wrappers that keep groups of their own, as ZeroRedundancyOptimizer does
torch.serialization.add_safe_globals(list(VALUES.values()))


def plain(value: Any) -> Any:
    """An option as plain data: one of curvlib's values becomes its representation, which `revived` reads.

    A string is what comes through every file and through every tool that takes nested containers apart.

    Example:
        >>> plain(Warmup(5, then=Every(10)))
        'Warmup(steps=5, then=Every(steps=10))'
    """
    return repr(value) if type(value) in VALUES.values() else value


def revived(value: Any) -> Any:
    """The inverse of `plain`. Nothing is evaluated: names of curvlib's values and literals are all that is read.

    Raises:
        FormatError: the arguments are no literals, or not those of the value.

    Example:
        >>> revived("Warmup(steps=5, then=Every(10))"), revived("hadamard")
        (Warmup(steps=5, then=Every(steps=10)), 'hadamard')
    """
    if not isinstance(value, str) or value.partition("(")[0] not in VALUES:
        return value
    try:
        return built(ast.parse(value, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"the option {value!r} cannot be read: {error}") from error


def built(node: Any) -> Any:
    """The value that a syntax tree of calls and literals stands for."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    named = {str(keyword.arg): built(keyword.value) for keyword in node.keywords}
    return VALUES[node.func.id](*map(built, node.args), **named)  # type: ignore[attr-defined]


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
