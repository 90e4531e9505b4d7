"""Losses with outputs, targets and the same terms written with torch's functions, for the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from curvlib.losses import MSE, BernoulliLogits, CrossEntropy, CustomLoss, Identity, Loss


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Problem:
    loss: Loss
    outputs: Tensor
    targets: Any
    elements: Callable[[Tensor, Any], Tensor]  # torch's unreduced loss
    value: Callable[[Tensor, Any, str], Tensor]  # torch's reduced loss

    def terms(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.elements(outputs, targets).reshape(len(outputs), -1).sum(1)

    def example(self, n: int) -> Any:
        return None if self.targets is None else self.targets[n : n + 1]

    def hessians(self) -> Tensor:
        """[N, D, D], example by example."""
        size = math.prod(self.outputs.shape[1:])
        hessian = torch.func.hessian(lambda f, y: self.terms(f, y).sum())
        one = [hessian(self.outputs[n : n + 1], self.example(n)) for n in range(len(self.outputs))]
        return torch.stack(one).reshape(-1, size, size)


def cross_entropy(loss: CrossEntropy, outputs: Tensor, targets: Tensor) -> Problem:
    def torch_layout(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return f.movedim(loss.class_dim, 1), y.movedim(loss.class_dim, 1) if y.dtype.is_floating_point else y

    def torch_value(f: Tensor, y: Tensor, reduction: str) -> Tensor:
        options = {"ignore_index": loss.ignore_index, "label_smoothing": loss.label_smoothing}
        return functional.cross_entropy(*torch_layout(f, y), reduction=reduction, **options)

    return Problem(loss, outputs, targets, lambda f, y: torch_value(f, y, "none"), torch_value)


def poisson(log_rate: Tensor, count: Tensor) -> Tensor:
    return (log_rate.exp() - count * log_rate).sum(tuple(range(1, log_rate.ndim)))


KINDS = (
    "indices",
    "ignored",
    "smoothed",
    "probabilities",
    "smoothed probabilities",
    "masses",
    "channels first",
    "probabilities first",
    "mse",
    "bernoulli",
    "identity",
    "no targets",
    "custom",
)
SINGLE_POSITION = ("mse", "bernoulli", "identity", "no targets", "custom")


def make(kind: str, examples: int = 3, positions: tuple[int, ...] = (), classes: int = 4, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    front = (examples, *positions)
    outputs = 2 * normal(*front, classes)
    indices = torch.randint(classes, front, generator=generator)
    if kind == "indices":
        return cross_entropy(CrossEntropy(), outputs, indices)
    if kind == "ignored":
        indices = torch.where(torch.rand(front, generator=generator) < 0.8, indices, 1)
        indices.view(-1)[0] = 0  # the mean of nothing is nan
        return cross_entropy(CrossEntropy(ignore_index=1), outputs, indices)
    if kind == "smoothed":
        indices = torch.where(torch.rand(front, generator=generator) < 0.8, indices, -100)
        indices.view(-1)[0] = 0
        return cross_entropy(CrossEntropy(label_smoothing=0.3), outputs, indices)
    if kind == "probabilities":
        return cross_entropy(CrossEntropy(), outputs, normal(*front, classes).softmax(-1))
    if kind == "smoothed probabilities":
        return cross_entropy(CrossEntropy(label_smoothing=0.2), outputs, normal(*front, classes).softmax(-1))
    if kind == "masses":
        return cross_entropy(CrossEntropy(label_smoothing=0.1), outputs, 3 * normal(*front, classes).abs())
    if kind == "channels first":
        indices = torch.where(torch.rand(front, generator=generator) < 0.8, indices, -100)
        indices.view(-1)[0] = 0
        return cross_entropy(CrossEntropy(class_dim=1), outputs.movedim(-1, 1).contiguous(), indices)
    if kind == "probabilities first":
        targets = 2 * normal(*front, classes).softmax(-1)
        return cross_entropy(CrossEntropy(class_dim=1), outputs.movedim(-1, 1), targets.movedim(-1, 1))
    if kind == "mse":
        square = functional.mse_loss
        return Problem(
            MSE(),
            outputs,
            normal(*outputs.shape),
            lambda f, y: square(f, y, reduction="none"),
            lambda f, y, reduction: square(f, y, reduction=reduction),
        )
    if kind == "bernoulli":
        binary, labels = functional.binary_cross_entropy_with_logits, normal(*outputs.shape).sigmoid()
        return Problem(
            BernoulliLogits(),
            outputs,
            labels,
            lambda f, y: binary(f, y, reduction="none"),
            lambda f, y, reduction: binary(f, y, reduction=reduction),
        )
    if kind in ("identity", "no targets"):

        def half(f: Tensor, y: Tensor | None) -> Tensor:
            return (f if y is None else f - y) ** 2 / 2

        return Problem(
            Identity(),
            outputs,
            None if kind == "no targets" else normal(*outputs.shape),
            half,
            lambda f, y, reduction: half(f, y).sum() / (len(f) if reduction == "mean" else 1),
        )
    assert kind == "custom"
    counts = normal(*outputs.shape).abs()
    return Problem(
        CustomLoss(poisson),
        outputs / 2,
        counts,
        lambda f, y: f.exp() - y * f,
        lambda f, y, reduction: poisson(f, y).sum() / (len(f) if reduction == "mean" else 1),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    return make(
        draw(st.sampled_from(KINDS)),
        examples=draw(st.integers(1, 4)),
        positions=draw(st.sampled_from([(), (1,), (3,), (2, 2)])),
        classes=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 10_000)),
    )


every_kind = pytest.mark.parametrize("kind", KINDS)
moderately = settings(deadline=None, max_examples=25)


def assert_equal(result: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Relative to the largest entry of what is expected."""
    assert result.shape == expected.shape
    error = (result - expected).abs().max()
    assert error <= tolerance * expected.abs().max() + 1e-300, f"error {error}, size {expected.abs().max()}"


def outer(columns: Tensor) -> Tensor:
    """sum_k s_k s_k^T per example: [K, N, ...] -> [N, D, D]."""
    flat = columns.reshape(*columns.shape[:2], -1)
    return torch.einsum("knd,kne->nde", flat, flat)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
