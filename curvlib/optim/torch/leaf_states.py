"""The state of a gradient transformation as one flat dictionary of tensors a parameter, and back.

A state is taken apart by its `PerLeaf` values alone: a parameter has the tensors of its entries, under the paths of
their fields, and its own copy of what the state shares among all leaves, such as the number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import optree
import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.optim.transformation import GradientTransformation, PerLeaf, State
from curvlib.pytree import NAMESPACE, registered

Entries = dict[str, Tensor]


@dataclass(frozen=True)
class Field:
    """One field of a state, of one parameter.

    Args:
        names: of its tensors.
        like: tensors of their shapes and dtypes; on the meta device if they lie on that of the parameter.
        entry: the structure of the parameter's entry; None: the field is shared by all parameters.
    """

    names: tuple[str, ...]
    like: tuple[Tensor, ...]
    entry: optree.PyTreeSpec | None


@dataclass(frozen=True)
class Form:
    """What the state of one parameter consists of.

    Args:
        structure: of the transformation's state, whose leaves are the fields.
        fields: in order.

    Example:
        >>> import curvlib.optim as optim
        >>> state = optim.scale_by_adam().init({"w": torch.zeros(2, 3, device="meta")})
        >>> {name: tuple(like.shape) for name, like in Form.of(state).like.items()}
        {'step': (), 'first': (2, 3), 'second': (2, 3)}
    """

    structure: optree.PyTreeSpec
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, state: State) -> Form:
        """The form of the state of a transformation of one parameter.

        Raises:
            ArgumentError: a field is neither a `PerLeaf` of one entry nor a number that all parameters share.
        """
        paths, values, structure = optree.tree_flatten_with_path(state, is_leaf=is_per_leaf, namespace=NAMESPACE)
        counts = [path for path, value in zip(paths, values, strict=True) if path[-1:] == ("count",)]
        fields = []
        for path, value in zip(paths, values, strict=True):
            name = "step" if counts[:1] == [path] else ".".join(map(str, path))
            if is_per_leaf(value) and len(value.entries) == 1:
                inner, tensors, entry = optree.tree_flatten_with_path(value.entries[0], namespace=NAMESPACE)
                names = tuple(".".join(map(str, path + rest)) for rest in inner)
                fields.append(Field(names, tuple(tensors), entry))
            elif isinstance(value, Tensor) and value.ndim == 0:
                fields.append(Field((name,), (value,), None))
            else:
                raise ArgumentError(
                    f"the field {name!r} of a transformation's state is neither a PerLeaf with one entry a parameter "
                    "nor a 0-d tensor, so it cannot be kept in the state of each parameter"
                )
        return cls(structure, tuple(fields))

    @cached_property
    def like(self) -> Entries:
        """Tensors of the shapes and dtypes of a parameter's entries, by name."""
        return {name: x for field in self.fields for name, x in zip(field.names, field.like, strict=True)}

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The names of what all parameters share."""
        return tuple(field.names[0] for field in self.fields if field.entry is None)


    def mismatch(self, entries: Mapping[str, Any]) -> str | None:
        """What keeps entries from being such a state, in words; keys that no transformation's state has are others'."""
        for name, like in self.like.items():
            if name not in entries:
                return f"{name!r} is missing"
            shape = torch.as_tensor(entries[name]).shape
            if shape != like.shape:
                return f"{name!r} has shape {tuple(shape)}, not {tuple(like.shape)}"
        if len(entries) > len(self.like):
            states = [kind for kind in registered.values() if kind.__name__.endswith("State")]
            fields = {field.name for kind in states for field in dataclasses.fields(kind)}
            stray = [name for name in entries if name not in self.like and name.partition(".")[0] in fields]
            return f"{stray[0]!r} is unexpected" if stray else None
        return None


def is_per_leaf(value: object) -> bool:
    """Whether a value is a `PerLeaf`."""
    return isinstance(value, PerLeaf)


def joined(forms: Sequence[Form], entries: Sequence[Mapping[str, Tensor]]) -> State:
    """The state of a transformation of several parameters, all of which have the same shared numbers.

    Args:
        forms: of the parameters.
        entries: of the parameters: their tensors by name.

    Example:
        >>> import curvlib.optim as optim
        >>> params = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
        >>> adam = optim.scale_by_adam()
        >>> forms = [Form.of(adam.init(params[name])) for name in ("b", "w")]
        >>> both = joined(forms, separated(forms, adam.init(params)))
        >>> [tuple(x.shape) for x in both.first.entries]
        [(2,), (2, 3)]
    """
    values: list[Any] = []
    for number, first in enumerate(forms[0].fields):
        if first.entry is None:
            values.append(entries[0][first.names[0]])
            continue
        fields = [form.fields[number] for form in forms]
        values.append(PerLeaf(tuple(built(one, tensors) for one, tensors in zip(fields, entries, strict=True))))
    return optree.tree_unflatten(forms[0].structure, values)


def built(field: Field, entries: Mapping[str, Tensor]) -> Any:
    """The entry of a `PerLeaf` that is made of these tensors."""
    assert field.entry is not None
    if field.entry.is_leaf():
        return entries[field.names[0]]
    return optree.tree_unflatten(field.entry, [entries[name] for name in field.names])


def separated(forms: Sequence[Form], state: State) -> list[Entries]:
    """The tensors of each parameter: the inverse of `joined`. What is shared is copied for each."""
    result: list[Entries] = [{} for _ in forms]
    values: list[Any] = forms[0].structure.flatten_up_to(state)
    for number, value in enumerate(values):
        for place, (form, entries) in enumerate(zip(forms, result, strict=True)):
            field = form.fields[number]
            if field.entry is None:
                entries[field.names[0]] = value.clone() if place else value
            elif field.entry.is_leaf():
                entries[field.names[0]] = value.entries[place]
            else:
                tensors: list[Any] = field.entry.flatten_up_to(value.entries[place])
                entries.update(zip(field.names, tensors, strict=True))
    return result


@dataclass(frozen=True, eq=False)
class StateForms:
    """A transformation, and the forms of the states that it has been asked for.

    Args:
        transformation: of gradients.
        forms: by shape and dtype of the parameter.
    """

    transformation: GradientTransformation
    forms: dict[tuple[torch.Size, torch.dtype], Form] = dataclasses.field(default_factory=dict)

    def form(self, name: str, parameter: Tensor) -> Form:
        """What the state of a parameter consists of; found from its shape and dtype, without memory for it."""
        key = (parameter.shape, parameter.dtype)
        if key not in self.forms:
            hollow = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            self.forms[key] = Form.of(self.transformation.init({name: hollow}))
        return self.forms[key]


@lru_cache(maxsize=256)
def rule(
    make: Callable[[str, dict[str, Any]], GradientTransformation], label: str, options: tuple[tuple[str, Any], ...]
) -> StateForms:
    """The rule of a label with these options; it is made once for equal ones.

    Example:
        >>> import curvlib.optim as optim
        >>> def adam(label, options):
        ...     return optim.scale_by_adam(**options)
        >>> rule(adam, "", (("eps", 1e-6),)) is rule(adam, "", (("eps", 1e-6),))
        True
    """
    return StateForms(make(label, dict(options)))
