"""A block as in Mixtral, two experts a token and a router that is trained; and what is refused of routed experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import KINDS, Problem, assert_exact, normal, problem
from layer_zoo import Params
from torch import Tensor

import curvlib as cv

EXPERTS, WIDTH = 3, 3
Expert = Callable[[int, Tensor], Tensor]
every_engine = pytest.mark.parametrize("engine", ["functional", "autograd"])


def blend(p: Params, x: Tensor, mix: Callable[..., Tensor]) -> Tensor:
    """Router, gates of the two best experts, gated experts with stacked weights; inputs [N, T, d]."""
    rows = x.reshape(-1, WIDTH)
    gates, chosen = F.linear(rows, p["router.weight"]).softmax(-1).topk(2, -1)
    gates = gates / gates.sum(-1, keepdim=True)

    def expert(e: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, p["up.weight"][e]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, p["down.weight"][e])

    return mix(rows, gates, chosen, expert).reshape(x.shape) @ p["head.weight"].T


def over_experts(rows: Tensor, gates: Tensor, chosen: Tensor, expert: Expert) -> Tensor:
    out, expert_mask = torch.zeros_like(rows), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for hit in torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(expert_mask[hit[0]])
        out.index_add_(0, token, expert(int(hit), rows[token]) * gates[token, slot, None])
    return out


def over_slots_and_experts(rows: Tensor, gates: Tensor, chosen: Tensor, expert: Expert) -> Tensor:
    """The same function: an expert is called once for each slot."""
    out = torch.zeros_like(rows)
    for slot in range(2):
        for e in range(EXPERTS):
            mask = chosen[:, slot] == e
            if mask.any():
                out[mask] += gates[mask, slot].unsqueeze(1) * expert(e, rows[mask])
    return out


STACKED = {"router.weight": (3, 3), "up.weight": (3, 8, 3), "down.weight": (3, 3, 4), "head.weight": (2, 3)}
every_mix = pytest.mark.parametrize("mix", [over_experts, over_slots_and_experts])


def mixtral(mix: Callable[..., Tensor], x: Tensor) -> Problem:
    zeros = {name: torch.zeros(shape) for name, shape in STACKED.items()}
    return problem(lambda p, x: blend(p, x, mix), x, "cross-entropy", "mean", params=zeros, seed=1)


@every_mix
@every_engine
def test_kfac_of_a_mixtral_block_is_exact_for_one_token(mix: Callable[..., Tensor], engine: str) -> None:
    found = mixtral(mix, normal(3, 1, 1, WIDTH))
    assert_exact(found.kfac(engine=engine), found.blocks(found.ggn(), groups={"up": 3, "down": 3}))


def test_it_makes_no_difference_with_which_call_a_row_comes_to_an_expert() -> None:
    one, other = (mixtral(mix, normal(4, 3, 4, WIDTH)) for mix in (over_experts, over_slots_and_experts))
    for options in ({}, {"tied": "merge"}):
        torch.testing.assert_close(one.kfac(**options).to_dense(), other.kfac(**options).to_dense(), rtol=1e-10, atol=0)
    x, targets = other.batch
    pieces = cv.over([(x[:1], targets[:1]), (x[1:], targets[1:])])
    batched = cv.kfac(other.model_fn, other.params, pieces, fisher="type-2")
    torch.testing.assert_close(batched.to_dense(), one.kfac().to_dense(), rtol=1e-10, atol=1e-15)
    corrected = cv.ekfac(other.model_fn, other.params, other.batch, fisher="type-2", correction="position")
    torch.testing.assert_close(corrected.trace(), other.ggn().trace(), rtol=1e-11, atol=0)


@every_mix
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_exact_operators_go_through_routed_experts(mix: Callable[..., Tensor], mode: str) -> None:
    found = mixtral(mix, normal(4, 3, 2, WIDTH))
    vector = {name: normal(i, *leaf.shape) for i, (name, leaf) in enumerate(found.params.items())}
    exact = {
        "ggn": (cv.ggn(found.model_fn, found.params, found.batch, mode=mode), found.ggn()),
        "hessian": (cv.hessian(found.model_fn, found.params, found.batch, mode=mode), hessian(found)),
        "fisher": (
            cv.fisher(found.model_fn, found.params, found.batch, fisher="type-2", mode=mode),
            found.ggn(),
        ),
    }
    for operator, dense in exact.values():
        torch.testing.assert_close(cv.ravel(operator @ vector), dense @ cv.ravel(vector), rtol=1e-9, atol=1e-12)


def hessian(found: Problem) -> Tensor:
    inputs, targets = found.batch

    def objective(vector: Tensor) -> Tensor:
        outputs = found.model_fn(cv.unravel(vector, found.params), inputs)
        return KINDS["cross-entropy"].objective(outputs, targets, "mean")

    return torch.autograd.functional.hessian(objective, cv.ravel(found.params))


# --- what is refused --------------------------------------------------------------------------------------------------


def attempt(estimate: Any, found: Problem, message: str, **options: Any) -> None:
    with pytest.raises(cv.errors.CaptureError, match=message):
        estimate(found.model_fn, found.params, found.batch, **options)


def test_what_needs_the_examples_of_rows_is_refused_where_they_are_not_known() -> None:
    found = mixtral(over_experts, normal(4, 3, 2, WIDTH))
    attempt(cv.kfac, found, "'up.weight'.*sharing='expand'", sharing="reduce")
    for estimate in (cv.ekfac, cv.tkfac, cv.diagonal):
        attempt(estimate, found, "'(up|down).weight.*correction='position'")
    found.batch[1][0, 0] = -100
    attempt(cv.kfac, found, "'up.weight'.*targets that are ignored")


def test_scales_of_rows_that_an_example_may_repeat_are_refused_and_others_are_exact() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        mask = rows[:, 0] > 0
        out = rows * 1
        out[mask] = torch.tanh(rows[mask] * p["s.scale"])
        return out.reshape(x.shape)

    zeros = {"s.scale": torch.zeros(WIDTH)}
    found = problem(model_fn, normal(3, 9, WIDTH), "cross-entropy", "mean", params=zeros)
    assert_exact(found.kfac(elementwise="dense"), found.ggn())
    attempt(cv.kfac, found, "'s.scale'.*forward-only", fisher="forward-only")
    flattened = problem(model_fn, normal(3, 4, 3, WIDTH), "cross-entropy", "mean", params=zeros)
    attempt(cv.kfac, flattened, "'s.scale'.*one example may have several")


def test_a_batch_that_uses_parameters_in_other_ways_than_its_plan_is_refused_by_name() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        mask, out = x[:, 0] > 0, x * 1
        if mask.any():
            out[mask] = x[mask] @ p["0.weight"]
        else:
            out = out @ p["0.weight"].T
        return out

    params = {"0.weight": normal(1, WIDTH, WIDTH)}
    targets = torch.zeros(2, dtype=torch.long)
    assert cv.kfac(model_fn, params, (normal(3, 2, WIDTH).abs(), targets)).blocks["0.weight"].trace() > 0
    with pytest.raises(
        cv.errors.CaptureError, match=r"matmul, uses parameter '0.weight' in this batch, but not in the"
    ):
        cv.kfac(model_fn, params, (-normal(3, 2, WIDTH).abs(), targets))
