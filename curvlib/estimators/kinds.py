"""Which curvature: how one batch's unreduced curvature multiplies a vector, for the matrix-free operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.estimators.linearization import LeafFn, Leaves, each, hessian_product, joined, linearize_along, together
from curvlib.losses import Loss, check_loss

How = tuple[str, int]
Draws = Tensor | torch.Generator | None  # sampled gradients [M, *outputs.shape], or where to draw them from


class Kind(ABC):
    """A kind of curvature. Concrete kinds are frozen dataclasses, static for transforms."""

    @abstractmethod
    def multiply(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, stack: Leaves, how: How
    ) -> tuple[Leaves, Tensor]:
        """The sum of the examples' unreduced curvatures times k stacked vectors, and the batch's normalizer.

        Args:
            fn: the outputs as a function of the parameters' leaves.
            leaves: the parameters.
            targets: of the batch.
            draws: the batch's draws.
            stack: the vectors, leaves [k, *shape].
            how: the mode of differentiation, and how many vectors at a time.
        """

    @property
    @abstractmethod
    def reduction(self) -> str:
        """``mean`` if sums are divided by the normalizer, or ``sum``."""


class GaussNewton(Kind):
    """J^T W J with a weight W in output space, block-diagonal over examples."""

    @abstractmethod
    def weigh(self, outputs: Tensor, targets: Any, draws: Draws) -> Callable[[Tensor], Tensor]:
        """The map u -> W u for u in the shape of the outputs."""

    @abstractmethod
    def normalizer(self, outputs: Tensor, targets: Any) -> Tensor:
        """What a mean is divided by, 0-d; it checks that the targets fit."""

    def multiply(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, stack: Leaves, how: How
    ) -> tuple[Leaves, Tensor]:
        mode, width = how
        first, others = [v[:width] for v in stack], [v[width:] for v in stack]
        line, images = linearize_along(fn, leaves, first, mode)
        normalizer = self.normalizer(line.value, targets)
        weigh = self.weigh(line.value, targets, draws)
        parts = [together(lambda u: line.pull(weigh(u)), images)]
        if len(others[0]):
            parts.append(each(lambda v: line.pull(weigh(line.push(v))), others, width))
        products: Leaves = joined(parts)
        return products, normalizer


@dataclass(frozen=True)
class LossHessian(GaussNewton):
    """W_n = H_n, the Hessian of the loss term in the outputs: the GGN, and the type-2 Fisher."""

    loss: Loss

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def reduction(self) -> str:
        return self.loss.reduction

    def normalizer(self, outputs: Tensor, targets: Any) -> Tensor:
        return checked_normalizer(self.loss, outputs, targets)

    def weigh(self, outputs: Tensor, targets: Any, draws: Draws) -> Callable[[Tensor], Tensor]:
        return lambda u: self.loss.hessian_product(outputs, targets, u)


@dataclass(frozen=True)
class SampledFisher(GaussNewton):
    """W_n = sum_m s_nm s_nm^T with gradients s at drawn targets, or at the given ones where nothing is drawn."""

    loss: Loss
    samples: int

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def reduction(self) -> str:
        return self.loss.reduction

    def normalizer(self, outputs: Tensor, targets: Any) -> Tensor:
        return checked_normalizer(self.loss, outputs, targets)

    def vectors(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        """The gradients [M, *outputs.shape]."""
        if isinstance(draws, Tensor):
            return draws
        if draws is None:
            return self.loss.gradient(outputs, targets).unsqueeze(0)
        return self.loss.sample(outputs, targets, draws, self.samples)

    def weigh(self, outputs: Tensor, targets: Any, draws: Draws) -> Callable[[Tensor], Tensor]:
        vectors = self.vectors(outputs, targets, draws)
        flat = vectors.flatten(2) if vectors.ndim > 2 else vectors.unsqueeze(2)  # [M, N, C]

        def apply(u: Tensor) -> Tensor:
            coefficients = torch.einsum("mnc,nc->mn", flat, u.reshape(flat.shape[1:]))
            return torch.einsum("mn,mnc->nc", coefficients, flat).reshape(u.shape)

        return apply


@dataclass(frozen=True)
class Unweighted(GaussNewton):
    """W = I: the Gramian J^T J, whatever the targets."""

    @property
    def reduction(self) -> str:
        return "sum"

    def normalizer(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.new_ones(())

    def weigh(self, outputs: Tensor, targets: Any, draws: Draws) -> Callable[[Tensor], Tensor]:
        return lambda u: u


@dataclass(frozen=True)
class SecondDerivative(Kind):
    """The Hessian of the objective in the parameters."""

    loss: Loss

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def reduction(self) -> str:
        return self.loss.reduction

    def multiply(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, stack: Leaves, how: How
    ) -> tuple[Leaves, Tensor]:
        with torch.no_grad():
            normalizer = checked_normalizer(self.loss, fn(leaves), targets)

        def objective(leaves: Leaves) -> Tensor:
            return self.loss.terms(fn(leaves), targets).sum()

        mode, width = how
        products: Leaves = each(hessian_product(objective, leaves, mode), stack, width)
        return products, normalizer


def checked_normalizer(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """The loss's normalizer, once the targets are known to fit."""
    loss.check(outputs, targets)
    return loss.normalizer(outputs, targets)
