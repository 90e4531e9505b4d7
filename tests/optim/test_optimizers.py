"""What every optimizer must do: the matrix of `optimizers_cases`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import curvlib as cv
import curvlib.optim as optim
from curvlib.errors import CurvlibError, PytreeError, ShapeError
from curvlib.pytree import Tree, flatten, ravel, tree_map, unflatten
from tests.optim.optimizers_cases import (
    CASES,
    CONTAINERS,
    Case,
    assert_close,
    assert_same,
    copied,
    every_compiled_optimizer,
    every_optimizer,
    every_traceable_optimizer,
    grads_of,
    minimised,
    quadratic,
    random_leaves,
    rosenbrock,
)


@every_optimizer
@pytest.mark.parametrize(("problem", "steps"), [(quadratic, 100), (rosenbrock, 150)])
def test_it_minimises(case: Case, problem: Callable[[Tree], Tensor], steps: int) -> None:
    params = [torch.zeros_like(leaf) for leaf in random_leaves(case, 0)]
    found, _ = minimised(case.make(optim.warmup_cosine(case.rate, 10, steps)), problem, params, steps)
    assert float(problem(found)) < 0.02 * float(problem(params))


@every_optimizer
def test_update_changes_nothing_it_is_given(case: Case) -> None:
    transformation = case.make(0.1)
    params, state = minimised(transformation, rosenbrock, random_leaves(case, 0), 2)
    grads = grads_of(rosenbrock, params)
    before = copied((params, grads)), copied(state)
    first = transformation.update(grads, state, params)
    kept = copied(first[0]), copied(first[1])
    again = transformation.update(grads, state, params)
    assert_same((params, grads), before[0])
    assert_same(state, before[1])
    assert_same(first[0], kept[0])
    assert_same(first[1], kept[1])
    assert_same(first[0], again[0])
    assert_same(first[1], again[1])


@every_optimizer
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_pytree_makes_no_difference(case: Case, container: str) -> None:
    made = CONTAINERS[container](random_leaves(case, 0))
    leaves, structure = flatten(made)
    transformation = case.make(0.1)
    found, _ = minimised(transformation, quadratic, made, 3)
    expected, _ = minimised(transformation, quadratic, leaves, 3)
    assert flatten(found)[1] == structure
    assert_close(found, expected)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_keep_their_dtype(case: Case, dtype: torch.dtype) -> None:
    params = random_leaves(case, 0, dtype)
    found, _ = minimised(case.make(0.1), quadratic, params, 3)
    for leaf, start in zip(found, params, strict=True):
        assert leaf.dtype == dtype
        assert leaf.shape == start.shape
        assert bool(leaf.isfinite().all())
    assert not torch.equal(found[-1], params[-1])


@every_optimizer
def test_float32_follows_float64(case: Case) -> None:
    params = random_leaves(case, 0, torch.float32)
    start = [leaf.double() for leaf in params]
    single = ravel(minimised(case.make(0.01), quadratic, params, 3)[0])
    double = ravel(minimised(case.make(0.01), quadratic, start, 3)[0])
    assert float((single - double).norm()) <= case.float32 * float((double - ravel(start)).norm())


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_give_finite_updates(case: Case, dtype: torch.dtype) -> None:
    transformation = case.make(0.1)
    params = random_leaves(case, 0, dtype)
    zeros = [torch.zeros_like(leaf) for leaf in params]
    for state in (transformation.init(params), minimised(transformation, quadratic, params, 3)[1]):
        for _ in range(2):
            updates, state = transformation.update(zeros, state, params)
            assert all(bool(leaf.isfinite().all()) for leaf in updates)
            assert all(bool(leaf.isfinite().all()) for leaf in flatten(state)[0])


@every_optimizer
def test_the_state_can_be_saved_and_mapped(case: Case, tmp_path: Path) -> None:
    transformation = case.make(optim.constant(0.1))
    params, state = minimised(transformation, rosenbrock, CONTAINERS["nested"](random_leaves(case, 0)), 2)
    cv.save(state, tmp_path / "state.safetensors")
    loaded = cv.load(tmp_path / "state.safetensors")
    mapped = tree_map(torch.clone, state)
    grads = grads_of(rosenbrock, params)
    updates, new = transformation.update(grads, state, params)
    for other in (loaded, mapped):
        assert_same(other, state)
        other_updates, other_new = transformation.update(grads, other, params)
        assert_same(other_updates, updates)
        assert_same(other_new, new)


@every_optimizer
def test_gradients_that_do_not_fit_are_refused_by_name(case: Case) -> None:
    transformation = case.make(0.1)
    params = {"first": random_leaves(case, 0)[-1], "second": random_leaves(case, 0)[-2]}
    state = transformation.init(params)
    if case.name.endswith("sgd"):  # these take any pytree of gradients
        update: Callable[[Tree], Tree] = lambda grads: optim.apply_updates(  # noqa: E731
            params, transformation.update(grads, state, params)[0]
        )
    else:
        update = lambda grads: transformation.update(grads, state, params)  # noqa: E731
    with pytest.raises(PytreeError, match="'second' is missing"):
        update({"first": params["first"]})
    with pytest.raises(ShapeError, match="'second'"):
        update({"first": params["first"], "second": torch.zeros(7)})


@every_optimizer
def test_unsupported_leaves_are_refused_by_name(case: Case) -> None:
    for order in {0, 1} - set(case.orders):
        with pytest.raises(CurvlibError, match="'bias'"):
            case.make(0.1).init({"bias": torch.zeros((2,) * order)})


@every_traceable_optimizer
def test_a_stack_of_problems_is_a_loop(case: Case) -> None:
    transformation = case.make(lambda step: 0.1 / (1 + step))
    problems = [random_leaves(case, seed) for seed in range(3)]
    params: Tree = [torch.stack(leaves) for leaves in zip(*problems, strict=True)]
    state = torch.func.vmap(transformation.init)(params)
    for step in (1, 2):
        grads = torch.func.vmap(lambda p: grads_of(rosenbrock, p))(params)
        updates, state = torch.func.vmap(partial(transformation.update, step=step))(grads, state, params)
        params = optim.apply_updates(params, updates)
    for i, start in enumerate(problems):
        expected, expected_state = minimised(transformation, rosenbrock, start, 2)
        assert_close([leaf[i] for leaf in params], expected, 1e-10)
        assert_close([leaf[i] for leaf in flatten(state)[0]], expected_state, 1e-10)


@every_traceable_optimizer
def test_no_value_is_looked_at(case: Case) -> None:
    transformation = case.make(optim.warmup_cosine(0.1, 1, 5))
    with FakeTensorMode():
        # torch without CUDA cannot index what pretends to be on a GPU
        device = "cpu" if "dykaf" in case.name else "cuda"
        params = [torch.empty(leaf.shape, device=device) for leaf in random_leaves(case, 0)]
        state = transformation.init(params)
        for step in (1, 2):
            updates, state = transformation.update(params, state, params, step=step)
            params = optim.apply_updates(params, updates)
    assert all(leaf.device.type == device for leaf in params)


@every_traceable_optimizer
def test_a_traced_update_is_the_eager_one(case: Case) -> None:
    transformation = case.make(optim.warmup_cosine(0.1, 1, 5))
    params, state = minimised(transformation, rosenbrock, random_leaves(case, 0), 2)
    grads = grads_of(rosenbrock, params)
    leaves, structure = flatten((grads, state, params))
    traced = make_fx(lambda *leaves: flatten(transformation.update(*unflatten(structure, leaves), step=3))[0])(*leaves)
    assert_close(traced(*leaves), transformation.update(grads, state, params))


@every_compiled_optimizer
def test_a_compiled_update_is_the_eager_one(case: Case) -> None:
    transformation = case.make(optim.warmup_cosine(0.1, 1, 5))
    params, state = minimised(transformation, rosenbrock, random_leaves(case, 0), 2)
    grads = grads_of(rosenbrock, params)
    torch.compiler.reset()
    compiled = torch.compile(transformation.update, backend="eager", fullgraph=True)
    assert_close(compiled(grads, state, params, step=3), transformation.update(grads, state, params))


@pytest.mark.slow
def test_an_update_in_machine_code_is_the_eager_one() -> None:
    case = next(case for case in CASES if case.name == "muon and adamw")
    transformation = case.make(optim.warmup_cosine(0.1, 1, 5))
    params, state = minimised(transformation, rosenbrock, random_leaves(case, 0), 2)
    grads = grads_of(rosenbrock, params)
    torch.compiler.reset()
    compiled = torch.compile(transformation.update, fullgraph=True)
    for _ in range(2):
        assert_close(compiled(grads, state, params), transformation.update(grads, state, params), 1e-10)
        state = transformation.update(grads, state, params)[1]
