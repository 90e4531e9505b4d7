"""Distributed checkpoints, fully sharded parameters, and ZeRO, in one or two gloo processes on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from tests.optim.adapter_cases import (
    ADAPTERS,
    assert_equal,
    every_adapter,
    network,
    train,
    weights,
)

pytestmark = pytest.mark.integrations


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    """The network with its parameters as DTensors, layer by layer."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.children():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(model: nn.Module) -> list[Tensor]:
    """The weights, gathered where they are sharded."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def save(model: nn.Module, optimizer: Any, folder: Path) -> None:
    first, second = get_state_dict(model, optimizer)
    dcp.save({"model": first, "optimizer": second}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: Any, folder: Path) -> None:
    first, second = get_state_dict(model, optimizer)
    state = {"model": first, "optimizer": second}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@every_adapter
@pytest.mark.parametrize("shard", [False, True], ids=["plain", "fully_shard"])
def test_distributed_checkpoints_resume_bit_for_bit(name: str, shard: bool, group: None, tmp_path: Path) -> None:
    plain = network()
    optimizer = ADAPTERS[name].make(plain.parameters(), lr=0.05)
    train(plain, optimizer, range(10))
    model = sharded(network()) if shard else network()
    optimizer = ADAPTERS[name].make(model.parameters(), lr=0.05)
    train(model, optimizer, range(5))
    save(model, optimizer, tmp_path / "saved")
    train(model, optimizer, range(5, 10))
    assert_equal(whole(plain), whole(model))
    other = sharded(network(1)) if shard else network(1)
    second = ADAPTERS[name].make(other.parameters(), lr=0.7)
    load(other, second, tmp_path / "saved")
    assert second.param_groups[0]["lr"] == 0.05
    train(other, second, range(5, 10))
    assert_equal(whole(model), whole(other))


@pytest.mark.parametrize("options", [
    StateDictOptions(full_state_dict=True, cpu_offload=True), StateDictOptions(flatten_optimizer_state_dict=True),
], ids=["full", "flat"])  # fmt: skip
def test_state_dicts_by_name_resume_bit_for_bit(options: StateDictOptions, group: None) -> None:
    model, other = sharded(network()), sharded(network())
    optimizer = ADAPTERS["soap"].make(model.named_parameters(), lr=0.05)
    second = ADAPTERS["soap"].make(other.named_parameters(), lr=0.05)
    train(model, optimizer, range(5))
    train(other, ADAPTERS["soap"].make(other.parameters(), lr=0.05), range(5))
    other.zero_grad()  # else torch takes the fresh optimizer for one without a state
    set_optimizer_state_dict(other, second, get_optimizer_state_dict(model, optimizer, options=options),
                             options=options)  # fmt: skip
    train(model, optimizer, range(5, 9))
    train(other, second, range(5, 9))
    assert_equal(whole(model), whole(other))


@every_adapter
def test_zero_redundancy_resumes_bit_for_bit(name: str, group: None) -> None:
    case, plain = ADAPTERS[name], network()

    def zero(model: nn.Module) -> Any:
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=case.adapter, lr=0.05, **case.options)

    alone = case.make(plain.parameters(), lr=0.05)
    model = network()
    optimizer = zero(model)
    train(plain, alone, range(5))
    train(model, optimizer, range(5))
    optimizer.consolidate_state_dict(to=0)
    saved = copy.deepcopy(optimizer.state_dict())
    other = network(1)
    other.load_state_dict(model.state_dict())
    second = zero(other)
    second.load_state_dict(saved)
    for m, o in ((plain, alone), (model, optimizer), (other, second)):
        train(m, o, range(5, 10))
    assert_equal(weights(plain), weights(model))
    assert_equal(weights(model), weights(other))


def two_processes(rank: int, folder: str, name: str) -> None:
    """Trains sharded over two processes, saves and resumes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    model = sharded(network())
    optimizer = ADAPTERS[name].make(model.parameters(), lr=0.05)
    train(model, optimizer, range(5))
    save(model, optimizer, Path(folder) / "saved")
    train(model, optimizer, range(5, 10))
    other = sharded(network(1))
    second = ADAPTERS[name].make(other.parameters(), lr=0.7)
    load(other, second, Path(folder) / "saved")
    train(other, second, range(5, 10))
    results = whole(model), whole(other)
    if rank == 0:
        torch.save(results, Path(folder) / "weights.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soap", "muon"])
def test_two_processes_make_the_steps_of_one(name: str, tmp_path: Path) -> None:
    """Preconditioners mix rows of different processes; in one process the checkpoint of two goes on."""
    mp.spawn(two_processes, (str(tmp_path), name), nprocs=2)  # type: ignore[no-untyped-call]
    straight, resumed = torch.load(tmp_path / "weights.pt")
    assert_equal(straight, resumed)
    model = network()
    train(model, ADAPTERS[name].make(model.parameters(), lr=0.05), range(10))
    torch.testing.assert_close(straight, weights(model), rtol=1e-9, atol=1e-11)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    other = network(1)
    optimizer = ADAPTERS[name].make(other.parameters(), lr=0.7)
    load(other, optimizer, tmp_path / "saved")
    train(other, optimizer, range(5, 10))
    dist.destroy_process_group()
    torch.testing.assert_close(weights(other), weights(model), rtol=1e-9, atol=1e-11)
