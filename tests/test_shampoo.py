"""Shampoo's curvature against explicit matrices: from gradients, from a model's objective and from its examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness_problems import Problem, problem
from gradient_cases import (
    kron,
    leaves,
    matrix_power,
    moments,
    normal,
    relative_error,
    run,
    second_moment,
    streams,
    tolerance,
    weights_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_zoo import ZOO
from torch import Tensor, nn

import curvlib as cv
from curvlib.estimators import dykaf, shampoo
from curvlib.operators import Dense, Diagonal, Kronecker, ScaledPower

moderately = settings(deadline=None, max_examples=15)
decays = st.sampled_from([None, 0.0, 0.5, 0.95, 1.0])
both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
TANH = (nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))


@moderately
@given(gradients=streams(), decay=decays, squared=st.booleans(), dense=st.booleans())
def test_every_block_is_the_formulas(gradients: list[Any], decay: float | None, squared: bool, dense: bool) -> None:
    elementwise = "dense" if dense else "diagonal"
    curv = run(shampoo, gradients, decay, squared=squared, elementwise=elementwise)
    weights = weights_of(len(gradients), decay)
    for name, *stream in zip(curv.domain.names, *map(leaves, gradients), strict=True):
        block, order = curv.blocks[name], stream[0].ndim
        if order < 2:
            assert isinstance(block, Dense if dense else Diagonal)
            truth = second_moment(stream, weights)
            expected = truth if dense else torch.diag(truth.diagonal())
        elif squared:
            sums = moments(stream, weights)
            expected = kron(sums) / sums[0].trace() ** (order - 1)
        else:
            block = block.power(order)  # the root of what rounding leaves of a zero would not be small
            expected = kron(moments(stream, weights))
        assert relative_error(block.to_dense(), expected) <= tolerance(gradients[0])
    assert {x.dtype for x in leaves(curv @ gradients[0])} == {leaves(gradients[0])[0].dtype}


@moderately
@given(gradients=streams(st.lists(st.integers(1, 3), min_size=2, max_size=4).map(tuple)), decay=decays)
def test_the_square_has_the_trace_of_the_second_moment(gradients: list[Any], decay: float | None) -> None:
    curv = run(shampoo, gradients, decay, squared=True)
    for name, *stream in zip(curv.domain.names, *map(leaves, gradients), strict=True):
        truth = second_moment(stream, weights_of(len(gradients), decay)).trace()
        assert abs(float(curv.blocks[name].trace().double() - truth)) <= tolerance(gradients[0]) * float(truth)


@moderately
@given(seed=st.integers(0, 2**31), m=st.integers(1, 4), n=st.integers(1, 4))
def test_the_power_minus_one_half_is_the_preconditioner(seed: int, m: int, n: int) -> None:
    gradients = [{"w": normal(seed + t, m, n)} for t in range(8)]
    curv = run(shampoo, gradients, 0.9)
    left, right = moments([g["w"] for g in gradients], weights_of(8, 0.9))
    d = normal(seed + 99, m, n)
    expected = matrix_power(left, -0.25) @ d @ matrix_power(right, -0.25)
    assert relative_error((curv.power(-0.5) @ {"w": d})["w"], expected) <= 1e-9


def test_tensors_are_preconditioned_along_every_axis() -> None:
    gradients = [{"w": normal(t, 2, 3, 4)} for t in range(9)]
    curv, d = run(shampoo, gradients, None), normal(99, 2, 3, 4)
    roots = [matrix_power(x, -1 / 6) for x in moments([g["w"] for g in gradients], [1.0] * 9)]
    expected = torch.einsum("ia,jb,kc,abc->ijk", *roots, d)
    assert relative_error((curv.power(-0.5) @ {"w": d})["w"], expected) <= 1e-9


@pytest.mark.parametrize("squared", [False, True])
def test_a_scaled_curvature_goes_on_as_one_of_scaled_moments(squared: bool) -> None:
    first, second = ({"w": normal(t, 2, 3, 2)} for t in range(2))
    curv = shampoo.update(3.0 * shampoo.init(first, squared=squared), second, 0.5)
    expected = shampoo.update(shampoo.init({"w": 3.0**0.5 * first["w"]}, squared=squared), second, 0.5)
    assert relative_error(curv.to_dense(), expected.to_dense()) <= (1e-12 if squared else 1e-7)


@pytest.mark.parametrize("squared", [False, True])
def test_the_factorwise_mean_is_the_update(squared: bool) -> None:
    old, new = ({"w": normal(t, 3, 4)} for t in range(2))
    both = [shampoo.init(x, squared=False) for x in (old, new)]
    mean = cv.ema(both[0], both[1], 0.8)
    updates = [
        (mean, shampoo.update(both[0], new, 0.8)),
        (shampoo.update(mean, new, 0.5), run(shampoo, [old, new], 0.4)),
    ]
    for actual, expected in updates:
        assert relative_error(actual.power(2).to_dense(), expected.power(2).to_dense()) <= 1e-12
    squares = [shampoo.init(x, squared=squared) for x in (old, new)]
    assert isinstance(cv.merge_factors(*squares).blocks["w"].left, ScaledPower)


def matrices_of(case: Problem, gradients: Tensor) -> list[Tensor]:
    """Every layer's gradients [N, d_out, d_in (+ 1)] as kfac lays them out."""
    trees = [cv.unravel(g, case.params) for g in gradients]
    layers = dict.fromkeys(name.rpartition(".")[0] for name in case.params)
    stacks = []
    for layer in layers:
        parts = [
            [tree[f"{layer}.{part}"] for part in ("weight", "bias") if f"{layer}.{part}" in tree] for tree in trees
        ]
        stacks.append(torch.stack([torch.cat([part[0], *(b.unsqueeze(1) for b in part[1:])], 1) for part in parts]))
    return stacks


