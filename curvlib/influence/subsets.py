"""Which examples are trained on: masks [S, N] that are the same on every machine."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, DtypeError, ShapeError
from curvlib.operators.sketch import bits


def subsets(n: int, *, fraction: float = 0.5, number: int = 100, seed: int = 0) -> Tensor:
    """Random subsets of n examples, all of the same size.

    Every example gets 64 bits that are a function of (seed, subset, example) alone, and a subset is the
    ``round(fraction * n)`` examples with the smallest ones: a uniform draw without replacement. So subsets are the same
    on every machine and with every version of torch, and the first ones stay what they are when ``number`` grows.

    Args:
        n: how many examples there are to choose from.
        fraction: the share of them in a subset; a half is the custom (Park et al. 2023, TRAK).
        number: how many subsets.
        seed: equal seeds give equal subsets.

    Returns:
        bool tensor [S, N] on the CPU: whether a subset holds an example.

    Raises:
        ArgumentError: subsets would be empty or hold all examples, or there would be none.

    Example:
        >>> chosen = subsets(10, fraction=0.3, number=4)
        >>> chosen.shape, chosen.sum(1)
        (torch.Size([4, 10]), tensor([3, 3, 3, 3]))
        >>> torch.equal(chosen, subsets(10, fraction=0.3, number=9)[:4])
        True
    """
    return of_size(n, round(fraction * n), number=number, seed=seed)


def of_size(n: int, size: int, *, number: int, seed: int) -> Tensor:
    """Random subsets of n examples of this size; see `subsets`."""
    if number < 1:
        raise ArgumentError(f"number must be at least 1, got {number}")
    if not 0 < size < n:
        raise ArgumentError(f"a subset must hold an example and leave one out, but would have {size} of {n}")
    key = int.from_bytes(hashlib.sha256(f"{seed}/subsets".encode()).digest()[:8], "big", signed=True)
    return smallest(bits(key, number, n), size)


def without_each(n: int, examples: Tensor) -> Tensor:
    """The whole of n examples, then the whole without each one of some.

    Args:
        n: how many examples there are.
        examples: integer tensor [K], which ones to leave out.

    Returns:
        bool tensor [1 + K, N] on the CPU; row 0 holds every example.

    Raises:
        DtypeError: ``examples`` are not integers.
        ShapeError: ``examples`` is not one-dimensional.
        ArgumentError: there is no such example.

    Example:
        >>> without_each(3, torch.tensor([2, 0])).int()
        tensor([[1, 1, 1],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    if examples.dtype.is_floating_point or examples.dtype.is_complex or examples.dtype == torch.bool:
        raise DtypeError(f"examples must be integers, the positions of examples; got {examples.dtype}")
    if examples.ndim != 1:
        raise ShapeError(f"examples should have shape [K], got {tuple(examples.shape)}")
    wrong = [index for index in examples.tolist() if not 0 <= index < n]
    if wrong:
        raise ArgumentError(f"examples must lie between 0 and {n - 1}, got {wrong[0]}")
    rows = torch.ones(1 + len(examples), n, dtype=torch.bool)
    rows[torch.arange(len(examples)) + 1, examples.cpu()] = False
    return rows


def without_top(scores: Tensor, count: int) -> Tensor:
    """For every query, all examples but the ``count`` of the greatest scores; of equal ones the first.

    Args:
        scores: [Q, N].
        count: how many are left out.

    Returns:
        bool tensor [Q, N] on the CPU.

    Example:
        >>> without_top(torch.tensor([[0.3, -5.0, 0.1]]), 1)
        tensor([[False,  True,  True]])
    """
    return ~smallest(-scores.detach().cpu(), count)


def smallest(keys: Tensor, size: int) -> Tensor:
    """Whether a key is among the ``size`` smallest of its row; of equal ones the first."""
    chosen = torch.zeros(keys.shape, dtype=torch.bool)
    return chosen.scatter(1, keys.sort(dim=1, stable=True).indices[:, :size], True)
