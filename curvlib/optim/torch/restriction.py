"""States of gradient transformations, for some of the parameters only, and as plain lists of tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import FormatError
from curvlib.optim.shapes import Bucket, Layout
from curvlib.optim.transformation import GradientTransformation, PerLeaf
from curvlib.pytree import flatten, names, tree_map, unflatten

State = Any
Params = Mapping[str, Tensor]


def restricted(state: State, params: Params, kept: Sequence[str], fresh: State) -> State:
    """What a state says of some of the parameters.

    Args:
        state: of a transformation of these parameters.
        params: all of them, by name.
        kept: the names of those that the result is for.
        fresh: the state that the transformation's init makes for them; nothing but its layouts is used.

    Example:
        >>> import curvlib.optim as optim
        >>> params = {"a": torch.ones(2), "b": torch.ones(3)}
        >>> adam = optim.scale_by_adam()
        >>> _, state = adam.update(params, adam.init(params))
        >>> alone = {"b": params["b"]}
        >>> restricted(state, params, ["b"], adam.init(alone)).first.entries
        (tensor([0.1000, 0.1000, 0.1000]),)
    """
    layout = getattr(fresh, "layout", None)
    if isinstance(layout, Layout):
        stacks = tuple(gathered(state, bucket) for bucket in with_names(layout))
        return dataclasses.replace(state, stacks=stacks, layout=layout)
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


def with_names(layout: Layout) -> list[tuple[Bucket, tuple[tuple[str, Any], ...]]]:
    """The buckets of a layout, each with (name of the parameter, starts) of its members."""
    return [
        (bucket, tuple((layout.domain.names[block.leaf], block.starts) for block in bucket.blocks))
        for bucket in layout.buckets
    ]


def gathered(state: State, wanted: tuple[Bucket, tuple[tuple[str, Any], ...]]) -> State:
    """The stack that holds the members of a bucket, taken from the stacks of a state that holds more."""
    bucket, members = wanted
    for number, (old, names) in enumerate(with_names(state.layout)):
        if old.strung != bucket.strung or not set(members) <= set(names):
            continue
        places = [names.index(member) for member in members]
        if old.strung:
            lengths = [math.prod(state.layout.domain.shapes[block.leaf]) for block in old.blocks]
            return tree_map(partial(strung_parts, lengths=lengths, places=places), state.stacks[number])
        return tree_map(partial(rows, count=len(names), places=places), state.stacks[number])
    raise FormatError(f"the state holds no stack for the parameters {', '.join(name for name, _ in members)}")


def rows(stack: Tensor, count: int, places: Sequence[int]) -> Tensor:
    """Some members of a stack [k, ...]; other tensors as they are."""
    return stack[torch.tensor(places, device=stack.device)] if len(stack) == count else stack


def strung_parts(stack: Tensor, lengths: Sequence[int], places: Sequence[int]) -> Tensor:
    """Some of the leaves that are strung together in [1, N]; other tensors as they are."""
    if stack.ndim != 2 or stack.shape[1] != sum(lengths):
        return stack
    parts = stack.split(list(lengths), 1)
    return torch.cat([parts[place] for place in places], 1)


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
