"""Wide sides kept in diagonal blocks: exact within a block, nothing outside, and never a square matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import normal, problem
from test_regressions import LargestTensor
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import curvlib as cv
from curvlib.layers.wide import WideBlocks
from curvlib.operators import BlockBasis, DenseBlocks, Matrix

NET = (nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))  # of the sides only 3 + 1 is narrow
BLOCKS = WideBlocks(3, above=4)  # the sides of 5 and 7 are no multiple of 3
VOCABULARY = 11
WIDER = 6  # than anything but the vocabulary


def zeroed(matrix: Tensor, size: int) -> Tensor:
    """The matrix without the entries that join two blocks."""
    block = torch.arange(matrix.shape[-1]) // size
    return matrix * (block[:, None] == block)


def net() -> Any:
    return problem(nn.Sequential(*NET), normal(1, 9, 3), "cross-entropy", "mean")


def expected(dense: Any, wide: WideBlocks) -> cv.Kronecker:
    """A block with dense factors, whose wide sides lose the entries between blocks."""

    def cut(side: Matrix) -> cv.Dense:
        matrix = side.matrices()
        return cv.Dense(zeroed(matrix, wide.size) if side.shape[-1] > wide.above else matrix)

    return cv.Kronecker(cut(dense.left), cut(dense.right))


def tokens(examples: int = 24) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = {"embedding": normal(0, VOCABULARY, 3), "head": normal(1, VOCABULARY, 3)}
    batch = tuple(torch.randint(VOCABULARY, (examples, 2), generator=generator) for _ in range(2))
    return params, (batch[0], batch[1])


def language_model(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.embedding(x, p["embedding"])), p["head"])


def tied_model(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.embedding(x, p["head"])), p["head"])


@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 100])
def test_blocks_are_those_of_the_dense_factors(size: int, fisher: str, engine: str) -> None:
    case, wide = net(), WideBlocks(size, above=4)
    dense, curv = (case.kfac(wide=w, fisher=fisher, engine=engine) for w in (cv.WideDiagonal(), wide))
    for name, block in dense.blocks.items():
        found = curv.blocks[name]
        torch.testing.assert_close(found.to_dense(), expected(block, wide).to_dense(), rtol=1e-10, atol=1e-14)
        if size == 100:
            torch.testing.assert_close(found.to_dense(), block.to_dense(), rtol=1e-10, atol=1e-14)
    assert all(isinstance(curv.blocks[name].right, DenseBlocks) == (name == "2.weight") for name in curv.blocks)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_an_embedding_and_its_head_have_blocks_where_they_are_wide_and_not_diagonal(sharing: str) -> None:
    params, batch = tokens()
    wide = WideBlocks(4, above=WIDER)
    dense, curv = (
        cv.kfac(language_model, params, batch, fisher="type-2", sharing=sharing, wide=w)
        for w in (cv.WideDiagonal(), wide)
    )
    assert isinstance(curv.blocks["head"].left, DenseBlocks)
    assert isinstance(curv.blocks["embedding"].right, cv.Diagonal if sharing == "expand" else DenseBlocks)
    for name, block in dense.blocks.items():
        torch.testing.assert_close(
            curv.blocks[name].to_dense(), expected(block, wide).to_dense(), rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_several_batches_are_one(engine: str) -> None:
    params, batch = tokens()
    loader = list(zip(*(x.split([5, 12, 7]) for x in batch), strict=True))
    options: dict[str, Any] = {"fisher": "type-2", "wide": WideBlocks(4, above=WIDER), "engine": engine}
    parts = cv.kfac(language_model, params, cv.over(loader), **options)
    whole = cv.kfac(language_model, params, batch, **options)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-14)


def test_a_convolution_of_many_channels_has_blocks() -> None:
    case = problem(nn.Conv2d(2, 5, 3), normal(1, 4, 2, 4, 4), "mse", "mean")
    dense, curv = (case.kfac(wide=w) for w in (cv.WideDiagonal(), BLOCKS))
    found, block = curv.blocks["weight"], dense.blocks["weight"]
    assert isinstance(found.left, DenseBlocks)
    assert isinstance(found.right, DenseBlocks)
    torch.testing.assert_close(found.to_dense(), expected(block, BLOCKS).to_dense(), rtol=1e-10, atol=1e-14)


def test_groups_of_wide_sides_have_blocks_each() -> None:
    case = problem(nn.Conv1d(4, 10, 3, groups=2), normal(1, 4, 4, 5), "mse", "mean")
    dense, curv = (case.kfac(wide=w, engine="functional") for w in (cv.WideDiagonal(), BLOCKS))
    found, block = curv.blocks["weight"], dense.blocks["weight"]
    assert found.left.shape == (2, 5)
    torch.testing.assert_close(found.to_dense(), expected(block, BLOCKS).to_dense(), rtol=1e-10, atol=1e-14)


def test_the_algebra_works_on_blocks(tmp_path: Path) -> None:
    case = net()
    curv = case.kfac(wide=BLOCKS)
    matrix, v = curv.to_dense(), cv.ravel(case.params)
    unit = torch.eye(len(matrix), dtype=torch.float64)
    solved = torch.linalg.solve(matrix + 0.1 * unit, v)
    torch.testing.assert_close(cv.ravel(curv.inverse(0.1) @ case.params), solved, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curv.damp(0.1).logdet(), torch.logdet(matrix + 0.1 * unit), rtol=1e-10, atol=1e-12)
    root = curv.power(-0.5, 0.1)
    torch.testing.assert_close(cv.ravel(root @ (root @ case.params)), solved, rtol=1e-9, atol=1e-12)
    assert curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(case.params, rank=2))(case.params)
    for kept in (curv, curv.inverse(0.1)):
        cv.save(kept, tmp_path / "curv.safetensors")
        assert torch.equal(cv.load(tmp_path / "curv.safetensors").to_dense(), kept.to_dense())


def test_the_estimate_can_be_traced_and_mapped() -> None:
    case = net()

    def solved(params: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        curv = cv.kfac(case.model_fn, params, (inputs, targets), fisher="type-2", wide=BLOCKS, engine="functional")
        return cv.ravel(curv.inverse(0.1) @ params)

    once = solved(case.params, *case.batch)
    traced = make_fx(solved)(case.params, *case.batch)
    torch.testing.assert_close(traced(case.params, *case.batch), once, rtol=1e-9, atol=1e-12)
    several = torch.func.vmap(solved, (None, 0, 0))(case.params, *(torch.stack([x, x.flip(0)]) for x in case.batch))
    torch.testing.assert_close(several, torch.stack([once, once]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_ekfac_corrects_eigenvalues_in_the_basis_of_the_blocks(fisher: str) -> None:
    params, batch = tokens(60)
    wide = WideBlocks(4, above=WIDER)
    dense = cv.kfac(language_model, params, batch, fisher=fisher)
    cut = cv.operators.BlockDiagonal(
        {name: expected(block, wide) for name, block in dense.blocks.items()}, dense.layouts, dense.domain
    )
    reference = cv.eigenvalue_correct(cut, language_model, params, batch, fisher=fisher)
    curv = cv.ekfac(language_model, params, batch, fisher=fisher, wide=wide)
    assert isinstance(curv.blocks["head"].left, BlockBasis)
    torch.testing.assert_close(curv.to_dense(), reference.to_dense(), rtol=1e-8, atol=1e-12)


def test_tkfac_keeps_the_trace() -> None:
    params, batch = tokens()
    curv, exact = (
        estimate(language_model, params, batch, fisher="type-2", wide=WideBlocks(4, above=WIDER))
        for estimate in (cv.tkfac, cv.ekfac)
    )
    for name, block in exact.blocks.items():
        torch.testing.assert_close(curv.blocks[name].trace(), block.trace(), rtol=1e-10, atol=1e-14)


def test_the_sum_over_a_tied_weight_is_inverted_exactly() -> None:
    params, batch = tokens()
    head = {"head": params["head"]}
    curv = cv.kfac(tied_model, head, batch, fisher="type-2", wide=WideBlocks(4, above=WIDER))
    damped = curv.to_dense() + 0.1 * torch.eye(curv.domain.size, dtype=torch.float64)
    assert isinstance(curv.blocks["head"], cv.operators.Sum)
    solved = torch.linalg.solve(damped, cv.ravel(head))
    torch.testing.assert_close(cv.ravel(curv.inverse(0.1) @ head), solved, rtol=1e-8, atol=1e-11)


def test_a_head_of_50257_takes_memory_for_its_blocks() -> None:
    vocabulary, width, size = 50257, 64, 512
    params = {"head": 0.1 * torch.randn(vocabulary, width)}
    inputs, targets = torch.randn(8, width), torch.randint(vocabulary, (8,))

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, p["head"])

    plan = cv.plan(model_fn, params, inputs)
    with LargestTensor() as largest:
        curv = cv.kfac(model_fn, params, (inputs, targets), engine="functional", plan=plan, wide=WideBlocks(size))
        curv @ params, curv.diag(), curv.trace(), curv.frobenius_norm()
    side = curv.blocks["head"].left
    assert [tuple(stack.shape) for stack in side.stacks] == [(98, 512, 512), (1, 81, 81)]
    assert largest.numel == 98 * size * size  # the blocks; a square has a hundred times as many entries


def test_inverses_of_a_wide_head_take_memory_for_its_blocks() -> None:
    vocabulary, width, size = 9001, 16, 64
    params = {"head": 0.1 * torch.randn(vocabulary, width)}
    inputs, targets = torch.randn(8, width), torch.randint(vocabulary, (8,))

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, p["head"])

    plan = cv.plan(model_fn, params, inputs)
    with LargestTensor() as largest:
        curv = cv.kfac(model_fn, params, (inputs, targets), engine="functional", plan=plan, wide=WideBlocks(size))
        curv.inverse(1e-3) @ params
        curv.power(-0.5, 1e-3) @ params
        curv.damp(1e-3).logdet()
        curv.inverse(1e-3).sample(torch.Generator().manual_seed(0))
    assert largest.numel <= vocabulary * size


def test_a_block_without_rows_is_refused() -> None:
    with pytest.raises(cv.errors.ArgumentError, match="at least 1, got size=0"):
        WideBlocks(0)
