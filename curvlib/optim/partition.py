"""Different transformations for different parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from curvlib.errors import ArgumentError, PytreeError
from curvlib.optim.transformation import GradientTransformation, State, own_state
from curvlib.pytree import Tree, flatten, names, register, static, unflatten

Rule = Callable[[str, Tensor], Any]


@register
class PartitionState:
    """The states of the parts, by label; which leaf belongs to which was settled by init.

    Args:
        states: of each label that a leaf has.
        names: of the leaves (static).
        labels: of the leaves (static).
    """

    states: dict[str, State]
    names: tuple[str, ...] = static()
    labels: tuple[str, ...] = static()


def partition(transformations: Mapping[str, GradientTransformation], labels: Rule | Tree) -> GradientTransformation:
    """Each leaf is treated by the transformation of its label.

    A transformation sees a dictionary of its own leaves, by their names; one whose label no leaf has is not called.
    Whatever looks at several leaves, such as a global norm, looks at those of its part.

    Args:
        transformations: by label.
        labels: a function (name, leaf) -> label, which is called by init only, or a pytree of labels like params.

    Raises:
        ArgumentError: init finds a label without a transformation; the message names the parameter.
        PytreeError: init finds labels that are not a pytree like params.

    Example:
        >>> import torch, curvlib.optim as optim
        >>> params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
        >>> transformation = partition({"matrix": optim.scale(2.0), "rest": optim.identity()}, matrices_or_rest)
        >>> transformation.update(params, transformation.init(params))[0]["w"][0], transformation.init(params).labels
        (tensor([2., 2.]), ('rest', 'matrix'))
    """
    table = dict(transformations)

    def init(params: Tree) -> PartitionState:
        found = names(params)
        chosen = for_each_leaf(params, labels, "labels")
        for name, label in zip(found, chosen, strict=True):
            if label not in table:
                raise ArgumentError(
                    f"parameter {name!r} has the label {label!r}, and there is no transformation for it; the labels "
                    f"are {', '.join(map(repr, table))}"
                )
        parts = separated(found, chosen, params)
        return PartitionState({label: table[label].init(part) for label, part in parts.items()}, found, chosen)

    def update(
        grads: Tree, state: PartitionState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, PartitionState]:
        state = own_state(state, PartitionState, "partition")
        own_params = separated(state.names, state.labels, params) if params is not None else {}
        updates: dict[str, Tensor] = {}
        states: dict[str, State] = {}
        for label, part in separated(state.names, state.labels, grads).items():
            part, states[label] = table[label].update(part, state.states[label], own_params.get(label), **extra)
            updates |= part
        together = unflatten(flatten(grads)[1], [updates[name] for name in state.names])
        return together, PartitionState(states, state.names, state.labels)

    return GradientTransformation(init, update)


def matrices_or_rest(name: str, leaf: Tensor) -> str:
    """The label "matrix" for leaves of order two or more, "rest" for vectors and scalars.

    An embedding table is a matrix by its shape; who wants another optimizer for it says so by name.

    Example:
        >>> import torch
        >>> def labels(name, leaf):
        ...     return "rest" if "embedding" in name else matrices_or_rest(name, leaf)
        >>> labels("embedding.weight", torch.zeros(9, 4)), labels("head.weight", torch.zeros(9, 4))
        ('rest', 'matrix')
    """
    return "matrix" if leaf.ndim >= 2 else "rest"


def for_each_leaf(params: Tree, values: Rule | Tree, argument: str) -> tuple[Any, ...]:
    """One value a leaf: of a function (name, leaf) -> value, or of a pytree like params.

    Raises:
        PytreeError: the pytree has another structure; ``argument`` is what the message calls it.

    Example:
        >>> import torch
        >>> for_each_leaf({"w": torch.zeros(2, 2), "b": torch.zeros(2)}, lambda name, leaf: (name, leaf.ndim), "mask")
        (('b', 1), ('w', 2))
    """
    leaves, structure = flatten(params)
    if callable(values):
        return tuple(values(name, leaf) for name, leaf in zip(names(params), leaves, strict=True))
    given, other = flatten(values)
    if other != structure:
        raise PytreeError(
            f"{argument} must be a function (name, leaf) or a pytree with the structure of params, {structure}; "
            f"it has {other}"
        )
    return tuple(given)


def separated(expected: tuple[str, ...], labels: tuple[str, ...], tree: Tree) -> dict[str, dict[str, Tensor]]:
    """The leaves of a pytree, by label and name.

    Raises:
        PytreeError: its leaves do not have the expected names; the message names the first that differ.

    Example:
        >>> separated(("b", "w"), ("rest", "matrix"), {"w": 1, "b": 2})
        {'rest': {'b': 2}, 'matrix': {'w': 1}}
    """
    found = names(tree)
    if found != expected:
        missing = [f"{name!r} is missing" for name in expected if name not in found]
        extra = [f"{name!r} is unexpected" for name in found if name not in expected]
        raise PytreeError(
            "the gradients or parameters do not have the structure of the ones that init saw: "
            + ", ".join(missing[:3] + extra[:3])
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, label, leaf in zip(expected, labels, flatten(tree)[0], strict=True):
        parts.setdefault(label, {})[name] = leaf
    return parts
