"""Losses under transforms and traces, in half precision, and as immutable values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.losses import MSE
from tests.loss_problems import (
    assert_equal,
    every_kind,
    generator,
    make,
    one_thread,  # noqa: F401
    outer,
)


@every_kind
def test_functions_work_under_vmap(kind: str) -> None:
    problem = make(kind, positions=(2,))
    loss, y = problem.loss, problem.targets
    stack = torch.stack([problem.outputs, problem.outputs.flip(0), 2 * problem.outputs])
    for function in (
        lambda f: loss.gradient(f, y),
        lambda f: loss.terms(f, y),
        lambda f: loss.value(f, y),
        lambda f: loss.normalizer(f, y) + 0 * f.sum(),
        lambda f: loss.hessian_product(f, y, torch.ones_like(f)),
        lambda f: outer(loss.sqrt_hessian(f, y)),
        lambda f: outer(loss.sqrt_hessian(f, y, 1, 3)),
    ):
        assert_equal(torch.func.vmap(function)(stack), torch.stack([function(f) for f in stack]))


@every_kind
def test_per_example_gradients_come_from_vmap_over_targets_too(kind: str) -> None:
    problem = make(kind, positions=(2,))
    f, y = problem.outputs, problem.targets
    targets = None if y is None else y.unsqueeze(1)
    each = torch.func.vmap(problem.loss.gradient, in_dims=(0, None if y is None else 0))(f.unsqueeze(1), targets)
    assert_equal(each.squeeze(1), problem.loss.gradient(f, y))


@every_kind
def test_samples_work_under_vmap(kind: str) -> None:
    problem = make(kind, positions=(2,))
    f, y = problem.outputs, problem.targets
    stack = torch.stack([f, f])

    def draw(randomness: str) -> Tensor:
        own = generator()
        return torch.func.vmap(lambda f: problem.loss.sample(f, y, own, 5), randomness=randomness)(stack)

    same, different = draw("same"), draw("different")
    assert torch.equal(same[0], same[1])
    assert_equal(same[0], problem.loss.sample(f, y, generator(), 5))
    assert not torch.equal(different[0], different[1])


@every_kind
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_functions_can_be_traced(kind: str, mode: str) -> None:
    problem = make(kind, positions=(2,))
    loss, f, y = problem.loss, problem.outputs, problem.targets
    other = f.flip(0) * 0.5

    def everything(f: Tensor, y: Any) -> tuple[Tensor, ...]:
        return loss.gradient(f, y), outer(loss.sqrt_hessian(f, y)), loss.value(f, y), loss.normalizer(f, y)

    traced = make_fx(everything, tracing_mode=mode)(f, y)
    for result, expected in zip(traced(other, y), everything(other, y), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)
    own = generator()
    traced = make_fx(lambda f: loss.sample(f, y, own, 3))(f)
    own.manual_seed(0)
    assert torch.equal(traced(other), loss.sample(other, y, generator(), 3))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_as_it_came(kind: str, dtype: torch.dtype) -> None:
    problem = make(kind, positions=(2,))
    loss, f, y = problem.loss, problem.outputs.to(dtype), problem.targets
    for function in (
        loss.gradient,
        loss.sqrt_hessian,
        lambda f, y: loss.sample(f, y, generator(), 3),
        lambda f, y: loss.hessian_product(f, y, torch.ones_like(f)),
    ):
        result, full = function(f, y), function(f.float(), y)
        assert result.dtype == dtype
        assert torch.equal(result, full.to(dtype))
    assert loss.terms(f, y).dtype == loss.terms(f.float(), y).dtype != dtype
    assert loss.normalizer(f, y).dtype == torch.float32


def test_normalizer_of_half_precision_outputs_can_exceed_their_range() -> None:
    assert MSE().normalizer(torch.zeros(300, 300, dtype=torch.float16), None) == 90_000


@every_kind
def test_nothing_given_is_changed(kind: str) -> None:
    problem = make(kind, positions=(2,))
    f = problem.outputs.clone().requires_grad_()
    y = None if problem.targets is None else problem.targets.clone()
    loss = problem.loss
    results = [loss.value(f, y), loss.terms(f, y), loss.gradient(f, y), loss.sqrt_hessian(f, y)]
    results += [loss.sample(f, y, generator(), 2), loss.hessian_product(f, y, f), loss.normalizer(f, y)]
    for result in results:
        with torch.no_grad():
            result.zero_()  # no result shares memory with what was given
    assert torch.equal(f, problem.outputs)
    assert f.requires_grad
    assert f.grad is None
    assert y is None or torch.equal(y, problem.targets)


@every_kind
def test_losses_are_immutable_values(kind: str) -> None:
    loss = make(kind).loss
    same, other = replace(loss), replace(loss, reduction="sum")  # type: ignore[type-var]
    assert loss == same
    assert hash(loss) == hash(same)
    assert loss != other
    assert loss.reduction == "mean"
    assert other.reduction == "sum"
    with pytest.raises(AttributeError):
        loss.reduction = "sum"
