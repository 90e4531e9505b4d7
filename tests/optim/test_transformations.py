"""Chains, scaling, clipping, momentum, weight decay and grafting, one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib.optim as optim
from curvlib.errors import ArgumentError, PytreeError, ShapeError
from curvlib.pytree import Tree, flatten, ravel, tree_map
from tests.optim.optimizers_cases import assert_close, assert_same, grads_of, rosenbrock

moderately = settings(deadline=None, max_examples=20)
numbers = st.floats(0.01, 100.0)


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in {"w": (4, 3), "b": (3,), "c": ()}.items()
    }


def once(transformation: optim.GradientTransformation, grads: Tree, params: Tree | None = None) -> Tree:
    return transformation.update(grads, transformation.init(grads), params)[0]


# --- chains -----------------------------------------------------------------------------------------------------


@moderately
@given(factors=st.lists(numbers, max_size=4))
def test_a_chain_applies_one_after_the_other(factors: list[float]) -> None:
    found = once(optim.chain(*map(optim.scale, factors)), start())
    assert_close(found, tree_map(lambda leaf: math.prod(factors) * leaf, start()), 1e-14)


def test_a_chain_hands_over_updates_params_and_each_state() -> None:
    def counting(name: str) -> optim.GradientTransformation:
        def update(grads: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
            return (*grads, name, params), (*state, name)

        return optim.GradientTransformation(lambda params: (params,), update)

    transformation = optim.chain(counting("a"), counting("b"))
    updates, state = transformation.update((), transformation.init("start"), "params")
    assert updates == ("a", "params", "b", "params")
    assert state.states == (("start", "a"), ("start", "b"))


def test_the_order_of_a_chain_counts() -> None:
    clipped_last = optim.chain(optim.scale(100.0), optim.clip_by_global_norm(1.0))
    assert_close(ravel(once(clipped_last, start())).norm(), torch.tensor(1.0, dtype=torch.float64), 1e-14)
    clipped_first = optim.chain(optim.clip_by_global_norm(1.0), optim.scale(100.0))
    assert_close(ravel(once(clipped_first, start())).norm(), torch.tensor(100.0, dtype=torch.float64), 1e-14)


def test_identity_and_the_empty_chain_change_nothing() -> None:
    for transformation in (optim.identity(), optim.chain()):
        assert_same(once(transformation, start()), start())


def test_the_state_of_another_chain_is_refused() -> None:
    state = optim.chain(optim.identity()).init(start())
    with pytest.raises(ArgumentError, match="chain of 1 transformations and this one has 2"):
        optim.chain(optim.identity(), optim.identity()).update(start(), state)


def test_further_arguments_reach_every_member() -> None:
    seen: list[Any] = []

    def update(grads: Tree, state: Any, params: Tree | None = None, *, value: float, **extra: Any) -> tuple[Tree, Any]:
        seen.append(value)
        return grads, state

    spy = optim.GradientTransformation(lambda params: optim.Stateless(), update)
    parts = optim.partition({"matrix": optim.graft(spy, spy), "rest": spy}, optim.matrices_or_rest)
    transformation = optim.chain(optim.scale_by_adam(), parts, optim.scale_by_learning_rate(optim.constant(0.1)))
    transformation.update(start(), transformation.init(start()), start(), value=7.0, other=1)
    assert seen == [7.0] * 3


STATEFUL: dict[str, optim.GradientTransformation] = {
    "scale_by_learning_rate with a number": optim.scale_by_learning_rate(0.1),
    "scale_by_learning_rate with a schedule": optim.scale_by_learning_rate(optim.constant(0.1)),
    "scale_by_adam": optim.scale_by_adam(),
    "heavy_ball": optim.heavy_ball(0.9),
    "add_decayed_weights": optim.add_decayed_weights(0.1),
    "graft": optim.graft(optim.identity(), optim.identity()),
    "partition": optim.partition({"a": optim.identity()}, lambda name, leaf: "a"),
    "chain": optim.chain(),
    "scale_by_soap": optim.scale_by_soap(),
    "scale_by_shampoo": optim.scale_by_shampoo(),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_of_another_transformation_is_refused_and_both_are_named(name: str) -> None:
    for other, transformation in STATEFUL.items():
        if other != name:
            state = transformation.init(start())
            with pytest.raises(ArgumentError, match=f"{name} needs .*{type(state).__name__}"):
                STATEFUL[name].update(start(), state, start())


# --- applying updates -------------------------------------------------------------------------------------------


def test_apply_updates_adds_in_the_wider_dtype_and_keeps_the_parameters_own() -> None:
    params = {"half": torch.ones(1, dtype=torch.bfloat16), "double": torch.ones(1, dtype=torch.float64)}
    # a little more than half the distance to the next bfloat16: rounded to bfloat16 before the sum, it would be lost
    updates = {"half": torch.full((1,), 2**-8 + 1e-6), "double": torch.full((1,), 0.25)}
    found = optim.apply_updates(params, updates)
    assert found["half"].dtype == torch.bfloat16
    assert found["half"].item() == 1 + 2**-7
    assert found["double"].dtype == torch.float64
    assert found["double"].item() == 1.25


def test_apply_updates_names_what_does_not_fit() -> None:
    with pytest.raises(PytreeError, match="'w' is missing"):
        optim.apply_updates(start(), {"b": start()["b"], "c": start()["c"]})
    with pytest.raises(ShapeError, match="'b'"):
        optim.apply_updates(start(), start() | {"b": torch.ones(1)})


# --- clipping ---------------------------------------------------------------------------------------------------


@moderately
@given(limit=numbers)
def test_the_global_norm_is_clipped_as_torch_does(limit: float) -> None:
    found = once(optim.clip_by_global_norm(limit), start())
    total = float(ravel(start()).norm())
    assert_close(found, tree_map(lambda leaf: leaf * min(1.0, limit / total), start()), 1e-14)
    parameters = [torch.nn.Parameter(leaf) for leaf in flatten(start())[0]]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)  # which adds 1e-6 to the norm
    assert_close(flatten(found)[0], [parameter.grad for parameter in parameters], 1e-6)


@moderately
@given(limit=numbers)
def test_each_norm_is_clipped(limit: float) -> None:
    found = once(optim.clip_by_norm(limit), start())
    for name, leaf in start().items():
        assert_close(found[name], leaf * min(1.0, limit / float(leaf.norm())), 1e-14)


@pytest.mark.parametrize("clip", [optim.clip_by_global_norm, optim.clip_by_norm])
def test_gradients_below_the_limit_stay_bit_for_bit(clip: Any) -> None:
    assert_same(once(clip(1e3), start()), start())


@pytest.mark.parametrize("clip", [optim.clip_by_global_norm, optim.clip_by_norm])
def test_clipping_works_on_mixed_dtypes_and_large_half_precision(clip: Any) -> None:
    grads = {"half": torch.full((4,), 6e4, dtype=torch.float16), "double": torch.zeros(1, dtype=torch.float64)}
    found = once(clip(1.0), grads)
    assert {name: leaf.dtype for name, leaf in found.items()} == {name: leaf.dtype for name, leaf in grads.items()}
    assert_close(found["half"].double(), torch.full((4,), 0.5, dtype=torch.float64), 1e-3)


def test_a_global_norm_of_nothing_is_nothing() -> None:
    assert once(optim.clip_by_global_norm(1.0), {}) == {}


# --- momentum ---------------------------------------------------------------------------------------------------


def stepped(transformation: optim.GradientTransformation, steps: int) -> Tree:
    params = start()
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(grads_of(rosenbrock, params), state, params)
        params = optim.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("kind", [0.0, 0.4, "nesterov"])
def test_momentum_is_torchs(decay: float, kind: Any) -> None:
    if kind == "nesterov":
        transformation, options = optim.nesterov(decay), {"nesterov": decay > 0}
    else:
        transformation, options = optim.heavy_ball(decay, dampening=kind), {"dampening": kind}
    parameters = [torch.nn.Parameter(leaf) for leaf in flatten(start())[0]]
    theirs = torch.optim.SGD(parameters, lr=1e-3, momentum=decay, **options)
    for _ in range(20):
        grads = grads_of(rosenbrock, [parameter.detach() for parameter in parameters])
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        theirs.step()
    found = stepped(optim.chain(transformation, optim.scale_by_learning_rate(1e-3)), 20)
    if decay == 0 and kind == 0.4:  # without momentum torch has no dampening either
        found = stepped(optim.scale_by_learning_rate(1e-3), 20)
    assert_close(flatten(found)[0], [parameter.detach() for parameter in parameters], 1e-12)


def test_dampening_by_the_decay_gives_the_moving_average() -> None:
    transformation = optim.heavy_ball(0.75, dampening=0.75)
    state = transformation.init(torch.zeros(1))
    for grad, expected in ((8.0, 8.0), (0.0, 6.0), (4.0, 5.5)):
        updates, state = transformation.update(torch.tensor([grad]), state)
        assert updates.item() == expected


# --- weight decay and learning rates ----------------------------------------------------------------------------


def test_weight_decay_adds_the_parameters() -> None:
    params = tree_map(lambda leaf: leaf + 1, start())
    found = once(optim.add_decayed_weights(0.25), start(), params)
    assert_close(found, tree_map(lambda grad, param: grad + 0.25 * param, start(), params), 1e-15)


def test_the_learning_rate_may_be_a_tensor() -> None:
    rate = torch.tensor(0.5, dtype=torch.float64)
    assert_same(once(optim.scale_by_learning_rate(rate), start()), once(optim.scale_by_learning_rate(0.5), start()))


# --- grafting ---------------------------------------------------------------------------------------------------


def test_a_graft_has_the_direction_of_one_and_the_norms_of_the_other() -> None:
    direction, magnitude = optim.scale_by_adam(), optim.heavy_ball(0.9)
    both = optim.graft(direction, magnitude)
    states = both.init(start()), direction.init(start()), magnitude.init(start())
    for seed in range(3):
        grads = tree_map(lambda leaf, seed=seed: (leaf + seed).sin(), start())
        updates, grafted = both.update(grads, states[0])
        d, ours = direction.update(grads, states[1])
        m, theirs = magnitude.update(grads, states[2])
        states = grafted, ours, theirs
        for name in grads:
            assert_close(updates[name], d[name] * m[name].norm() / d[name].norm(), 1e-14)
        assert_same((grafted.direction, grafted.magnitude), (ours, theirs))


def test_grafting_onto_itself_changes_nothing() -> None:
    adam = optim.scale_by_adam()
    assert_close(once(optim.graft(adam, adam), start()), once(adam, start()), 1e-15)


def test_a_zero_direction_stays_zero() -> None:
    found = once(optim.graft(optim.scale(0.0), optim.identity()), start())
    assert all(bool((leaf == 0).all()) for leaf in found.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.clip_by_global_norm(0.0),
        lambda: optim.clip_by_norm(-1.0),
        lambda: optim.heavy_ball(1.0),
        lambda: optim.heavy_ball(0.9, dampening=-0.1),
        lambda: optim.nesterov(math.nan),
        lambda: optim.add_decayed_weights(-0.1),
    ],
)
def test_impossible_numbers_are_refused(make: Any) -> None:
    with pytest.raises(ArgumentError):
        make()
