"""The brute force agrees with itself: different definitions of the same matrix."""

from __future__ import annotations

import pytest
import reference
import torch
from exactness_problems import normal, problem
from torch import nn

import curvlib as cv

MLP = (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("kind", "likelihood"), [("cross-entropy", "categorical"), ("bernoulli", "bernoulli"), ("mse", "gaussian")]
)
def test_ggn_is_the_fisher_of_the_likelihood(kind: str, likelihood: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(1, 3, 3), kind, "sum")
    fisher = reference.type_2_fisher(case.model_fn, case.params, case.batch, case.kind.objective, likelihood)
    assert reference.relative_error(fisher, case.ggn()) <= 1e-12


@pytest.mark.parametrize("kind", ["cross-entropy", "bernoulli", "mse", "custom", "smoothed", "ignored"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ggn_of_a_model_that_is_linear_in_its_parameters_is_the_hessian(kind: str, reduction: str) -> None:
    case = problem(nn.Linear(3, 2), normal(1, 4, 3), kind, reduction)
    inputs, targets = case.batch

    def value(vector: torch.Tensor) -> torch.Tensor:
        outputs = case.model_fn(cv.unravel(vector, case.params), inputs)
        return case.kind.objective(outputs, targets, reduction)

    hessian = torch.func.hessian(value)(cv.ravel(case.params))
    assert reference.relative_error(case.ggn(), hessian) <= 1e-12


def test_jacobians_do_not_depend_on_the_mode_of_differentiation() -> None:
    case = problem(nn.Sequential(*MLP), normal(1, 3, 3), "mse", "sum")
    found = reference.jacobians(case.model_fn, case.params, case.batch[0])
    flat = torch.func.jacfwd(lambda v: case.model_fn(cv.unravel(v, case.params), case.batch[0]))
    torch.testing.assert_close(found, flat(cv.ravel(case.params)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["cross-entropy", "ignored", "mse"])
def test_gradients_of_examples_sum_to_the_gradient_of_the_objective(kind: str) -> None:
    case = problem(nn.Sequential(*MLP), normal(1, 4, 3), kind, "mean")
    inputs, targets = case.batch
    whole = torch.func.grad(lambda p: case.kind.objective(case.model_fn(p, inputs), targets, "mean"))(case.params)
    divisor = reference.divisor(case.model_fn(case.params, inputs), targets, case.kind.objective, "mean")
    parts = reference.gradients(case.model_fn, case.params, case.batch, case.kind.objective)
    torch.testing.assert_close(parts.sum(0) / divisor, cv.ravel(whole), rtol=1e-12, atol=1e-14)


def test_block_diagonal_keeps_layers_groups_and_elements_apart() -> None:
    params = {"0.bias": torch.zeros(2), "0.weight": torch.zeros(2, 1), "1.weight": torch.zeros(2)}
    ones = torch.ones(6, 6)
    layers = reference.block_diagonal(ones, reference.block_labels(params))
    assert torch.equal(layers, torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)))
    groups = reference.block_diagonal(ones, reference.block_labels(params, groups={"0": 2}))
    assert torch.equal(groups[:4, :4], torch.eye(2).repeat(2, 2))
    elements = reference.block_diagonal(ones, reference.block_labels(params, diagonal=("1",)))
    assert torch.equal(elements[4:, 4:], torch.eye(2))
