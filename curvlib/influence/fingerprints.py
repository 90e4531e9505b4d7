"""Fingerprints: sha256 of what tensors hold, whatever their order in memory and their device."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from curvlib.checksums import content
from curvlib.losses import Loss
from curvlib.operators import Projection
from curvlib.pytree import Tree, flatten, names


def fingerprint(labels: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """The sha256 of labels, dtypes, shapes and values.

    Example:
        >>> import torch
        >>> x = torch.arange(6.0).reshape(2, 3)
        >>> fingerprint(["x"], [x]) == fingerprint(["x"], [x.mT.contiguous().mT])
        True
        >>> fingerprint(["x"], [x]) == fingerprint(["x"], [-x])
        False
    """
    total = hashlib.sha256()
    for label, tensor in zip(labels, tensors, strict=True):
        total.update(repr((label, str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(content(tensor))
    return total.hexdigest()


def of_params(params: Tree) -> str:
    """The fingerprint of a pytree of parameters."""
    return fingerprint(names(params), flatten(params)[0])


def of_projection(projection: Projection) -> str:
    """The fingerprint of a projection: its matrices, and what they are applied to."""
    layout = repr((projection.layouts, projection.domain.names, projection.domain.shapes))
    tensors = [tensor for name, _ in projection.layouts for tensor in projection.sides[name]]
    return fingerprint([layout, *("" for _ in tensors[1:])], tensors)


def of_loss(loss: Loss) -> str:
    """What a loss is called, with its options. Functions go by their names."""
    assert dataclasses.is_dataclass(loss)
    options = (f"{field.name}={named(getattr(loss, field.name))}" for field in dataclasses.fields(loss))
    return f"{type(loss).__name__}({', '.join(options)})"


def named(value: Any) -> str:
    """A text for an option of a loss that is the same in every process."""
    if isinstance(value, Tensor):
        return fingerprint([""], [value])
    if callable(value):
        return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)
