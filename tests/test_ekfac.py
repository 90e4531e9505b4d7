"""EKFAC and TKFAC against brute force: exact eigenvalues in the eigenbasis, exact traces."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from exactness_problems import (
    EXACT,
    KINDS,
    Problem,
    assert_exact,
    deep_linear,
    few,
    generator,
    normal,
    problem,
    seeds,
    unshared_architectures,
)
from hypothesis import given
from hypothesis import strategies as st
from layer_zoo import ZOO, Model
from pairwise import every_pair
from torch import Tensor, nn

import curvlib as cv
from curvlib.pytree import flatten

both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
TANH = (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def of_zoo(model: str, kind: str, reduction: str) -> Problem:
    case: Model = ZOO[model]()
    outputs = case.model_fn(case.params, case.inputs)
    batch = (case.inputs, KINDS[kind].targets(outputs, 5))
    return Problem(case.model_fn, case.params, batch, KINDS[kind], reduction)


def estimate(how: Any, case: Problem, *, batch: Any = None, **options: Any) -> cv.BlockDiagonal:
    options = {"loss": case.kind.loss(case.reduction), "fisher": "type-2", **options}
    result: cv.BlockDiagonal = how(case.model_fn, case.params, batch or case.batch, **options)
    return result


def block_of(matrix: Tensor, curv: cv.BlockDiagonal, name: str) -> Tensor:
    """A block of a matrix in ravel order, in the order of the block's own elements."""
    layout = dict(curv.layouts)[name]
    numbers = cv.unravel(torch.arange(len(matrix)).double(), case_like(curv))
    index = layout.gather(flatten(numbers)[0]).flatten().long()
    return matrix[index][:, index]


def case_like(curv: cv.BlockDiagonal) -> Any:
    return curv.domain.tree([torch.zeros(shape, dtype=torch.float64) for shape in curv.domain.shapes])


def kronecker_names(curv: cv.BlockDiagonal) -> list[str]:
    return [name for name, block in curv.blocks.items() if isinstance(block, cv.EigenKronecker)]


@every_pair(
    "model, fisher, reduction",
    [name for name in ZOO if name not in ("nested",)],
    ["type-2", "empirical"],
    ["mean", "sum"],
)
def test_eigenvalues_are_the_exact_second_moments_in_the_eigenbasis(model: str, fisher: str, reduction: str) -> None:
    case = of_zoo(model, "mse", reduction)
    exact = case.ggn() if fisher == "type-2" else case.empirical_fisher()
    curv = estimate(cv.ekfac, case, fisher=fisher)
    assert kronecker_names(curv)
    for name in kronecker_names(curv):
        block = curv.blocks[name]
        assert isinstance(block, cv.EigenKronecker)
        unit = torch.eye(block.values.numel(), dtype=torch.float64).reshape(-1, *block.shape)
        vectors = block.synthesise(unit).flatten(1)  # rows are the eigenvectors
        moments = torch.einsum("ki,ij,kj->k", vectors, block_of(exact, curv, name), vectors)
        assert reference.relative_error(block.values.flatten(), moments) <= EXACT


@few
@given(seed=seeds, kind=st.sampled_from(sorted(KINDS)), examples=st.integers(1, 5))
@both_reductions
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_ekfac_is_never_further_from_the_truth_than_kfac(
    fisher: str, reduction: str, seed: int, kind: str, examples: int
) -> None:
    case = problem(nn.Sequential(*TANH), normal(seed, examples, 3), kind, reduction, seed=seed)
    exact = case.blocks(case.ggn() if fisher == "type-2" else case.empirical_fisher())
    corrected, kfac = (estimate(how, case, fisher=fisher).to_dense() for how in (cv.ekfac, cv.kfac))
    rounding = 1e-12 * float(exact.norm())
    assert (corrected - exact).norm() <= (kfac - exact).norm() + rounding


