"""The torch.optim adapters: the transformation's steps, groups, missing gradients, state dictionaries, schedulers."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cv
import curvlib.optim as optim
from curvlib.optim.torch import SOAP, DyKAF, KLShampoo, Shampoo


def grafted_shampoo(**options: Any) -> optim.GradientTransformation:
    adam = optim.scale_by_adam(betas=(0.0, 0.95))
    return optim.chain(optim.graft(optim.scale_by_shampoo(**options), adam), optim.heavy_ball(0.9, dampening=0.9))


ADAPTERS: dict[str, tuple[Any, Any]] = {
    "soap": (SOAP, optim.scale_by_soap),
    "dykaf": (DyKAF, optim.scale_by_dykaf),
    "kl-shampoo": (KLShampoo, optim.scale_by_kl_shampoo),
    "shampoo": (Shampoo, grafted_shampoo),
}
every_adapter = pytest.mark.parametrize("name", ADAPTERS)
OFTEN = {"refresh": optim.Every(2)}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=source, dtype=torch.float64), torch.randint(3, (8,), generator=source)


def objective(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        objective(model, step).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(one: list[Tensor], two: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@every_adapter
def test_an_adapter_takes_the_steps_of_its_transformation(name: str) -> None:
    adapter, scale_by = ADAPTERS[name]
    model = network()
    params = {k: v.detach().clone() for k, v in model.named_parameters()}
    transformation = scale_by(**OFTEN)
    state = transformation.init(params)
    optimizer = adapter(model.named_parameters(), lr=0.01, weight_decay=0.1, **OFTEN)
    waits = optimizer.waits(optimizer.param_groups[0])
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        grads = {k: p.grad for k, p in model.named_parameters()}
        updates, state = transformation.update(grads, state, params)
        if step or not waits:
            params = {k: (1 - 0.001) * (params[k] - 0.01 * updates[k]) for k in params}
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[k], rtol=1e-12, atol=1e-15)


@every_adapter
def test_a_saved_optimizer_goes_on_bit_for_bit(name: str) -> None:
    adapter, _ = ADAPTERS[name]
    straight = network()
    optimizer = adapter(straight.parameters(), lr=0.01, **OFTEN)
    train(straight, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, range(5, 10))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(seed=1)
    resumed.load_state_dict(saved["model"])
    second = adapter(resumed.parameters(), lr=0.5, **OFTEN)
    second.load_state_dict(saved["optimizer"])
    assert second.param_groups[0]["lr"] == 0.01
    train(resumed, second, range(5, 10))
    assert_equal(weights(straight), weights(resumed))


@pytest.mark.slow
@every_adapter
def test_a_new_process_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; from test_torch_adapters import *\n"
        "adapter, saved = ADAPTERS[sys.argv[2]][0], torch.load(sys.argv[3], weights_only=True)\n"
        "model = network(1); model.load_state_dict(saved['model'])\n"
        "optimizer = adapter(model.parameters(), **OFTEN); optimizer.load_state_dict(saved['optimizer'])\n"
        "train(model, optimizer, range(10, 20)); torch.save(weights(model), sys.argv[3])\n"
    )
    model = network()
    optimizer = ADAPTERS[name][0](model.parameters(), lr=0.01, **OFTEN)
    train(model, optimizer, range(10))
    file = tmp_path / "state.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(10, 20))
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), name, str(file)], check=True)
    assert_equal(weights(model), torch.load(file, weights_only=True))


@every_adapter
def test_each_parameter_is_treated_as_if_it_were_alone(name: str) -> None:
    """Gradients that come late, or not every time, change nothing for the others."""
    adapter, _ = ADAPTERS[name]
    source = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4, 3), (3,), (4, 3), (2,)]
    together = [nn.Parameter(torch.randn(s, generator=source, dtype=torch.float64)) for s in shapes]
    alone = copy.deepcopy(together)
    optimizer = adapter(together, lr=0.1, **OFTEN)
    singles = [adapter([p], lr=0.1, **OFTEN) for p in alone]
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
    fresh = adapter(copy.deepcopy(together), lr=0.1, **OFTEN)
    fresh.load_state_dict(optimizer.state_dict())
    for p, q in zip(together, fresh.param_groups[0]["params"], strict=True):
        p.grad = q.grad = torch.ones_like(p)
    optimizer.step()
    fresh.step()
    assert_equal([p.detach() for p in together], [p.detach() for p in fresh.param_groups[0]["params"]])


@every_adapter
def test_groups_have_options_of_their_own(name: str) -> None:
    adapter, _ = ADAPTERS[name]
    model, other = network(), network()
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.05},
        {"params": model[2].weight, "weight_decay": 0.3},
    ]
    optimizer = adapter(groups, lr=0.01, weight_decay=0.0, **OFTEN)
    first = adapter([other[0].weight, other[0].bias], lr=0.05, weight_decay=0.0, **OFTEN)
    second = adapter([other[2].weight], lr=0.01, weight_decay=0.3, **OFTEN)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        other.zero_grad()
        objective(other, step).backward()
        first.step()
        second.step()
    assert_equal(weights(model), weights(other))


def test_closures_schedulers_and_gradients() -> None:
    model = network()
    optimizer = SOAP(model.parameters(), lr=0.1, **OFTEN)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert_equal(gradients, [p.grad for p in model.parameters() if p.grad is not None])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert float(optimizer.step(closure)) < float(first)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = network()
    with pytest.raises(cv.errors.ArgumentError, match="lr must not be negative"):
        SOAP(model.parameters(), lr=-1.0)
    with pytest.raises(cv.errors.ArgumentError, match="no option 'momentum'"):
        SOAP(model.parameters(), momentum=0.9)
    with pytest.raises(cv.errors.ArgumentError, match=r"betas\[0\]"):
        SOAP(model.parameters(), betas=(1.5, 0.9))
    optimizer = SOAP(model.parameters(), **OFTEN)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = SOAP(model.parameters(), max_dimension=4)
    saved["param_groups"][0]["max_dimension"] = 4
    with pytest.raises(cv.errors.FormatError, match="other"):
        other.load_state_dict(saved)
    assert not other.state
    assert before["state"].keys() == saved["state"].keys()
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(cv.errors.DtypeError, match="table"):
        SOAP([("table", embedding.weight)]).step()


def test_half_precision_parameters_have_states_in_full_precision() -> None:
    weight = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    optimizer = SOAP([weight], lr=0.1, **OFTEN)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = optimizer.state_dict()
    assert all(x.dtype != torch.bfloat16 for entry in state["state"].values() for x in entry["tensors"])
    fresh = SOAP([weight], **OFTEN)
    fresh.load_state_dict(state)
    for x, y in zip(state["state"][0]["tensors"], fresh.state_dict()["state"][0]["tensors"], strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
