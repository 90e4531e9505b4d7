"""The torch.optim adapters: the transformation's steps, gradients that are missing, options that every one has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cv
import curvlib.optim as optim
from curvlib.optim.torch import SOAP, AdamW, Muon
from tests.optim.adapter_cases import (
    ADAPTERS,
    OFTEN,
    assert_equal,
    batch,
    every_adapter,
    network,
    objective,
    train,
    weights,
)


@every_adapter
def test_an_adapter_takes_the_steps_of_its_transformation(name: str) -> None:
    case, model = ADAPTERS[name], network()
    params = {k: v.detach().clone() for k, v in model.named_parameters()}
    transformation = case.scale_by(**case.options)
    state = transformation.init(params)
    optimizer = case.make(model.named_parameters(), lr=0.01, weight_decay=0.1)
    waits = optimizer.waits(optimizer.param_groups[0])
    for step in range(7):
        train(model, optimizer, [step])
        grads = {k: p.grad for k, p in model.named_parameters()}
        updates, state = transformation.update(grads, state, params)
        if not step and waits:
            continue
        if case.adapter.decays_first:
            params = {k: (1 - 0.001) * params[k] - 0.01 * updates[k] for k in params}
        else:
            params = {k: (1 - 0.001) * (params[k] - 0.01 * updates[k]) for k in params}
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[k], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}])
def test_adamw_is_that_of_torch(options: dict[str, Any]) -> None:
    model, other = network(), network()
    ours, torchs = AdamW(model.parameters(), **options), torch.optim.AdamW(other.parameters(), **options)
    for step in range(20):
        train(model, ours, [step])
        train(other, torchs, [step])
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-14)


def test_muon_treats_groups_as_they_say() -> None:
    model, other = network(), network()
    layers = [model[0], model[2], model[4]]
    groups = [
        {"params": layers[0].parameters()},
        {"params": layers[1].parameters(), "use_muon": False, "lr": 0.02},
        {"params": [layers[2].weight], "use_muon": True},
        {"params": [layers[2].bias]},
    ]
    optimizer = Muon(groups, lr=0.1, weight_decay=0.0)
    train(model, optimizer, range(4))
    kinds = ["momentum", "first", "first", "first", "momentum", "first"]
    assert [kind in optimizer.state[p] for kind, p in zip(kinds, model.parameters(), strict=True)] == [True] * 6
    alike = Muon([other[0].weight, other[4].weight], lr=0.1, weight_decay=0.0)
    rest = AdamW([other[0].bias, other[4].bias], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    slow = AdamW(other[2].parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(4):
        train(other, alike, [step])
        rest.step()
        slow.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=1e-14)
    vector = nn.Parameter(torch.ones(3))
    vector.grad = torch.ones(3)
    with pytest.raises(cv.errors.ShapeError, match="gain"):
        Muon([{"params": [("gain", vector)], "use_muon": True}]).step()
    with pytest.raises(cv.errors.ArgumentError, match="use_muon"):
        Muon([vector], use_muon="yes")  # type: ignore[arg-type]


# --- gradients that are missing -------------------------------------------------------------------------------------


@every_adapter
def test_each_parameter_is_treated_as_if_it_were_alone(name: str) -> None:
    """Gradients that come late, or not every time, change nothing for the others."""
    case = ADAPTERS[name]
    source = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4, 3), (3,), (4, 3), (2,)]
    together = [nn.Parameter(torch.randn(s, generator=source, dtype=torch.float64)) for s in shapes]
    alone = copy.deepcopy(together)
    optimizer = case.make(together, lr=0.1)
    singles = [case.make([p], lr=0.1) for p in alone]
    present = [(0, 1, 2), (0, 1, 2), (0, 2), (0, 1, 3), (1, 3, 2), (0, 1, 2, 3), (0, 1, 2, 3)]
    for given in present:
        for place, (p, q) in enumerate(zip(together, alone, strict=True)):
            grad = torch.randn(p.shape, generator=source, dtype=torch.float64) if place in given else None
            p.grad, q.grad = grad, grad
        optimizer.step()
        for single in singles:
            single.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert together[4] not in optimizer.state
    fresh = case.make(copy.deepcopy(together), lr=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    for p, q in zip(together, fresh.param_groups[0]["params"], strict=True):
        p.grad = q.grad = torch.ones_like(p)
    optimizer.step()
    fresh.step()
    assert_equal(together, fresh.param_groups[0]["params"])


def test_parameters_of_one_count_are_updated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that was missing once costs one more update, and parameters whose counts meet are joined again."""
    params = [nn.Parameter(torch.ones(3, 3, dtype=torch.float64)) for _ in range(6)]
    optimizer = SOAP(params, **OFTEN)
    sizes: list[int] = []
    advance = SOAP.advance
    monkeypatch.setattr(SOAP, "advance", lambda self, group, members: (
        sizes.append(len(members)), advance(self, group, members)
    )[1])  # fmt: skip
    for missing in ((), (), (0,), (), (1, 2, 3, 4, 5), ()):
        for i, p in enumerate(params):
            p.grad = None if i in missing else torch.randn_like(p)
        optimizer.step()
    assert sizes == [6, 6, 5, 1, 5, 1, 6]


