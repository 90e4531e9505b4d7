"""Pytrees: one flatten order for the whole library, names of leaves, arithmetic, registration.

The order is optree's: dictionary keys sorted, sequences in order, `None` dropped. Containers that are
registered with optree globally or in the namespace ``"curvlib"`` are understood.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from curvlib.errors import DtypeError, PytreeError, ShapeError

NAMESPACE = "curvlib"

Tree = Any
T = TypeVar("T")


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Leaves in optree's order and the structure that puts them back."""
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(structure: optree.PyTreeSpec, leaves: Sequence[Any]) -> Tree:
    """The inverse of `flatten`."""
    return optree.tree_unflatten(structure, leaves)


def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies ``fn`` leaf by leaf."""
    return optree.tree_map(fn, tree, *rest, namespace=NAMESPACE)


def names(tree: Tree) -> tuple[str, ...]:
    """One distinct, readable name a leaf: the keys on its path, joined by dots.

    Example:
        >>> names({"layer": [torch.zeros(1), {"w": torch.zeros(2)}]})
        ('layer.0', 'layer.1.w')
    """
    dotted = tuple(".".join(map(str, path)) or "params" for path in optree.tree_paths(tree, namespace=NAMESPACE))
    if len(set(dotted)) == len(dotted):
        return dotted
    return tuple(a.codify("params") for a in optree.tree_accessors(tree, namespace=NAMESPACE))


def ravel(tree: Tree) -> Tensor:
    """All leaves, each row-major, concatenated into one vector in flatten order.

    Args:
        tree: pytree of tensors with P elements in all.

    Returns:
        Tensor [P].

    Raises:
        PytreeError: the tree has no leaf.

    Example:
        >>> ravel({"b": torch.tensor([2.0]), "a": torch.tensor([[0.0, 1.0]])})
        tensor([0., 1., 2.])
    """
    leaves, _ = flatten(tree)
    if not leaves:
        raise PytreeError("ravel needs a pytree with at least one tensor; this one has none")
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def unravel(vector: Tensor, like: Tree) -> Tree:
    """The inverse of `ravel`: cuts a vector into a pytree shaped like ``like``.

    Args:
        vector: tensor [P].
        like: pytree of tensors with P elements in all; only its structure and shapes matter.

    Returns:
        A pytree with the structure and shapes of ``like`` and the dtype of ``vector``.

    Raises:
        ShapeError: ``vector`` is not one-dimensional or does not have P elements.

    Example:
        >>> unravel(torch.arange(3.0), {"b": torch.zeros(1), "a": torch.zeros(1, 2)})
        {'b': tensor([2.]), 'a': tensor([[0., 1.]])}
    """
    leaves, structure = flatten(like)
    sizes = [leaf.numel() for leaf in leaves]
    if vector.ndim != 1 or vector.shape[0] != sum(sizes):
        raise ShapeError(f"unravel expected a vector of shape ({sum(sizes)},), got {tuple(vector.shape)}")
    parts = torch.split(vector, sizes)
    return unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def add(a: Tree, b: Tree) -> Tree:
    """A + b, leaf by leaf."""
    return tree_map(torch.add, a, b)


def subtract(a: Tree, b: Tree) -> Tree:
    """A - b, leaf by leaf."""
    return tree_map(torch.sub, a, b)


def scale(factor: float | Tensor, tree: Tree) -> Tree:
    """Factor * tree, leaf by leaf."""
    return tree_map(lambda leaf: factor * leaf, tree)


def inner(a: Tree, b: Tree) -> Tensor:
    """The inner product <a, b>: the sum over all leaves of the sum of products (a scalar tensor)."""
    products = tree_map(lambda x, y: (x * y).sum(), a, b)
    return torch.stack(flatten(products)[0]).sum()


# --- the domain of an operator: which pytrees are its vectors -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Domain:
    """Structure, leaf names and leaf shapes of a pytree of parameters. Static and hashable."""

    structure: optree.PyTreeSpec
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, params: Tree) -> Domain:
        """The domain that ``params`` belongs to.

        Raises:
            PytreeError: no leaf, or a leaf that is not a tensor.
            DtypeError: a leaf is not of a floating dtype.
        """
        leaves, structure = flatten(params)
        leaf_names = names(params)
        if not leaves:
            raise PytreeError("params has no leaf: give a pytree with at least one tensor")
        for name, leaf in zip(leaf_names, leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise PytreeError(
                    f"parameter {name!r} is a {type(leaf).__name__}, not a tensor; containers of your own must be "
                    f"registered with optree, globally or with namespace={NAMESPACE!r}"
                )
            if not leaf.dtype.is_floating_point:
                raise DtypeError(
                    f"parameter {name!r} has dtype {leaf.dtype}; curvature needs floating-point parameters: "
                    "close over the others in model_fn"
                )
        return cls(structure, leaf_names, tuple(tuple(map(int, leaf.shape)) for leaf in leaves))

    @classmethod
    def of_tensor(cls, shape: tuple[int, ...]) -> Domain:
        """The domain of one tensor of this shape."""
        return cls(flatten(0)[1], ("params",), (shape,))

    @property
    def size(self) -> int:
        """The number of elements of all leaves: of the rows of an operator on these pytrees."""
        return sum(math.prod(shape) for shape in self.shapes)

    def leaves(self, tree: Tree, leading: int = 0) -> list[Tensor]:
        """The leaves of a vector of this domain, checked; ``leading`` extra axes stand in front of each.

        Raises:
            PytreeError: another structure; the message names the first path that differs.
            ShapeError: a leaf of another shape; the message names it.
        """
        leaves, structure = flatten(tree)
        if structure != self.structure:
            given, expected = set(names(tree)), set(self.names)
            missing, extra = sorted(expected - given), sorted(given - expected)
            what = ", ".join(
                [f"{name!r} is missing" for name in missing[:3]] + [f"{name!r} is unexpected" for name in extra[:3]]
            )
            raise PytreeError(
                f"the vector, a {type(tree).__name__}, does not have the structure of params: "
                f"{what or f'{structure} is not {self.structure}'}"
            )
        for name, leaf, shape in zip(self.names, leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor):
                raise PytreeError(f"leaf {name!r} is a {type(leaf).__name__}, not a tensor")
            if leaf.shape[:leading] != leaves[0].shape[:leading]:
                raise ShapeError(
                    f"leaf {name!r} stacks {tuple(leaf.shape[:leading])} vectors where leaf {self.names[0]!r} stacks "
                    f"{tuple(leaves[0].shape[:leading])}"
                )
            if tuple(leaf.shape[leading:]) != shape or leaf.ndim < leading:
                front = "[k] + " if leading else ""
                raise ShapeError(f"leaf {name!r} should have shape {front}{shape}, got {tuple(leaf.shape)}")
        return leaves

    def tree(self, leaves: Sequence[Any]) -> Tree:
        """The pytree made of these leaves."""
        return unflatten(self.structure, leaves)

    def rows(self, tree: Tree, leading: int = 1) -> Tensor:
        """Vectors that are stacked along ``leading`` axes as rows [k, D], each in the order of `ravel`."""
        leaves = self.leaves(tree, leading)
        number = math.prod(leaves[0].shape[:leading])
        return torch.cat([leaf.reshape(number, math.prod(s)) for leaf, s in zip(leaves, self.shapes, strict=True)], 1)

    def stacked(self, rows: Tensor, front: Sequence[int] | None = None) -> Tree:
        """The inverse of `rows`: vectors stacked along axes ``front``, by default one of k."""
        front = (len(rows),) if front is None else front
        parts = rows.split([math.prod(shape) for shape in self.shapes], 1)
        return self.tree([part.reshape(*front, *s) for part, s in zip(parts, self.shapes, strict=True)])


# --- frozen dataclasses as pytree nodes -------------------------------------------------------------------------


def static(**kwargs: Any) -> Any:
    """A dataclass field that is metadata: kept in the structure, not traced. Its value must be hashable."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


