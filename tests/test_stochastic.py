"""Stochastic estimates of trace and diagonal: unbiased within their standard error, exact where they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness_problems import generator, normal, problem, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError
from curvlib.estimators import ggn
from curvlib.linalg.stochastic import (
    deflated_diagonal,
    deflated_trace,
    dominant_range,
    hutchinson_diagonal,
    hutchinson_trace,
)

few = settings(deadline=None, max_examples=12)
traces = pytest.mark.parametrize("estimator", [hutchinson_trace, deflated_trace])
diagonals = pytest.mark.parametrize("estimator", [hutchinson_diagonal, deflated_diagonal])
SIZE = 12
LIKE = torch.zeros((), dtype=torch.float64)


def symmetric(seed: int, rank: int = SIZE) -> Tensor:
    """Indefinite, of this rank, with eigenvalues that fall off."""
    basis = torch.linalg.qr(normal(seed, SIZE, SIZE)).Q[:, :rank]
    signs = torch.where(torch.arange(rank) % 3 == 2, -1.0, 1.0).double()
    return basis * (signs / torch.arange(1, rank + 1)) @ basis.mT


def repeated(estimator: Any, matrix: Tensor, samples: int, times: int) -> tuple[Tensor, Tensor]:
    """Independent estimates and their errors, stacked."""
    source = generator(0)
    pairs = [estimator(lambda z: z @ matrix, SIZE, samples, source, LIKE) for _ in range(times)]
    values, errors = zip(*pairs, strict=True)
    return torch.stack(values), torch.stack(errors)


def assert_unbiased(values: Tensor, errors: Tensor, truth: Tensor) -> None:
    """The mean of independent estimates lies within four of its standard errors, of either kind, which agree."""
    times = len(values)
    spread = values.std(0) / times**0.5
    assert ((values.mean(0) - truth).abs() <= 4 * spread).all()
    claimed = errors.square().mean(0).sqrt() / times**0.5
    assert torch.allclose(claimed, spread, rtol=0.25)


@traces
def test_trace_estimates_are_unbiased_and_know_their_error(estimator: Any) -> None:
    matrix = symmetric(1)
    assert_unbiased(*repeated(estimator, matrix, 9, 400), matrix.trace())


@diagonals
def test_diagonal_estimates_are_unbiased_and_know_their_error(estimator: Any) -> None:
    matrix = symmetric(2)
    assert_unbiased(*repeated(estimator, matrix, 9, 400), matrix.diagonal())


@few
@given(seed=seeds, rank=st.integers(1, 4))
def test_deflated_estimates_are_exact_up_to_a_rank_of_a_third_of_the_samples(seed: int, rank: int) -> None:
    matrix = symmetric(seed, rank)
    for estimator, truth in ((deflated_trace, matrix.trace()), (deflated_diagonal, matrix.diagonal())):
        value, error = estimator(lambda z: z @ matrix, SIZE, 3 * rank, generator(seed), LIKE)
        assert torch.allclose(value, truth, rtol=0, atol=1e-9)
        assert error.abs().max() <= 1e-9 or rank == 1  # one sample has no standard error


@few
@given(seed=seeds)
def test_a_diagonal_matrix_is_exact_for_hutchinson(seed: int) -> None:
    entries = normal(seed, SIZE)
    value, error = hutchinson_trace(lambda z: z * entries, SIZE, 3, generator(seed), LIKE)
    assert torch.allclose(value, entries.sum(), atol=1e-12)
    assert error <= 1e-12
    value, error = hutchinson_diagonal(lambda z: z * entries, SIZE, 3, generator(seed), LIKE)
    assert torch.allclose(value, entries, atol=1e-12)
    assert error.max() <= 1e-12


def test_deflation_beats_the_plain_estimate_where_eigenvalues_fall_off() -> None:
    spectrum = 0.5 ** torch.arange(SIZE, dtype=torch.float64)
    basis = torch.linalg.qr(normal(3, SIZE, SIZE)).Q
    matrix = basis * spectrum @ basis.mT
    errors = [
        (repeated(estimator, matrix, 12, 100)[0] - matrix.trace()).square().mean().sqrt()
        for estimator in (hutchinson_trace, deflated_trace)
    ]
    assert 3 * errors[1] < errors[0], errors


def test_the_dominant_range_has_orthonormal_rows_and_never_more_than_there_are_dimensions() -> None:
    basis = dominant_range(lambda z: z @ symmetric(1), SIZE, 30, generator(0), LIKE)
    assert basis.shape == (SIZE, SIZE)
    assert torch.allclose(basis @ basis.mT, torch.eye(SIZE, dtype=torch.float64), atol=1e-12)


# --- on operators -------------------------------------------------------------------------------------------------


def mlp() -> Any:
    return problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(0, 5, 3), "mse", "mean")


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_the_trace_of_any_operator_is_estimated(method: str) -> None:
    case = mlp()
    exact = ggn(case.model_fn, case.params, case.batch, loss=cv.MSE())
    kfac = cv.kfac(case.model_fn, case.params, case.batch, loss=cv.MSE())
    for curv in (exact, kfac, kfac.blocks["0.weight"], exact.damp(0.1), cv.Sum((kfac, kfac)), 2 * exact):
        estimate = cv.spectrum.trace(curv, 60, generator(0), method=method)
        assert estimate.value.shape == ()
        assert (estimate.value - curv.trace()).abs() <= 4 * estimate.standard_error + 1e-9 * curv.trace()


@pytest.mark.parametrize("method", ["hutchinson", "diag++"])
def test_the_diagonal_of_any_operator_is_estimated(method: str) -> None:
    case = mlp()
    exact = ggn(case.model_fn, case.params, case.batch, loss=cv.MSE())
    for curv in (exact, cv.kfac(case.model_fn, case.params, case.batch, loss=cv.MSE())):
        estimate = cv.spectrum.diagonal(curv, 60, generator(0), method=method)
        error = cv.ravel(estimate.value) - cv.ravel(curv.diag())
        assert (error.abs() <= 5 * cv.ravel(estimate.standard_error) + 1e-9).all()
        assert estimate.value.keys() == case.params.keys()


def test_the_same_generator_gives_the_same_estimate_and_the_global_one_is_not_touched() -> None:
    case = mlp()
    curv = ggn(case.model_fn, case.params, case.batch, loss=cv.MSE())
    before = torch.get_rng_state()
    first, second = (cv.spectrum.trace(curv, 6, generator(3)).value for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, cv.spectrum.trace(curv, 6, generator(4)).value)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_methods_and_too_few_samples_are_refused() -> None:
    curv = cv.Diagonal(torch.ones(3))
    for estimate in (cv.spectrum.trace, cv.spectrum.diagonal):
        with pytest.raises(ArgumentError, match="method must be one of"):
            estimate(curv, 5, generator(0), method="lanczos")
        with pytest.raises(ArgumentError, match="samples must be at least 2"):
            estimate(curv, 1, generator(0))
    for estimate, method in ((cv.spectrum.trace, "hutch++"), (cv.spectrum.diagonal, "diag++")):
        with pytest.raises(ArgumentError, match="samples must be at least 6"):
            estimate(curv, 5, generator(0), method=method)
