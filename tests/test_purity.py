"""No public function changes anything it was given, nor any global state."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exactness_problems import normal
from torch import Tensor, nn

import curvlib as cv
from curvlib.pytree import flatten


class World:
    """A module in training mode, with gradients, mixed flags and buffers, its pure function, and data."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.module = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Flatten(),
            nn.Linear(48, 4),
        ).double()  # fmt: skip
        self.module.register_buffer("unused", normal(9, 3))
        self.module[1].bias.requires_grad_(False)
        self.inputs, self.targets = normal(0, 6, 2, 4, 4), torch.tensor([0, 1, 2, 3, 0, 1])
        nn.functional.cross_entropy(self.module(self.inputs), self.targets).backward()
        self.model_fn, self.params = cv.functional(self.module)
        self.batch = (self.inputs, self.targets)
        self.curv = cv.kfac(self.model_fn, self.params, self.batch)
        self.other = cv.kfac(self.model_fn, self.params, self.batch, fisher="empirical")
        self.vectors = cv.pytree.tree_map(lambda leaf: torch.stack([leaf, -leaf]), self.params)

    def state(self) -> list[Any]:
        """Everything that must not change, by value."""
        parameters = list(self.module.parameters())
        tensors = [
            *parameters, *self.module.buffers(), *self.params.values(), *self.vectors.values(), self.inputs,
            self.targets, *flatten(self.curv)[0], *flatten(self.other)[0], torch.get_rng_state(),
            *(p.grad for p in parameters if p.grad is not None),
        ]  # fmt: skip
        flags = [(p.requires_grad, p.grad is None, p.grad_fn is None, p.is_leaf) for p in parameters]
        flags += [(p.requires_grad, id(p) != 0, p.is_leaf, True) for p in self.params.values()]
        hooks = [len(p._backward_hooks or ()) for p in parameters]
        modules = [(part.training, len(part._forward_hooks)) for part in self.module.modules()]
        numpy_state = np.random.get_state()
        settings = [torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_anomaly_enabled()]
        return [
            [x.detach().clone() for x in tensors], flags, hooks, modules, random.getstate(), numpy_state[1].tolist(),
            settings,
        ]  # fmt: skip


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def kfac_with(**options: Any) -> Callable[[World], Any]:
    return lambda w: cv.kfac(w.model_fn, w.params, w.batch, **options)


def sketched(w: World) -> Any:
    projection = w.curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(w.params, rank=2))
    return projection(w.params)


generator = torch.Generator().manual_seed
CALLS: dict[str, Callable[[World], Any]] = {
    "functional": lambda w: cv.functional(w.module),
    "model_fn": lambda w: w.model_fn(w.params, w.inputs),
    "plan": lambda w: str(cv.plan(w.model_fn, w.params, w.inputs)),
    "kfac mc": kfac_with(),
    "kfac mc with the functional engine": kfac_with(engine="functional"),
    "kfac type-2": kfac_with(fisher="type-2"),
    "kfac empirical, reduce": kfac_with(fisher="empirical", sharing="reduce"),
    "kfac forward-only": kfac_with(fisher="forward-only"),
    "kfac over a loader": lambda w: cv.kfac(w.model_fn, w.params, cv.over([w.batch, w.batch])),
    "kfac of parameters that require gradients": lambda w: cv.kfac(
        w.model_fn, {name: p for name, p in w.module.named_parameters() if p.requires_grad}, w.batch
    ),
    "ggn": lambda w: cv.ggn(w.model_fn, w.params, w.batch) @ w.params,
    "ggn in reverse mode": lambda w: cv.ggn(w.model_fn, w.params, w.batch, mode="reverse") @ w.params,
    "hessian over a loader": lambda w: cv.hessian(w.model_fn, w.params, cv.over([w.batch, w.batch])) @ w.params,
    "fisher": lambda w: cv.fisher(w.model_fn, w.params, w.batch).matmat(w.vectors),
    "gramian": lambda w: cv.gramian(w.model_fn, w.params, w.batch).damp(0.1) @ w.params,
    "ggn of parameters that require gradients": lambda w: cv.ggn(
        w.model_fn, {name: p for name, p in w.module.named_parameters() if p.requires_grad}, w.batch
    ).inverse(0.1) @ w.params,
    "loss value": lambda w: cv.CrossEntropy().value(w.model_fn(w.params, w.inputs), w.targets),
    "loss sample": lambda w: cv.CrossEntropy().sample(w.model_fn(w.params, w.inputs), w.targets, generator(0), 2),
    "matvec": lambda w: w.curv.matvec(w.params),
    "matmul": lambda w: w.curv @ w.params,
    "matmat": lambda w: w.curv.matmat(w.vectors),
    "inverse": lambda w: w.curv.inverse(0.1) @ w.params,
    "inverse, factored": lambda w: w.curv.inverse(cv.FactoredTikhonov(0.1, relative=True)) @ w.params,
    "inverse, relative": lambda w: w.curv.inverse(cv.RelativeTikhonov(0.1)) @ w.params,
    "power": lambda w: w.curv.power(-0.5, 0.1) @ w.params,
    "damp": lambda w: w.curv.damp(0.1).to_dense(),
    "map_eigenvalues": lambda w: w.curv.map_eigenvalues(lambda x: x.clamp(min=1.0)).trace(),
    "scalars": lambda w: (w.curv.trace(), w.curv.damp(1.0).logdet(), w.curv.frobenius_norm(), w.curv.eigenvalues()),
    "quadratic": lambda w: w.curv.quadratic(w.params),
    "diag": lambda w: w.curv.inverse(0.1).diag(),
    "sample": lambda w: w.curv.inverse(0.1).sample(generator(0), n=3),
    "to": lambda w: w.curv.to(dtype=torch.float32).to_dense(),
    "sum": lambda w: (w.curv + w.other).to_dense(),
    "multiple": lambda w: (2.0 * w.curv).trace(),
    "ema": lambda w: cv.ema(w.curv, w.other, 0.9).trace(),
    "merge_factors": lambda w: cv.merge_factors(w.curv, w.other).trace(),
    "project": sketched,
    "ravel": lambda w: cv.unravel(cv.ravel(w.params), w.params),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_nothing_changes(call: str) -> None:
    world = World()
    before = world.state()
    result = CALLS[call](world)
    after = world.state()
    assert result is not None
    for one, other in zip(before, after, strict=True):
        assert equal(one, other)


def test_a_change_would_be_noticed() -> None:
    world = World()
    before = world.state()
    with torch.no_grad():
        world.module[0].weight.add_(1e-15)
    assert not equal(before, world.state())
    before = world.state()
    torch.rand(1)
    assert not equal(before, world.state())


def test_batch_norm_buffers_stay_as_they_are_even_in_training_mode() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    model_fn, params = cv.functional(module)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    model_fn(params, torch.randn(4, 3))
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())


def test_curvature_is_not_attached_to_the_graph_of_its_inputs() -> None:
    params = {"w": torch.randn(3, 2, requires_grad=True)}
    x = torch.randn(4, 3, requires_grad=True)
    for engine in ("functional", "autograd"):
        curv = cv.kfac(lambda p, x: x @ p["w"], params, (x, torch.zeros(4, dtype=torch.long)), engine=engine)
        assert not any(leaf.requires_grad for leaf in flatten(curv)[0])
