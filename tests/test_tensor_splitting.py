"""The higher-order power method against brute force on the rearranged tensor, the SVD start, and rank-one moments."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.errors import ArgumentError, ShapeError
from curvlib.linalg.projector_splitting import bug, ksl, rearranged
from curvlib.linalg.rank_one import leading_pair, rank_one_moment
from curvlib.linalg.tensor_splitting import hopm
from tests.operators.operator_cases import assert_close, generator

few = settings(deadline=None, max_examples=10)
seeds = st.integers(0, 2**16)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def state(shape: tuple[int, ...], *front: int, seed: int = 5) -> tuple[Tensor, tuple[Tensor, ...]]:
    scale = torch.rand(front, generator=generator(seed), dtype=torch.float64) * 5
    roots = [normal(*front, size, size, seed=seed + i) for i, size in enumerate(shape)]
    squares = [root @ root.mT for root in roots]
    return scale, tuple(square / torch.linalg.matrix_norm(square, keepdim=True) for square in squares)


def rank_one_tensor(scale: Tensor, vectors: list[Tensor]) -> Tensor:
    return scale * functools.reduce(lambda a, b: a.unsqueeze(-1) * b, vectors)


def rearrangement(gradient: Tensor) -> Tensor:
    """The tensor with axes n_i^2 that vec D vec D^T is: both indices of a mode side by side, from its definition."""
    order = gradient.ndim
    outer = torch.tensordot(gradient, gradient, 0)
    paired = outer.permute([axis for mode in range(order) for axis in (mode, mode + order)])
    return paired.reshape([size**2 for size in gradient.shape])


def power_method(tensor: Tensor, vectors: list[Tensor], sweeps: int) -> tuple[Tensor, list[Tensor]]:
    """The higher-order power method on an explicit tensor: each vector is the contraction with all others."""
    vectors = list(vectors)
    for _ in range(sweeps):
        for mode in range(tensor.ndim):
            contracted = tensor.movedim(mode, 0)
            for other in reversed(vectors[:mode] + vectors[mode + 1 :]):
                contracted = contracted @ other
            vectors[mode] = contracted / contracted.norm()
    return contracted.norm(), vectors


@few
@given(shape=shapes, sweeps=st.integers(1, 3), decay=st.floats(0.1, 1), seed=seeds)
def test_it_is_the_higher_order_power_method(shape: tuple[int, ...], sweeps: int, decay: float, seed: int) -> None:
    (scale, factors), gradient = state(shape, seed=seed), normal(*shape, seed=seed + 9)
    vectors = [factor.flatten() for factor in factors]
    tensor = decay * rank_one_tensor(scale, vectors) + 0.3 * rearrangement(gradient)
    size, expected = power_method(tensor, vectors, sweeps)
    found_size, found = hopm(scale, factors, gradient, decay, 0.3, sweeps=sweeps)
    assert_close(found_size, size, 1e-12)
    for factor, vector in zip(found, expected, strict=True):
        assert_close(factor.flatten(), vector, 1e-12)


@few
@given(m=st.integers(1, 5), n=st.integers(1, 5), sweeps=st.integers(1, 3), seed=seeds)
def test_it_is_ksl_for_matrices(m: int, n: int, sweeps: int, seed: int) -> None:
    (scale, factors), gradient = state((m, n), 2, seed=seed), normal(2, m, n, seed=seed + 9)
    size, found = hopm(scale, factors, gradient, 0.9, 0.1, sweeps=sweeps)
    expected = ksl(scale, *factors, rearranged(gradient), 0.9, 0.1, sweeps=sweeps)
    for one, other in zip((size, *found), expected, strict=True):
        assert_close(one, other, 1e-13)


def test_it_is_the_exact_moving_average_for_vectors() -> None:
    (scale, factors), gradient = state((4,)), normal(4, seed=9)
    size, (factor,) = hopm(scale, factors, gradient, 0.9, 0.1)
    assert_close(size * factor, 0.9 * scale * factors[0] + 0.1 * torch.outer(gradient, gradient), 1e-14)


@pytest.mark.parametrize("spike", [1.0, 1e4])
def test_factors_of_tensors_stay_positive_semidefinite_in_float32(spike: float) -> None:
    scale, factors = torch.zeros(3), tuple((torch.eye(n) / n**0.5).expand(3, n, n) for n in (3, 2, 4))
    gradients = normal(12, 3, 3, 2, 4).float()
    gradients[5] *= spike
    for gradient in gradients:
        scale, factors = hopm(scale, factors, gradient, 0.9, 0.1)
        assert (scale >= 0).all()
        for factor in factors:
            values = torch.linalg.eigvalsh(factor.double())
            assert (values[:, 0] >= -1e-6 * values[:, -1]).all()


def test_stacks_of_tensors_are_loops_and_zero_gradients_leave_factors() -> None:
    (scale, factors), gradients = state((3, 2, 4), 2), normal(2, 3, 2, 4, seed=9)
    gradients[1] = 0
    decay = torch.tensor([0.9, 0.5], dtype=torch.float64)
    size, found = hopm(scale, factors, gradients, decay, 1 - decay, sweeps=2)
    assert_close(size[1], 0.5 * scale[1], 1e-14)
    for new, old in zip(found, factors, strict=True):
        assert_close(new[1], old[1], 1e-14)
    for i in range(2):
        one = hopm(scale[i], tuple(f[i] for f in factors), gradients[i], float(decay[i]), 1 - float(decay[i]), sweeps=2)
        for a, b in zip((size, *found), (one[0], *one[1]), strict=True):
            assert_close(a[i], b, 1e-13)
    nothing = hopm(torch.zeros_like(scale), factors, torch.zeros_like(gradients), decay, 1 - decay)
    assert not nothing[0].any()
    assert all(torch.equal(a, b) for a, b in zip(nothing[1], factors, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    scale, factors = state((3, 2))
    with pytest.raises(ShapeError, match=r"\(3, 2\)"):
        hopm(scale, factors, normal(2, 3), 0.9, 0.1)
    with pytest.raises(ArgumentError, match="sweeps=0"):
        hopm(scale, factors, normal(3, 2), 0.9, 0.1, sweeps=0)


# --- the start and the rank-one second moment ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@few
@given(m=st.integers(1, 8), n=st.integers(1, 8), exponent=st.sampled_from([-15, 0, 15]), seed=seeds)
def test_the_leading_pair_is_that_of_the_svd(dtype: torch.dtype, m: int, n: int, exponent: int, seed: int) -> None:
    u, vt = torch.linalg.qr(normal(m, m, seed=seed)).Q, torch.linalg.qr(normal(n, n, seed=seed + 1)).Q
    values = 10.0**exponent * 0.99 ** torch.arange(min(m, n), dtype=torch.float64)
    gradient = (u[:, : len(values)] * values) @ vt[: len(values)]
    scale, left, right = leading_pair(gradient.to(dtype))
    tolerance = 1e3 * torch.finfo(dtype).eps
    assert_close(scale.double(), values[0] ** 2, tolerance)
    assert_close(left.double(), torch.outer(u[:, 0], u[:, 0]), tolerance)
    assert_close(right.double(), torch.outer(vt[0], vt[0]), tolerance)


def test_equal_singular_values_give_a_pair_of_their_space() -> None:
    gradient = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    scale, left, right = leading_pair(gradient)
    assert_close(scale, torch.tensor(4.0, dtype=torch.float64), 1e-13)
    assert_close(left, right, 1e-13)
    assert_close(left @ left, left, 1e-13)
    assert left[2].norm() < 1e-13


def test_a_start_from_nothing_can_reach_every_direction_and_stacks_are_loops() -> None:
    gradients = normal(3, 5, 2)
    gradients[1] = 0
    found = leading_pair(gradients)
    for i in range(3):
        for a, b in zip(found, leading_pair(gradients[i]), strict=True):
            assert_close(a[i], b, 1e-14)
    assert found[0][1] == 0
    assert_close(found[1][1], torch.eye(5, dtype=torch.float64) / 5**0.5, 1e-15)


def test_the_start_takes_half_precision_and_looks_at_no_value() -> None:
    gradient = normal(4, 6)
    assert leading_pair(gradient.bfloat16())[0].dtype == torch.float32
    traced = make_fx(leading_pair, tracing_mode="fake")(torch.zeros_like(gradient))
    for a, b in zip(traced(gradient), leading_pair(gradient), strict=True):
        assert_close(a, b, 1e-13)


@few
@given(m=st.integers(1, 5), n=st.integers(1, 5), seed=seeds)
def test_the_rank_one_moment_is_the_parallel_step_for_diagonal_factors(m: int, n: int, seed: int) -> None:
    # An example with one nonzero entry has a diagonal outer product, so that the mean over entries is diag(D2) / (m n).
    squares = normal(m, n, seed=seed).square()
    left, right = (torch.nn.functional.normalize(normal(k, seed=seed + k).abs(), dim=0) for k in (m, n))
    scale = torch.tensor(0.7, dtype=torch.float64)
    examples = torch.diag(squares.sqrt().flatten()).reshape(m * n, m, n)
    expected = bug(scale, left.diag(), right.diag(), rearranged(examples, observations=1), 0.9, 0.1 * m * n)
    found = rank_one_moment(scale, left, right, squares, 0.9)
    for one, other in zip((found[0], found[1].diag(), found[2].diag()), expected, strict=True):
        assert_close(one, other, 1e-12)


def test_squares_that_stay_of_rank_one_are_followed_exactly_from_nothing() -> None:
    rows, columns = normal(4).square(), normal(3, seed=1).square()
    units = tuple(torch.full((k,), k**-0.5, dtype=torch.float64) for k in (4, 3))
    scale, left, right = torch.zeros((), dtype=torch.float64), *units
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for size in (0.0, 1.0, 1e8, 0.0, 1e-8):
        squares = size * torch.outer(rows, columns)
        expected = 0.9 * expected + 0.1 * squares
        scale, left, right = rank_one_moment(scale, left, right, squares, 0.9)
        assert (scale * torch.outer(left, right) - expected).norm() <= 1e-14 * expected.norm()
        assert min(left.min(), right.min()) >= 0


def test_rank_one_moments_of_stacks_are_loops_and_arguments_stay() -> None:
    squares, decay = normal(3, 4, 5).square(), torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    left, right = (normal(3, k).abs() for k in (4, 5))
    arguments = torch.ones(3, dtype=torch.float64), left / left.norm(dim=-1, keepdim=True), right, squares
    before = [x.clone() for x in arguments]
    found = rank_one_moment(*arguments, decay)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    for i in range(3):
        for a, b in zip(found, rank_one_moment(*(x[i] for x in arguments), float(decay[i])), strict=True):
            assert_close(a[i], b, 1e-14)
    traced = make_fx(rank_one_moment, tracing_mode="fake")(*arguments, decay)
    for a, b in zip(traced(*arguments, decay), found, strict=True):
        assert_close(a, b, 1e-14)


def test_the_power_method_looks_at_no_value_and_changes_no_argument() -> None:
    (scale, factors), gradient = state((3, 140, 2)), normal(3, 140, 2)
    before = [x.clone() for x in (scale, *factors, gradient)]
    expected = hopm(scale, factors, gradient, 0.9, 0.1, sweeps=2)
    assert all(torch.equal(a, b) for a, b in zip((scale, *factors, gradient), before, strict=True))
    traced = make_fx(lambda s, f, d: hopm(s, f, d, 0.9, 0.1, sweeps=2), tracing_mode="fake")
    graph = traced(torch.zeros_like(scale), factors, torch.zeros_like(gradient))
    found = graph(scale, factors, gradient)
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert_close(a, b, 1e-13)
