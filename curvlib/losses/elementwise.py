"""Losses that are sums over the outputs' elements: their Hessian is diagonal."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from curvlib.linalg.gram import full_precision
from curvlib.losses.base import Loss, check_like_outputs, check_reduction


class ElementwiseLoss(Loss):
    """A loss whose terms are sums of h(f, y) over the elements of an example: H_n = diag(h''(f_n))."""

    @abc.abstractmethod
    def _elements(self, outputs: Tensor, targets: Any) -> Tensor:
        """h(f, y), element by element."""

    @abc.abstractmethod
    def _sqrt_curvature(self, outputs: Tensor) -> Tensor:
        """sqrt(h''(f)), element by element."""

    @abc.abstractmethod
    def _curvature(self, outputs: Tensor) -> Tensor:
        """h''(f), element by element."""

    def mask(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """None: every element counts."""
        return None

    def _terms(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._elements(outputs, targets).reshape(outputs.shape[0], -1).sum(1)

    def _sqrt_hessian(self, outputs: Tensor, targets: Any, start: int, stop: int) -> Tensor:
        diagonal = self._sqrt_curvature(outputs).reshape(outputs.shape[0], -1)  # [N, K]
        element = torch.arange(diagonal.shape[1], device=outputs.device)
        chosen = element[start:stop, None] == element  # [stop - start, K]
        return torch.where(chosen[:, None], diagonal, 0).reshape(stop - start, *outputs.shape)

    def _hessian_product(self, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
        return self._curvature(outputs) * v


@dataclass(frozen=True)
class MSE(ElementwiseLoss):
    """Squared error without a factor 1/2: l(f, y) = ||f - y||^2 and H = 2 I.

    The likelihood is N(f, I / 2). ``reduction="mean"`` divides by all N * C elements, as
    `torch.nn.functional.mse_loss` does.

    Args:
        reduction: ``mean`` or ``sum``.

    Raises:
        ArgumentError: an unknown reduction.

    Example:
        >>> import torch, curvlib as cv
        >>> outputs, targets = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
        >>> cv.MSE().value(outputs, targets), cv.MSE("sum").value(outputs, targets)
        (tensor(2.5000), tensor(5.))
        >>> cv.MSE().hessian_product(outputs, targets, torch.ones(1, 2))
        tensor([[2., 2.]])
    """

    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def _check_targets(self, outputs: Tensor, targets: Any) -> None:
        check_like_outputs(self._name, outputs, targets)

    def _elements(self, outputs: Tensor, targets: Any) -> Tensor:
        return _residual(outputs, targets).square()

    def positions(self, outputs: Tensor, targets: Any) -> Tensor:
        return full_precision(outputs).new_full((), outputs.numel() // math.prod(outputs.shape[1:][-1:]))

    def _count(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.new_full((), outputs.numel())

    def _gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        return 2 * _residual(outputs, targets)

    def _curvature(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, 2)

    def _sqrt_curvature(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, math.sqrt(2))

    def _sample(self, outputs: Tensor, targets: Any, generator: torch.Generator, samples: int) -> Tensor:
        return math.sqrt(2) * _normal(outputs, generator, samples)


@dataclass(frozen=True)
class BernoulliLogits(ElementwiseLoss):
    """Binary cross-entropy on logits, element by element: H = diag(p (1 - p)) with p = sigmoid(f).

    l(f, y) = sum_c log(1 + exp(f_c)) - y_c f_c, `torch.nn.functional.binary_cross_entropy_with_logits`; the
    likelihood is Bernoulli(p). ``reduction="mean"`` divides by all N * C elements. Targets are floating-point, usually
    in [0, 1].

    Args:
        reduction: ``mean`` or ``sum``.

    Raises:
        ArgumentError: an unknown reduction.

    Example:
        >>> import torch, curvlib as cv
        >>> outputs, targets = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> cv.BernoulliLogits().gradient(outputs, targets)
        tensor([[ 0.5000, -0.5000]])
        >>> cv.BernoulliLogits().hessian_product(outputs, targets, torch.ones(1, 2))
        tensor([[0.2500, 0.2500]])
    """

    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def _check_targets(self, outputs: Tensor, targets: Any) -> None:
        check_like_outputs(self._name, outputs, targets)

    def _elements(self, outputs: Tensor, targets: Any) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none")

    def positions(self, outputs: Tensor, targets: Any) -> Tensor:
        return full_precision(outputs).new_full((), outputs.numel() // math.prod(outputs.shape[1:][-1:]))

    def _count(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.new_full((), outputs.numel())

    def _gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        return _residual(outputs.sigmoid(), targets)

    def _curvature(self, outputs: Tensor) -> Tensor:
        # 1 - p loses all digits where p is close to one; sigmoid(-f) does not
        return outputs.sigmoid() * (-outputs).sigmoid()

    def _sqrt_curvature(self, outputs: Tensor) -> Tensor:
        return (0.5 * (functional.logsigmoid(outputs) + functional.logsigmoid(-outputs))).exp()

    def _sample(self, outputs: Tensor, targets: Any, generator: torch.Generator, samples: int) -> Tensor:
        uniform = torch.rand((samples, *outputs.shape), generator=generator, dtype=outputs.dtype, device=outputs.device)
        probability = outputs.sigmoid()
        return torch.where(uniform < probability, -(-outputs).sigmoid(), probability)


@dataclass(frozen=True)
class Identity(ElementwiseLoss):
    """Half the squared distance, l(f, y) = 1/2 ||f - y||^2, y = 0 if there are no targets: H = I.

    The curvature of a model under this loss is its Gramian J^T J. ``reduction="mean"`` divides by the N examples.

    Args:
        reduction: ``mean`` or ``sum``.

    Raises:
        ArgumentError: an unknown reduction.

    Example:
        >>> import torch, curvlib as cv
        >>> outputs = torch.tensor([[1.0, 2.0]])
        >>> cv.Identity().value(outputs, None)
        tensor(2.5000)
        >>> cv.Identity().sqrt_hessian(outputs, None)
        tensor([[[1., 0.]],
        <BLANKLINE>
                [[0., 1.]]])
    """

    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def _check_targets(self, outputs: Tensor, targets: Any) -> None:
        if targets is not None:
            check_like_outputs(self._name, outputs, targets)

    def _elements(self, outputs: Tensor, targets: Any) -> Tensor:
        return 0.5 * self._gradient(outputs, targets).square()

    def positions(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._count(full_precision(outputs), targets)

    def _count(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.new_full((), outputs.shape[0])

    def _gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.clone() if targets is None else _residual(outputs, targets)

    def _curvature(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def _sqrt_curvature(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def _sample(self, outputs: Tensor, targets: Any, generator: torch.Generator, samples: int) -> Tensor:
        return _normal(outputs, generator, samples)


def _residual(outputs: Tensor, targets: Tensor) -> Tensor:
    """The difference f - y in the outputs' dtype."""
    return outputs - targets.to(outputs.dtype)


def _normal(outputs: Tensor, generator: torch.Generator, samples: int) -> Tensor:
    """Independent standard normal numbers [samples, *outputs.shape]."""
    return torch.randn((samples, *outputs.shape), generator=generator, dtype=outputs.dtype, device=outputs.device)
