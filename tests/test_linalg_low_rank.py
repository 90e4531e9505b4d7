"""Low-rank factors from rows: traces, exactness where the rank suffices, closeness to the best elsewhere, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from curvlib.errors import ArgumentError, ShapeError
from curvlib.linalg.low_rank import LowRankFactor, low_rank_gram, low_rank_sum, low_rank_update
from curvlib.operators import LowRank

moderately = settings(deadline=None, max_examples=10)
# few rows, rows enough for a random range, and more rows than columns
SHAPES = [(1, 12), (5, 12), (12, 12), (60, 12), (150, 60), (20, 300)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def decaying(seed: int, n: int, width: int, exponent: float = 1.0) -> Tensor:
    """Rows whose second moment has eigenvalues of about j^-exponent."""
    q = torch.linalg.qr(normal(seed, width, width))[0]
    return normal(seed + 1, n, width) * torch.arange(1, width + 1).double() ** (-exponent / 2) @ q


def moment(rows: Tensor) -> Tensor:
    return rows.mT @ rows / rows.shape[-2]


def dense(factor: LowRankFactor) -> Tensor:
    u, values, remainder = factor
    inside = u @ u.mT
    return (u * values.unsqueeze(-2)) @ u.mT + remainder[..., None, None] * (torch.eye(u.shape[-2]).double() - inside)


def best_error(matrix: Tensor, rank: int) -> float:
    """The error of the best factor of this rank that has the matrix's trace."""
    others = torch.linalg.eigvalsh(matrix)[:-rank]
    return float((others - others.mean()).norm())


def assert_is_a_factor(factor: LowRankFactor, trace: Tensor) -> None:
    u, values, remainder = factor
    identity = torch.eye(u.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, identity.expand_as(u.mT @ u), rtol=0, atol=1e-13)
    total = values.sum(-1) + (u.shape[-2] - u.shape[-1]) * remainder
    torch.testing.assert_close(total, trace, rtol=1e-13, atol=0)
    assert bool((values.diff(dim=-1) <= 1e-13).all())
    assert bool((remainder >= 0).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 11])
@pytest.mark.parametrize("seed", [None, 1])
def test_the_trace_is_exact_and_the_vectors_are_orthonormal(
    shape: tuple[int, int], rank: int, seed: int | None
) -> None:
    rows = decaying(0, *shape)
    factor = low_rank_gram(rows, rank, generator=None if seed is None else generator(seed))
    assert_is_a_factor(factor, moment(rows).trace())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [None, 1])
def test_rows_of_no_more_than_that_rank_are_exact(shape: tuple[int, int], seed: int | None) -> None:
    rank = 4
    rows = normal(0, shape[0], rank) @ normal(1, rank, shape[1])
    factor = low_rank_gram(rows, rank, generator=None if seed is None else generator(seed))
    assert_is_a_factor(factor, moment(rows).trace())
    assert float((dense(factor) - moment(rows)).norm()) <= 1e-12 * float(moment(rows).norm())


