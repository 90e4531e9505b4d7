"""Stochastic estimates of trace and diagonal: unbiased within their standard error, exact where they say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness_problems import generator, normal, problem, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError, NonFiniteError
from curvlib.estimators import ggn
from curvlib.linalg.stochastic import (
    LeaveOneOut,
    deflated_trace,
    hutchinson_diagonal,
    hutchinson_trace,
    leave_one_out_diagonal,
    leave_one_out_trace,
)

few = settings(deadline=None, max_examples=12)
SIZE = 12
LIKE = torch.zeros((), dtype=torch.float64)
TRACES = (hutchinson_trace, leave_one_out_trace, deflated_trace)
DIAGONALS = (hutchinson_diagonal, leave_one_out_diagonal)


def truth_of(estimator: Any, matrix: Tensor) -> Tensor:
    return matrix.trace() if estimator in TRACES else matrix.diagonal()


def conjugated(values: Tensor, seed: int = 3) -> Tensor:
    """The symmetric matrix with these eigenvalues in a random basis."""
    basis = torch.linalg.qr(normal(seed, len(values), len(values))).Q
    return basis * values @ basis.mT


def symmetric(seed: int, rank: int = SIZE) -> Tensor:
    """Indefinite, of this rank, with eigenvalues that fall off."""
    signs = torch.where(torch.arange(SIZE) % 3 == 2, -1.0, 1.0).double()
    return conjugated((torch.arange(SIZE) < rank) * signs / torch.arange(1, SIZE + 1), seed)


def repeated(estimator: Any, matrix: Tensor, samples: int, times: int) -> tuple[Tensor, Tensor]:
    """Independent estimates and their errors, stacked."""
    source = generator(0)
    pairs = [estimator(lambda z: z @ matrix, len(matrix), samples, source, LIKE) for _ in range(times)]
    values, errors = zip(*pairs, strict=True)
    return torch.stack(values), torch.stack(errors)


# --- expectation and error ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "least"),
    [
        (hutchinson_trace, 0.75),
        (hutchinson_diagonal, 0.75),
        (deflated_trace, 0.75),
        (leave_one_out_trace, 0.6),
        (leave_one_out_diagonal, 0.75),
    ],
)
@pytest.mark.parametrize("samples", [8, 9])
def test_estimates_are_unbiased_and_know_their_error(estimator: Any, least: float, samples: int) -> None:
    matrix = symmetric(1)
    values, errors = repeated(estimator, matrix, samples, 400)
    spread = values.std(0)
    assert ((values.mean(0) - truth_of(estimator, matrix)).abs() <= 4 * spread / 400**0.5).all()
    ratio = errors.square().mean(0).sqrt() / spread
    assert (ratio >= least).all()
    assert (ratio <= 1.25).all()


SPECTRA: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    # eigenvalues by rank, and how many times smaller the errors of trace and diagonal are than Hutchinson's, at least
    "exponential": (lambda i: 0.7**i, 20.0, 10.0),
    "quadratic": (lambda i: i**-2, 20.0, 10.0),
    "harmonic": (lambda i: 1 / i, 1.5, 1.5),
    "indefinite": (lambda i: (-1) ** i * i**-2, 20.0, 10.0),
}


@pytest.mark.parametrize("kind", list(SPECTRA))
def test_leaving_one_out_beats_the_plain_estimate_where_eigenvalues_fall_off(kind: str) -> None:
    fall, *factors = SPECTRA[kind]
    matrix = conjugated(fall(torch.arange(1, 101).double()))
    for (plain, better), factor in zip((TRACES[:2], DIAGONALS), factors, strict=True):
        errors = [
            (repeated(estimator, matrix, 30, 20)[0] - truth_of(estimator, matrix)).square().mean().sqrt()
            for estimator in (plain, better)
        ]
        assert factor * errors[1] < errors[0], errors


# --- exactness ----------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, rank=st.integers(0, SIZE - 3))
def test_leave_one_out_estimates_are_exact_for_ranks_below_the_number_of_vectors(seed: int, rank: int) -> None:
    matrix = symmetric(seed, rank)
    value, error = leave_one_out_trace(lambda z: z @ matrix, SIZE, 2 * rank + 4, generator(seed), LIKE)
    assert (value - matrix.trace()).abs() <= 1e-9
    assert error <= 1e-9


@pytest.mark.parametrize("rank", range(SIZE + 1))
def test_deflation_is_exact_up_to_a_rank_of_a_third_of_the_samples(rank: int) -> None:
    # random signs may be linearly dependent: a fixed seed
    matrix = symmetric(rank, rank)
    value, error = deflated_trace(lambda z: z @ matrix, SIZE, max(6, 3 * rank), generator(1), LIKE)
    assert (value - matrix.trace()).abs() <= 1e-9
    assert error <= 1e-9


def test_the_diagonal_is_exact_for_ranks_below_the_number_of_vectors() -> None:
    # random signs may lie in the null space, or be equal, where there are few of them: fixed seeds
    for rank in range(SIZE - 3):
        matrix = symmetric(rank, rank)
        value, error = leave_one_out_diagonal(lambda z, m=matrix: z @ m, SIZE, 2 * rank + 4, generator(1), LIKE)
        assert (value - matrix.diagonal()).abs().max() <= 1e-9
        assert error.max() <= 1e-9


@few
@given(seed=seeds, extra=st.integers(0, 5))
def test_the_trace_is_exact_with_as_many_vectors_as_rows(seed: int, extra: int) -> None:
    matrix = symmetric(seed)
    value, error = leave_one_out_trace(lambda z: z @ matrix, SIZE, 2 * SIZE + extra, generator(seed), LIKE)
    assert (value - matrix.trace()).abs() <= 1e-8
    assert error <= 1e-8


@few
@given(seed=seeds)
def test_a_multiple_of_the_identity_has_an_exact_trace(seed: int) -> None:
    value, error = leave_one_out_trace(lambda z: 3 * z, SIZE, 8, generator(seed), LIKE)
    assert (value - 3 * SIZE).abs() <= 1e-10
    assert error <= 1e-10


@few
@given(seed=seeds)
def test_a_diagonal_matrix_is_exact_for_hutchinson(seed: int) -> None:
    entries = normal(seed, SIZE)
    for estimator, truth in ((hutchinson_trace, entries.sum()), (hutchinson_diagonal, entries)):
        value, error = estimator(lambda z: z * entries, SIZE, 3, generator(seed), LIKE)
        assert torch.allclose(value, truth, atol=1e-12)
        assert error.max() <= 1e-12


@few
@given(seed=seeds, count=st.integers(2, SIZE), rank=st.integers(1, SIZE))
def test_a_projector_is_the_one_made_from_all_other_vectors(seed: int, count: int, rank: int) -> None:
    matrix, vectors = symmetric(seed, rank), normal(seed + 1, count, SIZE)
    parts = LeaveOneOut.of(lambda z: z @ matrix, vectors)
    for i in range(count):
        kept = torch.eye(count, dtype=torch.float64) - torch.outer(parts.directions[:, i], parts.directions[:, i])
        projector = parts.basis.mT @ kept @ parts.basis
        others = vectors[torch.arange(count) != i] @ matrix
        assert ((others @ projector - others).abs() <= 1e-9).all()
        assert abs(float(projector.trace()) - (count - 1)) <= 1e-9
        assert torch.allclose(parts.basis.mT @ parts.kept[:, i], projector @ vectors[i], rtol=0, atol=1e-9)


# --- on operators -------------------------------------------------------------------------------------------------


def mlp() -> Any:
    return problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(0, 5, 3), "mse", "mean")


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_the_trace_of_any_operator_is_estimated(method: str) -> None:
    case = mlp()
    exact = ggn(case.model_fn, case.params, case.batch, loss=cv.MSE())
    kfac = cv.kfac(case.model_fn, case.params, case.batch, loss=cv.MSE())
    for curv in (exact, kfac, kfac.blocks["0.weight"], exact.damp(0.1), cv.Sum((kfac, kfac)), 2 * exact):
        estimate = cv.spectrum.trace(curv, 16, generator(0), method=method)
        assert estimate.value.shape == ()
        assert (estimate.value - curv.trace()).abs() <= 4 * estimate.standard_error + 1e-9 * curv.trace()


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_the_diagonal_of_any_operator_is_estimated(method: str) -> None:
    case = mlp()
    exact = ggn(case.model_fn, case.params, case.batch, loss=cv.MSE())
    for curv in (exact, cv.kfac(case.model_fn, case.params, case.batch, loss=cv.MSE())):
        estimate = cv.spectrum.diagonal(curv, 16, generator(0), method=method)
        error = cv.ravel(estimate.value) - cv.ravel(curv.diag())
        assert (error.abs() <= 5 * cv.ravel(estimate.standard_error) + 1e-9).all()
        assert estimate.value.keys() == case.params.keys()


def test_batches_of_products_change_nothing() -> None:
    curv = cv.Dense(symmetric(1))
    for estimate in (cv.spectrum.trace, cv.spectrum.diagonal):
        whole, parts = (estimate(curv, 10, generator(0), batch_size=size) for size in (None, 2))
        torch.testing.assert_close(parts.value, whole.value, rtol=0, atol=1e-12)


def test_single_precision_is_enough() -> None:
    matrix = conjugated(10.0 ** -torch.arange(SIZE).double())
    for estimate, truth in ((cv.spectrum.trace, matrix.trace()), (cv.spectrum.diagonal, matrix.diagonal())):
        single = estimate(cv.Dense(matrix.float()), 20, generator(0)).value
        torch.testing.assert_close(single, truth.float(), rtol=0, atol=1e-5)


def test_the_same_generator_gives_the_same_estimate_and_the_global_one_is_not_touched() -> None:
    case = mlp()
    curv = ggn(case.model_fn, case.params, case.batch, loss=cv.MSE())
    before = torch.get_rng_state()
    first, second = (cv.spectrum.trace(curv, 6, generator(3)).value for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, cv.spectrum.trace(curv, 6, generator(4)).value)
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_methods_too_few_samples_and_products_that_are_not_finite_are_refused() -> None:
    curv = cv.Diagonal(torch.ones(3))
    for estimate in (cv.spectrum.trace, cv.spectrum.diagonal):
        with pytest.raises(ArgumentError, match="method must be one of"):
            estimate(curv, 5, generator(0), method="lanczos")
        with pytest.raises(ArgumentError, match="samples must be at least 2"):
            estimate(curv, 1, generator(0), method="hutchinson")
        with pytest.raises(ArgumentError, match="samples must be at least 4"):
            estimate(curv, 3, generator(0))
        for method in ("hutchinson", "xtrace" if estimate is cv.spectrum.trace else "xdiag"):
            with pytest.raises(NonFiniteError, match="inf or nan"):
                estimate(cv.Diagonal(torch.tensor([1.0, torch.nan])), 4, generator(0), method=method)
