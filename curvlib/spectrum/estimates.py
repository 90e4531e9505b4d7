"""Traces and diagonals from random probes: what an operator's products do not give away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.eager import is_eager
from curvlib.linalg.lanczos import check_finite
from curvlib.linalg.stochastic import (
    Matmat,
    deflated_trace,
    hutchinson_diagonal,
    hutchinson_trace,
    leave_one_out_diagonal,
    leave_one_out_trace,
)
from curvlib.operators import Operator
from curvlib.pytree import Tree, register
from curvlib.spectrum.flat import Flat, at_least, chosen, flattened

Estimator = Callable[[Matmat, int, int, torch.Generator, Tensor], tuple[Tensor, Tensor]]

TraceMethod = Literal["xtrace", "hutch++", "hutchinson"]
DiagonalMethod = Literal["xdiag", "hutchinson"]

TRACE_METHODS: dict[TraceMethod, Estimator] = {
    "xtrace": leave_one_out_trace,
    "hutch++": deflated_trace,
    "hutchinson": hutchinson_trace,
}
FEWEST = {"hutchinson": 2, "hutch++": 6}  # samples; 4 for the others
DIAGONAL_METHODS: dict[DiagonalMethod, Estimator] = {"xdiag": leave_one_out_diagonal, "hutchinson": hutchinson_diagonal}


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
    method: TraceMethod = "xtrace",
    batch_size: int | None = None,
    like: Tree | None = None,
    progress: bool = False,
) -> Estimate:
    """The trace of an operator from a few products with random vectors.

    Args:
        operator: any operator; only its products are used. Operators with a closed form have ``operator.trace()``.
        samples: how many products, at least 4 (``hutchinson``: 2, ``hutch++``: 6); ``xtrace`` takes an even number.
        generator: of the vectors; by default a fresh one with seed 0.
        method: ``xtrace`` (Epperly, Tropp & Webber 2024, arXiv 2301.07825) treats the dominant eigenvectors exactly,
            and is exact for ranks below samples / 2; its standard error is up to 40 % too small. ``hutch++`` (Meyer et
            al. 2021, arXiv 2010.09649) is exact up to samples / 3, with a reliable standard error. ``hutchinson``: the
            mean of v^T A v over vectors of random signs, of variance 2 sum_{i != j} A_ij^2 / m: for operators that are
            nearly diagonal, or whose eigenvalues are all alike.
        batch_size: vectors that go through ``operator.matmat`` at once; by default all of them.
        like: a pytree of params, for an operator that does not know its own.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        The estimate with its standard error.

    Raises:
        ArgumentError: an unknown method, too few samples for it, or batch_size below 1.
        NonFiniteError: a product is not finite.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> estimate = trace(Diagonal(0.9 ** torch.arange(200.0)), 40)
        >>> bool((estimate.value - 10).abs() < 4 * estimate.standard_error), bool(estimate.standard_error < 0.5)
        (True, True)
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
    method: DiagonalMethod = "xdiag",
    batch_size: int | None = None,
    like: Tree | None = None,
    progress: bool = False,
) -> Estimate:
    """The diagonal of an operator from a few products with random vectors.

    For the diagonal of a GGN or a Fisher, `curvlib.diagonal` is exact, and cheaper where a model has few outputs.

    Args:
        operator: any operator; only its products are used.
        samples: how many products, at least 4 (``hutchinson``: 2); ``xdiag`` takes an even number.
        generator: of the vectors; by default a fresh one with seed 0.
        method: ``xdiag`` (Epperly, Tropp & Webber 2024, arXiv 2301.07825) treats the dominant eigenvectors exactly,
            and is exact for ranks below samples / 2. ``hutchinson``: the mean of v o A v over random signs (Bekas et
            al. 2007), for operators that are nearly diagonal, or whose eigenvalues are all alike.
        batch_size: vectors that go through ``operator.matmat`` at once; by default all of them.
        like: a pytree of params, for an operator that does not know its own.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        The estimate, pytrees like params.

    Raises:
        ArgumentError: an unknown method, too few samples for it, or batch_size below 1.
        NonFiniteError: a product is not finite.

    Example:
        >>> from curvlib.operators import Dense
        >>> diagonal(Dense(torch.ones(5, 5)), 4).value.round(decimals=4)  # of rank one
        tensor([1., 1., 1., 1., 1.])
    """
    check(samples, batch_size, method, DIAGONAL_METHODS)
    with flattened(operator, like, products=samples, label="diagonal", progress=progress) as flat:
        matmat = in_batches(flat, batch_size)
        found = DIAGONAL_METHODS[method](matmat, flat.size, samples, chosen(generator), flat.like())
        return Estimate(*(flat.vector(x) for x in found))


def check(samples: int, batch_size: int | None, method: str, methods: Mapping[Any, Estimator]) -> None:
    """Refuses what no estimate can be made from."""
    if method not in methods:
        raise ArgumentError(f"method must be one of {', '.join(methods)}, got {method!r}")
    at_least(FEWEST.get(method, 4), samples=samples)
    at_least(1, batch_size=samples if batch_size is None else batch_size)


def in_batches(flat: Flat, batch_size: int | None) -> Matmat:
    """Products with rows [m, D], so many at once, which are checked to be finite."""

    def matmat(rows: Tensor) -> Tensor:
        images = torch.cat([flat.matmat(part) for part in rows.split(batch_size or max(1, len(rows)))])
        if is_eager():
            check_finite(images)
        return images

    return matmat
