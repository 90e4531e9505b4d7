"""Data: one batch, or a whole data set that every estimator takes where it takes a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from tqdm import tqdm

from curvlib import containers
from curvlib.errors import ArgumentError, EmptyBatchError
from curvlib.linalg.eager import is_eager

Batch = tuple[Any, Any]

LABELS = ("labels", "label", "targets", "target")  # what targets are called in a batch that is one dictionary


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Batches (inputs, targets) from a loader, to be read once by an estimator. See `over`."""

    loader: Iterable[Batch]
    progress: bool

    def __iter__(self) -> Iterator[Batch]:
        """Yields the loader's batches, with a progress bar on a terminal if asked for."""
        yield from tqdm(self.loader, desc="curvature", unit="batch", disable=None if self.progress else True)


def over(loader: Iterable[Batch], *, progress: bool = False) -> DataSet:
    """A whole data set, to be given to an estimator in place of a batch.

    The result is the curvature of the objective over all examples; it does not depend on how they are batched.

    Args:
        loader: iterable of batches (inputs, targets), e.g. a `torch.utils.data.DataLoader`.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        A data set.

    Raises:
        ArgumentError: no iterable, or one that is a batch itself or gives examples one by one.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (4, 4, 1)]
        >>> cv.kfac(model_fn, params, cv.over(batches), loss=cv.MSE(), fisher="type-2").blocks.keys()
        dict_keys(['weight'])
    """
    if isinstance(loader, DataSet):
        return DataSet(loader.loader, progress or loader.progress)
    in_pair = isinstance(loader, tuple) and any(isinstance(part, Tensor) for part in loader)
    if in_pair or isinstance(loader, (Tensor, Mapping)):
        raise ArgumentError("cv.over takes a loader of batches: give one batch (inputs, targets) without cv.over")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ArgumentError(
            f"cv.over takes a loader of batches, and a {type(loader).__name__} gives examples one by one: give "
            "cv.over(DataLoader(dataset, batch_size=...))"
        )
    if isinstance(loader, nn.Module) or not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        raise ArgumentError(
            f"cv.over takes an iterable of batches (inputs, targets), such as a DataLoader, got a "
            f"{type(loader).__name__}"
        )
    return DataSet(loader, progress)


def repeatable(batch: Batch | DataSet) -> None:
    """Refuses a data set that can be read only once, where it is needed more than once.

    Raises:
        ArgumentError: the loader is an iterator.
    """
    if isinstance(batch, DataSet) and isinstance(batch.loader, Iterator):
        raise ArgumentError(
            "the data set is read more than once, but its loader is an iterator that is used up after the first time; "
            "give cv.over a list or a DataLoader"
        )


def check_order(batch: Batch | DataSet, what: str) -> None:
    """Refuses a loader that gives its examples in random order, where the order matters.

    Args:
        batch: a batch, or a data set.
        what: why the order matters, the beginning of the message: "scores have one column an example".

    Raises:
        ArgumentError: a sampler draws the order, or workers race for it.

    Example:
        >>> import torch, curvlib as cv
        >>> from torch.utils.data import DataLoader
        >>> data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4, 1))
        >>> check_order(cv.over(DataLoader(data, 2)), "draws belong to examples")
        >>> check_order(cv.over(DataLoader(data, 2, shuffle=True)), "draws belong to examples")
        Traceback (most recent call last):
            ...
        curvlib.errors.ArgumentError: draws belong to examples, but the loader gives them in random order \
(RandomSampler): use shuffle=False, or a sampler with a fixed order
    """
    sampler = random_sampler(batch)
    if sampler is not None:
        raise ArgumentError(
            f"{what}, but the loader gives them in random order ({type(sampler).__name__}): use shuffle=False, or a "
            "sampler with a fixed order"
        )
    loader = batch.loader if isinstance(batch, DataSet) else None
    if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
        raise ArgumentError(
            f"{what}, but the loader gives them in the order in which its workers finish: use in_order=True"
        )


