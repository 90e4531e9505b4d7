"""Layerwise curvature wherever it is taken: inference mode, no_grad, compiled modules and functions, sub-forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.utils._pytree as torch_pytree
from exactness_problems import normal
from pairwise import every_pair
from torch import Tensor, nn

import curvlib as cv

Params = dict[str, Tensor]
X, Y = normal(0, 6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
PARAMS = {"a": normal(1, 3, 4), "b": normal(2, 4, 2)}
NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
    "norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.Flatten(), nn.Linear(8, 2)),
}
TRACES: dict[str, Callable[..., Tensor]] = {
    "ekfac": lambda *args, **options: cv.ekfac(*args, **options).trace(),
    "diagonal": lambda *args, **options: cv.diagonal(*args, **options).trace(),
    "tkfac": lambda *args, **options: cv.tkfac(*args, **options).trace(),
    "corrected": lambda *args, **options: cv.eigenvalue_correct(cv.kfac(*args, **options), *args, **options).trace(),
}


def smooth(p: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["a"]) @ p["b"]


def exact_trace(model_fn: Any, params: Any) -> Tensor:
    return reference.ggn(model_fn, params, (X, Y), reference.cross_entropy, "mean").trace()


@every_pair(
    "net, engine, made", NETS, [None, "functional", "autograd"], ["before", "inside", "inside, used outside"]
)
def test_curvature_is_right_in_inference_mode(net: str, engine: str | None, made: str) -> None:
    model_fn, params = cv.functional(NETS[net]().double())
    expected, kfac = exact_trace(model_fn, params), cv.kfac(model_fn, params, (X, Y), fisher="type-2")
    batch: Any = (X, Y)
    if made != "before":
        with torch.inference_mode():
            params, batch = torch_pytree.tree_map(Tensor.clone, (params, batch))
    with torch.inference_mode(made != "inside, used outside"):
        for name, trace in TRACES.items():
            found = trace(model_fn, params, batch, fisher="type-2", engine=engine)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13, msg=name)
        curv = cv.kfac(model_fn, params, batch, fisher="type-2", engine=engine)
        torch.testing.assert_close(curv.to_dense(), kfac.to_dense(), rtol=1e-11, atol=1e-14)
        scores = cv.influence.scores(curv.inverse(0.1), model_fn, params, batch, batch)
    expected_scores = cv.influence.scores(kfac.inverse(0.1), model_fn, params, (X, Y), (X, Y))
    torch.testing.assert_close(scores.clone(), expected_scores.clone(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", [None, "functional", "autograd"])
def test_curvature_over_a_loader_is_right_in_inference_mode(engine: str | None) -> None:
    with torch.inference_mode():  # as Lightning's Trainer.predict does
        loader = [(X[:4].clone(), Y[:4].clone()), (X[4:].clone(), Y[4:].clone())]
        curv = cv.ekfac(smooth, PARAMS, cv.over(loader), fisher="type-2", engine=engine)
    torch.testing.assert_close(curv.trace(), exact_trace(smooth, PARAMS), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_a_forward_that_is_decorated_with_inference_mode_is_refused(engine: str) -> None:
    encode = torch.inference_mode()(lambda p, x: torch.tanh(x @ p["a"]))
    with pytest.raises(cv.errors.CaptureError, match="gradients are disabled"):
        cv.kfac(lambda p, x: encode(p, x) @ p["b"], PARAMS, (X, Y), engine=engine)


@every_pair(
    "how, engine, backend",
    ["module", "in place", "part", "function"],
    ["functional", "autograd"],
    ["inductor", "aot_eager"],
)
def test_compiled_models_are_looked_at_as_they_were_written(how: str, engine: str, backend: str) -> None:
    net: Any = NETS["linear"]().double()
    model_fn: Any
    plain_fn, params = cv.functional(net)
    expected = cv.kfac(plain_fn, params, (X, Y), fisher="type-2", engine=engine).to_dense()
    expected_trace = exact_trace(plain_fn, params)
    if how == "module":
        model_fn, _ = cv.functional(torch.compile(net, backend=backend))  # type: ignore[arg-type]
    elif how == "in place":
        net.compile(backend=backend)
        model_fn, _ = cv.functional(net)
    elif how == "part":
        net[0] = torch.compile(net[0], backend=backend)
        model_fn, params = cv.functional(net)
    else:
        model_fn = torch.compile(plain_fn, backend=backend)
    curv = cv.kfac(model_fn, params, (X, Y), fisher="type-2", engine=engine)
    torch.testing.assert_close(curv.to_dense(), expected, rtol=1e-12, atol=1e-15)
    trace = cv.ekfac(model_fn, params, (X, Y), fisher="type-2", engine=engine).trace()
    torch.testing.assert_close(trace, expected_trace, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("estimate", [cv.kfac, cv.ekfac, cv.tkfac, cv.diagonal, cv.shampoo])
def test_a_model_that_draws_leaves_the_global_generator_alone(estimate: Any, engine: str) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    model_fn, params = cv.functional(net)
    before = torch.get_rng_state()
    first, second = (estimate(model_fn, params, (X, Y), engine=engine) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.trace(), second.trace())
