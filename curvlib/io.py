"""Curvature objects on disk: one safetensors file that holds tensors and, in its header, what they are part of.

The header has one entry of metadata, ``"curvlib"``: a json text with format, version, structure, a checksum for every
tensor, and one of the text. One file cannot be torn apart, and any safetensors reader can look at the tensors. Nothing
is pickled: a file holds no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curvlib.checksums import Json, damage, described, is_whole, sealed
from curvlib.errors import FormatError
from curvlib.linalg.eager import is_eager
from curvlib.serialize import Reader, Writer

FORMAT = "curvlib"
VERSION = 2  # files of version 1 have no checksums


def save(curv: Any, path: str | os.PathLike[str]) -> None:
    """Writes a curvature object, or a pytree of such objects and tensors, to one file.

    The file is complete or not there at all: it is written beside its place and moved there once it is on disk. An
    interrupted save leaves the old file, and perhaps files ``.*tmp*`` beside it that may be deleted.

    Values, dtypes, shapes and order in memory are kept bit for bit. Tensors that share memory are stored once, expanded
    axes not at all. Devices and ``requires_grad`` are not kept.

    Args:
        curv: a curvature object of any class made with `curvlib.pytree.register`, a `Sketch`, or lists, tuples, named
            tuples, dictionaries (keys are str or int) and dataclasses of them.
        path: where; ``*.safetensors`` by custom.

    Raises:
        FormatError: a part is no such thing, for example a function; the message names it.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import curvlib as cv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(cv.Dense(2 * torch.eye(3)), f"{folder}/curv.safetensors")
        ...     load(f"{folder}/curv.safetensors").inverse().trace()
        tensor(1.5000)
    """
    if not is_eager():
        raise FormatError(f"cannot save to {path}: save is called inside a transform or a trace; call it outside")
    writer = Writer(str(path), {}, {})
    content = {"format": FORMAT, "version": VERSION, "structure": writer.node(curv, ())}
    replace(Path(path).resolve(), separate(writer.tensors), FORMAT, content)


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Any:
    """Reads what `save` wrote.

    No code of the file runs. Modules it names are imported only to find named tuples and dataclasses, whose fields are
    then set without calling ``__init__``; operators are looked up among the classes that are registered already.

    Every tensor, and the json that says what they are part of, is compared with its checksum: a file of which any bit
    has changed is refused. Files of an earlier version, which had no checksums, are read without.

    Args:
        path: the file. It may be moved or deleted afterwards.
        device: where the tensors go.

    Returns:
        The object, with the values, dtypes, shapes and order in memory that were saved.

    Raises:
        FormatError: the file is truncated, damaged, foreign, or of a newer version; or a class or a tensor is missing.
        OSError: there is no such file, or it cannot be read.

    Example:
        >>> import tempfile
        >>> import curvlib as cv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"step": 3, "curv": cv.Diagonal(torch.tensor([1.0, 4.0]))}, f"{folder}/state.safetensors")
        ...     state = load(f"{folder}/state.safetensors", device="cpu")
        >>> state["step"], state["curv"].power(0.5).trace()
        (3, tensor(3.))
    """
    with open(path, "rb"):  # fails in Python's own words
        pass
    try:
        with safe_open(path, framework="pt") as file:
            content = read_header(str(path), (file.metadata() or {}).get(FORMAT))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            fault = damage(stored, content["tensors"]) if "tensors" in content else None
            if fault is not None:
                raise FormatError(f"cannot load {path}: {fault}; save it again")
            tensors = {name: tensor.to(device, copy=True) for name, tensor in stored.items()}
    except SafetensorError as error:
        raise FormatError(
            f"cannot load {path}: it is truncated, or no safetensors file ({error}); save it again"
        ) from error
    return Reader(str(path), tensors).read(content["structure"])


def read_header(path: str, text: str | None) -> dict[str, Json]:
    """The json of a file, if format and version are known and its checksum is right."""
    if text is None:
        raise FormatError(
            f"cannot load {path}: it is a safetensors file, but holds tensors only and was not written by curvlib; "
            "read it with safetensors.torch.load_file"
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    match content:
        case {"format": "curvlib", "version": 1, "structure": _}:
            return {"structure": content["structure"]}
        case {"format": "curvlib", "version": 2, "structure": _, "tensors": dict()} if is_whole(content):
            return content
        case {"format": "curvlib", "version": int(version)} if version > VERSION:
            raise FormatError(
                f"cannot load {path}: it has version {version} of the format, and this curvlib reads up to {VERSION}; "
                "update curvlib"
            )
    raise FormatError(f"cannot load {path}: its format is unknown or its header is damaged; save it again")


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of which lie in the same storage."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        start = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if start in seen else tensor
        seen.add(start)
    return result


def replace(path: Path, tensors: dict[str, Tensor], name: str, content: dict[str, Json]) -> None:
    """Writes a file beside ``path``, waits until it is on disk, and moves it there in one step.

    The header holds ``content`` under this name, with descriptions of all tensors and a checksum.
    """
    whole = sealed(content | {"tensors": {key: described(tensor) for key, tensor in tensors.items()}})
    # one entry: the order in which safetensors writes several is random
    metadata = {name: json.dumps(whole, allow_nan=False, separators=(",", ":"))}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        settle(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def settle(temporary: Path, path: Path) -> None:
    """Gives a file that is complete and on disk its name in one step."""
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # the new name reaches the disk too, where folders can be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
