"""Files that are damaged, foreign or newer are refused, as are objects no file can hold; a save is all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import curvlib as cv
from curvlib.checksums import described, sealed
from curvlib.errors import CurvlibError, FormatError
from curvlib.io import load, save
from curvlib.pytree import Domain, register, registered

torch.set_num_threads(1)
thorough = settings(deadline=None, max_examples=20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "curv.safetensors"


def curvature() -> cv.BlockDiagonal:
    model_fn, params = cv.functional(nn.Linear(3, 2))
    return cv.kfac(model_fn, params, (torch.ones(4, 3), torch.tensor([0, 1, 1, 0])))


def tampered(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Writes the file anew, with right checksums, after ``change`` has seen its json and tensors."""
    with safe_open(file, framework="pt") as opened:
        content = json.loads(opened.metadata()["curvlib"])
    del content["checksum"], content["tensors"]
    tensors = load_file(file)
    change(content, tensors)
    content["tensors"] = {name: described(tensor) for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"curvlib": json.dumps(sealed(content))})


def refused(file: Path, *words: str) -> None:
    with pytest.raises(FormatError) as refusal:
        load(file)
    assert isinstance(refusal.value, (CurvlibError, ValueError))
    for word in (str(file), *words):
        assert word in str(refusal.value)


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_file_that_was_truncated_anywhere_is_refused(file: Path) -> None:
    save(curvature(), file)
    whole = file.read_bytes()

    @thorough
    @given(st.integers(0, len(whole) - 1))
    def check(length: int) -> None:
        file.write_bytes(whole[:length])
        refused(file, "truncated", "save it again")

    check()


def test_a_header_with_a_flipped_byte_is_read_or_refused_but_never_crashes(file: Path) -> None:
    save(curvature(), file)
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")

    @settings(deadline=None, max_examples=200)
    @given(st.integers(0, end - 1), st.integers(0, 255))
    def check(place: int, byte: int) -> None:
        file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        with contextlib.suppress(FormatError):
            load(file)

    check()


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def named(tag: str, name: str) -> Change:
    return lambda content, tensors: content.update(structure={tag: name, "fields": {}})


