"""Gram matrices against plain products, decompositions that do not give up, and conjugate gradients."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.errors import ConvergenceError, EigendecompositionError, NonFiniteError
from curvlib.linalg.cholesky import cholesky
from curvlib.linalg.conjugate_gradient import conjugate_gradient
from curvlib.linalg.eager import is_eager, may_look_at
from curvlib.linalg.eigh import eigh, tolerance
from curvlib.linalg.gram import augmented_gram, gram
from tests.operators.operator_cases import assert_close, conjugated, generator, moderately

WIDTHS = (1, 3, 127, 128, 129, 301)  # around the width from which products are split in blocks, and its double
every_width = pytest.mark.parametrize("width", WIDTHS)
few = settings(deadline=None, max_examples=4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def plain(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    if weights is None:
        weights = torch.ones(rows.shape[:-1], dtype=rows.dtype)
    return torch.einsum("...r,...ri,...rj->...ij", weights, rows, rows)


def with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


@every_width
@few
@given(front=st.lists(st.integers(1, 3), max_size=2), n=st.integers(1, 6), weighted=st.booleans())
def test_gram_matrices_are_the_plain_products(width: int, front: list[int], n: int, weighted: bool) -> None:
    rows = normal(*front, n, width)
    weights = torch.rand(*front, n, generator=generator(1), dtype=torch.float64) if weighted else None
    for found, expected in (
        (gram(rows, weights=weights), plain(rows, weights)),
        (augmented_gram(rows, weights=weights), plain(with_ones(rows), weights)),
    ):
        assert_close(found, expected, 1e-13)
        assert_close(found, found.mT, 1e-14)


@every_width
def test_rows_may_be_strided_and_zero_weights_leave_rows_out(width: int) -> None:
    rows = normal(width, 8).mT
    assert not rows.is_contiguous() or width == 1
    assert_close(gram(rows), plain(rows), 1e-13)
    weights = torch.tensor([1, 0] * 4, dtype=torch.float64)
    assert_close(gram(rows, weights=weights), plain(rows[::2]), 1e-13)
    assert_close(augmented_gram(rows, weights=weights), plain(with_ones(rows[::2])), 1e-13)


@pytest.mark.parametrize("width", [5, 128, 301])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_single(width: int, dtype: torch.dtype) -> None:
    rows = normal(2000, width).to(dtype)
    for found, expected in (
        (gram(rows), plain(rows.double())),
        (augmented_gram(rows), plain(with_ones(rows.double()))),
    ):
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, 1e-5)


def test_ones_in_half_precision_are_counted_beyond_its_range() -> None:
    rows = torch.ones(70_000, 1, dtype=torch.float16)
    assert torch.equal(augmented_gram(rows), torch.full((2, 2), 70_000.0))


@pytest.mark.parametrize("width", [3, 128, 301])
@pytest.mark.parametrize("augmented", [False, True])
def test_gradients_vmap_and_traces_agree_with_the_plain_product(width: int, augmented: bool) -> None:
    product = augmented_gram if augmented else gram
    rows, weights = normal(2, 4, width), torch.rand(2, 4, generator=generator(1), dtype=torch.float64)
    probe = normal(width + augmented, width + augmented, seed=2)

    def value(fn: object, r: Tensor, w: Tensor) -> Tensor:
        return (fn(r, weights=w) * probe).sum()

    def simple(r: Tensor, weights: Tensor) -> Tensor:
        return plain(with_ones(r) if augmented else r, weights)

    expected = torch.func.grad(lambda r, w: value(simple, r, w), (0, 1))(rows, weights)
    for found, one in zip(
        torch.func.grad(lambda r, w: value(product, r, w), (0, 1))(rows, weights), expected, strict=True
    ):
        assert_close(found, one, 1e-12)
    leaf = rows.clone().requires_grad_()
    (plain_autograd,) = torch.autograd.grad(value(product, leaf, weights), leaf)
    assert_close(plain_autograd, expected[0], 1e-12)
    mapped = torch.func.vmap(lambda r, w: product(r, weights=w))(rows, weights)
    assert_close(mapped, simple(rows, weights), 1e-13)
    traced = make_fx(lambda r: product(r))(rows)
    assert_close(traced(2 * rows), product(2 * rows), 1e-13)
    with torch.no_grad():
        assert_close(product(leaf), product(rows), 1e-13)


def test_gram_matrices_leave_their_arguments_alone() -> None:
    rows, weights = normal(4, 200), torch.rand(4, dtype=torch.float64)
    copies = rows.clone(), weights.clone()
    gram(rows, weights=weights), augmented_gram(rows, weights=weights)
    assert torch.equal(rows, copies[0])
    assert torch.equal(weights, copies[1])


# --- eigendecompositions ------------------------------------------------------------------------------------------


def symmetric(*shape: int) -> Tensor:
    x = normal(*shape, shape[-1])
    return x + x.mT


@moderately
@given(front=st.lists(st.integers(1, 3), max_size=2), size=st.integers(1, 6))
def test_eigenvectors_diagonalise_the_matrix(front: list[int], size: int) -> None:
    matrix = symmetric(*front, size)
    values, vectors = eigh(matrix)
    assert bool((values.diff() >= 0).all())
    assert_close(conjugated(vectors, values), matrix, 1e-12)
    assert_close(vectors.mT @ vectors, torch.eye(size, dtype=torch.float64).expand_as(matrix), 1e-12)
    assert_close(values, torch.linalg.eigvalsh(matrix), 1e-12)


def failing(times: int) -> mock.Mock:
    """torch.linalg.eigh that fails this often, then works."""
    original = torch.linalg.eigh
    failures = [torch.linalg.LinAlgError("did not converge")] * times
    return mock.Mock(side_effect=lambda m: (_ for _ in ()).throw(failures.pop()) if failures else original(m))


def test_a_failure_is_tried_again_in_double_precision() -> None:
    matrix = symmetric(4).float()
    with mock.patch("torch.linalg.eigh", failing(1)) as counter:
        values, vectors = eigh(matrix)
    assert [call.args[0].dtype for call in counter.call_args_list] == [torch.float32, torch.float64]
    assert (values.dtype, vectors.dtype) == (torch.float32, torch.float32)
    assert_close(conjugated(vectors, values), matrix, 1e-5)


def test_two_failures_are_an_error_that_says_so() -> None:
    with (
        mock.patch("torch.linalg.eigh", failing(2)),
        pytest.raises(
            EigendecompositionError, match=r"\(4, 4\) factor failed in torch.float32 and in float64: did not"
        ),
    ):
        eigh(symmetric(4).float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_matrices_that_are_not_finite_are_refused(value: float) -> None:
    matrix = symmetric(3)
    matrix[0, 0] = value
    with pytest.raises(NonFiniteError, match="not finite"):
        eigh(matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_single(dtype: torch.dtype) -> None:
    matrix = symmetric(4).to(dtype)
    values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    assert_close(conjugated(vectors, values), matrix.float(), 1e-5)


def test_tiny_negative_eigenvalues_become_zero_and_others_stay() -> None:
    eps = torch.finfo(torch.float64).eps
    diagonal = torch.tensor([-1.0, -1e-3, -2.9 * eps * 2, 1e-30, 2.0], dtype=torch.float64)
    values, _ = eigh(torch.diag(diagonal))
    assert values.tolist() == [-1.0, -1e-3, 0.0, 1e-30, 2.0]
    assert torch.equal(tolerance(diagonal), torch.tensor([5 * eps * 2], dtype=torch.float64))
    beyond = torch.tensor([-2.1 * eps, 1.0], dtype=torch.float64)
    assert torch.equal(eigh(torch.diag(beyond))[0], beyond)


def test_eigh_works_under_transforms_and_traces() -> None:
    stack = symmetric(3, 4)
    expected = torch.linalg.eigvalsh(stack)
    assert_close(torch.func.vmap(lambda m: eigh(m)[0])(stack), expected, 1e-12)
    gradient = torch.func.grad(lambda m: eigh(m)[0].square().sum())(stack[0])
    assert_close(gradient, 2 * stack[0], 1e-12)
    assert_close(make_fx(lambda m: eigh(m)[0])(stack)(2 * stack), 2 * expected, 1e-12)


def test_values_are_looked_at_eagerly_only() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.extend((is_eager(), may_look_at(x)))
        return x.sum()

    x = torch.ones(2)
    look(x)
    assert seen == [True, True]
    assert not may_look_at(x.to("meta"))
    seen.clear()
    torch.func.grad(look)(x), torch.func.vmap(look)(x), make_fx(look)(x)
    torch.func.vmap(torch.func.grad(look))(torch.ones(2, 2))
    assert seen
    assert not any(seen)


# --- conjugate gradients ------------------------------------------------------------------------------------------


@moderately
@given(size=st.integers(1, 8), tolerance=st.sampled_from([1e-4, 1e-10]), preconditioned=st.booleans())
def test_conjugate_gradients_reach_the_residual(size: int, tolerance: float, preconditioned: bool) -> None:
    matrix = symmetric(size) @ symmetric(size) + torch.eye(size, dtype=torch.float64)
    b = normal(size, seed=3)
    rough = matrix.diagonal().reciprocal()
    preconditioner = (lambda r: rough * r) if preconditioned else None
    x = conjugate_gradient(lambda v: matrix @ v, b, preconditioner=preconditioner, tolerance=tolerance)
    assert float((matrix @ x - b).norm()) <= 1.01 * tolerance * float(b.norm()) + 1e-13 * float(b.norm())


def test_an_exact_preconditioner_needs_one_step() -> None:
    matrix, b = symmetric(6) @ symmetric(6) + torch.eye(6, dtype=torch.float64), normal(6)
    inverse, calls = torch.linalg.inv(matrix), []

    def matvec(v: Tensor) -> Tensor:
        calls.append(v)
        return matrix @ v

    assert_close(conjugate_gradient(matvec, b, preconditioner=lambda r: inverse @ r), torch.linalg.solve(matrix, b))
    assert len(calls) == 1


def test_vectors_may_have_any_shape_and_zero_has_the_solution_zero() -> None:
    b = normal(2, 3)
    assert_close(conjugate_gradient(lambda v: 4 * v, b), b / 4)
    assert torch.equal(conjugate_gradient(lambda v: 4 * v, torch.zeros(2, 3)), torch.zeros(2, 3))


def test_no_convergence_is_an_error_with_residual_and_steps() -> None:
    diagonal, b = torch.logspace(0, 8, 20, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    with pytest.raises(
        ConvergenceError, match=r"relative residual of .*e.* after 3 iterations, not 1\.0e-10; add damping"
    ):
        conjugate_gradient(lambda v: diagonal * v, b, max_iterations=3)


# --- Cholesky decompositions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [(), (2,)])
@pytest.mark.parametrize("width", [3, 1024, 1025, 1100])
def test_a_cholesky_factor_is_that_of_lapack(front: tuple[int, ...], width: int) -> None:
    x = torch.randn(*front, width, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = x @ x.mT + torch.eye(width, dtype=torch.float64)
    before = matrix.clone()
    factor, failed = cholesky(matrix)
    expected = torch.linalg.cholesky(matrix)
    assert torch.equal(matrix, before)
    assert failed.shape == front
    assert not failed.any()
    assert float((factor - expected).norm()) <= 1e-12 * float(expected.norm())
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("row", [0, 700, 1099])
def test_a_matrix_that_is_not_definite_is_reported_wherever_it_fails(row: int) -> None:
    matrix = torch.eye(1100, dtype=torch.float64).repeat(2, 1, 1)
    matrix[1, row, row] = -1.0
    assert (cholesky(matrix)[1] != 0).tolist() == [False, True]


def test_a_wide_cholesky_factor_has_derivatives() -> None:
    values = torch.linspace(1.0, 2.0, 1030, dtype=torch.float64).requires_grad_()
    cholesky(values.diag())[0].diagonal().log().sum().backward()
    torch.testing.assert_close(values.grad, 0.5 / values.detach())
