"""Influence on a convex problem, where training again has one answer: what scores must reach there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import curvlib as cv
from curvlib.influence import evaluate, scores, self_influence
from curvlib.pytree import Tree
from tests.influence.softmax_regression import DECAY, Data, digits, fashion, fashion_folder, fit, query_losses

EXAMPLES, QUERIES = 1000, 200


@dataclass(frozen=True)
class Case:
    """A data set, and the score that scores without curvature must stay below."""

    load: Callable[[int, int], Data]
    without_curvature: float


CASES = [pytest.param(Case(digits, 0.55), id="digits")]
if fashion_folder().exists():
    CASES.append(pytest.param(Case(fashion, 0.4), id="fashion", marks=pytest.mark.slow))


def linear(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
    return inputs @ params["weight"].mT + params["bias"]


def as_params(weights: Tensor) -> dict[str, Tensor]:
    """W [C, d + 1] as a linear layer's parameters."""
    return {"weight": weights[:, :-1].clone(), "bias": weights[:, -1].clone()}


def inverses(data: Data, params: Tree) -> dict[str, cv.Operator]:
    """Inverse curvatures to be compared; weight decay is the damping, exactly."""
    exact = cv.block_diagonal(cv.ggn(linear, params, data.train), {"all": ("weight", "bias")})
    kfac = cv.kfac(linear, params, data.train, fisher="type-2")
    return {
        "exact": exact.inverse(DECAY),
        "kfac": kfac.inverse(DECAY),
        "ekfac": cv.ekfac(linear, params, data.train, fisher="type-2").inverse(DECAY),
        "identity": kfac.map_eigenvalues(torch.ones_like),
    }


@pytest.mark.parametrize("case", CASES)
def test_scores_predict_training_again(case: Case) -> None:
    data = case.load(EXAMPLES, QUERIES)
    halves = evaluate.subsets(EXAMPLES, number=100)
    examples = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(0))[:60]
    one_less = evaluate.without_each(EXAMPLES, examples)
    weights = fit(data, torch.cat([one_less, halves]))
    outputs = query_losses(data, weights)
    params = as_params(weights[0])
    ranking, single, size = {}, {}, {}
    change = (outputs[1:61] - outputs[0]).mT
    for method, inverse in inverses(data, params).items():
        found = scores(inverse, linear, params, data.queries, data.train)
        ranking[method] = float(evaluate.linear_datamodeling_score(found, halves, outputs[61:]).mean)
        single[method] = float(evaluate.leave_one_out(found, one_less, outputs[:61]).mean)
        size[method] = float((found[:, examples] / EXAMPLES - change).norm() / change.norm())
    assert single["exact"] > 0.98
    assert size["exact"] < 0.3  # first order, and with t left out the curvature is smaller too
    assert ranking["exact"] > 0.92
    assert 0.8 < ranking["kfac"] < ranking["exact"]
    assert 0.8 < ranking["ekfac"] < ranking["exact"]
    assert ranking["identity"] < case.without_curvature


def test_examples_that_curvature_calls_helpful_are_missed_most() -> None:
    data = digits(300, 8)

    def train(chosen: Tensor, seed: int) -> Tensor:
        subset = torch.zeros(1, 300, dtype=torch.bool).index_fill(1, chosen, True)
        return query_losses(data, fit(data, subset))[0]

    params = as_params(fit(data, torch.ones(1, 300, dtype=torch.bool))[0])
    change = {}
    for method, inverse in inverses(data, params).items():
        found = scores(inverse, linear, params, data.queries, data.train)
        change[method] = float(evaluate.brittleness(train, found, counts=(10,), random=4).change.mean())
    assert change["identity"] > 0
    assert min(change["exact"], change["kfac"], change["ekfac"]) > 2 * change["identity"]


def test_self_influence_finds_wrong_labels() -> None:
    data = digits(500, 1)
    flipped = torch.arange(500) < 50
    wrong = torch.where(flipped, (data.train[1] + 1 + torch.arange(500) % 9) % 10, data.train[1])
    data = Data((data.train[0], wrong), data.queries)
    params = as_params(fit(data, torch.ones(1, 500, dtype=torch.bool))[0])
    for inverse in inverses(data, params).values():
        found = evaluate.mislabel_detection(self_influence(inverse, linear, params, data.train), flipped)
        assert found.area > 0.98
        assert found.found[50] >= 0.85  # of 500 examples 50 are looked at, and 50 are wrong
        assert found.found[100] >= 0.98
