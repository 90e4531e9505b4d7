"""DyKAF's curvature against alternating least squares on the explicitly rearranged second moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness_problems import problem
from gradient_cases import (
    factors,
    gradient_blocks,
    kron,
    leaves,
    normal,
    relative_error,
    run,
    second_moment,
    streams,
    tolerance,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_zoo import ZOO
from torch import Tensor, nn

import curvlib as cv
from curvlib.estimators import dykaf, shampoo
from curvlib.operators import Diagonal, Kronecker, ScaledPower

moderately = settings(deadline=None, max_examples=15)
matrices = st.tuples(st.integers(1, 3), st.integers(1, 3))
tensors = st.lists(st.integers(1, 3), min_size=3, max_size=4).map(tuple)


def rearranged(matrix: Tensor, m: int, n: int) -> Tensor:
    """The rearrangement [m m, n n] of a matrix [m n, m n], of rank one for a Kronecker product."""
    return matrix.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)


def nearest(matrix: Tensor, m: int, n: int) -> Tensor:
    """The nearest Kronecker product in Frobenius norm, by a singular value decomposition."""
    u, s, vh = torch.linalg.svd(rearranged(matrix, m, n))
    return s[0] * torch.kron(u[:, 0].reshape(m, m).contiguous(), vh[0].reshape(n, n).contiguous())


def state(curv: Any, name: str) -> tuple[Tensor, list[Tensor]]:
    """The scale of a block and its unit factors."""
    block = curv.blocks[name]
    assert isinstance(block.left, ScaledPower)
    return block.left.scale.double(), [block.left.base.matrices().double(), *factors(curv, name)[1:]]


def alternating(target: Tensor, right: Tensor, m: int, n: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Sweeps of alternating least squares on the rearranged target, started at the right factor."""
    matrix, r = rearranged(target, m, n), right.reshape(-1)
    for _ in range(sweeps):
        left = matrix @ r
        left = left / left.norm()
        r = matrix.mT @ left
    return left.reshape(m, m), r.reshape(n, n)


@moderately
@given(gradients=streams(matrices), decay=st.sampled_from([0.5, 0.95, None]), sweeps=st.integers(1, 3))
def test_a_step_is_a_sweep_of_alternating_least_squares(gradients: list[Any], decay: float | None, sweeps: int) -> None:
    curv = dykaf.init(gradients[0])
    for name, d in zip(curv.domain.names, leaves(gradients[0]), strict=True):
        u, s, vh = torch.linalg.svd(d.double())
        expected = s[0] ** 2 * kron([torch.outer(u[:, 0], u[:, 0]), torch.outer(vh[0], vh[0])])
        if len(s) == 1 or s[1] < 0.99 * s[0]:  # else the leading pair is hardly defined
            assert relative_error(curv.blocks[name].to_dense(), expected) <= tolerance(gradients[0])
    for gradient in gradients[1:]:
        old, curv = curv, dykaf.update(curv, gradient, decay, sweeps=sweeps)
        for name, d in zip(curv.domain.names, leaves(gradient), strict=True):
            weights = (1.0, 1.0) if decay is None else (decay, 1 - decay)
            target = weights[0] * old.blocks[name].to_dense().double() + second_moment([d], weights[1:])
            left, right = alternating(target, state(old, name)[1][1], *d.shape, sweeps)
            assert relative_error(curv.blocks[name].to_dense(), torch.kron(left, right)) <= tolerance(gradient)
            for factor in state(curv, name)[1]:
                assert abs(float(factor.norm()) - 1) <= tolerance(gradient)


def test_many_sweeps_give_the_nearest_product() -> None:
    old, new = run(dykaf, [{"w": normal(t, 3, 4)} for t in range(3)], 0.5), normal(9, 3, 4)
    curv = dykaf.update(old, {"w": new}, 0.7, sweeps=100)
    target = 0.7 * old.to_dense() + second_moment([new], [0.3])
    assert relative_error(curv.to_dense(), nearest(target, 3, 4)) <= 1e-10
    once = dykaf.update(old, {"w": new}, 0.7)
    assert relative_error(once.to_dense(), nearest(target, 3, 4)) > 1e-6


