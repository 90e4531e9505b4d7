"""Data: one batch, or a whole data set that every estimator takes where it takes a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from curvlib.errors import ArgumentError, EmptyBatchError

Batch = tuple[Any, Any]


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

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batches = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (4, 4, 1)]
        >>> cv.kfac(model_fn, params, cv.over(batches), loss=cv.MSE(), fisher="type-2").blocks.keys()
        dict_keys(['weight'])
    """
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


def batches(batch: Batch | DataSet) -> Iterator[Batch]:
    """The batches of a data set, or the one batch given; each is checked to be a pair.

    Raises:
        ArgumentError: a batch is not a pair (inputs, targets).
        EmptyBatchError: the data set holds no batch.
    """
    empty = True
    for pair in batch if isinstance(batch, DataSet) else (batch,):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentError(
                f"a batch must be a pair (inputs, targets), got a {type(pair).__name__}; "
                "for a loader use cv.over(loader)"
            )
        empty = False
        yield pair[0], pair[1]
    if empty:
        raise EmptyBatchError("the data set is empty: its loader gave no batch")
