"""Files of rows: safetensors with one tensor, written row by row and mapped into memory for reading.

Every header has the same length, so that it can be written last, when the checksum of the rows is known, and so that
the rows begin at a page. A file gets its name when it is complete and on disk. Files of version 1 have SHA-256 of their
rows in place of CRC-32, and no checksum of what the header says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from curvlib.checksums import Crc32, content, is_whole, sealed
from curvlib.errors import FormatError
from curvlib.influence.manifest import DTYPES, Recipe, Shard, unnamed
from curvlib.io import settle

HEADER = 4096
CHUNK = 1 << 22  # bytes that are looked at together
FORMAT = "curvlib rows"
VERSION = 2
AGAIN = "delete it and build the index again with the same arguments, which computes only this file"


def file_name(number: int, examples: int) -> str:
    """The name of a shard's file."""
    return f"{number:06}-{examples}.safetensors"


def numbers(file: str) -> tuple[int, int] | None:
    """(number, examples) of a file's name, or None if it is not that of a shard."""
    number, _, examples = file.removesuffix(".safetensors").partition("-")
    known = number.isdecimal() and examples.isdecimal() and file == file_name(int(number), int(examples))
    return (int(number), int(examples)) if known else None


def header(recipe: Recipe, number: int, shard: Shard) -> bytes:
    """The first bytes of a shard's file."""
    described = {"format": FORMAT, "version": VERSION, "recipe": recipe.fingerprint, "number": number}
    described |= {"rows": shard.rows, "data": shard.data}
    text = json.dumps(
        {
            "__metadata__": {"curvlib": json.dumps(sealed(described))},
            "rows": {
                "dtype": DTYPES[recipe.dtype],
                "shape": [shard.examples, recipe.width],
                "data_offsets": [0, shard.examples * recipe.row_bytes],
            },
        }
    )
    return (HEADER - 8).to_bytes(8, "little") + text.encode().ljust(HEADER - 8)


class ShardWriter:
    """Writes rows to a file that gets its name when it is finished.

    Args:
        file: to write to.
        path: its name until then.
        recipe: what the rows are.
    """

    def __init__(self, file: BinaryIO, path: Path, recipe: Recipe) -> None:
        self.file, self.path, self.recipe = file, path, recipe
        self.checksum = Crc32()
        file.write(bytes(HEADER))

    def append(self, rows: Tensor) -> None:
        """Writes rows [n, width]."""
        stored = content(rows)
        self.checksum.update(stored)
        self.file.write(stored)

    def finish(self, number: int, examples: int, data: str) -> Shard:
        """Writes the header, waits until all is on disk, and gives the file its name."""
        shard = Shard(file_name(number, examples), examples, self.checksum.hexdigest(), data)
        self.file.seek(0)
        self.file.write(header(self.recipe, number, shard))
        self.file.flush()
        os.fsync(self.file.fileno())
        settle(self.path, self.path.with_name(shard.file))
        return shard


@contextlib.contextmanager
def writer(folder: Path, recipe: Recipe) -> Iterator[ShardWriter]:
    """A writer of a shard; nothing stays if it is left before it is finished."""
    with unnamed(folder) as path, open(path, "xb") as file:
        yield ShardWriter(file, path, recipe)


def read(folder: Path, file: str, recipe: Recipe) -> Shard | None:
    """What the header of a shard says, or None if its rows are of another recipe.

    Raises:
        FormatError: the file is truncated or damaged, or not a shard; names it.
    """
    path, expected = folder / file, numbers(file)
    try:
        with safe_open(path, framework="pt") as opened:
            described = json.loads((opened.metadata() or {})["curvlib"])
            stored = opened.get_slice("rows")
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FormatError(f"cannot read {path}: it is truncated or damaged ({error}); {AGAIN}") from error
    match described:
        case {"format": "curvlib rows", "version": int(version)} if version > VERSION:
            raise FormatError(f"cannot read {path}: version {version} is newer than this curvlib's; update curvlib")
        case {"format": "curvlib rows", "version": 1 | 2 as version, "recipe": str(made_by), "number": int(number)} if (
            version == 1 or is_whole(described)
        ):
            if made_by != recipe.fingerprint:
                return None
            if (number, *shape, dtype) == (*(expected or ()), recipe.width, DTYPES[recipe.dtype]):
                return Shard(file, shape[0], described["rows"], described["data"])
    raise FormatError(f"cannot read {path}: its header is damaged; {AGAIN}")


def state(folder: Path, shard: Shard, recipe: Recipe) -> tuple[int, int]:
    """What changes when the file does, without opening it.

    Raises:
        FormatError: it is missing, or not as long as it should be; names it.
    """
    path = folder / shard.file
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise FormatError(
            f"cannot read {path}: it is missing; build the index again with the same arguments, which computes only "
            "this file"
        ) from error
    expected = HEADER + shard.examples * recipe.row_bytes
    if found.st_size != expected:
        raise FormatError(f"cannot read {path}: it has {found.st_size} bytes in place of {expected}; {AGAIN}")
    return found.st_ino, found.st_mtime_ns


def parts(folder: Path, shard: Shard, recipe: Recipe, step: int, *, verify: bool) -> Iterator[Tensor]:
    """The rows [n, width] of a shard, mapped into memory, n at most ``step``.

    If they are to be verified, their checksum is known, and compared, once the last part has been used.

    Raises:
        FormatError: the header is not what the manifest says, or the rows are damaged; names the file.
    """
    path = folder / shard.file
    if read(folder, shard.file, recipe) != shard:
        raise FormatError(f"cannot read {path}: it does not belong to the manifest; {AGAIN}")
    with safe_open(path, framework="pt") as opened:
        rows: Tensor = opened.get_tensor("rows")
    checksum = hashlib.sha256() if len(shard.rows) == 64 else Crc32()
    for part in rows.split(step):
        if verify:
            checksum.update(content(part))
        yield part
    if verify and checksum.hexdigest() != shard.rows:
        raise FormatError(f"{path} is damaged: the checksum of its tensor 'rows' is another one; {AGAIN}")


def check(folder: Path, shard: Shard, recipe: Recipe) -> None:
    """Reads all rows and compares their checksum.

    Raises:
        FormatError: the file is damaged; names it.
    """
    for _ in parts(folder, shard, recipe, max(1, CHUNK // recipe.row_bytes), verify=True):
        pass
