"""An index of which a bit has changed is refused, or it makes no difference; earlier versions are still read."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib as cv
import curvlib.influence
import curvlib.io
from curvlib.checksums import Crc32, digest
from curvlib.errors import FormatError
from curvlib.influence import evaluate, shards
from tests.influence.index_cases import (
    SHARD,
    Counting,
    StoppedError,
    build,
    contents,
    examples,
    projection_of,
    small,
    stopped_after,
)
from tests.influence.influence_cases import examples as part_of
from tests.influence.influence_cases import in_batches

CASE = small()
DATA = examples(30)  # three shards of eight, and one of six
PROJECTION = projection_of(CASE)
SKETCHES = PROJECTION(cv.per_example_gradients(CASE.model_fn, CASE.params, CASE.queries))
thorough = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    build(tmp_path / "finished", CASE, DATA)
    return tmp_path / "finished"


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    with pytest.raises(StoppedError):
        build(tmp_path / "stopped", CASE, stopped_after(in_batches(DATA, *[1] * 25)))
    return tmp_path / "stopped"


def flip(file: Path, bit: int) -> None:
    changed = bytearray(file.read_bytes())
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)


def draw_flip(data: st.DataObject, folder: Path) -> tuple[str, int]:
    """One of the files, and a bit of it: of its beginning (headers) as often as of the rest."""
    name = data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir())))
    bits = 8 * (folder / name).stat().st_size
    return name, data.draw(st.integers(0, min(8 * 600, bits) - 1) | st.integers(0, bits - 1))


def restore(folder: Path, before: dict[str, bytes]) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for name, text in before.items():
        (folder / name).write_bytes(text)


def answers(index: cv.influence.Index) -> list[Any]:
    """All that an index can be asked."""
    found = index.top(SKETCHES, k=3)
    parts = index.scores(SKETCHES, by_block=True)
    assert isinstance(parts, dict)
    data = index.scores(CASE.model_fn, CASE.params, CASE.queries)
    return [str(index), len(index), data, *found, *parts.values()]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """What it gives, or why a file was refused."""
    try:
        return action(), ""
    except FormatError as error:
        return None, str(error)


# --- bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("verify", [False, True])
def test_no_bit_of_an_index_may_change(tmp_path: Path, dtype: torch.dtype, verify: bool) -> None:
    expected = answers(build(tmp_path / "index", CASE, DATA, dtype=dtype))
    before = contents(tmp_path / "index")

    @thorough
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name, bit = draw_flip(data, tmp_path / "index")
        flip(tmp_path / "index" / name, bit)
        found, refusal = attempt(lambda: answers(cv.influence.load(tmp_path / "index", verify=verify)))
        (tmp_path / "index" / name).write_bytes(before[name])
        assert name in refusal if refusal else same(found, expected)

    check()


def test_no_bit_of_rows_or_of_what_describes_them_may_change(finished: Path) -> None:
    file = finished / "000003-6.safetensors"
    before = file.read_bytes()
    for place in (*range(8), *range(8, 900, 7), *range(shards.HEADER, len(before), 11)):
        flip(file, 8 * place + place % 8)
        index = cv.influence.load(finished)
        with pytest.raises(FormatError, match=file.name):
            index.scores(SKETCHES)
        with pytest.raises(FormatError, match=file.name):
            cv.influence.load(finished, verify=True)
        file.write_bytes(before)


def test_a_build_never_goes_on_from_a_damaged_file(finished: Path, stopped: Path) -> None:
    before, expected = contents(stopped), contents(finished)

    @settings(thorough, max_examples=30)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        restore(stopped, before)
        name, bit = draw_flip(data, stopped)
        flip(stopped / name, bit)
        _, refusal = attempt(lambda: build(stopped, CASE, DATA))
        assert name in refusal if refusal else contents(stopped) == expected

    check()


def test_appending_never_goes_on_from_a_damaged_file(tmp_path: Path, finished: Path) -> None:
    build(tmp_path / "index", CASE, part_of(DATA, 0, 21))
    before, expected = contents(tmp_path / "index"), contents(finished)

    @settings(thorough, max_examples=30)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        restore(tmp_path / "index", before)
        name, bit = draw_flip(data, tmp_path / "index")
        flip(tmp_path / "index" / name, bit)
        _, refusal = attempt(lambda: build(tmp_path / "index", CASE, DATA, append=True))
        assert name in refusal if refusal else contents(tmp_path / "index") == expected

    check()


@thorough
@given(data=st.data())
def test_no_bit_of_a_result_of_retraining_may_change(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("retraining")
    values, subsets = torch.arange(6.0), evaluate.subsets(6, number=2)

    def train(chosen: Tensor, seed: int) -> Tensor:
        return values[chosen].mean() - torch.tensor([0.0, seed])

    expected = evaluate.retrain(train, subsets, path=folder)
    name, bit = draw_flip(data, folder)
    flip(folder / name, bit)
    found, refusal = attempt(lambda: evaluate.retrain(train, subsets, path=folder))
    assert name in refusal if refusal else torch.equal(found, expected)


def test_a_result_of_retraining_without_checksums_is_read(tmp_path: Path) -> None:
    subsets = evaluate.subsets(6, number=1)
    evaluate.retrain(lambda chosen, seed: torch.tensor([2.0, 3.0]), subsets, path=tmp_path)
    [file] = tmp_path.iterdir()
    header, rest = split(file.read_bytes())
    content = json.loads(header["__metadata__"]["curvlib.retraining"])
    header["__metadata__"]["curvlib.retraining"] = json.dumps(
        {"format": "curvlib.retraining", "version": 1, "subset": content["subset"]}
    )
    file.write_bytes(together(header, rest))
    assert evaluate.retrain(lambda chosen, seed: torch.zeros(2), subsets, path=tmp_path).tolist() == [[2.0, 3.0]]


# --- when checksums are compared ------------------------------------------------------------------------------------


def test_opening_reads_no_rows_unless_it_is_told_to(finished: Path) -> None:
    flip(finished / "000002-8.safetensors", -5)
    index = cv.influence.load(finished)
    for _ in range(2):
        with pytest.raises(FormatError, match=r"000002-8.safetensors is damaged.*'rows'.*delete it and build"):
            index.scores(SKETCHES)
    with pytest.raises(FormatError, match=r"000002-8.safetensors is damaged"):
        cv.influence.load(finished, verify=True)


def test_rows_are_verified_when_they_are_read_for_the_first_time_and_when_they_have_changed(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    update = Crc32.update
    monkeypatch.setattr(Crc32, "update", lambda self, data: (sizes.append(len(data)), update(self, data))[1])

    def verified(action: Callable[[], Any]) -> int:
        sizes.clear()
        action()
        return sum(sizes)

    index = cv.influence.load(finished)
    each = index.manifest.recipe.row_bytes
    assert verified(lambda: index.top(SKETCHES, k=2)) == 30 * each
    assert verified(lambda: index.scores(SKETCHES)) == 0
    assert verified(lambda: copy.deepcopy(index).scores(SKETCHES)) == 0
    assert verified(lambda: cv.influence.load(finished).scores(SKETCHES, by_block=True)) == 30 * each
    os.utime(finished / "000001-8.safetensors", (1, 1))
    assert verified(lambda: index.scores(SKETCHES)) == SHARD * each
    projections = verified(lambda: curvlib.io.load(finished / "projection.safetensors"))
    opened = cv.influence.load(finished, verify=True)
    assert verified(opened.check) == projections + 30 * each
    assert verified(lambda: opened.scores(SKETCHES)) == 0
    flip(finished / "000001-8.safetensors", -1)
    for known in (index, opened):
        with pytest.raises(FormatError, match=r"000001-8.safetensors is damaged"):
            known.scores(SKETCHES)


def test_copies_of_an_index_are_the_same_index(finished: Path) -> None:
    index = cv.influence.load(finished)
    expected = answers(index)
    for used in (index, cv.influence.load(finished)):
        for other in (copy.copy(used), copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
            assert other == index
            assert hash(other) == hash(index)
            assert same(answers(other), expected)


# --- the projection ---------------------------------------------------------------------------------------------------


def test_a_projection_that_is_missing_is_said_to_be_and_written_again(finished: Path) -> None:
    before = contents(finished)
    (finished / "projection.safetensors").unlink()
    index = cv.influence.load(finished)
    assert index.scores(SKETCHES).shape == (4, 30)  # needs none
    for action in (
        lambda: index.projection,
        lambda: index.scores(CASE.model_fn, CASE.params, CASE.queries),
        lambda: index.top(CASE.model_fn, CASE.params, CASE.queries, k=1),
        index.check,
        lambda: cv.influence.load(finished, verify=True),
    ):
        with pytest.raises(FormatError, match=r"projection.safetensors: .*missing; build the index again"):
            action()
    model = Counting(CASE)
    build(finished, CASE, DATA, model_fn=model)
    assert model.count == 0
    assert contents(finished) == before


def test_a_damaged_projection_is_refused_and_written_again_once_it_is_deleted(finished: Path) -> None:
    before, file = contents(finished), finished / "projection.safetensors"
    flip(file, -9)
    for action in (
        lambda: cv.influence.load(finished).projection,
        lambda: cv.influence.load(finished, verify=True),
        lambda: build(finished, CASE, DATA),
    ):
        with pytest.raises(FormatError, match=r"projection.safetensors: the tensor .* is damaged.*delete it and build"):
            action()
    file.unlink()
    build(finished, CASE, DATA)
    assert contents(finished) == before


# --- earlier and later versions -------------------------------------------------------------------------------------


def split(text: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file, and the rest."""
    end = 8 + int.from_bytes(text[:8], "little")
    return json.loads(text[8:end]), text[end:]