@moderately
@given(gradients=streams(tensors, most=2), decay=st.sampled_from([0.5, 0.95]))
def test_tensors_take_a_sweep_of_the_higher_order_power_method(gradients: list[Any], decay: float) -> None:
    curv = dykaf.init(gradients[0], start="identity")
    for gradient in gradients[1:]:
        old, curv = curv, dykaf.update(curv, gradient, decay)
        for name, d in zip(curv.domain.names, leaves(gradient), strict=True):
            scale, units = state(old, name)
            order = d.ndim
            # the second moment with the two indices of every axis next to each other
            target = decay * scale * kron(units) + second_moment([d], [1 - decay])
            pairs = [axis for i in range(order) for axis in (i, order + i)]
            tensor = target.reshape(*d.shape, *d.shape).permute(*pairs)
            for i in range(order):
                contracted = tensor
                for j in reversed([j for j in range(order) if j != i]):
                    contracted = torch.tensordot(contracted, units[j], dims=([2 * j, 2 * j + 1], [0, 1]))
                size = contracted.norm()
                units[i] = contracted / size
            assert relative_error(curv.blocks[name].to_dense(), size * kron(units)) <= tolerance(gradient)


def test_a_tensor_starts_near_its_best_product() -> None:
    u, v, w = (torch.nn.functional.normalize(normal(i, n), dim=0) for i, n in enumerate((2, 3, 4)))
    rank_one = 5 * torch.einsum("i,j,k->ijk", u, v, w)
    curv = dykaf.init({"w": rank_one})
    assert relative_error(curv.to_dense(), torch.outer(rank_one.flatten(), rank_one.flatten())) <= 1e-10
    noisy = dykaf.init({"w": rank_one + 0.1 * normal(7, 2, 3, 4)})
    assert relative_error(noisy.to_dense(), curv.to_dense()) <= 0.3


def test_both_factors_at_once_are_the_parallel_form() -> None:
    old, new = run(dykaf, [{"w": normal(t, 3, 2)} for t in range(4)], 0.5), normal(9, 3, 2)
    curv = dykaf.update(old, {"w": new}, 0.7, integrator="bug")
    scale, (left, right) = state(old, "w")
    u = 0.7 * scale * left + 0.3 * new @ right @ new.mT
    v = 0.7 * scale * right + 0.3 * new.mT @ left @ new
    u, v = u / u.norm(), v / v.norm()
    size = 0.7 * scale * (left * u).sum() * (right * v).sum() + 0.3 * (u * (new @ v @ new.mT)).sum()
    assert relative_error(curv.to_dense(), size * torch.kron(u, v)) <= 1e-11


def test_two_hundred_steps_stay_near_the_best_kronecker_product() -> None:
    errors: dict[str, list[float]] = {"best": [], "ksl": [], "bug": [], "shampoo": []}
    m, n, decay = 4, 3, 0.95
    roots = normal(0, m, m) / m**0.5, normal(1, n, n) / n**0.5
    for seed in range(3):
        gradients = [{"w": roots[0] @ normal(1000 * seed + t, m, n) @ roots[1]} for t in range(200)]
        curvs = {name: dykaf.init(gradients[0]) for name in ("ksl", "bug")}
        square = shampoo.init(gradients[0], squared=True)
        truth = second_moment([gradients[0]["w"]], [1.0])
        for gradient in gradients[1:]:
            truth = decay * truth + second_moment([gradient["w"]], [1 - decay])
            curvs = {name: dykaf.update(x, gradient, decay, integrator=name) for name, x in curvs.items()}
            square = shampoo.update(square, gradient, decay)
        curvs["shampoo"] = square
        errors["best"].append(relative_error(nearest(truth, m, n), truth))
        for name, curv in curvs.items():
            errors[name].append(relative_error(curv.to_dense(), truth))
    best, ksl, bug, square_error = (sum(errors[name]) / 3 for name in ("best", "ksl", "bug", "shampoo"))
    assert best < ksl <= 1.02 * best
    assert best < bug <= 1.02 * best
    assert ksl < square_error


@moderately
@given(
    gradients=streams(st.lists(st.integers(1, 3), min_size=2, max_size=3).map(tuple)), spike=st.sampled_from([1, 1e4])
)
def test_factors_are_positive_semidefinite_after_spikes(gradients: list[Any], spike: float) -> None:
    gradients = [
        {f"p{i}": leaf * (spike if t == 1 else 1) for i, leaf in enumerate(leaves(g))} for t, g in enumerate(gradients)
    ]
    curv = run(dykaf, gradients, 0.9)
    for name in curv.domain.names:
        scale, units = state(curv, name)
        assert float(scale) >= 0
        for factor in units:
            assert float(torch.linalg.eigvalsh(factor)[0]) >= -tolerance(gradients[0]) * 1e-2


