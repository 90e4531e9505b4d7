"""The gradient of every example, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import KINDS, Problem, engines, few, normal, problem, reductions, seeds
from hypothesis import given
from hypothesis import strategies as st
from layer_zoo import ZOO, Model
from pairwise import every_pair
from test_experts import FORMS, WIDTH, load, rule
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError, CaptureError, TargetError
from curvlib.gradients.per_example import (
    DenseGradients,
    ElementwiseGradients,
    PerExampleGradients,
    RowGradients,
    per_example_gradients,
)

EXACT = 1e-10
both_engines = pytest.mark.parametrize("engine", ["functional", "autograd"])
every_model = pytest.mark.parametrize("name", ZOO)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= EXACT * max(1.0, float(expected.abs().max()))


def stacked(gradients: PerExampleGradients) -> Tensor:
    """[N, D] in the order of ravel."""
    return reference.rows(gradients.tree(), gradients.examples)


def of_model(model: Model, **options: Any) -> PerExampleGradients:
    return per_example_gradients(model.model_fn, model.params, model.batch(), **options)


def of_problem(case: Problem, **options: Any) -> PerExampleGradients:
    loss = case.kind.loss(case.reduction)
    return per_example_gradients(case.model_fn, case.params, case.batch, loss=loss, **options)


def brute_force(case: Problem) -> Tensor:
    return reference.gradients(case.model_fn, case.params, case.batch, case.kind.objective)


# --- the gradients ------------------------------------------------------------------------------------------------


@both_engines
@every_model
def test_every_kind_of_layer_is_exact(name: str, engine: str) -> None:
    model = ZOO[name]()
    expected = reference.gradients(model.model_fn, model.params, model.batch(), reference.cross_entropy)
    found = of_model(model, engine=engine)
    assert_close(stacked(found), expected)
    assert_close(reference.rows(found.tree(1, 4), 3), expected[1:4])


@few
@given(kind=st.sampled_from([*KINDS]), reduction=reductions, engine=engines, seed=seeds)
def test_it_is_the_gradient_of_the_unreduced_term_for_every_loss(
    kind: str, reduction: str, engine: str, seed: int
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    case = problem(model, normal(seed, 5, 2, 3), kind, reduction, seed=seed)
    assert_close(stacked(of_problem(case, engine=engine)), brute_force(case))


def test_an_example_whose_targets_are_ignored_has_no_gradient() -> None:
    case = problem(nn.Linear(3, 2), normal(0, 6, 3), "ignored", "mean")
    found = stacked(of_problem(case))
    assert found.any(1).tolist() == [True, False] * 3


@both_engines
def test_padding_does_not_count(engine: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.Tanh(), nn.Linear(3, 2))
    case = problem(model, torch.tensor([[0, 2, 2, 1], [2, 2, 4, 4]]), "cross-entropy", "mean")
    assert_close(stacked(of_problem(case, engine=engine)), brute_force(case))


def both_ways(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """One weight at two depths, in both orientations, with a bias shared by both."""
    hidden = torch.tanh(F.linear(x, params["w"], params["b"]))
    return hidden @ params["w"] + F.linear(x, params["w"], params["b"]).sin()


@both_engines
@pytest.mark.parametrize("positions", [(), (3,)])
def test_uses_of_a_tied_weight_add_up_in_any_orientation(positions: tuple[int, ...], engine: str) -> None:
    shapes = {"w": torch.zeros(3, 3), "b": torch.zeros(3)}
    case = problem(both_ways, normal(1, 4, *positions, 3), "cross-entropy", "mean", params=shapes)
    found = of_problem(case, engine=engine)
    assert_close(stacked(found), brute_force(case))
    [rows] = [block for block in found.blocks.values() if isinstance(block, RowGradients)]
    assert {use.transposed for use in rows.uses} == {True, False}


@both_engines
def test_a_weight_that_does_not_reach_the_outputs_has_zero_gradients(engine: str) -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        _ = x @ p["dead"]
        return x @ p["w"]

    shapes = {"w": torch.zeros(3, 2), "dead": torch.zeros(3, 4)}
    found = of_problem(problem(model_fn, normal(0, 5, 3), "mse", "mean", params=shapes), engine=engine)
    assert not found.tree()["dead"].any()
    assert found.tree()["w"].any()
    assert not found.blocks["dead"].inner(torch.ones(2, 4, 3).double()).any()


# --- rows chosen by values ----------------------------------------------------------------------------------------


@every_pair("form, shape, engine", FORMS, [(9, WIDTH), (4, 3, WIDTH), (1, WIDTH)], ["functional", "autograd"])
def test_rows_that_are_routed_to_experts_go_back_to_their_examples(
    form: str, shape: tuple[int, ...], engine: str
) -> None:
    case = load(form, torch.tanh, "cross-entropy", normal(4, *shape))
    found = of_problem(case, engine=engine)
    assert_close(stacked(found), brute_force(case))
    for gradients in found.blocks.values():
        dense = gradients.dense(0, len(case.batch[0]))
        v = normal(0, 2, *dense.shape[1:])
        assert_close(gradients.inner(v), v.flatten(1) @ dense.flatten(1).mT)


def test_routed_rows_may_be_scaled_and_targets_ignored() -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 2)
        for e in range(3):
            mask = rule(x) == e
            out[mask] = (x[mask] * p[f"s{e}"] + p[f"t{e}"]) @ p["w"]
        return out

    shapes = {f"{kind}{e}": torch.zeros(WIDTH) for kind in "st" for e in range(3)} | {"w": torch.zeros(WIDTH, 2)}
    case = problem(model_fn, normal(3, 9, WIDTH), "ignored", "mean", params=shapes)
    found = of_problem(case)
    assert_close(stacked(found), brute_force(case))
    assert any(isinstance(block, DenseGradients | ElementwiseGradients) for block in found.blocks.values())


# --- transforms, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear on tokens", "layer norm", "embeddings", "tied", "experts"])
def test_they_are_pytrees_that_vmap_maps_over(name: str) -> None:
    model = ZOO[name]()
    inputs, targets = model.batch()
    several = {key: torch.stack([leaf, 2 * leaf]) for key, leaf in model.params.items()}
    plan = cv.plan(model.model_fn, model.params, inputs)
    found = torch.func.vmap(lambda p: per_example_gradients(model.model_fn, p, (inputs, targets), plan=plan))(several)
    for k in range(2):
        one = cv.pytree.tree_map(lambda x, k=k: x[k], found)
        params = {key: leaf[k] for key, leaf in several.items()}
        expected = reference.gradients(model.model_fn, params, (inputs, targets), reference.cross_entropy)
        assert_close(stacked(one), expected)


def test_half_precision_is_summed_in_single() -> None:
    params = {"w": normal(0, 3, 2).bfloat16()}
    found = per_example_gradients(lambda p, x: x @ p["w"], params, (normal(1, 5, 3).bfloat16(), torch.zeros(5).long()))
    assert found.tree()["w"].dtype == torch.float32


def test_what_is_no_batch_is_refused() -> None:
    case = problem(nn.Linear(3, 2), normal(0, 5, 3), "cross-entropy", "mean")
    several: Any = cv.over([case.batch])
    with pytest.raises(ArgumentError, match="those of one batch"):
        per_example_gradients(case.model_fn, case.params, several)
    with pytest.raises(ArgumentError, match="must be a pair"):
        per_example_gradients(case.model_fn, case.params, case.batch[0])
    with pytest.raises(TargetError):
        per_example_gradients(case.model_fn, case.params, (case.batch[0], torch.zeros(5)))
    with pytest.raises(CaptureError, match="softmax"):
        per_example_gradients(lambda p, x: x @ p["weight"].mT.softmax(0), {"weight": torch.zeros(2, 3)}, case.batch)
