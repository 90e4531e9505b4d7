"""Parameter groups of the torch.optim adapters: their options, schedulers, and parameters that change groups."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel

import curvlib as cv
import curvlib.optim as optim
from curvlib.optim.torch import SOAP, AdamW, Muon, Shampoo
from tests.optim.adapter_cases import (
    ADAPTERS,
    OFTEN,
    assert_equal,
    assert_states_equal,
    every_adapter,
    network,
    objective,
    train,
    weights,
)

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=True),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@every_adapter
def test_schedulers_do_what_they_do_to_adamw(name: str, scheduler: str) -> None:
    model, other = network(), network()
    options = {"betas": (0.9, 0.99)} if "betas" in ADAPTERS[name].adapter.options else {}
    optimizer = ADAPTERS[name].make(model.parameters(), lr=0.02, **options)
    torchs: Any = torch.optim.AdamW(other.parameters(), lr=0.02, betas=(0.9, 0.99))
    if "momentum" in optimizer.defaults:
        torchs = torch.optim.SGD(other.parameters(), lr=0.02, momentum=optimizer.defaults["momentum"])
    ours, theirs = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](torchs)
    for step in range(6):
        train(model, optimizer, [step], ours)
        train(other, torchs, [step], theirs)
        group, expected = optimizer.param_groups[0], torchs.param_groups[0]
        for key in ("lr", "betas", "momentum", "initial_lr"):
            if key in group and key in expected:
                assert group[key] == expected[key], key
    assert all(p.isfinite().all() for p in model.parameters())
    if name == "adamw":
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-10, atol=1e-12)


def test_cycled_options_are_those_that_are_used() -> None:
    """betas and momentum that a scheduler writes into a group are those of the next step."""
    model, other = network(), network()
    optimizer = SOAP(model.parameters(), **OFTEN)
    scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    assert optimizer.param_groups[0]["betas"][0] == 0.95
    train(model, optimizer, range(5), scheduler)
    by_hand = SOAP(other.parameters(), **OFTEN)
    rates = schedulers.OneCycleLR(SOAP([nn.Parameter(torch.ones(1))]), max_lr=0.1, total_steps=8)
    for step in range(5):
        group = rates.optimizer.param_groups[0]
        by_hand.param_groups[0].update(lr=group["lr"], betas=list(group["betas"]))
        train(other, by_hand, [step])
        rates.optimizer.step()
        rates.step()
    assert_equal(weights(model), weights(other))
    for adapter, key in ((Shampoo, "momentum"), (Muon, "momentum")):
        cycled = adapter(network().parameters())
        schedulers.OneCycleLR(cycled, max_lr=0.1, total_steps=8)
        assert cycled.param_groups[0][key] == 0.95


def test_averaged_models_and_plateaus() -> None:
    model = network()
    optimizer = SOAP(model.parameters(), lr=0.1, **OFTEN)
    plateau, average = schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.5), AveragedModel(model)
    for step in range(4):
        train(model, optimizer, [step])
        average.update_parameters(model)
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3


@every_adapter
def test_groups_have_options_of_their_own_and_keys_that_are_none(name: str) -> None:
    case, model, other = ADAPTERS[name], network(), network()
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.05, "name": "first", "lr_scale": 0.1},
        {"params": model[2].weight, "weight_decay": 0.3, "name": "second", "layer": [1, 2]},
    ]
    optimizer = case.make(groups, lr=0.01, weight_decay=0.0)
    first = case.make([other[0].weight, other[0].bias], lr=0.05, weight_decay=0.0)
    second = case.make([other[2].weight], lr=0.01, weight_decay=0.3)
    for step in range(5):
        train(model, optimizer, [step])
        other.zero_grad()
        objective(other, step).backward()
        first.step()
        second.step()
    assert_equal(weights(model), weights(other))
    fresh = case.make(groups)
    fresh.load_state_dict(optimizer.state_dict())
    assert [group["name"] for group in fresh.param_groups] == ["first", "second"]
    assert fresh.param_groups[1]["layer"] == [1, 2]


@pytest.mark.parametrize("options", [
    {"lr": -1.0}, {"weight_decay": -0.1}, {"betas": (2.0, 0.9)}, {"transport": "sideways"}, {"max_dimension": 0},
])  # fmt: skip
def test_a_refused_group_is_not_kept(options: dict[str, Any]) -> None:
    model = network()
    optimizer = SOAP(model[0].parameters(), **OFTEN)
    before = copy.deepcopy(model[2].weight)
    with pytest.raises(cv.errors.ArgumentError):
        optimizer.add_param_group({"params": model[2].parameters(), **options})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": model[0].parameters()})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(2))
    assert torch.equal(model[2].weight, before)
    optimizer.add_param_group({"params": model[2].parameters(), "refresh": optim.Every(3)})
    train(model, optimizer, range(2, 4))
    assert not torch.equal(model[2].weight, before)


@every_adapter
def test_parameters_change_places_with_their_states(name: str) -> None:
    """Removed, put back in another order, moved to another group: each goes on as if it had always been there."""
    case, model, other = ADAPTERS[name], network(), network()
    optimizer = case.make(
        [{"params": list(model.parameters())[:4], "lr": 0.01}, {"params": list(model.parameters())[4:], "lr": 0.01}]
    )
    singles = [case.make([p], lr=0.01) for p in other.parameters()]

    def both(step: int, *still: int) -> None:
        train(model, optimizer, [step])
        other.zero_grad()
        objective(other, step).backward()
        for place, single in enumerate(singles):
            if place not in still:
                single.step()

    both(0)
    both(1)
    first, second = (group["params"] for group in optimizer.param_groups)
    removed = first.pop(1)
    both(2, 1)
    second.insert(0, removed)
    first.reverse()
    both(3)
    second.append(first.pop(0))
    both(4)
    del optimizer.state[removed]
    singles[1].state.clear()
    both(5)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-10, atol=1e-12)
    saved, fresh = optimizer.state_dict(), case.make(copy.deepcopy(optimizer.param_groups))
    fresh.load_state_dict(saved)
    assert_states_equal(optimizer, fresh)


def test_an_emptied_group_and_generators_are_fine() -> None:
    model = network()
    optimizer = AdamW([{"params": []}, {"params": (p for p in model.parameters())}])
    train(model, optimizer, range(2))
    assert len(optimizer.state) == 6
    assert "lr: 0.001" in repr(optimizer)