@both_reductions
@pytest.mark.parametrize("squared", [False, True])
def test_examples_give_the_moments_of_the_empirical_fisher(reduction: str, squared: bool) -> None:
    case = problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(1, 6, 3), "ignored", reduction)
    curv = shampoo(
        case.model_fn, case.params, case.batch, loss=case.kind.loss(reduction), per_example=True, squared=squared
    )
    rows = torch.stack([cv.ravel(g) for g in gradients_of(case)])
    count = 3 if reduction == "mean" else 1  # half of the targets are ignored
    for name, stack in zip(curv.blocks, matrices_of(case, rows), strict=True):
        left, right = (stack @ stack.mT).sum(0) / count, (stack.mT @ stack).sum(0) / count
        block = curv.blocks[name]
        assert isinstance(block, Kronecker)
        if squared:
            assert relative_error(block.to_dense(), torch.kron(left, right) / left.trace()) <= 1e-10
            truth = stack.square().sum() / count
            assert abs(float(block.trace() - truth)) <= 1e-12 * float(truth)
        else:
            assert relative_error(block.left.base.matrix, left) <= 1e-10
            assert relative_error(block.right.base.matrix, right) <= 1e-10


def gradients_of(case: Problem) -> list[Any]:
    """The gradient of each example's own term."""

    def one(n: int) -> Any:
        inputs, targets = (x[n : n + 1] for x in case.batch)
        return torch.func.grad(lambda p: case.kind.objective(case.model_fn(p, inputs), targets, "sum"))(case.params)

    return [one(n) for n in range(len(case.batch[0]))]


@both_reductions
@pytest.mark.parametrize("model", [name for name in ZOO if name != "nested"])
def test_for_examples_the_square_is_tkfac(model: str, reduction: str) -> None:
    case = ZOO[model]()
    options: dict[str, Any] = {"loss": cv.CrossEntropy(reduction)}
    curv = shampoo(case.model_fn, case.params, case.batch(), per_example=True, squared=True, **options)
    expected = cv.tkfac(case.model_fn, case.params, case.batch(), fisher="empirical", **options)
    assert relative_error(curv.to_dense(), expected.to_dense()) <= 1e-11


def test_a_loader_of_examples_is_one_big_batch() -> None:
    case = problem(nn.Sequential(*TANH), normal(1, 7, 3), "cross-entropy", "mean")
    loader = list(zip(*(x.split([3, 3, 1]) for x in case.batch), strict=True))
    parts, whole = (
        shampoo(case.model_fn, case.params, batch, per_example=True) for batch in (cv.over(loader), case.batch)
    )
    # a root of a factor of low rank is known to the root of rounding only, the factors and the square to rounding
    assert relative_error(parts.power(2).to_dense(), whole.power(2).to_dense()) <= 1e-11
    for block, expected in zip(parts.blocks.values(), whole.blocks.values(), strict=True):
        for side, truth in ((block.left, expected.left), (block.right, expected.right)):
            assert relative_error(side.base.matrix, truth.base.matrix) <= 1e-11


