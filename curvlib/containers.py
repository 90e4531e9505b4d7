"""Batches as pytrees: torch's containers, and mappings that torch does not know.

A tokenizer's `BatchEncoding`, a `UserDict`, a subclass of dict: a mapping that is no node of torch's pytrees is taken
apart by its items, and made again with other items, so that a model gets what it was given. Nothing is registered.
What hides tensors in any other way (a dataclass, an array) would be taken for one leaf, and is refused.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import FunctionType
from typing import Any, cast

import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from curvlib.errors import PytreeError
from curvlib.pytree import register, static

Structure = torch_pytree.TreeSpec

PLAIN = (Tensor, int, float, complex, str, bytes, type(None), type, FunctionType, nn.Module)  # leaves in any case
MOST_NESTED = 6  # how deep tensors are looked for in objects


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """Leaves, mappings opened, and the structure that puts them back.

    Raises:
        PytreeError: an object that is not understood holds tensors; names its type.

    Example:
        >>> from collections import UserDict
        >>> leaves, structure = flatten((UserDict(a=1, b=[2, 3]), 4))
        >>> leaves, unflatten([5, 6, 7, 8], structure)
        ([1, 2, 3, 4], ({'a': 5, 'b': [6, 7]}, 8))
    """
    return torch_pytree.tree_flatten(opened(tree))


def leaves_in(tree: Any) -> list[Any]:
    """The leaves of `flatten`."""
    return torch_pytree.tree_leaves(opened(tree))


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors among the leaves."""
    return [leaf for leaf in leaves_in(tree) if isinstance(leaf, Tensor)]


def leaves_with_path(tree: Any) -> list[tuple[str, Any]]:
    """The leaves, each with the text of the indexing that leads to it."""
    return [(torch_pytree.keystr(path), leaf) for path, leaf in torch_pytree.tree_leaves_with_path(opened(tree))]


