"""Where KFAC must equal the exact curvature, and where it must not: layers without weight sharing.

KFAC is exact whenever either the inputs of a layer or its backpropagated vectors do not depend on the example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from exactness_problems import (
    CONSTANT_HESSIAN,
    KINDS,
    assert_exact,
    coupled,
    deep_linear,
    engines,
    few,
    generator,
    normal,
    problem,
    reductions,
    seeds,
    unshared_architectures,
)
from hypothesis import given
from hypothesis import strategies as st
from pairwise import every_pair
from torch import Tensor, nn

import curvlib as cv

MLP = (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


# --- exact ------------------------------------------------------------------------------------------------------


@few
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    bias=st.booleans(),
    examples=st.integers(1, 5),
    seed=seeds,
    reduction=reductions,
    engine=engines,
)
@pytest.mark.parametrize("kind", CONSTANT_HESSIAN)
def test_type_2_is_exact_for_deep_linear_nets(
    kind: str, widths: list[int], bias: bool, examples: int, seed: int, reduction: str, engine: str
) -> None:
    case = problem(deep_linear(widths, bias=bias), normal(seed, examples, widths[0]), kind, reduction, seed=seed)
    assert_exact(case.kfac(engine=engine), case.blocks(case.ggn()))


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: torch.nn.functional.linear(x, w.T, b),
    "matmul, then add": lambda x, w, b: x @ w + b,
    "add to matmul": lambda x, w, b: b + torch.matmul(x, w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "einsum": lambda x, w, b: torch.einsum("ni,io->no", x, w) + b,
    "weight first": lambda x, w, b: (w.T @ x.T).T + b,
    "mm": lambda x, w, b: torch.mm(x, w) + b,
}


@both_reductions
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_type_2_is_exact_for_every_spelling_of_a_linear_layer(spelling: str, reduction: str) -> None:
    layer = SPELLINGS[spelling]
    params = {"0.w": torch.zeros(3, 4), "0.b": torch.zeros(4), "1.w": torch.zeros(4, 2), "1.b": torch.zeros(2)}
    case = problem(
        lambda p, x: layer(layer(x, p["0.w"], p["0.b"]), p["1.w"], p["1.b"]),
        normal(1, 5, 3),
        "mse",
        reduction,
        params=params,
    )
    labels = reference.block_labels(params)
    if spelling == "weight first":  # its bias is added to a transpose of the product: a block of its own
        labels = {name: torch.full_like(leaf, i) for i, (name, leaf) in enumerate(params.items())}
    assert_exact(case.kfac(elementwise="dense"), reference.block_diagonal(case.ggn(), labels))


@every_pair("architecture, kind, reduction", unshared_architectures(), KINDS, ["mean", "sum"])
def test_type_2_is_exact_for_one_example(architecture: str, kind: str, reduction: str) -> None:
    case = problem(*unshared_architectures()[architecture], kind, reduction, seed=5)
    assert_exact(case.kfac(), case.blocks(case.ggn()))


@every_pair("architecture, kind, reduction", unshared_architectures(), KINDS, ["mean", "sum"])
def test_empirical_is_exact_for_one_example(architecture: str, kind: str, reduction: str) -> None:
    case = problem(*unshared_architectures()[architecture], kind, reduction, seed=6)
    assert_exact(case.kfac(fisher="empirical"), case.blocks(case.empirical_fisher()))


@both_reductions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_kfac_is_exact_where_all_inputs_are_equal(fisher: str, kind: str, reduction: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(2, 1, 3).expand(4, 3), kind, reduction, seed=1)
    if (fisher, kind) == ("type-2", "ignored"):
        return  # which outputs count depends on the example: see the next test
    truth = case.ggn() if fisher == "type-2" else case.empirical_fisher()
    assert_exact(case.kfac(fisher=fisher), case.blocks(truth))


@both_reductions
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "custom"])
def test_type_2_is_exact_where_backpropagated_vectors_are_equal(kind: str, reduction: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(2, 6, 3), kind, reduction, seed=2)
    case.params["0.weight"] = torch.zeros_like(case.params["0.weight"])  # the net is constant, its gradients are not
    assert_exact(case.kfac(), case.blocks(case.ggn()))


@few
@given(seed=seeds, examples=st.integers(1, 5), outputs=st.integers(1, 4), bias=st.booleans())
@both_reductions
def test_forward_only_is_the_last_layers_ggn_under_squared_error(
    reduction: str, seed: int, examples: int, outputs: int, bias: bool
) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs, bias=bias))
    case = problem(net, normal(seed, examples, 3), "mse", reduction, seed=seed)
    last = ("2.weight", "2.bias") if bias else ("2.weight",)
    ggn = reference.block(case.ggn(), case.params, *last)
    curv = reference.block(case.kfac(fisher="forward-only").to_dense(), case.params, *last)
    factor = 2 / outputs if reduction == "mean" else 2  # the mean divides by N C, of which N belongs to A
    assert reference.relative_error(factor * curv, ggn) <= 1e-10


@few
@given(seed=seeds, widths=st.lists(st.integers(1, 4), min_size=2, max_size=4), reduction=reductions)
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_a_feature_of_ones_is_a_bias(fisher: str, seed: int, widths: list[int], reduction: str) -> None:
    biased = problem(deep_linear(widths, bias=True), normal(seed, 4, widths[0]), "mse", reduction, seed=seed)

    def augmented(params: dict[str, Tensor], x: Tensor) -> Tensor:
        for name in sorted(params):
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1) @ params[name].T
        return x

    layers = [f"{i}" for i in range(len(widths) - 1)]
    joined = {i: torch.cat([biased.params[f"{i}.weight"], biased.params[f"{i}.bias"][:, None]], 1) for i in layers}
    loss = cv.MSE(reduction)
    by_hand = cv.kfac(augmented, joined, biased.batch, loss=loss, fisher=fisher)
    curv = biased.kfac(fisher=fisher)
    for i in layers:
        torch.testing.assert_close(
            by_hand.blocks[i].to_dense(), curv.blocks[f"{i}.weight"].to_dense(), rtol=1e-10, atol=1e-14
        )


# --- invariances ------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, kind=st.sampled_from(sorted(KINDS)))
@both_reductions
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_doubling_the_data_leaves_a_mean_and_doubles_a_sum(fisher: str, reduction: str, seed: int, kind: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(seed, 4, 3), kind, reduction, seed=seed)
    once = case.kfac(fisher=fisher).to_dense()
    batch = tuple(torch.cat([x, x]) for x in case.batch)
    twice = cv.kfac(case.model_fn, case.params, batch, loss=KINDS[kind].loss(reduction), fisher=fisher).to_dense()
    torch.testing.assert_close(twice, once if reduction == "mean" else 2 * once, rtol=1e-11, atol=1e-14)


@few
@given(seed=seeds, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), kind=st.sampled_from(sorted(KINDS)))
@every_pair("positions, fisher, reduction", [(), (3,)], ["type-2", "empirical", "forward-only"], ["mean", "sum"])
def test_a_data_set_in_ragged_batches_is_one_big_batch(
    positions: tuple[int, ...], fisher: str, reduction: str, seed: int, sizes: list[int], kind: str
) -> None:
    case = problem(nn.Sequential(*MLP), normal(seed, sum(sizes), *positions, 3), kind, reduction, seed=seed)
    loader = list(zip(*(x.split(sizes) for x in case.batch), strict=True))
    if kind == "ignored" and all(len(y) == 1 for _, y in loader) and not positions:
        loader = [case.batch]
    loss = KINDS[kind].loss(reduction)
    ragged = cv.kfac(case.model_fn, case.params, cv.over(loader), loss=loss, fisher=fisher)
    torch.testing.assert_close(ragged.to_dense(), case.kfac(fisher=fisher).to_dense(), rtol=1e-11, atol=1e-14)


@few
@given(seed=seeds, rotate=st.booleans())
@both_reductions
def test_rotated_outputs_of_a_layer_rotate_its_output_factor(reduction: str, seed: int, rotate: bool) -> None:
    orthogonal = torch.linalg.qr(normal(seed, 4, 4)).Q
    if not rotate:
        orthogonal = torch.eye(4, dtype=torch.float64)[torch.randperm(4, generator=generator(seed))]

    def turned(params: dict[str, Tensor], x: Tensor) -> Tensor:
        z = torch.nn.functional.linear(x, params["0.weight"], params["0.bias"])
        return torch.tanh(z @ orthogonal) @ params["2.weight"].T  # P^T z, row by row

    def straight(params: dict[str, Tensor], x: Tensor) -> Tensor:
        z = torch.nn.functional.linear(x, params["0.weight"], params["0.bias"])
        return torch.tanh(z) @ params["2.weight"].T

    shapes = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4), "2.weight": torch.zeros(2, 4)}
    case = problem(straight, normal(seed, 5, 3), "cross-entropy", reduction, params=shapes, seed=seed)
    moved = {name: orthogonal @ leaf if name.startswith("0") else leaf for name, leaf in case.params.items()}
    old = case.kfac().blocks["0.weight"]
    curv = cv.kfac(turned, moved, case.batch, loss=cv.CrossEntropy(reduction), fisher="type-2")
    new = curv.blocks["0.weight"]
    torch.testing.assert_close(new.left.matrix, orthogonal @ old.left.matrix @ orthogonal.T, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(new.right.matrix, old.right.matrix, rtol=1e-12, atol=1e-14)


@few
@given(seed=seeds)
@both_reductions
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_curvature_does_not_see_a_reparametrisation_of_the_outputs(fisher: str, reduction: str, seed: int) -> None:
    case = problem(nn.Sequential(*MLP), normal(seed, 5, 3), "custom", reduction, seed=seed)
    change = normal(seed + 1, 2, 2) + 2 * torch.eye(2, dtype=torch.float64)
    back = torch.linalg.inv(change)
    loss = cv.CustomLoss(lambda outputs, targets: coupled(outputs @ back.T, targets), reduction)
    curv = cv.kfac(
        lambda p, x: case.model_fn(p, x) @ change.T, case.params, case.batch, loss=loss, fisher=fisher
    ).to_dense()
    assert reference.relative_error(curv, case.kfac(fisher=fisher).to_dense()) <= 1e-10


# --- Monte Carlo ------------------------------------------------------------------------------------------------

LIKELIHOODS = ("mse", "cross-entropy", "bernoulli", "custom", "ignored")


@both_reductions
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_monte_carlo_approaches_type_2_like_one_over_the_root_of_the_draws(kind: str, reduction: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(3, 4, 3), kind, reduction, seed=3)
    exact, draws = case.kfac().to_dense(), torch.tensor([10, 100, 1000])

    def error(number: int) -> float:
        curvs = [case.kfac(fisher="mc", mc_samples=number, generator=generator(seed)) for seed in range(16)]
        return sum(reference.relative_error(curv.to_dense(), exact) for curv in curvs) / len(curvs)

    errors = torch.tensor([error(int(number)) for number in draws])
    x, y = draws.log() - draws.log().mean(), errors.log() - errors.log().mean()
    slope = float((x * y).sum() / x.square().sum())
    assert -0.6 <= slope <= -0.4, (slope, errors)


@both_reductions
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_25000_draws_are_within_5_percent_of_type_2(kind: str, reduction: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(4, 3, 3), kind, reduction, seed=4)
    curv = case.kfac(fisher="mc", mc_samples=25000, generator=generator(0))
    assert reference.relative_error(curv.to_dense(), case.kfac().to_dense()) <= 0.05


def test_without_a_generator_the_draws_are_those_of_seed_0() -> None:
    case = problem(nn.Sequential(*MLP), normal(4, 3, 3), "cross-entropy", "mean")
    expected = case.kfac(fisher="mc", mc_samples=2, generator=generator(0)).to_dense()
    assert torch.equal(case.kfac(fisher="mc", mc_samples=2).to_dense(), expected)
    other = case.kfac(fisher="mc", mc_samples=2, generator=generator(1)).to_dense()
    assert reference.relative_error(other, expected) > 1e-3


FIRST_LEAVES: dict[str, Any] = {
    "number": 2.0,
    "integer": 2,
    "flag": True,
    "scalar": torch.tensor(2.0, dtype=torch.float64),
    "integer scalar": torch.tensor(2),
    "nothing": None,
    "text": "twice",
}


@every_pair(
    "first, how, reduction",
    FIRST_LEAVES,
    [cv.kfac, cv.ekfac, cv.tkfac, cv.diagonal, cv.shampoo, cv.kl_shampoo, cv.dykaf],
    ["mean", "sum"],
)
def test_a_loader_may_give_inputs_whose_first_leaf_has_no_examples(first: str, how: Any, reduction: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(4, 5, 3), "cross-entropy", reduction)
    value = FIRST_LEAVES[first]
    factor = value if isinstance(value, (int, float, Tensor)) else 1.0
    x, y = case.batch

    def with_factor(p: Any, inputs: Any) -> Tensor:
        given, x = inputs
        return case.model_fn(p, x * (given if isinstance(given, (int, float, Tensor)) else 1.0))

    loader = list(zip(x.split([3, 2]), y.split([3, 2]), strict=True))
    options = {"loss": case.kind.loss(reduction)}
    if how in (cv.kfac, cv.ekfac, cv.tkfac, cv.diagonal):
        options["fisher"] = "empirical"
    curv = how(with_factor, case.params, cv.over([((value, a), b) for a, b in loader]), **options)
    expected = how(case.model_fn, case.params, cv.over([(a * factor, b) for a, b in loader]), **options)
    torch.testing.assert_close(curv.to_dense(), expected.to_dense(), rtol=1e-12, atol=1e-15)


# --- not exact --------------------------------------------------------------------------------------------------


@both_reductions
def test_empirical_is_not_exact_for_a_deep_linear_net_with_several_examples(reduction: str) -> None:
    case = problem(deep_linear([3, 4, 2], bias=True), normal(5, 6, 3), "mse", reduction)
    truth = case.blocks(case.empirical_fisher())
    assert reference.relative_error(case.kfac(fisher="empirical").to_dense(), truth) > 0.05


@both_reductions
@pytest.mark.parametrize("kind", ["mse", "cross-entropy"])
def test_type_2_is_not_exact_for_a_nonlinear_net_with_several_examples(kind: str, reduction: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(6, 6, 3), kind, reduction)
    assert reference.relative_error(case.kfac().to_dense(), case.blocks(case.ggn())) > 0.01
