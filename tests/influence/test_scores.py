"""Influence scores against brute force: dense matrices, and one example's gradient at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import curvlib as cv
from curvlib.errors import ArgumentError, ShapeError
from curvlib.influence import preconditioning
from curvlib.operators import Inverse
from tests.influence.influence_cases import CASES, EXAMPLES, QUERIES, Case, assert_close, in_batches
from tests.pairwise import every_pair

DAMPING = 0.05
INVERSES: dict[str, Callable[[Case], tuple[Any, Any]]] = {  # the inverse, and the damped curvature
    "kfac": lambda case: both(case.curvature(), DAMPING),
    "kfac reduce": lambda case: both(case.curvature(sharing="reduce"), DAMPING),
    "merged": lambda case: both(case.curvature(tied="merge"), DAMPING),
    "factored": lambda case: both(case.curvature(tied="merge"), cv.FactoredTikhonov(DAMPING)),
    "relative": lambda case: both(case.curvature(), cv.RelativeTikhonov(0.1)),
    "ekfac": lambda case: both(case.curvature(cv.ekfac), DAMPING),
    "whole": lambda case: both(cv.ggn(case.model_fn, case.params, case.train).dense(), 0.5),
}


def both(curv: Any, damping: Any) -> tuple[Any, Any]:
    return curv.inverse(damping), curv.damp(damping)


@functools.cache
def made(name: str, kind: str) -> tuple[Case, Any, Any]:
    """A case, an inverse of its curvature, and the damped curvature."""
    case = case_of(name)
    return (case, *INVERSES[kind](case))


case_of = functools.cache(lambda name: CASES[name]())
scores_of = functools.cache(lambda name, kind: made(name, kind)[0].scores(made(name, kind)[1]))


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum(0)


every_case = pytest.mark.parametrize("name", CASES)
SOME_CASES = ("wide", "positions", "grouped convolution", "embedding", "repeated")
some_cases = pytest.mark.parametrize("name", SOME_CASES)
every_inverse = pytest.mark.parametrize("kind", INVERSES)


@every_inverse
@every_case
def test_scores_are_those_of_the_dense_matrix(name: str, kind: str) -> None:
    case, _, damped = made(name, kind)
    assert_close(scores_of(name, kind), case.brute_force(damped.to_dense()), 1e-8)


@every_inverse
@every_case
def test_self_influence_is_the_diagonal_of_the_scores_of_the_training_data(name: str, kind: str) -> None:
    case, inverse, damped = made(name, kind)
    found = cv.influence.self_influence(inverse, case.model_fn, case.params, case.train)
    expected = Case(case.model_fn, case.params, case.train, case.train).brute_force(damped.to_dense()).diagonal()
    assert_close(found, expected, 1e-8)
    blocks = cv.influence.self_influence(inverse, case.model_fn, case.params, case.train, by_block=True)
    assert_close(total(blocks), found)


@pytest.mark.parametrize("name", ["two layers", "convolution", "tied"])
def test_exact_curvature_is_inverted_by_solving(name: str) -> None:
    case = CASES[name]()
    curv = cv.ggn(case.model_fn, case.params, case.train).damp(0.1)
    rough, expected = case.curvature(tied="merge").inverse(0.1), case.brute_force(curv.to_dense())
    assert_close(case.scores(Inverse(curv, cv.CG(rough, tolerance=1e-12))), expected, 1e-8)
    assert_close(case.scores(lambda v: cv.solve(curv, v, preconditioner=rough, tolerance=1e-12)), expected, 1e-8)
    assert_close(case.scores(curv.inverse()), expected, 1e-6)


# --- how the data is batched -------------------------------------------------------------------------------------


BATCHED = [{}, *({"query_batch": n} for n in (1, 2, 3)), {"aggregate": "queries"}, {"aggregate": "train"}]


@every_pair("name, kind, options", SOME_CASES, ["kfac", "factored"], BATCHED)
def test_scores_do_not_depend_on_how_queries_and_training_data_are_batched(
    name: str, kind: str, options: dict[str, Any]
) -> None:
    case, inverse, _ = made(name, kind)
    queries, train = cv.over(in_batches(case.queries, 1, 2, 1)), cv.over(in_batches(case.train, 3, 1, 1, 2))
    found = cv.influence.scores(inverse, case.model_fn, case.params, queries, train, **options)
    expected = scores_of(name, kind)
    if "aggregate" in options:
        expected = expected.sum(("queries", "train").index(options["aggregate"]))
    assert_close(found, expected)


def test_training_data_is_read_once_for_as_many_queries_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["positions"]()
    inverse = case.curvature().inverse(DAMPING)
    expected, read = case.scores(inverse), []

    class Loader:
        def __iter__(self) -> Any:
            read.append(1)
            yield from in_batches(case.train, 4, 3)

    def readings(**options: Any) -> int:
        read.clear()
        train = cv.over(Loader())
        assert_close(cv.influence.scores(inverse, case.model_fn, case.params, case.queries, train, **options), expected)
        return len(read)

    assert readings() == 1
    assert readings(query_batch=3) == 2
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", 1)
    assert readings() == 1
    monkeypatch.setattr(preconditioning, "HELD", 2 * cv.ravel(case.params).numel())
    assert readings() == 2


def test_training_data_that_can_be_read_once_will_do_for_queries_that_are_held_together() -> None:
    case = CASES["linear"]()
    inverse = case.curvature().inverse(DAMPING)

    def found(**options: Any) -> Any:
        train = cv.over(iter(in_batches(case.train, 4, 3)))
        return cv.influence.scores(inverse, case.model_fn, case.params, case.queries, train, **options)

    assert_close(found(), case.scores(inverse))
    with pytest.raises(ArgumentError, match="read more than once"):
        found(query_batch=2)


def test_the_reduction_of_the_loss_does_not_matter() -> None:
    case = CASES["positions"]()
    inverse = case.curvature().inverse(DAMPING)
    assert_close(case.scores(inverse, loss=cv.CrossEntropy("sum")), case.scores(inverse))
    for aggregate in ("queries", "train"):
        options = {"aggregate": aggregate}
        assert_close(case.scores(inverse, loss=cv.CrossEntropy("sum"), **options), case.scores(inverse, **options))


def test_both_engines_give_the_same_scores() -> None:
    case = CASES["positions"]()
    inverse = case.curvature().inverse(DAMPING)
    for options in ({}, {"aggregate": "queries"}):
        one, two = (case.scores(inverse, engine=engine, **options) for engine in ("functional", "autograd"))
        assert_close(one, two)


# --- what scores are made of -------------------------------------------------------------------------------------


@every_pair("name, kind, aggregate", CASES, INVERSES, [None, "queries", "train"])
def test_what_blocks_contribute_adds_up(name: str, kind: str, aggregate: str | None) -> None:
    case, inverse, _ = made(name, kind)
    expected = scores_of(name, kind)
    parts = case.scores(inverse, by_block=True, aggregate=aggregate)
    assert tuple(parts) == tuple(made(name, "kfac")[2].blocks)
    if aggregate is not None:
        expected = expected.sum(("queries", "train").index(aggregate))
        assert_close(case.scores(inverse, aggregate=aggregate), expected)
    assert_close(total(parts), expected)


@pytest.mark.parametrize("aggregate", ["queries", "train"])
def test_a_blocks_share_of_an_aggregate_is_the_sum_of_its_shares(aggregate: str) -> None:
    case = CASES["embedding"]()
    inverse = case.curvature().inverse(DAMPING)
    summed, parts = case.scores(inverse, by_block=True, aggregate=aggregate), case.scores(inverse, by_block=True)
    assert all(
        torch.allclose(summed[name], part.sum(0 if aggregate == "queries" else 1), rtol=1e-9, atol=1e-12)
        for name, part in parts.items()
    )


@every_inverse
@pytest.mark.parametrize("name", ["positions", "embedding", "tied", "repeated", "norm", "wide on two positions"])
def test_what_positions_contribute_adds_up(name: str, kind: str) -> None:
    case = case_of(name)
    inverse = made(name, kind)[1]
    shares = case.scores(inverse, per_token=True)
    assert shares.shape[:2] == (QUERIES, EXAMPLES)
    assert_close(shares.sum(-1), case.scores(inverse))
    assert_close(case.scores(inverse, per_token=True, aggregate="queries"), shares.sum(0))
    assert_close(total(case.scores(inverse, per_token=True, by_block=True)), shares)


@pytest.mark.parametrize("damping", [0.1, cv.FactoredTikhonov(0.1)])
def test_a_position_contributes_its_own_loss_where_positions_do_not_mix(damping: Any) -> None:
    case = CASES["wide on two positions"]()
    curv = case.curvature()
    shares = case.scores(curv.inverse(damping), per_token=True)
    for t in range(2):
        inputs, targets = case.train
        alone = Case(case.model_fn, case.params, case.queries, (inputs[:, t], targets[:, t]))
        assert_close(shares[..., t], alone.brute_force(curv.damp(damping).to_dense()))


def test_blocks_of_different_lengths_have_their_positions_apart() -> None:
    case = CASES["convolution"]()
    inverse = case.curvature().inverse(DAMPING)
    parts = case.scores(inverse, per_token=True, by_block=True)
    assert {name: part.shape[-1] for name, part in parts.items()} == {"0.weight": 16, "3.weight": 1}
    assert_close(sum(part.sum(-1) for part in parts.values()), case.scores(inverse))
    with pytest.raises(ShapeError, match=r"'0.weight' has 16 positions and block '3.weight' has 1"):
        case.scores(inverse, per_token=True)


def test_batches_of_different_lengths_have_no_scores_by_position() -> None:
    case = CASES["positions"]()
    inverse = case.curvature().inverse(DAMPING)
    longer, (inputs, targets) = case.train, case.train
    train = cv.over([longer, (inputs[:, :2], targets[:, :2])])
    with pytest.raises(ShapeError, match="2, 3 positions"):
        cv.influence.scores(inverse, case.model_fn, case.params, case.queries, train, per_token=True)
    found = cv.influence.scores(inverse, case.model_fn, case.params, case.queries, train)
    assert_close(found[:, :EXAMPLES], case.scores(inverse))


# --- low rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "whole"])
@pytest.mark.parametrize("rank", [1, 3])
def test_query_gradients_of_low_rank_are_the_best_approximations(rank: int, kind: str) -> None:
    case = CASES["wide on two positions"]()
    inverse, damped = INVERSES[kind](case)
    solved = torch.linalg.solve(damped.to_dense(), case.gradients(case.queries).mT).mT  # [Q, bias and weight]
    bias, weight = solved.split([20, 20 * 24], 1)
    vectors = torch.cat([weight.reshape(-1, 20, 24), bias.unsqueeze(-1)], -1)
    left, singular, right = torch.linalg.svd(vectors, full_matrices=False)
    low = (left[..., :rank] * singular[:, None, :rank]) @ right[:, :rank]
    rows = torch.cat([low[..., -1], low[..., :-1].flatten(1)], 1)
    assert_close(case.scores(inverse, query_rank=rank), rows @ case.gradients(case.train).mT, 1e-8)


@every_case
def test_query_gradients_of_full_rank_are_exact(name: str) -> None:
    for kind in ("kfac", "factored"):
        case, inverse, _ = made(name, kind)
        assert_close(case.scores(inverse, query_rank=50), scores_of(name, kind))


@some_cases
def test_low_rank_scores_have_shares_too(name: str) -> None:
    case = CASES[name]()
    inverse = case.curvature().inverse(DAMPING)
    expected = case.scores(inverse, query_rank=2)
    assert_close(total(case.scores(inverse, query_rank=2, by_block=True)), expected)
    if name != "grouped convolution":  # whose layers have different numbers of positions
        assert_close(case.scores(inverse, query_rank=2, per_token=True).sum(-1), expected)


def test_a_kronecker_inverse_takes_m_plus_n_multiplications_a_pair() -> None:
    case = CASES["wide"]()
    m, n, pairs = 10, 13, QUERIES * EXAMPLES
    first = {name: case.params[name] for name in ("0.weight", "0.bias")}
    rest = {name: leaf for name, leaf in case.params.items() if name not in first}
    part = Case(lambda p, x: case.model_fn({**rest, **p}, x), first, case.queries, case.train)
    curv = part.curvature()
    counts = []
    for damping in (0.1, cv.FactoredTikhonov(0.1)):
        inverse = curv.inverse(damping)
        with FlopCounterMode(display=False) as counter:
            part.scores(inverse)
        counts.append(counter.get_total_flops() / 2)
    assert counts[0] - counts[1] >= pairs * (m * n - m - n)
