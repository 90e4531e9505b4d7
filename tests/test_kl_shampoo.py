"""KL-Shampoo's curvature against its formulas, and against the likelihood that it makes greatest."""

from __future__ import annotations

import math
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
    streams,
    tolerance,
    unfolding,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_zoo import ZOO
from torch import Tensor, nn

import curvlib as cv
from curvlib.estimators import kl_shampoo
from curvlib.operators import Diagonal, Kronecker, ScaledPower
from tests.operators.operator_cases import Random, generator

moderately = settings(deadline=None, max_examples=15)
matrices = st.lists(st.integers(1, 3), min_size=2, max_size=4).map(tuple)


def stepped(old: list[Tensor], d: Tensor, decay: float) -> list[Tensor]:
    """decay F_i + (1 - decay) n_i / (n_1 ... n_d) D_(i) (the inverse of all other factors) D_(i)^T."""
    new = []
    for i, factor in enumerate(old):
        middle = kron([torch.linalg.inv(x) for j, x in enumerate(old) if j != i])
        share = (1 - decay) * len(factor) / d.numel()
        new.append(decay * factor + share * unfolding(d, i) @ middle @ unfolding(d, i).mT)
    return new


@moderately
@given(gradients=streams(matrices), decay=st.sampled_from([0.5, 0.9]))
def test_every_factor_is_the_formulas(gradients: list[Any], decay: float) -> None:
    curv = run(kl_shampoo, gradients, decay)
    for name, *stream in zip(curv.domain.names, *map(leaves, gradients), strict=True):
        mean, order = float(stream[0].double().square().mean()), stream[0].ndim
        expected = [mean ** (1 / order) * torch.eye(n, dtype=torch.float64) for n in stream[0].shape]
        for d in stream[1:]:
            expected = stepped(expected, d, decay)
        for actual, factor in zip(factors(curv, name), expected, strict=True):
            assert relative_error(actual, factor) <= 10 * tolerance(gradients[0])


def test_the_first_gradient_gives_its_mean_square() -> None:
    gradients = {"m": normal(0, 3, 2), "t": normal(1, 2, 2, 3)}
    curv = kl_shampoo.init(gradients)
    for name, g in gradients.items():
        expected = g.square().mean() * torch.eye(g.numel(), dtype=torch.float64)
        assert relative_error(curv.blocks[name].to_dense(), expected) <= 1e-12


def test_a_sum_is_the_running_mean_times_the_number_of_gradients() -> None:
    gradients = [{"w": normal(t, 3, 2)} for t in range(5)]
    total, mean = kl_shampoo.init(gradients[0]), kl_shampoo.init(gradients[0])
    for t, gradient in enumerate(gradients[1:], 1):
        total = kl_shampoo.update(total, gradient, None)
        mean = kl_shampoo.update(mean, gradient, t / (t + 1))
    assert relative_error(total.to_dense(), 5 * mean.to_dense()) <= 1e-12
    double = kl_shampoo.update(2.0 * kl_shampoo.init(gradients[0]), gradients[1], None)
    expected = kl_shampoo.update(kl_shampoo.init(gradients[0]), gradients[1], 2 / 3)
    assert relative_error(double.to_dense(), 3 * expected.to_dense()) <= 1e-12


def test_a_zero_curvature_starts_with_the_next_gradient() -> None:
    zero, d = {"w": torch.zeros(3, 2, dtype=torch.float64)}, {"w": normal(0, 3, 2)}
    started = kl_shampoo.update(kl_shampoo.init(zero), d, 0.9)
    assert relative_error(started.to_dense(), kl_shampoo.init(d, 0.9).to_dense()) <= 1e-12
    total = kl_shampoo.update(kl_shampoo.init(zero), d, None)
    assert relative_error(total.to_dense(), 2 * kl_shampoo.init(d, 0.5).to_dense()) <= 1e-12


