"""Sides that are too wide for a dense factor: what each choice keeps, and that none makes a square matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import normal, problem
from test_regressions import LargestTensor
from torch import Tensor, nn

import curvlib as cv

CHOICES: dict[str, Any] = {
    "diagonal": cv.WideDiagonal(above=4),
    "low rank": cv.WideLowRank(2, above=4),
    "identity": cv.WideIdentity(above=4),
}
every_choice = pytest.mark.parametrize("choice", CHOICES)
NET = (nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))  # of the sides only 3 + 1 is narrow


def estimate(case: Any, wide: Any, **options: Any) -> cv.BlockDiagonal:
    curv: cv.BlockDiagonal = case.kfac(wide=wide, **options)
    return curv


@every_choice
@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_the_trace_is_that_of_dense_factors(fisher: str, engine: str, choice: str) -> None:
    case = problem(nn.Sequential(*NET), normal(1, 7, 3), "cross-entropy", "mean")
    dense, curv = (estimate(case, w, fisher=fisher, engine=engine) for w in (cv.WideDiagonal(), CHOICES[choice]))
    for name, block in dense.blocks.items():
        torch.testing.assert_close(curv.blocks[name].trace(), block.trace(), rtol=1e-10, atol=1e-14)
    assert not torch.allclose(curv.to_dense(), dense.to_dense())


def test_each_choice_keeps_what_it_says() -> None:
    case = problem(nn.Sequential(*NET), normal(1, 7, 3), "cross-entropy", "mean")
    dense = case.kfac().blocks["0.weight"].left.matrix
    sides = {name: estimate(case, wide).blocks["0.weight"].left for name, wide in CHOICES.items()}
    torch.testing.assert_close(sides["diagonal"].to_dense(), dense.diagonal().diag(), rtol=1e-12, atol=1e-15)
    mean = dense.trace() / len(dense)
    torch.testing.assert_close(sides["identity"].to_dense(), mean * torch.eye(6).double(), rtol=1e-12, atol=1e-15)
    top = torch.linalg.eigvalsh(dense)[-2:]
    torch.testing.assert_close(sides["low rank"].eigenvalues()[-2:], top, rtol=1e-8, atol=1e-14)
    rest = (dense.trace() - top.sum()) / 4
    torch.testing.assert_close(sides["low rank"].eigenvalues()[:4], rest.expand(4), rtol=1e-8, atol=1e-14)


@every_choice
def test_a_rank_that_suffices_and_many_batches_lose_nothing(choice: str) -> None:
    case = problem(nn.Sequential(*NET), normal(1, 6, 3), "cross-entropy", "mean")
    loader = list(zip(*(x.split([2, 4]) for x in case.batch), strict=True))
    wide = CHOICES[choice] if choice != "low rank" else cv.WideLowRank(5, above=5)
    parts = cv.kfac(case.model_fn, case.params, cv.over(loader), fisher="type-2", wide=wide)
    torch.testing.assert_close(parts.to_dense(), estimate(case, wide).to_dense(), rtol=1e-8, atol=1e-11)


@every_choice
def test_the_algebra_works_on_wide_sides(choice: str) -> None:
    case = problem(nn.Sequential(*NET), normal(1, 7, 3), "cross-entropy", "mean")
    curv = estimate(case, CHOICES[choice])
    matrix = curv.to_dense()
    unit = torch.eye(len(matrix), dtype=torch.float64)
    v = cv.ravel(case.params)
    torch.testing.assert_close(cv.ravel(curv @ case.params), matrix @ v, rtol=1e-10, atol=1e-13)
    solved = torch.linalg.solve(matrix + 0.1 * unit, v)
    torch.testing.assert_close(cv.ravel(curv.inverse(0.1) @ case.params), solved, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curv.damp(0.1).logdet(), torch.logdet(matrix + 0.1 * unit), rtol=1e-10, atol=1e-12)
    root = curv.power(-0.5, 0.1)
    torch.testing.assert_close(cv.ravel(root @ (root @ case.params)), solved, rtol=1e-9, atol=1e-12)
    assert cv.ravel(curv.inverse(0.1).sample(torch.Generator().manual_seed(0))).isfinite().all()
    assert curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(case.params, rank=2))(case.params)


@pytest.mark.parametrize("wide", [cv.WideDiagonal(), cv.WideLowRank(8), cv.WideIdentity()])
def test_a_vocabulary_of_50257_takes_memory_in_proportion(wide: Any) -> None:
    vocabulary, width = 50257, 16
    params = {"embedding": 0.1 * torch.randn(vocabulary, width), "head": 0.1 * torch.randn(vocabulary, width)}
    tokens = torch.randint(vocabulary, (2, 4))

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.embedding(x, p["embedding"])), p["head"])

    plan = cv.plan(model_fn, params, tokens)
    with LargestTensor() as largest:
        curv = cv.kfac(model_fn, params, (tokens, tokens), engine="functional", plan=plan, wide=wide)
        curv.inverse(1e-3) @ params
        curv.power(-0.5, 1e-3) @ params
        curv.damp(1e-3).logdet()
        curv.inverse(1e-3).sample(torch.Generator().manual_seed(0))
    assert largest.numel <= 4 * vocabulary * width


def test_the_default_says_once_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    case = problem(nn.Sequential(nn.Linear(3, 17)), normal(1, 7, 3), "cross-entropy", "mean")
    with caplog.at_level("WARNING", logger="curvlib"):
        for _ in range(2):
            estimate(case, cv.WideDiagonal(above=15))
    assert [record.getMessage() for record in caplog.records] == [
        "a side of width 17 is wider than 15: only the diagonal of its factor is kept; see `wide`"
    ]


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_the_trace_of_ekfac_is_exact_with_low_rank_sides(fisher: str) -> None:
    params = {"v": normal(1, 3, 40), "w": normal(2, 40, 3)}
    batch = normal(3, 9, 3), torch.arange(9) % 3

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["v"]).tanh() @ p["w"]

    curv = cv.ekfac(model_fn, params, batch, fisher=fisher, wide=cv.WideLowRank(4, above=32))
    exact = cv.fisher(model_fn, params, batch, fisher=fisher)
    torch.testing.assert_close(curv.trace(), exact.trace(), rtol=1e-10, atol=0)