@pytest.mark.parametrize("start", ["random", "identity"])
def test_other_starts_take_a_sweep_towards_the_first_gradient(start: str) -> None:
    d = normal(0, 3, 4)
    curv = dykaf.init({"w": d}, start=start, generator=torch.Generator().manual_seed(5))
    scale, (left, right) = state(curv, "w")
    exact = d.mT @ left @ d
    assert int(torch.linalg.matrix_rank(left)) == 3  # where the singular vectors alone would give 1
    if start == "identity":
        size, units = 1e-3 * d.square().sum(), [torch.eye(n, dtype=torch.float64) / n**0.5 for n in (3, 4)]
        expected = size * units[0] + d @ units[1] @ d.mT
        assert relative_error(left, expected / expected.norm()) <= 1e-12
        assert relative_error(scale * right, size * (left * units[0]).sum() * units[1] + exact) <= 1e-12
        one = dykaf.init({"w": torch.outer(d[:, 0], d[0])}, start=start)
        assert float(one.eigenvalues()[0]) > 1e-9 * float(one.trace())
    else:
        assert relative_error(scale * right, exact) <= 1e-12
        other = dykaf.init({"w": d}, start=start, generator=torch.Generator().manual_seed(6))
        assert relative_error(other.to_dense(), curv.to_dense()) > 1e-3
        again = dykaf.init({"w": d}, start=start, generator=torch.Generator().manual_seed(5))
        assert torch.equal(again.to_dense(), curv.to_dense())


def test_wide_sides_have_the_nearest_diagonal_factor() -> None:
    gradients = [{"w": normal(t, 2, 6)} for t in range(3)]
    curv = run(dykaf, gradients, 0.5, wide=cv.WideDiagonal(above=5))
    block = curv.blocks["w"]
    assert isinstance(block, Kronecker)
    assert isinstance(block.right, Diagonal)
    old = run(dykaf, gradients[:2], 0.5, wide=cv.WideDiagonal(above=5))
    target = 0.5 * old.to_dense() + second_moment([gradients[2]["w"]], [0.5])
    diagonal = target.reshape(2, 6, 2, 6).diagonal(dim1=1, dim2=3)  # the entries that such a product can have
    left = torch.einsum("ijk,k->ij", diagonal, old.blocks["w"].right.diag())
    left = left / left.norm()
    right = torch.einsum("ijk,ij->k", diagonal, left)
    assert relative_error(curv.to_dense(), torch.kron(left, torch.diag(right))) <= 1e-11
    with pytest.raises(cv.errors.ArgumentError, match="block 'w': a tensor of order 3 has an axis too wide"):
        dykaf.init({"w": normal(0, 2, 6, 2)}, wide=cv.WideDiagonal(above=5))


@pytest.mark.parametrize("integrator", ["ksl", "bug"])
@pytest.mark.parametrize("decay", [0.5, None])
def test_two_wide_sides_have_the_nearest_diagonal_factors(decay: float | None, integrator: str) -> None:
    old = run(dykaf, [{"w": normal(t, 4, 6)} for t in range(2)], 0.5, wide=cv.WideDiagonal(above=3))
    d = {"w": normal(9, 4, 6)}
    curv = dykaf.update(old, d, decay, integrator=integrator)
    block = curv.blocks["w"]
    assert isinstance(block, Kronecker)
    assert [type(side) for side in (block.left.base, block.right)] == [Diagonal, Diagonal]
    keep, weight = (1.0, 1.0) if decay is None else (decay, 1 - decay)
    target = (
        keep * old.to_dense().diagonal().reshape(4, 6) + weight * d["w"].square()
    )  # all that such a product can have
    if integrator == "ksl":
        left = target @ old.blocks["w"].right.diag()
        left = left / left.norm()
        assert relative_error(curv.to_dense(), torch.diag(torch.outer(left, left @ target).flatten())) <= 1e-11
    left, right = block.left.diag(), block.right.diag()
    found = torch.outer(left, right)
    best = torch.linalg.svd(target)[1]
    assert best[1:].norm() - 1e-12 <= (found - target).norm() <= 1.2 * best[1:].norm()


@pytest.mark.parametrize("start", ["svd", "random", "identity"])
def test_many_sweeps_on_two_wide_sides_give_the_best_product_of_diagonals(start: str) -> None:
    first, second = ({"w": normal(t, 4, 6)} for t in range(2))
    curv = dykaf.init(first, start=start, wide=cv.WideDiagonal(above=3))
    target = 0.7 * curv.to_dense().diagonal().reshape(4, 6) + 0.3 * second["w"].square()
    u, s, vh = torch.linalg.svd(target)
    curv = dykaf.update(curv, second, 0.7, sweeps=200)
    assert relative_error(curv.diag()["w"], s[0] * torch.outer(u[:, 0], vh[0])) <= 1e-10


def test_a_zero_curvature_starts_from_the_identity() -> None:
    zero, d = {"w": torch.zeros(3, 4, dtype=torch.float64)}, {"w": normal(0, 3, 4)}
    for curv in (dykaf.init(zero), dykaf.update(dykaf.init(zero, start="random"), zero, 0.5)):
        assert float(curv.trace()) == 0
    started = dykaf.update(dykaf.init(zero), d, 0.9)
    left = d["w"] @ d["w"].mT
    left = left / left.norm()
    expected = torch.kron(left, d["w"].mT @ left @ d["w"])
    assert relative_error(started.to_dense(), 0.1 * expected) <= 1e-12


