"""Curvature of parameters and data that require gradients: nothing that is made of it is attached to their graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import every_pair
from torch import Tensor, nn

import curvlib as cv
from curvlib.operators import Operator
from curvlib.pytree import flatten

Problem = tuple[Any, Any, Any]


def problem(net: nn.Module | None = None) -> Problem:
    """A model whose parameters and data are results of other computations."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)) if net is None else net
    model_fn, params = cv.functional(net)
    params = {name: 1.0 * leaf.detach().requires_grad_() for name, leaf in params.items()}
    batch = tuple(1.0 * torch.randn(6, width).requires_grad_() for width in (3, 2))
    return model_fn, params, batch


def streamed(given: Problem) -> Problem:
    model_fn, params, (x, y) = given
    return model_fn, params, cv.over([(x[:4], y[:4]), (x[4:], y[4:])])


mse = {"loss": cv.MSE()}
ESTIMATORS: dict[str, Callable[..., Operator]] = {}
for engine in ("functional", "autograd"):
    for name in ("kfac", "ekfac", "tkfac", "diagonal", "shampoo", "kl_shampoo", "dykaf"):
        ESTIMATORS[f"{name}, {engine}"] = lambda *given, name=name, engine=engine: getattr(cv, name)(
            *given, engine=engine, **mse
        )
    for name in ("shampoo", "kl_shampoo", "dykaf"):
        ESTIMATORS[f"{name} of examples, {engine}"] = lambda *given, name=name, engine=engine: getattr(cv, name)(
            *given, per_example=True, engine=engine, **mse
        )
    ESTIMATORS[f"empirical kfac, {engine}"] = lambda *given, engine=engine: cv.kfac(
        *given, fisher="empirical", engine=engine, **mse
    )
ESTIMATORS["ekfac in two passes"] = lambda *given: cv.ekfac(*given, fisher="type-2", **mse)
ESTIMATORS["eigenvalue_correct"] = lambda *given: cv.eigenvalue_correct(cv.kfac(*given, **mse), *given, **mse)
MATRIX_FREE: dict[str, Callable[..., Operator]] = {}
for mode in ("forward", "reverse"):
    for name in ("ggn", "hessian"):
        MATRIX_FREE[f"{name}, {mode}"] = lambda *given, name=name, mode=mode: getattr(cv, name)(
            *given, mode=mode, **mse
        )
    for kind in ("mc", "empirical", "type-2"):
        MATRIX_FREE[f"{kind} fisher, {mode}"] = lambda *given, kind=kind, mode=mode: cv.fisher(
            *given, fisher=kind, mode=mode, **mse
        )
    MATRIX_FREE[f"gramian, {mode}"] = lambda *given, mode=mode: cv.gramian(*given, mode=mode)


def assert_detached(tree: Any) -> None:
    assert not any(leaf.requires_grad for leaf in flatten(tree)[0] if isinstance(leaf, Tensor))


SOURCES = {"batch": lambda given: given, "loader": streamed}


def names(estimators: dict[str, Any], way: str) -> list[str]:
    return [key.removesuffix(f", {way}") for key in estimators if key.endswith(f", {way}")]


@every_pair("name, engine, source", names(ESTIMATORS, "autograd"), ["functional", "autograd"], SOURCES)
def test_no_leaf_of_a_product_requires_grad(name: str, engine: str, source: str) -> None:
    check_products(ESTIMATORS[f"{name}, {engine}"], SOURCES[source])


@pytest.mark.parametrize("estimator", ["ekfac in two passes", "eigenvalue_correct"])
@pytest.mark.parametrize("source", SOURCES)
def test_no_leaf_of_a_corrected_product_requires_grad(estimator: str, source: str) -> None:
    check_products(ESTIMATORS[estimator], SOURCES[source])


@every_pair("name, mode, source", names(MATRIX_FREE, "forward"), ["forward", "reverse"], SOURCES)
def test_no_leaf_of_a_matrix_free_product_requires_grad(name: str, mode: str, source: str) -> None:
    check_products(MATRIX_FREE[f"{name}, {mode}"], SOURCES[source])


def check_products(estimator: Callable[..., Operator], source: Callable[[Problem], Problem]) -> None:
    given = source(problem())
    curv = estimator(*given)
    assert_detached(curv)
    v = {name: leaf.detach() for name, leaf in given[1].items()}
    stacked = {name: torch.stack([leaf, 2 * leaf]) for name, leaf in v.items()}
    shift = 10 * float(curv.frobenius_norm())
    operators = [curv, curv.inverse(shift), curv + curv, (curv + curv).inverse(shift), 2.0 * curv, curv.damp(0.1)]
    for operator in operators:
        assert_detached([operator @ v, operator.matmat(stacked), operator.quadratic(v)])
    assert_detached([curv.to_dense(), curv.diag(), curv.trace(), curv.eigenvalues()])


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_no_leaf_of_a_jacobians_product_requires_grad(mode: str) -> None:
    model_fn, params, (x, _) = problem()
    jacobian = cv.jacobian(model_fn, params, x, mode=mode)
    assert_detached(jacobian)
    v = {name: leaf.detach() for name, leaf in params.items()}
    stacked = {name: leaf.unsqueeze(0) for name, leaf in v.items()}
    assert_detached([jacobian @ v, jacobian.matmat(stacked), jacobian.to_dense()])
    assert_detached([jacobian.T @ torch.ones(6, 2), jacobian.T.matmat(torch.ones(3, 6, 2))])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_products_are_differentiable_in_the_vector(estimator: str) -> None:
    given = problem()
    curv = ESTIMATORS[estimator](*given)
    v = {name: leaf.detach().requires_grad_() for name, leaf in given[1].items()}
    gradients = torch.autograd.grad(curv.quadratic(v) / 2, list(v.values()))
    expected = curv @ {name: leaf.detach() for name, leaf in v.items()}
    for gradient, leaf in zip(gradients, (expected[name] for name in v), strict=True):
        assert torch.allclose(gradient, leaf, rtol=1e-4, atol=1e-5 * float(leaf.norm()))
