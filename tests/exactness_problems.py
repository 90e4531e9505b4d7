"""Models, losses and data for the tests of exactness, each with its brute-force curvature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reference
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cv

few = settings(deadline=None, max_examples=12)
seeds = st.integers(0, 2**20)
reductions = st.sampled_from(["mean", "sum"])
engines = st.sampled_from(["functional", "autograd"])
EXACT = 1e-10


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# --- losses: curvlib's, and torch's for the reference -----------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    loss: Callable[[str], cv.Loss]
    objective: reference.Objective
    targets: Callable[[Tensor, int], Tensor]


def random_classes(outputs: Tensor, seed: int) -> Tensor:
    return torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator(seed))


def half_ignored(outputs: Tensor, seed: int) -> Tensor:
    targets = random_classes(outputs, seed).reshape(-1)
    targets[1::2] = -100
    return targets.reshape(outputs.shape[:-1])


def smoothed(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction=reduction, label_smoothing=0.2)


def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
    """A convex loss that couples all outputs of an example: ||f - y||^4 / 4 + (sum f)^2."""
    f, y = outputs.flatten(1), targets.flatten(1)
    return (f - y).square().sum(1).square() / 4 + f.sum(1).square()


def coupled_objective(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    terms = coupled(outputs, targets)
    return terms.mean() if reduction == "mean" else terms.sum()


def half_square(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    total = (outputs - targets).square().sum() / 2
    return total / len(outputs) if reduction == "mean" else total


def like_outputs(outputs: Tensor, seed: int) -> Tensor:
    return normal(seed, *outputs.shape)


def fair_bits(outputs: Tensor, seed: int) -> Tensor:
    return (normal(seed, *outputs.shape) > 0).to(outputs.dtype)


KINDS: dict[str, Kind] = {
    "mse": Kind(cv.MSE, reference.squared_error, like_outputs),
    "cross-entropy": Kind(cv.CrossEntropy, reference.cross_entropy, random_classes),
    "ignored": Kind(cv.CrossEntropy, reference.cross_entropy, half_ignored),
    "smoothed": Kind(lambda r: cv.CrossEntropy(r, label_smoothing=0.2), smoothed, random_classes),
    "bernoulli": Kind(cv.BernoulliLogits, reference.binary_cross_entropy, fair_bits),
    "identity": Kind(cv.Identity, half_square, like_outputs),
    "custom": Kind(lambda r: cv.CustomLoss(coupled, r), coupled_objective, like_outputs),
}
CONSTANT_HESSIAN = ("mse", "identity")


# --- problems ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    model_fn: reference.ModelFn
    params: Any
    batch: tuple[Any, Any]
    kind: Kind
    reduction: str

    def kfac(self, **options: Any) -> cv.BlockDiagonal:
        loss = self.kind.loss(self.reduction)
        return cv.kfac(self.model_fn, self.params, self.batch, loss=loss, **{"fisher": "type-2", **options})

    def ggn(self) -> Tensor:
        return reference.ggn(self.model_fn, self.params, self.batch, self.kind.objective, self.reduction)

    def empirical_fisher(self) -> Tensor:
        return reference.empirical_fisher(self.model_fn, self.params, self.batch, self.kind.objective, self.reduction)

    def blocks(self, matrix: Tensor, **options: Any) -> Tensor:
        """The block-diagonal part, layer by layer."""
        return reference.block_diagonal(matrix, reference.block_labels(self.params, **options))


def randomized(params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Normal numbers of the same shapes, scaled by 1 / sqrt(fan in)."""
    scale = {name: 1 / math.sqrt(max(1, leaf[0].numel() if leaf.ndim else 1)) for name, leaf in params.items()}
    return {name: scale[name] * normal(seed + i, *leaf.shape) for i, (name, leaf) in enumerate(params.items())}


def problem(
    model: nn.Module | reference.ModelFn,
    inputs: Any,
    kind: str,
    reduction: str,
    *,
    params: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> Problem:
    """A module, or a function with the shapes of its parameters, with random parameters and targets in float64."""
    if isinstance(model, nn.Module):
        model_fn, found = cv.functional(model.double())
        params = found if params is None else params
    else:
        model_fn = model
    assert params is not None
    values = randomized(params, 31 * seed)
    targets = KINDS[kind].targets(model_fn(values, inputs), seed + 7)
    return Problem(model_fn, values, (inputs, targets), KINDS[kind], reduction)


def deep_linear(widths: list[int], *, bias: bool) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(m, n, bias=bias) for m, n in itertools.pairwise(widths)))


def assert_exact(curv: cv.Operator, truth: Tensor) -> None:
    assert reference.relative_error(curv.to_dense(), truth) <= EXACT


# --- architectures in which every weight is used once, at one position --------------------------------------------


class Residual(nn.Module):
    """x + W2 (silu(W1 x) * Wg x), then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        self.down, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(torch.tanh(x))


class FeatureAttention(nn.Module):
    """Softmax attention over 3 slots that are read off one vector, so that no weight is shared by the slots."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 12), nn.Linear(3, 12, bias=False), nn.Linear(3, 12)
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).reshape(-1, 2, 3, 2) for layer in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))


def unshared_architectures() -> dict[str, tuple[nn.Module, Tensor]]:
    """Modules with an example of their inputs."""
    vector = normal(1, 1, 3)
    return {
        "tanh": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), vector),
        "relu without bias": (
            nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)),
            vector,
        ),
        "residual": (Residual(), vector),
        "attention": (FeatureAttention(), vector),
        "embedding": (nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 2)), torch.tensor([3])),
        "whole-image convolution": (
            nn.Sequential(nn.Conv2d(2, 3, (3, 2)), nn.Flatten(), nn.Tanh(), nn.Linear(3, 2)),
            normal(2, 1, 2, 3, 2),
        ),
        "1d convolution": (
            nn.Sequential(nn.Conv1d(2, 3, 3, padding=1, stride=4), nn.Flatten(), nn.Tanh(), nn.Linear(3, 2)),
            normal(3, 1, 2, 3),
        ),
        "3d convolution": (
            nn.Sequential(nn.Conv3d(2, 3, 2, bias=False), nn.Flatten(), nn.Tanh(), nn.Linear(3, 2)),
            normal(4, 1, 2, 2, 2, 2),
        ),
    }
