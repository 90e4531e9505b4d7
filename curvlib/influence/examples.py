"""Examples in groups that do not depend on the batches they come in, and fingerprints of them.

Rounding depends on how many examples are multiplied together. If that is to be the same for every loader, and for a
computation that goes on where another one stopped, then examples must be regrouped by their number in the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib import containers
from curvlib.capture.engines import examples_in
from curvlib.checksums import content
from curvlib.errors import ArgumentError, EmptyBatchError
from curvlib.gradients.data import Batch, DataSet, batches
from curvlib.influence.fingerprints import named


@dataclasses.dataclass(frozen=True)
class SelectedExamples:
    """Some examples of a data set.

    Args:
        leaves: of (inputs, targets).
        own: which leaves have one row an example; others are shared by all.
        structure: that puts the leaves back.
        count: how many examples there are.
        kind: equal for examples that fit into one batch: structure, shapes and dtypes of rows, values of other leaves.
    """

    leaves: tuple[Any, ...]
    own: tuple[bool, ...]
    structure: containers.Structure
    count: int
    kind: tuple[str, ...]

    @classmethod
    def of(cls, inputs: Any, targets: Any) -> SelectedExamples:
        """The examples of a batch.

        Raises:
            ArgumentError: a tensor of the targets does not have one row an example; names it.
        """
        count = examples_in(inputs)
        for path, leaf in containers.leaves_with_path(targets):
            if isinstance(leaf, Tensor) and leaf.shape[:1] != (count,):
                raise ArgumentError(
                    f"targets{path} has shape {tuple(leaf.shape)}, which is not one row for each "
                    f"of the {count} examples of its batch"
                )
        leaves, structure = containers.flatten((inputs, targets))
        own = tuple(isinstance(leaf, Tensor) and leaf.shape[:1] == (count,) for leaf in leaves)
        each = (
            repr((leaf.dtype, tuple(leaf.shape[1:]))) if rows else named(leaf)
            for leaf, rows in zip(leaves, own, strict=True)
        )
        return cls(tuple(leaves), own, structure, count, (str(structure), *each))

    def part(self, start: int, stop: int) -> SelectedExamples:
        """Examples ``start`` to ``stop``."""
        leaves = tuple(x[start:stop] if rows else x for x, rows in zip(self.leaves, self.own, strict=True))
        return dataclasses.replace(self, leaves=leaves, count=stop - start)

    @property
    def batch(self) -> Batch:
        """(inputs, targets)."""
        inputs, targets = containers.unflatten(self.leaves, self.structure)
        return inputs, targets


def joined(parts: Sequence[SelectedExamples]) -> SelectedExamples:
    """Examples of one kind as one batch.

    Even a single part is copied: where tensors lie in memory may decide how products of them are rounded.
    """
    columns = zip(*(part.leaves for part in parts), strict=True)
    leaves = tuple(torch.cat(x) if rows else x[0] for x, rows in zip(columns, parts[0].own, strict=True))
    return dataclasses.replace(parts[0], leaves=leaves, count=sum(part.count for part in parts))


@dataclasses.dataclass(frozen=True)
class Group:
    """Examples whose gradients are taken together; ``start`` is the number of the first one in the data."""

    start: int
    examples: SelectedExamples


def groups(data: Batch | DataSet, batch_size: int, shard_size: int) -> Iterator[Group]:
    """The examples in groups of ``batch_size``, of which none reaches from one shard into the next.

    A group is smaller at the end of a shard, and where examples of another kind (of another length, say) follow.

    Raises:
        ArgumentError: a batch is not a pair (inputs, targets), or its targets do not have one row an example.
        EmptyBatchError: there is no example.
    """
    start, held = 0, list[SelectedExamples]()
    for inputs, targets in batches(data):
        rest = SelectedExamples.of(inputs, targets)
        while rest.count:
            if held and held[0].kind != rest.kind:
                yield Group(start, joined(held))
                start, held = start + sum(part.count for part in held), []
            size = min(batch_size, shard_size - start % shard_size)
            taken = min(size - sum(part.count for part in held), rest.count)
            held.append(rest.part(0, taken))
            rest = rest.part(taken, rest.count)
            if sum(part.count for part in held) == size:
                yield Group(start, joined(held))
                start, held = start + size, []
    if held:
        yield Group(start, joined(held))
    elif start == 0:
        raise EmptyBatchError("the data set is empty: its batches hold no example")


class Record:
    """The fingerprint of a growing sequence of examples, whatever groups they come in.

    Args:
        checkpoint: a number of examples after which the fingerprint is noted.
    """

    def __init__(self, checkpoint: int | None = None) -> None:
        self.checkpoint = checkpoint
        self.noted: str | None = None
        self.count = 0
        self.kind: tuple[str, ...] = ()
        self.kinds = hashlib.sha256()
        self.columns: list[Any] = []

    def add(self, examples: SelectedExamples) -> None:
        """Adds examples at the end."""
        left = examples.count if self.checkpoint is None else self.checkpoint - self.count
        if 0 < left < examples.count:
            self.add(examples.part(0, left))
            self.add(examples.part(left, examples.count))
            return
        if examples.kind != self.kind:
            self.kinds.update(repr((self.count, examples.kind)).encode())
            self.kind = examples.kind
        rows = [leaf for leaf, own in zip(examples.leaves, examples.own, strict=True) if own]
        self.columns += [hashlib.sha256() for _ in rows[len(self.columns) :]]
        for column, leaf in zip(self.columns, rows, strict=False):
            column.update(content(leaf))
        self.count += examples.count
        if self.count == self.checkpoint:
            self.noted = self.fingerprint()

    def fingerprint(self) -> str:
        """That of all examples so far."""
        total = self.kinds.copy()
        for column in self.columns:
            total.update(column.digest())
        total.update(str(self.count).encode())
        return total.hexdigest()
