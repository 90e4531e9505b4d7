"""Rows whose examples are not known: tokens that a model routes to an expert by their values."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.layers.rows import DenseRows, Rows
from curvlib.operators.bases import Basis
from curvlib.pytree import register


def refuse() -> NoReturn:
    """The gradient of an example is a sum over rows that are not known to be its own."""
    raise CaptureError(
        "its rows are chosen by values, and which of them belong to one example is not known, so that the gradient of "
        "an example is not either: take each row for an example, by kfac with sharing='expand' or ekfac with "
        "correction='position'"
    )


@register
class LooseRows(Rows):
    """Rows [R, (groups,) T, d], each of which can only stand for itself."""

    rows: DenseRows

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    def part(self, start: int, stop: int) -> LooseRows:
        return LooseRows(self.rows.part(start, stop))

    def in_basis(self, basis: Basis, like: Tensor) -> LooseRows:
        return LooseRows(self.rows.in_basis(basis, like))

    def mean(self, like: Tensor, counted: Tensor | None) -> DenseRows:
        refuse()

    def gradients(self, g: Tensor) -> Tensor:
        refuse()

    def squares(self, g: Tensor) -> Tensor:
        refuse()

    def position_squares(self, g: Tensor) -> Tensor:
        return self.rows.position_squares(g)

    def left_moment(self, g: Tensor) -> Tensor:
        refuse()

    def right_moment(self, g: Tensor) -> Tensor:
        refuse()
