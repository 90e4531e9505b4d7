"""What is given to influence by mistake is refused at the door, in words that say what to give."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import curvlib as cv
import curvlib.influence
from curvlib.errors import (
    ArgumentError,
    DtypeError,
    EmptyBatchError,
    FormatError,
    NonFiniteError,
    PytreeError,
    ShapeError,
    TargetError,
)
from curvlib.influence import evaluate
from curvlib.pytree import flatten
from tests.influence.index_cases import build, contents, examples, projection_of, small
from tests.influence.influence_cases import assert_close
from tests.influence.influence_cases import examples as part_of

CASE = small()
DATA = examples(12)
DAMPING = cv.FactoredTikhonov(0.1)
CURVATURE = CASE.curvature()
INVERSE = CURVATURE.inverse(DAMPING)
PROJECTION = projection_of(CASE)
SKETCHES = PROJECTION(cv.per_example_gradients(CASE.model_fn, CASE.params, CASE.queries))
MODEL = CASE.model_fn, CASE.params


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> cv.influence.Index:
    folder: Path = tmp_path_factory.mktemp("doors")
    found: cv.influence.Index = build(folder / "index", CASE, DATA)
    return found


def fetch(numbers: Tensor) -> Any:
    return DATA[0][numbers], DATA[1][numbers]


def changed(name: str, sketch: Any) -> Any:
    return SKETCHES | {name: sketch}


# --- queries ----------------------------------------------------------------------------------------------------------

NOTHING = part_of(DATA, 0, 0)
LOADER = DataLoader(TensorDataset(*DATA), 4)
SINGLE = {name: leaf.float() for name, leaf in CASE.params.items()}
NAN = (CASE.queries[0] * torch.tensor([1.0, 1.0, float("nan"), 1.0]).unsqueeze(1), CASE.queries[1])
QUERIES: dict[str, tuple[type[Exception], str, tuple[Any, ...]]] = {
    "no example": (EmptyBatchError, "empty", (*MODEL, NOTHING)),
    "no batch": (EmptyBatchError, "gave no batch", (*MODEL, cv.over([]))),
    "batches without examples": (EmptyBatchError, "empty", (*MODEL, cv.over([NOTHING]))),
    "a loader": (ArgumentError, r"use cv.over\(loader\)", (*MODEL, LOADER)),
    "inputs only": (ArgumentError, r"pair \(inputs, targets\)", (*MODEL, CASE.queries[0])),
    "no model": (ArgumentError, "need model_fn and params", (CASE.queries,)),
    "params of another dtype": (
        ArgumentError, "same checkpoint, in the same dtype", (CASE.model_fn, SINGLE, CASE.queries),
    ),
    "params of another model": (
        PytreeError, "none of the module's parameters", (CASE.model_fn, {"weight": torch.ones(3, 3)}, CASE.queries),
    ),
    "a generator of params": (PytreeError, "got a", (CASE.model_fn, iter(CASE.params.values()), CASE.queries)),
    "swapped arguments": (ArgumentError, "swapped", (CASE.params, CASE.model_fn, CASE.queries)),
    "a query that is not finite": (NonFiniteError, r"block '0.weight': the sketch of query 2 is not", (*MODEL, NAN)),
    "a sketch that is not finite": (
        NonFiniteError, "block '2.weight': the sketch of query 0", (changed("2.weight", SKETCHES["2.weight"] / 0),),
    ),
    "a sketch of integers": (DtypeError, "got torch.int64", (changed("2.weight", SKETCHES["2.weight"].long()),)),
    "a complex sketch": (DtypeError, "got torch.complex128", (changed("2.weight", SKETCHES["2.weight"].cdouble()),)),
    "a sketch that is a list": (DtypeError, "'2.weight'.* got a list", (changed("2.weight", [1.0]),)),
}  # fmt: skip


@pytest.mark.parametrize("what", QUERIES)
def test_queries_that_are_a_mistake_are_refused(index: cv.influence.Index, what: str) -> None:
    error, message, arguments = QUERIES[what]
    for action in (lambda: index.scores(*arguments), lambda: index.top(*arguments, k=2)):
        with pytest.raises(error, match=message):
            action()


def test_queries_may_have_another_loss_with_targets_of_its_own(index: cv.influence.Index) -> None:
    targets = torch.zeros(4, 4, dtype=torch.float64)
    found = index.scores(*MODEL, (CASE.queries[0], targets), loss=cv.MSE(reduction="sum"))
    sketches = PROJECTION(cv.per_example_gradients(*MODEL, (CASE.queries[0], targets), loss=cv.MSE(reduction="sum")))
    assert isinstance(found, Tensor)
    assert torch.equal(found, index.scores(sketches))
    assert not torch.allclose(found, index.scores(SKETCHES))
    with pytest.raises(TargetError, match="MSE"):
        index.scores(*MODEL, CASE.queries, loss=cv.MSE())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sketches_of_any_dtype_are_taken(index: cv.influence.Index, dtype: torch.dtype) -> None:
    rounded = {name: sketch.to(dtype) for name, sketch in SKETCHES.items()}
    found, expected = index.scores(rounded), index.scores({name: x.float() for name, x in rounded.items()})
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# --- builds and reranking -------------------------------------------------------------------------------------------

BUILDS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a curvature": (ArgumentError, r"curv.power\(-0.5, damping\).project\(.*Block", {"projection": CURVATURE}),
    "a sketch": (ArgumentError, r"project\(.*Sketch", {"projection": cv.sketch(CASE.params, rank=2)}),
    "half an example": (ArgumentError, "shard_size must be at least 1 and an integer", {"shard_size": 2.5}),
    "no examples": (ArgumentError, "batch_size must be at least 1", {"batch_size": 0}),
    "the name of a dtype": (DtypeError, "not of float32", {"dtype": "float32"}),
    "a loader": (ArgumentError, r"use cv.over\(loader\)", {"data": LOADER}),
    "triples": (ArgumentError, r"pairs \(inputs, targets\)", {"data": cv.over([(*DATA, 1)])}),
    "no data": (EmptyBatchError, "gave no batch", {"data": cv.over([])}),
}  # fmt: skip


@pytest.mark.parametrize("what", BUILDS)
def test_builds_that_are_a_mistake_are_refused(tmp_path: Path, what: str) -> None:
    error, message, options = BUILDS[what]
    with pytest.raises(error, match=message):
        build(tmp_path, CASE, **{"data": DATA} | options)
    build(tmp_path, CASE, DATA)  # nothing is in the way of what was meant
    with pytest.raises(FormatError, match="no index"):
        cv.influence.load(tmp_path.parent)


def test_reranking_by_mistake_is_refused(index: cv.influence.Index) -> None:
    def reranked(k: int = 2, fetch: Callable[[Tensor], Any] = fetch, **options: Any) -> Any:
        return cv.influence.rerank(index, INVERSE, *MODEL, CASE.queries, k=k, fetch=fetch, **options)

    for k in (0, 13):
        with pytest.raises(ArgumentError, match="between 1 and the 12 examples"):
            reranked(k)
    with pytest.raises(ShapeError, match="returned 1; it must return"):
        reranked(fetch=lambda numbers: fetch(numbers[:1]))
    with pytest.raises(ShapeError, match="returned 12; it must return"):
        reranked(fetch=lambda numbers: DATA, batch_size=3)
    with pytest.raises(ArgumentError, match=r"pair \(inputs, targets\)"):
        reranked(fetch=lambda numbers: DATA[0][numbers])
    assert reranked(12)[0].shape == (4, 12)


# --- copies -----------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}  # fmt: skip
every_copy = pytest.mark.parametrize("how", COPIES)


@every_copy
@pytest.mark.parametrize("compressor", [cv.sketch(CASE.params, rank=2), cv.EigenSketch(2)])
def test_copies_of_projections_and_sketches_project_alike(how: str, compressor: Any) -> None:
    again = COPIES[how]
    root = CURVATURE.power(-0.5, DAMPING)
    projection = root.project(compressor)
    expected = projection(CASE.params)
    for other in (root.project(again(compressor)), again(projection), again(root).project(compressor)):
        found = other(CASE.params)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_copy
def test_copies_of_inverses_give_the_same_scores(how: str) -> None:
    for inverse in (INVERSE, CASE.curvature(cv.ekfac).inverse(0.1), CASE.curvature(cv.tkfac).inverse(0.1)):
        assert torch.equal(CASE.scores(COPIES[how](inverse)), CASE.scores(inverse))


@every_copy
def test_copies_of_results_are_equal(how: str) -> None:
    values = torch.arange(6.0)

    def train(chosen: Tensor, seed: int) -> Tensor:
        return values[chosen].mean().reshape(1)

    scores = torch.arange(6.0).reshape(1, 6)
    for result in (
        evaluate.Correlations(torch.ones(2)),
        evaluate.brittleness(train, scores, counts=(1, 2), random=2),
        evaluate.mislabel_detection(values, values > 3),
    ):
        other = COPIES[how](result)
        assert type(other) is type(result)
        assert all(torch.equal(a, b) for a, b in zip(flatten(other)[0], flatten(result)[0], strict=True))


@every_copy
def test_a_build_takes_copies_for_what_they_are(tmp_path: Path, how: str) -> None:
    build(tmp_path / "index", CASE, DATA, PROJECTION)
    before = contents(tmp_path / "index")
    params, data = COPIES[how](CASE.params), COPIES[how](DATA)
    found = build(tmp_path / "index", CASE, data, COPIES[how](PROJECTION), params=params)
    assert contents(tmp_path / "index") == before
    assert_close(COPIES[how](found).scores(SKETCHES), found.scores(SKETCHES))