@every_pair("architecture, kind, reduction", unshared_architectures(), KINDS, ["mean", "sum"])
def test_ekfac_and_tkfac_are_exact_for_one_example_and_empirical_gradients(
    architecture: str, kind: str, reduction: str
) -> None:
    case = problem(*unshared_architectures()[architecture], kind, reduction, seed=6)
    exact = case.blocks(case.empirical_fisher())
    for how in (cv.ekfac, cv.tkfac):
        assert_exact(estimate(how, case, fisher="empirical"), exact)


@every_pair("widths, fisher, reduction", [(260, 3), (3, 260), (257, 256)], ["mc", "empirical"], ["mean", "sum"])
def test_one_pass_that_reduces_is_two_on_sides_with_few_rows(
    widths: tuple[int, int], fisher: str, reduction: str
) -> None:
    net = nn.Sequential(nn.Linear(*widths, bias=False))
    case = problem(net, normal(1, 3, 4, widths[0]), "cross-entropy", reduction)
    options: dict[str, Any] = {"loss": case.kind.loss(reduction), "fisher": fisher}
    curv = estimate(cv.ekfac, case, sharing="reduce", generator=generator(1), fisher=fisher)
    factors = estimate(cv.kfac, case, sharing="reduce", generator=generator(1), fisher=fisher)
    expected = cv.eigenvalue_correct(factors, case.model_fn, case.params, case.batch, generator=generator(1), **options)
    left, right = factors.blocks["0.weight"].left.matrix, factors.blocks["0.weight"].right.matrix
    for seed in range(3):  # in the span of the factors, outside of which their eigenvectors are anyone's
        v = {"0.weight": left @ normal(seed, *widths[::-1]) @ right}
        assert reference.relative_error((curv @ v)["0.weight"], (expected @ v)["0.weight"]) <= 1e-8


@both_reductions
@pytest.mark.parametrize("architecture", ["tanh", "residual", "embedding"])
def test_ekfac_is_exact_for_one_example(architecture: str, reduction: str) -> None:
    case = problem(*unshared_architectures()[architecture], "cross-entropy", reduction, seed=6)
    assert_exact(estimate(cv.ekfac, case), case.blocks(case.ggn()))


@every_pair(
    "model, fisher, reduction",
    [name for name in ZOO if name not in ("nested",)],
    ["type-2", "empirical"],
    ["mean", "sum"],
)
def test_the_trace_of_every_block_is_exact(model: str, fisher: str, reduction: str) -> None:
    case = of_zoo(model, "cross-entropy", reduction)
    exact = case.ggn() if fisher == "type-2" else case.empirical_fisher()
    for how in (cv.ekfac, cv.tkfac):
        curv = estimate(how, case, fisher=fisher)
        for name, block in curv.blocks.items():
            torch.testing.assert_close(block.trace(), block_of(exact, curv, name).trace(), rtol=1e-10, atol=1e-14)


def cut_off(first: bool, square: bool) -> Problem:
    """A weight that is used as it is and transposed, where no gradient reaches the first or the second use."""

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        one, other = x @ p["w"].T, x[:, : len(p["w"])] @ p["w"]
        one, other = (one.detach(), other) if first else (one, other.detach())
        return torch.tanh(one).sum(1, keepdim=True) + torch.sin(other)

    params = {"w": torch.zeros(3 if square else 2, 3)}
    return problem(model_fn, normal(2, 5, 3), "mse", "mean", params=params)


@every_pair(
    "first, fisher, square, engine",
    [True, False],
    ["type-2", "empirical"],
    [True, False],
    ["functional", "autograd"],
)
def test_a_use_that_no_gradient_reaches_adds_nothing(first: bool, fisher: str, square: bool, engine: str) -> None:
    case = cut_off(first, square)
    exact = case.ggn() if fisher == "type-2" else case.empirical_fisher()
    options: dict[str, Any] = {"fisher": fisher, "engine": engine}
    assert_exact(estimate(cv.diagonal, case, **options), exact.diagonal().diag())
    for how in (cv.ekfac, cv.tkfac, cv.kfac):
        curv = estimate(how, case, **options)
        if how is cv.kfac:
            curv = cv.eigenvalue_correct(curv, case.model_fn, case.params, case.batch, loss=cv.MSE(), **options)
        torch.testing.assert_close(curv.trace(), exact.trace(), rtol=1e-10, atol=0)
        other = estimate(how, case, fisher=fisher, engine="functional")
        if how is cv.tkfac:
            torch.testing.assert_close(curv.to_dense(), other.to_dense(), rtol=1e-9, atol=1e-12)
        else:
            vectors = curv.blocks["w"].synthesise(
                torch.eye(exact.shape[0]).double().reshape(-1, *case.params["w"].shape)
            )
            rows = vectors.flatten(1)
            moments = torch.einsum("ki,ij,kj->k", rows, exact, rows)
            torch.testing.assert_close(curv.blocks["w"].values.flatten(), moments, rtol=1e-9, atol=1e-13)


