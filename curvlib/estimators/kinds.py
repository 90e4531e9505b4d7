"""Which curvature: how one batch's unreduced curvature multiplies a vector, for the matrix-free operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.estimators.linearization import (
    ElementCount,
    Mode,
    each,
    hessian_product,
    joined,
    linearize_along,
    push_along,
    together,
)
from curvlib.estimators.probe import Probe, hessian_by_autograd, hessian_disagreement, jacobian_disagreement
from curvlib.estimators.running import LeafFn, Leaves
from curvlib.linalg.gram import full_precision
from curvlib.losses import Loss, check_loss

How = tuple[Mode, int]
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

    @abstractmethod
    def form(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, vector: Leaves, how: How
    ) -> tuple[Leaves, Tensor]:
        """The same curvature's quadratic form, one number in a list, for a vector [1, *shape]; and the normalizer."""

    @abstractmethod
    def trial(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, found: Probe, how: How, count: ElementCount
    ) -> tuple[Leaves, float]:
        """`multiply` for the vectors of a probe, and how far derivatives are from those of its plain pass.

        Args:
            fn: see `multiply`, as for the others.
            leaves: the parameters.
            targets: of the batch.
            draws: the batch's draws.
            found: plain derivatives.
            how: the mode, and how many vectors to stack, one or two.
            count: counts what multiplication makes.
        """

    @abstractmethod
    def weigh(self, outputs: Tensor, targets: Any, draws: Draws) -> Callable[[Tensor], Tensor]:
        """The map u -> W u for u in the shape of the outputs: what is pulled back."""

    @abstractmethod
    def normalizer(self, outputs: Tensor, targets: Any) -> Tensor:
        """What a mean is divided by, 0-d; it checks that the targets fit."""

    @property
    @abstractmethod
    def reduction(self) -> str:
        """``mean`` if sums are divided by the normalizer, or ``sum``."""


class GaussNewton(Kind):
    """J^T W J with a weight W in output space, block-diagonal over examples."""

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

    def form(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, vector: Leaves, how: How
    ) -> tuple[Leaves, Tensor]:
        value, image = push_along(fn, leaves, [v.squeeze(0) for v in vector], how[0])  # v^T J^T W J v needs no J^T
        normalizer = self.normalizer(value, targets)
        weighted = self.weigh(value, targets, draws)(image)
        return [(full_precision(image) * full_precision(weighted)).sum()], normalizer

    def trial(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, found: Probe, how: How, count: ElementCount
    ) -> tuple[Leaves, float]:
        mode, width = how
        with count:
            line, images = linearize_along(fn, leaves, [v[:width] for v in found.tangents], mode)
            weigh = self.weigh(line.value, targets, draws)
            products: Leaves = together(lambda u: line.pull(weigh(u)), images)
        return products, jacobian_disagreement(found, images, line.pull)


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

    def normalizer(self, outputs: Tensor, targets: Any) -> Tensor:
        return checked_normalizer(self.loss, outputs, targets)

    def weigh(self, outputs: Tensor, targets: Any, draws: Draws) -> Callable[[Tensor], Tensor]:
        return LossHessian(self.loss).weigh(outputs, targets, draws)

    def objective(self, fn: LeafFn, targets: Any) -> LeafFn:
        """The unreduced objective as a function of the parameters' leaves."""
        return lambda leaves: self.loss.terms(fn(leaves), targets).sum()

    def multiply(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, stack: Leaves, how: How
    ) -> tuple[Leaves, Tensor]:
        with torch.no_grad():
            normalizer = self.normalizer(fn(leaves), targets)
        mode, width = how
        products: Leaves = each(hessian_product(self.objective(fn, targets), leaves, mode), stack, width)
        return products, normalizer

    def form(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, vector: Leaves, how: How
    ) -> tuple[Leaves, Tensor]:
        products, normalizer = self.multiply(fn, leaves, targets, draws, vector, how)
        pairs = zip(vector, products, strict=True)
        return [torch.stack([(full_precision(v) * full_precision(h)).sum() for v, h in pairs]).sum()], normalizer

    def trial(
        self, fn: LeafFn, leaves: Leaves, targets: Any, draws: Draws, found: Probe, how: How, count: ElementCount
    ) -> tuple[Leaves, float]:
        objective, (mode, width) = self.objective(fn, targets), how
        with count:
            products: Leaves = each(hessian_product(objective, leaves, mode), found.tangents, width)
        gradient, expected = hessian_by_autograd(objective, leaves, found.tangents)
        return products, hessian_disagreement(found.tangents, products, gradient, expected)


def checked_normalizer(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """The loss's normalizer, once the targets are known to fit."""
    loss.check(outputs, targets)
    return loss.normalizer(outputs, targets)
