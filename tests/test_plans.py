"""A model is looked at once for all batches of the same shapes, by whatever is given the same plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness_problems import normal
from torch import Tensor, nn

import curvlib as cv
from curvlib.capture.discover import Discover

DAMPING = cv.FactoredTikhonov(0.1)


@pytest.fixture
def discoveries(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """How many times a call looks at a model."""
    count, original = [0], Discover.__init__

    def counted(self: Discover, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        original(self, *args, **kwargs)

    monkeypatch.setattr(Discover, "__init__", counted)

    def during(call: Callable[[], Any]) -> int:
        before = count[0]
        call()
        return count[0] - before

    return during


Count = Callable[[Callable[[], Any]], int]


def model() -> tuple[Any, Any]:
    return cv.functional(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double())


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(seed, n, 5), torch.arange(n) % 3


def ragged() -> Any:
    return cv.over([data(n, seed) for seed, n in enumerate((4, 4, 3))])


def test_scores_of_many_queries_look_at_the_model_once(discoveries: Count) -> None:
    inverse = cv.ekfac(*model(), data(40)).inverse(0.1)

    def during(**options: Any) -> int:
        return discoveries(lambda: cv.influence.scores(inverse, *model(), data(40), data(40, 1), **options))

    assert during() == during(query_batch=5) == during(aggregate="queries") == during(aggregate="train") == 1
    assert discoveries(lambda: cv.influence.scores(inverse, *model(), ragged(), ragged(), query_batch=2)) == 1
    assert discoveries(lambda: cv.influence.self_influence(inverse, *model(), ragged())) == 1


@pytest.mark.parametrize("given", ["plan", "plans"])
def test_all_of_influence_takes_a_plan(given: str, discoveries: Count, tmp_path: Path) -> None:
    model_fn, params = model()
    curv, train, queries = cv.kfac(model_fn, params, data(40)), data(40), data(6, 1)
    inverse, projection = curv.inverse(DAMPING), curv.power(-0.5, DAMPING).project(cv.EigenSketch(rank=2))
    plan: Any = cv.plan(model_fn, params, train[0]) if given == "plan" else cv.Plans()

    def everything() -> None:
        index = cv.influence.build(tmp_path, projection, model_fn, params, train, plan=plan)
        index.scores(model_fn, params, queries, plan=plan)
        index.top(model_fn, params, queries, k=2, plan=plan)
        cv.influence.scores(inverse, model_fn, params, queries, train, plan=plan)
        cv.influence.self_influence(inverse, model_fn, params, train, plan=plan)
        cv.influence.rerank(
            index, inverse, model_fn, params, queries, k=2, fetch=lambda n: (train[0][n], train[1][n]), plan=plan
        )

    assert discoveries(everything) == (given == "plans")


def test_the_two_stages_of_a_ranking_share_a_plan(discoveries: Count, tmp_path: Path) -> None:
    model_fn, params = model()
    curv, train = cv.kfac(model_fn, params, data(40)), data(40)
    projection = curv.power(-0.5, DAMPING).project(cv.EigenSketch(rank=2))
    index = cv.influence.build(tmp_path, projection, model_fn, params, train)
    ranked = discoveries(
        lambda: cv.influence.rerank(
            index, curv.inverse(DAMPING), model_fn, params, ragged(), k=2, fetch=lambda n: (train[0][n], train[1][n])
        )
    )
    assert ranked == 1


def test_estimators_look_at_a_model_once_a_data_set(discoveries: Count) -> None:
    estimators: tuple[Any, ...] = (cv.kfac, cv.ekfac, cv.tkfac, cv.diagonal, cv.shampoo, cv.kl_shampoo, cv.dykaf)
    for estimate in estimators:
        assert discoveries(lambda estimate=estimate: estimate(*model(), ragged())) == 1
        plan = cv.plan(*model(), data(3)[0])
        assert discoveries(lambda estimate=estimate, plan=plan: estimate(*model(), ragged(), plan=plan)) == 0
        plans = cv.Plans()
        for _ in range(2):
            discoveries(lambda estimate=estimate, plans=plans: estimate(*model(), ragged(), plan=plans))
        assert repr(plans) == "Plans(1)"


def test_the_gradient_of_an_objective_needs_no_plan(discoveries: Count) -> None:
    """Blocks are those of the first batch; others of other shapes need no plan of their own."""

    def mean(params: Any, x: Tensor) -> Tensor:
        return (x @ params["w"]).mean(1)

    params = {"w": normal(0, 4, 3)}
    batches = cv.over([(normal(seed, 3, length, 4), torch.zeros(3).long()) for seed, length in enumerate((2, 5, 6))])
    assert discoveries(lambda: cv.shampoo(mean, params, batches)) == 1
    assert discoveries(lambda: cv.kfac(mean, params, batches)) == 3


def test_plans_are_made_for_shapes_and_dtypes(discoveries: Count) -> None:
    model_fn, params = model()
    single = cv.pytree.tree_map(Tensor.float, params)
    plans = cv.Plans()

    def asked(given: Any, inputs: Tensor) -> int:
        return discoveries(lambda: plans.fitting(model_fn, given, inputs))

    assert asked(params, data(4)[0]) == 1
    assert asked(params, data(9)[0]) == 0
    assert asked(cv.pytree.tree_map(torch.neg, params), data(4)[0]) == 0
    assert asked(params, normal(0, 4, 2, 5)) == 1
    assert asked(single, data(4)[0].float()) == 1
    assert repr(plans) == "Plans(3)"
