"""Batches in containers that torch's pytrees do not know: understood as mappings, or refused with the remedy."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import pickle
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvlib as cv
from curvlib import containers, errors
from curvlib.pytree import ravel

EXAMPLES = 5


class Encoding(collections.UserDict[str, Any]):
    """As a tokenizer's result: items are attributes, too, and there is more than items."""

    def __init__(self, data: Any, encodings: Any = None) -> None:
        super().__init__(data)
        self._encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError as error:
            raise AttributeError(name) from error


class ModelOutput(collections.OrderedDict[str, Any]):
    """As transformers' class of this name: a dict whose items are attributes, which cannot be deleted."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __delitem__(self, *_: Any) -> None:
        raise TypeError("items stay")


class AttributeDict(dict[str, Any]):
    """The trick of many libraries: a dict that is its own namespace."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class TensorDict(Mapping[str, Tensor]):
    """As tensordict's: a mapping that knows the size of its batch, and is not made of a dict alone."""

    def __init__(self, source: dict[str, Tensor], batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size

    def __getitem__(self, key: str) -> Tensor:
        return self.source[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


class Pair(NamedTuple):
    x: Any
    scale: Any


MAPPINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda items: collections.defaultdict(list, items),
    "UserDict": collections.UserDict,
    "ChainMap": collections.ChainMap,
    "read-only": types.MappingProxyType,
    "Encoding": lambda items: Encoding(items, ["not a tensor"]),
    "ModelOutput": ModelOutput,
    "AttributeDict": AttributeDict,
    "TensorDict": lambda items: TensorDict(items, EXAMPLES),
    "nested": lambda items: collections.UserDict(x=items["x"], rest=[Encoding({"scale": items["scale"]})]),
}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64),
        "scale": torch.rand(EXAMPLES, 1, generator=generator, dtype=torch.float64),
    }


LABELS = torch.tensor([0, 1, 1, 0, 1])


def read(inputs: Any, name: str) -> Tensor:
    """An item, by attribute where there is one: there must be no other tensor behind it."""
    if isinstance(inputs, collections.UserDict) and name == "scale" and "rest" in inputs:
        inputs = inputs["rest"][0]
    item: Tensor = inputs[name]
    assert getattr(inputs, name, item) is item
    return item


