"""Schedules: their values at the ends, between them, and in a chain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvlib.optim as optim
from curvlib.errors import ArgumentError

moderately = settings(deadline=None, max_examples=20)
rates = st.floats(1e-6, 10.0)


@moderately
@given(peak=rates, final=rates, warmup=st.integers(0, 50), fall=st.integers(1, 200))
def test_warmup_cosine_is_exact_at_its_ends(peak: float, final: float, warmup: int, fall: int) -> None:
    schedule = optim.warmup_cosine(peak, warmup, warmup + fall, final=final)
    assert schedule(warmup) == peak
    assert schedule(warmup + fall) == schedule(warmup + fall + 1000) == final
    assert schedule(0) == (0 if warmup else peak)


@moderately
@given(
    peak=rates,
    final=rates,
    warmup=st.integers(0, 50),
    stable=st.integers(0, 50),
    decay=st.integers(1, 200),
    shape=st.sampled_from(["linear", "sqrt"]),
)
def test_warmup_stable_decay_is_exact_at_its_ends(
    peak: float, final: float, warmup: int, stable: int, decay: int, shape: str
) -> None:
    schedule = optim.warmup_stable_decay(peak, warmup, stable, decay, final=final, shape=shape)
    assert schedule(0) == (0 if warmup else peak)
    assert schedule(warmup) == schedule(warmup + stable // 2) == schedule(warmup + stable) == peak
    assert schedule(warmup + stable + decay) == schedule(warmup + stable + decay + 1000) == final


def test_the_values_between_follow_the_formulas() -> None:
    cosine = optim.warmup_cosine(2.0, 4, 12, final=0.5)
    linear = optim.warmup_stable_decay(2.0, 4, 3, 8, final=0.5)
    root = optim.warmup_stable_decay(2.0, 4, 3, 8, final=0.5, shape="sqrt")
    for schedule in (cosine, linear, root):
        assert [schedule(step) for step in range(4)] == [0.0, 0.5, 1.0, 1.5]
    for step in range(1, 8):
        assert cosine(4 + step) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * step / 8)) / 2, rel=1e-14)
        assert linear(7 + step) == pytest.approx(2 - 1.5 * step / 8, rel=1e-14)
        assert root(7 + step) == pytest.approx(2 - 1.5 * math.sqrt(step / 8), rel=1e-14)


def test_a_traced_step_gives_the_same_values() -> None:
    for schedule in (
        optim.constant(0.3),
        optim.warmup_cosine(2.0, 4, 12, final=0.5),
        optim.warmup_stable_decay(2.0, 0, 3, 8, shape="sqrt"),
    ):
        steps = torch.arange(20)
        values = torch.func.vmap(schedule)(steps)
        assert values.dtype == torch.float64
        assert values.tolist() == pytest.approx([schedule(int(step)) for step in steps], rel=1e-15)


def test_a_chain_calls_the_schedule_with_the_number_of_the_step() -> None:
    seen: list[object] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 10.0**-step

    transformation = optim.scale_by_learning_rate(schedule)
    state = transformation.init(torch.zeros(1))
    for expected in (-1.0, -0.1, -0.01):
        updates, state = transformation.update(torch.ones(1, dtype=torch.float64), state)
        assert updates.item() == expected
    assert seen == [0, 1, 2]
    assert all(type(step) is int for step in seen)
    assert state.count.device.type == "cpu"
    assert state.count.dtype == torch.int64


def test_schedules_are_values() -> None:
    assert optim.warmup_cosine(1.0, 2, 3) == optim.warmup_cosine(1.0, 2, 3)
    assert len({optim.constant(1.0), optim.constant(1.0), optim.constant(2.0)}) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.warmup_cosine(1.0, 5, 5),
        lambda: optim.warmup_cosine(1.0, -1, 5),
        lambda: optim.warmup_stable_decay(1.0, 5, -1, 5),
        lambda: optim.warmup_stable_decay(1.0, 5, 1, 0),
        lambda: optim.warmup_stable_decay(1.0, 5, 1, 1, shape="square"),
        lambda: optim.scale_by_learning_rate(-0.1),
        lambda: optim.scale_by_learning_rate(math.nan),
    ],
)
def test_impossible_schedules_are_refused(make: object) -> None:
    with pytest.raises(ArgumentError):
        make()
