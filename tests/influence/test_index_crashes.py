"""An index that is stopped, resumed, extended, replaced and damaged."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlib as cv
import curvlib.influence
from curvlib.errors import ArgumentError, FormatError, NonFiniteError
from curvlib.influence import shards
from tests.influence.index_cases import (
    SHARD,
    Counting,
    StoppedError,
    build,
    contents,
    examples,
    projection_of,
    ragged,
    small,
    stopped_after,
)
from tests.influence.influence_cases import Batch, in_batches
from tests.influence.influence_cases import examples as part_of

CASE = small()
DATA = examples(30)  # three shards of eight, and one of six
RUN = """
import runpy, sys, types
package = types.ModuleType("tests")
package.__path__ = ["tests"]
sys.modules["tests"] = package
runpy.run_module("tests.influence.killed_builds", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    build(tmp_path / "finished", CASE, DATA)
    return tmp_path / "finished"


def flip(file: Path, place: int) -> None:
    text = bytearray(file.read_bytes())
    text[place] ^= 1
    file.write_bytes(text)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_builds_that_are_killed_end_with_the_bytes_of_one_that_is_not(kills: int) -> None:
    root, environment = Path(__file__).parents[2], os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RUN, str(kills), "0"], cwd=root, env=environment, check=True)


@pytest.mark.parametrize("read", [1, 7, 8, 9, 16, 29, 30])
def test_a_build_goes_on_where_it_stopped(tmp_path: Path, finished: Path, read: int) -> None:
    with pytest.raises(StoppedError):
        build(tmp_path / "index", CASE, stopped_after(in_batches(DATA, *[1] * read)))
    with pytest.raises(FormatError, match="not finished"):
        cv.influence.load(tmp_path / "index")
    model = Counting(CASE)
    build(tmp_path / "index", CASE, ragged(DATA, [5]), model_fn=model)
    assert model.count == 30 - read // SHARD * SHARD  # complete files are not computed again
    assert contents(tmp_path / "index") == contents(finished)


def test_a_finished_index_is_not_built_again(finished: Path) -> None:
    before, model = contents(finished), Counting(CASE)
    times = {file: file.stat().st_mtime_ns for file in finished.iterdir()}
    assert len(build(finished, CASE, ragged(DATA, [1]), model_fn=model)) == 30
    assert model.count == 0
    assert contents(finished) == before
    assert times == {file: file.stat().st_mtime_ns for file in finished.iterdir()}


@pytest.mark.parametrize("first", [3, 8, 21, 24])
def test_appending_gives_what_building_at_once_gives(tmp_path: Path, finished: Path, first: int) -> None:
    index = build(tmp_path / "index", CASE, part_of(DATA, 0, first))
    sketches = projection_of(CASE)(cv.per_example_gradients(CASE.model_fn, CASE.params, CASE.queries))
    before = index.scores(sketches)
    with pytest.raises(StoppedError):
        build(tmp_path / "index", CASE, stopped_after(in_batches(DATA, *[1] * 29)), append=True)
    assert torch.equal(cv.influence.load(tmp_path / "index").scores(sketches), before)
    assert len(build(tmp_path / "index", CASE, part_of(DATA, 0, first))) == first
    assert len(build(tmp_path / "index", CASE, DATA, append=True)) == 30
    assert contents(tmp_path / "index") == contents(finished)
    assert len(build(tmp_path / "index", CASE, DATA, append=True)) == 30  # nothing is added twice


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (examples(30, seed=1), "examples 0 to 7"),
        (part_of(DATA, 0, 29), "examples 24 to 29"),
        (part_of(DATA, 0, 24), "end after 24 examples"),
        (tuple(torch.cat([x, x[:1]]) for x in DATA), "append=True"),
        ((torch.cat([DATA[0][:20], DATA[0][20:].flip(0)]), DATA[1]), "examples 16 to 23"),
        ((DATA[0].float(), DATA[1]), "examples 0 to 7"),
    ],
)
def test_other_data_are_refused(finished: Path, data: Batch, message: str) -> None:
    before = contents(finished)
    for append in (False, True) if "append" not in message else (False,):
        with pytest.raises(ArgumentError, match=message):
            build(finished, CASE, data, append=append)
        assert contents(finished) == before


