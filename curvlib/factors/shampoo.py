"""Shampoo's factors: second moments of gradients along each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from curvlib.factors.axes import unfolded
from curvlib.factors.rule import FactorRule, Factors, Modes, Observation, averaged, zeros
from curvlib.linalg.middle_gram import middle_gram


@dataclass(frozen=True)
class ShampooFactors(FactorRule):
    """Shampoo's factors: for each mode the Gram matrix of the gradient's rows along it, D D^T and D^T D for a matrix.

    They start from zero, as in the authors' code of SOAP: of t gradients the moving average is the sum of
    (1 - b) b^(t - i) D_i D_i^T, and its weights add up to 1 - b^t.

    Source:
        Gupta, Koren and Singer 2018, Shampoo, arXiv 1802.09568.

    Example:
        >>> import torch
        >>> gradient = torch.tensor([[[1.0, 2.0]]])
        >>> ShampooFactors().first(Observation(gradient, gradient, gradient**2), (0, 1), None).matrices[1]
        tensor([[[1., 2.],
                 [2., 4.]]])
    """

    def check(self, shape: Sequence[int], modes: Modes) -> None:
        pass

    def empty(self, stack: Tensor, modes: Modes) -> Factors:
        return Factors(zeros(stack, modes))

    def begin(self, seen: Observation, modes: Modes) -> Factors:
        return self.empty(seen.gradient, modes)

    def update(
        self, factors: Factors, seen: Observation, modes: Modes, bases: Sequence[Tensor], decay: float | None
    ) -> Factors:
        return Factors(
            tuple(
                averaged(matrix, middle_gram(unfolded(seen.gradient, mode, seen.gradient.ndim - 1)), decay)
                for matrix, mode in zip(factors.matrices, modes, strict=True)
            )
        )

    def rebased(self, factors: Factors, bases: Sequence[Tensor]) -> Factors:
        return factors