def check_same_examples(batch: Batch | DataSet, what: str) -> None:
    """Refuses a loader that gives other examples each time it is read, where it is read more than once.

    Args:
        batch: a batch, or a data set.
        what: why they must be the same, the beginning of the message.

    Raises:
        ArgumentError: examples are drawn with replacement, or a random rest of them is dropped.
    """
    sampler = random_sampler(batch)
    if sampler is None or repeats_itself(sampler):
        return
    assert isinstance(batch, DataSet)
    name, number, population = type(sampler).__name__, *known_sizes(sampler)
    if getattr(sampler, "replacement", False) or (population and number and number % population):
        raise ArgumentError(
            f"{what}, but the loader draws other examples each time ({name}): use a loader that gives each example once"
        )
    batched = getattr(batch.loader, "batch_sampler", None) or batch.loader
    size = getattr(batched, "batch_size", None)
    if getattr(batched, "drop_last", False) and (not number or not size or number % size):
        raise ArgumentError(
            f"{what}, but the loader drops the last of its examples after bringing them in random order ({name}), "
            "other ones each time: use drop_last=False, or shuffle=False"
        )


def random_sampler(batch: Batch | DataSet) -> Any:
    """What brings a loader's examples in random order; None if nothing is known to do so.

    A sampler of another library draws if it says so (``shuffle``), or says nothing and has a generator or a seed.
    """

    def draws(sampler: Any) -> bool:
        seeded = hasattr(sampler, "generator") or hasattr(sampler, "seed")
        return isinstance(sampler, RANDOM) or getattr(sampler, "shuffle", seeded) is True

    found = samplers(batch.loader) if isinstance(batch, DataSet) else []
    return next((sampler for sampler in found if draws(sampler)), None)


def samplers(loader: Any) -> list[Any]:
    """What decides which examples a loader gives: its batch sampler or else its sampler, and what these wrap."""
    found = getattr(loader, "batch_sampler", None)
    found = getattr(loader, "sampler", None) if found is None else found
    seen: list[Any] = []
    while found is not None and not any(found is x for x in seen):
        seen.append(found)
        found = next((x for x in (getattr(found, name, None) for name in INNER) if x is not None), None)
    return seen


def own_generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers draw from, where they have their own."""
    holders = (getattr(x, "generator", None) for x in (loader, *samplers(loader)))
    return list(dict.fromkeys(x for x in holders if isinstance(x, torch.Generator)))


def repeats_itself(sampler: Any) -> bool:
    """Whether a sampler's random order is settled by a seed and an epoch, and the same until the epoch is set."""
    return hasattr(sampler, "seed") and hasattr(sampler, "epoch")


def known_sizes(sampler: Any) -> tuple[int | None, int | None]:
    """How many examples a sampler gives, and how many there are to choose from; None where that is not known."""
    number = len(sampler) if isinstance(sampler, Sized) else None
    pools = (getattr(sampler, name, None) for name in ("data_source", "weights", "indices"))
    return number, next((len(pool) for pool in pools if isinstance(pool, Sized)), None)


RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
INNER = ("batch_sampler", "sampler", "base_sampler")  # where samplers keep the one they wrap


def batches(batch: Batch | DataSet) -> Iterator[Batch]:
    """The batches of a data set, or the one batch given; each is checked to be a pair.

    Outside of any transform they are cut loose from the graph they are in.

    Raises:
        ArgumentError: a batch is not a pair (inputs, targets).
        EmptyBatchError: the data set holds no batch.
    """
    empty = True
    for pair in batch if isinstance(batch, DataSet) else (batch,):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentError(no_pair(pair, within=isinstance(batch, DataSet)))
        empty = False
        inputs, targets = containers.map_tensors(Tensor.detach, tuple(pair)) if is_eager() else pair
        yield inputs, targets
    if empty:
        raise EmptyBatchError("the data set is empty: its loader gave no batch")


def no_pair(value: Any, *, within: bool) -> str:
    """What to do about something that is not (inputs, targets), for messages.

    Args:
        value: what was given for a batch.
        within: whether a loader gave it.
    """
    what = f"a {type(value).__name__}"
    advice = "give (inputs, targets), or (inputs, None) where no targets are needed (cv.Identity, cv.gramian)"
    if isinstance(value, Mapping):
        what += f" of {', '.join(map(repr, value))}"
        labels = next((key for key in LABELS if key in value), None)
        advice = f"give (batch, batch[{labels!r}])" if labels else "give (inputs, targets), with the targets apart"
    elif isinstance(value, (tuple, list)):
        what += f" of {len(value)}"
        advice = advice if len(value) < 2 else "put all inputs into one pytree, ((a, b), targets)"
    if within:
        return (
            f"the loader given to cv.over must give pairs (inputs, targets), and gave {what}: {advice}; a DataLoader's "
            "collate_fn can do that"
        )
    return f"a batch must be a pair (inputs, targets), got {what}: {advice}; for a loader use cv.over(loader)"
