"""Saved states, before torch takes them over: found by name, checked, and kept in their dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlib.errors import FormatError
from curvlib.optim.torch.plain import revived

if TYPE_CHECKING:
    from curvlib.optim.torch.adapter import Adapter

StateDict = dict[str, Any]
PREFIXES = ("_orig_mod", "module")  # of torch.compile, of DataParallel and DistributedDataParallel


@dataclass(frozen=True)
class Kept:
    """A tensor that torch is to leave as it is: it casts those of a state to the dtype of their parameter."""

    tensor: Tensor


def bare(name: str) -> str:
    """A parameter's name without what wrappers of modules put into it.

    Example:
        >>> bare("module._orig_mod.layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in PREFIXES)


def settled(optimizer: Any, state_dict: StateDict) -> StateDict:
    """A saved state as torch may load it into an optimizer.

    Raises:
        FormatError: it does not belong to such an optimizer.
    """
    own, groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in groups]:
        return state_dict  # torch words the error
    orders = by_name(own, groups)
    groups = [
        {**{name: revived(value) for name, value in group.items()}, "params": order}
        for group, order in zip(groups, orders, strict=True)
    ]
    state = dict(state_dict["state"])
    for number, (mine, group) in enumerate(zip(own, groups, strict=True)):
        if "param_names" in mine:
            group["param_names"] = mine["param_names"]
        options = {**optimizer.defaults, **group}
        for name, p, key in zip(optimizer.names(number), mine["params"], group["params"], strict=True):
            if state.get(key):
                state[key] = checked(optimizer, options, name, p, state[key])
    return {**state_dict, "state": state, "param_groups": groups}


def by_name(own: Sequence[StateDict], saved: Sequence[StateDict]) -> list[list[Any]]:
    """The keys of saved parameters, in the order of an optimizer's groups.

    Raises:
        FormatError: some of the names are the same and some are not: these are other parameters.
    """
    orders = [list(group["params"]) for group in saved]
    mine = [bare(name) for group in own for name in group.get("param_names", ())]
    theirs = [bare(name) for group in saved for name in group.get("param_names", ())]
    count = sum(map(len, orders))
    if not len(set(mine)) == len(set(theirs)) == count or set(mine).isdisjoint(theirs):
        return orders
    missing = [name for name in mine if name not in set(theirs)]
    if missing:
        raise FormatError(f"the saved state holds no parameter {missing[0]!r}, although it holds others of this model")
    keys = dict(zip(theirs, (key for order in orders for key in order), strict=True))
    return [[keys[bare(name)] for name in group["param_names"]] for group in own]


def checked(optimizer: Adapter, options: StateDict, name: str, parameter: Tensor, entries: Any) -> StateDict:
    """The saved state of a parameter, whose tensors torch leaves as they are.

    Raises:
        FormatError: it is that of another optimizer, of other options, or of another parameter.
    """
    form = optimizer.form(options, name, parameter)
    mismatch = form.mismatch(entries) if isinstance(entries, dict) else f"a {type(entries).__name__} is no dictionary"
    if mismatch:
        raise FormatError(
            f"{mismatch} in the saved state of parameter {name!r}: it is that of another optimizer, of one whose "
            "options give its state other shapes, or of another parameter; make the optimizer as it was when the state "
            "was saved"
        )
    like = form.like
    return {key: kept(value, like[key], parameter) if key in like else value for key, value in entries.items()}


def kept(value: Any, like: Tensor, parameter: Tensor) -> Kept:
    """A saved tensor where it belongs, in the dtype that it has in a fresh state."""
    device = parameter.device if like.is_meta else like.device
    return Kept(torch.as_tensor(value).to(device=device, dtype=like.dtype))


def restored(optimizer: Adapter) -> None:
    """Ends what `settled` began; options that a group does not have, of an older version, get their defaults."""
    for entries in optimizer.state.values():
        if isinstance(entries, dict):
            entries.update({key: value.tensor for key, value in entries.items() if isinstance(value, Kept)})
    for group in optimizer.param_groups:
        for name, value in optimizer.defaults.items():
            group.setdefault(name, value)