@pytest.mark.parametrize("n", [20, 1000])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("order", ["random", "periodic"])
def test_a_range_is_close_to_the_best(n: int, exponent: float, order: str) -> None:
    rows = decaying(2, n, 120, exponent)
    if order == "periodic":  # rows that come in tens of the same kind
        rows = rows[torch.arange(n) % 10 * (n // 10)] + 0.1 * rows
    tolerance = 1 + 1e-9 if n == 20 else 1.3  # few rows have the range of their Gram matrix
    for chosen in (None, generator(3)):
        error = float((dense(low_rank_gram(rows, 10, generator=chosen)) - moment(rows)).norm())
        assert error <= tolerance * best_error(moment(rows), 10)


@moderately
@given(seed=st.integers(0, 2**31), counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), rank=st.integers(2, 5))
def test_an_average_within_the_rank_is_exact(seed: int, counts: list[int], rank: int) -> None:
    width, decay = 14, 0.8
    span = normal(seed, rank, width)
    start = normal(seed + 1, 3, rank) @ span
    factor, expected = low_rank_gram(start, rank), moment(start)
    for i, n in enumerate(counts):
        rows = normal(seed + 2 + i, n, rank) @ span
        factor = low_rank_update(factor, rows, decay)
        expected = decay * expected + (1 - decay) * moment(rows)
    assert_is_a_factor(factor, expected.trace())
    assert float((dense(factor) - expected).norm()) <= 1e-12 * float(expected.norm())


@pytest.mark.parametrize("n", [1, 10, 40])
def test_one_update_is_the_best_of_its_rank_or_close(n: int) -> None:
    """With few rows the update is the truncated exact average; the remainder of the old factor is part of it."""
    factor = low_rank_gram(decaying(0, 200, 50), 6)
    rows = decaying(5, n, 50)
    expected = 0.7 * dense(factor) + 0.3 * moment(rows)
    updated = low_rank_update(factor, rows, 0.7)
    assert_is_a_factor(updated, expected.trace())
    error, best = float((dense(updated) - expected).norm()), best_error(expected, 6)
    assert best > 1e-3 * float(expected.norm())
    assert error <= (1 + 1e-9 if n <= 14 else 1.1) * best


def test_a_long_average_stays_close_to_the_dense_one() -> None:
    width, rank, decay = 80, 10, 0.9
    rows = decaying(0, 64 * 60, width).split(64)
    factor, expected, bound = low_rank_gram(rows[0], rank), moment(rows[0]), 0.0
    bound = float((dense(factor) - expected).norm())
    for batch in rows[1:]:
        exact = decay * dense(factor) + (1 - decay) * moment(batch)
        factor = low_rank_update(factor, batch, decay)
        expected = decay * expected + (1 - decay) * moment(batch)
        bound = decay * bound + float(
            (dense(factor) - exact).norm()
        )  # what a step leaves out is forgotten like the rest
    error = float((dense(factor) - expected).norm())
    assert_is_a_factor(factor, expected.trace())
    assert error <= bound * (1 + 1e-9)
    assert error <= 1.15 * best_error(expected, rank)


@moderately
@given(seed=st.integers(0, 2**31))
def test_sums_are_exact_where_the_rank_holds_them(seed: int) -> None:
    one, two = (low_rank_gram(normal(seed + i, 20, 15), k) for i, k in enumerate((3, 2)))
    expected = 0.5 * dense(one) + 2 * dense(two)
    total = low_rank_sum([one, two], [0.5, 2.0], 5)
    assert_is_a_factor(total, expected.trace())
    assert float((dense(total) - expected).norm()) <= 1e-12 * float(expected.norm())
    assert float((dense(low_rank_sum([one], [3.0], 6)) - 3 * dense(one)).norm()) <= 1e-12 * float(expected.norm())


def test_rows_and_decay_that_contribute_nothing_change_nothing() -> None:
    factor, rows = low_rank_gram(decaying(0, 30, 12), 3), decaying(1, 5, 12)
    for updated, expected in (
        (low_rank_update(factor, rows, 1.0), dense(factor)),
        (low_rank_update(factor, torch.zeros(5, 12).double(), 0.5), 0.5 * dense(factor)),
        (low_rank_gram(torch.zeros(5, 12).double(), 3), torch.zeros(12, 12).double()),
    ):
        assert float((dense(updated) - expected).norm()) <= 1e-13


@pytest.mark.parametrize("n", [5, 60])
def test_groups_vmap_and_traces_agree(n: int) -> None:
    def everything(rows: Tensor) -> LowRankFactor:
        return low_rank_update(low_rank_gram(rows[..., : n - 2, :], 3), rows, 0.6)

    rows = torch.stack([decaying(0, n, 20), decaying(3, n, 20)])
    each = torch.stack([dense(everything(x)) for x in rows])
    for result in (
        everything(rows),
        torch.func.vmap(everything)(rows),
        make_fx(everything)(torch.ones_like(rows))(rows),
    ):
        torch.testing.assert_close(dense(result), each, rtol=0, atol=1e-12)


def test_half_precision_is_accumulated_in_single() -> None:
    rows = decaying(0, 40, 12).bfloat16()
    assert {x.dtype for x in low_rank_update(low_rank_gram(rows, 2), rows, 0.5)} == {torch.float32}


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest storage that any call makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch_pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_square_matrix_of_the_width_is_made() -> None:
    width, rank = 1000, 4
    batches = [normal(i, n, width) for i, n in enumerate((60, 3, 60, 12))]
    with LargestTensor() as largest:
        curv = LowRank.of_rows(batches[0], rank)
        for batch in batches[1:]:
            curv = curv.updated(batch, 0.9)
    assert curv.vectors.shape == (width, rank)
    assert largest.numel <= 60 * width


def test_arguments_are_checked() -> None:
    rows = torch.ones(3, 5)
    for rank in (0, 5):
        with pytest.raises(ArgumentError, match="between 1 and 4"):
            low_rank_gram(rows, rank)
    with pytest.raises(ShapeError, match="none"):
        low_rank_gram(rows[:0], 2)
    factor = low_rank_gram(rows, 2)
    with pytest.raises(ArgumentError, match="decay"):
        low_rank_update(factor, rows, 1.5)
    for wrong in (rows[:, :4], rows[:0], rows[0]):
        with pytest.raises(ShapeError, match=r"\[\*, n, 5\]"):
            low_rank_update(factor, wrong, 0.5)
