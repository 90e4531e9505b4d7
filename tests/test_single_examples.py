"""Models whose examples depend on each other, and models that only look like them; time in front; detached uses.

Truth is one example at a time, by reverse-mode gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import normal
from torch import Tensor, nn

import curvlib as cv

Params = dict[str, Tensor]
ModelFn = Callable[[Params, Any], Tensor]
PARAMS = {"a": normal(0, 3, 4), "b": normal(1, 4, 2)}
X, TOKENS = normal(2, 6, 3), normal(3, 6, 5, 3)
TARGETS = torch.tensor([0, 1, 1, 0, 1, 0])
LOSS = cv.CrossEntropy()


def between(layer: Callable[[Tensor], Tensor]) -> ModelFn:
    """Two linear layers with something between them."""
    return lambda p, x: layer(torch.tanh(x @ p["a"])) @ p["b"]


def module(*layers: nn.Module, training: bool = True) -> tuple[ModelFn, Params]:
    return cv.functional(nn.Sequential(*layers).double().train(training))


def buffer(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, 1:] = h[:, :-1]
    out += h
    return out


def written(h: Tensor) -> Tensor:
    total = h.new_zeros(4)
    total += h.sum(0)
    return h - total


def convolved_and_chosen(h: Tensor) -> Tensor:
    """Each example by its own kernel; then rows that are chosen by values."""
    moved = F.conv1d(F.pad(h, (1, 1))[None], h[:, None, :3], groups=len(h))[0]
    out, positive = moved.clone(), h[:, 0] > 0
    out[positive] = moved[positive].sin()
    return out


MIXED: dict[str, tuple[ModelFn, Params, Tensor]] = {
    "batch norm without parameters": (
        *module(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)), X,
    ),
    "mean": (between(lambda h: h - h.mean(0)), PARAMS, X),
    "mean over all": (between(lambda h: h / h.std()), PARAMS, X),
    "softmax": (between(lambda h: h.softmax(0)), PARAMS, X),
    "normalize": (between(lambda h: F.normalize(h, dim=0)), PARAMS, X),
    "running sum": (between(lambda h: h.cumsum(0)), PARAMS, X),
    "largest": (between(lambda h: h - h.amax(0)), PARAMS, X),
    "Gram matrix": (between(lambda h: (h @ h.T).softmax(1) @ h), PARAMS, X),
    "distances": (between(lambda h: torch.cdist(h, h).square().sum(1, keepdim=True) + h), PARAMS, X),
    "einsum": (between(lambda h: torch.einsum("nd,md->nd", h, h)), PARAMS, X),
    "sum of products": (between(lambda h: h + (h @ h.T).sum(1, keepdim=True)), PARAMS, X),
    "neighbour": (between(lambda h: h + h.roll(1, 0)), PARAMS, X),
    "mirrored": (between(lambda h: h + h.flip(0)), PARAMS, X),
    "shuffled": (between(lambda h: h + h[torch.arange(len(h)).flip(0)]), PARAMS, X),
    "first example": (between(lambda h: h + h[0]), PARAMS, X),
    "sorted": (between(lambda h: h.sort(0).values), PARAMS, X),
    "shifted": (between(lambda h: F.pad(h, (0, 0, 1, -1))), PARAMS, X),
    "written to a buffer": (between(written), PARAMS, X),
    "attention over examples": (
        between(lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0]), PARAMS, X,
    ),
    "time-first encoder": (
        *module(nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), nn.Linear(4, 2)), TOKENS,
    ),
    "positions regrouped": (between(lambda h: h.transpose(0, 1).reshape(h.shape).mean(1)), PARAMS, TOKENS),
    "batch size written down": (between(lambda h: (h.reshape(6, 4) - h.mean(0))), PARAMS, X),
}  # fmt: skip

INDEPENDENT: dict[str, tuple[ModelFn, Params, Tensor]] = {
    "batch norm in evaluation": (
        *module(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2), training=False), X,
    ),
    "mean that is not used": (between(lambda h: (h.mean(0), h)[1]), PARAMS, X),
    "softmax over features": (between(lambda h: h.softmax(1)), PARAMS, X),
    "mean over positions": (between(lambda h: h.mean(1)), PARAMS, TOKENS),
    "running sum over time": (between(lambda h: h.cumsum(1)[:, -1]), PARAMS, TOKENS),
    "own entries": (between(lambda h: h[torch.arange(len(h)), h.sum(-1).argmax(1)]), PARAMS, TOKENS),
    "last position": (between(lambda h: h[:, -1]), PARAMS, TOKENS),
    "whole slices": (between(lambda h: h[: len(h)]), PARAMS, X),
    "batch einsum": (between(lambda h: torch.einsum("ntd,nsd->nd", h, h)), PARAMS, TOKENS),
    "instance norm": (
        *module(nn.Conv1d(5, 4, 1), nn.InstanceNorm1d(4), nn.Flatten(), nn.Linear(12, 2)), TOKENS,
    ),
    "buffer": (between(buffer), PARAMS, X),
    "axis of examples behind": (between(lambda h: (h.T + h.T.roll(1, 0)).T), PARAMS, X),
    "positions flattened": (between(lambda h: h.reshape(-1, 4).reshape(len(h), -1, 4).sum(1)), PARAMS, TOKENS),
    "batch-first encoder": (
        *module(nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Flatten(),
                nn.Linear(20, 2)), TOKENS,
    ),
    "mapped": (between(torch.vmap(lambda h: h / (1 + h.square().sum()))), PARAMS, X),
    "own kernels, and rows chosen by values": (between(convolved_and_chosen), PARAMS, X),
    "batch size written down": (between(lambda h: h.reshape(-1, 2, 2).reshape(len(h), 4)), PARAMS, X),
}  # fmt: skip
NEEDING: dict[str, Callable[..., Any]] = {
    "ekfac": cv.ekfac,
    "tkfac": cv.tkfac,
    "diagonal": cv.diagonal,
    "per-example shampoo": lambda *args: cv.shampoo(*args, per_example=True),
    "per-example dykaf": lambda *args: cv.dykaf(*args, per_example=True),
    "per-example kl_shampoo": lambda *args: cv.kl_shampoo(*args, per_example=True),
}


def batch_of(model_fn: ModelFn, params: Params, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs, with a class for every output."""
    outputs = model_fn(params, inputs)
    targets = TARGETS[: len(inputs)]
    return inputs, targets if outputs.ndim == 2 else targets[:, None].expand(outputs.shape[:2])


