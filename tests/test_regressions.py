"""Eight bugs that second-order optimizers have had, each of which the design makes impossible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import normal, problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import curvlib as cv

X, Y = normal(0, 6, 3), torch.tensor([0, 1, 1, 0, 1, 0])


def factors(seed: int) -> cv.Kronecker:
    left, right = normal(seed, 4, 4), normal(seed + 1, 3, 3)
    return cv.Kronecker(cv.Dense(left @ left.T), cv.Dense(right @ right.T))


# 1. a stale cache of the inverse after a factor update
def test_an_inverse_belongs_to_the_factors_it_was_made_from() -> None:
    old, new, v = factors(0), factors(2), normal(5, 4, 3)
    before = old.inverse(0.1) @ v
    for updated in (cv.ema(old, new, 0.5), old + new, 2.0 * old):
        damped = updated.to_dense() + 0.1 * torch.eye(12, dtype=torch.float64)
        expected = torch.linalg.solve(damped, v.reshape(-1)).reshape(4, 3)
        torch.testing.assert_close(updated.inverse(0.1) @ v, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(old.inverse(0.1) @ v, before)


def test_not_even_a_factor_changed_in_place_leaves_a_stale_inverse() -> None:
    curv, v = factors(0), normal(5, 4, 3)
    curv.inverse(0.1)
    assert isinstance(curv.left, cv.Dense)
    curv.left.matrix.mul_(3.0)
    damped = curv.to_dense() + 0.1 * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(damped, v.reshape(-1)).reshape(4, 3)
    torch.testing.assert_close(curv.inverse(0.1) @ v, expected, rtol=1e-9, atol=1e-12)


# 2. layers without a gradient reusing the previous layer's tensors
@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_a_layer_that_does_not_reach_the_output_has_no_curvature(engine: str, fisher: str) -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ p["a"])
        hidden @ p["dead"] + p["dead bias"]
        return hidden @ p["b"]

    params = {name: normal(i, 3, 3) for i, name in enumerate(("a", "dead"))} | {"b": normal(7, 3, 2)}
    params["dead bias"] = normal(8, 3)
    curv = cv.kfac(model_fn, params, (X, Y), engine=engine, fisher=fisher)
    assert curv.blocks["dead"].trace() == 0
    assert curv.blocks["a"].trace() > 0
    assert curv.blocks["b"].trace() > 0


# 3. a path without eigenvalue correction that throws the factors away
def test_without_eigenvalue_correction_the_spectrum_is_that_of_the_factors() -> None:
    curv = factors(0)
    assert isinstance(curv.left, cv.Dense)
    assert isinstance(curv.right, cv.Dense)
    mu, nu = torch.linalg.eigvalsh(curv.left.matrix), torch.linalg.eigvalsh(curv.right.matrix)
    joint = torch.outer(mu, nu).flatten().sort().values
    torch.testing.assert_close(curv.eigenvalues(), joint, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(curv.inverse(0.1).eigenvalues(), (1 / (joint + 0.1)).flip(0), rtol=1e-10, atol=1e-12)


# 4. a second forward pass
@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])
@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_the_model_computes_its_outputs_once(engine: str, fisher: str) -> None:
    real: list[bool] = []

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        real.append(type(x).__name__ != "FakeTensor")
        return torch.tanh(x @ p["a"]) @ p["b"]

    params = {"a": normal(1, 3, 3), "b": normal(2, 3, 2)}
    cv.kfac(model_fn, params, (X, Y), fisher=fisher, engine=engine)
    assert sum(real) == 1
    plan = cv.plan(model_fn, params, X)
    real.clear()
    cv.kfac(model_fn, params, (X, Y), fisher=fisher, engine=engine, plan=plan)
    assert real == [True]


# 5. clamping eigenvalues instead of adding the damping
def test_damping_is_added() -> None:
    curv = cv.Kronecker(cv.Diagonal(torch.tensor([4.0, 1.0])), cv.Diagonal(torch.tensor([1.0, 0.0])))
    expected = torch.tensor([[1 / 4.5, 1 / 0.5], [1 / 1.5, 1 / 0.5]])
    torch.testing.assert_close(curv.inverse(0.5) @ torch.ones(2, 2), expected)
    clamped = curv.map_eigenvalues(lambda eigenvalues: eigenvalues.clamp(min=0.5))  # a step of its own, by name
    torch.testing.assert_close(clamped.inverse(0.0) @ torch.ones(2, 2), torch.tensor([[0.25, 2.0], [1.0, 2.0]]))


# 6. diag(...) matrices in powers and products; 7. a wide output layer allocating vocabulary x vocabulary
class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_powers_and_products_never_make_a_matrix_of_the_size_of_the_block() -> None:
    curv, v = factors(0), normal(5, 4, 3)
    with LargestTensor() as largest:
        for p in (-1.0, -0.5, 0.5, 2.0):
            curv.power(p, 0.1) @ v
            curv.power(p, cv.FactoredTikhonov(0.1)) @ v
        curv.inverse(0.1).diag()
        curv.inverse(0.1).sample(torch.Generator().manual_seed(0))
        curv.damp(0.1).logdet()
    assert largest.numel <= 16  # the larger of the two sides; the block has 144 entries


@pytest.mark.parametrize("fisher", ["mc", "empirical", "forward-only"])
def test_a_vocabulary_of_50257_never_makes_a_square_matrix(fisher: str) -> None:
    vocabulary, width, positions = 50257, 16, 4
    params = {"embedding": 0.1 * torch.randn(vocabulary, width), "head": 0.1 * torch.randn(vocabulary, width)}

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.embedding(x, p["embedding"])), p["head"])

    tokens = torch.randint(vocabulary, (2, positions))
    plan = cv.plan(model_fn, params, tokens)
    with LargestTensor() as largest:
        curv = cv.kfac(model_fn, params, (tokens, tokens), fisher=fisher, engine="functional", plan=plan)
        step = curv.inverse(1e-3) @ params
        curv.inverse(cv.FactoredTikhonov(1e-3)) @ params
        curv.inverse(1e-3).diag()
        curv.damp(1e-3).logdet()
        curv.inverse(1e-3).sample(torch.Generator().manual_seed(0))
    assert largest.numel <= vocabulary * width**2  # a small matrix a token
    assert step["head"].shape == (vocabulary, width)


def test_a_tied_vocabulary_of_50257_never_makes_a_square_matrix() -> None:
    vocabulary, width = 50257, 16
    params = {"table": 0.1 * torch.randn(vocabulary, width)}
    tokens = torch.randint(vocabulary, (2, 4))

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.embedding(x, p["table"])), p["table"])

    plan = cv.plan(model_fn, params, tokens)
    with LargestTensor() as largest:
        total = cv.kfac(model_fn, params, (tokens, tokens), engine="functional", plan=plan)
        total.inverse(1e-3) @ params
        curv = cv.kfac(model_fn, params, (tokens, tokens), engine="functional", plan=plan, tied="merge")
        curv.power(-0.5, 1e-3) @ params
        curv.damp(1e-3).logdet()
        curv.inverse(1e-3).sample(torch.Generator().manual_seed(0))
        curv.power(-0.5, cv.FactoredTikhonov(1e-3)).project(cv.sketch(params, rank=4))(params)
    assert largest.numel <= vocabulary * width**2  # a small matrix a token


# 8. the bias handled differently in the factor and in the gradient
def test_a_frozen_bias_leaves_the_weights_block_without_its_column() -> None:
    net = nn.Sequential(nn.Linear(3, 2)).double()
    net[0].bias.requires_grad_(False)
    model_fn, params = cv.functional(net)
    curv = cv.kfac(model_fn, params, (X, Y), fisher="type-2")
    assert curv.blocks["0.weight"].shape == (2, 3)
    step = curv.inverse(0.1) @ params
    assert {name: leaf.shape for name, leaf in step.items()} == {"0.weight": (2, 3)}
    case = problem(nn.Sequential(nn.Linear(3, 2, bias=False)), X, "cross-entropy", "mean")
    assert case.kfac().blocks["0.weight"].shape == (2, 3)


def test_the_bias_is_the_last_column_of_factor_and_vector_alike() -> None:
    case = problem(nn.Sequential(nn.Linear(3, 2)), X, "cross-entropy", "mean")
    block = case.kfac().blocks["0.weight"]
    assert isinstance(block, cv.Kronecker)
    vector = {name: normal(i, *leaf.shape) for i, (name, leaf) in enumerate(case.params.items())}
    joined = torch.cat([vector["0.weight"], vector["0.bias"].unsqueeze(1)], 1)
    assert isinstance(block.left, cv.Dense)
    assert isinstance(block.right, cv.Dense)
    product = block.left.matrix @ joined @ block.right.matrix
    result = case.kfac() @ vector
    torch.testing.assert_close(result["0.weight"], product[:, :3], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result["0.bias"], product[:, 3], rtol=1e-12, atol=1e-14)


# Nor may what a layer reads change under our hands: models write in place
@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_inputs_that_the_model_changes_in_place_later_are_taken_as_they_were(engine: str) -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor, *, in_place: bool) -> Tensor:
        hidden = x @ p["0.w"]
        scaled = torch.tanh(hidden * p["1.s"] + hidden @ p["2.v"])
        hidden = hidden.mul_(3.0) if in_place else hidden * 3.0
        return (scaled + hidden) @ p["3.o"]

    params = {"0.w": normal(1, 3, 4), "1.s": normal(2, 4), "2.v": normal(3, 4, 4), "3.o": normal(4, 4, 2)}
    for estimate in (cv.kfac, cv.ekfac, cv.tkfac, cv.diagonal):
        one, other = (
            estimate(
                lambda p, x, how=how: model_fn(p, x, in_place=how), params, (X, Y), fisher="empirical", engine=engine
            ).to_dense()
            for how in (True, False)
        )
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
