"""Checksums of what lies on disk: CRC-32 of the bytes of tensors, and SHA-256 of the json that describes them.

CRC-32 finds every change that lies within 32 bits, so of any single bit, and all others but one in 2^32. It is several
times faster than cryptographic hashes on most processors.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Json = Any


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values in row-major order."""
    stored = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = stored.as_strided((stored.numel(),), (1,))  # an axis of length 1 may have any stride, which `view` refuses
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


class Crc32:
    """CRC-32 of bytes that come one after another, with the methods of hashlib's objects.

    Example:
        >>> checksum = Crc32()
        >>> for part in (b"1234", b"56789"):
        ...     checksum.update(part)
        >>> checksum.hexdigest()
        'cbf43926'
    """

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: bytes | memoryview) -> None:
        """Adds bytes at the end."""
        self.value = zlib.crc32(data, self.value)

    def hexdigest(self) -> str:
        """The checksum of all bytes so far."""
        return f"{self.value:08x}"


def described(tensor: Tensor) -> Json:
    """What a tensor in a file must be."""
    checksum = Crc32()
    checksum.update(content(tensor))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "crc32": checksum.hexdigest()}


def damage(tensors: Mapping[str, Tensor], descriptions: Mapping[str, Json]) -> str | None:
    """What is wrong with tensors that were read, in words; None if they are what they must be.

    Example:
        >>> written = {"a": torch.zeros(2)}
        >>> descriptions = {name: described(tensor) for name, tensor in written.items()}
        >>> damage({"a": torch.tensor([0.0, 1.0])}, descriptions)
        "the tensor 'a' is damaged: its checksum is another one"
    """
    for name in descriptions:
        if name not in tensors:
            return f"the tensor {name!r} is missing"
    for name, tensor in tensors.items():
        if descriptions.get(name) != described(tensor):
            return f"the tensor {name!r} is damaged: its checksum is another one"
    return None


def encoded(node: Json) -> bytes:
    """One text for equal contents."""
    return json.dumps(node, sort_keys=True, separators=(",", ":")).encode()


def digest(node: Json) -> str:
    """The checksum of json, however it is spelled."""
    return hashlib.sha256(encoded(node)).hexdigest()


def sealed(node: dict[str, Json]) -> dict[str, Json]:
    """Json with its checksum.

    Example:
        >>> is_whole(sealed({"rank": 3})), is_whole(sealed({"rank": 3}) | {"rank": 2})
        (True, False)
    """
    return node | {"checksum": digest(node)}


def is_whole(node: dict[str, Json]) -> bool:
    """Whether json is what `sealed` made."""
    rest = {key: value for key, value in node.items() if key != "checksum"}
    return node.get("checksum") == digest(rest)
