"""Solvers as values: every operator's inverse by each of them, what they refuse, and how many products they take."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import reference
import torch
from exactness_problems import normal, problem
from torch import nn

import curvlib as cv
from curvlib.errors import ArgumentError, ConvergenceError, DampingError, SingularError
from curvlib.estimators.exact import MatrixFree
from curvlib.operators import Inverse, KroneckerSide, Operator

EXACT = 1e-10
CASE = problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(0, 5, 3), "cross-entropy", "mean")
ARGUMENTS = CASE.model_fn, CASE.params, CASE.batch
OPERATORS: dict[str, Operator] = {
    "kfac": cv.kfac(*ARGUMENTS),
    "ekfac": cv.ekfac(*ARGUMENTS),
    "diagonal": cv.diagonal(*ARGUMENTS),
    "low-rank": cv.kfac(*ARGUMENTS).truncate(rank=1),
    "ggn": cv.ggn(*ARGUMENTS),
    "sum": cv.ggn(*ARGUMENTS) + cv.kfac(*ARGUMENTS),
    "damped": cv.ggn(*ARGUMENTS).damp(0.1),
    "sum of kfacs": cv.kfac(*ARGUMENTS) + cv.kfac(*ARGUMENTS, fisher="empirical"),
    "difference": 2 * cv.ggn(*ARGUMENTS) - cv.ggn(*ARGUMENTS),
    "inverse": cv.ggn(*ARGUMENTS).inverse(0.1),
}
SOLVERS = {"cg": cv.CG(tolerance=1e-11), "cholesky": cv.Cholesky(), "eigen": cv.Eigen(), "default": None}


def assert_close(estimate: torch.Tensor, truth: torch.Tensor, tolerance: float = EXACT) -> None:
    assert reference.relative_error(estimate, truth) <= tolerance


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_inverse_is_that_of_the_damped_matrix(name: str, solver: str) -> None:
    operator, how = OPERATORS[name], SOLVERS[solver]
    damping = cv.FactoredTikhonov(0.3) if solver == "cholesky" else 0.3
    damped = operator.damp(damping).to_dense()
    inverse = operator.inverse(damping, solver=how)
    assert isinstance(inverse, Inverse) or solver != "cg"
    v = CASE.params
    tolerance = 1e-6 if isinstance(inverse, Inverse) else 1e-9
    assert_close(damped @ cv.ravel(inverse @ v), cv.ravel(v), tolerance)
    assert_close(inverse.to_dense(), damped.inverse(), tolerance)
    assert_close(inverse.logdet(), -torch.logdet(damped), tolerance)


@pytest.mark.parametrize("solver", [cv.Cholesky(), cv.Eigen(), None])
def test_a_kronecker_product_is_inverted_side_by_side_and_in_groups(solver: Any) -> None:
    roots = [normal(d, 2, d, d) for d in (3, 4)]
    definite = [root @ root.mT + torch.eye(root.shape[-1], dtype=torch.float64) for root in roots]
    curv = cv.Kronecker(cv.Dense(definite[0]), cv.Dense(definite[1]))
    for damping in (0.0, cv.FactoredTikhonov(0.2), cv.FactoredTikhonov(0.2, relative=True)):
        inverse = curv.inverse(damping, solver=solver)
        assert isinstance(inverse, cv.Kronecker)
        assert_close(inverse.to_dense(), curv.damp(damping).to_dense().inverse())
    blocks = cv.DenseBlocks.of_matrix(definite[1][0], 2)
    assert_close(blocks.inverse(0.1, solver=solver).to_dense(), blocks.damp(0.1).to_dense().inverse())


def test_what_a_solver_cannot_do_is_refused() -> None:
    kfac = OPERATORS["kfac"]
    with pytest.raises(DampingError, match=r"block '0.weight'.*use FactoredTikhonov damping, or solver=cv.Eigen"):
        kfac.inverse(0.1, solver=cv.Cholesky())
    singular = cv.Dense(torch.ones(2, 2, dtype=torch.float64))
    for solver in (cv.Cholesky(), cv.Eigen()):
        with pytest.raises(SingularError, match="damping"):
            singular.inverse(solver=solver)
    with pytest.raises(SingularError, match="damping"):
        cv.Dense(-torch.eye(2)).inverse(0.1, solver=cv.Cholesky())
    product = KroneckerSide((cv.Dense(torch.eye(2)), cv.Dense(torch.eye(3))))
    with pytest.raises(ArgumentError, match="KroneckerSide has no Cholesky"):
        product.inverse(0.1, solver=cv.Cholesky())
    with pytest.raises(DampingError):
        kfac.inverse(-1.0, solver=cv.CG())
    with pytest.raises(ConvergenceError, match="after 1 iterations"):
        OPERATORS["ggn"].inverse(1e-6, solver=cv.CG(max_iterations=1)) @ CASE.params


def products(make: Any) -> int:
    """How many times a matrix-free operator is applied."""
    with mock.patch.object(MatrixFree, "_apply", autospec=True, side_effect=MatrixFree._apply) as count:
        make()
    return int(count.call_count)


def test_the_inverse_of_an_inverse_takes_one_product() -> None:
    ggn = OPERATORS["ggn"]
    assert products(lambda: ggn.inverse(0.1).inverse() @ CASE.params) == 1
    assert products(lambda: ggn.inverse(0.1, solver=cv.CG()).power(-1) @ CASE.params) == 1
    assert products(lambda: (3.0 * (ggn + ggn).inverse(0.1)).inverse() @ CASE.params) == 2
    assert_close(cv.ravel(ggn.inverse(0.1).inverse() @ CASE.params), cv.ravel(ggn.damp(0.1) @ CASE.params))


# --- quadratic forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["ggn", "mc", "empirical", "gramian", "hessian"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_quadratic_form_is_that_of_the_product(kind: str, mode: Any, streamed: bool) -> None:
    inputs, targets = CASE.batch
    data = cv.over([(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]) if streamed else CASE.batch
    given = CASE.model_fn, CASE.params, data
    make = {"mc": cv.fisher, "empirical": cv.fisher}.get(kind) or getattr(cv, kind)
    options = {"fisher": kind} if make is cv.fisher else {}
    curv = 0.7 * make(*given, mode=mode, **options)
    v = {name: normal(3, *leaf.shape) for name, leaf in CASE.params.items()}
    expected = cv.ravel(v) @ cv.ravel(curv @ v)
    assert_close(curv.quadratic(v), expected)
    assert curv.quadratic({name: leaf.float() for name, leaf in v.items()}).dtype == torch.float64
    damped = curv.damp(0.5) + OPERATORS["kfac"]
    assert_close(damped.quadratic(v), cv.ravel(v) @ cv.ravel(damped @ v))
    if kind != "hessian":
        assert products(lambda: damped.quadratic(v)) == 0


def test_the_quadratic_form_of_a_ggn_takes_no_backward_pass() -> None:
    backward: list[int] = []

    class Watched(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            backward.append(1)
            return gradient

        @staticmethod
        def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
            return tangent.clone()

    curv = cv.ggn(lambda p, x: Watched.apply(CASE.model_fn(p, x)), CASE.params, CASE.batch, mode="forward")
    backward.clear()
    curv.quadratic(CASE.params)
    assert not backward
    curv @ CASE.params
    assert backward


def test_a_quadratic_form_has_derivatives_in_the_vector() -> None:
    curv = OPERATORS["ggn"]
    v = {name: leaf.clone().requires_grad_() for name, leaf in CASE.params.items()}
    curv.quadratic(v).backward()
    gradient = cv.ravel({name: leaf.grad for name, leaf in v.items()})
    assert_close(gradient, 2 * cv.ravel(curv @ CASE.params))
