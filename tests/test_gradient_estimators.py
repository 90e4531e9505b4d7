"""What Shampoo, KL-Shampoo and DyKAF have in common: the interface, the algebra, transforms, and no side effects."""

from __future__ import annotations

from functools import partial
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from exactness_problems import problem
from gradient_cases import leaves, normal, relative_error, run
from layer_zoo import ZOO
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import curvlib as cv
from curvlib.estimators import dykaf, kl_shampoo, shampoo

ESTIMATORS = {"shampoo": shampoo, "kl-shampoo": kl_shampoo, "dykaf": dykaf}
every_estimator = pytest.mark.parametrize("how", ESTIMATORS.values(), ids=ESTIMATORS)
both_engines = pytest.mark.parametrize("engine", ["functional", "autograd"])


def grads(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """A leaf of every order."""
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "vector": (3,), "matrix": (3, 2), "tensor": (2, 3, 2)}
    return {name: normal(seed + i, *shape).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.double().reshape(-1) for leaf in leaves(tree)])


def stepped(how: Any, decay: float | None = 0.9) -> cv.BlockDiagonal:
    return run(how, [grads(10 * t) for t in range(4)], decay)


@every_estimator
@pytest.mark.parametrize("decay", [0.9, None])
def test_the_whole_algebra_agrees_with_the_dense_matrix(how: Any, decay: float | None) -> None:
    curv, v = stepped(how, decay), grads(77)
    dense, identity = curv.to_dense(), torch.eye(22, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(dense)[0]) >= -1e-12 * float(dense.norm())
    order = cv.ravel(v)
    assert relative_error(cv.ravel(curv @ v), dense @ order) <= 1e-10
    assert relative_error(cv.ravel(curv.inverse(0.1) @ v), torch.linalg.solve(dense + 0.1 * identity, order)) <= 1e-9
    values, vectors = torch.linalg.eigh(dense + 0.1 * identity)
    root = (vectors * values**-0.5) @ vectors.mT
    assert relative_error(cv.ravel(curv.power(-0.5, 0.1) @ v), root @ order) <= 1e-9
    assert relative_error(curv.damp(0.1).logdet(), values.log().sum()) <= 1e-9
    assert relative_error(curv.trace(), dense.trace()) <= 1e-10
    assert (
        relative_error(cv.ravel(curv.inverse(0.1).diag()), torch.linalg.inv(dense + 0.1 * identity).diagonal()) <= 1e-9
    )
    projected = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(v, rank=100))(v)
    assert {name: tuple(x.shape) for name, x in projected.items()} == {
        "scalar": (1,),
        "vector": (3,),
        "matrix": (3, 2),
        "tensor": (2, 6),
    }
    draws = curv.sample(torch.Generator().manual_seed(0), 20_000)
    rows = torch.cat([draws[name].reshape(20_000, -1) for name in sorted(v)], 1)
    spread = float((dense.trace() ** 2 + dense.norm() ** 2) / 20_000) ** 0.5
    assert float((rows.mT @ rows / 20_000 - dense).norm()) <= 6 * spread


@every_estimator
def test_files_hold_the_state_and_updates_go_on_from_there(how: Any, tmp_path: Any) -> None:
    curv = stepped(how)
    cv.save(curv, tmp_path / "curv")
    loaded = cv.load(tmp_path / "curv")
    expected = how.update(curv, grads(99), 0.9)
    actual = how.update(loaded, grads(99), 0.9)
    for a, b in zip(
        optree.tree_leaves(actual, namespace="curvlib"), optree.tree_leaves(expected, namespace="curvlib"), strict=True
    ):
        assert torch.equal(a, b)


@every_estimator
def test_updates_can_be_mapped_over_a_stack_of_problems_and_traced(how: Any) -> None:
    states, new = [stepped(how), how.update(stepped(how), grads(55), 0.3)], [grads(70), grads(80)]
    stacked, gradients = (torch_pytree.tree_map(lambda *x: torch.stack(x), *pair) for pair in (states, new))
    mapped = torch.func.vmap(lambda curv, g: how.update(curv, g, 0.8))(stacked, gradients)
    decay = torch.tensor(0.8, dtype=torch.float64)
    traced = make_fx(lambda curv, g, d: how.update(curv, g, d))(states[0], new[0], decay)
    for i, (state, gradient) in enumerate(zip(states, new, strict=True)):
        expected = torch_pytree.tree_leaves(how.update(state, gradient, 0.8))
        for actual in (torch_pytree.tree_map(lambda x, i=i: x[i], mapped), traced(state, gradient, decay)):
            for a, b in zip(torch_pytree.tree_leaves(actual), expected, strict=True):
                assert relative_error(a, b) <= 1e-11
    first = torch.func.vmap(lambda g: how.init(g))(gradients)
    for a, b in zip(torch_pytree.tree_leaves(first), torch_pytree.tree_leaves(how.init(new[1])), strict=True):
        assert relative_error(a[1], b) <= 1e-11