def together(header: Any, rest: bytes, size: int = 0) -> bytes:
    text = json.dumps(header).encode().ljust(size)
    return len(text).to_bytes(8, "little") + text + rest


def as_version_1(folder: Path) -> None:
    """Writes files as the first version of the format had them: SHA-256 of rows, and no checksum in their headers."""
    sums = {}
    for file in folder.glob("0*.safetensors"):
        header, rest = split(file.read_bytes())
        described = json.loads(header["__metadata__"]["curvlib"])
        sums[file.name] = hashlib.sha256(rest).hexdigest()
        first = {"format": "curvlib rows", "version": 1, "recipe": described["recipe"], "number": described["number"]}
        first |= {"rows": sums[file.name], "data": described["data"]}
        header["__metadata__"]["curvlib"] = json.dumps(first)
        file.write_bytes(together(header, rest, 4088))
    manifest = json.loads((folder / "manifest.json").read_text())
    content = manifest["content"]
    for shard in content["shards"]:
        shard["rows"] = sums[shard["file"]]
    assert manifest["version"] == 1
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": digest(content)}))
    header, rest = split((folder / "projection.safetensors").read_bytes())
    stored = json.loads(header["__metadata__"]["curvlib"])
    header["__metadata__"]["curvlib"] = json.dumps(
        {"format": "curvlib", "version": 1, "structure": stored["structure"]}
    )
    (folder / "projection.safetensors").write_bytes(together(header, rest))