def test_parameters_without_elements_are_left_alone() -> None:
    empty, weight = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = SOAP([empty, weight], **OFTEN)
    for _ in range(3):
        empty.grad, weight.grad = torch.ones(0, 3), torch.randn(2, 3)
        optimizer.step()
    assert empty not in optimizer.state


# --- options that every torch optimizer has -------------------------------------------------------------------------


@every_adapter
def test_options_of_torchs_are_accepted(name: str) -> None:
    case, model, other, up = ADAPTERS[name], network(), network(), network()
    plain = case.make(model.parameters(), lr=0.01)
    given = case.make(other.parameters(), lr=torch.tensor(0.01, dtype=torch.float64), foreach=True, fused=True,
                      capturable=True)  # fmt: skip
    ascending = case.make(up.parameters(), lr=0.01, maximize=True)
    assert {"foreach", "fused", "capturable", "maximize", "differentiable"} <= ascending.defaults.keys()
    for step in range(4):
        train(model, plain, [step])
        train(other, given, [step])
        up.zero_grad()
        (-objective(up, step)).backward()
        ascending.step()
    assert_equal(weights(model), weights(other))
    assert_equal(weights(model), weights(up))


@pytest.mark.parametrize(("name", "options"), [
    ("soap", {"start_step": 1, "eps": 0.01}), ("shampoo", {"eps": 0.01}), ("muon", {}), ("adamw", {}),
])  # fmt: skip
def test_steps_are_differentiable(name: str, options: dict[str, Any]) -> None:
    """d(weights after three steps) / d(weights before, learning rate), against finite differences."""
    source = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, generator=source, dtype=torch.float64)
    target = torch.randn(3, 2, generator=source, dtype=torch.float64)

    def trained(start: Tensor, lr: Tensor) -> Tensor:
        weight = start.clone()
        if weight.requires_grad:
            weight.retain_grad()
        optimizer = ADAPTERS[name].make([weight], lr=lr, differentiable=True, **options)
        for _ in range(3):
            with torch.enable_grad():
                point = weight.clone() if weight.requires_grad else weight.detach().clone().requires_grad_()
                loss = ((point - target) ** 2 * target.exp()).sum() + (point.mT @ point).square().sum()
                weight.grad = torch.autograd.grad(loss, point, create_graph=weight.requires_grad)[0]
            optimizer.step()
        return weight

    rate = torch.tensor(0.05, dtype=torch.float64)
    arguments = (start.requires_grad_(), rate.requires_grad_())
    torch.autograd.gradcheck(trained, arguments, atol=1e-6, rtol=1e-5)


def test_closures_and_gradients() -> None:
    model = network()
    optimizer = SOAP(model.parameters(), lr=0.1, **OFTEN)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert_equal(gradients, [p.grad for p in model.parameters() if p.grad is not None])
    assert float(optimizer.step(closure)) < float(first)


def test_a_gradient_scaler_leaves_out_steps_that_overflow() -> None:
    model, other = network(), network()
    optimizer, plain = SOAP(model.parameters(), fused=True, **OFTEN), SOAP(other.parameters(), **OFTEN)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(objective(model, step) * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            train(other, plain, [step])
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-10, atol=1e-12)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = network()
    with pytest.raises(cv.errors.ArgumentError, match="lr must not be negative"):
        SOAP(model.parameters(), lr=-1.0)
    with pytest.raises(cv.errors.ArgumentError, match="no option 'momentum'"):
        SOAP(model.parameters(), momentum=0.9)
    with pytest.raises(cv.errors.ArgumentError, match=r"betas\[0\]"):
        SOAP(model.parameters(), betas=(1.5, 0.9))
    with pytest.raises(cv.errors.ArgumentError, match=r"'a'"):
        SOAP([("a", nn.Parameter(torch.ones(2))), ("a", nn.Parameter(torch.ones(2)))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(cv.errors.DtypeError, match="table"):
        SOAP([("table", embedding.weight)]).step()


def test_parameters_that_move_take_their_state_with_them() -> None:
    """A model that is moved or cast after a step goes on in its new place."""
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = SOAP([weight], **OFTEN)
    for dtype in (torch.float32, torch.float32, torch.float64, torch.float64):
        weight.data = weight.data.to(dtype)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert weight.dtype == torch.float64
    assert weight.isfinite().all()


def test_a_closure_of_lightnings_kind_may_return_nothing() -> None:
    model = network()
    optimizer = SOAP(model.parameters(), **OFTEN)
    assert optimizer.step(lambda: None) is None  # type: ignore[arg-type, return-value]
    assert not optimizer.state
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    assert optimizer.step() is None
    assert optimizer.state


def test_custom_transformations_are_adapters_in_a_few_lines() -> None:
    class Sign(cv.optim.torch.Adapter):
        options = {"decay": 0.9}  # noqa: RUF012

        @classmethod
        def transformation(cls, label: str, options: dict[str, Any]) -> optim.GradientTransformation:
            return optim.heavy_ball(**options)

    model = network()
    optimizer = Sign(model.parameters(), lr=0.1, decay=0.5)
    train(model, optimizer, range(3))
    assert set(optimizer.state[model[0].weight]) == {"step", "velocity"}
