"""What an index on disk is made of: a json text beside its files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from curvlib.checksums import digest
from curvlib.errors import DtypeError, FormatError
from curvlib.io import settle
from curvlib.operators import Projection

FORMAT = "curvlib index"
VERSION = 1
MANIFEST = "manifest.json"
PROJECTION = "projection.safetensors"
DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as safetensors calls them


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype that rows may have.

    Raises:
        DtypeError: another dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, torch.dtype) or name not in DTYPES:
        raise DtypeError(f"rows may be of torch.{', torch.'.join(DTYPES)}, not of {dtype}")
    return name


@dataclasses.dataclass(frozen=True)
class BlockRow:
    """A block's part of every row.

    Args:
        name: of the block.
        parameters: the names of the parameters that it holds elements of.
        elements: how many.
        shape: of its sketch.
        offset: where the sketch begins in a row.
    """

    name: str
    parameters: tuple[str, ...]
    elements: int
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """How many numbers it takes."""
        return torch.Size(self.shape).numel()

    @property
    def part(self) -> slice:
        """Its place in a row."""
        return slice(self.offset, self.offset + self.size)


def block_rows(projection: Projection) -> tuple[BlockRow, ...]:
    """What a row is made of."""
    rows: list[BlockRow] = []
    for name, layout in projection.layouts:
        leaves = dict.fromkeys(projection.domain.names[piece.leaf] for piece in layout.pieces)
        offset = rows[-1].part.stop if rows else 0
        rows.append(BlockRow(name, tuple(leaves), layout.numel, projection.shapes[name], offset))
    return tuple(rows)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that rows depend on but the data.

    Args:
        blocks: what a row is made of.
        dtype: of the rows.
        shard_size: examples in a file.
        batch_size: examples whose gradients are taken together.
        loss: the objective, by name.
        params: fingerprint of the parameters.
        projection: fingerprint of the projection.
    """

    blocks: tuple[BlockRow, ...]
    dtype: str
    shard_size: int
    batch_size: int
    loss: str
    params: str
    projection: str

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return sum(block.size for block in self.blocks)

    @property
    def row_bytes(self) -> int:
        """How many bytes a row takes."""
        return self.width * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of rows."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for equal recipes."""
        return digest(dataclasses.asdict(self))

    def differences(self, other: Recipe) -> list[str]:
        """The names of what two recipes do not agree in."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of rows.

    Args:
        file: its name.
        examples: how many rows it has.
        rows: checksum of its rows: CRC-32, or SHA-256 in files of version 1.
        data: fingerprint of the examples that they belong to.
    """

    file: str
    examples: int
    rows: str
    data: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an index holds, and whether it is finished."""

    recipe: Recipe
    shards: tuple[Shard, ...]
    finished: bool

    @property
    def examples(self) -> int:
        """How many rows there are."""
        return sum(shard.examples for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Writes it in one step."""
        content = dataclasses.asdict(self)
        whole = {"format": FORMAT, "version": VERSION, "checksum": digest(content), "content": content}
        text = json.dumps(whole, indent=1)
        with unnamed(folder) as temporary:
            with open(temporary, "xb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            settle(temporary, folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, or None if it has none.

        Raises:
            FormatError: it is damaged, foreign or of a newer version.
        """
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        match found:
            case {"format": "curvlib index", "version": int(version)} if version > VERSION:
                raise FormatError(
                    f"cannot read {path}: it has version {version} of the format, and this curvlib reads up to "
                    f"{VERSION}; update curvlib"
                )
            case {"format": "curvlib index", "version": 1, "checksum": str(checksum), "content": content}:
                if digest(content) == checksum:
                    return cls.of(content)
        raise FormatError(
            f"cannot read {path}: it is damaged, or not the manifest of an index; delete the folder and build the "
            "index again, or give another path"
        )

    @classmethod
    def of(cls, content: Any) -> Manifest:
        """The inverse of `dataclasses.asdict`, through json."""
        recipe = dict(content["recipe"])
        blocks = [
            BlockRow(**{**block, "parameters": tuple(block["parameters"]), "shape": tuple(block["shape"])})
            for block in recipe.pop("blocks")
        ]
        shards = tuple(Shard(**shard) for shard in content["shards"])
        return cls(Recipe(tuple(blocks), **recipe), shards, content["finished"])

    def __str__(self) -> str:
        recipe, itemsize = self.recipe, self.recipe.torch_dtype.itemsize
        rows = [("block", "parameters", "sketch", "bytes a row", "share")]
        for block in recipe.blocks:
            shape = " x ".join(map(str, block.shape))
            share = f"{block.size / recipe.width:.1%}"
            rows.append((block.name, str(block.elements), shape, str(block.size * itemsize), share))
        elements = sum(block.elements for block in recipe.blocks)
        rows.append(("all", str(elements), "", str(recipe.row_bytes), "100.0%"))
        columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip() for row in rows
        ]
        total = self.examples * recipe.row_bytes
        lines.append(
            f"{self.examples} examples in {recipe.dtype}, {total} bytes of rows in {len(self.shards)} files; "
            "scores are attributed to these parameters only, not to what model_fn closes over"
        )
        return "\n".join(lines)


@contextlib.contextmanager
def unnamed(folder: Path) -> Iterator[Path]:
    """A name to write a file under that is not complete; it is deleted unless it has been moved by `settle`."""
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