def test_another_order_is_noticed_on_resumption(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        build(tmp_path, CASE, stopped_after(in_batches(DATA, *[1] * 20)))
    with pytest.raises(ArgumentError, match="another order"):
        build(tmp_path, CASE, tuple(x.flip(0) for x in DATA))


OTHERS: dict[str, dict[str, Any]] = {
    "projection": {"projection": projection_of(CASE, seed=1)},
    "params": {"params": {name: leaf + 1e-9 for name, leaf in CASE.params.items()}},
    "loss": {"loss": cv.CrossEntropy(ignore_index=2)},
    "dtype": {"dtype": torch.bfloat16},
    "shard_size": {"shard_size": 4},
    "batch_size": {"batch_size": 2},
    "blocks": {"projection": projection_of(CASE, rank=2)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_index_made_in_another_way_is_refused_and_replaced_on_demand_only(
    tmp_path: Path, finished: Path, what: str
) -> None:
    before = contents(finished)
    with pytest.raises(ArgumentError, match=rf"differs in .*{what}.*overwrite=True"):
        build(finished, CASE, DATA, **OTHERS[what])
    assert contents(finished) == before
    build(finished, CASE, DATA, **OTHERS[what], overwrite=True)
    build(tmp_path / "other", CASE, DATA, **OTHERS[what])
    assert contents(finished) == contents(tmp_path / "other")


def test_other_data_replace_on_demand(tmp_path: Path, finished: Path) -> None:
    data = examples(13, seed=3)
    build(tmp_path / "other", CASE, data)
    build(finished, CASE, ragged(data, [4]), overwrite=True)
    assert contents(finished) == contents(tmp_path / "other")


def test_overwrite_keeps_what_belongs_to_the_same_arguments(finished: Path) -> None:
    model = Counting(CASE)
    build(finished, CASE, DATA, model_fn=model, overwrite=True)
    assert model.count == 0


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [shards.HEADER, shards.HEADER + 1000, -1])
def test_a_damaged_row_is_found_by_its_checksum(finished: Path, place: int) -> None:
    flip(finished / "000001-8.safetensors", place)
    for action in (cv.influence.load(finished).check, lambda: build(finished, CASE, DATA)):
        with pytest.raises(FormatError, match=r"000001-8.safetensors is damaged.*delete it and build"):
            action()


@pytest.mark.parametrize("place", [0, 9, 60, 300])
def test_a_damaged_header_is_found_when_rows_are_read(finished: Path, place: int) -> None:
    flip(finished / "000000-8.safetensors", place)
    index = cv.influence.load(finished)
    for action in (index.check, lambda: index.top(CASE.model_fn, CASE.params, CASE.queries, k=1)):
        with pytest.raises(FormatError, match=r"000000-8.safetensors"):
            action()


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(("damage", "message"), [(Path.unlink, "missing"), (shorten, "in place of")])
def test_a_file_that_is_missing_or_truncated_is_named_and_computed_again(
    finished: Path, damage: Callable[[Path], None], message: str
) -> None:
    before, file = contents(finished), finished / "000002-8.safetensors"
    damage(file)
    with pytest.raises(FormatError, match=rf"000002-8.safetensors: .*{message}"):
        cv.influence.load(finished)
    file.unlink(missing_ok=True)
    model = Counting(CASE)
    build(finished, CASE, DATA, model_fn=model)
    assert model.count == SHARD
    assert contents(finished) == before


def test_a_damaged_manifest_is_named(finished: Path) -> None:
    flip(finished / "manifest.json", -200)
    for action in (lambda: cv.influence.load(finished), lambda: build(finished, CASE, DATA, overwrite=True)):
        with pytest.raises(FormatError, match=r"manifest.json: it is damaged.*delete the folder"):
            action()


def test_a_newer_version_is_not_read(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    (finished / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(FormatError, match=r"version 99.*update curvlib"):
        cv.influence.load(finished)


def test_another_projection_in_the_folder_is_noticed(finished: Path) -> None:
    cv.save(projection_of(CASE, seed=5), finished / "projection.safetensors")
    with pytest.raises(FormatError, match=r"projection.safetensors is not the projection"):
        cv.influence.load(finished).scores(CASE.model_fn, CASE.params, CASE.queries)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FormatError, match=r"holds no index, but thesis.tex"):
        build(tmp_path, CASE, DATA, overwrite=overwrite)
    with pytest.raises(FormatError, match="no index"):
        cv.influence.load(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"all of it"}
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cv.influence.load(tmp_path / "nowhere")


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = cv.influence.estimate_size(projection_of(CASE), 30, shard_size=SHARD)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=f"needs {needed} bytes more and the disk has {needed - 1}"):
        build(tmp_path, CASE, ragged(DATA, [4]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert len(build(tmp_path, CASE, ragged(DATA, [4]))) == 30


def test_a_row_that_is_not_finite_is_named(tmp_path: Path) -> None:
    inputs = DATA[0].clone()
    inputs[20, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"block '0.weight': the sketch of example 20 "):
        build(tmp_path, CASE, (inputs, DATA[1]))


def peak(path: Path, batches: int) -> int:
    """The bytes of all tensors that are alive while the last batches are read."""
    found = [0]

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(batches):
            if number >= batches - 2:
                gc.collect()
                alive = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors()}
                found[0] = max(found[0], sum(alive.values()))
            yield examples(16, seed=number)

    build(path, CASE, cv.over(loader()), shard_size=4096)
    return found[0]


def tensors() -> list[Tensor]:
    return [x for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu" and x.layout == torch.strided]


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path: Path) -> None:
    projection_of(CASE)  # makes what is made once
    one, four = peak(tmp_path / "one", 10), peak(tmp_path / "four", 40)
    assert four <= one + 1000  # a batch has 896 bytes
