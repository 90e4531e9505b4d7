"""Several vectors an example, pulled back to its parameters: Jacobians and roots of the GGN, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from exactness_problems import KINDS, few, normal, problem, reductions, seeds
from hypothesis import given
from hypothesis import strategies as st
from layer_zoo import ZOO
from test_experts import FORMS, WIDTH, load
from test_per_example import assert_close, both_engines, every_model, of_problem, stacked
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError, PytreeError
from curvlib.gradients import block_gradients
from curvlib.gradients.block_gradients import ElementwiseGradients, RowGradients
from curvlib.operators import EigenSketch

both_memories = pytest.mark.parametrize("memory", [1 << 23, 1])


def jacobians(name: str, **options: Any) -> cv.PerExampleGradients:
    """Outputs' Jacobians of a model; the loss and the targets play no part."""
    model = ZOO[name]()
    return cv.per_example_gradients(model.model_fn, model.params, (model.inputs, None), vectors="outputs", **options)


def raveled(gradients: cv.PerExampleGradients) -> Tensor:
    """[N, K, D] in the order of ravel."""
    assert gradients.vectors is not None
    flat = cv.pytree.tree_map(lambda leaf: leaf.flatten(0, 1), gradients.tree())
    return reference.rows(flat, len(gradients) * gradients.vectors).unflatten(0, (len(gradients), gradients.vectors))


# --- what is pulled back ------------------------------------------------------------------------------------------


@both_engines
@every_model
def test_outputs_are_the_jacobian_of_every_example(name: str, engine: str) -> None:
    model = ZOO[name]()
    expected = reference.jacobians(model.model_fn, model.params, model.inputs)
    assert_close(raveled(jacobians(name, engine=engine)), expected)


