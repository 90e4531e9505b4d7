"""The algebra of matrix-free operators, the Jacobian as a linear map, and systems solved by conjugate gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from exactness_problems import generator, normal, problem
from sklearn.datasets import load_digits
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError, ConvergenceError, ShapeError
from curvlib.estimators import ggn, hessian, jacobian
from curvlib.operators import Inverse, solve

EXACT = 1e-10


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(width: int = 4) -> Any:
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    return problem(model, normal(0, 5, 3), "cross-entropy", "mean")


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def assert_close(estimate: Tensor, truth: Tensor, tolerance: float = EXACT) -> None:
    assert reference.relative_error(estimate, truth) <= tolerance


# --- algebra ------------------------------------------------------------------------------------------------------


def test_sums_multiples_and_damping_are_those_of_the_matrices() -> None:
    case = mlp()
    first, second = (make(case.model_fn, case.params, case.batch) for make in (ggn, hessian))
    factored = cv.kfac(case.model_fn, case.params, case.batch)
    G, H, K = (x.to_dense() for x in (first, second, factored))
    eye = identity(len(G))
    assert_close((2 * first).to_dense(), 2 * G)
    assert_close((first + second).to_dense(), G + H)
    assert_close((first + factored).to_dense(), G + K)
    assert_close((factored + first).to_dense(), G + K)
    assert_close((first.damp(0.5) + second).to_dense(), G + 0.5 * eye + H)
    assert_close((second + first.damp(0.5)).damp(0.25).to_dense(), G + 0.75 * eye + H)
    assert_close((3.0 * (first + factored).damp(0.5)).to_dense(), 3 * (G + K + 0.5 * eye))
    relative = G.trace() / len(G) * eye
    assert_close(first.damp(cv.RelativeTikhonov(0.5)).to_dense(), G + 0.5 * relative)
    assert_close(first.damp(cv.FactoredTikhonov(0.5)).to_dense(), G + 0.5 * eye)


def test_what_needs_entries_or_eigenvalues_is_that_of_the_matrix() -> None:
    case = mlp()
    curv = ggn(case.model_fn, case.params, case.batch)
    G = curv.to_dense()
    v = {name: normal(3, *leaf.shape) for name, leaf in case.params.items()}
    assert_close(cv.ravel(curv.diag()), G.diagonal())
    assert_close(curv.trace(), G.trace())
    assert_close(curv.frobenius_norm(), G.norm())
    assert_close(curv.quadratic(v), cv.ravel(v) @ G @ cv.ravel(v))
    values, vectors = torch.linalg.eigh(G)
    assert torch.allclose(curv.eigenvalues(), values, atol=1e-12)
    assert_close(curv.damp(0.1).logdet(), (values + 0.1).log().sum())
    root = vectors * (values + 0.1).sqrt() @ vectors.mT
    assert_close(curv.power(0.5, 0.1).to_dense(), root)
    assert_close(curv.map_eigenvalues(torch.exp).to_dense(), vectors * values.exp() @ vectors.mT)
    draws = reference.rows(curv.damp(0.1).sample(generator(0), 4000), 4000)
    assert_close(draws.mT @ draws / 4000, G + 0.1 * identity(len(G)), 0.1)


def test_a_parameter_that_is_one_number_has_a_row_and_a_column() -> None:
    params = {"scale": normal(0), "w": normal(1, 3)}
    x, y = normal(2, 5, 3), normal(3, 5, 1)

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return p["scale"] * (x @ p["w"].unsqueeze(1))

    found = ggn(model_fn, params, (x, y), loss=cv.MSE(reduction="sum")).to_dense()
    J = torch.cat([x @ params["w"].unsqueeze(1), params["scale"] * x], 1)
    assert_close(found, 2 * J.mT @ J)


def test_the_inverse_solves_systems() -> None:
    case = mlp()
    curv = ggn(case.model_fn, case.params, case.batch)
    damped = curv.to_dense() + 0.1 * identity(curv.domain.size)
    inverse = curv.inverse(0.1)
    v = {name: normal(3, *leaf.shape) for name, leaf in case.params.items()}
    assert isinstance(inverse, Inverse)
    assert_close(damped @ cv.ravel(inverse @ v), cv.ravel(v), 1e-7)
    assert_close(inverse.to_dense(), damped.inverse(), 1e-7)
    assert_close((2 * inverse).to_dense(), 2 * damped.inverse(), 1e-7)
    assert_close(cv.ravel(inverse.inverse() @ v), damped @ cv.ravel(v))
    assert_close(inverse.power(-2).to_dense(), damped @ damped, 1e-5)
    preconditioner = cv.kfac(case.model_fn, case.params, case.batch).inverse(0.1)
    with_it = solve(curv.damp(0.1), v, preconditioner=preconditioner, tolerance=1e-12)
    assert_close(damped @ cv.ravel(with_it), cv.ravel(v))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_stacked_systems_are_solved_together(preconditioned: bool) -> None:
    case = mlp()
    calls: list[int] = []

    def counted(params: Any, inputs: Tensor) -> Tensor:
        calls.append(1)
        return case.model_fn(params, inputs)

    curv = ggn(counted, case.params, case.batch)
    damped = curv.to_dense() + 0.1 * identity(curv.domain.size)
    rough = cv.kfac(case.model_fn, case.params, case.batch).inverse(0.1) if preconditioned else None
    inverse = curv.inverse(0.1, solver=cv.CG(rough, tolerance=1e-11))
    sizes = torch.tensor([1.0, 1e-6, 0.0, 1e6], dtype=torch.float64)
    vectors = {
        name: torch.einsum("k,k...->k...", sizes, normal(3, 4, *leaf.shape)) for name, leaf in case.params.items()
    }
    expected = reference.rows(vectors, 4)
    products = []
    for number in range(4):
        calls.clear()
        solution = cv.ravel(inverse @ reference.example_of(vectors, number))
        products.append(len(calls))
        assert (solution @ damped - expected[number]).norm() <= 1e-10 * expected[number].norm()
    calls.clear()
    together = reference.rows(inverse.matmat(vectors), 4) @ damped
    assert len(calls) == max(products)
    assert ((together - expected).norm(dim=1) <= 1e-10 * expected.norm(dim=1)).all()


def test_a_system_that_is_not_solved_is_an_error() -> None:
    case = mlp()
    curv = ggn(case.model_fn, case.params, case.batch)
    with pytest.raises(ConvergenceError, match="after 1 iterations"):
        solve(curv.damp(1e-6), case.params, max_iterations=1)
    with pytest.raises(ConvergenceError):
        curv.inverse() @ case.params  # singular
    for options in ({"tolerance": 0.0}, {"max_iterations": 0}):
        with pytest.raises(ArgumentError, match="must be positive"):
            solve(curv.damp(0.1), case.params, **options)
        with pytest.raises(ArgumentError, match="must be positive"):
            curv.inverse(0.1, solver=cv.CG(**options))


def test_a_large_operator_says_what_to_use_where_it_would_need_its_entries() -> None:
    case = mlp(400)
    curv = ggn(case.model_fn, case.params, case.batch)
    assert curv.domain.size > 2048
    for method, instead in (("diag", "spectrum.diagonal"), ("trace", "spectrum.trace"), ("eigenvalues", "spectrum")):
        with pytest.raises(ArgumentError, match=instead):
            getattr(curv, method)()
    with pytest.raises(ArgumentError, match="kfac"):
        curv.sample(generator(0))
    with pytest.raises(ArgumentError, match="inverse"):
        curv.power(0.5)
    total = (curv + cv.kfac(case.model_fn, case.params, case.batch)).damp(0.1)
    assert_close(cv.ravel(total @ (total.inverse() @ case.params)), cv.ravel(case.params), 1e-7)


def test_another_dtype_leaves_class_indices_alone() -> None:
    case = mlp()
    curv = ggn(case.model_fn, case.params, case.batch)
    single = curv.to(dtype=torch.float32)
    v = {name: leaf.float() for name, leaf in case.params.items()}
    assert (single @ v)["0.weight"].dtype == torch.float32
    assert_close(cv.ravel(single @ v).double(), cv.ravel(curv @ case.params), 1e-5)


def test_what_is_not_a_tensor_in_the_inputs_is_passed_on() -> None:
    case = mlp()
    inputs, targets = case.batch

    def model_fn(params: Any, data: Any) -> Tensor:
        assert data["name"] == "x"
        return case.model_fn(params, data["x"]) * data["factor"]

    curv = ggn(model_fn, case.params, ({"x": inputs, "name": "x", "factor": 1}, targets))
    assert_close(curv.to_dense(), case.ggn())
    assert_close(curv.trace(), case.ggn().trace())


# --- the Jacobian -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_jacobian_and_its_transpose_are_adjoint_linear_maps(mode: str) -> None:
    case = mlp()
    J = jacobian(case.model_fn, case.params, case.batch[0], mode=mode)
    dense = reference.jacobians(case.model_fn, case.params, case.batch[0]).flatten(0, 1)
    v = {name: normal(3, 4, *leaf.shape) for name, leaf in case.params.items()}
    u = normal(4, 3, 5, 2)
    assert_close(J.matmat(v).flatten(1), reference.rows(v, 4) @ dense.mT)
    assert_close((J @ reference.example_of(v, 1)).flatten(), dense @ cv.ravel(reference.example_of(v, 1)))
    assert_close(reference.rows(J.T.matmat(u), 3), u.flatten(1) @ dense)
    assert_close(cv.ravel(J.transpose() @ u[0]), u[0].flatten() @ dense)
    assert_close(J.T.to_dense(), dense.mT)
    assert J.T.T is J
    assert J.T.transpose() is J
    with pytest.raises(ShapeError):
        J.T @ normal(0, 5, 3)


# --- a network on digits ------------------------------------------------------------------------------------------


def test_a_kfac_preconditioner_saves_two_thirds_of_the_iterations_of_a_badly_conditioned_system() -> None:
    # pixels from 0 to 16, as they come, and weak damping: a badly conditioned system, which is where it pays most
    data = load_digits()
    batch = torch.tensor(data.data[:256]), torch.tensor(data.target[:256])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
    model_fn, params = cv.functional(net)
    calls: list[int] = []

    def counted(params: Any, inputs: Tensor) -> Tensor:
        calls.append(1)
        return model_fn(params, inputs)

    curv = ggn(counted, params, batch).damp(1e-5)
    gradient = torch.func.grad(lambda p: cv.CrossEntropy().value(model_fn(p, batch[0]), batch[1]))(params)
    preconditioner = cv.kfac(model_fn, params, batch, fisher="type-2").inverse(1e-5)
    products = []
    for option in (None, preconditioner):
        calls.clear()
        solve(curv, gradient, preconditioner=option, tolerance=1e-4, max_iterations=5000)
        products.append(len(calls))
    assert 3 * products[1] <= products[0], products
