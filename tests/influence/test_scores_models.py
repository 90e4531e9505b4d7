"""Influence in models as people have them, what is measured on queries, errors, and bugs that others had."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError, CaptureError, EmptyBatchError, PytreeError
from tests.influence.influence_cases import CASES, Case, assert_close, generator, normal, tokens

DAMPING = 0.05
IGNORED = -100


class LanguageModel(nn.Module):
    """One head of causal attention that leaves padding out, on a dictionary of tokens and mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.project, self.head = nn.Embedding(7, 4), nn.Linear(4, 12), nn.Linear(4, 7)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x, length = self.table(batch["input_ids"]), batch["input_ids"].shape[1]
        q, k, v = self.project(x).chunk(3, -1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = causal & batch["attention_mask"].bool().unsqueeze(1)
        weights = (q @ k.mT).masked_fill(~seen, -1e9).softmax(-1)
        return self.head(torch.tanh(x + weights @ v))


def padded(lengths: list[int], seed: int, width: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    """Texts of these lengths, padded on the right; the labels are the next tokens, and none at the end."""
    text = tokens(7, width)(len(lengths), seed)
    keep = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    labels = torch.where(keep.roll(-1, 1) & (torch.arange(width) < width - 1), text.roll(-1, 1), IGNORED)
    return {"input_ids": torch.where(keep, text, 0), "attention_mask": keep.long()}, labels


def language_model() -> Case:
    model_fn, params = cv.functional(LanguageModel().double())
    params = {name: 0.8 * normal(i, *leaf.shape) for i, (name, leaf) in enumerate(params.items())}
    return Case(model_fn, params, padded([5, 3, 2], 1), padded([4, 5, 2, 3, 5, 1], 2))


def cut(batch: tuple[dict[str, Tensor], Tensor], n: int, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """Example n without its padding."""
    inputs, labels = batch
    return {name: x[n : n + 1, :length] for name, x in inputs.items()}, labels[n : n + 1, :length]


# --- models ------------------------------------------------------------------------------------------------------


def test_a_language_model_takes_dictionaries() -> None:
    case = language_model()
    for curv in (case.curvature(), case.curvature(cv.ekfac)):
        assert_close(case.scores(curv.inverse(DAMPING)), case.brute_force(curv.damp(DAMPING).to_dense()), 1e-8)


def test_padding_does_not_count() -> None:
    case = language_model()
    inverse = case.curvature(cv.ekfac).inverse(DAMPING)
    found = case.scores(inverse)
    shares = case.scores(inverse, per_token=True)
    for n, length in enumerate([4, 5, 2, 3, 5]):
        alone = cut(case.train, n, length)
        expected = cv.influence.scores(inverse, case.model_fn, case.params, case.queries, alone)
        assert_close(found[:, n : n + 1], expected)
        assert shares[:, n, length:].norm() <= 1e-14 * shares.norm()


def test_an_example_without_a_target_has_no_influence() -> None:
    case = language_model()  # the last text has one token, and so none to be predicted
    inverse = case.curvature().inverse(DAMPING)
    assert torch.equal(case.scores(inverse)[:, -1], torch.zeros(3, dtype=torch.float64))
    assert cv.influence.self_influence(inverse, case.model_fn, case.params, case.train)[-1] == 0


def test_frozen_parameters_are_closed_over() -> None:
    case = CASES["two layers"]()
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    module.load_state_dict(case.params)
    module[0].requires_grad_(False)
    model_fn, params = cv.functional(module)
    part = dataclasses.replace(case, model_fn=model_fn, params=params)
    assert set(params) == {"2.weight", "2.bias"}
    curv = part.curvature()
    assert_close(part.scores(curv.inverse(DAMPING)), part.brute_force(curv.damp(DAMPING).to_dense()), 1e-8)
    whole = case.scores(case.curvature().inverse(DAMPING), by_block=True)
    assert_close(part.scores(curv.inverse(DAMPING)), whole["2.weight"])


def test_adapters_alone_have_influence() -> None:
    base = {"weight": normal(1, 3, 5), "head": normal(2, 2, 3)}

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = x @ base["weight"].T + (x @ p["down"].T) @ p["up"].T
        return torch.tanh(hidden) @ base["head"].T

    params = {"down": normal(3, 2, 5), "up": normal(4, 3, 2)}
    batches = [(normal(n, n, 4, 5), torch.randint(2, (n, 4), generator=generator(n))) for n in (3, 6)]
    case = Case(model_fn, params, *batches)
    for curv in (case.curvature(), case.curvature(cv.ekfac), case.curvature(cv.tkfac)):
        assert_close(case.scores(curv.inverse(DAMPING)), case.brute_force(curv.damp(DAMPING).to_dense()), 1e-8)


# --- what is measured --------------------------------------------------------------------------------------------


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    p = outputs.softmax(-1).gather(-1, targets.unsqueeze(-1))
    return (p / (1 - p)).log().sum()


def target_logit(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.gather(-1, targets.unsqueeze(-1)).sum()


def wavy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.sin() * outputs.flip(-1)).flatten(1).sum(1)


MEASUREMENTS = {
    "margin": (cv.influence.margin, margin),
    "target logit": (cv.influence.target_logit, target_logit),
    "neither convex nor concave": (wavy, lambda outputs, targets: wavy(outputs, targets).sum()),
}


@pytest.mark.parametrize("name", ["two layers", "positions"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_any_function_may_be_measured_on_queries(measurement: str, name: str) -> None:
    case = CASES[name]()
    function, term = MEASUREMENTS[measurement]
    curv = case.curvature()
    inverse, expected = curv.inverse(DAMPING), case.brute_force(curv.damp(DAMPING).to_dense(), term)
    measured = cv.CustomLoss(function)
    assert_close(case.scores(inverse, measurement=measured), expected, 1e-8)
    assert_close(case.scores(inverse, measurement=measured, aggregate="queries"), expected.sum(0), 1e-8)
    assert_close(case.scores(inverse, measurement=measured, aggregate="train"), expected.sum(1), 1e-8)


@pytest.mark.parametrize("function", [cv.influence.margin, cv.influence.target_logit])
def test_measurements_leave_out_positions_without_a_target(function: Any) -> None:
    outputs, targets = normal(1, 2, 3, 4), torch.tensor([[1, IGNORED, 3], [IGNORED, IGNORED, IGNORED]])
    found = function(outputs, targets)
    assert_close(found[:1], function(outputs[:1, ::2], targets[:1, ::2]))
    assert found[1] == 0
    gradient = cv.CustomLoss(function).gradient(outputs, targets)
    assert torch.equal(gradient.abs().sum(-1) > 0, targets != IGNORED)


def test_a_helpful_example_has_a_positive_score_of_the_loss_and_a_negative_one_of_the_margin() -> None:
    case = CASES["linear"]()
    same = dataclasses.replace(case, queries=case.train)
    inverse = case.curvature().inverse(DAMPING)
    assert (same.scores(inverse).diagonal() > 0).all()
    assert (same.scores(inverse, measurement=cv.CustomLoss(cv.influence.margin)).diagonal() < 0).all()


# --- bugs that others had ----------------------------------------------------------------------------------------


def test_gradients_are_rotated_by_the_eigenbasis_and_not_by_its_transpose() -> None:
    case = CASES["two layers"]()
    curv = case.curvature(cv.ekfac)
    expected = case.brute_force(curv.damp(DAMPING).to_dense())
    transposed = curv.map_blocks(lambda x: cv.EigenKronecker(turned(x.left), turned(x.right), x.values))
    assert_close(case.scores(curv.inverse(DAMPING)), expected, 1e-8)
    assert float((case.scores(transposed.inverse(DAMPING)) - expected).norm() / expected.norm()) > 0.1


def turned(basis: Any) -> Any:
    return type(basis)(basis.vectors.mT)


def test_the_bias_is_the_last_column() -> None:
    """A curvature that tells the bias apart from the weights gives each its own share."""
    case = CASES["linear"]()
    (inputs, targets), (asked, answers) = case.train, case.queries
    weights = torch.tensor([1.0, 2, 3, 4, 50], dtype=torch.float64)
    side = cv.Diagonal(weights)
    curv = case.curvature().map_blocks(lambda block: cv.Kronecker(cv.Dense(torch.eye(3, dtype=torch.float64)), side))
    pairs = [
        (F.pad(x, (0, 1), value=1.0), case.model_fn(case.params, x).softmax(-1) - F.one_hot(y, 3))
        for x, y in ((asked, answers), (inputs, targets))
    ]
    (a_q, g_q), (a_t, g_t) = pairs
    assert_close(case.scores(curv.inverse()), (g_q @ g_t.T) * ((a_q / weights) @ a_t.T))


def test_every_module_has_its_own_damping() -> None:
    case = CASES["two layers"]()
    scaled = case.curvature()
    scaled = cv.BlockDiagonal(
        {name: block * (1e4 if name == "0.weight" else 1.0) for name, block in scaled.blocks.items()},
        scaled.layouts,
        scaled.domain,
    )
    found = case.scores(scaled.inverse(cv.RelativeTikhonov(0.1)), by_block=True)
    expected = case.scores(case.curvature().inverse(cv.RelativeTikhonov(0.1)), by_block=True)
    assert_close(found["0.weight"], expected["0.weight"] / 1e4)
    assert_close(found["2.weight"], expected["2.weight"])


# --- errors ------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], match: str | None, case: Case, inverse: Any, **options: Any) -> None:
    with pytest.raises(error, match=match):
        case.scores(inverse, **options)


def test_an_inverse_of_other_parameters_is_refused_by_name() -> None:
    case, other = CASES["linear"](), CASES["two layers"]()
    message = r"'0.bias' \(\(5,\) in curv_inverse, missing in params\).*'bias' \(missing in curv_inverse, \(3,\) in"
    refused(PytreeError, message, case, other.curvature().inverse(DAMPING))
    with pytest.raises(PytreeError, match="curv_inverse does not act on vectors like params"):
        cv.influence.self_influence(other.curvature().inverse(DAMPING), case.model_fn, case.params, case.train)
    refused(ArgumentError, "an operator such as", case, torch.eye(15))
    refused(PytreeError, "'bias' is missing", case, lambda v: {"weight": v["weight"]})


def test_no_query_and_no_training_example_are_refused() -> None:
    case = CASES["linear"]()
    inverse = case.curvature().inverse(DAMPING)
    empty = (case.train[0][:0], case.train[1][:0])
    for nothing in (empty, cv.over([])):
        for options in ({}, {"aggregate": "queries"}, {"aggregate": "train"}):
            for data in ("queries", "train"):
                refused(EmptyBatchError, None, dataclasses.replace(case, **{data: nothing}), inverse, **options)
        with pytest.raises(EmptyBatchError):
            cv.influence.self_influence(inverse, case.model_fn, case.params, nothing)


def test_arguments_that_make_no_sense_are_refused() -> None:
    case = CASES["positions"]()
    inverse = case.curvature().inverse(DAMPING)
    for name in ("query_batch", "query_rank"):
        refused(ArgumentError, f"{name} must be at least 1, got 0", case, inverse, **{name: 0})
        refused(ArgumentError, "no meaning with aggregate", case, inverse, **{name: 1}, aggregate="queries")
    refused(ArgumentError, "'queries', 'train' or None, got 'both'", case, inverse, aggregate="both")
    refused(ArgumentError, "per_token", case, inverse, aggregate="train", per_token=True)


def test_a_model_that_uses_parameters_in_another_way_on_queries_is_refused() -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        parts = [p["w"]] if x.ndim == 2 else [p["w"][:, :1], p["w"][:, 1:]]
        return torch.cat([x @ part for part in parts], -1).reshape(len(x), -1)

    targets = torch.tensor([0, 1])
    case = Case(model_fn, {"w": normal(1, 3, 3)}, (normal(2, 2, 3), targets), (normal(3, 2, 4, 3), targets))
    with pytest.raises(CaptureError, match="do not use the parameters in the same way"):
        case.scores(lambda v: v)


def test_nothing_given_is_changed() -> None:
    case = CASES["positions"]()
    inverse = case.curvature().inverse(DAMPING)
    before = [x.clone() for x in (*case.params.values(), *case.queries, *case.train)]
    state = torch.get_rng_state()
    for options in ({}, {"aggregate": "train"}, {"query_rank": 1}, {"per_token": True}):
        assert not case.scores(inverse, **options).requires_grad
    after = [*case.params.values(), *case.queries, *case.train]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
