"""Samples of losses: moments, rates and randomness."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from curvlib.losses import CrossEntropy
from tests.loss_problems import (
    SINGLE_POSITION,
    every_kind,
    generator,
    make,
    one_thread,  # noqa: F401
    outer,
)


@every_kind
def test_samples_have_the_hessian_as_second_moment_at_the_monte_carlo_rate(kind: str) -> None:
    problem = make(kind, examples=2, positions=() if kind in SINGLE_POSITION else (2,), classes=3)
    f, y, exact = problem.outputs, problem.targets, problem.hessians()

    def error(samples: int, seed: int) -> Tensor:
        return (outer(problem.loss.sample(f, y, generator(seed), samples)) - exact).norm() / exact.norm()

    counts = [50, 500, 5000]
    errors = [torch.stack([error(m, 1000 * m + seed) for seed in range(40)]).mean() for m in counts]
    slope = (errors[2] / errors[0]).log() / math.log(counts[2] / counts[0])
    assert -0.58 < slope < -0.42
    assert errors[2] < 0.1


@every_kind
def test_samples_have_mean_zero(kind: str) -> None:
    problem = make(kind, examples=2, positions=(2,), classes=3)
    draws = problem.loss.sample(problem.outputs, problem.targets, generator(), 20_000) * math.sqrt(20_000)
    deviation = draws.std(0).clamp(min=1e-12) / math.sqrt(20_000)
    assert ((draws.mean(0) / deviation).abs() < 5).all()


@every_kind
def test_samples_come_from_the_given_generator_alone(kind: str) -> None:
    problem = make(kind)
    f, y = problem.outputs, problem.targets
    before = torch.get_rng_state(), random.getstate()
    own = generator(3)
    first, second = (problem.loss.sample(f, y, own, 4) for _ in range(2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert torch.equal(first, problem.loss.sample(f, y, generator(3), 4))
    assert not torch.equal(first, second)
    assert first.shape == (4, *f.shape)


def test_classes_are_drawn_with_their_probabilities() -> None:
    p = torch.tensor([[0.0, 0.5, 0.125, 0.0, 0.375, 0.0]], dtype=torch.float64)
    samples = 100_000
    draws = CrossEntropy().sample(p.log(), torch.tensor([1]), generator(), samples) * math.sqrt(samples)
    drawn = (draws - p) < -0.5  # p - onehot(y)
    counts = drawn.sum((0, 1)).double()
    assert (counts[p[0] == 0] == 0).all()
    assert ((counts - samples * p[0]).abs() <= 5 * (samples * p[0] * (1 - p[0])).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", ["smallest", "largest"])
def test_impossible_classes_are_never_drawn(dtype: torch.dtype, extreme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = 0.0 if extreme == "smallest" else 1 - torch.finfo(dtype).eps / 2
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, uniform, dtype=dtype))
    f = torch.randn(200, 9, generator=generator(), dtype=dtype)
    f[:, [0, 1, -1]] = -math.inf
    draws = CrossEntropy().sample(f, torch.ones(200).long(), generator(), 1)[0]
    assert (draws.min(-1).indices == (2 if extreme == "smallest" else 7)).all()


def test_positions_are_drawn_independently() -> None:
    f, y = torch.zeros(2, 2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.long)
    draws = CrossEntropy().sample(f, y, generator(), 20_000)[..., 0].flatten(1) * 2 * math.sqrt(20_000)  # +-1
    correlation = draws.T @ draws / 20_000
    assert ((correlation - torch.eye(4)).abs() < 5 / math.sqrt(20_000)).all()
