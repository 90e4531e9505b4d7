"""An operator on pytrees as a function of flat vectors, which is what Krylov methods work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from curvlib.errors import ArgumentError
from curvlib.operators import Operator
from curvlib.operators.base import check_operator
from curvlib.pytree import Domain, Tree, flatten


@dataclasses.dataclass(frozen=True)
class Flat:
    """An operator on vectors [m, D], one a row, in the order of `ravel`; arithmetic on them is in ``dtype``."""

    operator: Operator
    domain: Domain
    dtype: torch.dtype
    device: torch.device
    native: torch.dtype  # the operator's, which may be half precision
    bar: tqdm[NoReturn]

    @property
    def size(self) -> int:
        """The number D of rows."""
        return self.operator.domain.size

    def unravel(self, rows: Tensor) -> Tree:
        """Rows [m, D] as m vectors of the domain, stacked along a leading axis of every leaf."""
        return self.domain.stacked(rows)

    def vector(self, row: Tensor) -> Tree:
        """A row [D] as a vector of the domain."""
        return self.domain.stacked(row.unsqueeze(0), ())

    def matmat(self, rows: Tensor) -> Tensor:
        """The operator applied to each row of [m, D]."""
        image = self.operator.matmat(self.unravel(rows.to(self.native)))
        self.bar.update(len(rows))
        return self.domain.rows(image).to(self.dtype)

    def like(self) -> Tensor:
        """An empty tensor that has the dtype and the device of rows."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def signs(self, count: int, generator: torch.Generator) -> Tensor:
        """Rademacher vectors [count, D]: entries +-1, so that E[v v^T] = I and ||v||^2 = D."""
        bits = torch.randint(2, (count, self.size), generator=generator, device=generator.device)
        return (2 * bits - 1).to(device=self.device, dtype=self.dtype)


@contextmanager
def flattened(operator: Operator, like: Tree | None, *, products: int, label: str, progress: bool) -> Iterator[Flat]:
    """The operator on flat vectors, with a progress bar that counts its products.

    Raises:
        ArgumentError: the operator does not say what its vectors are and ``like`` is missing, or they do not fit.
    """
    check_operator(operator)
    domain = operator.domain if like is None else Domain.of(like)
    if domain.shapes != operator.domain.shapes:
        raise ArgumentError(f"like has leaves of shapes {domain.shapes}, the operator's are {operator.domain.shapes}")
    leaves = flatten(operator if like is None else like)[0]
    first = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point)
    dtype = torch.promote_types(first.dtype, torch.float32)
    with tqdm(total=products, desc=label, unit="product", disable=None if progress else True, leave=False) as bar:
        yield Flat(operator, domain, dtype, first.device, first.dtype, bar)


def chosen(generator: torch.Generator | None) -> torch.Generator:
    """The generator given, or a fresh one with seed 0: the same draws each time."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def at_least(least: int, **numbers: int) -> None:
    """Refuses numbers that are too small.

    Raises:
        ArgumentError: names the first of them.
    """
    for name, number in numbers.items():
        if number < least:
            raise ArgumentError(f"{name} must be at least {least}, got {number}")