@every_estimator
def test_an_update_never_looks_at_values(how: Any) -> None:
    curv = stepped(how)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:  # any look at a value is an error
        fake, gradient = (torch_pytree.tree_map(mode.from_tensor, x) for x in (curv, grads(1)))
        updated = how.update(fake, gradient, 0.9)
        again = how.update(updated, gradient, None)
    shapes = [[tuple(x.shape) for x in torch_pytree.tree_leaves(state)] for state in (curv, updated, again)]
    assert shapes[0] == shapes[1] == shapes[2]


@every_estimator
def test_nothing_is_changed(how: Any) -> None:
    case = problem(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), normal(1, 6, 3), "mse", "mean")
    curv, gradient, state = stepped(how), grads(3), torch.get_rng_state()
    inputs = torch_pytree.tree_leaves((curv, gradient))
    before, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    how.update(curv, gradient, 0.9)
    how.update(curv, gradient, None)
    how.init(gradient)
    params = [x.clone() for x in case.params.values()]
    for per_example, engine in ((False, "functional"), (False, "autograd"), (True, "autograd")):
        how(noisy, case.params, case.batch, loss=cv.MSE(), per_example=per_example, engine=engine)
    assert all(torch.equal(x, y) for x, y in zip(case.params.values(), params, strict=True))
    assert not any(x.requires_grad for x in case.params.values())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions


def noisy(params: Any, x: Tensor) -> Tensor:
    hidden = torch.nn.functional.linear(x, params["0.weight"], params["0.bias"])
    hidden = torch.nn.functional.dropout(hidden, 0.5)  # draws from the global generator
    return torch.nn.functional.linear(hidden, params["1.weight"], params["1.bias"])


@every_estimator
def test_half_precision_gradients_have_curvature_in_float32(how: Any) -> None:
    gradients = [grads(t, torch.bfloat16) for t in range(3)]
    curv = run(how, gradients, 0.9)
    assert {x.dtype for x in torch_pytree.tree_leaves(curv)} == {torch.float32}
    wide = run(how, [torch_pytree.tree_map(torch.Tensor.float, g) for g in gradients], 0.9)
    assert torch.equal(curv.to_dense(), wide.to_dense())


@every_estimator
def test_zero_gradients_leave_everything_finite(how: Any) -> None:
    zero = optree.tree_map(torch.zeros_like, grads(0))
    curv = how.init(zero)
    assert float(curv.to_dense().norm()) == 0
    curv = how.update(how.update(curv, zero, 0.9), zero, None)
    assert float(curv.to_dense().norm()) == 0
    curv = how.update(curv, grads(1), 0.9)  # and the first that is not zero starts it
    assert bool(curv.to_dense().isfinite().all())
    assert all(float(block.trace()) > 0 for block in curv.blocks.values())
    later = how.update(curv, zero, 0.5)
    assert bool(later.to_dense().isfinite().all())
    assert 0 < float(later.trace()) <= 0.5 * float(curv.trace()) * (1 + 1e-12)


@every_estimator
@both_engines
def test_a_model_without_biases_has_the_curvature_of_its_objectives_gradient(how: Any, engine: str) -> None:
    case = problem(
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)),
        normal(1, 9, 3),
        "cross-entropy",
        "mean",
    )
    loader = list(zip(*(x.split([3, 4, 2]) for x in case.batch), strict=True))
    curv = how(case.model_fn, case.params, cv.over(loader), engine=engine)
    gradients = [
        torch.func.grad(lambda p, b=batch: case.kind.objective(case.model_fn(p, b[0]), b[1], "mean"))(case.params)
        for batch in loader
    ]
    expected = how.init(gradients[0])
    for t, gradient in enumerate(gradients[1:], 1):
        expected = how.update(expected, gradient, t / (t + 1))
    for a, b in zip(torch_pytree.tree_leaves(curv), torch_pytree.tree_leaves(expected), strict=True):
        assert relative_error(a, b) <= 1e-10
    one = how(case.model_fn, case.params, loader[0], engine=engine)
    for a, b in zip(torch_pytree.tree_leaves(one), torch_pytree.tree_leaves(how.init(gradients[0])), strict=True):
        assert relative_error(a, b) <= 1e-10


@every_estimator
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("model", ["linear", "conv2d with groups", "layer norm", "tied", "embeddings", "experts"])
def test_models_of_every_kind_have_the_blocks_of_kfac(how: Any, model: str, per_example: bool) -> None:
    case = ZOO[model]()
    options: dict[str, Any] = {"per_example": per_example}
    curv = how(case.model_fn, case.params, case.batch(), **options)
    kfac = cv.kfac(case.model_fn, case.params, case.batch(), tied="merge")
    assert curv.layouts == kfac.layouts
    assert {name: type(x) for name, x in curv.blocks.items()} == {name: type(x) for name, x in kfac.blocks.items()}
    assert float(curv.eigenvalues()[0]) >= -1e-12 * float(curv.frobenius_norm())
    other = how(case.model_fn, case.params, case.batch(), engine="functional", **options)
    for (name, a), b in zip(curv.blocks.items(), other.blocks.values(), strict=True):
        assert relative_error(a.damp(1.0).to_dense(), b.damp(1.0).to_dense()) <= 1e-6, name
    gradient = optree.tree_map(torch.ones_like, case.params)
    assert how.update(curv, gradient, 0.5).layouts == curv.layouts


