"""Abstract or final: no operator overrides a method that is implemented, and the public names are the contract's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

import curvlib as cv
from curvlib.operators import Operator

OWN = {"__module__", "__doc__", "__abstractmethods__", "__dict__", "__weakref__", "_abc_impl", "__parameters__"}
OWN |= {"__annotations__", "__annotate_func__", "__annotations_cache__", "__static_attributes__", "__firstlineno__"}
OF_DATACLASSES = {"__init__", "__post_init__", "__setattr__", "__delattr__", "__match_args__", "__replace__"}
OF_DATACLASSES |= {"__dataclass_fields__", "__dataclass_params__"}
CONTRACT = {
    *("matvec", "matmat", "inverse", "power", "project", "damp", "map_eigenvalues", "truncate", "quadratic", "diag"),
    *("trace", "logdet", "frobenius_norm", "eigenvalues", "sample", "to_dense", "to", "blocks", "parameters"),
    *("domain", "dtype", "dtypes", "widened"),
}


def classes(base: type) -> Iterator[type]:
    """The class and all that derive from it, in the library."""
    yield base
    for child in base.__subclasses__():
        if child.__module__.startswith("curvlib."):
            yield from classes(child)


EVERY = sorted(set(classes(Operator)), key=lambda c: c.__qualname__)


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
def test_no_concrete_method_is_overridden(cls: type) -> None:
    for name, value in vars(cls).items():
        if name in OWN | OF_DATACLASSES:
            continue
        for base in cls.__mro__[1:-1]:
            hidden = vars(base).get(name)
            implemented = hidden is not None and not getattr(hidden, "__isabstractmethod__", False)
            assert not (implemented and callable(value)), f"{cls.__name__}.{name} overrides that of {base.__name__}"


def test_a_class_that_overrides_a_method_is_found() -> None:
    class Wrong(cv.Dense):
        def trace(self) -> None: ...  # type: ignore[override]

    Wrong.__module__ = "tests"
    with pytest.raises(AssertionError, match=r"Wrong\.trace overrides that of Matrix"):
        test_no_concrete_method_is_overridden(Wrong)


def test_every_class_is_abstract_or_a_leaf() -> None:
    for cls in EVERY:
        children = [child for child in cls.__subclasses__() if child.__module__.startswith("curvlib.")]
        assert inspect.isabstract(cls) or not children, cls


def test_the_public_names_are_those_of_the_contract() -> None:
    public = {name for name in dir(Operator) if not name.startswith("_")}
    assert public == CONTRACT
