"""The torch.optim adapters, the transformations that they hold, and a small model to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib.optim as optim
from curvlib.optim.torch import SOAP, AdamW, DyKAF, KLShampoo, Muon, Shampoo


@dataclass(frozen=True)
class Case:
    """An adapter, what makes the same updates, and options with which much happens in few steps."""

    adapter: Any
    scale_by: Any
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, params: Any, **options: Any) -> Any:
        return self.adapter(params, **{**self.options, **options})


def grafted_shampoo(**options: Any) -> optim.GradientTransformation:
    adam = optim.scale_by_adam(betas=(0.0, 0.95))
    return optim.chain(optim.graft(optim.scale_by_shampoo(**options), adam), optim.heavy_ball(0.9, dampening=0.9))


def muon_and_adam() -> optim.GradientTransformation:
    parts = {"matrix": optim.scale_by_muon(scaling="rms"), "rest": optim.scale_by_adam(betas=(0.9, 0.95))}
    return optim.partition(parts, optim.matrices_or_rest)


OFTEN = {"refresh": optim.Every(2)}
ADAPTERS: dict[str, Case] = {
    "soap": Case(SOAP, optim.scale_by_soap, OFTEN),
    "dykaf": Case(DyKAF, optim.scale_by_dykaf, OFTEN),
    "kl-shampoo": Case(KLShampoo, optim.scale_by_kl_shampoo, OFTEN),
    "shampoo": Case(Shampoo, grafted_shampoo, OFTEN),
    "muon": Case(Muon, muon_and_adam),
    "adamw": Case(AdamW, optim.scale_by_adam),
}
every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=source, dtype=torch.float64), torch.randint(3, (8,), generator=source)


def objective(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], *followers: Any) -> None:
    """Some steps, each followed by one of every scheduler."""
    for step in steps:
        model.zero_grad()
        objective(model, step).backward()
        optimizer.step()
        for follower in followers:
            follower.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(one: Iterable[Tensor], two: Iterable[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def assert_states_equal(one: torch.optim.Optimizer, two: torch.optim.Optimizer) -> None:
    """The states of two optimizers are those of the same parameters, by their order, bit for bit."""
    first, second = one.state_dict()["state"], two.state_dict()["state"]
    assert first.keys() == second.keys()
    for key, entries in first.items():
        assert entries.keys() == second[key].keys()
        for name, value in entries.items():
            assert value.dtype == second[key][name].dtype
            assert torch.equal(value, second[key][name]), name
