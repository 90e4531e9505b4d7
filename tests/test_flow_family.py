"""Hundreds of ways to write a model: which keep examples apart, which do not, and what is exact or refused then.

Truth is one example at a time, as a batch of one, by reverse-mode gradients. The layers of `flow_layers` stand between
two linear ones; `flow_models` has whole models.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from flow_layers import INDEPENDENT, MIXED, Layer
from flow_models import (
    AB,
    ATTENTION,
    DEPENDENT,
    IN_A_ROW,
    INPUTS,
    LAYOUTS,
    REFUSED,
    ROWS,
    SEQUENCES,
    SQUARE,
    WHOLE,
    Case,
    ModelFn,
    N,
    Params,
    attention,
    between,
)
from torch import Tensor

import curvlib as cv

LOSS = cv.Identity("sum")


def layer_cases(family: dict[str, dict[str, Layer]]) -> dict[str, Case]:
    return {
        f"{kind}: {name}": (between(layer), AB, INPUTS[kind])
        for kind, layers in family.items()
        for name, layer in layers.items()
    }


# --- truth --------------------------------------------------------------------------------------------------------


def jacobian(model_fn: ModelFn, params: Params, inputs: Any) -> tuple[Tensor, Tensor]:
    """Outputs, and their derivatives [N, K, D] by ravel(params)."""
    names = sorted(params)
    leaves = {name: params[name].clone().requires_grad_() for name in names}
    outputs = model_fn(leaves, torch_pytree.tree_map_only(Tensor, Tensor.clone, inputs))
    rows = []
    for output in outputs.reshape(-1):
        found = torch.autograd.grad(output, [leaves[n] for n in names], retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return outputs.detach(), torch.stack(rows).unflatten(0, (len(outputs), -1))


def alone(case: Case) -> tuple[Tensor, Tensor]:
    """The same with each example as a batch of one."""
    model_fn, params, inputs = case
    single = [torch_pytree.tree_map_only(Tensor, lambda x, n=n: x[n : n + 1], inputs) for n in range(N)]
    outputs, derivatives = zip(*(jacobian(model_fn, params, one) for one in single), strict=True)
    return torch.cat(outputs), torch.cat(derivatives)


def check_diagonal(case: Case, plan: cv.Plan, engine: str | None = None) -> None:
    model_fn, params, inputs = case
    found = cv.diagonal(model_fn, params, (inputs, None), loss=LOSS, engine=engine, plan=plan).diag()
    expected = alone(case)[1].square().sum((0, 1))
    torch.testing.assert_close(cv.ravel(found), expected, rtol=1e-9, atol=1e-9 * float(expected.max()))


def check_refused(case: Case) -> None:
    model_fn, params, inputs = case
    assert cv.plan(model_fn, params, inputs).mixed is not None
    with pytest.raises(cv.errors.CaptureError, match="examples depend on each other"):
        cv.diagonal(model_fn, params, (inputs, None), loss=LOSS)
    with pytest.warns(UserWarning, match="examples depend on each other"):
        cv.kfac(model_fn, params, (inputs, None), loss=LOSS, fisher="type-2")


APART, TOGETHER = layer_cases(INDEPENDENT), layer_cases(MIXED)


@pytest.mark.parametrize("name", APART)
def test_layers_that_keep_examples_apart_are_exact(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = cv.plan(*APART[name])
    assert plan.mixed is None
    check_diagonal(APART[name], plan)


@pytest.mark.parametrize("name", TOGETHER)
def test_layers_that_make_examples_depend_on_each_other_are_refused(name: str) -> None:
    model_fn, params, inputs = TOGETHER[name]
    outputs, derivatives = jacobian(model_fn, params, inputs)
    lone, lone_derivatives = alone(TOGETHER[name])
    assert (outputs - lone).abs().amax() > 1e-6 or (derivatives - lone_derivatives).abs().amax() > 1e-6
    check_refused(TOGETHER[name])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("inputs", [SEQUENCES, SQUARE], ids=["[N, 3, 4]", "[N, N, 4]"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_exact_in_every_layout(layout: str, inputs: Tensor, fused: bool) -> None:
    case = (attention(*LAYOUTS[layout], fused=fused), ATTENTION, inputs)
    plan = cv.plan(*case)
    assert plan.mixed is None
    check_diagonal(case, plan)


@pytest.mark.parametrize("inputs", [SEQUENCES, SQUARE], ids=["[N, 3, 4]", "[N, N, 4]"])
@pytest.mark.parametrize(
    ("split", "join"),
    [("examples times heads", "heads times examples"), ("heads times examples", "examples times heads")],
)
def test_attention_whose_heads_go_back_to_other_examples_is_refused(split: str, join: str, inputs: Tensor) -> None:
    check_refused((attention(LAYOUTS[split][0], LAYOUTS[join][1]), ATTENTION, inputs))


@pytest.mark.parametrize("model", WHOLE)
def test_models_that_keep_examples_apart_are_exact(model: str) -> None:
    plan = cv.plan(*WHOLE[model])
    assert plan.mixed is None
    for engine in ("functional", "autograd"):
        check_diagonal(WHOLE[model], plan, engine)


@pytest.mark.parametrize("model", DEPENDENT)
def test_models_that_make_examples_depend_on_each_other_are_refused(model: str) -> None:
    check_refused(DEPENDENT[model])


@pytest.mark.parametrize("cut", IN_A_ROW)
def test_batches_in_a_row_are_no_dependence_and_refused_where_order_matters(cut: str) -> None:
    model_fn, params, inputs = IN_A_ROW[cut]
    plan = cv.plan(model_fn, params, inputs)
    assert plan.mixed is None
    assert any(site.scattered for site in plan.sites)
    with pytest.raises(cv.errors.CaptureError, match="do not lie together"):
        cv.diagonal(model_fn, params, (inputs, None), loss=LOSS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curv = cv.kfac(model_fn, params, (inputs, None), loss=LOSS, fisher="type-2")
    assert float(curv.trace()) > 0


@pytest.mark.parametrize("model", REFUSED)
def test_what_has_no_examples_is_refused_with_the_reason(model: str) -> None:
    model_fn, reason = REFUSED[model]
    before = {name: p.clone() for name, p in AB.items()}
    for call in (lambda: cv.plan(model_fn, AB, ROWS), lambda: cv.kfac(model_fn, AB, (ROWS, None), loss=LOSS)):
        with pytest.raises(cv.errors.CaptureError, match=reason):
            call()
    assert all(torch.equal(AB[name], value) for name, value in before.items())
