"""Loaders in random order, and loaders that give other examples each time, are told from the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from exactness_problems import generator, normal
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import curvlib as cv
from curvlib.errors import ArgumentError
from curvlib.gradients.data import check_order, check_same_examples

DATA = TensorDataset(normal(0, 6, 3), normal(1, 6, 2))


class Wrapped(Sampler[int]):
    """A sampler of another library around one of torch's."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Own(Sampler[int]):
    """A sampler with a switch, as many libraries have."""

    def __init__(self, *, shuffle: bool) -> None:
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(6).tolist() if self.shuffle else range(6))

    def __len__(self) -> int:
        return 6


class Stream(IterableDataset[Any]):
    """Examples one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


def distributed(**options: Any) -> DistributedSampler[Any]:
    return DistributedSampler(DATA, num_replicas=2, rank=0, **options)


FIXED: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(DATA, 4),
    "the last dropped": lambda: DataLoader(DATA, 4, drop_last=True),
    "subset": lambda: DataLoader(Subset(DATA, [4, 1, 2]), 2),
    "given order": lambda: DataLoader(DATA, 2, sampler=[3, 1, 2]),
    "batches of a sequence": lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 4, True)),
    "given batches": lambda: DataLoader(DATA, batch_sampler=[[0, 5], [3]]),
    "distributed": lambda: DataLoader(DATA, 2, sampler=distributed(shuffle=False)),
    "stream": lambda: DataLoader(Stream(), 4),
    "no batches": lambda: DataLoader(DATA, batch_size=None),
    "own": lambda: DataLoader(DATA, 2, sampler=Own(shuffle=False)),
    "list": lambda: [DATA[:4], DATA[4:]],
}
SAME: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(DATA, 4, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(DATA, 4, shuffle=True, generator=generator(0)),
    "shuffled, nothing to drop": lambda: DataLoader(DATA, 3, shuffle=True, drop_last=True),
    "subset": lambda: DataLoader(DATA, 2, sampler=SubsetRandomSampler([1, 4, 5])),
    "batches": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False)),
    "wrapped": lambda: DataLoader(DATA, 2, sampler=Wrapped(RandomSampler(DATA))),
    "wrapped batches": lambda: DataLoader(DATA, batch_sampler=Wrapped(BatchSampler(RandomSampler(DATA), 4, False))),
    "distributed": lambda: DataLoader(DATA, 2, sampler=distributed()),
    "distributed, the last dropped": lambda: DataLoader(DATA, 2, sampler=distributed(), drop_last=True),
    "own": lambda: DataLoader(DATA, 4, sampler=Own(shuffle=True)),
    "weighted, each once": lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 6, 6, replacement=False)),
    "each twice": lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, num_samples=12)),
}
OTHER: dict[str, Callable[[], Any]] = {
    "shuffled, the last dropped": lambda: DataLoader(DATA, 4, shuffle=True, drop_last=True),
    "batches": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, True)),
    "subset": lambda: DataLoader(DATA, 2, sampler=SubsetRandomSampler([1, 4, 5]), drop_last=True),
    "with replacement": lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, replacement=True)),
    "fewer": lambda: DataLoader(DATA, 2, sampler=RandomSampler(DATA, num_samples=4)),
    "weighted": lambda: DataLoader(DATA, 2, sampler=WeightedRandomSampler([1.0] * 6, 6)),
    "own": lambda: DataLoader(DATA, 4, sampler=Own(shuffle=True), drop_last=True),
}


@pytest.mark.parametrize("name", FIXED)
def test_loaders_in_a_fixed_order_are_taken(name: str) -> None:
    data = cv.over(FIXED[name]())
    check_order(data, "the order matters")
    check_same_examples(data, "they must be the same")


@pytest.mark.parametrize("name", SAME)
def test_loaders_in_random_order_are_refused_where_the_order_matters_and_only_there(name: str) -> None:
    data = cv.over(SAME[name]())
    with pytest.raises(ArgumentError, match="the order matters, but the loader gives them in random order"):
        check_order(data, "the order matters")
    check_same_examples(data, "they must be the same")


@pytest.mark.parametrize("name", OTHER)
def test_loaders_that_give_other_examples_each_time_are_refused(name: str) -> None:
    data = cv.over(OTHER[name]())
    with pytest.raises(ArgumentError, match="random order"):
        check_order(data, "the order matters")
    with pytest.raises(ArgumentError, match="they must be the same, but the loader dr"):
        check_same_examples(data, "they must be the same")


def test_workers_that_race_for_the_order_are_refused() -> None:
    data = cv.over(DataLoader(DATA, 2, num_workers=2, in_order=False))
    with pytest.raises(ArgumentError, match="in_order=True"):
        check_order(data, "the order matters")
    check_order(cv.over(DataLoader(DATA, 2, num_workers=2)), "the order matters")
    check_same_examples(data, "they must be the same")


def test_a_batch_has_an_order() -> None:
    check_order(DATA[:], "the order matters")
    check_same_examples(DATA[:], "they must be the same")