def model(kind: type | None = None) -> tuple[Callable[[Any, Any], Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    params = {
        "w": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "v": torch.randn(4, 2, generator=generator, dtype=torch.float64),
    }

    def model_fn(p: dict[str, Tensor], inputs: Any) -> Tensor:
        assert kind is None or type(inputs) is kind
        return (read(inputs, "x") @ p["w"]).tanh() * read(inputs, "scale") @ p["v"]

    return model_fn, params


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "kfac": lambda f, p, b: cv.kfac(f, p, b, fisher="type-2"),
    "kfac, functional": lambda f, p, b: cv.kfac(f, p, b, fisher="empirical", engine="functional"),
    "ekfac": lambda f, p, b: cv.ekfac(f, p, b, fisher="empirical"),
    "tkfac": cv.tkfac,
    "corrected": lambda f, p, b: cv.eigenvalue_correct(cv.kfac(f, p, b), f, p, b),
    "diagonal": cv.diagonal,
    "shampoo": cv.shampoo,
    "shampoo of examples": lambda f, p, b: cv.shampoo(f, p, b, per_example=True),
    "kl_shampoo of examples": lambda f, p, b: cv.kl_shampoo(f, p, b, per_example=True),
    "dykaf of examples": lambda f, p, b: cv.dykaf(f, p, b, per_example=True),
    "ggn": cv.ggn,
    "hessian": cv.hessian,
    "fisher": cv.fisher,
    "gramian": cv.gramian,
}


@functools.cache
def truth_of(name: str) -> Tensor:
    """Of plain dictionaries, in one batch."""
    return ESTIMATORS[name](*model(), (tensors(), LABELS)).to_dense()


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_mapping_is_what_its_items_are_for_every_estimator(mapping: str) -> None:
    make = MAPPINGS[mapping]
    model_fn, params = model(type(make(tensors())))
    given = make(tensors())
    before = dict(given.items())
    for name, estimator in ESTIMATORS.items():
        found = estimator(model_fn, params, (given, LABELS)).to_dense()
        torch.testing.assert_close(found, truth_of(name), rtol=1e-12, atol=1e-14, msg=name)
        assert found.norm() > 0
    assert list(before) == list(given)
    assert all(given[key] is value for key, value in before.items())  # nothing was written to


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_loader_of_mappings_is_one_big_batch(mapping: str) -> None:
    make = MAPPINGS[mapping]
    model_fn, params = model()
    parts = [slice(0, 2), slice(2, 3), slice(3, 5)]
    loader = [(make({key: x[part] for key, x in tensors().items()}), LABELS[part]) for part in parts]
    for name in ("kfac", "ekfac", "diagonal", "ggn", "hessian"):
        found = ESTIMATORS[name](model_fn, params, cv.over(loader)).to_dense()
        torch.testing.assert_close(found, truth_of(name), rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_plans_jacobians_and_influence_see_the_examples_of_a_mapping(mapping: str, tmp_path: Path) -> None:
    make = MAPPINGS[mapping]
    model_fn, params = model()
    given, plain = make(tensors()), tensors()
    assert str(cv.plan(model_fn, params, given)) == str(cv.plan(model_fn, params, plain))
    J = torch.func.jacrev(model_fn)(params, plain)
    dense = torch.cat([J[name].reshape(2 * EXAMPLES, -1) for name in ("v", "w")], 1)
    torch.testing.assert_close(cv.jacobian(model_fn, params, given).to_dense(), dense)

    def gradient(n: int) -> Tensor:
        def term(p: dict[str, Tensor]) -> Tensor:
            one = {key: x[n : n + 1] for key, x in plain.items()}
            return torch.nn.functional.cross_entropy(model_fn(p, one), LABELS[n : n + 1])

        return ravel(torch.func.grad(term)(params))

    gradients = torch.stack([gradient(n) for n in range(EXAMPLES)])
    curv = cv.kfac(model_fn, params, (plain, LABELS))
    inverse = curv.inverse(cv.FactoredTikhonov(0.1))
    truth = gradients @ inverse.to_dense() @ gradients.T
    batch = given, LABELS
    torch.testing.assert_close(cv.influence.scores(inverse, model_fn, params, batch, batch), truth)
    torch.testing.assert_close(cv.influence.self_influence(inverse, model_fn, params, batch), truth.diagonal())
    projection = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(params, rank=64))
    index = cv.influence.build(
        tmp_path / "index", projection, model_fn, params, batch, dtype=torch.float64, batch_size=2, shard_size=3
    )
    torch.testing.assert_close(index.scores(model_fn, params, batch), truth)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_targets_may_be_mappings(mapping: str) -> None:
    make = MAPPINGS[mapping]
    generator = torch.Generator().manual_seed(2)
    model_fn, params = model()
    wanted = {"x": torch.randn(EXAMPLES, 2, generator=generator, dtype=torch.float64), "scale": tensors()["scale"]}
    kind = type(make(wanted))

    def weighted(f: Tensor, y: Any) -> Tensor:
        assert type(y) is kind
        return (read(y, "scale") * (f - read(y, "x")).square()).sum(1)

    plain = cv.CustomLoss(lambda f, y: (y["scale"] * (f - y["x"]).square()).sum(1))
    for name, estimator in {"kfac": cv.kfac, "ggn": cv.ggn, "hessian": cv.hessian, "diagonal": cv.diagonal}.items():
        found = estimator(model_fn, params, (tensors(), make(wanted)), loss=cv.CustomLoss(weighted)).to_dense()
        truth = estimator(model_fn, params, (tensors(), wanted), loss=plain).to_dense()
        torch.testing.assert_close(found, truth, msg=name)
    short = {key: x[:3] for key, x in wanted.items()}
    with pytest.raises(errors.TargetError, match="leading axis of 5"):
        cv.kfac(model_fn, params, (tensors(), make(short)), loss=cv.CustomLoss(weighted))


def test_flatten_and_unflatten_are_inverse_and_keep_what_is_no_tensor() -> None:
    given = Encoding({"x": torch.ones(2), "words": ["a", "b"], "count": 3}, encodings=["kept"])
    leaves, structure = containers.flatten([given, None, "text"])
    again = containers.unflatten(leaves, structure)[0]
    assert type(again) is Encoding
    assert again is not given
    assert again._encodings == ["kept"]
    assert (again["x"] is given["x"], again["words"], again.count) == (True, ["a", "b"], 3)
    assert str(pickle.loads(pickle.dumps(structure))) == str(structure)
    assert str(structure) == str(containers.flatten([copy.deepcopy(given), None, "text"])[1])


def test_named_tuples_and_lists_are_pytrees_as_before() -> None:
    _, params = model()

    def of_pair(p: dict[str, Tensor], inputs: Any) -> Tensor:
        assert isinstance(inputs, (Pair, list))
        return (inputs[0] @ p["w"]).tanh() * inputs[1] @ p["v"]

    truth = cv.kfac(model()[0], params, (tensors(), LABELS)).to_dense()
    for inputs in (Pair(**tensors()), list(tensors().values())):
        torch.testing.assert_close(cv.kfac(of_pair, params, (inputs, LABELS)).to_dense(), truth)


# --- what is refused ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: Tensor


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Record(tuple[Any, ...]):
    """A subclass of tuple that is no named tuple."""


class Hiding(dict[str, Any]):
    """A dict with a tensor that is no item."""


def hiding() -> Hiding:
    made = Hiding(tensors())
    made.table = torch.ones(2)  # type: ignore[attr-defined]
    return made


class Deriving(Mapping[str, Tensor]):
    """A mapping that computes its items."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __getitem__(self, key: str) -> Tensor:
        return {"x": self.x + self.y}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dataclass": (lambda: Batch(**tensors()), r"dataclasses\.asdict\(batch\)"),
    "dataclass in a list": (lambda: [Batch(**tensors())], r"dataclasses\.asdict\(batch\)"),
    "dataclass in a mapping": (lambda: Encoding({"a": Batch(**tensors())}), r"dataclasses\.asdict\(batch\)"),
    "namespace": (lambda: types.SimpleNamespace(**tensors()), r"dict\(batch\)"),
    "slots": (lambda: Slotted(tensors()["x"]), r"dict\(batch\)"),
    "subclass of tuple": (lambda: Record(tensors().values()), r"tuple\(batch\)"),
    "set": (lambda: set(tensors().values()), r"tuple\(batch\)"),
    "array": (lambda: np.ones((5, 3)), r"torch\.as_tensor"),
    "arrays in a mapping": (lambda: collections.UserDict(x=np.ones((5, 3))), r"torch\.as_tensor"),
    "mapping with more than items": (hiding, r"dict\(batch\)"),
    "mapping that computes": (lambda: Deriving(torch.ones(5, 3), torch.ones(5, 3)), r"dict\(batch\)"),
}


@pytest.mark.parametrize("container", REFUSED)
def test_what_hides_tensors_is_refused_with_the_remedy(container: str) -> None:
    make, words = REFUSED[container]
    model_fn, params = model()
    good = cv.kfac(model_fn, params, (tensors(), LABELS)).inverse(0.1)
    loss = cv.CustomLoss(lambda f, y: f.square().sum(1))
    calls: dict[str, Callable[[], Any]] = {
        "plan": lambda: cv.plan(model_fn, params, make()),
        "jacobian": lambda: cv.jacobian(model_fn, params, make()),
        "over": lambda: cv.kfac(model_fn, params, cv.over([(make(), LABELS)])),
        "influence": lambda: cv.influence.self_influence(good, model_fn, params, (make(), LABELS)),
        "targets of kfac": lambda: cv.kfac(model_fn, params, (tensors(), make()), loss=loss),
        "targets of ggn": lambda: cv.ggn(model_fn, params, (tensors(), make()), loss=loss),
    }
    calls |= {name: lambda e=e: e(model_fn, params, (make(), LABELS)) for name, e in ESTIMATORS.items()}  # type: ignore[misc]
    for call in calls.values():
        with pytest.raises(errors.CurvlibError, match=words):
            call()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Not a container: it has no tensor."""

    power: int


def test_leaves_without_tensors_are_passed_on_as_they_are() -> None:
    model_fn, params = model()

    def with_settings(p: dict[str, Tensor], inputs: Any) -> Tensor:
        assert inputs["settings"] == Settings(2)
        assert inputs["words"] == ("a", None)
        assert inputs["fn"] is torch.sin
        return model_fn(p, inputs["data"])

    inputs = {"settings": Settings(2), "words": ("a", None), "fn": torch.sin, "data": collections.UserDict(tensors())}
    for name, estimator in ESTIMATORS.items():
        found = estimator(with_settings, params, (inputs, LABELS)).to_dense()
        torch.testing.assert_close(found, estimator(model_fn, params, (tensors(), LABELS)).to_dense(), msg=name)


# --- where the examples are counted -------------------------------------------------------------------------------


FIRST_LEAVES: dict[str, Callable[[], Any]] = {
    "a number": lambda: 2.0,
    "an integer": lambda: 2,
    "a 0-d tensor": lambda: torch.tensor(2.0, dtype=torch.float64),
    "a 0-d integer tensor": lambda: torch.tensor(2),
}


def rows() -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs, and the parameters of a linear model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
    return x, {"w": torch.randn(3, 2, generator=generator, dtype=torch.float64)}


@functools.cache
def truth_of_rows(name: str) -> Tensor:
    x, params = rows()
    return ESTIMATORS[name](lambda p, x: x @ p["w"] / 2.0, params, (x, LABELS)).to_dense()


@pytest.mark.parametrize(
    "wrap",
    [list, lambda pair: dict(zip("ab", pair, strict=True)), Pair._make],
    ids=["list", "dict", "named tuple"],
)
@pytest.mark.parametrize("leaf", FIRST_LEAVES)
def test_inputs_that_begin_with_a_number_work_over_a_loader(leaf: str, wrap: Callable[[Any], Any]) -> None:
    (x, params), first = rows(), FIRST_LEAVES[leaf]()

    def model_fn(p: dict[str, Tensor], inputs: Any) -> Tensor:
        temperature, x = inputs.values() if isinstance(inputs, dict) else inputs
        return x @ p["w"] / temperature

    batch = wrap((first, x)), LABELS
    loader = cv.over([(wrap((first, x[i:j])), LABELS[i:j]) for i, j in ((0, 3), (3, 4), (4, 5))])
    for name, estimator in ESTIMATORS.items():
        truth = truth_of_rows(name)
        torch.testing.assert_close(estimator(model_fn, params, batch).to_dense(), truth, msg=name)
        if name in ("kfac", "ekfac", "diagonal", "ggn", "hessian", "gramian"):
            torch.testing.assert_close(estimator(model_fn, params, loader).to_dense(), truth, msg=name)
    inverse = cv.kfac(model_fn, params, batch).inverse(0.1)
    scores = cv.influence.scores(inverse, model_fn, params, batch, batch)
    torch.testing.assert_close(cv.influence.scores(inverse, model_fn, params, loader, loader), scores)


def test_a_table_that_precedes_the_examples_is_refused_with_the_remedy() -> None:
    x, table = torch.randn(4, 6, 3, dtype=torch.float64), torch.randn(1, 6, 3, dtype=torch.float64)
    params = {"w": torch.randn(3, 2, dtype=torch.float64)}

    def model_fn(p: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        return (inputs["x"] + inputs["table"]) @ p["w"]

    targets = torch.zeros(4, 6, dtype=torch.long)
    truth = cv.kfac(lambda p, x: (x + table) @ p["w"], params, (x, targets)).to_dense()
    for rows in (table, table[0]):
        good, bad = {"x": x, "table": rows}, {"table": rows, "x": x}
        torch.testing.assert_close(cv.kfac(model_fn, params, (good, targets)).to_dense(), truth)
        for call in (cv.kfac, cv.ekfac, cv.diagonal, cv.shampoo):
            with pytest.raises(errors.BatchAxisError, match="first tensor of the inputs"):
                call(model_fn, params, (bad, targets))
            with pytest.raises(errors.BatchAxisError, match="first tensor of the inputs"):
                call(model_fn, params, (bad, None), loss=cv.Identity())
        with pytest.raises(errors.BatchAxisError, match="close over"):
            cv.plan(model_fn, params, bad)


def test_outputs_that_do_not_count_the_examples_are_a_curvlib_error() -> None:
    x, module = torch.randn(4, 3), nn.Linear(3, 2)
    model_fn, params = cv.functional(module)
    assert issubclass(errors.BatchAxisError, errors.CaptureError)
    for wrong in (lambda p, x: model_fn(p, x)[:3], lambda p, x: model_fn(p, x).mean(), lambda p, x: model_fn(p, x).mT):
        with pytest.raises(errors.CurvlibError):
            cv.kfac(wrong, params, (x, torch.zeros(4).long()))


class Ring:
    """An object that holds itself."""

    def __init__(self, kind: type[Any]) -> None:
        self.parts = {"self": self} if kind is dict else kind([self])


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_the_search_for_tensors_in_an_object_that_holds_itself_comes_to_an_end(kind: type[Any]) -> None:
    ring = Ring(kind)
    assert not list(containers.tensors_of(ring))
    ring.parts = [torch.zeros(1), ring.parts]
    assert list(containers.tensors_of(ring))