@every_estimator
def test_eigenvalue_correction_makes_the_trace_exact(how: Any) -> None:
    case = problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(1, 6, 3), "mse", "mean")
    options: dict[str, Any] = {"loss": cv.MSE()}
    for per_example in (False, True):
        curv = how(case.model_fn, case.params, case.batch, per_example=per_example, **options)
        corrected = cv.eigenvalue_correct(curv, case.model_fn, case.params, case.batch, fisher="empirical", **options)
        exact = case.blocks(case.empirical_fisher())
        assert relative_error(corrected.trace(), exact.trace()) <= 1e-11
        assert float((corrected.to_dense() - exact).norm()) <= float(exact.norm())


@every_estimator
def test_the_estimate_of_a_model_can_be_traced(how: Any) -> None:
    case = problem(nn.Sequential(nn.Linear(3, 2)), normal(1, 4, 3), "mse", "mean")
    inputs, targets = case.batch
    plan = cv.plan(case.model_fn, case.params, inputs)
    for per_example in (False, True):
        options: dict[str, Any] = {"loss": cv.MSE(), "per_example": per_example, "plan": plan}
        fn = lambda p, x, y: how(case.model_fn, p, (x, y), **options)  # noqa: B023, E731
        traced = make_fx(fn)(case.params, inputs, targets)(case.params, 2 * inputs, targets)
        for a, b in zip(
            torch_pytree.tree_leaves(traced),
            torch_pytree.tree_leaves(fn(case.params, 2 * inputs, targets)),
            strict=True,
        ):
            assert relative_error(a, b) <= 1e-8


@every_estimator
def test_mistakes_are_named(how: Any) -> None:
    curv = how.init(grads(0))
    with pytest.raises(cv.errors.ArgumentError, match="between 0 and 1"):
        how.update(curv, grads(1), 1.5)
    with pytest.raises(cv.errors.ArgumentError, match="elementwise must be one of"):
        how.init(grads(0), elementwise="full")
    with pytest.raises(cv.errors.PytreeError, match="'vector' is missing"):
        how.update(curv, {k: v for k, v in grads(1).items() if k != "vector"}, 0.5)
    with pytest.raises(cv.errors.ShapeError, match="'matrix'"):
        how.update(curv, {**grads(1), "matrix": torch.ones(2, 3)}, 0.5)
    for other in (curv.inverse(0.1), curv.power(0.5)):
        with pytest.raises(cv.errors.ArgumentError, match=r"block 'matrix': .*update the curvature that"):
            how.update(other, grads(1), 0.5)
    with pytest.raises(cv.errors.DtypeError, match="'w'"):
        how.init({"w": torch.ones(2, 2, dtype=torch.int64)})
    case = ZOO["linear"]()
    with pytest.raises(cv.errors.ArgumentError, match="engine"):
        how(case.model_fn, case.params, case.batch(), engine="reverse")
    infinite = {name: x * float("inf") if name.startswith("2") else x for name, x in case.params.items()}
    with pytest.raises(cv.errors.NonFiniteError, match=r"block '[02].weight'"):
        how(case.model_fn, infinite, case.batch())
    wrong = [(torch.ones(2, 3).double(), torch.tensor([0, 5]))]
    with pytest.raises(cv.errors.TargetError):
        how(case.model_fn, case.params, cv.over(wrong))


@every_estimator
@pytest.mark.parametrize("engine", [None, "functional", "autograd"])
@pytest.mark.parametrize("made", ["before", "inside", "inside, used outside"])
def test_the_objectives_gradient_is_right_in_inference_mode(how: Any, made: str, engine: str | None) -> None:
    case = problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(1, 6, 3), "cross-entropy", "mean")
    expected = how(case.model_fn, case.params, case.batch)
    params, batch = case.params, case.batch
    if made != "before":
        with torch.inference_mode():
            params, batch = torch_pytree.tree_map(torch.Tensor.clone, (params, batch))
    with torch.inference_mode(made != "inside, used outside"):
        curv = how(case.model_fn, params, batch, engine=engine)
        assert relative_error(curv.damp(1.0).to_dense(), expected.damp(1.0).to_dense()) <= 1e-7


@every_estimator
@both_engines
def test_sparse_gradients_of_an_embedding_are_gradients(how: Any, engine: str) -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor, *, sparse: bool) -> Tensor:
        return torch.tanh(torch.nn.functional.embedding(x, p["table"], sparse=sparse)).flatten(1) @ p["w"]

    params = {"table": normal(1, 6, 3), "w": normal(2, 12, 2)}
    batch = torch.arange(20).reshape(5, 4) % 6, torch.arange(5) % 2
    for per_example in (False, True):
        curv, expected = (
            how(partial(model_fn, sparse=sparse), params, batch, engine=engine, per_example=per_example)
            for sparse in (True, False)
        )
        assert torch.equal(curv.to_dense(), expected.to_dense())
