"""The orthogonal polar factor against the SVD, and the polynomials it is made with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.errors import ArgumentError
from curvlib.linalg.polar import LOWER, MUON, polar
from curvlib.linalg.quintics import LIMIT, best_quintic, margin, quintics
from tests.operators.operator_cases import assert_close, generator

few = settings(deadline=None, max_examples=12)
both = pytest.mark.parametrize("method", ["cans", "quintic"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def of_svd(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def value(coefficients: tuple[float, float, float], x: Tensor) -> Tensor:
    a, b, c = coefficients
    return x * (a + b * x**2 + c * x**4)


@few
@given(
    front=st.lists(st.integers(1, 3), max_size=2), m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 999)
)
def test_it_is_that_of_the_svd_for_wide_tall_and_stacked_matrices(front: list[int], m: int, n: int, seed: int) -> None:
    u, s, vt = torch.linalg.svd(normal(*front, m, n, seed=seed), full_matrices=False)
    matrix = u * (0.01 + s).unsqueeze(-2) @ vt
    assert_close(polar(matrix, iterations=9), u @ vt, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "iterations", "tolerance"),
    [
        (torch.float64, 5, 0.11),
        (torch.float64, 6, 1e-3),
        (torch.float64, 7, 1e-8),
        (torch.float64, 8, 1e-14),
        (torch.float32, 8, 4e-6),
        (torch.bfloat16, 8, 0.05),
    ],
)
def test_its_accuracy(dtype: torch.dtype, iterations: int, tolerance: float) -> None:
    for shape in ((40, 160), (200, 50)):
        matrix = normal(*shape).to(dtype)
        assert_close(polar(matrix, iterations=iterations), of_svd(matrix.double()).to(dtype), tolerance)


def test_it_is_nearer_than_muons_polynomial_from_five_iterations_on() -> None:
    matrix = normal(60, 100)
    for iterations in (5, 6, 8):
        cans, quintic = (
            (polar(matrix, iterations=iterations, method=method) - of_svd(matrix)).norm()
            for method in ("cans", "quintic")
        )
        assert cans < 0.7 * quintic


def test_the_fixed_polynomial_is_muons() -> None:
    matrix = normal(6, 10)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (matrix @ matrix.mT).norm().sqrt()
    for _ in range(5):
        s = value(MUON, s)
    assert_close(polar(matrix, method="quintic"), u * s @ vt, 1e-12)
    assert 0.68 < s.min() < s.max() < 1.21


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_singular_values_stay_near_one_in_every_precision(dtype: torch.dtype, scale: float) -> None:
    for seed in range(3):
        matrix = (scale * normal(3, 64, 128, seed=seed)).to(dtype)
        found = polar(matrix, iterations=7)
        assert found.dtype == dtype
        values = torch.linalg.svdvals(found.double())
        assert 0.97 < values.min() <= values.max() < 1.03


def test_the_size_of_a_matrix_does_not_matter_unless_it_is_zero() -> None:
    matrix = normal(4, 6).float()
    for scale in (2.0**-120, 2.0**120):  # which round nothing: small singular values would move
        assert_close(polar(scale * matrix), polar(matrix), 1e-5)
    stack = torch.stack([matrix, torch.zeros_like(matrix)]).double()
    for method in ("cans", "quintic"):
        found = polar(stack, method=method)
        assert_close(found[0], polar(stack[0], method=method), 1e-13)
        assert not found[1].any()


def test_directions_that_a_matrix_lacks_stay_zero() -> None:
    matrix, eps = torch.outer(normal(5), normal(3)), 2.0**-52
    growth = math.prod(slope for slope, _, _ in quintics(LOWER, margin(eps), 8))  # of what rounding puts there
    assert_close(polar(matrix, iterations=8), matrix / matrix.norm(), 4 * eps * growth)


@both
def test_it_rotates_with_the_matrix(method: str) -> None:
    matrix, u, v = normal(5, 8), torch.linalg.qr(normal(5, 5, seed=1)).Q, torch.linalg.qr(normal(8, 8, seed=2)).Q
    assert_close(polar(u @ matrix @ v, method=method), u @ polar(matrix, method=method) @ v, 1e-12)
    assert_close(polar(matrix.mT, method=method), polar(matrix, method=method).mT, 1e-14)


@both
def test_no_value_is_looked_at_and_the_matrix_stays(method: str) -> None:
    matrix = normal(5, 8)
    before = matrix.clone()
    expected = polar(matrix, method=method)
    assert torch.equal(matrix, before)
    traced = make_fx(lambda m: polar(m, method=method), tracing_mode="fake")(torch.zeros_like(matrix))
    assert_close(traced(matrix), expected, 1e-13)
    torch._dynamo.reset()
    compiled = torch.compile(lambda m: polar(m, method=method), fullgraph=True, backend="eager")
    assert_close(compiled(matrix), expected, 1e-13)
    assert_close(torch.func.vmap(lambda m: polar(m, method=method))(matrix[None])[0], expected, 1e-13)


def test_unknown_methods_and_no_iteration_are_refused() -> None:
    with pytest.raises(ArgumentError, match="'svd'"):
        polar(normal(2, 2), method="svd")
    with pytest.raises(ArgumentError, match="iterations=0"):
        polar(normal(2, 2), iterations=0)


# --- the polynomials ----------------------------------------------------------------------------------------------


@few
@given(digits=st.floats(0.05, 8), high=st.floats(0.5, 2))
def test_the_error_of_a_best_polynomial_alternates_at_four_points(digits: float, high: float) -> None:
    low = high * 10**-digits
    coefficients, error = best_quintic(low, high)
    x = torch.linspace(low, high, 20001, dtype=torch.float64)
    errors = 1 - value(coefficients, x)
    assert errors.abs().max() <= error * (1 + 1e-6) + 1e-13
    inner = [errors[1:-1].argmin(), errors[1:-1].argmax()]  # between the ends, first above 1 and then below
    assert inner[0] < inner[1] or digits > 3
    for point, sign in ((errors[0], 1), (errors.min(), -1), (errors[inner[0] + 1 :].max(), 1), (errors[-1], -1)):
        assert abs(float(point) - sign * error) <= 1e-5 * error + 1e-13


def test_no_other_composition_of_the_shape_of_muons_is_as_near() -> None:
    x = torch.logspace(-3, 0, 5000, dtype=torch.float64)
    found, muon = x, x
    for coefficients in quintics(1e-3, 1.0, 5):
        found, muon = value(coefficients, found), value(MUON, muon)
    assert (found - 1).abs().max() < 0.13 < 0.3 < (muon - 1).abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_polynomials_end_when_the_interval_is_as_short_as_rounding_lets_it_be(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for lower in (0.9, 1e-3, 1e-8):
        coefficients = quintics(lower, margin(eps), None)
        x = torch.logspace(torch.tensor(lower).log10().item(), 0, 2000, dtype=torch.float64)
        for one in coefficients:
            x = value(one, x)
        assert (x - 1).abs().max() <= 8 * eps
        assert len(coefficients) <= 17
    assert quintics(1e-3, 1.0, 12)[-1] == LIMIT