registered: dict[str, type[Any]] = {}  # every class made by `register`, by the name that files know it by


def stored_name(cls: type[Any]) -> str:
    """The name of a registered class in files: curvlib's own keep theirs when they move to another module of a room.

    Example:
        >>> import curvlib as cv
        >>> stored_name(cv.Dense)
        'operators.Dense'
    """
    library, _, path = cls.__module__.partition(".")
    if library == __name__.partition(".")[0]:
        return f"{path.partition('.')[0]}.{cls.__qualname__}"
    return f"{cls.__module__}:{cls.__qualname__}"


@dataclass_transform(eq_default=False, frozen_default=True, field_specifiers=(static,))
def register(cls: type[T]) -> type[T]:
    """Makes ``cls`` a frozen dataclass that is a node of optree's and of torch's pytrees.

    Fields made with `static` are metadata; the others are children. A child that is ``None`` becomes part of
    the structure, so that both libraries agree on the leaves. Rebuilding a node copies its fields without
    calling ``__init__``: fake tensors and sentinels pass through.

    Example:
        >>> @register
        ... class Pair:
        ...     left: Tensor
        ...     label: str = static()
        >>> flatten(Pair(torch.ones(1), "x"))[0]
        [tensor([1.])]
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=cls.__repr__ is object.__repr__)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    child_names = tuple(f.name for f in fields if not f.metadata.get("static"))
    static_names = tuple(f.name for f in fields if f.metadata.get("static"))
    for name in (*child_names, *static_names):
        if isinstance(getattr(cls, name, None), property):
            setattr(cls, name, None)  # an abstract property of a base class, which would hide the field
    abc.update_abstractmethods(cls)

    def present(node: Any) -> tuple[str, ...]:
        return tuple(name for name in child_names if getattr(node, name) is not None)

    def split(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        used = present(node)
        return [getattr(node, name) for name in used], (used, tuple(getattr(node, name) for name in static_names))

    def join(context: Any, children: Any) -> Any:
        used, values = context
        node = object.__new__(cls)
        node.__dict__.update(dict.fromkeys(child_names))
        node.__dict__.update(zip(used, children, strict=True))
        node.__dict__.update(zip(static_names, values, strict=True))
        return node

    def optree_split(node: Any) -> tuple[list[Any], Any, tuple[str, ...]]:
        children, context = split(node)
        return children, context, present(node)

    def torch_split_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context = split(node)
        return [(torch_pytree.GetAttrKey(k), c) for k, c in zip(present(node), children, strict=True)], context

    optree.register_pytree_node(
        cls,  # type: ignore[arg-type]
        optree_split,
        join,
        path_entry_type=optree.GetAttrEntry,
        namespace=NAMESPACE,
    )
    torch_pytree.register_pytree_node(
        cls,
        split,
        lambda children, context: join(context, children),
        flatten_with_keys_fn=torch_split_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
    registered[stored_name(cls)] = cls
    return cls
