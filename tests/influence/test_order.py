"""Scores have one column an example: loaders in random order are refused, and all others are in their order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import curvlib as cv
import curvlib.influence
from curvlib.errors import ArgumentError
from tests.influence.index_cases import build, examples, projection_of, small
from tests.influence.influence_cases import assert_close

CASE = small()
DATA = examples(12)
SET = TensorDataset(*DATA)
INVERSE = CASE.curvature().inverse(cv.FactoredTikhonov(0.1))


class Grouped(Sampler[int]):
    """A sampler of another library, that draws and has a generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(12, generator=self.generator).tolist())


class Seeded(Sampler[int]):
    """A sampler of another library, that draws from a seed."""

    def __init__(self) -> None:
        self.seed, self.epoch = 7, 0

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(self.seed + self.epoch).sample(range(12), 12))


class Sorted(Sampler[int]):
    """A sampler of another library with an order of its own."""

    def __iter__(self) -> Iterator[int]:
        return reversed(range(12))


class Shards:
    """A batch sampler of another library around one of torch's."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batch_sampler)


class Loader:
    """A loader of another library."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        for i in self.sampler:
            yield DATA[0][i : i + 1], DATA[1][i : i + 1]


def spread(shuffle: bool) -> DistributedSampler[Any]:
    return DistributedSampler(SET, num_replicas=1, rank=0, shuffle=shuffle)


RANDOM: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(SET, 5, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(SET, 5, shuffle=True, generator=torch.Generator()),
    "shuffled by workers": lambda: DataLoader(SET, 5, shuffle=True, num_workers=1),
    "RandomSampler": lambda: DataLoader(SET, 5, sampler=RandomSampler(SET)),
    "SubsetRandomSampler": lambda: DataLoader(SET, 5, sampler=SubsetRandomSampler(range(12))),
    "WeightedRandomSampler": lambda: DataLoader(SET, 5, sampler=WeightedRandomSampler([1.0] * 12, 12)),
    "DistributedSampler": lambda: DataLoader(SET, 5, sampler=spread(shuffle=True)),
    "BatchSampler": lambda: DataLoader(SET, batch_sampler=BatchSampler(RandomSampler(SET), 5, False)),
    "around a BatchSampler": lambda: DataLoader(SET, batch_sampler=Shards(BatchSampler(RandomSampler(SET), 5, True))),
    "a batch sampler in place of a sampler": lambda: DataLoader(
        SET, sampler=BatchSampler(RandomSampler(SET), 5, False), batch_size=None
    ),
    "another loader": lambda: Loader(RandomSampler(SET)),
    "another sampler": lambda: DataLoader(SET, 5, sampler=Grouped()),
    "another seeded sampler": lambda: DataLoader(SET, 5, sampler=Seeded()),
}  # fmt: skip
FIXED: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(SET, 5),
    "a generator that is not used for the order": lambda: DataLoader(SET, 5, generator=torch.Generator()),
    "workers": lambda: DataLoader(SET, 5, num_workers=2),
    "the last dropped": lambda: DataLoader(SET, 5, drop_last=True),
    "a given order": lambda: DataLoader(SET, 5, sampler=[3, 1, 2, 0]),
    "SequentialSampler": lambda: DataLoader(SET, batch_sampler=BatchSampler(SequentialSampler(SET), 5, False)),
    "DistributedSampler": lambda: DataLoader(SET, 5, sampler=spread(shuffle=False)),
    "another sampler": lambda: DataLoader(SET, 5, sampler=Sorted()),
    "another loader": lambda: Loader(range(12)),
    "a list": lambda: [(DATA[0][:7], DATA[1][:7]), (DATA[0][7:], DATA[1][7:])],
}


def scores(queries: Any, train: Any, **options: Any) -> Tensor:
    found = cv.influence.scores(INVERSE, CASE.model_fn, CASE.params, queries, train, **options)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("kind", RANDOM)
def test_examples_in_random_order_are_refused_where_they_are_told_apart(tmp_path: Path, kind: str) -> None:
    data = cv.over(RANDOM[kind]())
    index = build(tmp_path / "index", CASE, DATA)
    model = CASE.model_fn, CASE.params

    def fetch(numbers: Tensor) -> Any:
        return DATA[0][numbers], DATA[1][numbers]

    actions: dict[str, Callable[[], Any]] = {
        "queries": lambda: scores(data, DATA),
        "train": lambda: scores(DATA, data),
        "queries, train added up": lambda: scores(data, DATA, aggregate="train"),
        "train, queries added up": lambda: scores(DATA, data, aggregate="queries"),
        "self-influence": lambda: cv.influence.self_influence(INVERSE, *model, data),
        "build": lambda: build(tmp_path / "other", CASE, data),
        "append": lambda: build(tmp_path / "index", CASE, data, append=True),
        "scores of an index": lambda: index.scores(*model, data),
        "top of an index": lambda: index.top(*model, data, k=2),
        "rerank": lambda: cv.influence.rerank(index, INVERSE, *model, data, k=2, fetch=fetch),
    }
    for name, action in actions.items():
        with pytest.raises(ArgumentError, match=r"in random order \(\w+\): use shuffle=False") as refusal:
            action()
        assert "in the order of the data" in str(refusal.value), name
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["shuffle", "DistributedSampler", "BatchSampler"])
def test_examples_that_are_added_up_may_be_in_any_order(kind: str) -> None:
    data = cv.over(RANDOM[kind]())
    assert_close(scores(data, DATA, aggregate="queries"), scores(DATA, DATA, aggregate="queries"))
    assert_close(scores(DATA, data, aggregate="train"), scores(DATA, DATA, aggregate="train"))


@pytest.mark.parametrize("kind", FIXED)
def test_scores_are_in_the_order_of_the_data(tmp_path: Path, kind: str) -> None:
    loader = FIXED[kind]()
    inputs, targets = (torch.cat(column) for column in zip(*loader, strict=True))
    expected = scores(DATA, (inputs, targets))
    data = cv.over(loader)
    assert_close(scores(DATA, data), expected)
    assert_close(scores(data, DATA), expected.mT)
    assert_close(scores(DATA, data, query_batch=5), expected)
    diagonal = cv.influence.self_influence(INVERSE, CASE.model_fn, CASE.params, data)
    assert_close(diagonal, scores(data, data).diagonal())
    projection = projection_of(CASE, rank=64)
    index = build(tmp_path / "index", CASE, data, projection, dtype=torch.float64)
    assert_close(index.scores(CASE.model_fn, CASE.params, DATA), expected)