@both_reductions
def test_tkfacs_factors_are_the_moments_of_gradients_as_matrices(reduction: str) -> None:
    case = problem(nn.Sequential(*TANH), normal(1, 5, 3), "cross-entropy", reduction)
    gradients = reference.gradients(case.model_fn, case.params, case.batch, case.kind.objective)
    block = estimate(cv.tkfac, case, fisher="empirical").blocks["0.weight"]
    assert isinstance(block, cv.Kronecker)
    trees = [cv.unravel(g, case.params) for g in gradients]
    matrices = torch.stack([torch.cat([g["0.weight"], g["0.bias"].unsqueeze(1)], 1) for g in trees])
    count = 5 if reduction == "mean" else 1
    left, right = (matrices @ matrices.mT).sum(0) / count, (matrices.mT @ matrices).sum(0) / count
    expected = torch.kron(left, right) / left.trace()
    torch.testing.assert_close(block.to_dense(), expected, rtol=1e-11, atol=1e-14)


def test_positions_are_examples_only_where_there_is_one() -> None:
    case = problem(nn.Sequential(*TANH), normal(1, 5, 1, 3), "cross-entropy", "mean")
    one, other = (estimate(cv.ekfac, case, correction=c).to_dense() for c in ("example", "position"))
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)
    shared = of_zoo("linear on tokens", "cross-entropy", "mean")
    one, other = (estimate(cv.ekfac, shared, fisher="empirical", correction=c).trace() for c in ("example", "position"))
    assert (one - other).abs() > 1e-3 * one


@pytest.mark.parametrize("how", [cv.ekfac, cv.tkfac])
@both_reductions
def test_a_loader_is_one_big_batch(reduction: str, how: Any) -> None:
    case = problem(nn.Sequential(*TANH), normal(1, 7, 3), "cross-entropy", reduction)
    whole = estimate(how, case).to_dense()
    loader = list(zip(*(x.split([3, 3, 1]) for x in case.batch), strict=True))
    parts = estimate(how, case, batch=cv.over(loader))
    torch.testing.assert_close(parts.to_dense(), whole, rtol=1e-10, atol=1e-13)


def test_a_loader_that_can_be_read_once_is_refused_by_ekfac() -> None:
    case = problem(nn.Sequential(*TANH), normal(1, 7, 3), "cross-entropy", "mean")
    with pytest.raises(cv.errors.ArgumentError, match=r"more than once.*DataLoader"):
        cv.ekfac(case.model_fn, case.params, cv.over(iter([case.batch])))


@pytest.mark.parametrize("how", [cv.ekfac, cv.tkfac])
def test_forward_only_has_no_gradients_to_correct_with(how: Any) -> None:
    case = problem(nn.Sequential(*TANH), normal(1, 7, 3), "cross-entropy", "mean")
    with pytest.raises(cv.errors.ArgumentError, match="forward-only"):
        estimate(how, case, fisher="forward-only")


def test_factors_and_eigenvalues_see_the_same_draws() -> None:
    case = problem(nn.Sequential(*TANH), normal(1, 1, 3), "cross-entropy", "mean")
    curv = estimate(cv.ekfac, case, fisher="mc", generator=generator(3))
    kfac = estimate(cv.kfac, case, fisher="mc", generator=generator(3))  # exact for one example and one draw
    torch.testing.assert_close(curv.to_dense(), kfac.to_dense(), rtol=1e-10, atol=1e-13)
    twice = estimate(cv.ekfac, case, fisher="mc", generator=generator(3))
    assert torch.equal(twice.to_dense(), curv.to_dense())


