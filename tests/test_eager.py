"""Surroundings in which models can be differentiated: gradients recorded, and compiled code run as it was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness_problems import normal
from torch import Tensor, nn

import curvlib as cv
from curvlib.linalg.eager import differentiable, ordinary, uncompiled


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_recorded_inside_and_the_surroundings_are_as_before(surroundings: Any) -> None:
    with surroundings():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with differentiable():
            w = normal(0, 3).requires_grad_()
            (gradient,) = torch.autograd.grad((2 * w).sum(), w)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(gradient, torch.full((3,), 2.0, dtype=torch.float64))


def test_only_tensors_of_inference_mode_are_copied() -> None:
    plain = normal(0, 3)
    with torch.inference_mode():
        tree = {"made there": normal(1, 3), "plain": plain, "number": 1, "weight": nn.Linear(2, 2).weight}
    copies = ordinary(tree)
    assert copies["plain"] is plain
    assert copies["number"] == 1
    for name in ("made there", "weight"):
        assert not copies[name].is_inference()
        assert not copies[name].requires_grad
        assert torch.equal(copies[name], tree[name])


def counting(calls: list[int]) -> Any:
    """A compiler backend that notes when it compiles."""

    def backend(graph: Any, examples: Any) -> Any:
        calls.append(1)
        return graph

    return backend


def test_compiled_code_runs_as_it_was_written_and_is_compiled_again_afterwards() -> None:
    calls: list[int] = []
    double = torch.compile(lambda x: 2 * x, backend=counting(calls))
    x = normal(0, 3)
    with uncompiled(), uncompiled():
        assert torch.equal(double(x), 2 * x)
    assert not calls
    double(x)
    assert calls


def test_curvature_can_be_taken_between_two_graphs_of_a_compiled_function() -> None:
    model_fn, params = cv.functional(nn.Linear(3, 2).double())
    batch = (normal(0, 5, 3), torch.tensor([0, 1, 1, 0, 1]))

    def step(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * cv.ggn(model_fn, params, batch).trace()

    compiled = torch.compile(step, backend="eager")
    assert torch.allclose(compiled(batch[0]), step(batch[0]))


class Net(nn.Module):
    """A network whose first layer is compiled on its own."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.first, self.second = torch.compile(nn.Linear(3, 4), backend=backend), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_functional_runs_compiled_modules_as_they_were_written() -> None:
    calls: list[int] = []
    plain, inplace, parts = nn.Linear(3, 2), nn.Linear(3, 2), Net(counting(calls))
    inplace.load_state_dict(plain.state_dict())
    inplace.compile(backend=counting(calls))
    x = torch.ones(5, 3)
    for module in (torch.compile(plain, backend=counting(calls)), inplace, parts):
        model_fn, params = cv.functional(module)
        torch.func.grad(lambda p, f=model_fn: f(p, x).sum())(params)
        if module is not parts:
            assert sorted(params) == ["bias", "weight"]
            assert torch.equal(model_fn(params, x), plain(x))
    assert not calls


class Counts(nn.Module):
    """A layer that writes to a buffer whenever it is called, in training or not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.total = nn.Parameter(torch.ones(3)), nn.Buffer(torch.zeros(()))
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.sum()
        self.calls = self.calls + 1
        return x * self.weight


@pytest.mark.parametrize("training", [True, False])
def test_functional_changes_no_buffer(training: bool) -> None:
    layer = Counts().train(training)
    model_fn, params = cv.functional(layer)
    model_fn(params, torch.ones(5, 3))
    assert layer.total == layer.calls == 0


def test_functional_differentiates_modules_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
        net[2].weight.requires_grad_(False)
        model_fn, params = cv.functional(net)
    x = normal(0, 5, 3)
    gradient = torch.func.grad(lambda p: model_fn(p, x).sum())(ordinary(params))
    with torch.no_grad():
        assert torch.allclose(gradient["0.bias"], 5 * (net[2].weight.sum(0) * net[1].weight / (1 + 1e-5) ** 0.5))