@pytest.mark.parametrize("model", MIXED)
def test_what_needs_single_examples_refuses_models_whose_examples_depend_on_each_other(model: str) -> None:
    model_fn, params, inputs = MIXED[model]
    batch = batch_of(model_fn, params, inputs)
    assert cv.plan(model_fn, params, inputs).mixed is not None
    inverse = cv.shampoo(model_fn, params, batch).inverse(cv.RelativeTikhonov(0.1))
    needing = NEEDING | {"influence": lambda f, p, b: cv.influence.scores(inverse, f, p, b, b)}
    for name, estimate in needing.items():
        with pytest.raises(cv.errors.CaptureError, match="examples depend on each other"):
            raise AssertionError(f"{name} gave {estimate(model_fn, params, batch)}")


@pytest.mark.parametrize("model", ["batch norm without parameters", "mean", "Gram matrix", "time-first encoder"])
@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_kfac_of_dependent_examples_warns_once_and_sums_rows_of_the_batch_gradient(model: str, engine: str) -> None:
    model_fn, params, inputs = MIXED[model]
    inputs, labels = batch = batch_of(model_fn, params, inputs)

    def objective(shift: Tensor) -> Tensor:
        """The summed loss with a shift of the last layer's outputs."""
        return F.cross_entropy(model_fn(params, inputs).movedim(-1, 1) + shift.movedim(-1, 1), labels, reduction="sum")

    g = torch.func.grad(objective)(torch.zeros_like(model_fn(params, inputs))).reshape(-1, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curv = cv.kfac(model_fn, params, cv.over([batch, batch]), fisher="empirical", engine=engine)
    told = [w for w in caught if "examples depend on each other" in str(w.message)]
    assert len(told) == 1
    assert told[0].filename == __file__
    last = curv.blocks[list(curv.blocks)[-1]]
    assert isinstance(last, cv.Kronecker)
    expected = g.T @ g / labels.numel()
    torch.testing.assert_close(last.left.to_dense(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("model", INDEPENDENT)
@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_models_whose_examples_are_independent_are_exact_one_by_one(model: str, engine: str) -> None:
    model_fn, params, inputs = INDEPENDENT[model]
    batch = batch_of(model_fn, params, inputs)
    exact = reference.ggn(model_fn, params, batch, reference.cross_entropy, "mean")
    assert cv.plan(model_fn, params, inputs).mixed is None
    curv = cv.diagonal(model_fn, params, batch, fisher="type-2", engine=engine)
    torch.testing.assert_close(cv.ravel(curv.diag()), exact.diagonal(), rtol=1e-9, atol=1e-13)
    trace = cv.ekfac(model_fn, params, batch, fisher="type-2", engine=engine).trace()
    torch.testing.assert_close(trace, exact.trace(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_distances_are_pulled_back_one_vector_at_a_time(engine: str) -> None:
    # torch.func.vmap of the vector-Jacobian product of cdist is wrong in torch 2.13, so jacrev is no reference
    model_fn = between(lambda h: torch.exp(-torch.cdist(h, normal(8, 4, 4))))
    expected = torch.zeros(20, dtype=torch.float64)
    for n in range(len(X)):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
        outputs = model_fn(leaves, X[n : n + 1])[0]
        rows = [torch.autograd.grad(f, list(leaves.values()), retain_graph=True) for f in outputs]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        p = outputs.detach().softmax(0)
        expected += ((p.diag() - p.outer(p)) @ jacobian * jacobian).sum(0) / len(X)
    curv = cv.diagonal(model_fn, PARAMS, (X, TARGETS), fisher="type-2", engine=engine)
    torch.testing.assert_close(cv.ravel(curv.diag()), expected, rtol=1e-9, atol=1e-13)


# --- two axes of the same length -----------------------------------------------------------------------------------

TIME_FIRST: dict[str, ModelFn] = {
    "mean over time": between(lambda h: h.mean(0)),
    "last time": between(lambda h: h[-1]),
    "sum over time": between(lambda h: torch.einsum("tnd->nd", h)),
    "attention over time": between(lambda h: ((h.transpose(0, 1) @ h.permute(1, 2, 0)) @ h.transpose(0, 1)).mean(1)),
}


@pytest.mark.parametrize("model", TIME_FIRST)
@pytest.mark.parametrize("times", [4, 6])
def test_time_in_front_is_refused_whatever_its_length(model: str, times: int) -> None:
    inputs = normal(4, times, 4, 3)  # [T, N, d]
    for estimate in (cv.kfac, cv.ekfac, cv.diagonal):
        with pytest.raises(cv.errors.CaptureError, match="examples in front"):
            estimate(TIME_FIRST[model], PARAMS, (inputs, TARGETS[:4]))


def test_a_shared_tensor_as_long_as_the_batch_does_not_count_examples() -> None:
    def model_fn(p: Params, inputs: dict[str, Tensor]) -> Tensor:
        return (torch.tanh(inputs["x"] @ p["a"]) * inputs["scale"]).mean(1) @ p["b"]

    whole = {"x": normal(5, 4, 5, 3), "scale": normal(6, 4)}
    for number in (3, 4):  # of examples; the scale has 4 entries
        inputs = {"x": whole["x"][:number], "scale": whole["scale"]}
        batch = (inputs, TARGETS[:number])
        curv = cv.diagonal(model_fn, PARAMS, batch, fisher="type-2")
        parts = [
            reference.ggn(lambda p, x: model_fn(p, {"x": x, "scale": whole["scale"]}), PARAMS,
                          (inputs["x"], TARGETS[:number]), reference.cross_entropy, "mean").diagonal()
        ]  # fmt: skip
        torch.testing.assert_close(cv.ravel(curv.diag()), parts[0], rtol=1e-9, atol=1e-13)


# --- batches in a row -------------------------------------------------------------------------------------------------


def siamese(p: Params, x: Tensor) -> Tensor:
    """Two views in one batch, [x; -x], and their difference."""
    first, second = torch.tanh(torch.cat([x, 1 - x]) @ p["a"]).chunk(2)
    return (first - second) @ p["b"]


def stacked(p: Params, x: Tensor) -> Tensor:
    """The same with the rows of an example together."""
    first, second = torch.tanh(torch.stack([x, 1 - x], 1).flatten(0, 1) @ p["a"]).unflatten(0, (-1, 2)).unbind(1)
    return (first - second) @ p["b"]


def test_batches_in_a_row_need_no_order_for_kfac_and_are_refused_where_it_matters() -> None:
    batch = (X, TARGETS)
    one, other = (cv.kfac(f, PARAMS, batch, fisher="type-2") for f in (siamese, stacked))
    torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-11, atol=1e-14)
    cv.ekfac(stacked, PARAMS, batch)
    for estimate in (cv.ekfac, cv.diagonal, cv.tkfac):
        with pytest.raises(cv.errors.CaptureError, match=r"'a'.*torch\.stack"):
            estimate(siamese, PARAMS, batch)
    with pytest.raises(cv.errors.CaptureError, match=r"'a'.*torch\.stack"):
        cv.kfac(siamese, PARAMS, batch, sharing="reduce")
    with pytest.raises(cv.errors.CaptureError, match=r"'a'.*torch\.stack"):
        cv.kfac(siamese, PARAMS, (X, torch.tensor([0, -100, 1, 0, 1, 0])))


# --- uses that carry no gradient -----------------------------------------------------------------------------------


def teacher(p: Params, x: Tensor) -> Tensor:
    frozen = {name: leaf.detach() for name, leaf in p.items()}
    return torch.tanh(x @ p["a"]) @ p["b"] - torch.tanh(x @ frozen["a"]) @ frozen["b"]


def view_made_without_gradients(p: Params, x: Tensor) -> Tensor:
    with torch.no_grad():
        turned = p["a"].t()
    return (torch.tanh(x @ p["a"]) + x @ turned.t()) @ p["b"]


DETACHED: dict[str, ModelFn] = {
    "detach": lambda p, x: (torch.tanh(x @ p["a"]) + x @ p["a"].detach()) @ p["b"],
    "data": lambda p, x: (torch.tanh(x @ p["a"]) + x @ p["a"].data) @ p["b"],
    "detached copy": lambda p, x: (torch.tanh(x @ p["a"]) + x @ p["a"].detach().clone()) @ p["b"],
    "copy detached": lambda p, x: (torch.tanh(x @ p["a"]) + x @ p["a"].clone().detach().T.contiguous().T) @ p["b"],
    "detached slice": lambda p, x: (torch.tanh(x @ p["a"]) + x[:, :2] @ p["a"][:2].detach()) @ p["b"],
    "view made without gradients": view_made_without_gradients,
    "teacher": teacher,
    "compared": lambda p, x: torch.tanh(x @ p["a"]) @ p["b"] * (p["a"] > 0).double().mean(),
    "norm of the detached": lambda p, x: torch.tanh(x @ p["a"]) @ p["b"] / p["a"].detach().norm(),
    "detached activation": lambda p, x: (lambda h: (torch.tanh(h) + h.detach()) @ p["b"])(x @ p["a"]),
}


@pytest.mark.parametrize("use", DETACHED)
@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_a_detached_use_of_a_weight_carries_no_gradient(use: str, engine: str) -> None:
    model_fn, batch = DETACHED[use], (X, TARGETS)
    exact = reference.ggn(model_fn, PARAMS, batch, reference.cross_entropy, "mean")
    curv = cv.diagonal(model_fn, PARAMS, batch, fisher="type-2", engine=engine)
    torch.testing.assert_close(cv.ravel(curv.diag()), exact.diagonal(), rtol=1e-9, atol=1e-13)
    scores = cv.influence.scores(cv.kfac(model_fn, PARAMS, batch).inverse(0.1), model_fn, PARAMS, batch, batch)
    inverse = cv.kfac(model_fn, PARAMS, batch).inverse(0.1).to_dense()
    rows = torch.stack([gradient(model_fn, X[n : n + 1], TARGETS[n : n + 1]) for n in range(len(X))])
    torch.testing.assert_close(scores, rows @ inverse @ rows.T, rtol=1e-9, atol=1e-12)


def gradient(model_fn: ModelFn, x: Tensor, y: Tensor) -> Tensor:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    found = torch.autograd.grad(F.cross_entropy(model_fn(leaves, x), y), list(leaves.values()))
    return cv.ravel(dict(zip(leaves, found, strict=True)))


class NoGradient(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None


@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_a_function_without_gradient_stops_it(engine: str, fisher: str) -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        return (NoGradient.apply(x @ p["a"]) + x @ p["c"]) @ p["b"]

    curv = cv.kfac(model_fn, PARAMS | {"c": normal(7, 3, 4)}, (X, TARGETS), engine=engine, fisher=fisher)
    assert curv.blocks["a"].trace() == 0
    assert curv.blocks["c"].trace() > 0


def test_outputs_without_gradient_in_one_batch_are_an_error() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        outputs = torch.tanh(x @ p["a"]) @ p["b"]
        return outputs.detach() if len(x) == 6 else outputs

    with pytest.raises(cv.errors.CaptureError, match="carry no gradient"):
        cv.kfac(model_fn, PARAMS, (X, TARGETS), engine="autograd")


# --- what the model writes to ---------------------------------------------------------------------------------------


def in_place(p: Params, x: Tensor) -> Tensor:
    x += 1
    x.relu_()
    return torch.tanh(x @ p["a"]) @ p["b"]


@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_inputs_that_the_model_changes_in_place_are_those_of_a_copy(engine: str) -> None:
    inputs = X.clone()
    curv = cv.kfac(in_place, PARAMS, (inputs, TARGETS), fisher="type-2", engine=engine)
    assert torch.equal(inputs, X)
    pure = cv.kfac(between(lambda h: h), PARAMS, ((X + 1).relu(), TARGETS), fisher="type-2", engine=engine)
    torch.testing.assert_close(curv.to_dense(), pure.to_dense(), rtol=1e-12, atol=1e-15)


# --- models that run on real tensors only ---------------------------------------------------------------------------


def of_this_size(number: int, layer: Callable[[Tensor], Tensor]) -> ModelFn:
    """A model for batches of one size."""
    return between(lambda h: layer(h.reshape(number, 4)))


@pytest.mark.parametrize("number", [2, 3, 20])
def test_dependent_examples_are_found_by_values_in_a_batch_of_any_size(number: int) -> None:
    inputs = normal(5, number, 3)
    assert cv.plan(of_this_size(number, torch.sin), PARAMS, inputs).mixed is None
    assert cv.plan(of_this_size(number, lambda h: h - h.mean(0)), PARAMS, inputs).mixed is not None
    last = of_this_size(number, lambda h: torch.cat([h[:-1], h[-1:] + h[:1]]))
    assert cv.plan(last, PARAMS, inputs).mixed is not None


def test_one_example_by_itself_and_random_models_tell_nothing_by_values() -> None:
    assert cv.plan(of_this_size(1, lambda h: h - h.mean(0)), PARAMS, X[:1]).mixed is None
    assert cv.plan(of_this_size(6, lambda h: F.dropout(h, 0.5)), PARAMS, X).mixed is None


def test_a_model_for_one_size_of_batch_is_taken_under_a_transform_where_no_values_can_be_compared() -> None:
    def trace(a: Tensor) -> Tensor:
        return cv.kfac(of_this_size(6, torch.sin), {**PARAMS, "a": a}, (X, TARGETS), fisher="type-2").trace()

    stacked = normal(6, 3, 3, 4)
    one_by_one = torch.stack([trace(a) for a in stacked])
    torch.testing.assert_close(torch.vmap(trace)(stacked), one_by_one, rtol=1e-10, atol=0)
