"""The diagonal of the GGN and of the Fisher, against the diagonal of brute force."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import KINDS, engines, few, generator, normal, problem, reductions, seeds
from hypothesis import given
from hypothesis import strategies as st
from layer_zoo import ZOO
from pairwise import every_pair
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError
from curvlib.estimators import diagonal as diagonal_function
from curvlib.estimators import fisher as matrix_free_fisher

EXACT = 1e-10
both_engines = pytest.mark.parametrize("engine", ["functional", "autograd"])


def diagonal(*arguments: Any, **options: Any) -> Tensor:
    """The diagonal as a vector; it must consist of diagonal blocks."""
    curv = diagonal_function(*arguments, **options)
    assert all(isinstance(block, cv.Diagonal) for block in curv.blocks.values())
    return cv.ravel(curv.diag())


def assert_close(estimate: Tensor, truth: Tensor) -> None:
    assert reference.relative_error(estimate, truth) <= EXACT


def drawn(model: Any, batch: Any, vectors: Tensor) -> Tensor:
    """The diagonal of the sum over examples and draws of g g^T, g = J_n^T s_nm, unreduced."""
    jacobians = reference.jacobians(model.model_fn, model.params, batch[0])  # [N, K, D]
    return torch.einsum("nkd,mnk->mnd", jacobians, vectors.flatten(2)).square().sum((0, 1))


@both_engines
@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_layer_is_exact_for_every_fisher(name: str, engine: str) -> None:
    model = ZOO[name]()
    batch = model.batch()
    arguments = (model.model_fn, model.params, batch)
    exact = reference.ggn(*arguments, reference.cross_entropy, "mean").diagonal()
    assert_close(diagonal(*arguments, engine=engine), exact)
    empirical = reference.empirical_fisher(*arguments, reference.cross_entropy, "mean").diagonal()
    assert_close(diagonal(*arguments, fisher="empirical", engine=engine), empirical)
    outputs = model.model_fn(model.params, model.inputs)
    vectors = cv.CrossEntropy().sample(outputs, batch[1], generator(5), 3)
    options: dict[str, Any] = {"fisher": "mc", "mc_samples": 3, "generator": generator(5)}
    truth = drawn(model, batch, vectors) / reference.divisor(outputs, batch[1], reference.cross_entropy, "mean")
    assert_close(diagonal(*arguments, **options, engine=engine), truth)


@few
@given(kind=st.sampled_from([*KINDS]), reduction=reductions, engine=engines, seed=seeds)
def test_every_loss_and_reduction_is_exact(kind: str, reduction: str, engine: str, seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    case = problem(model, normal(seed, 5, 2, 3), kind, reduction, seed=seed)
    loss = case.kind.loss(reduction)
    arguments = (case.model_fn, case.params, case.batch)
    assert_close(diagonal(*arguments, loss=loss, engine=engine), case.ggn().diagonal())
    empirical = case.empirical_fisher().diagonal()
    assert_close(diagonal(*arguments, loss=loss, engine=engine, fisher="empirical"), empirical)


def both_ways(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """One weight at two depths, in both orientations, with a bias shared by both."""
    hidden = torch.tanh(F.linear(x, params["w"], params["b"]))
    return hidden @ params["w"] + F.linear(x, params["w"], params["b"]).sin()


@every_pair("positions, fisher, engine", [(), (3,)], ["type-2", "empirical"], ["functional", "autograd"])
def test_the_gradients_of_a_tied_weights_uses_add_up_before_they_are_squared(
    positions: tuple[int, ...], fisher: str, engine: str
) -> None:
    shapes = {"w": torch.zeros(3, 3), "b": torch.zeros(3)}
    case = problem(both_ways, normal(1, 4, *positions, 3), "cross-entropy", "mean", params=shapes)
    truth = case.ggn() if fisher == "type-2" else case.empirical_fisher()
    result = diagonal(case.model_fn, case.params, case.batch, fisher=fisher, engine=engine)
    assert_close(result, truth.diagonal())


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_it_does_not_depend_on_how_memory_is_cut(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors pulled back one by one, and gradients formed one by one."""
    model = ZOO["tied"]()
    whole = diagonal(model.model_fn, model.params, model.batch(), fisher=fisher)
    monkeypatch.setattr("curvlib.capture.engines.ELEMENTS_AT_ONCE", 1)
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", 1)
    assert_close(diagonal(model.model_fn, model.params, model.batch(), fisher=fisher), whole)


@both_engines
def test_padding_does_not_count(engine: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.Tanh(), nn.Linear(3, 2))
    case = problem(model, torch.tensor([[0, 2, 2, 1], [2, 2, 4, 4]]), "cross-entropy", "mean")
    result = diagonal(case.model_fn, case.params, case.batch, engine=engine)
    assert_close(result, case.ggn().diagonal())
    table = cv.unravel(result, case.params)["0.weight"]
    assert table.sum(1).eq(0).tolist() == [False, False, True, True, False]  # 2 is padding, 3 does not occur


@few
@given(reduction=reductions, seed=seeds)
def test_a_data_set_gives_what_one_batch_gives(reduction: str, seed: int) -> None:
    case = problem(nn.Linear(3, 2), normal(seed, 5, 3), "cross-entropy", reduction, seed=seed)
    inputs, targets = case.batch
    data = cv.over([(inputs[:3], targets[:3]), (inputs[3:], targets[3:])])
    loss = case.kind.loss(reduction)
    assert_close(diagonal(case.model_fn, case.params, data, loss=loss), case.ggn().diagonal())


def test_it_draws_what_the_matrix_free_fisher_draws() -> None:
    case = problem(nn.Linear(3, 2), normal(1, 5, 3), "cross-entropy", "mean")
    arguments = (case.model_fn, case.params, case.batch)
    curv = matrix_free_fisher(*arguments, fisher="mc", mc_samples=2, generator=generator(9))
    result = diagonal(*arguments, fisher="mc", mc_samples=2, generator=generator(9))
    assert_close(result, curv.to_dense().diagonal())


def test_a_layer_that_no_vector_reaches_has_a_zero_block() -> None:
    params = {"v": normal(0, 3, 2), "w": normal(1, 3, 2)}

    def model_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ params["w"] + (x @ params["v"]).detach()

    for engine in ("functional", "autograd"):
        result = diagonal(model_fn, params, (normal(2, 4, 3), normal(3, 4, 2)), loss=cv.MSE(), engine=engine)
        assert result[:6].abs().max() == 0
        assert result[6:].min() > 0


def test_it_works_under_vmap_over_parameters() -> None:
    model = ZOO["linear on tokens"]()
    stack = {name: torch.stack([leaf, 2 * leaf]) for name, leaf in model.params.items()}
    batch = model.batch()
    batched = torch.func.vmap(lambda p: diagonal(model.model_fn, p, batch))(stack)
    one_by_one = [diagonal(model.model_fn, reference.example_of(stack, k), batch) for k in range(2)]
    assert_close(batched, torch.stack(one_by_one))


def test_forward_only_and_unknown_fishers_are_refused() -> None:
    model = ZOO["linear"]()
    with pytest.raises(ArgumentError, match="fisher must be one of type-2, mc, empirical"):
        diagonal(model.model_fn, model.params, model.batch(), fisher="forward-only")
