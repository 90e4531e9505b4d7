"""Diagonal blocks of exact operators: those of the dense matrix, in the order and by the names asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from exactness_problems import normal, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError
from curvlib.estimators import block_diagonal

few = settings(deadline=None, max_examples=8)
EXACT = 1e-12


def mlp(loss: str = "cross-entropy") -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    return problem(model, normal(0, 5, 3), loss, "mean")


def empirical(model_fn: Any, params: Any, batch: Any) -> cv.MatrixFree:
    return cv.fisher(model_fn, params, batch, fisher="empirical")


KINDS: dict[str, Callable[..., Any]] = {
    "ggn": cv.ggn,
    "hessian": cv.hessian,
    "fisher": cv.fisher,
    "empirical fisher": empirical,
    "gramian": cv.gramian,
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def made(kind: str) -> tuple[Any, cv.MatrixFree]:
    case = mlp()
    return case, KINDS[kind](case.model_fn, case.params, case.batch)


def between_blocks_removed(dense: Tensor, params: Any, blocks: dict[str, tuple[str, ...]]) -> Tensor:
    """The matrix with everything outside of the blocks set to zero."""
    labels = {name: torch.full_like(params[name], i) for i, group in enumerate(blocks.values()) for name in group}
    flat = cv.ravel(labels)
    return dense * (flat[:, None] == flat)


# --- the blocks of the matrix ---------------------------------------------------------------------------------------


@every_kind
def test_by_default_each_parameter_has_the_block_of_the_dense_matrix(kind: str) -> None:
    case, curv = made(kind)
    blocks = block_diagonal(curv)
    dense = curv.to_dense()
    assert list(blocks.blocks) == sorted(case.params)
    for name in case.params:
        expected = reference.block(dense, case.params, name)
        assert isinstance(blocks.blocks[name], cv.Dense)
        assert reference.relative_error(blocks.blocks[name].to_dense(), expected) <= EXACT
    expected = between_blocks_removed(dense, case.params, {name: (name,) for name in case.params})
    assert reference.relative_error(blocks.to_dense(), expected) <= EXACT


@few
@given(data=st.data())
def test_parameters_can_be_grouped_in_any_way(data: st.DataObject) -> None:
    case, curv = made("hessian")
    names = data.draw(st.permutations(list(case.params)))
    ends = sorted(data.draw(st.sets(st.integers(1, len(names) - 1), max_size=3)))
    groups = {f"group {i}": tuple(names[a:b]) for i, (a, b) in enumerate(zip([0, *ends], [*ends, None], strict=True))}
    blocks = block_diagonal(curv, groups)
    dense = curv.to_dense()
    assert reference.relative_error(blocks.to_dense(), between_blocks_removed(dense, case.params, groups)) <= EXACT
    for name, group in groups.items():
        assert {parameter for parameter, holders in blocks.parameters.items() if name in holders} == set(group)


def test_blocks_are_lined_up_with_those_of_a_curvature() -> None:
    case = mlp("mse")
    exact = cv.ggn(case.model_fn, case.params, case.batch, loss=cv.MSE())
    for options in ({}, {"elementwise": "dense"}):
        kfac = cv.kfac(case.model_fn, case.params, case.batch, loss=cv.MSE(), fisher="type-2", **options)
        blocks = block_diagonal(exact, kfac)
        assert blocks.layouts == kfac.layouts
        for name, block in kfac.blocks.items():
            assert blocks.blocks[name].domain.shapes == block.domain.shapes
        groups = {name: tuple(p for p, held in kfac.parameters.items() if name in held) for name in kfac.blocks}
        expected = between_blocks_removed(exact.to_dense(), case.params, groups)
        assert reference.relative_error(blocks.to_dense(), expected) <= EXACT
        difference = (blocks + (-1.0) * kfac).frobenius_norm()  # block by block
        assert (difference - (expected - kfac.to_dense()).norm()).abs() <= EXACT
        if options:  # norm layers have exact blocks
            assert (blocks.blocks["2.weight"].to_dense() - kfac.blocks["2.weight"].to_dense()).norm() <= EXACT


def test_for_one_example_the_blocks_of_kfac_are_the_true_ones() -> None:
    case = problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(0, 1, 3), "mse", "mean")
    kfac = cv.kfac(case.model_fn, case.params, case.batch, loss=cv.MSE(), fisher="type-2")
    truth = block_diagonal(cv.ggn(case.model_fn, case.params, case.batch, loss=cv.MSE()), kfac)
    for name, block in kfac.blocks.items():
        assert reference.relative_error(block.to_dense(), truth.blocks[name].to_dense()) <= EXACT


def test_sums_damping_and_inverses_of_exact_operators_have_blocks_too() -> None:
    case, curv = made("ggn")
    for operator in (curv.damp(0.5), curv + cv.hessian(case.model_fn, case.params, case.batch), curv.inverse(0.5)):
        dense = operator.to_dense()
        expected = between_blocks_removed(dense, case.params, {name: (name,) for name in case.params})
        assert reference.relative_error(block_diagonal(operator).to_dense(), expected) <= 1e-7


def test_a_data_set_has_the_blocks_of_all_its_examples() -> None:
    case = mlp()
    inputs, targets = case.batch
    data = cv.over([(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])
    whole, streamed = (block_diagonal(cv.ggn(case.model_fn, case.params, batch)) for batch in (case.batch, data))
    assert reference.relative_error(streamed.to_dense(), whole.to_dense()) <= EXACT


def test_products_are_taken_in_stacks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    _, curv = made("hessian")
    whole = block_diagonal(curv)
    monkeypatch.setattr("curvlib.estimators.exact_blocks.ELEMENTS_AT_ONCE", 3 * curv.domain.size + 1)
    assert reference.relative_error(block_diagonal(curv).to_dense(), whole.to_dense()) <= EXACT


# --- the algebra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lined_up", [False, True])
def test_blocks_have_the_full_algebra(lined_up: bool) -> None:
    case, curv = made("ggn")
    kfac = cv.kfac(case.model_fn, case.params, case.batch)
    blocks = block_diagonal(curv, kfac if lined_up else None)
    dense = blocks.to_dense()
    damped = dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype)
    values, vectors = torch.linalg.eigh(damped)
    assert reference.relative_error(blocks.inverse(0.1).to_dense(), damped.inverse()) <= 1e-10
    root = vectors * values.sqrt() @ vectors.mT
    assert reference.relative_error(blocks.power(0.5, 0.1).to_dense(), root) <= 1e-10
    assert torch.allclose(blocks.damp(0.1).logdet(), values.log().sum())
    assert torch.allclose(blocks.damp(0.1).eigenvalues(), values)
    assert torch.allclose(cv.ravel(blocks.diag()), dense.diagonal())
    assert torch.allclose(cv.ravel(blocks @ case.params), dense @ cv.ravel(case.params))
    assert reference.relative_error((2 * blocks + blocks).to_dense(), 3 * dense) <= EXACT
    draws = reference.rows(blocks.sample(torch.Generator().manual_seed(0), 20_000), 20_000)
    assert reference.relative_error(draws.mT @ draws / 20_000, dense) <= 0.1
    tops = cv.spectrum.top_eigenvalues(blocks, 1, per_block=True)
    for name, block in blocks.blocks.items():
        assert torch.allclose(tops[name].values, block.eigenvalues()[-1:], atol=1e-8)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_block_that_is_too_large_is_named() -> None:
    _, curv = made("ggn")
    with pytest.raises(
        ArgumentError, match=r"block '0\.weight' would be a dense matrix of 12 rows, more than max_rows=8"
    ):
        block_diagonal(curv, max_rows=8)
    assert block_diagonal(curv, max_rows=12).domain.size == curv.domain.size


def test_groups_that_are_no_partition_are_refused() -> None:
    case, curv = made("ggn")
    first, *rest = case.params
    with pytest.raises(ArgumentError, match=f"parameter '{first}' is in 0 blocks"):
        block_diagonal(curv, {"all": rest})
    with pytest.raises(ArgumentError, match=f"parameter '{first}' is in 2 blocks"):
        block_diagonal(curv, {"all": list(case.params), "more": [first]})
    with pytest.raises(ArgumentError, match="'other', which is no parameter"):
        block_diagonal(curv, {"all": [*case.params, "other"]})
    other = problem(nn.Linear(3, 2), normal(0, 5, 3), "mse", "mean").kfac()
    with pytest.raises(ArgumentError, match=r"other parameters than the operator's: '0\.bias'"):
        block_diagonal(curv, other)
