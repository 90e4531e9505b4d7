"""States of gradient transformations, for some of the parameters only, and as plain lists of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from curvlib.errors import FormatError
from curvlib.optim.transformation import GradientTransformation, PerLeaf
from curvlib.pytree import flatten, names, unflatten

State = Any
Params = Mapping[str, Tensor]


def restricted(state: State, params: Params, kept: Sequence[str], fresh: State) -> State:
    """What a state says of some of the parameters.

    Args:
        state: of a transformation of these parameters.
        params: all of them, by name.
        kept: the names of those that the result is for.
        fresh: the state that the transformation's init makes for them.

    Example:
        >>> import torch, curvlib.optim as optim
        >>> params = {"a": torch.ones(2), "b": torch.ones(3)}
        >>> adam = optim.scale_by_adam()
        >>> _, state = adam.update(params, adam.init(params))
        >>> alone = {"b": params["b"]}
        >>> restricted(state, params, ["b"], adam.init(alone)).first.entries
        (tensor([0.1000, 0.1000, 0.1000]),)
    """
    if isinstance(state, PerLeaf):
        entries = dict(zip(names(dict(params)), state.entries, strict=True))
        return PerLeaf(tuple(entries[name] for name in names(dict.fromkeys(kept, 0))))
    if isinstance(state, tuple):
        return tuple(restricted(x, params, kept, y) for x, y in zip(state, fresh, strict=True))
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        fields = [f.name for f in dataclasses.fields(state) if not f.metadata.get("static")]
        parts = {f: restricted(getattr(state, f), params, kept, getattr(fresh, f)) for f in fields}
        return dataclasses.replace(state, **parts)
    return state


def tensors_of(state: State) -> list[Tensor]:
    """The tensors of a state, in the order of its pytree."""
    return list(flatten(state)[0])


def state_of(tensors: Sequence[Tensor], transformation: GradientTransformation, params: Params) -> State:
    """The state with these tensors.

    Raises:
        FormatError: they are not those of this transformation of these parameters.
    """
    fresh = transformation.init(dict(params))
    expected, structure = flatten(fresh)
    if [x.shape for x in expected] != [x.shape for x in tensors]:
        raise FormatError(
            "the saved state is that of another optimizer, of one whose options give its state other shapes, or of "
            "other parameters; make the optimizer as it was when the state was saved"
        )
    copies = [
        x.detach().to(device=like.device, dtype=like.dtype, copy=True)
        for x, like in zip(tensors, expected, strict=True)
    ]
    return unflatten(structure, copies)
