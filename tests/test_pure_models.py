"""Models that write to what they are given, or give other outputs each time, are refused or kept from it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import plain
import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import generator, normal
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import CaptureError
from curvlib.estimators import ggn, gramian, hessian, jacobian

EXACT = 1e-10
ALL = (ggn, hessian, gramian, jacobian)


def assert_close(estimate: Tensor, truth: Tensor) -> None:
    assert reference.relative_error(estimate, truth) <= EXACT


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def classes(number: int, seed: int = 5) -> Tensor:
    return torch.randint(2, (number,), generator=generator(seed))


# --- models that are no functions -------------------------------------------------------------------------------------


def of_function(change: Callable[[dict[str, Tensor], Tensor], Tensor]) -> tuple[Any, Any, Any]:
    params = {"a": normal(1, 3, 4), "b": normal(2, 4, 2)}
    return lambda p, x: torch.tanh(change(p, x) @ p["a"]) @ p["b"], params, normal(3, 5, 3)


def writes_to_parameter(p: dict[str, Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        p["a"].mul_(0.5)
    return x


def writes_to_data(p: dict[str, Tensor], x: Tensor) -> Tensor:
    p["b"].data.clamp_(-0.1, 0.1)
    return x


def writes_plainly(p: dict[str, Tensor], x: Tensor) -> Tensor:
    p["a"] += 1
    return x


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("change", [writes_to_parameter, writes_plainly])
def test_models_that_write_to_their_parameters_are_refused_and_these_stay_as_they_are(make: Any, change: Any) -> None:
    model_fn, params, inputs = of_function(change)
    before = {name: leaf.clone() for name, leaf in params.items()}
    with pytest.raises(CaptureError, match="changes 'a' in place"):
        make(model_fn, params, inputs if make is jacobian else (inputs, classes(5)))
    assert all(torch.equal(before[name], params[name]) for name in params)


@pytest.mark.parametrize("make", ALL)
def test_parameters_stay_as_they_are_where_the_model_writes_to_their_data(make: Any) -> None:
    model_fn, params, inputs = of_function(writes_to_data)
    before = params["b"].clone()
    with pytest.raises(CaptureError, match="changes 'b' in place"):
        make(model_fn, params, inputs if make is jacobian else (inputs, classes(5)))
    assert torch.equal(before, params["b"])


def set_first(x: Tensor) -> Tensor:
    x[:, 0] = 2
    return x


WRITES_TO_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x.add_(1),
    "relu": lambda x: x.relu_(),
    "inplace module": nn.ReLU(inplace=True),
    "part": set_first,
}


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("name", WRITES_TO_INPUTS)
def test_models_that_write_to_their_inputs_are_given_copies(name: str, mode: str) -> None:
    write = WRITES_TO_INPUTS[name]
    model_fn, params, inputs = of_function(lambda p, x: write(x))
    pure, *_ = of_function(lambda p, x: write(x.clone()))
    batch, before = (inputs, classes(5)), inputs.clone()
    for data in (batch, cv.over([batch])):
        assert_close(ggn(model_fn, params, data, mode=mode).to_dense(), plain.ggn(pure, params, batch, cross_entropy))
    truth = plain.hessian(pure, params, batch, cross_entropy)
    assert_close(hessian(model_fn, params, batch, mode=mode).to_dense(), truth)
    assert_close(jacobian(model_fn, params, inputs, mode=mode).to_dense(), plain.jacobian(pure, params, inputs))
    assert torch.equal(inputs, before)


def test_models_that_change_containers_of_inputs_are_given_new_ones() -> None:
    def model_fn(p: Any, x: dict[str, Any]) -> Tensor:
        return x.pop("x") @ p["a"]

    inputs, params = {"x": normal(1, 5, 3), "y": [1]}, {"a": normal(2, 3, 2)}
    curv = ggn(model_fn, params, cv.over([(inputs, classes(5))]))
    assert_close(curv.to_dense(), plain.ggn(lambda p, x: x @ p["a"], params, (inputs["x"], classes(5)), cross_entropy))
    assert sorted(inputs) == ["x", "y"]


class Counting(nn.Module):
    """A model that remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def drawing(draw: Callable[[], float]) -> Callable[[Any, Tensor], Tensor]:
    return lambda p, x: x @ p["a"] * draw()


@pytest.mark.parametrize("make", ALL)
def test_models_that_give_other_outputs_each_time_are_refused(make: Any) -> None:
    import numpy as np

    own = torch.Generator().manual_seed(0)
    params = {"a": normal(1, 3, 2)}
    counting_fn, counting_params = cv.functional(Counting().double())
    cases = [
        (counting_fn, counting_params, "other outputs"),
        (drawing(lambda: float(torch.rand((), generator=own))), params, "other outputs"),
        (drawing(random.random), params, "generator of random"),
        (drawing(lambda: np.random.rand()), params, r"generator of numpy\.random"),
    ]
    inputs = normal(2, 5, 3)
    for model_fn, values, message in cases:
        python, numpy = random.getstate(), np.random.get_state()[1].copy()
        with pytest.raises(CaptureError, match=message):
            make(model_fn, values, inputs if make is jacobian else (inputs, classes(5)))
        assert random.getstate() == python
        assert (np.random.get_state()[1] == numpy).all()