def test_of_a_loader_every_batch_is_one_observation_in_any_order() -> None:
    case = problem(nn.Sequential(*TANH), normal(1, 9, 3), "cross-entropy", "mean")
    loader = list(zip(*(x.split([3, 4, 2]) for x in case.batch), strict=True))
    curv, backwards = (shampoo(case.model_fn, case.params, cv.over(data)) for data in (loader, loader[::-1]))
    assert relative_error(backwards.power(2).to_dense(), curv.power(2).to_dense()) <= 1e-11
    gradients = [
        torch.func.grad(lambda p, b=batch: case.kind.objective(case.model_fn(p, b[0]), b[1], "mean"))(case.params)
        for batch in loader
    ]
    total = run(shampoo, gradients, None)
    for name in case.params:
        mean, sums = curv.blocks[name].power(2), total.blocks[name].power(2)
        assert relative_error(mean.to_dense(), sums.to_dense() / 9) <= 1e-11


def test_wide_sides_have_the_diagonal_of_the_moment() -> None:
    gradients = [{"w": normal(t, 3, 6), "v": normal(9 + t, 7)} for t in range(3)]
    curv = run(shampoo, gradients, 0.5, wide=cv.WideDiagonal(above=5), elementwise="dense")
    left, right = moments([g["w"] for g in gradients], weights_of(3, 0.5))
    block = curv.blocks["w"]
    assert isinstance(block, Kronecker)
    assert isinstance(block.right.base, Diagonal)
    assert isinstance(curv.blocks["v"], Diagonal)
    assert relative_error(block.power(2).to_dense(), torch.kron(left, torch.diag(right.diagonal()))) <= 1e-11


def test_what_is_not_shampoos_cannot_be_updated() -> None:
    grads = {"w": normal(0, 2, 3)}
    curv = shampoo.update(shampoo.init(grads), {"w": normal(1, 2, 3)}, 0.5)
    for other in (curv.power(0.5), curv.inverse(0.1), dykaf.init(grads)):
        with pytest.raises(cv.errors.ArgumentError, match=r"block 'w': .*update the curvature that"):
            shampoo.update(other, grads, 0.5)


@pytest.mark.parametrize(
    "wide", [cv.WideDiagonal(), cv.WideDiagonal(2), cv.WideLowRank(1, above=2), cv.WideBlocks(2, above=2)]
)
@pytest.mark.parametrize("squared", [False, True])
def test_a_gradient_of_zeros_has_no_curvature_and_starts_nothing(squared: bool, wide: Any) -> None:
    shapes = {"matrix": (3, 4), "vector": (3,)} | ({} if isinstance(wide, cv.WideLowRank) else {"tensor": (2, 3, 2)})
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    curv = shampoo.init(zeros, squared=squared, wide=wide)
    for state in (curv, shampoo.update(curv, zeros, 0.9), shampoo.update(curv, zeros, None)):
        assert float(state.to_dense().abs().max()) == 0
    gradient = {name: normal(1, *shape) for name, shape in shapes.items()}
    started, expected = shampoo.update(curv, gradient, None), shampoo.init(gradient, squared=squared, wide=wide)
    for name in ("matrix", "vector"):
        power = 1 if squared or name == "vector" else 2
        actual = started.blocks[name].power(power).to_dense()
        assert relative_error(actual, expected.blocks[name].power(power).to_dense()) <= 1e-10


def test_the_curvature_of_an_embeddings_examples_is_updated_as_that_of_one_hot_inputs() -> None:
    params, tokens, targets = {"w": normal(0, 4, 3)}, torch.tensor([0, 1, 1, 2, 3]), torch.tensor([0, 1, 2, 1, 0])
    one_hot = nn.functional.one_hot(tokens, 4).double()
    embedded = shampoo(lambda p, x: nn.functional.embedding(x, p["w"]), params, (tokens, targets), per_example=True)
    dense = shampoo(lambda p, x: x @ p["w"], params, (one_hot, targets), per_example=True)
    updated, expected = (shampoo.update(curv, {"w": normal(1, 4, 3)}, 0.5) for curv in (embedded, dense))
    assert relative_error(updated.to_dense(), expected.to_dense()) <= 1e-10
