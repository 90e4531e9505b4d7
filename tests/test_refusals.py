"""What capture refuses, with the remedy for that use; the table in the documentation lists these cases.

Every remedy is one that works: the exact operators that need no plan take the same models, as the messages say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvlib as cv

DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
Params = dict[str, Tensor]
Case = tuple[Callable[[Params, Any], Any], Params, Any, str]

X, TOKENS, IMAGES = normal(0, 5, 3), torch.tensor([[0, 1], [2, 2], [3, 0], [1, 1], [2, 0]]), normal(1, 5, 2, 4)
W, V, B = normal(2, 3, 2), normal(3, 3, 2), normal(4, 2)
EXACT = "cv.ggn, cv.fisher, cv.hessian and cv.jacobian need no layers: they take what autograd differentiates twice"


def module(net: nn.Module, pick: Callable[[Any], Any] = lambda outputs: outputs) -> tuple[Any, Params]:
    model_fn, params = cv.functional(net.double())
    return (lambda p, x: pick(model_fn(p, x))), params


class Doubled(torch.autograd.Function):
    """A linear layer whose derivatives are written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


def without_gradients(p: Params, x: Tensor) -> Tensor:
    with torch.no_grad():
        early = x @ p["w"]
    return early + x @ p["w"]


def hooked(p: Params, x: Tensor) -> Tensor:
    p["w"].register_hook(lambda g: 2 * g)
    return x @ p["w"]


# --- uses that the exact operators take as they are ---------------------------------------------------------------

ONCE = ("hook on a weight", "reentrant checkpointing", "sparse gradients by count")  # not differentiable twice
UNKNOWN: dict[str, Case] = {
    "recurrent module": (*module(nn.LSTM(4, 2, batch_first=True), lambda o: o[0]), IMAGES, "a loop over linear calls"),
    "bag of embeddings": (*module(nn.EmbeddingBag(4, 2)), TOKENS, "use embedding, and sum or average its output"),
    "bilinear form": (
        lambda p, x: F.bilinear(x, x, p["w"]), {"w": normal(8, 2, 3, 3)}, X, "the product of both inputs",
    ),
    "division by a parameter": (
        lambda p, x: x @ p["w"] / p["b"], {"w": W, "b": B}, X, "multiply by a parameter that is the reciprocal",
    ),
    "function of a weight": (
        lambda p, x: x @ p["w"].exp(), {"w": W}, X, "make the result itself the parameter: compute it outside",
    ),
    "masked weight": (
        lambda p, x: x @ p["w"].masked_fill(W > 0, 0.0), {"w": W}, X, "torch.nn.utils.prune.remove",
    ),
    "normalized weight": (
        *module(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))), X, "remove_parametrizations",
    ),
    "joined weights": (
        lambda p, x: x @ torch.cat([p["w"], p["v"]], 1), {"w": W, "v": V}, X, "make the joined tensor the parameter",
    ),
    "sum of weights": (lambda p, x: x @ (p["w"] + p["v"]), {"w": W, "v": V}, X, "combine them outside of model_fn"),
    "product of weights": (
        lambda p, x: x @ (p["w"] @ p["v"]), {"w": W, "v": normal(5, 2, 2)}, X, "form it outside of model_fn",
    ),
    "a part an example": (lambda p, x: x * p["w"], {"w": normal(6, 5, 3)}, X, "index a table by the inputs"),
    "scaled addmm": (
        lambda p, x: torch.addmm(p["b"], x, p["w"], alpha=2), {"w": W, "b": B}, X, "scale the data before the call",
    ),
    "scaled sum": (lambda p, x: torch.add(x @ W, p["b"], alpha=2), {"b": B}, X, "scale the data before the call"),
    "einsum of three": (
        lambda p, x: torch.einsum("ni,ij,jk->nk", x, p["w"], W[:2]), {"w": W}, X, "use two",
    ),
    "sparse gradients by count": (
        *module(nn.Sequential(nn.Embedding(4, 2, scale_grad_by_freq=True), nn.Flatten())), TOKENS, "leave them out",
    ),
    "weight and scale": (lambda p, x: (x * p["w"][:, 0]) @ p["w"], {"w": W}, X, "split it in two"),
    "part of a weight": (lambda p, x: x[:, :2] @ p["w"][:2], {"w": W}, X, "slice it outside of model_fn"),
    "overlapping parts": (
        lambda p, x: x[:, :2] @ p["w"][:2] + x[:, :2] @ p["w"][1:], {"w": W}, X, "use disjoint slices",
    ),
    "two shapes of a weight": (
        lambda p, x: x @ p["w"] + (x[:, :2] @ p["w"].reshape(2, 3))[:, :2], {"w": W}, X, "use it in one shape",
    ),
    "without gradients": (without_gradients, {"w": W}, X, "detach a parameter that is to carry no gradient there"),
    "derivatives by hand": (lambda p, x: Doubled.apply(x, p["w"]), {"w": W}, X, "custom autograd function"),
    "hook on a weight": (hooked, {"w": W}, X, "change gradients outside of model_fn"),
    "batch norm in training": (*module(nn.BatchNorm1d(3)), X, "call module.eval() first"),
    "reentrant checkpointing": (
        lambda p, x: checkpoint(lambda h: h @ p["w"], x + 0, use_reentrant=True), {"w": W}, X, "use_reentrant=False",
    ),
}  # fmt: skip

