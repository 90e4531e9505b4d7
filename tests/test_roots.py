"""Inverse roots of matrices with known spectra, by every method and in both precisions."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.errors import ArgumentError, DampingError, SingularError
from curvlib.linalg import roots
from curvlib.linalg.roots import inverse_root
from tests.operators.operator_cases import assert_close, conjugated, generator

METHODS = ("eigh", "coupled-newton", "newton-schulz")
every_method = pytest.mark.parametrize("method", METHODS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
products = pytest.mark.parametrize("method", METHODS[1:])
few = settings(deadline=None, max_examples=10)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def basis(*front: int, size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(*front, size, size, seed=seed)).Q


def with_condition(condition: float, *front: int, size: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eigenvectors and logarithmically spaced eigenvalues up to 1."""
    return basis(*front, size=size, seed=seed), torch.logspace(-math.log10(condition), 0, size, dtype=torch.float64)


@every_method
@every_dtype
@pytest.mark.parametrize("order", [2, 4, 8])
def test_the_root_of_a_multiple_of_the_identity(method: str, dtype: torch.dtype, order: int) -> None:
    for scale in (1e-8, 1.0, 1e8):
        found = inverse_root(scale * torch.eye(7, dtype=dtype), order, method=method)
        expected = scale ** (-1 / order) * torch.eye(7, dtype=dtype)
        assert_close(found, expected, 10 * torch.finfo(dtype).eps)


@every_method
@pytest.mark.parametrize("order", [2, 4, 8])
def test_the_root_of_the_tridiagonal_laplacian(method: str, order: int) -> None:
    n = 30
    laplacian = torch.diag(torch.full((n,), 2.0)) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
    k = torch.arange(1, n + 1, dtype=torch.float64) * math.pi / (n + 1)
    vectors = (torch.arange(1, n + 1, dtype=torch.float64).unsqueeze(1) * k).sin() * math.sqrt(2 / (n + 1))
    expected = conjugated(vectors, (2 - 2 * k.cos()) ** (-1 / order))
    assert_close(inverse_root(laplacian.double(), order, method=method), expected, 1e-12)


@every_method
@every_dtype
@pytest.mark.parametrize("order", [2, 4])
def test_a_singular_matrix_has_the_root_that_damping_gives_it(method: str, dtype: torch.dtype, order: int) -> None:
    q, values = basis(size=12), torch.cat([torch.zeros(8), torch.tensor([0.01, 0.1, 1.0, 4.0])]).double()
    found = inverse_root(conjugated(q, values).to(dtype), order, damping=1e-3, method=method)
    assert_close(found.double(), conjugated(q, (values + 1e-3) ** (-1 / order)), 4e3 * torch.finfo(dtype).eps)


@every_method
@every_dtype
@few
@given(digits=st.sampled_from([0.5, 2, 4]), order=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 2**16))
def test_roots_are_as_accurate_as_the_matrix_determines_them(
    method: str, dtype: torch.dtype, digits: float, order: int, seed: int
) -> None:
    if method == "newton-schulz" and order == 1:
        order = 2
    q, values = with_condition(10.0**digits, seed=seed)
    found = inverse_root(conjugated(q, values).to(dtype), order, method=method)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(found.double(), conjugated(q, values ** (-1 / order)), eps * (30 + 10**digits))
    assert_close(found, found.mT, 4 * eps)


@every_method
def test_the_widest_conditions_of_single_and_double_precision(method: str) -> None:
    for dtype, condition, tolerance in ((torch.float32, 1e6, 0.1), (torch.float64, 1e12, 1e-5)):
        q, values = with_condition(condition)
        found = inverse_root(conjugated(q, values).to(dtype), 4, method=method)
        assert_close(found.double(), conjugated(q, values**-0.25), tolerance)