def unflatten(leaves: Sequence[Any], structure: Structure) -> Any:
    """The inverse of `flatten`: mappings are of their own types again."""
    return closed(torch_pytree.tree_unflatten(leaves, structure))


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """The tree with ``fn`` applied to every tensor."""
    leaves, structure = flatten(tree)
    return unflatten([fn(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


# --- mappings ---------------------------------------------------------------------------------------------------


class Shell:
    """A mapping without its values. Two are equal if they make mappings of one type."""

    def __init__(self, mapping: Mapping[Any, Any]) -> None:
        self.type = type(mapping)
        self.empty: Any = None  # what is copied and filled; None: the type is called with a dict
        for copied in (True, False):
            try:  # a type may refuse in any way
                self.empty = with_items(mapping, dict.fromkeys(mapping)) if copied else None
                if self.faithful(mapping):
                    return
            except Exception:
                continue
        raise PytreeError(
            f"a {self.type.__name__} is a mapping that cannot be made again with other values, which finding out about "
            "a model takes: give dict(batch) in its place"
        )

    def fill(self, items: dict[Any, Any]) -> Any:
        """The mapping with these items."""
        return cast(Any, self.type)(items) if self.empty is None else with_items(self.empty, items)

    def faithful(self, mapping: Mapping[Any, Any]) -> bool:
        """Whether filling it leaves nothing behind of the mapping's own values, be it as items or as attributes."""
        marks = {key: object() for key in mapping}
        made = self.fill(marks)
        attributes = [key for key in mapping if attribute(mapping, key) is mapping[key]]
        return (
            type(made) is self.type
            and list(made) == list(marks)
            and all(made[key] is mark for key, mark in marks.items())
            and all(attribute(made, key) is marks[key] for key in attributes)
            and getattr(made, "__dict__", {}).keys() >= getattr(mapping, "__dict__", {}).keys()
            and not any(True for _ in tensors_of(getattr(made, "__dict__", {})))
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shell) and self.type is other.type

    def __hash__(self) -> int:
        return hash(self.type)

    def __repr__(self) -> str:
        return f"{self.type.__module__}.{self.type.__qualname__}"


@register
class Opened:
    """A mapping in two parts, so that torch's pytrees see its values."""

    items: dict[Any, Any]
    shell: Shell = static()


def opened(tree: Any) -> Any:
    """The tree with every mapping that torch does not know in two parts."""
    if isinstance(tree, Tensor):
        return tree
    return torch_pytree.tree_map(opened_leaf, tree)


def opened_leaf(leaf: Any) -> Any:
    """A leaf of torch's pytrees, or what is inside a mapping."""
    if isinstance(leaf, PLAIN):
        return leaf
    if isinstance(leaf, Mapping):
        return Opened({key: opened(value) for key, value in leaf.items()}, Shell(leaf))
    if hasattr(leaf, "__array__") and getattr(leaf, "ndim", None):
        raise PytreeError(
            f"the batch holds an array, a {type(leaf).__name__}: its tensors are followed only, give "
            "torch.as_tensor(array) in its place"
        )
    if any(True for _ in tensors_of(leaf)):
        raise PytreeError(
            f"the batch holds a {type(leaf).__name__}, whose tensors would not be seen: give {remedy(leaf)} in its "
            "place, and let model_fn take that"
        )
    return leaf


def closed(tree: Any) -> Any:
    """The inverse of `opened`."""
    if isinstance(tree, Tensor):
        return tree

    def whole(node: Any) -> Any:
        return node.shell.fill({key: closed(value) for key, value in node.items.items()}) if is_opened(node) else node

    return torch_pytree.tree_map(whole, tree, is_leaf=is_opened)


def is_opened(node: Any) -> bool:
    """Whether a node is a mapping in two parts."""
    return isinstance(node, Opened)


def with_items(mapping: Any, items: dict[Any, Any]) -> Any:
    """A copy of a dict, or of a mapping that keeps its items in a dict, with other values at the same keys."""
    if isinstance(mapping, dict):
        made: Any = copy.copy(mapping)
        for key, value in items.items():
            made[key] = value
        return made
    name = storage_of(mapping)
    if name is None:
        raise PytreeError(f"a {type(mapping).__name__} does not keep its items in a dict")
    made = object.__new__(type(mapping))
    made.__dict__.update(vars(mapping))
    made.__dict__[name] = type(vars(mapping)[name])(items)
    return made


def storage_of(mapping: Any) -> str | None:
    """The name of the attribute in which a mapping keeps its items, if there is one."""
    for name, value in getattr(mapping, "__dict__", {}).items():
        same_keys = type(value) in (dict, OrderedDict) and list(value) == list(mapping)
        if same_keys and all(value[key] is mapping[key] for key in value):
            return str(name)
    return None


def attribute(mapping: Any, key: Any) -> Any:
    """What a mapping has as its attribute of the name of a key."""
    return getattr(mapping, key, None) if isinstance(key, str) else None


# --- what is no mapping -------------------------------------------------------------------------------------------


def tensors_of(value: Any, nested: int = 0) -> Iterator[Tensor]:
    """Tensors in an object, its attributes and its elements."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PLAIN) or nested > MOST_NESTED:
        return
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part, nested + 1)
    elif isinstance(value, (Set, list, tuple)):
        for part in value:
            yield from tensors_of(part, nested + 1)
    else:
        slots = [getattr(value, name, None) for name in copyreg._slotnames(type(value))]  # type: ignore[attr-defined]
        yield from tensors_of([*slots, *getattr(value, "__dict__", {}).values()], nested + 1)


def remedy(value: Any) -> str:
    """What to give in place of a container that is not understood."""
    if dataclasses.is_dataclass(value):
        return "dataclasses.asdict(batch)"
    if isinstance(value, (tuple, list, Set)):
        return "list(batch) or tuple(batch)"
    return "a dict of its tensors (dict(batch) or vars(batch))"

