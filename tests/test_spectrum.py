"""Lanczos processes, spectral densities, leading eigenvalues and traces, against dense eigendecompositions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib import spectrum
from curvlib.linalg.lanczos import Tridiagonal, lanczos
from curvlib.operators import Dense, Diagonal
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import Random, cases, conjugated, generator

D = 24
SPECTRA: dict[str, Callable[[Random], Tensor]] = {
    "random": lambda random: random.normal(D),
    "clustered": lambda random: torch.cat([1 + 1e-6 * random.normal(D // 2), 5 + 1e-9 * random.normal(D // 2)]),
    "repeated": lambda _: torch.tensor([3.0] * 5 + [2.0] * 4 + [0.0] * 9 + [-1.0] * 6).double(),
    "low rank": lambda random: torch.cat([random.positive(3), torch.zeros(D - 3).double()]),
    "decaying": lambda _: 2.0 ** -torch.arange(D).double(),
    "zero": lambda _: torch.zeros(D).double(),
    "identity": lambda _: torch.ones(D).double(),
}
every_spectrum = pytest.mark.parametrize("kind", list(SPECTRA))
moderately = settings(deadline=None, max_examples=10)
WHICH = {"largest": lambda x: -x, "smallest": lambda x: x, "magnitude": lambda x: -x.abs()}


def matrix(kind: str, seed: int = 0) -> Tensor:
    """A symmetric matrix with this spectrum in a random basis."""
    random = Random(generator(seed))
    return conjugated(random.orthogonal(D), SPECTRA[kind](random))


def run(dense: Tensor, steps: int, probes: int = 3) -> Tridiagonal:
    start = Random(generator(1)).normal(probes, len(dense))
    return lanczos(lambda v: v @ dense, start, steps=steps, generator=generator(2))


def tridiagonal(result: Tridiagonal) -> Tensor:
    return result.diagonal.diag_embed() + result.off.diag_embed(1) + result.off.diag_embed(-1)


# --- Lanczos ------------------------------------------------------------------------------------------------------


@every_spectrum
@pytest.mark.parametrize("steps", [1, 7, D])
def test_lanczos_bases_are_orthonormal_and_make_the_operator_tridiagonal(kind: str, steps: int) -> None:
    dense = matrix(kind)
    result = run(dense, steps)
    identity = torch.eye(steps, dtype=torch.float64)
    assert float((result.basis @ result.basis.mT - identity).abs().max()) <= 1e-12
    assert float((result.basis @ dense @ result.basis.mT - tridiagonal(result)).abs().max()) <= 1e-11


@every_spectrum
def test_as_many_steps_as_rows_find_every_eigenvalue_as_often_as_it_occurs(kind: str) -> None:
    dense = matrix(kind)
    values = torch.linalg.eigvalsh(tridiagonal(run(dense, D)))
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense).expand_as(values), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["low rank", "repeated"])
def test_quadratures_do_not_see_what_follows_a_breakdown(kind: str) -> None:
    dense = matrix(kind)
    result = run(dense, D)
    assert bool((result.off == 0).any(-1).all())
    start = Random(generator(1)).normal(3, D)
    for p in range(6):
        power = torch.linalg.matrix_power(tridiagonal(result), p)[:, 0, 0]
        expected = torch.einsum("mi,ij,mj->m", start, torch.linalg.matrix_power(dense, p), start)
        torch.testing.assert_close(power, expected / start.square().sum(-1), rtol=1e-11, atol=1e-12)


# --- densities ----------------------------------------------------------------------------------------------------


@every_spectrum
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_moments_of_one_probe_are_exact_up_to_degree_twice_the_steps_minus_one(kind: str, steps: int) -> None:
    dense = matrix(kind)
    density = spectrum.density(Dense(dense), steps=steps, probes=1, generator=generator(3))
    signs = (2 * torch.randint(2, (1, D), generator=generator(3)) - 1).double()[0]

    def error(p: int) -> float:
        expected = signs @ torch.linalg.matrix_power(dense, p) @ signs / D
        return float((density.moment(p) - expected).abs()) / max(float(expected.abs()), 1e-3)

    assert max(error(p) for p in range(2 * steps)) <= 1e-11
    if kind in ("random", "decaying"):
        assert error(2 * steps) > 1e-9


def test_moments_are_unbiased_over_probes() -> None:
    dense = matrix("random")
    density = spectrum.density(Dense(dense), steps=6, probes=2000, generator=generator(0))
    for p in (1, 2, 3):
        expected = torch.linalg.matrix_power(dense, p).trace() / D
        spread = density.standard_error(lambda x, p=p: x**p)
        assert float((density.moment(p) - expected).abs()) <= 4 * float(spread)
        assert float(spread) <= 0.05 * float(dense.abs().max()) ** p * D


def test_batches_of_probes_change_nothing() -> None:
    dense = matrix("random")
    whole = spectrum.density(Dense(dense), steps=6, probes=5, generator=generator(0))
    parts = spectrum.density(Dense(dense), steps=6, probes=5, generator=generator(0), batch_size=2)
    torch.testing.assert_close(whole.nodes, parts.nodes, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.weights, parts.weights, rtol=0, atol=1e-10)


@every_spectrum
def test_the_density_integrates_to_one(kind: str) -> None:
    density = spectrum.density(Dense(matrix(kind)), steps=8, probes=4)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((density.weights >= 0).all())
    width = 0.2
    grid = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    assert abs(float(torch.trapezoid(density.smoothed(grid, width), grid)) - 1) <= 1e-10
    assert abs(float(density.histogram(density.grid()).sum()) - 1) <= 1e-12


def test_smoothing_adds_the_variance_of_the_kernel() -> None:
    density = spectrum.density(Dense(matrix("random")), steps=8, probes=4)
    grid = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    heights = density.smoothed(grid, 0.3)
    second = torch.trapezoid(grid**2 * heights, grid)
    torch.testing.assert_close(second, density.moment(2) + 0.3**2, rtol=1e-10, atol=0)


def test_quantiles_and_histograms_of_a_diagonal_operator_are_those_of_its_entries() -> None:
    values = torch.arange(1, 11).double()
    # each eigenvector is an axis, on which every probe of signs has the same share
    density = spectrum.density(Diagonal(values), steps=10, probes=3)
    shares = torch.tensor([0.0, 0.1, 0.11, 0.5, 0.95, 1.0], dtype=torch.float64)
    torch.testing.assert_close(density.quantile(shares), torch.tensor([1, 1, 2, 5, 10, 10.0]).double())
    edges = torch.tensor([0.5, 3.5, 9.5, 10.5]).double()
    torch.testing.assert_close(density.histogram(edges), torch.tensor([0.3, 0.6, 0.1]).double())


def test_log_determinants_follow_from_the_density() -> None:
    dense = Random(generator(0)).definite(D)
    density = spectrum.density(Dense(dense), steps=D, probes=500, generator=generator(0))
    error = density.expectation(torch.log) - torch.logdet(dense) / D
    assert float(error.abs()) <= 4 * float(density.standard_error(torch.log))


# --- leading eigenvalues ------------------------------------------------------------------------------------------


@every_spectrum
@pytest.mark.parametrize("which", list(WHICH))
@pytest.mark.parametrize("k", [1, 4, D])
def test_leading_eigenvalues_are_those_of_the_dense_matrix(kind: str, which: str, k: int) -> None:
    dense = matrix(kind)
    pairs = spectrum.top_eigenvalues(Dense(dense), k, which=which, tolerance=1e-10, vectors=True)
    values = torch.linalg.eigvalsh(dense)
    expected = values[WHICH[which](values).argsort()][:k]
    if which == "magnitude":  # l and -l of the same size may come in either order
        pairs_values, expected = pairs.values.abs(), expected.abs()
    else:
        pairs_values = pairs.values
    torch.testing.assert_close(pairs_values, expected, rtol=0, atol=1e-9)
    residuals = (pairs.vectors @ dense - pairs.values[:, None] * pairs.vectors).norm(dim=1)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=0, atol=1e-13)
    assert float(residuals.max()) <= 1e-10 * max(float(values.abs().max()), 1e-3)
    identity = torch.eye(k, dtype=torch.float64)
    assert float((pairs.vectors @ pairs.vectors.mT - identity).abs().max()) <= 1e-12


@pytest.mark.parametrize(("block_size", "basis_size"), [(1, 20), (5, 25), (5, 40), (8, 60)])
def test_restarts_find_the_edge_of_a_bulk(block_size: int, basis_size: int) -> None:
    random, size = Random(generator(0)), 300
    values = torch.linspace(-1, 1, size).double()
    dense = conjugated(random.orthogonal(size), values)
    pairs = spectrum.top_eigenvalues(Dense(dense), 5, tolerance=1e-8, block_size=block_size, basis_size=basis_size)
    torch.testing.assert_close(pairs.values, values.flip(0)[:5], rtol=0, atol=1e-12)
    assert float(pairs.residuals.max()) <= 1.01e-8


@pytest.mark.parametrize("block_size", [1, 2])
def test_copies_of_a_repeated_eigenvalue_are_found_by_smaller_blocks(block_size: int) -> None:
    values = torch.tensor([3.0, 3.0] + [1.0] * 60).double()
    pairs = spectrum.top_eigenvalues(Diagonal(values), 2, block_size=block_size)
    torch.testing.assert_close(pairs.values, values[:2])


@moderately
@given(data=st.data())
def test_any_operator_will_do(data: st.DataObject) -> None:
    case = data.draw(cases(data.draw(st.sampled_from(["block diagonal", "sum", "kronecker"]))))
    k = data.draw(st.integers(1, len(case.dense)))
    pairs = spectrum.top_eigenvalues(case.operator, k, vectors=True, tolerance=1e-10)
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(case.dense).flip(0)[:k], rtol=0, atol=1e-9)
    images = flat(case.operator.matmat(pairs.vectors), stacked=True)
    rows = flat(pairs.vectors, stacked=True)
    torch.testing.assert_close(images, pairs.values[:, None] * rows, rtol=0, atol=1e-8)
    density = spectrum.density(case.operator, steps=2, probes=1)
    signs = (2 * torch.randint(2, (1, len(rows.mT)), generator=generator(0)) - 1).double()[0]
    torch.testing.assert_close(density.moment(1), signs @ case.dense @ signs / len(signs), rtol=1e-11, atol=1e-12)


# --- traces -------------------------------------------------------------------------------------------------------


def test_hutchinsons_trace_is_unbiased_and_its_standard_error_true() -> None:
    dense = matrix("random")
    runs = [spectrum.trace(Dense(dense), 50, generator(seed), method="hutchinson") for seed in range(200)]
    values, errors = (torch.stack(x) for x in zip(*((r.value, r.standard_error) for r in runs), strict=True))
    spread = math.sqrt(2 * float(dense.square().sum() - dense.diagonal().square().sum()) / 50)
    assert abs(float(values.mean() - dense.trace())) <= 4 * spread / math.sqrt(200)
    assert 0.8 * spread <= float(values.std()) <= 1.2 * spread
    assert 0.9 * spread <= float(errors.mean()) <= 1.1 * spread


def test_hutchinsons_trace_of_a_diagonal_operator_has_no_error() -> None:
    estimate = spectrum.trace(Diagonal(torch.arange(10).double()), 3, method="hutchinson", batch_size=2)
    torch.testing.assert_close(estimate.value, torch.tensor(45.0).double())
    assert float(estimate.standard_error) <= 1e-14