@few
@given(order=st.floats(0.3, 10), damping=st.floats(0, 1))
def test_any_order_has_an_eigendecomposition(order: float, damping: float) -> None:
    q, values = with_condition(100.0)
    found = inverse_root(conjugated(q, values), order, damping=damping)
    assert_close(found, conjugated(q, (values + damping) ** (-1 / order)), 1e-12)


@pytest.mark.parametrize("order", [1, 3, 5, 6])
def test_the_newton_iteration_takes_every_whole_order(order: int) -> None:
    q, values = with_condition(100.0)
    found = inverse_root(conjugated(q, values), order, method="coupled-newton")
    assert_close(found, conjugated(q, values ** (-1 / order)), 1e-13)


@every_method
def test_stacks_are_loops_even_if_matrices_converge_at_different_times(method: str) -> None:
    matrices = torch.stack([conjugated(*with_condition(c, size=6, seed=3)) for c in (1.0, 1e2, 1e5)])
    matrices = torch.stack([matrices, 1e6 * matrices.flip(0)])
    damping = torch.tensor([[0.1, 0.01, 0.0], [1.0, 0.0, 10.0]], dtype=torch.float64)
    found = inverse_root(matrices, 4, damping=damping, method=method)
    for i in range(2):
        for j in range(3):
            one = inverse_root(matrices[i, j], 4, damping=float(damping[i, j]), method=method)
            assert_close(found[i, j], one, 1e-11)


@every_method
def test_traces_look_at_no_value_and_agree(method: str) -> None:
    matrix, damping = conjugated(*with_condition(100.0)), torch.tensor(0.1, dtype=torch.float64)
    before = matrix.clone()
    expected = inverse_root(matrix, 4, damping=damping, method=method)
    traced = make_fx(lambda m, d: inverse_root(m, 4, damping=d, method=method), tracing_mode="fake")
    graph = traced(torch.zeros_like(matrix), damping)
    assert_close(graph(matrix, damping), expected, 1e-10)
    assert torch.equal(matrix, before)
    assert_close(torch.func.vmap(lambda m: inverse_root(m, 4, damping=0.1, method=method))(matrix[None])[0], expected)


@products
def test_iterations_without_a_look_at_values_stay_converged(method: str) -> None:
    for condition in (1.0, 10.0, 1e5):
        matrix = conjugated(*with_condition(condition)).float()
        with mock.patch.object(roots, "may_look_at", return_value=False):  # as on a GPU: all iterations are made
            found = inverse_root(matrix, 4, method=method)
        assert_close(found, inverse_root(matrix.double(), 4).float(), 1e-6 + 2e-8 * condition)


@products
def test_iterations_compile_in_one_graph(method: str) -> None:
    torch._dynamo.reset()
    matrix = conjugated(*with_condition(10.0, size=5)).float()
    compiled = torch.compile(lambda m: inverse_root(m, 2, method=method), fullgraph=True, backend="eager")
    assert_close(compiled(matrix), inverse_root(matrix, 2), 1e-5)


@every_method
def test_half_precision_is_rooted_in_single(method: str) -> None:
    matrix = torch.diag(torch.tensor([16.0, 1.0])).bfloat16()
    assert_close(inverse_root(matrix, 4, method=method), torch.diag(torch.tensor([0.5, 1.0])), 1e-5)


def test_what_has_no_root_is_refused() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(SingularError, match="add damping"):
        inverse_root(matrix, 2)
    with pytest.raises(DampingError, match=r"-0\.1"):
        inverse_root(matrix, 2, damping=-0.1)
    with pytest.raises(ArgumentError, match="order"):
        inverse_root(matrix, 0, damping=0.1)
    with pytest.raises(ArgumentError, match='method="eigh"'):
        inverse_root(matrix, 2.5, damping=0.1, method="coupled-newton")
    for order in (1, 3, 2.5):
        with pytest.raises(ArgumentError, match="2, 4, 8"):
            inverse_root(matrix, order, damping=0.1, method="newton-schulz")
    with pytest.raises(ArgumentError, match="'svd'"):
        inverse_root(matrix, 2, damping=0.1, method="svd")
