"""Models that compute in several dtypes: one dtype for the curvature, and the numbers of the same model in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cv
from curvlib.gradients.per_example import per_example_gradients
from curvlib.operators import Operator
from curvlib.pytree import flatten

HALF, SINGLE, DOUBLE, FLOAT16 = torch.bfloat16, torch.float32, torch.float64, torch.float16
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Three layers whose numbers all dtypes hold exactly: small integers for ReLU, or bfloat16 ones for tanh."""

    def __init__(self, dtypes: tuple[torch.dtype, ...], forward: Forward, exact: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        for x in self.parameters():
            normal = torch.randn(x.shape, generator=generator)
            x.data = normal.round().clamp(-1, 1) if exact else (0.6 * normal).bfloat16().float()
        for layer, dtype in zip((self.a, self.b, self.c), dtypes, strict=True):
            layer.to(dtype)
        self.run, self.f = forward, torch.relu if exact else torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.c(net.f(net.b(net.f(net.a(x)))))


def under_autocast(dtype: torch.dtype) -> Forward:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return plain(net, x)

    return forward


def one_layer_under_autocast(net: Net, x: Tensor) -> Tensor:
    h = net.f(net.a(x))
    with torch.autocast("cpu", dtype=HALF):
        h = net.b(h)
    return net.c(net.f(h.float()))


def each_layer_in_its_dtype(net: Net, x: Tensor) -> Tensor:
    h = net.f(net.a(x.to(net.a.weight.dtype)))
    h = net.f(net.b(h.to(net.b.weight.dtype)))
    return net.c(h.to(net.c.weight.dtype))


def weights_cast(dtype: torch.dtype) -> Forward:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.f(net.a(x)).to(dtype)
        h = nn.functional.linear(h, net.b.weight.to(dtype), net.b.bias.to(dtype))
        return net.c(net.f(h).to(x.dtype))

    return forward


def with_outputs(dtype: torch.dtype, forward: Forward = plain) -> Forward:
    return lambda net, x: forward(net, x).to(dtype)


CASES: dict[str, tuple[tuple[torch.dtype, ...], Forward]] = {
    "autocast": ((SINGLE,) * 3, under_autocast(HALF)),
    "autocast to float16": ((SINGLE,) * 3, under_autocast(FLOAT16)),
    "autocast, float outputs": ((SINGLE,) * 3, with_outputs(SINGLE, under_autocast(HALF))),
    "autocast, double outputs": ((SINGLE,) * 3, with_outputs(DOUBLE, under_autocast(HALF))),
    "one layer under autocast": ((SINGLE,) * 3, one_layer_under_autocast),
    "bfloat16 layer": ((SINGLE, HALF, SINGLE), each_layer_in_its_dtype),
    "float16 layer": ((SINGLE, FLOAT16, SINGLE), each_layer_in_its_dtype),
    "double layer": ((SINGLE, DOUBLE, SINGLE), each_layer_in_its_dtype),
    "double last layer": ((SINGLE, SINGLE, DOUBLE), each_layer_in_its_dtype),
    "single last layer of a double model": ((DOUBLE, DOUBLE, SINGLE), each_layer_in_its_dtype),
    "weights cast to bfloat16": ((SINGLE,) * 3, weights_cast(HALF)),
    "weights cast to double": ((SINGLE,) * 3, weights_cast(DOUBLE)),
    "bfloat16": ((HALF,) * 3, plain),
    "float16": ((FLOAT16,) * 3, plain),
    "bfloat16, float outputs": ((HALF,) * 3, with_outputs(SINGLE)),
    "float16, float outputs": ((FLOAT16,) * 3, with_outputs(SINGLE)),
    "bfloat16, double outputs": ((HALF,) * 3, with_outputs(DOUBLE)),
    "single, double outputs": ((SINGLE,) * 3, with_outputs(DOUBLE)),
    "single, bfloat16 outputs": ((SINGLE,) * 3, with_outputs(HALF)),
    "double, float outputs": ((DOUBLE,) * 3, with_outputs(SINGLE)),
    "double, bfloat16 outputs": ((DOUBLE,) * 3, with_outputs(HALF)),
}
SLOW = {  # near others: they run with -m slow
    "autocast to float16", "autocast, float outputs", "float16 layer", "double layer", "weights cast to double",
    "float16", "bfloat16, float outputs", "float16, float outputs", "single, bfloat16 outputs",
    "double, bfloat16 outputs",
}  # fmt: skip
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its parameters and a batch; and the same in float64 throughout."""

    model: tuple[Any, Any, Any]
    twin: tuple[Any, Any, Any]
    dtype: torch.dtype  # of the curvature

    @classmethod
    def of(cls, name: str, *, exact: bool, targets: str = "values") -> Problem:
        dtypes, forward = CASES[name]
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(16, 4, generator=generator)
        x = x.round().clamp(-2, 2) if exact else x.bfloat16().float()
        y = torch.randn(16, 3, generator=generator).round() if targets == "values" else torch.arange(16) % 3
        model_fn, params = cv.functional(Net(dtypes, forward, exact))
        twin_fn, twin_params = cv.functional(Net((DOUBLE,) * 3, plain, exact))
        typed = y if targets == "classes" else y.to(model_fn(params, x.to(dtypes[0])).dtype)
        widest = torch.float64 if DOUBLE in dtypes else torch.float32
        double = y if targets == "classes" else y.double()
        return cls((model_fn, params, (x.to(dtypes[0]), typed)), (twin_fn, twin_params, (x.double(), double)), widest)

    @property
    def eps(self) -> float:
        """The rounding of the narrowest dtype that numbers pass through."""
        model_fn, params, (x, _) = self.model
        seen = {leaf.dtype for leaf in flatten(params)[0]} | {model_fn(params, x).dtype}
        seen |= {site.dtype for site in cv.plan(model_fn, params, x).sites}
        return max(torch.finfo(dtype).eps for dtype in seen)


sums = {"loss": cv.Identity("sum")}
EXACT: dict[str, Callable[..., Operator]] = {
    "kfac": lambda *problem: cv.kfac(*problem, fisher="type-2", **sums),
    "kfac, functional": lambda *problem: cv.kfac(*problem, fisher="type-2", engine="functional", **sums),
    "kfac, forward-only": lambda *problem: cv.kfac(*problem, fisher="forward-only", **sums),
    "kfac, reduce": lambda *problem: cv.kfac(*problem, fisher="type-2", sharing="reduce", **sums),
    "diagonal": lambda *problem: cv.diagonal(*problem, **sums),
    "diagonal, functional": lambda *problem: cv.diagonal(*problem, engine="functional", **sums),
    "ggn": lambda *problem: cv.ggn(*problem, **sums),
    "ggn, reverse": lambda *problem: cv.ggn(*problem, mode="reverse", **sums),
    "gramian": lambda *problem: cv.gramian(*problem),
}
mean = {"loss": cv.MSE()}
ROUNDED: dict[str, Callable[..., Operator]] = {
    "kfac": lambda *problem: cv.kfac(*problem, fisher="type-2", **mean),
    "kfac, empirical, functional": lambda *problem: cv.kfac(*problem, fisher="empirical", engine="functional", **mean),
    "ekfac in one pass": lambda *problem: cv.ekfac(*problem, fisher="empirical", **mean),
    "ekfac in two passes": lambda *problem: cv.ekfac(*problem, fisher="type-2", **mean),
    "tkfac": lambda *problem: cv.tkfac(*problem, fisher="type-2", **mean),
    "eigenvalue-corrected tkfac": lambda *problem: cv.eigenvalue_correct(
        cv.tkfac(*problem, fisher="type-2", **mean), *problem, fisher="type-2", **mean
    ),
    "diagonal": lambda *problem: cv.diagonal(*problem, **mean),
    "shampoo": lambda *problem: cv.shampoo(*problem, per_example=True, **mean),
    "kl_shampoo": lambda *problem: cv.kl_shampoo(*problem, per_example=True, **mean),
    "dykaf": lambda *problem: cv.dykaf(*problem, per_example=True, **mean),
    "shampoo of the batch": lambda *problem: cv.shampoo(*problem, **mean),
    "dykaf of the batch": lambda *problem: cv.dykaf(*problem, **mean),
    "ggn": lambda *problem: cv.ggn(*problem, **mean),
    "fisher": lambda *problem: cv.fisher(*problem, fisher="empirical", **mean),
    "hessian": lambda *problem: cv.hessian(*problem, **mean),
}


@functools.cache
def problem_of(name: str, exact: bool) -> Problem:
    return Problem.of(name, exact=exact)


@functools.cache
def rounded(name: str, estimator: str) -> Operator:
    return ROUNDED[estimator](*problem_of(name, False).model)


@functools.cache
def in_double(estimator: str, exact: bool) -> Operator:
    """The curvature of the model in float64, which is one for all cases."""
    return (EXACT if exact else ROUNDED)[estimator](*problem_of("bfloat16", exact).twin)


@every_case
@pytest.mark.parametrize("estimator", EXACT)
def test_where_nothing_is_rounded_the_numbers_are_those_of_the_model_in_float64(name: str, estimator: str) -> None:
    problem = problem_of(name, True)
    curv, twin = EXACT[estimator](*problem.model), in_double(estimator, True)
    assert curv.dtypes == {problem.dtype}
    assert torch.equal(curv.to_dense().double(), twin.to_dense())


@every_case
@pytest.mark.parametrize("estimator", ROUNDED)
def test_numbers_are_those_of_the_model_in_float64_up_to_rounding(name: str, estimator: str) -> None:
    problem = problem_of(name, False)
    curv, twin = rounded(name, estimator), in_double(estimator, False)
    assert curv.dtypes == {problem.dtype}
    if "shampoo" in estimator and estimator != "kl_shampoo":  # the root of few gradients is less well determined
        curv, twin = curv.power(2), twin.power(2)
    tolerance = 10 * problem.eps
    if estimator == "kl_shampoo":  # its fixed point is iterated to the root of a dtype's precision
        tolerance = max(tolerance, 0.03)
    expected = twin.to_dense()
    assert float((curv.to_dense().double() - expected).norm()) <= tolerance * float(expected.norm())


@every_case
@pytest.mark.parametrize("estimator", ROUNDED)
def test_products_and_steps_come_back_in_the_dtypes_of_the_parameters(name: str, estimator: str) -> None:
    problem = problem_of(name, False)
    params = problem.model[1]
    curv = rounded(name, estimator)
    scale = float(curv.frobenius_norm())
    damped = curv.damp(2 * scale)  # the Hessian is indefinite
    images = [curv @ params, (curv + curv) @ params, damped @ params]
    if estimator not in ("ggn", "fisher", "hessian"):
        images += [curv.inverse(2 * scale) @ params, curv.power(-0.5, 2 * scale) @ params]
        images += [(curv + 0.5 * curv).inverse(2 * scale) @ params]
    for image in images:
        assert {key: leaf.dtype for key, leaf in image.items()} == {key: leaf.dtype for key, leaf in params.items()}
        assert all(bool(leaf.isfinite().all()) for leaf in image.values())
    assert curv.quadratic(params).dtype == problem.dtype
    assert damped.dtypes == {problem.dtype}


@every_case
def test_per_example_gradients_and_projections_are_those_of_the_model_in_float64(name: str) -> None:
    problem = Problem.of(name, exact=True)
    found, twin = (per_example_gradients(*p, **sums) for p in (problem.model, problem.twin))
    expected = twin.tree(0, 16)
    for key, leaf in found.tree(0, 16).items():
        assert leaf.dtype == problem.dtype
        assert torch.equal(leaf.double(), expected[key])
    curvs = [cv.kfac(*p, fisher="type-2", **sums) for p in (problem.model, problem.twin)]
    roots = [curv.power(-0.5, cv.FactoredTikhonov(0.1)) for curv in curvs]
    sketches = [cv.sketch(p[1], rank=2) for p in (problem.model, problem.twin)]
    one, two = (
        root.project(sketch)(cv.per_example_gradients(*p, **sums))
        for root, sketch, p in zip(roots, sketches, (problem.model, problem.twin), strict=True)
    )
    for block, image in one.items():
        assert image.dtype == problem.dtype
        assert float((image.double() - two[block]).norm()) <= 1e-4 * float(two[block].norm())


def test_a_curvature_of_another_dtype_is_corrected_in_that_of_the_parameters() -> None:
    problem = Problem.of("bfloat16", exact=False)
    factors = cv.kfac(*problem.model, fisher="type-2", **mean)
    expected = cv.eigenvalue_correct(factors, *problem.model, fisher="type-2", **mean).to_dense()
    for dtype in (DOUBLE, SINGLE):
        curv = cv.eigenvalue_correct(factors.to(dtype=dtype), *problem.model, fisher="type-2", **mean)
        assert curv.dtypes == {SINGLE}
        assert float((curv.to_dense() - expected).norm()) <= 1e-3 * float(expected.norm())


@pytest.mark.parametrize("name", ["autocast", "double layer", "bfloat16, double outputs", "single, double outputs"])
def test_batches_add_up_in_one_dtype(name: str) -> None:
    problem = Problem.of(name, exact=True)
    model_fn, params, (x, y) = problem.model
    loader = [(x[:8], y[:8]), (x[8:], y[8:])]
    for estimator in ("kfac", "diagonal", "ggn"):
        curv = EXACT[estimator](model_fn, params, cv.over(loader))
        assert curv.dtypes == {problem.dtype}
        assert torch.equal(curv.to_dense().double(), EXACT[estimator](*problem.twin).to_dense())
    for estimator in ("ekfac in two passes", "tkfac", "shampoo", "dykaf"):
        assert ROUNDED[estimator](model_fn, params, cv.over(loader)).dtypes == {problem.dtype}


@every_case
def test_structured_and_matrix_free_operators_add_up(name: str) -> None:
    problem = Problem.of(name, exact=False)
    params = problem.model[1]
    exact, kfac = cv.ggn(*problem.model, **mean), cv.kfac(*problem.model, fisher="type-2", **mean)
    for total in (exact + kfac, kfac + exact, exact + kfac.to(dtype=DOUBLE), kfac.to(dtype=HALF) + exact):
        image = total @ params
        assert {key: leaf.dtype for key, leaf in image.items()} == {key: leaf.dtype for key, leaf in params.items()}
        dense = exact.to_dense().double() + kfac.to_dense().double()
        assert total.to_dense().dtype == total.dtype
        assert float((total.to_dense().double() - dense).norm()) <= max(problem.eps, 2e-2) * float(dense.norm())
        assert total.quadratic(params).dtype == total.dtype
        v = {key: leaf.double() for key, leaf in params.items()}
        assert total.quadratic(v).dtype == DOUBLE
        assert total.damp(0.1).dtype == total.dtype


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF, FLOAT16], ids=str)
@pytest.mark.parametrize("preconditioner", [DOUBLE, SINGLE, HALF], ids=str)
def test_systems_with_preconditioners_of_other_dtypes_are_solved(
    dtype: torch.dtype, preconditioner: torch.dtype
) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model_fn, params = cv.functional(net)
    batch = (torch.randn(16, 4), torch.randn(16, 2))
    curv = cv.ggn(model_fn, params, batch, **mean)
    rough = cv.kfac(model_fn, params, batch, **mean).inverse(0.1).to(dtype=preconditioner)
    v = {key: torch.randn_like(leaf).to(dtype) for key, leaf in params.items()}
    truth = torch.linalg.solve(curv.to_dense().double() + 0.1 * torch.eye(23).double(), cv.ravel(v).double())
    for x in (
        curv.inverse(0.1, solver=cv.CG(rough, tolerance=1e-6)) @ v,
        cv.solve(curv.damp(0.1), v, preconditioner=rough, tolerance=1e-6),
        cv.solve(0.0 * cv.kfac(model_fn, params, batch, **mean) + curv.damp(0.1), v, tolerance=1e-6),
    ):
        assert {leaf.dtype for leaf in x.values()} == {dtype}
        error = float((cv.ravel(x).double() - truth).norm())
        assert error <= (1e-4 + torch.finfo(dtype).eps) * float(truth.norm())


@every_case
def test_the_jacobian_computes_in_the_models_dtypes_and_returns_the_vectors(name: str) -> None:
    problem = Problem.of(name, exact=True)
    jacobian, twin = (cv.jacobian(p[0], p[1], p[2][0]) for p in (problem.model, problem.twin))
    ones = torch.ones(16, 3, dtype=DOUBLE)
    for dtype in (DOUBLE, SINGLE):
        v = {key: torch.ones_like(leaf, dtype=dtype) for key, leaf in problem.model[1].items()}
        image = jacobian @ v
        assert image.dtype == dtype
        assert torch.equal(image.double(), twin @ {key: leaf.double() for key, leaf in v.items()})
        pulled = jacobian.T @ ones.to(dtype)
        assert {leaf.dtype for leaf in pulled.values()} == {dtype}
        expected = twin.T @ ones
        assert all(torch.equal(leaf.double(), expected[key]) for key, leaf in pulled.items())
    mixed = {key: torch.ones_like(leaf) for key, leaf in problem.model[1].items()}
    assert (jacobian @ mixed).dtype == cv.operators.vectors.widest(leaf.dtype for leaf in mixed.values())
