"""Traces from random probes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvlib.operators import Operator
from curvlib.pytree import Tree, register
from curvlib.spectrum.flat import at_least, chosen, flattened


@register
class Estimate:
    """A number that was estimated from samples, and its standard error; both are 0-d tensors."""

    value: Tensor
    standard_error: Tensor


def trace(
    operator: Operator,
    samples: int = 32,
    generator: torch.Generator | None = None,
    *,
    batch_size: int | None = None,
    like: Tree | None = None,
    progress: bool = False,
) -> Estimate:
    """The trace of an operator, by Hutchinson's estimator: the mean of v^T A v over vectors v of random signs.

    It is unbiased; one sample has the variance 2 sum_{i != j} A_ij^2, so a diagonal operator's trace is exact.

    Args:
        operator: any operator; only its products are used. Operators with a closed form have ``operator.trace()``.
        samples: how many vectors, at least 2.
        generator: of the vectors; by default a fresh one with seed 0.
        batch_size: vectors that go through ``operator.matmat`` at once; by default all of them.
        like: a pytree of params, for an operator that does not know its own.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        The estimate with its standard error.

    Raises:
        ArgumentError: fewer than 2 samples, or batch_size below 1.

    Example:
        >>> from curvlib.operators import Dense
        >>> estimate = trace(Dense(torch.tensor([[2.0, 0.5], [0.5, 1.0]])), 1000)
        >>> bool((estimate.value - 3).abs() < 4 * estimate.standard_error)
        True
    """
    batch_size = samples if batch_size is None else batch_size
    at_least(2, samples=samples)
    at_least(1, batch_size=batch_size)
    generator = chosen(generator)
    values = []
    with flattened(operator, like, products=samples, label="trace", progress=progress) as flat:
        for first in range(0, samples, batch_size):
            probes = flat.signs(min(batch_size, samples - first), generator)
            values.append((probes * flat.matmat(probes)).sum(1))
    terms = torch.cat(values)
    return Estimate(terms.mean(), terms.std() / math.sqrt(samples))
