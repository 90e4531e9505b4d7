"""What the tests of the matrix-free operators share: every operator, small models, tolerances near rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import generator, normal, randomized
from torch import Tensor, nn

import curvlib as cv
from curvlib.estimators import fisher, ggn, gramian, hessian, jacobian

EXACT = 1e-10
MAKERS: dict[str, Callable[..., Any]] = {
    "ggn": ggn,
    "hessian": hessian,
    "empirical": lambda *a, **o: fisher(*a, fisher="empirical", **o),
    "mc": lambda *a, **o: fisher(*a, fisher="mc", **o),
    "gramian": gramian,
    "jacobian": lambda f, p, batch, **o: jacobian(f, p, batch[0], **o),
}
every_operator = pytest.mark.parametrize("name", MAKERS)
every_mode = pytest.mark.parametrize("mode", ["forward", "reverse", None])


def assert_close(estimate: Tensor, truth: Tensor, tolerance: float = EXACT) -> None:
    assert reference.relative_error(estimate, truth) <= tolerance


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def of_module(module: nn.Module, inputs: Any) -> tuple[Any, Any, Any]:
    model_fn, params = cv.functional(module.double())
    number = reference.number_of_examples(inputs)
    return model_fn, randomized(params, 3), (inputs, torch.randint(2, (number,), generator=generator(5)))


def mlp() -> tuple[Any, Any, Any]:
    return of_module(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), normal(0, 5, 3)
    )
