"""Projections of per-example gradients, and leading eigen-directions of what estimators make, against brute force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from exactness_problems import Problem, normal, problem
from layer_zoo import ZOO
from pairwise import every_pair
from test_per_example import assert_close
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import PytreeError
from curvlib.estimators import shampoo
from curvlib.operators import EigenSketch
from curvlib.operators.sketch import Compressor

Estimator = Callable[..., cv.BlockDiagonal]
ESTIMATORS: dict[str, Estimator] = {"kfac": cv.kfac, "ekfac": cv.ekfac, "tkfac": cv.tkfac}
DAMPINGS: dict[str, float | cv.FactoredTikhonov] = {"tikhonov": 0.1, "factored": cv.FactoredTikhonov(0.1)}
COMPRESSORS: dict[str, Callable[[Any], Compressor]] = {
    "eigen": lambda params: EigenSketch(rank=2),
    "rademacher": lambda params: cv.sketch(params, rank=2),
    "orthogonal": lambda params: cv.sketch(params, rank=2, kind="orthogonal"),
}


def products(found: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    return torch.stack([(found[name] * other[name]).sum() for name in found]).sum()


def vectors(params: Any) -> list[Any]:
    return [cv.unravel(normal(seed, len(cv.ravel(params))), params) for seed in (1, 2)]


# --- all directions -----------------------------------------------------------------------------------------------


@every_pair("estimator, damping, bias", ESTIMATORS, DAMPINGS, [True, False])
def test_with_all_directions_inner_products_are_exact(estimator: str, damping: str, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3, bias=bias))
    case = problem(model, normal(0, 9, 2, 5), "cross-entropy", "mean")
    curv = ESTIMATORS[estimator](case.model_fn, case.params, case.batch, fisher="type-2")
    projection = curv.power(-0.5, DAMPINGS[damping]).project(EigenSketch(rank=16))
    g, h = vectors(case.params)
    exact = cv.ravel(g) @ cv.ravel(curv.inverse(DAMPINGS[damping]) @ h)
    assert_close(products(projection(g), projection(h)), exact)


@pytest.mark.parametrize("name", ["embeddings", "conv2d with groups", "scale and shift", "slices", "experts"])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_it_is_exact_for_every_kind_of_side(name: str, damping: str) -> None:
    model = ZOO[name]()
    curv = cv.kfac(model.model_fn, model.params, model.batch(), fisher="type-2", elementwise="dense")
    projection = curv.power(-0.5, DAMPINGS[damping]).project(EigenSketch(rank=64))
    g, h = vectors(model.params)
    exact = cv.ravel(g) @ cv.ravel(curv.inverse(DAMPINGS[damping]) @ h)
    assert_close(products(projection(g), projection(h)), exact)


# --- per-example gradients ----------------------------------------------------------------------------------------


def assert_projects_every_example(projection: cv.Projection, case: Problem) -> None:
    gradients = reference.gradients(case.model_fn, case.params, case.batch, case.kind.objective)
    found = projection(cv.per_example_gradients(case.model_fn, case.params, case.batch, loss=case.kind.loss("mean")))
    for n, g in enumerate(gradients):
        for name, expected in projection(cv.unravel(g, case.params)).items():
            assert_close(found[name][n], expected)


@every_pair(
    "name, compressor, estimator",
    [name for name in ZOO if name not in ("tied", "slices", "nested")],
    COMPRESSORS,
    [cv.kfac, cv.ekfac, cv.diagonal],
)
def test_per_example_is_the_projection_of_every_gradient(name: str, compressor: str, estimator: Estimator) -> None:
    model = ZOO[name]()
    if estimator is cv.ekfac and compressor != "eigen":
        estimator = cv.tkfac
    curv = estimator(model.model_fn, model.params, model.batch(), fisher="type-2")
    projection = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(COMPRESSORS[compressor](model.params))
    case = problem(model.model_fn, model.inputs, "cross-entropy", "mean", params=model.params)
    assert_projects_every_example(projection, case)


@pytest.mark.parametrize("name", ["tied", "slices"])
def test_merged_uses_of_a_tied_weight_are_projected(name: str) -> None:
    model = ZOO[name]()
    curv = cv.kfac(model.model_fn, model.params, model.batch(), fisher="type-2", tied="merge")
    projection = curv.power(-0.5, 0.1).project(EigenSketch(rank=2))
    case = problem(model.model_fn, model.inputs, "cross-entropy", "mean", params=model.params)
    assert_projects_every_example(projection, case)


@pytest.mark.parametrize("memory", [1 << 23, 1])
def test_blocks_that_the_model_does_not_have_are_projected_too(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", memory)
    case = problem(nn.Linear(4, 3), normal(0, 6, 4), "mse", "mean")
    curv = shampoo.init(case.params)  # weight and bias apart
    assert set(curv.blocks) == {"weight", "bias"}
    for compressor in COMPRESSORS.values():
        projection = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(compressor(case.params))
        assert_projects_every_example(projection, case)


def test_batches_are_projected_one_by_one_and_only_for_the_same_params() -> None:
    case = problem(nn.Linear(4, 3), normal(0, 6, 4), "cross-entropy", "mean")
    curv = cv.kfac(case.model_fn, case.params, case.batch)
    projection = curv.power(-0.5, 0.1).project(EigenSketch(rank=2))
    pieces = list(zip(*(tensor.split([4, 2]) for tensor in case.batch), strict=True))
    whole, *parts = (projection(cv.per_example_gradients(case.model_fn, case.params, x)) for x in [case.batch, *pieces])
    assert_close(torch.cat([part["weight"] for part in parts]), whole["weight"])
    lone = {"weight": torch.zeros(3, 4).double()}
    other = cv.per_example_gradients(lambda p, x: x @ p["weight"].mT, lone, case.batch)
    with pytest.raises(PytreeError, match="params of another structure"):
        projection(other)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_a_projection_comes_back_from_a_file(damping: str, tmp_path: Path) -> None:
    case = problem(nn.Linear(4, 3), normal(0, 6, 4), "cross-entropy", "mean")
    curv = cv.ekfac(case.model_fn, case.params, case.batch)
    projection = curv.power(-0.5, DAMPINGS[damping]).project(EigenSketch(rank=2))
    cv.save((projection, EigenSketch(rank=2)), tmp_path / "projection.safetensors")
    loaded, description = cv.load(tmp_path / "projection.safetensors")
    assert description == EigenSketch(rank=2)
    before, after = (p(cv.per_example_gradients(case.model_fn, case.params, case.batch)) for p in (projection, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