def test_an_index_written_by_the_first_version_still_loads(finished: Path) -> None:
    expected = answers(cv.influence.load(finished))
    as_version_1(finished)
    before = contents(finished)
    assert same(answers(cv.influence.load(finished, verify=True)), expected)
    model = Counting(CASE)
    assert same(answers(build(finished, CASE, DATA, model_fn=model)), expected)
    assert model.count == 0
    assert contents(finished) == before
    flip(finished / "000001-8.safetensors", -3)  # its rows have checksums
    with pytest.raises(FormatError, match=r"000001-8.safetensors is damaged"):
        cv.influence.load(finished).scores(SKETCHES)


def test_builds_go_on_from_files_of_the_first_version(tmp_path: Path, finished: Path, stopped: Path) -> None:
    expected = answers(cv.influence.load(finished))
    build(tmp_path / "index", CASE, part_of(DATA, 0, 21))
    for folder, append, computed in ((stopped, False, 30 - 3 * SHARD), (tmp_path / "index", True, 30 - 2 * SHARD)):
        as_version_1(folder)
        model = Counting(CASE)
        assert same(answers(build(folder, CASE, DATA, append=append, model_fn=model)), expected)
        assert model.count == computed
        assert same(answers(cv.influence.load(folder, verify=True)), expected)


@pytest.mark.parametrize("version", [3, 99])
def test_files_of_a_later_version_are_refused(finished: Path, version: int) -> None:
    file = finished / "000001-8.safetensors"
    header, rest = split(file.read_bytes())
    described = json.loads(header["__metadata__"]["curvlib"])
    header["__metadata__"]["curvlib"] = json.dumps(described | {"version": version})
    file.write_bytes(together(header, rest, 4088))
    with pytest.raises(FormatError, match=rf"000001-8.safetensors: version {version} is newer .*update curvlib"):
        cv.influence.load(finished).scores(SKETCHES)


@pytest.mark.parametrize("version", [0, 1.5, "1", None])
def test_files_of_no_version_are_refused(finished: Path, version: Any) -> None:
    file = finished / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": version}))
    with pytest.raises(FormatError, match=r"manifest.json: it is damaged"):
        cv.influence.load(finished)


def test_rows_of_another_dtype_or_place_are_refused(finished: Path) -> None:
    first, second = finished / "000000-8.safetensors", finished / "000001-8.safetensors"
    one, two = first.read_bytes(), second.read_bytes()
    header, rest = split(one)
    header["rows"]["dtype"] = "I32"
    others = [(two, "header is damaged"), (together(header, rest, 4088), "header is damaged")]
    others.append((one[: shards.HEADER] + two[shards.HEADER :], "is damaged"))
    for text, message in others:
        first.write_bytes(text)
        with pytest.raises(FormatError, match=rf"{first.name}.*{message}"):
            cv.influence.load(finished).scores(SKETCHES)