DAMAGES: dict[str, tuple[Change, list[str]]] = {
    "a newer version": (lambda c, t: c.update(version=3), ["version 3", "up to 2", "update curvlib"]),
    "version zero": (lambda c, t: c.update(version=0), ["unknown"]),
    "a version in words": (lambda c, t: c.update(version="1"), ["unknown"]),
    "another format": (lambda c, t: c.update(format="other"), ["unknown"]),
    "no format": (lambda c, t: c.pop("format"), ["unknown"]),
    "no structure": (lambda c, t: c.pop("structure"), ["damaged"]),
    "a missing tensor": (lambda c, t: t.pop("matrix"), ["'matrix' is missing"]),
    "a tensor of another shape": (lambda c, t: t.update(matrix=torch.ones(3, 3)), ["damaged"]),
    "a missing field": (lambda c, t: c["structure"]["fields"].clear(), ["Dense", "matrix"]),
    "an unknown field": (lambda c, t: c["structure"]["fields"].update(new=1), ["Dense", "new"]),
    "an unknown class": (lambda c, t: c["structure"].update(registered="room.New"), ["room.New", "update curvlib"]),
    "a class of others": (
        lambda c, t: c["structure"].update(registered="theirs.ops:Mine"), ["theirs.ops:Mine", "import theirs.ops"],
    ),
    "an unknown tag": (lambda c, t: c.update(structure={"pickle": "..."}), ["damaged", "pickle"]),
    "a function": (named("dataclass", "os:system"), ["os:system", "no dataclass"]),
    "a class that is no named tuple": (named("namedtuple", "pathlib:Path"), ["pathlib:Path", "no named tuple"]),
    "a module that is missing": (named("namedtuple", "no.such:Thing"), ["no.such:Thing", "importable"]),
    "a name that is missing": (named("dataclass", "os:Thing"), ["os:Thing", "importable"]),
    "a dictionary without pairs": (lambda c, t: c.update(structure={"dict": [1]}), ["damaged"]),
    "an unknown dtype": (lambda c, t: c.update(structure={"dtype": "nn"}), ["damaged"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_the_words_that_help(damage: str, file: Path) -> None:
    change, words = DAMAGES[damage]
    save(cv.Dense(torch.eye(2)), file)
    assert load(file).trace() == 2
    tampered(file, lambda content, tensors: None)
    assert load(file).trace() == 2
    tampered(file, change)
    refused(file, *words)


def test_foreign_files_are_refused(file: Path) -> None:
    for content in (b"", b"text", os.urandom(999), bytes(64)):
        file.write_bytes(content)
        refused(file, "no safetensors file")
    torch.save(torch.eye(2), file)
    refused(file, "no safetensors file")
    for metadata in (None, {"format": "pt"}):
        save_file({"matrix": torch.eye(2)}, file, metadata=metadata)
        refused(file, "safetensors.torch.load_file")
    for text in ("", "[", "[]", "1", "[" * 100_000):
        save_file({"matrix": torch.eye(2)}, file, metadata={"curvlib": text})
        refused(file, "unknown")


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    with pytest.raises(OSError, match="directory"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        save(cv.Dense(torch.eye(2)), tmp_path / "no folder" / "file")


def test_containers_are_imported_and_refused_where_they_have_changed(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    note = "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Note:\n    x: int\n"
    pair = "from typing import NamedTuple\nclass Pair(NamedTuple):\n    a: object\n    b: object\n"

    def theirs(text: str) -> Any:
        (tmp_path / "theirs.py").write_text(text)
        sys.modules.pop("theirs", None)
        importlib.invalidate_caches()
        return importlib.import_module("theirs")

    domain = Domain.of(theirs(note + pair).Pair(torch.ones(1), torch.ones(2)))
    save((domain, sys.modules["theirs"].Note(3)), file)
    del sys.modules["theirs"]
    loaded, written = load(file)  # imports it
    assert (loaded.names, type(written).__name__, written.x) == (domain.names, "Note", 3)
    theirs(note + "    y: int = 7\n" + pair + "    c: object = None\n")
    assert load(file)[1].y == 7
    theirs(pair + note.replace("x", "y"))
    refused(file, "theirs:Note", "fields x", "y here")
    theirs(note + pair.replace("(NamedTuple)", ""))
    refused(file, "theirs:Pair", "no named tuple")
    theirs(note)
    refused(file, "theirs:Pair", "importable")
    (tmp_path / "theirs.py").unlink()
    del sys.modules["theirs"]
    refused(file, "theirs:Pair", "importable")


# --- writing ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MatrixFree:
    product: Any


@register
class Labelled:
    value: Any
    label: Any


Local = namedtuple("Elsewhere", "x")  # not found under its name
ONE = torch.ones(2)
REFUSALS: dict[str, tuple[Any, list[str]]] = {
    "a closure": (MatrixFree(lambda v: v), ["product", "function", "Dense"]),
    "a closure inside": ({"a": [Labelled(ONE, len)]}, ["a.0.label", "builtin_function"]),
    "a module": (nn.Linear(1, 1), ["the object", "Linear"]),
    "a set": ({"a": {1}}, ["a", "set"]),
    "a generator": (torch.Generator(), ["Generator"]),
    "a sparse tensor": (cv.Dense(torch.eye(2).to_sparse()), ["matrix", "sparse"]),
    "a tensor without values": (cv.Dense(torch.eye(2, device="meta")), ["matrix", "meta"]),
    "a complex tensor": ([ONE.cfloat()], ["0", "complex64"]),
    "a key that is a tuple": ({(1, 2): ONE}, ["(1, 2)", "str or int"]),
    "a key that is a truth value": ({True: ONE}, ["True", "str or int"]),
    "a named tuple that cannot be found": (Local(ONE), ["Elsewhere", "top of a module"]),
    "a structure where None is a leaf": (optree.tree_structure([None], none_is_leaf=True), ["the object", "flatten"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(what: str, file: Path) -> None:
    value, words = REFUSALS[what]
    with pytest.raises(FormatError) as refusal:
        save(value, file)
    for word in (str(file), *words):
        assert word in str(refusal.value)
    assert list(file.parent.iterdir()) == []


def test_saving_inside_a_transform_is_refused(file: Path) -> None:
    with pytest.raises(FormatError, match="outside"):
        torch.func.vmap(lambda x: (save(cv.Diagonal(x), file), x)[1])(torch.ones(2, 2))


def test_a_class_that_is_no_longer_registered_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Labelled(ONE, "x"), file)
    assert load(file).label == "x"
    monkeypatch.delitem(registered, f"{__name__}:Labelled")
    refused(file, "Labelled", f"import {__name__}")


@pytest.mark.parametrize("step", ["chmod", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    step: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(cv.Dense(torch.eye(2)), file)

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(KeyboardInterrupt):
            save(cv.Dense(torch.eye(3)), file)
    assert load(file).trace() == 2
    assert list(file.parent.iterdir()) == [file]


LIMITED = """
import resource, signal, sys, torch
from curvlib.io import save
from curvlib.operators import Dense
signal.signal(signal.SIGXFSZ, signal.Handlers(int(sys.argv[2])))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))  # bytes that a file may have
try:
    save(Dense(torch.ones(200, 200)), sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN], ids=["killed", "disk full"])
def test_a_save_that_ends_in_the_middle_of_the_write_leaves_the_old_file(action: int, file: Path) -> None:
    save(cv.Dense(torch.eye(2)), file)
    before = file.read_bytes()
    command = [sys.executable, "-c", LIMITED, str(file), str(int(action))]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if action == signal.SIG_DFL:
        assert process.returncode == -signal.SIGXFSZ
    else:
        assert (process.returncode, str(file) in process.stdout) == (0, True), process.stderr
        assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == before
    save(cv.Dense(torch.eye(3)), file)  # what was left lying about is in nobody's way
    assert load(file).trace() == 3


def test_a_saved_file_has_the_permissions_of_any_new_file_and_links_are_followed(tmp_path: Path, file: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    save(cv.Dense(torch.eye(2)), link)
    (tmp_path / "other").touch()
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
