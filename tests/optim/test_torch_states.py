"""The state of the torch.optim adapters: what is in it, files, copies, hooks, names."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cv
import curvlib.optim as optim
from curvlib.optim.torch import SOAP, AdamW
from tests.optim.adapter_cases import (
    ADAPTERS,
    OFTEN,
    assert_equal,
    assert_states_equal,
    every_adapter,
    network,
    train,
    weights,
)

ROOT = Path(__file__).parents[2]
POLICIES: dict[str, Any] = {"refresh": optim.Warmup(2, then=optim.Adaptive(0.1, every=2)), "start_step": 1}


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_adapter
def test_the_state_of_a_parameter_is_a_flat_dictionary_of_tensors(name: str) -> None:
    model = network().bfloat16()
    optimizer = ADAPTERS[name].make(model.parameters())
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in model.parameters():
        entries = optimizer.state[p]
        assert entries
        for key, value in entries.items():
            assert isinstance(key, str)
            assert isinstance(value, Tensor)
            assert value.dtype != torch.bfloat16
    storages = {id(x) for entries in optimizer.state.values() for x in entries.values()}
    assert len(storages) == sum(map(len, optimizer.state.values())), "two parameters hold the same tensor"


def test_names_of_entries_are_paths_of_fields() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    assert set(optimizer.state[model[0].weight]) == {"step", "first", "second"}
    assert optimizer.state[model[0].weight]["step"].item() == 2
    soap = SOAP(model.parameters(), **OFTEN)
    train(model, soap, range(2))
    assert {"step", "refreshes"} <= soap.state[model[0].weight].keys()


# --- files ----------------------------------------------------------------------------------------------------------


@every_adapter
def test_a_saved_optimizer_goes_on_bit_for_bit(name: str) -> None:
    straight, case = network(), ADAPTERS[name]
    optimizer = case.make(straight.parameters(), lr=0.01)
    train(straight, optimizer, range(5))
    saved = through_a_file({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = network(seed=1)
    resumed.load_state_dict(saved["model"])
    second = case.make(resumed.parameters(), lr=0.5)
    second.load_state_dict(saved["optimizer"])
    assert second.param_groups[0]["lr"] == 0.01
    assert_states_equal(optimizer, second)
    train(straight, optimizer, range(5, 10))
    train(resumed, second, range(5, 10))
    assert_equal(weights(straight), weights(resumed))


@pytest.mark.slow
@every_adapter
def test_a_new_process_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from tests.optim.adapter_cases import *\n"
        "case, saved = ADAPTERS[sys.argv[1]], torch.load(sys.argv[2], weights_only=True)\n"
        "model = network(1); model.load_state_dict(saved['model'])\n"
        "optimizer = case.make(model.parameters()); optimizer.load_state_dict(saved['optimizer'])\n"
        "train(model, optimizer, range(10, 20)); torch.save(weights(model), sys.argv[2])\n"
    )
    model = network()
    optimizer = ADAPTERS[name].make(model.parameters(), lr=0.01)
    train(model, optimizer, range(10))
    file = tmp_path / "state.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(10, 20))
    subprocess.run([sys.executable, "-c", code, name, str(file)], check=True, cwd=ROOT)
    assert_equal(weights(model), torch.load(file, weights_only=True))


def test_a_file_is_read_without_this_library(tmp_path: Path) -> None:
    model = network()
    optimizer = SOAP(model.named_parameters(), **POLICIES)
    train(model, optimizer, range(3))
    file = tmp_path / "state.pt"
    torch.save(optimizer.state_dict(), file)
    code = (
        "import sys, torch; state = torch.load(sys.argv[1], weights_only=True)\n"
        "assert not any(name.startswith('curvlib') for name in sys.modules)\n"
        "print(state['param_groups'][0]['refresh'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], check=True, capture_output=True, text=True)
    assert "Warmup" in done.stdout
    other = network()
    second = SOAP(other.named_parameters())
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.param_groups[0]["refresh"] == POLICIES["refresh"]
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(3, 7))
    train(other, second, range(3, 7))
    assert_equal(weights(model), weights(other))


def test_options_may_be_written_as_they_are_saved() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    written = SOAP([weight], refresh="Warmup(2, then=Adaptive(0.1, every=2))", start_step=1)
    given = SOAP([weight], **POLICIES)
    assert written.rule(written.param_groups[0], "") is given.rule(given.param_groups[0], "")
    for wrong in ("Every(", "Every(__import__('os'))", "Every(period=3)", "Every(steps=Print(3))"):
        with pytest.raises(cv.errors.FormatError, match="cannot be read"):
            SOAP([weight], refresh=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_keep_their_dtypes_in_files(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    optimizer = SOAP([weight], lr=0.1, fused=True, **OFTEN)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    fresh = SOAP([weight], **OFTEN)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_states_equal(optimizer, fresh)


def test_keys_that_others_put_into_a_state_stay() -> None:
    model = network()
    optimizer = SOAP(model.parameters(), **OFTEN)
    train(model, optimizer, range(2))
    mark = torch.arange(3)
    optimizer.state[model[0].weight]["mark"] = mark
    train(model, optimizer, range(2, 4))
    second = SOAP(model.parameters(), **OFTEN)
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    assert torch.equal(second.state[model[0].weight]["mark"], mark)


def test_the_state_of_another_optimizer_is_refused_and_nothing_is_changed() -> None:
    model = network()
    optimizer = SOAP(model.parameters(), **OFTEN)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    narrow = SOAP(model.parameters(), lr=0.7)
    limited = {**saved, "param_groups": [{**saved["param_groups"][0], "max_dimension": 4}]}
    other_shapes = SOAP(nn.Sequential(nn.Linear(5, 7), nn.Linear(6, 6), nn.Linear(6, 3)).parameters(), lr=0.7)
    for refusing, state in ((narrow, limited), (AdamW(model.parameters(), lr=0.7), saved), (other_shapes, saved)):
        before = copy.deepcopy(refusing.param_groups)
        with pytest.raises(cv.errors.FormatError, match="other"):
            refusing.load_state_dict(state)
        assert not refusing.state
        assert refusing.param_groups[0]["lr"] == before[0]["lr"] == 0.7
    optimizer.param_groups[0]["max_dimension"] = 4
    with pytest.raises(cv.errors.FormatError, match="other options"):
        train(model, optimizer, range(2, 3))
    broken = SOAP(model.parameters(), **OFTEN)
    with pytest.raises(cv.errors.FormatError, match="step"):
        broken.load_state_dict({**saved, "state": {**saved["state"], 0: {"note": 1}}})
    with pytest.raises(ValueError, match="size"):
        SOAP([model[0].weight]).load_state_dict(saved)


# --- copies ---------------------------------------------------------------------------------------------------------


@every_adapter
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_bit_for_bit_and_take_new_groups(name: str, how: str) -> None:
    model = network()
    optimizer = ADAPTERS[name].make([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}])
    train(model, optimizer, range(3))
    pair = (model, optimizer)
    other, second = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert_states_equal(optimizer, second)
    for m, o in ((model, optimizer), (other, second)):
        o.add_param_group({"params": m[4].parameters(), "weight_decay": 0.5})
        train(m, o, range(3, 8))
    assert_equal(weights(model), weights(other))
    with pytest.raises(cv.errors.ArgumentError, match="lr"):
        second.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0})


def test_groups_are_added_after_a_file_was_read() -> None:
    model, other = network(), network()
    optimizer = SOAP(model[0].parameters(), **OFTEN)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    second = SOAP(other[0].parameters(), lr=0.3)
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, second)):
        o.add_param_group({"params": m[2].parameters()})
        assert o.param_groups[1]["lr"] == o.defaults["lr"]
        o.param_groups[1].update(lr=0.1, refresh=optim.Every(2))
        train(m, o, range(3, 8))
    assert_equal(weights(model), weights(other))


def test_options_that_an_older_file_does_not_have_get_their_defaults() -> None:
    model = network()
    optimizer = SOAP(model.parameters(), **OFTEN)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    for option in ("maximize", "one_sided"):
        del saved["param_groups"][0][option]
    fresh = SOAP(model.parameters(), **OFTEN)
    fresh.load_state_dict(saved)
    train(model, fresh, range(2, 4))


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_see_and_change_what_is_saved_and_loaded() -> None:
    model = network()
    optimizer = SOAP(model.parameters(), **OFTEN)
    train(model, optimizer, range(3))
    calls: list[str] = []

    def noted(what: str) -> Any:
        return lambda *arguments: calls.append(what)

    def add_note(owner: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("saved")
        assert "first" in next(iter(state["state"].values()))
        return {**state, "note": 7}

    optimizer.register_state_dict_pre_hook(noted("to be saved"))
    optimizer.register_state_dict_post_hook(add_note)
    saved = optimizer.state_dict()
    assert saved["note"] == 7

    def halve(owner: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("to be loaded")
        entries = {k: {**e, "first": e["first"] / 2} for k, e in state["state"].items()}
        return {**state, "state": entries}

    second = SOAP(model.parameters(), **OFTEN)
    second.register_load_state_dict_pre_hook(halve)
    second.register_load_state_dict_post_hook(noted("loaded"))
    second.load_state_dict(saved)
    assert calls == ["to be saved", "saved", "to be loaded", "loaded"]
    for p in model.parameters():
        assert torch.equal(second.state[p]["first"], optimizer.state[p]["first"] / 2)
    second.load_state_dict(saved)
    assert calls[4:] == ["to be loaded", "loaded"]


def test_hooks_of_steps_are_called() -> None:
    model, calls = network(), []
    optimizer = SOAP(model.parameters(), **OFTEN)
    optimizer.register_step_pre_hook(lambda *arguments: calls.append("before"))
    optimizer.register_step_post_hook(lambda *arguments: calls.append("after"))
    train(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


# --- names ----------------------------------------------------------------------------------------------------------


def named(model: nn.Module, prefix: str = "", *, backwards: bool = False) -> list[tuple[str, nn.Parameter]]:
    pairs = [(prefix + name, p) for name, p in model.named_parameters()]
    return pairs[::-1] if backwards else pairs


@pytest.mark.parametrize(("saved_as", "loaded_as"), [
    ({}, {"unnamed": True}), ({"unnamed": True}, {}),
    ({"prefix": "_orig_mod."}, {}), ({}, {"prefix": "module._orig_mod."}),
    ({"backwards": True}, {}), ({"prefix": "module."}, {"backwards": True}),
    ({"prefix": "model."}, {}), ({}, {"prefix": "net.0."}),
])  # fmt: skip
def test_parameters_find_their_states(saved_as: dict[str, Any], loaded_as: dict[str, Any]) -> None:
    def params(model: nn.Module, *, unnamed: bool = False, **options: Any) -> Any:
        return model.parameters() if unnamed else named(model, **options)

    model, other = network(), network()
    optimizer = SOAP(params(model, **saved_as), **OFTEN)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    second = SOAP(params(other, **loaded_as), **OFTEN)
    names = second.param_groups[0].get("param_names")
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["first"], second.state[q]["first"])
    if names is not None:
        assert second.param_groups[0]["param_names"] == names
    train(model, optimizer, range(3, 6))
    train(other, second, range(3, 6))
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-10, atol=1e-12)


def test_parameters_are_found_by_name_in_other_groups() -> None:
    model, other = network(), network()
    one, two = named(model)[:3], named(model)[3:]
    optimizer = SOAP([{"params": one, "lr": 0.1}, {"params": two}], **OFTEN)
    train(model, optimizer, range(3))
    pairs = named(other)
    second = SOAP([{"params": pairs[3:]}, {"params": pairs[:3]}], **OFTEN)
    second.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.1, 3e-3]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["first"], second.state[q]["first"])


def test_parameters_of_which_some_have_other_names_are_refused() -> None:
    model = network()
    optimizer = SOAP(named(model), **OFTEN)
    train(model, optimizer, range(2))
    pairs = [("head.weight" if name == "2.weight" else name, p) for name, p in named(model)]
    second = SOAP(pairs, **OFTEN)
    with pytest.raises(cv.errors.FormatError, match=r"head\.weight"):
        second.load_state_dict(optimizer.state_dict())
    assert not second.state
