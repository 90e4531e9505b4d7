"""Traces and diagonals from random probes: what an operator's products do not give away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.stochastic import (
    Matmat,
    deflated_diagonal,
    deflated_trace,
    hutchinson_diagonal,
    hutchinson_trace,
)
from curvlib.operators import Operator
from curvlib.pytree import Tree, register
from curvlib.spectrum.flat import Flat, at_least, chosen, flattened

Estimator = Callable[[Matmat, int, int, torch.Generator, Tensor], tuple[Tensor, Tensor]]

TRACE_METHODS: dict[str, Estimator] = {"hutchinson": hutchinson_trace, "hutch++": deflated_trace}
DIAGONAL_METHODS: dict[str, Estimator] = {"hutchinson": hutchinson_diagonal, "diag++": deflated_diagonal}


@register
class Estimate:
    """An unbiased estimate and its standard error: 0-d tensors, or pytrees like params."""

    value: Tree
    standard_error: Tree


def trace(
    operator: Operator,
    samples: int = 32,
    generator: torch.Generator | None = None,
    *,
    method: str = "hutchinson",
    batch_size: int | None = None,
    like: Tree | None = None,
    progress: bool = False,
) -> Estimate:
    """The trace of an operator from a few products with random vectors.

    Args:
        operator: any operator; only its products are used. Operators with a closed form have ``operator.trace()``.
        samples: how many products, at least 2 (``hutch++``: 6).
        generator: of the vectors; by default a fresh one with seed 0.
        method: ``hutchinson``: the mean of v^T A v over vectors of random signs, of variance 2 sum_{i != j} A_ij^2 / m;
            ``hutch++`` (Meyer et al. 2021, arXiv 2010.09649) treats the dominant eigenvectors exactly.
        batch_size: vectors that go through ``operator.matmat`` at once; by default all of them.
        like: a pytree of params, for an operator that does not know its own.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        The estimate with its standard error.

    Raises:
        ArgumentError: an unknown method, too few samples for it, or batch_size below 1.

    Example:
        >>> from curvlib.operators import Dense
        >>> estimate = trace(Dense(torch.tensor([[2.0, 0.5], [0.5, 1.0]])), 1000)
        >>> bool((estimate.value - 3).abs() < 4 * estimate.standard_error)
        True
    """
    check(samples, batch_size, method, TRACE_METHODS)
    with flattened(operator, like, products=samples, label="trace", progress=progress) as flat:
        matmat = in_batches(flat, batch_size)
        return Estimate(*TRACE_METHODS[method](matmat, flat.size, samples, chosen(generator), flat.like()))


def diagonal(
    operator: Operator,
    samples: int = 32,
    generator: torch.Generator | None = None,
    *,
    method: str = "hutchinson",
    batch_size: int | None = None,
    like: Tree | None = None,
    progress: bool = False,
) -> Estimate:
    """The diagonal of an operator from a few products with random vectors.

    For the diagonal of a GGN or a Fisher, `curvlib.diagonal` is exact, and cheaper where a model has few outputs.

    Args:
        operator: any operator; only its products are used.
        samples: how many products, at least 2 (``diag++``: 6).
        generator: of the vectors; by default a fresh one with seed 0.
        method: ``hutchinson``: the mean of v o A v over random signs (Bekas et al. 2007); ``diag++`` (Baston &
            Nakatsukasa 2022, arXiv 2201.10684) treats the dominant eigenvectors exactly.
        batch_size: vectors that go through ``operator.matmat`` at once; by default all of them.
        like: a pytree of params, for an operator that does not know its own.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        The estimate, pytrees like params.

    Raises:
        ArgumentError: an unknown method, too few samples for it, or batch_size below 1.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> diagonal(Diagonal(torch.tensor([2.0, 1.0])), 8).value
        tensor([2., 1.])
    """
    check(samples, batch_size, method, DIAGONAL_METHODS)
    with flattened(operator, like, products=samples, label="diagonal", progress=progress) as flat:
        matmat = in_batches(flat, batch_size)
        found = DIAGONAL_METHODS[method](matmat, flat.size, samples, chosen(generator), flat.like())
        return Estimate(*(flat.vector(x) for x in found))


def check(samples: int, batch_size: int | None, method: str, methods: dict[str, Estimator]) -> None:
    """Refuses what no estimate can be made from."""
    if method not in methods:
        raise ArgumentError(f"method must be one of {', '.join(methods)}, got {method!r}")
    at_least(2 if method == "hutchinson" else 6, samples=samples)
    at_least(1, batch_size=samples if batch_size is None else batch_size)


def in_batches(flat: Flat, batch_size: int | None) -> Matmat:
    """Products with rows [m, D], so many at once."""

    def matmat(rows: Tensor) -> Tensor:
        return torch.cat([flat.matmat(part) for part in rows.split(batch_size or max(1, len(rows)))])

    return matmat
