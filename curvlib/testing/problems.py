"""Strategies for small models, each with parameters, a batch and a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from curvlib.losses import MSE, BernoulliLogits, CrossEntropy, Loss
from curvlib.pytree import Tree

ModelFn = Callable[[Any, Any], Tensor]
Model = tuple[ModelFn, dict[str, tuple[int, ...]], tuple[int, ...]]  # with the shapes of weights and of an example


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an estimator is called with.

    Attributes:
        name: of the model.
        model_fn: pure function (params, inputs) -> outputs [N, ...].
        params: pytree of tensors.
        batch: (inputs, targets).
        loss: the objective.
    """

    name: str
    model_fn: ModelFn
    params: Tree
    batch: tuple[Any, Any]
    loss: Loss

    def __repr__(self) -> str:
        shapes = {name: list(leaf.shape) for name, leaf in self.params.items()}
        return f"Problem({self.name}, {shapes}, N = {len(self.batch[0])}, {self.loss})"


@st.composite
def problems(draw: st.DrawFn, *, models: tuple[str, ...] | None = None, dtype: torch.dtype = torch.float64) -> Problem:
    """Small models with batches of one to five examples and one of three losses with mean or sum.

    Args:
        draw: given by hypothesis.
        models: some of ``linear``, ``perceptron``, ``convolution``, ``sequence`` (a layer shared by positions) and
            ``tied`` (one weight used twice); None: all.
        dtype: of parameters and inputs.

    Returns:
        A strategy.

    Example:
        >>> import curvlib as cv
        >>> from hypothesis import given, settings
        >>> from curvlib.testing import check_curvature, problems
        >>> @settings(max_examples=2, deadline=None, database=None)
        ... @given(problem=problems(models=("linear", "perceptron")))
        ... def test_trace(problem):
        ...     model_fn, params, batch, loss = problem.model_fn, problem.params, problem.batch, problem.loss
        ...     type_2 = lambda *data, loss: cv.ekfac(*data, loss=loss, fisher="type-2")
        ...     check_curvature(type_2, model_fn, params, batch, loss=loss, exact="trace")
        >>> test_trace()
    """
    name = draw(st.sampled_from(models or tuple(MODELS)))
    inside, outside, examples = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    model_fn, shapes, row = MODELS[name](inside, outside)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    params = {key: torch.randn(shape, generator=generator, dtype=dtype) for key, shape in shapes.items()}
    inputs = torch.randn(examples, *row, generator=generator, dtype=dtype)
    outputs = model_fn(params, inputs)
    reduction = draw(st.sampled_from(["mean", "sum"]))
    kind = draw(st.sampled_from(["cross entropy", "squared error", "bernoulli"]))
    if kind == "cross entropy":
        targets = torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator)
        return Problem(name, model_fn, params, (inputs, targets), CrossEntropy(reduction))
    if kind == "squared error":
        targets = torch.randn(outputs.shape, generator=generator, dtype=dtype)
        return Problem(name, model_fn, params, (inputs, targets), MSE(reduction))
    targets = torch.randint(2, outputs.shape, generator=generator).to(dtype)
    return Problem(name, model_fn, params, (inputs, targets), BernoulliLogits(reduction))


def linear(inside: int, outside: int) -> Model:
    """W x + b."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return F.linear(x, p["weight"], p["bias"])

    return model_fn, {"weight": (outside, inside), "bias": (outside,)}, (inside,)


def perceptron(inside: int, outside: int) -> Model:
    """V tanh(W x + b)."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, p["hidden.weight"], p["hidden.bias"])), p["head.weight"])

    return model_fn, {"hidden.weight": (3, inside), "hidden.bias": (3,), "head.weight": (outside, 3)}, (inside,)


def convolution(inside: int, outside: int) -> Model:
    """V times the mean over positions of tanh(W * x + b)."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.conv1d(x, p["filter.weight"], p["filter.bias"], padding=1))
        return F.linear(hidden.mean(-1), p["head.weight"])

    shapes = {"filter.weight": (2, inside, 3), "filter.bias": (2,), "head.weight": (outside, 2)}
    return model_fn, shapes, (inside, 4)


def sequence(inside: int, outside: int) -> Model:
    """V tanh(W x_t) + b at every position t."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, p["hidden.weight"])), p["head.weight"], p["head.bias"])

    return model_fn, {"hidden.weight": (2, inside), "head.weight": (outside, 2), "head.bias": (outside,)}, (3, inside)


def tied(inside: int, outside: int) -> Model:
    """V tanh(W tanh(W x))."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(torch.tanh(F.linear(x, p["weight"])), p["weight"]))
        return F.linear(hidden, p["head.weight"])

    return model_fn, {"weight": (inside, inside), "head.weight": (outside, inside)}, (inside,)


MODELS: dict[str, Callable[[int, int], Model]] = {
    "linear": linear,
    "perceptron": perceptron,
    "convolution": convolution,
    "sequence": sequence,
    "tied": tied,
}