def test_wide_sides_have_diagonal_factors() -> None:
    gradients = [{"w": normal(t, 2, 6)} for t in range(3)]
    curv = run(kl_shampoo, gradients, 0.5, wide=cv.WideDiagonal(above=5))
    block = curv.blocks["w"]
    assert isinstance(block, Kronecker)
    assert isinstance(block.right, Diagonal)
    left, right = (gradients[0]["w"].square().mean().sqrt() * torch.eye(n, dtype=torch.float64) for n in (2, 6))
    for gradient in gradients[1:]:
        left, right = stepped([left, right], gradient["w"], 0.5)
        right = torch.diag(right.diagonal())
    assert relative_error(block.to_dense(), torch.kron(left, right)) <= 1e-11


# --- the greatest likelihood ------------------------------------------------------------------------------------------


def linear_in(observations: Tensor, reduction: str) -> tuple[Any, Any, Any]:
    """A model whose per-example gradients are these matrices [N, m, n]: the sum of W o D_n over positions."""
    count, m, n = observations.shape

    def model_fn(params: Any, inputs: Any) -> Tensor:
        rows, columns = inputs  # one position a row of D: e_i and its entries
        hidden = columns @ params["w"].mT
        return (rows * hidden).sum((1, 2)).unsqueeze(1)

    unit = torch.eye(m, dtype=torch.float64).expand(count, m, m)
    params = {"w": torch.zeros(m, n, dtype=torch.float64)}
    loss = cv.CustomLoss(lambda f, _: f.squeeze(1), reduction)
    return model_fn, params, ((unit, observations), torch.zeros(count)), loss


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 4), n=st.integers(1, 4), reduction=st.sampled_from(["mean", "sum"]))
def test_a_kronecker_second_moment_is_found_exactly(seed: int, m: int, n: int, reduction: str) -> None:
    random = Random(generator(seed))
    a, b = random.definite(m), random.definite(n)
    roots = torch.linalg.cholesky(a), torch.linalg.cholesky(b)
    unit = torch.eye(m * n, dtype=torch.float64).reshape(m * n, m, n)
    observations = roots[0] @ unit @ roots[1].mT  # E[g g^T] is A (x) B / (m n)
    model_fn, params, batch, loss = linear_in(observations, reduction)
    curv = kl_shampoo(model_fn, params, batch, loss=loss, per_example=True, sweeps=2)
    expected = torch.kron(a, b) / (m * n if reduction == "mean" else 1)
    assert relative_error(curv.to_dense(), expected) <= 1e-10


def divergence(curv: Tensor, fisher: Tensor) -> float:
    """Minus twice the mean log-likelihood of draws with this second moment under N(0, curv), but for a constant."""
    return float(torch.logdet(curv) + torch.linalg.solve(curv, fisher).trace())


def test_no_other_kronecker_product_is_likelier() -> None:
    observations = normal(0, 60, 3, 2) * torch.tensor([1.0, 3.0]) + normal(1, 60, 1, 1) * normal(2, 3, 2)
    model_fn, params, batch, loss = linear_in(observations, "mean")
    curv = kl_shampoo(model_fn, params, batch, loss=loss, per_example=True, sweeps=50)
    rows = observations.flatten(1)
    fisher = rows.mT @ rows / 60
    best = divergence(curv.to_dense(), fisher)
    left, right = factors(curv, "w")
    # both equations of the fixed point
    moments = (
        (observations @ torch.linalg.inv(right) @ observations.mT).mean(0) / 2,
        (observations.mT @ torch.linalg.inv(left) @ observations).mean(0) / 3,
    )
    for actual, expected in zip((left, right), moments, strict=True):
        assert relative_error(actual, expected) <= 1e-6  # sqrt(eps) is added to what is inverted
    random = Random(generator(0))
    for size in (1e-3, 1e-1):
        for _ in range(20):
            noise = [size * random.normal(k, k) for k in (3, 2)]
            p, q = (torch.linalg.matrix_exp(x + x.mT) for x in noise)
            assert divergence(torch.kron(p @ left @ p, q @ right @ q), fisher) > best - 1e-9
    for how in (cv.tkfac, cv.kfac):
        other = how(model_fn, params, batch, loss=loss, fisher="empirical")
        assert divergence(other.damp(1e-9).to_dense(), fisher) > best
    fewer = kl_shampoo(model_fn, params, batch, loss=loss, per_example=True, sweeps=1)
    assert divergence(fewer.to_dense(), fisher) > best


