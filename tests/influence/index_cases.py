"""A small model with training data whose index is built, stopped and looked at by the tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvlib as cv
import curvlib.influence
from tests.influence.influence_cases import Batch, Case, generator, in_batches, of_module, rows

SHARD, BATCH = 8, 3


def small() -> Case:
    """Two layers on vectors of six numbers."""
    return of_module(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), rows(6))


def examples(count: int, seed: int = 9) -> Batch:
    source = generator(seed)
    return torch.randn(count, 6, generator=source, dtype=torch.float64), torch.randint(4, (count,), generator=source)


def projection_of(case: Case, rank: int = 4, seed: int = 0) -> cv.Projection:
    root = case.curvature().power(-0.5, cv.FactoredTikhonov(0.1))
    return root.project(cv.sketch(case.params, rank=rank, seed=seed))


def build(path: Path, case: Case, data: Any, projection: cv.Projection | None = None, **options: Any) -> Any:
    options = {"shard_size": SHARD, "batch_size": BATCH} | options
    projection = projection_of(case) if projection is None else projection
    params = options.pop("params", case.params)
    return cv.influence.build(path, projection, options.pop("model_fn", case.model_fn), params, data, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ragged(batch: Batch, sizes: Sequence[int]) -> cv.gradients.DataSet:
    """The batch in pieces of these sizes, again and again until it ends."""
    total, cut = len(batch[1]), list[int]()
    for size in itertools.cycle(sizes):
        if sum(cut) == total:
            break
        cut.append(min(size, total - sum(cut)))
    return cv.over(in_batches(batch, *cut))


class StoppedError(Exception):
    pass


def stopped_after(batches: Sequence[Batch]) -> cv.gradients.DataSet:
    """A data set that fails at its end, as if the process stopped there."""

    def loader() -> Iterator[Batch]:
        yield from batches
        raise StoppedError

    return cv.over(loader())


class Counting:
    """A model that counts the examples it is given; plans run it on fake tensors, which are not counted."""

    def __init__(self, case: Case) -> None:
        self.case, self.count = case, 0

    def __call__(self, params: Any, inputs: Tensor) -> Tensor:
        self.count += len(inputs) if type(inputs) is Tensor else 0
        return self.case.model_fn(params, inputs)