@few
@given(kind=st.sampled_from([*KINDS]), reduction=reductions, seed=seeds)
def test_type_2_vectors_are_roots_of_every_examples_ggn(kind: str, reduction: str, seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    case = problem(model, normal(seed, 4, 2, 3), kind, reduction, seed=seed)
    roots = raveled(of_problem(case, vectors="type-2"))
    for n, root in enumerate(roots):
        one = reference.example(case.batch, n)
        assert_close(root.mT @ root, reference.ggn(case.model_fn, case.params, one, case.kind.objective, "sum"))


@both_engines
@pytest.mark.parametrize("vectors", ["outputs", "type-2"])
@pytest.mark.parametrize("name", ["layer norm", "conv2d with groups", "embeddings", "tied", "experts", "slices"])
def test_vectors_that_are_pulled_back_one_by_one_are_the_same(
    name: str, vectors: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ZOO[name]()
    arguments = model.model_fn, model.params, model.batch()
    expected = raveled(cv.per_example_gradients(*arguments, vectors=vectors))
    monkeypatch.setattr("curvlib.capture.engines.ELEMENTS_AT_ONCE", 1)
    assert_close(raveled(cv.per_example_gradients(*arguments, vectors=vectors, engine=engine)), expected)


@both_engines
@pytest.mark.parametrize("form", FORMS)
def test_jacobians_of_routed_rows_go_back_to_their_examples(form: str, engine: str) -> None:
    case = load(form, torch.tanh, "cross-entropy", normal(4, 5, 3, WIDTH))
    found = cv.per_example_gradients(case.model_fn, case.params, case.batch, vectors="outputs", engine=engine)
    assert_close(raveled(found), reference.jacobians(case.model_fn, case.params, case.batch[0]))


def test_a_weight_that_does_not_reach_the_outputs_has_a_jacobian_of_zeros() -> None:
    params = {"w": normal(0, 3, 2), "dead": normal(1, 3, 4)}

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        _ = x @ p["dead"]
        return x @ p["w"]

    found = cv.per_example_gradients(model_fn, params, (normal(2, 5, 3), None), vectors="outputs").tree()
    assert found["dead"].shape == (5, 2, 3, 4)
    assert not found["dead"].any()
    assert found["w"].any()


# --- what is made of them -----------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize("rows", [True, False, None])
@every_model
def test_products_have_an_axis_for_the_vectors(
    name: str, rows: bool | None, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", memory)
    if rows is not None:
        for choice in ("inner_by_rows", "projected_by_rows", "norms_by_rows"):
            monkeypatch.setattr(block_gradients, choice, lambda *_: rows)
    for gradients in jacobians(name).blocks.values():
        dense = gradients.dense(0, 5)
        vectors = normal(1, 3, *dense.shape[2:])
        products = torch.einsum("qd,nkd->qnk", vectors.flatten(1), dense.flatten(2))
        assert_close(gradients.inner(vectors), products)
        assert_close(gradients.position_inner(vectors).sum(-1), products)
        assert_close(gradients.squared_norms(), dense.square().flatten(2).sum(2))
        if not isinstance(gradients, ElementwiseGradients):
            *groups, m, n = dense.shape[2:]
            left, right = normal(1, *groups, 2, m), normal(2, *groups, 3, n)
            assert_close(gradients.projected(left, right), left @ dense @ right.mT)


@both_memories
@pytest.mark.parametrize("vectors", ["gradient", "outputs"])
@every_model
def test_norms_grams_and_inner_products_are_those_of_whole_gradients(
    name: str, vectors: Any, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", memory)
    model = ZOO[name]()
    found = cv.per_example_gradients(model.model_fn, model.params, model.batch(), vectors=vectors)
    dense = stacked(found) if found.vectors is None else raveled(found)
    assert_close(found.norms(), dense.norm(dim=-1))
    assert_close(found.gram(), torch.tensordot(dense, dense, ([-1], [-1])))
    part = cv.pytree.tree_map(lambda leaf: leaf[1:3] if vectors == "gradient" else leaf[1:3, 0], found.tree())
    products = torch.tensordot(reference.rows(part, 2), dense, ([-1], [-1]))
    assert_close(found.inner(part), products)


def test_gradients_of_two_batches_have_a_gram_matrix_too() -> None:
    case = problem(nn.Linear(3, 2), normal(0, 6, 3), "cross-entropy", "mean")
    halves = [tuple(tensor[i : i + 3] for tensor in case.batch) for i in (0, 3)]
    one, two = (cv.per_example_gradients(case.model_fn, case.params, half) for half in halves)
    several = cv.per_example_gradients(case.model_fn, case.params, halves[1], vectors="outputs")
    assert_close(one.gram(two), stacked(one) @ stacked(two).mT)
    assert_close(one.gram(several), torch.einsum("nd,mkd->nmk", stacked(one), raveled(several)))
    other = cv.per_example_gradients(lambda p, x: x @ p["w"], {"w": normal(0, 3, 2)}, halves[0])
    with pytest.raises(PytreeError, match="other shapes"):
        one.gram(other)


@pytest.mark.parametrize("name", ["linear on tokens", "conv2d with groups", "embeddings", "layer norm", "experts"])
def test_a_projection_keeps_the_axis_of_vectors(name: str) -> None:
    model = ZOO[name]()
    curvatures = [
        cv.kfac(model.model_fn, model.params, model.batch(), fisher="type-2"),
        cv.diagonal(model.model_fn, model.params, model.batch()),
    ]
    for curv in curvatures:
        projection = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(EigenSketch(rank=2))
        found = projection(jacobians(name))
        for n, rows in enumerate(raveled(jacobians(name))):
            for k, row in enumerate(rows):
                for block, expected in projection(cv.unravel(row, model.params)).items():
                    assert_close(found[block][n, k], expected)


def test_predictive_covariances_are_products_of_projections() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    case = problem(model, normal(0, 9, 5), "cross-entropy", "mean")
    curv = cv.ekfac(case.model_fn, case.params, case.batch, fisher="type-2")
    projection = curv.power(-0.5, 0.1).project(EigenSketch(rank=16))
    found = projection(cv.per_example_gradients(case.model_fn, case.params, case.batch, vectors="outputs"))
    roots = torch.cat([part.flatten(2) for part in found.values()], 2)
    rows = reference.jacobians(case.model_fn, case.params, case.batch[0])
    assert_close(roots @ roots.mT, rows @ curv.inverse(0.1).to_dense() @ rows.mT)


# --- the object ---------------------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize("vectors", ["gradient", "outputs"])
def test_iteration_gives_the_gradient_of_each_example(
    vectors: Any, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", memory)
    model = ZOO["layer norm"]()
    found = cv.per_example_gradients(model.model_fn, model.params, model.batch(), vectors=vectors)
    each, whole = list(found), found.tree()
    assert len(each) == len(found) == 5
    for n, gradient in enumerate(each):
        for key, leaf in gradient.items():
            assert torch.equal(leaf, whole[key][n])


def test_no_gradient_of_a_weight_is_formed_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def formed(*_: Any) -> Any:
        raise AssertionError("a gradient is formed")

    monkeypatch.setattr("curvlib.layers.rows.DenseRows.gradients", formed)
    found = jacobians("linear")
    assert all(isinstance(block, RowGradients) for block in found.blocks.values())
    assert found.norms().shape == (5, 2)
    with pytest.raises(AssertionError, match="is formed"):
        found.tree()


def test_they_are_printed_by_their_shapes() -> None:
    shapes = "0.weight [4, 4], 2.weight [2, 5]"
    assert repr(jacobians("linear")) == f"PerExampleGradients(5 examples, 2 vectors each; {shapes})"


def test_vectors_that_are_not_documented_are_refused() -> None:
    model = ZOO["linear"]()
    wrong: Any = "mc"
    with pytest.raises(ArgumentError, match="vectors must be one of gradient, type-2, outputs, got 'mc'"):
        cv.per_example_gradients(model.model_fn, model.params, model.batch(), vectors=wrong)