@pytest.mark.parametrize("wide", [8192, 3])
def test_a_loader_of_examples_is_one_big_batch(wide: int) -> None:
    case = problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(1, 40, 3), "mse", "mean")
    loader = list(zip(*(x.split([17, 20, 3]) for x in case.batch), strict=True))
    options: dict[str, Any] = {"loss": cv.MSE(), "per_example": True, "wide": cv.WideDiagonal(above=wide)}
    parts, whole = (kl_shampoo(case.model_fn, case.params, batch, **options) for batch in (cv.over(loader), case.batch))
    assert relative_error(parts.to_dense(), whole.to_dense()) <= 1e-9
    sides = {type(x.left.base) for x in whole.blocks.values()} | {type(x.right) for x in whole.blocks.values()}
    assert (Diagonal in sides) == (wide == 3)


@pytest.mark.parametrize("model", ["linear", "tied", "conv2d with groups", "embeddings", "linear on tokens"])
def test_a_sweep_solves_for_the_left_factor_and_then_for_the_right_one(model: str) -> None:
    case = ZOO[model]()
    loss = cv.CrossEntropy("sum")
    curv = kl_shampoo(case.model_fn, case.params, case.batch(), loss=loss, per_example=True, sweeps=1)
    for name, block in curv.blocks.items():
        if not isinstance(block, Kronecker):
            continue
        d = gradient_blocks(case, curv, name)
        m, n = d.shape[-2:]
        mean = d.square().sum(0).mean((-2, -1), keepdim=True)
        left = (d @ d.mT).sum(0) / (n * mean.sqrt())
        identity = torch.eye(m, dtype=torch.float64)
        trace = left.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        inverse = torch.linalg.inv(left + 2.0**-26 * trace * identity)
        span = (left * inverse).sum((-2, -1))[..., None, None]
        right = (d.mT @ inverse @ d).sum(0) / span
        assert relative_error(block.left.matrices(), left) <= 1e-10
        assert relative_error(block.right.matrices(), right) <= 1e-6  # singular factors are inverted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_few_examples_have_singular_factors_and_nothing_breaks(dtype: torch.dtype) -> None:
    model_fn, params, ((unit, rows), targets), loss = linear_in(normal(3, 2, 5, 6), "sum")
    params, batch = {"w": params["w"].to(dtype)}, ((unit.to(dtype), rows.to(dtype)), targets)
    curv = kl_shampoo(model_fn, params, batch, loss=loss, per_example=True, sweeps=20)
    values = curv.eigenvalues()
    assert bool(values.isfinite().all())
    assert float(values[0]) >= -10 * torch.finfo(dtype).eps * float(values[-1])
    truth = float(rows.square().sum())
    assert 0.01 * truth <= float(curv.trace()) <= 100 * truth
    assert math.isfinite(float(curv.inverse(1e-3 * float(values[-1])).trace()))


def test_mistakes_are_named() -> None:
    case = ZOO["linear"]()
    with pytest.raises(cv.errors.ArgumentError, match="sweeps must be at least 1"):
        kl_shampoo(case.model_fn, case.params, case.batch(), per_example=True, sweeps=0)
    with pytest.raises(cv.errors.ArgumentError, match="more than once"):
        kl_shampoo(case.model_fn, case.params, cv.over(iter([case.batch()])), per_example=True)
    block = kl_shampoo.init({"w": torch.ones(2, 2)}).blocks["w"]
    assert isinstance(block, Kronecker)
    assert isinstance(block.left, ScaledPower)
