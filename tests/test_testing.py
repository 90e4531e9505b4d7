"""The checks for users: right things pass, and every planted fault is found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib as cv
import curvlib.optim as optim
from curvlib.errors import ArgumentError
from curvlib.pytree import Domain, Tree, flatten, tree_map
from curvlib.testing import (
    Problem,
    check_curvature,
    check_operator,
    check_transformation,
    operators,
    problems,
    trees,
    vectors,
)
from curvlib.testing.twins import KINDS

slowly = settings(deadline=None, max_examples=1, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", KINDS)
@slowly
@given(data=st.data())
def test_operators_of_every_kind_are_their_twins(kind: str, data: st.DataObject) -> None:
    twin = data.draw(operators(kind))
    report = check_operator(twin.operator, twin.dense)
    assert len(report.holds) >= 29
    assert not report.refused


def test_a_refusal_is_reported_and_no_failure() -> None:
    params = {"w": torch.randn(3, 2, dtype=torch.float64)}
    batch = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    hessian = cv.hessian(lambda p, x: torch.tanh(x @ p["w"]), params, batch)
    report = check_operator(hessian)
    assert "a product is that with the dense matrix" in report.holds


# --- faults in operators ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """A method of `Dense` that is wrong, and what of the algebra it breaks first."""

    name: str
    method: str
    wrong: Callable[..., Any]
    breaks: str


def wrong_image(self: cv.Dense, v: Any) -> Any:
    right = self.matrix @ v
    return torch.where(torch.arange(len(right)) == 2, right * 1.001, right)


FAULTS = [
    Fault("products", "matvec", wrong_image, "a product is that with the dense matrix"),
    Fault("stacks", "matmat", lambda self, v: v @ self.matrix * 1.001, "matmat is matvec"),
    Fault("trace", "trace", lambda self: self.matrix.trace() + 0.01, "trace is the sum"),
    Fault("diagonal", "diag", lambda self: self.matrix.diagonal().flip(0), "diag is the diagonal"),
    Fault("quadratic", "quadratic", lambda self, v: v @ self.matrix @ v / 2, "quadratic is"),
    Fault("norm", "frobenius_norm", lambda self: self.matrix.norm().square(), "frobenius_norm is"),
    Fault("order", "eigenvalues", lambda self: torch.linalg.eigvalsh(self.matrix).flip(0), "eigenvalues are"),
    Fault("logdet", "logdet", lambda self: self.matrix.logdet() / 2, "logdet is"),
    Fault("multiples", "__mul__", lambda self, factor: cv.Dense(self.matrix * factor**2), "a multiple multiplies"),
    Fault("sums", "__add__", lambda self, other: cv.Dense(self.matrix - other.to_dense()), "a sum adds"),
    Fault("dtype", "matvec", lambda self, v: (self.matrix @ v.double()), "results have the dtype"),
    Fault("power", "power", lambda self, p, d=0.0: cv.Diagonal(self.matrix.diagonal() ** (p * p)), "the inverse with"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_an_operator_is_found_and_named(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]], dtype=torch.float64)

    monkeypatch.setattr(cv.Dense, fault.method, fault.wrong, raising=False)
    with pytest.raises(AssertionError, match=fault.breaks):
        check_operator(cv.Dense(matrix), matrix)


def test_the_example_that_is_shown_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.eye(9, dtype=torch.float64)
    wrong = matrix.clone()
    wrong[6, 1] = wrong[1, 6] = 1e-4
    monkeypatch.setattr(cv.Dense, "to_dense", lambda self: torch.eye(9, dtype=torch.float64))
    with pytest.raises(AssertionError, match="smallest example") as caught:
        check_operator(cv.Dense(wrong), matrix)
    shown = str(caught.value).split("smallest example:")[1]
    assert shown.count("1.") == 1


def test_operators_that_are_too_large_are_refused() -> None:
    with pytest.raises(ArgumentError, match="2048 rows"):
        check_operator(cv.Diagonal(torch.ones(3000)))
    with pytest.raises(ArgumentError, match="kind must be"):
        operators("no such kind").example()


# --- curvature ----------------------------------------------------------------------------------------------------


def empirical(estimator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *data, loss: estimator(*data, loss=loss, fisher="empirical")


EXACT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ggn": (cv.ggn, {"exact": "matrix"}),
    "diagonal": (cv.diagonal, {"exact": "diagonal"}),
    "ekfac": (lambda *data, loss: cv.ekfac(*data, loss=loss, fisher="type-2"), {"exact": "trace"}),
    "tkfac": (empirical(cv.tkfac), {"exact": "trace", "of": "empirical"}),
    "kfac": (lambda *data, loss: cv.kfac(*data, loss=loss, fisher="type-2"), {}),
}


@pytest.mark.parametrize("name", EXACT)
@settings(deadline=None, max_examples=8)
@given(problem=problems())
def test_estimators_have_exactly_what_they_claim(name: str, problem: Problem) -> None:
    estimator, claims = EXACT[name]
    check_curvature(estimator, problem.model_fn, problem.params, problem.batch, loss=problem.loss, **claims)


def small() -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 2, generator=generator, dtype=torch.float64)}
    inputs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return lambda p, x: torch.tanh(x @ p["w"]), params, (inputs, torch.tensor([0, 1, 1, 0, 1]))


def in_place(model_fn: Any, params: Any, batch: Any, *, loss: Any) -> Any:
    params["w"].mul_(2.0)
    return cv.kfac(model_fn, params, batch, loss=loss)


def global_draws(model_fn: Any, params: Any, batch: Any, *, loss: Any) -> Any:
    torch.rand(1)
    return cv.kfac(model_fn, params, batch, loss=loss)


def first_example(model_fn: Any, params: Any, batch: Any, *, loss: Any) -> Any:
    return cv.ggn(model_fn, params, (batch[0][:1], batch[1][:1]), loss=loss)


def negative(model_fn: Any, params: Any, batch: Any, *, loss: Any) -> Any:
    return cv.kfac(model_fn, params, batch, loss=loss) * -1.0


def other_params(model_fn: Any, params: Any, batch: Any, *, loss: Any) -> Any:
    return cv.kfac(lambda p, x: model_fn(p["inner"], x), {"inner": params}, batch, loss=loss)


@pytest.mark.parametrize(
    ("estimator", "broken", "claims"),
    [
        (in_place, "params and batch are not changed", {}),
        (global_draws, "torch's global generator is not used", {}),
        (first_example, "the order of the examples does not matter", {"exact": "trace"}),
        (negative, "positive semidefinite", {}),
        (other_params, "it acts on pytrees like params", {}),
        (cv.diagonal, "the matrix is that of brute force", {"exact": "matrix"}),
        (cv.kfac, "the order of the examples does not matter", {"exact": "trace"}),
        (cv.ggn, "the matrix is that of brute force", {"exact": "matrix", "of": "empirical"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_in_an_estimator_is_found_and_named(estimator: Any, broken: str, claims: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=broken):
        check_curvature(estimator, *small(), **claims)


def test_claims_that_do_not_exist_are_refused() -> None:
    for wrong in ({"exact": "everything"}, {"of": "hessian"}):
        with pytest.raises(ArgumentError, match="must be"):
            check_curvature(cv.ggn, *small(), **wrong)  # type: ignore[arg-type]


# --- transformations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [optim.adamw(0.01), optim.chain(optim.scale_by_soap(), optim.scale_by_learning_rate(0.05))],
    ids=["adamw", "soap"],
)
def test_optimizers_are_what_they_should_be(optimizer: optim.GradientTransformation) -> None:
    assert not check_transformation(optimizer).refused


def test_a_transformation_alone_need_not_descend() -> None:
    check_transformation(optim.scale_by_adam(), descends=False)


def plain(update: Callable[[Tree, Any, Any], tuple[Tree, Any]], init: Any = lambda params: ()) -> Any:
    return optim.GradientTransformation(init, lambda grads, state, params=None: update(grads, state, params))


def changing(grads: Tree, state: Any, params: Any) -> tuple[Tree, Any]:
    return tree_map(lambda g: g.mul_(-0.1), grads), state


def random(grads: Tree, state: Any, params: Any) -> tuple[Tree, Any]:
    return tree_map(lambda g: -0.1 * g * (1 + 0.1 * torch.rand(())), grads), state


def listed(grads: Tree, state: Any, params: Any) -> tuple[Tree, Any]:
    return [-0.1 * g for g in flatten(grads)[0]], state


def divided(grads: Tree, state: Any, params: Any) -> tuple[Tree, Any]:
    return tree_map(lambda g: -0.1 * g / g.norm(), grads), state


def counted(grads: Tree, state: Any, params: Any) -> tuple[Tree, Any]:
    return tree_map(lambda g: -0.1 * g, grads), (3, state[0])


@pytest.mark.parametrize(
    ("optimizer", "broken"),
    [
        (plain(changing), "an update changes nothing"),
        (plain(random), "torch's global generator was used"),
        (plain(listed), "updates have the structure"),
        (plain(divided), "zero gradients give finite updates"),
        (plain(counted, lambda params: (0, 0)), "the state is a pytree"),
        (optim.chain(optim.scale_by_adam(), optim.scale(0.01)), "a quadratic becomes smaller"),
    ],
)
def test_a_fault_in_a_transformation_is_found_and_named(optimizer: Any, broken: str) -> None:
    with pytest.raises(AssertionError, match=broken):
        check_transformation(optimizer)


# --- strategies ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(params=trees(dtype=torch.float32, max_order=2), data=st.data())
def test_trees_are_parameters_and_vectors_are_of_their_domain(params: Tree, data: st.DataObject) -> None:
    domain = Domain.of(params)
    assert all(1 <= leaf.ndim <= 2 and leaf.dtype == torch.float32 for leaf in flatten(params)[0])
    domain.leaves(data.draw(vectors(domain)))
