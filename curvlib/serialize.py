"""Objects made of tensors, apart: json that says what they are, and the tensors by name.

The json of a number, a string, None or a list is itself; everything else is an object with one tag, such as
``{"tuple": [...]}``, ``{"registered": "operators.Dense", "fields": {...}}`` or
``{"tensor": "matrix", "shape": [...], "order": [...]}``.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from curvlib.checksums import Json
from curvlib.errors import FormatError
from curvlib.pytree import flatten, registered, stored_name, unflatten

STORABLE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)
LEAF = object()  # stands for a leaf in a structure that is spelled out


def compact(x: Tensor) -> tuple[Tensor, list[int]]:
    """What a tensor has in memory, axes in their order there, and that order; expanded axes have size 1."""
    for axis in range(x.ndim):
        if x.stride()[axis] == 0 and x.shape[axis] > 1:
            x = x.narrow(axis, 0, 1)
    order = list(range(x.ndim)) if x.is_contiguous() else sorted(range(x.ndim), key=lambda axis: -x.stride()[axis])
    return x.permute(order), order


@dataclasses.dataclass(frozen=True)
class Writer:
    """Takes objects apart into json and tensors.

    Args:
        file: its name, for messages.
        tensors: by name, filled on the way.
        names: of the tensors that lie at a place in memory, filled on the way.
    """

    file: str
    tensors: dict[str, Tensor]
    names: dict[Any, str]

    def node(self, value: Any, path: tuple[str, ...]) -> Json:
        """The json of a value; ``path`` leads to it. Types are compared exactly: subclasses would not come back."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if value is LEAF:
            return {"leaf": True}
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is list:
            return self.nodes(value, path)
        if kind in (tuple, torch.Size):
            return {kind.__name__: self.nodes(value, path)}
        if kind in (dict, OrderedDict):
            return {kind.__name__: [[self.key(key, path), self.node(x, (*path, str(key)))] for key, x in value.items()]}
        if kind in (Tensor, torch.nn.Parameter):
            return self.tensor(value.detach(), path)
        if kind is optree.PyTreeSpec:
            return {"structure": self.node(self.spelled_out(value, path), path)}
        if optree.is_namedtuple_class(kind):
            return {"namedtuple": self.name(kind, path), "fields": self.fields(value, kind._fields, path)}
        if dataclasses.is_dataclass(kind):
            fields = self.fields(value, [field.name for field in dataclasses.fields(kind)], path)
            if registered.get(stored_name(kind)) is kind:
                return {"registered": stored_name(kind), "fields": fields}
            return {"dataclass": self.name(kind, path), "fields": fields}
        raise self.refusal(
            path,
            f"is of {kind.__module__}.{kind.__qualname__}, which a file cannot hold; save an operator that is made of "
            "tensors instead, for example Dense(curv.to_dense()) where that is small",
        )

    def nodes(self, values: Sequence[Any], path: tuple[str, ...]) -> list[Json]:
        """The json of every element."""
        return [self.node(value, (*path, str(i))) for i, value in enumerate(values)]

    def fields(self, value: Any, names: Sequence[str], path: tuple[str, ...]) -> dict[str, Json]:
        """The json of every field."""
        return {name: self.node(getattr(value, name), (*path, name)) for name in names}

    def key(self, key: Any, path: tuple[str, ...]) -> str | int:
        """A key of a dictionary."""
        if type(key) not in (str, int):
            raise self.refusal(path, f"has the key {key!r}, a {type(key).__name__}; use str or int")
        return key

    def name(self, cls: type, path: tuple[str, ...]) -> str:
        """Module and qualified name of a class, by which it is found again."""
        name = f"{cls.__module__}:{cls.__qualname__}"
        if find(name) is not cls:
            raise self.refusal(path, f"is of {name}, which cannot be imported; define it at the top of a module")
        return name

    def spelled_out(self, structure: optree.PyTreeSpec, path: tuple[str, ...]) -> Any:
        """A pytree of this structure."""
        tree = unflatten(structure, [LEAF] * structure.num_leaves)
        if flatten(tree)[1] != structure:
            raise self.refusal(path, f"is {structure}, not a structure by curvlib.pytree.flatten; make it that way")
        return tree

    def tensor(self, value: Tensor, path: tuple[str, ...]) -> Json:
        """The name of a tensor in the file, and how to make it from what is stored there."""
        if value.layout is not torch.strided or value.device.type == "meta" or value.dtype not in STORABLE:
            raise self.refusal(
                path,
                f"is a tensor of {value.dtype}, {value.layout} on {value.device}; only dense tensors of real numbers "
                "with values can be stored, so convert it",
            )
        stored, order = compact(value.resolve_neg())
        place = stored.device, stored.data_ptr(), stored.shape, stored.stride(), stored.dtype
        if place not in self.names:
            name = base = ".".join(path) or "tensor"
            while name in self.tensors or name == "__metadata__":
                name = f"{base}#{len(self.tensors)}"
            self.names[place] = name
            self.tensors[name] = stored
        return {"tensor": self.names[place], "shape": list(value.shape), "order": order}

    def refusal(self, path: tuple[str, ...], why: str) -> FormatError:
        """The error for a part that cannot be stored."""
        return FormatError(f"cannot save to {self.file}: {'.'.join(path) or 'the object'} {why}")


