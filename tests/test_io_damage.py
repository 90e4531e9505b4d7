"""A file of which a bit has changed is refused, or it makes no difference; files without checksums are still read."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import curvlib as cv
from curvlib.checksums import damage, described
from curvlib.errors import FormatError
from curvlib.io import load, save
from tests.operators.domain_cases import Pair

torch.set_num_threads(1)
thorough = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def network(estimator: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model_fn, params = cv.functional(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype))
    batch = torch.randn(8, 3, dtype=dtype), torch.arange(8) % 2
    return estimator(model_fn, params, batch, fisher="type-2")


def projection() -> cv.Projection:
    root = network(cv.kfac).power(-0.5, cv.FactoredTikhonov(0.1))
    return root.project(cv.sketch(root @ root.domain.tree([torch.ones(s) for s in root.domain.shapes]), rank=2))


def state() -> Any:
    moments = OrderedDict(b=torch.ones(2), a=Pair(torch.zeros(3, dtype=torch.int64), ("label", True, None)))
    return {"step": 17, "rate": 0.125, "moments": moments, 3: [torch.tensor([1.5, float("inf")]).half()]}


VALUES: dict[str, Callable[[], Any]] = {
    "kfac": lambda: network(cv.kfac),
    "ekfac": lambda: network(cv.ekfac, torch.float64),
    "diagonal": lambda: cv.Diagonal(torch.arange(9.0).reshape(3, 3)),
    "low precision": lambda: network(cv.kfac).to(dtype=torch.bfloat16),
    "truncated": lambda: network(cv.kfac).truncate(rank=1),
    "projection": projection,
    "state": state,
    "empty": lambda: [cv.Dense(torch.zeros(0, 0)), torch.zeros(3, 0), torch.tensor(True)],
}


@functools.cache
def saved(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(VALUES[kind](), Path(folder) / "value.safetensors")
        return (Path(folder) / "value.safetensors").read_bytes()


every_value = pytest.mark.parametrize("kind", VALUES)


def flipped(text: bytes, bit: int) -> bytes:
    changed = bytearray(text)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def check_flip(file: Path, whole: bytes, bit: int) -> None:
    """The file is refused by name, or what it holds is saved to the same bytes as before."""
    file.write_bytes(flipped(whole, bit))
    with contextlib.suppress(FormatError):
        save(load(file), file)
        assert file.read_bytes() == whole
        return
    with pytest.raises(FormatError, match=re.escape(str(file))):
        load(file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "curv.safetensors"


def test_no_bit_of_a_file_may_change(file: Path) -> None:
    save({"rate": 0.25, "curv": cv.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))}, file)
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        check_flip(file, whole, bit)


@every_value
@thorough
@given(data=st.data())
def test_no_bit_of_any_file_may_change(kind: str, data: st.DataObject, file: Path) -> None:
    whole = saved(kind)
    check_flip(file, whole, data.draw(st.integers(0, 8 * len(whole) - 1)))


@every_value
@thorough
@given(data=st.data())
def test_a_damaged_tensor_is_named(kind: str, data: st.DataObject, file: Path) -> None:
    whole = saved(kind)
    start = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(start, len(whole) - 1))
    spans = {name: info["data_offsets"] for name, info in json.loads(whole[8:start]).items() if name != "__metadata__"}
    [name] = [name for name, (first, end) in spans.items() if first <= place - start < end]
    file.write_bytes(flipped(whole, 8 * place + data.draw(st.integers(0, 7))))
    with pytest.raises(FormatError) as refusal:
        load(file)
    assert f"the tensor {name!r} is damaged" in str(refusal.value)
    assert str(file) in str(refusal.value)


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Writes the file anew after ``change`` has seen its json and tensors; checksums stay as they are."""
    with safe_open(file, framework="pt") as opened:
        content = json.loads(opened.metadata()["curvlib"])
    tensors = load_file(file)
    change(content, tensors)
    save_file(tensors, file, metadata={"curvlib": json.dumps(content)})


def swap(tensors: dict[str, Tensor]) -> None:
    tensors["0.matrix"], tensors["1.matrix"] = tensors["1.matrix"], tensors["0.matrix"]


REPLACEMENTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "tensors swapped": (lambda c, t: swap(t), "'0.matrix' is damaged"),
    "a tensor deleted": (lambda c, t: t.pop("1.matrix"), "'1.matrix' is missing"),
    "a tensor added": (lambda c, t: t.update(other=torch.ones(1)), "'other' is damaged"),
    "another dtype": (lambda c, t: t.update({"0.matrix": t["0.matrix"].view(torch.int32)}), "'0.matrix' is damaged"),
    "another shape": (lambda c, t: t.update({"0.matrix": t["0.matrix"].reshape(4, 1)}), "'0.matrix' is damaged"),
    "structure swapped": (lambda c, t: c["structure"].reverse(), "header is damaged"),
    "no checksum": (lambda c, t: c.pop("checksum"), "header is damaged"),
    "no checksums of tensors": (lambda c, t: c.pop("tensors"), "header is damaged"),
    "another version": (lambda c, t: c.update(version=0), "header is damaged"),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_what_belongs_to_another_place_or_file_is_refused(what: str, file: Path) -> None:
    change, message = REPLACEMENTS[what]
    save([cv.Dense(torch.eye(2)), cv.Dense(2 * torch.eye(2))], file)
    rewritten(file, lambda content, tensors: None)
    assert load(file)[1].trace() == 4
    rewritten(file, change)
    with pytest.raises(FormatError, match=message):
        load(file)


def without_checksums(content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Makes a file of version 1 of the format."""
    content["version"] = 1
    del content["checksum"], content["tensors"]


@every_value
def test_a_file_that_was_written_without_checksums_is_read(kind: str, file: Path) -> None:
    whole = saved(kind)
    file.write_bytes(whole)
    rewritten(file, without_checksums)
    assert len(file.read_bytes()) < len(whole)
    save(load(file), file)
    assert file.read_bytes() == whole


TENSORS = {
    "contiguous": torch.arange(6.0).reshape(2, 3),
    "permuted": torch.arange(6.0).reshape(3, 2).mT,
    "expanded": torch.ones(1).expand(2, 3),
    "expanded, of one element": torch.ones(1).as_strided((1,), (0,)),
    "of no axes": torch.tensor(3.0),
    "empty": torch.ones(0, 3),
    "bfloat16": torch.arange(6.0).bfloat16(),
    "bool": torch.tensor([True, False]),
    "negated view": torch.complex(torch.zeros(2), torch.ones(2)).conj().imag,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_checksum_is_that_of_values_however_they_lie_in_memory(kind: str) -> None:
    tensor = TENSORS[kind]
    same = tensor.clone(memory_format=torch.contiguous_format)
    assert damage({"x": same}, {"x": described(tensor)}) is None
    if tensor.numel():
        same.view(-1)[-1:].logical_not_()
        assert damage({"x": same}, {"x": described(tensor)}) is not None
    for other in (tensor.unsqueeze(0), tensor.to(torch.int32)):
        assert damage({"x": other}, {"x": described(tensor)}) is not None