# --- models that are at odds with what a curvature is ---------------------------------------------------------------


def changes_weight(p: Params, x: Tensor) -> Tensor:
    p["w"].data.clamp_(-1, 1)
    return x @ p["w"]


REFUSED: dict[str, Case] = {
    "weight changed in place": (changes_weight, {"w": W}, X, "change it outside of model_fn"),
    "table renormalized in place": (
        *module(nn.Sequential(nn.Embedding(4, 2, max_norm=0.1), nn.Flatten())), TOKENS, "max_norm=None",
    ),
    "loop over examples": (
        lambda p, x: torch.stack([row @ p["w"] for row in x]), {"w": W}, X, "write it for all examples at once",
    ),
    "loop over examples by number": (
        lambda p, x: torch.stack([x[i] @ p["w"] for i in range(len(x))]), {"w": W}, X,
        "write loops for all examples at once",
    ),
    "loop over time in front": (
        lambda p, x: sum(step @ p["w"] for step in x), {"w": W}, normal(7, 4, 5, 3), "with the examples in front",
    ),
    "time in front": (lambda p, x: (x @ p["w"]).mean(0), {"w": W}, normal(7, 4, 5, 3), "with the examples in front"),
    "detached outputs": (lambda p, x: (x @ p["w"]).detach(), {"w": W}, X, "somewhere between them model_fn detaches"),
    "unused parameter": (lambda p, x: x @ p["w"], {"w": W, "v": V}, X, "leave out of params what it does not use"),
    "several outputs": (lambda p, x: (x @ p["w"], x), {"w": W}, X, "must return one tensor"),
}  # fmt: skip


@pytest.mark.parametrize("use", [*UNKNOWN, *REFUSED])
def test_a_refusal_names_the_remedy_for_that_use_and_changes_nothing(use: str) -> None:
    model_fn, params, inputs, remedy = (UNKNOWN | REFUSED)[use]
    before = cv.pytree.tree_map(Tensor.clone, params)
    with pytest.raises(cv.errors.CaptureError) as refusal:
        cv.plan(model_fn, params, inputs)
    assert remedy in str(refusal.value)
    for name in params:
        assert torch.equal(params[name], before[name])


@pytest.mark.parametrize("use", [use for use in UNKNOWN if use not in ONCE])
def test_exact_operators_take_what_layers_do_not(use: str) -> None:
    model_fn, params, inputs, _ = UNKNOWN[use]
    outputs = model_fn(params, inputs)
    curv = cv.ggn(model_fn, params, (inputs, torch.zeros_like(outputs)), loss=cv.MSE())
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    expected = torch.autograd.grad(model_fn(leaves, inputs).square().sum(), list(leaves.values()))
    image = cv.jacobian(model_fn, params, inputs).T @ (2 * outputs)
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(image[name], gradient, rtol=1e-10, atol=1e-12)
    assert (curv @ params).keys() == params.keys()


def test_the_message_names_operators_that_do_work() -> None:
    for use, (model_fn, params, inputs, _) in UNKNOWN.items():
        with pytest.raises(cv.errors.CaptureError, match=EXACT) as refusal:
            cv.plan(model_fn, params, inputs)
        assert "parameter" in str(refusal.value), use


def test_the_documented_table_lists_every_refusal_with_its_remedy() -> None:
    _, _, section = DOCUMENT.read_text().partition("## What is refused\n")
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", section.partition("\n## ")[0], re.M)[2:]
    assert dict(rows) == {use: remedy for use, (*_, remedy) in (UNKNOWN | REFUSED).items()}
