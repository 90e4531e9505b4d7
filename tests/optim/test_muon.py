"""Muon against torch.optim.Muon and against the singular value decomposition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib.optim as optim
from curvlib.errors import ArgumentError, ShapeError
from curvlib.linalg.polar import polar
from tests.optim.optimizers_cases import assert_close, grads_of, quadratic

SHAPES = ((4, 3), (3, 5), (4, 3), (2, 2))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start() -> list[Tensor]:
    return [random(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]


def stepped(transformation: optim.GradientTransformation, steps: int) -> list[Tensor]:
    params = start()
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(grads_of(quadratic, params), state, params)
        params = optim.apply_updates(params, updates)
    return params


def stepped_by_torch(steps: int, **options: Any) -> list[Tensor]:
    params = [torch.nn.Parameter(leaf) for leaf in start()]
    optimizer = torch.optim.Muon(params, **options)
    for _ in range(steps):
        for param, grad in zip(params, grads_of(quadratic, [p.detach() for p in params]), strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scaling", "theirs"), [("spectral", "original"), ("rms", "match_rms_adamw")])
def test_it_is_torchs_but_for_the_orthogonalization(
    nesterov: bool, scaling: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.optim import _muon

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda m, coefficients, steps, eps: polar(m))
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.2}
    expected = stepped_by_torch(10, lr=0.05, adjust_lr_fn=theirs, **options)
    assert_close(stepped(optim.muon(0.05, scaling=scaling, **options), 10), expected, 1e-11)


def test_the_published_orthogonalization_is_torchs_to_its_precision() -> None:
    expected = stepped_by_torch(1, lr=0.05)
    found = stepped(optim.muon(0.05, method="quintic"), 1)
    for ours, theirs, before in zip(found, expected, start(), strict=True):
        difference = (ours - theirs).norm() / (theirs - before).norm()
        assert float(difference) < 0.35  # bfloat16, and another norm to start from


def test_updates_are_polar_factors() -> None:
    transformation = optim.scale_by_muon(momentum=0.0, iterations=12)
    grads = start()
    updates, _ = transformation.update(grads, transformation.init(grads))
    for update, grad in zip(updates, grads, strict=True):
        U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
        assert_close(update, math.sqrt(max(1, len(grad) / grad.shape[1])) * U @ Vh, 1e-11)


@settings(deadline=None, max_examples=20)
@given(shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5))
def test_matrices_of_one_shape_do_not_see_each_other(shapes: list[tuple[int, int]]) -> None:
    transformation = optim.scale_by_muon(scaling="rms")
    grads = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    together, _ = transformation.update(grads, transformation.init(grads))
    for grad, update in zip(grads, together, strict=True):
        assert_close(update, transformation.update(grad, transformation.init(grad))[0], 1e-11)


def test_matrices_of_one_shape_are_orthogonalized_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def counted(matrix: Tensor, **options: Any) -> Tensor:
        calls.append(matrix.shape)
        return polar(matrix, **options)

    transformation = optim.scale_by_muon()
    state = transformation.init(start())
    monkeypatch.setitem(optim.scale_by_muon.__globals__, "polar", counted)
    transformation.update(start(), state)
    assert calls == [(2, 4, 3), (1, 3, 5), (1, 2, 2)]


def test_a_leaf_of_order_four_is_a_matrix() -> None:
    transformation = optim.scale_by_muon()
    grad = random(4, 3, 2, 2)
    update, _ = transformation.update(grad, transformation.init(grad))
    flat, _ = transformation.update(grad.reshape(4, 12), transformation.init(grad.reshape(4, 12)))
    assert_close(update, flat.reshape(4, 3, 2, 2), 1e-13)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors_are_refused_with_the_way_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"'layer.bias'.*partition"):
        optim.muon(0.1).init({"layer": {"weight": torch.ones(2, 2), "bias": torch.ones(shape)}})


def test_empty_matrices_stay_empty() -> None:
    transformation = optim.scale_by_muon()
    for grad in (torch.zeros(0, 3), torch.zeros(3, 0)):
        assert transformation.update(grad, transformation.init(grad))[0].shape == grad.shape


@pytest.mark.parametrize(
    "options",
    [{"momentum": 1.0}, {"iterations": 0}, {"method": "svd"}, {"scaling": "none"}, {"weight_decay": -0.1}],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        optim.muon(0.1, **options)