def test_any_kronecker_basis_can_be_corrected_and_the_best_basis_is_the_truths() -> None:
    case = problem(deep_linear([3, 4, 2], bias=True), normal(1, 6, 3), "mse", "mean")
    exact = case.blocks(case.ggn())
    for how in (cv.kfac, cv.tkfac):
        curv = cv.eigenvalue_correct(
            estimate(how, case), case.model_fn, case.params, case.batch, loss=cv.MSE(), fisher="type-2"
        )
        assert_exact(curv, exact)  # KFAC is exact here, and correction keeps it so
    again = cv.eigenvalue_correct(curv, case.model_fn, case.params, case.batch, loss=cv.MSE(), fisher="type-2")
    assert_exact(again, exact)


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("how", [cv.ekfac, cv.tkfac])
def test_engines_agree(how: Any, model: str) -> None:
    case = of_zoo(model, "cross-entropy", "mean")
    one, other = (estimate(how, case, engine=engine) for engine in ("functional", "autograd"))
    torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", ["linear on tokens", "conv2d", "embeddings", "tied"])
def test_gradients_in_chunks_equal_gradients_at_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = of_zoo(model, "cross-entropy", "mean")
    expected = [estimate(how, case).to_dense() for how in (cv.ekfac, cv.tkfac)]
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", 1)
    for how, matrix in zip((cv.ekfac, cv.tkfac), expected, strict=True):
        torch.testing.assert_close(estimate(how, case).to_dense(), matrix, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_few_rows_on_a_wide_side_need_no_decomposition_of_all_of_it(fisher: str) -> None:
    case = problem(nn.Sequential(nn.Linear(300, 7), nn.Tanh(), nn.Linear(7, 260)), normal(1, 6, 300), "mse", "mean")
    curv = estimate(cv.ekfac, case, fisher=fisher, generator=generator(0))
    kfac = estimate(cv.kfac, case, fisher=fisher, generator=generator(0))
    whole = cv.eigenvalue_correct(
        kfac, case.model_fn, case.params, case.batch, loss=cv.MSE(), fisher=fisher, generator=generator(0)
    )
    shapes = {name: tuple(block.values.shape) for name, block in curv.blocks.items()}
    assert shapes == {"0.weight": (7, 7), "2.weight": (7, 8)}  # six rows, and all that is orthogonal to them
    for name, block in curv.blocks.items():
        expected = whole.blocks[name]
        torch.testing.assert_close(block.trace(), expected.trace(), rtol=1e-10, atol=0)
        torch.testing.assert_close(block.to_dense(), expected.to_dense(), rtol=1e-7, atol=1e-10)
        vector = normal(3, *block.shape)
        solved = block.inverse(0.1) @ vector
        torch.testing.assert_close(solved, expected.inverse(0.1) @ vector, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_have_the_basis_of_their_factors(bias: bool) -> None:
    case = problem(
        nn.Sequential(nn.Linear(256, 258, bias), nn.Tanh(), nn.Linear(258, 3, bias)), normal(4, 5, 256), "mse", "mean"
    )
    curv = estimate(cv.ekfac, case, fisher="empirical")
    assert [type(side).__name__ for side in (curv.blocks["0.weight"].left, curv.blocks["0.weight"].right)] == [
        "LowRankBasis"
    ] * 2
    whole = cv.eigenvalue_correct(
        estimate(cv.kfac, case, fisher="empirical"),
        case.model_fn,
        case.params,
        case.batch,
        loss=cv.MSE(),
        fisher="empirical",
    )
    vectors = cv.unravel(normal(5, curv.domain.size), case.params)
    torch.testing.assert_close(cv.ravel(curv @ vectors), cv.ravel(whole @ vectors), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curv.trace(), whole.trace(), rtol=1e-11, atol=0)