def test_a_merged_curvature_goes_on_from_what_it_is() -> None:
    one, other = (run(dykaf, [{"w": normal(10 * s + t, 3, 2)} for t in range(3)], 0.5) for s in range(2))
    merged = cv.merge_factors(one, other)
    assert (
        relative_error(dykaf.update(merged, {"w": torch.zeros(3, 2).double()}, 1.0).to_dense(), merged.to_dense())
        <= 1e-12
    )


# --- from a model's examples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("start", ["svd", "random", "identity"])
def test_many_sweeps_over_examples_give_the_product_nearest_to_the_empirical_fisher(reduction: str, start: str) -> None:
    for model in ("linear", "tied", "embeddings", "linear on tokens"):
        case = ZOO[model]()
        curv = dykaf(
            case.model_fn,
            case.params,
            case.batch(),
            loss=cv.CrossEntropy(reduction),
            per_example=True,
            sweeps=100,
            start=start,
        )
        for name, block in curv.blocks.items():
            if isinstance(block, Kronecker):
                d = gradient_blocks(case, curv, name)
                count = case.batch()[1].numel() if reduction == "mean" else 1
                fisher = second_moment(list(d), [1 / count] * len(d))
                assert relative_error(block.to_dense(), nearest(fisher, *block.shape)) <= 1e-8, (model, name)


def test_of_a_loader_every_batch_is_a_step_towards_the_sum() -> None:
    case = problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(1, 12, 3), "mse", "mean")
    loader = list(zip(*(x.split([5, 4, 3]) for x in case.batch), strict=True))
    for integrator in ("ksl", "bug"):
        options: dict[str, Any] = {"per_example": True, "integrator": integrator}
        curv = dykaf(case.model_fn, case.params, cv.over(loader), loss=cv.MSE(), **options)
        total = dykaf(case.model_fn, case.params, cv.over(loader), loss=cv.MSE("sum"), **options)
        assert relative_error(curv.to_dense(), total.to_dense() / case.batch[1].numel()) <= 1e-11
        exact = case.blocks(case.empirical_fisher())
        one = dykaf(case.model_fn, case.params, case.batch, loss=cv.MSE(), per_example=True, sweeps=100)
        best = relative_error(one.to_dense(), exact)
        assert best <= relative_error(curv.to_dense(), exact) + 1e-12 <= 1.3 * best


def test_wide_sides_of_examples_have_diagonal_factors() -> None:
    case = problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(1, 12, 3), "mse", "mean")
    curv = dykaf(
        case.model_fn,
        case.params,
        case.batch,
        loss=cv.MSE(),
        per_example=True,
        sweeps=100,
        wide=cv.WideDiagonal(above=4),
    )
    block, dense = curv.blocks["2.weight"], case.empirical_fisher()
    assert isinstance(block, Kronecker)
    assert isinstance(block.right, Diagonal)
    kept = dense[-10:, -10:]  # ravel has the bias first
    order = torch.tensor([2, 3, 4, 5, 0, 6, 7, 8, 9, 1])
    kept = kept[order][:, order].reshape(2, 5, 2, 5).diagonal(dim1=1, dim2=3).reshape(4, 5)
    u, s, vh = torch.linalg.svd(kept)
    expected = s[0] * torch.kron(u[:, 0].reshape(2, 2).contiguous(), torch.diag(vh[0]))
    assert relative_error(block.to_dense(), expected) <= 1e-10


def test_mistakes_are_named() -> None:
    d = {"w": normal(0, 2, 3), "t": normal(1, 2, 2, 2)}
    curv = dykaf.init(d)
    with pytest.raises(cv.errors.ArgumentError, match="integrator must be one of ksl, bug"):
        dykaf.update(curv, d, 0.5, integrator="euler")
    with pytest.raises(cv.errors.ArgumentError, match="block 't': integrator='bug' is for matrices"):
        dykaf.update(curv, d, 0.5, integrator="bug")
    with pytest.raises(cv.errors.ArgumentError, match="sweeps must be at least 1"):
        dykaf.update(curv, d, 0.5, sweeps=0)
    with pytest.raises(cv.errors.ArgumentError, match="and 1 for integrator='bug'"):
        dykaf.update(curv, d, 0.5, sweeps=2, integrator="bug")
    with pytest.raises(cv.errors.ArgumentError, match="start must be one of svd, random, identity"):
        dykaf.init(d, start="zero")