# --- reading ------------------------------------------------------------------------------------------------------


def find(name: str) -> Any:
    """What stands under ``module:qualified.name``, or None."""
    module, _, qualified = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        return None
    return found


def is_dataclass(cls: Any) -> bool:
    """Whether this is a dataclass, not an instance of one."""
    return isinstance(cls, type) and dataclasses.is_dataclass(cls)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Puts objects together from json and tensors.

    Args:
        file: its name, for messages.
        tensors: by name.
    """

    file: str
    tensors: dict[str, Tensor]

    def read(self, structure: Json) -> Any:
        """The object that a file holds."""
        try:
            return self.value(structure)
        except FormatError:
            raise
        except (TypeError, ValueError, RuntimeError, RecursionError) as error:
            raise self.refusal(f"its structure is damaged ({error}); save it again") from error

    def value(self, node: Json) -> Any:
        """The inverse of `Writer.node`."""
        match node:
            case None | bool() | int() | float() | str():
                return node
            case list():
                return self.values(node)
            case {"leaf": True}:
                return LEAF
            case {"float": "nan" | "inf" | "-inf" as text}:
                return float(text)
            case {"dtype": str(name)} if isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            case {"tuple": list(items)}:
                return tuple(self.values(items))
            case {"Size": list(items)}:
                return torch.Size(self.values(items))
            case {"dict": list(items)}:
                return dict(self.items(items))
            case {"OrderedDict": list(items)}:
                return OrderedDict(self.items(items))
            case {"tensor": str(name), "shape": list(shape), "order": list(order)}:
                return self.tensor(name, shape, order)
            case {"structure": tree}:
                return flatten(self.value(tree))[1]
            case {"namedtuple": str(name), "fields": dict(fields)}:
                tuple_class = self.found(name, optree.is_namedtuple_class, "named tuple")
                values = self.fields(name, fields, tuple_class._fields, tuple_class._field_defaults)
                return tuple_class._make(values.values())
            case {"dataclass": str(name), "fields": dict(fields)}:
                return self.instance(name, self.found(name, is_dataclass, "dataclass"), fields)
            case {"registered": str(name), "fields": dict(fields)}:
                if name not in registered:
                    module, foreign, _ = name.rpartition(":")
                    own = f"import curvlib.{name.partition('.')[0]} before loading, or update curvlib"
                    remedy = f"import {module} before loading" if foreign else own
                    raise self.refusal(f"it holds a {name}, which is no class that curvlib knows; {remedy}")
                return self.instance(name, registered[name], fields)
        raise self.refusal(f"its structure is damaged (at {str(node)[:80]}); save it again")

    def values(self, nodes: Sequence[Json]) -> list[Any]:
        """The value of every element."""
        return [self.value(node) for node in nodes]

    def items(self, pairs: Sequence[Json]) -> Iterator[tuple[str | int, Any]]:
        """Keys and values of a dictionary."""
        for key, node in pairs:
            yield key, self.value(node)

    def found(self, name: str, is_one: Callable[[Any], bool], what: str) -> Any:
        """The class of this name, if it is one of its kind."""
        cls = find(name)
        if cls is None:
            raise self.refusal(f"it holds a {what} {name}, which cannot be imported; make its module importable")
        if not is_one(cls):
            raise self.refusal(
                f"it holds a {what} {name}, but that is no {what} here; restore the class as it was saved"
            )
        return cls

    def fields(
        self, name: str, stored: dict[str, Json], names: Sequence[str], defaults: dict[str, Any]
    ) -> dict[str, Any]:
        """The values of all fields, in the order of ``names``; one that was added since takes its default."""
        if not set(stored) <= set(names) <= set(stored) | set(defaults):
            raise self.refusal(
                f"it holds a {name} with the fields {', '.join(stored)}, but that has {', '.join(names)} here; "
                "load it with the version that saved it"
            )
        return {field: self.value(stored[field]) if field in stored else defaults[field] for field in names}

    def instance(self, name: str, cls: Any, stored: dict[str, Json]) -> Any:
        """An instance with these fields; ``__init__`` is not called."""
        fields = dataclasses.fields(cls)
        defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        result = object.__new__(cls)
        for field, value in self.fields(name, stored, [field.name for field in fields], defaults).items():
            object.__setattr__(result, field, value)
        return result

    def tensor(self, name: str, shape: list[int], order: list[int]) -> Tensor:
        """The tensor that was stored, axes back in place and expanded."""
        if name not in self.tensors:
            raise self.refusal(f"the tensor {name!r} is missing; save it again")
        stored = self.tensors[name]
        if order == list(range(len(shape))) and list(stored.shape) == shape:
            return stored
        return stored.permute(sorted(range(len(order)), key=order.__getitem__)).expand(shape)

    def refusal(self, why: str) -> FormatError:
        """The error for a file that cannot be read."""
        return FormatError(f"cannot load {self.file}: {why}")
