"""Adam and AdamW against torch.optim and against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlib.optim as optim
from curvlib.errors import ArgumentError, PytreeError
from tests.optim.optimizers_cases import assert_close, grads_of, rosenbrock

BETAS = (0.8, 0.95)


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((), (3,), (4, 3), (2, 3, 2, 2))]


def stepped(transformation: optim.GradientTransformation, steps: int) -> list[list[Tensor]]:
    """The parameters after each step."""
    params, path = start(), []
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(grads_of(rosenbrock, params), state, params)
        params = optim.apply_updates(params, updates)
        path.append(params)
    return path


def stepped_by_torch(cls: Any, steps: int, scheduled: Any = None, **options: Any) -> list[list[Tensor]]:
    params, path = [torch.nn.Parameter(leaf) for leaf in start()], []
    optimizer = cls(params, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduled) if scheduled else None
    for _ in range(steps):
        for param, grad in zip(params, grads_of(rosenbrock, [p.detach() for p in params]), strict=True):
            param.grad = grad
        optimizer.step()
        if scheduler:
            scheduler.step()
        path.append([param.detach().clone() for param in params])
    return path


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adamw_is_torchs(weight_decay: float, eps: float) -> None:
    options = {"betas": BETAS, "eps": eps, "weight_decay": weight_decay}
    expected = stepped_by_torch(torch.optim.AdamW, 20, lr=0.05, **options)
    for found, theirs in zip(stepped(optim.adamw(0.05, **options), 20), expected, strict=True):
        assert_close(found, theirs, 1e-13)


def test_the_defaults_are_torchs() -> None:
    expected = stepped_by_torch(torch.optim.AdamW, 20, lr=0.05)
    assert_close(stepped(optim.adamw(0.05), 20)[-1], expected[-1], 1e-13)


def test_a_schedule_is_that_of_torchs_schedulers() -> None:
    schedule = optim.warmup_cosine(1.0, 5, 20, final=0.1)
    expected = stepped_by_torch(torch.optim.AdamW, 25, schedule, lr=0.05)
    found = stepped(optim.adamw(lambda step: 0.05 * schedule(step)), 25)
    assert_close(found[-1], expected[-1], 1e-13)


def test_a_mask_says_which_leaves_decay() -> None:
    decayed = stepped(optim.adamw(0.05, weight_decay=0.3), 1)[0]
    free = stepped(optim.adamw(0.05, weight_decay=0.0), 1)[0]
    by_rule = stepped(optim.adamw(0.05, weight_decay=0.3, mask=lambda name, leaf: leaf.ndim >= 2), 1)[0]
    by_tree = stepped(optim.adamw(0.05, weight_decay=0.3, mask=[False, False, True, True]), 1)[0]
    assert not torch.equal(decayed[1], free[1])
    for found in (by_rule, by_tree):
        assert_close(found, free[:2] + decayed[2:], 0.0)
    by_name = stepped(optim.adamw(0.05, weight_decay=0.3, mask=lambda name, leaf: name == "0"), 1)[0]
    assert_close(by_name, decayed[:1] + free[1:], 0.0)


def test_without_bias_correction_the_averages_are_taken_as_they_are() -> None:
    transformation = optim.scale_by_adam(betas=BETAS, eps=1e-3, bias_correction=False)
    grads = [torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)]
    state = transformation.init(torch.zeros(2, dtype=torch.float64))
    first = second = torch.zeros(2, dtype=torch.float64)
    for grad in grads:
        updates, state = transformation.update(grad, state)
        first = 0.8 * first + (1 - 0.8) * grad
        second = 0.95 * second + (1 - 0.95) * grad**2
        assert_close(updates, first / (second.sqrt() + 1e-3), 1e-14)


def test_half_precision_has_moments_in_float32() -> None:
    params = torch.ones(4, dtype=torch.bfloat16)
    transformation = optim.scale_by_adam()
    updates, state = transformation.update(params, transformation.init(params))
    (first,), (second,) = state.first.entries, state.second.entries
    assert first.dtype == second.dtype == updates.dtype == torch.float32


def test_the_state_lives_where_the_parameters_do_and_the_count_on_the_cpu() -> None:
    state = optim.scale_by_adam().init(torch.zeros(2, device="meta"))
    (first,), (second,) = state.first.entries, state.second.entries
    assert first.device.type == second.device.type == "meta"
    assert state.count.device.type == "cpu"


@pytest.mark.parametrize(
    "options",
    [{"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8}, {"eps": math.nan}, {"weight_decay": -1.0}],
)
def test_impossible_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        optim.adamw(0.1, **options)


def test_weight_decay_says_that_it_needs_params() -> None:
    transformation = optim.adamw(0.1)
    with pytest.raises(ArgumentError, match="params"):
        transformation.update(start(), transformation.init(start()))


def test_a_mask_of_another_structure_is_refused() -> None:
    with pytest.raises(PytreeError, match="mask"):
        optim.adamw(0.1, mask=[True, False]).init(start())
