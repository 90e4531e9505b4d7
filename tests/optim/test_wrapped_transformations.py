"""Options in the state, plateaus, steps left out, gradients accumulated: against plain loops and torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import curvlib as cv
import curvlib.optim as optim
from curvlib.pytree import flatten

PARAMS = {"w": torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


def gradients(count: int) -> list[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [{"w": torch.randn(3, 2, generator=source, dtype=torch.float64)} for _ in range(count)]


def run(transformation: optim.GradientTransformation, grads: list[Any], **extra: Any) -> list[Tensor]:
    state, result = transformation.init(PARAMS), []
    for grad in grads:
        updates, state = transformation.update(grad, state, PARAMS, **extra)
        result.append(updates["w"])
    return result


def assert_same(one: list[Tensor], two: list[Tensor]) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(state)[0] if isinstance(leaf, Tensor)]


# --- inject_hyperparams ---------------------------------------------------------------------------------------------


def test_injected_options_give_the_same_updates() -> None:
    grads = gradients(5)
    for make, options in (
        (optim.adamw, {"learning_rate": 0.1, "betas": (0.8, 0.95)}),
        (optim.soap, {"learning_rate": 0.1, "refresh": optim.Every(2), "eps": 1e-6}),
        (optim.muon, {"learning_rate": 0.1, "weight_decay": 0.3, "scaling": "rms"}),
    ):
        assert_same(run(optim.inject_hyperparams(make)(**options), grads), run(make(**options), grads))


def test_injected_schedules_are_the_schedule() -> None:
    grads, schedule = gradients(6), optim.warmup_cosine(0.1, 2, 5)
    injected = optim.inject_hyperparams(optim.adamw)(schedule)
    assert_same(run(injected, grads), run(optim.adamw(schedule), grads))
    state = injected.init(PARAMS)
    for step, grad in enumerate(grads):
        _, state = injected.update(grad, state, PARAMS)
        assert state.hyperparams["learning_rate"].item() == schedule(step)


def test_the_host_replaces_options_between_steps() -> None:
    injected, grads = optim.inject_hyperparams(optim.adamw)(0.1, betas=(0.8, 0.95)), gradients(4)
    state, plain = injected.init(PARAMS), optim.adamw(0.1, betas=(0.8, 0.95))
    plain_state = plain.init(PARAMS)
    for step, grad in enumerate(grads):
        if step == 2:
            state = state.replace(learning_rate=0.01, betas=(0.5, 0.95))
            plain = optim.adamw(0.01, betas=(0.5, 0.95))
        updates, state = injected.update(grad, state, PARAMS)
        expected, plain_state = plain.update(grad, plain_state, PARAMS)
        assert_same([updates["w"]], [expected["w"]])
    with pytest.raises(cv.errors.ArgumentError, match="no option 'momentum'"):
        state.replace(momentum=0.9)


def test_static_arguments_stay_as_they_are() -> None:
    decays = lambda name, leaf: False  # noqa: E731
    injected = optim.inject_hyperparams(optim.adamw, static_args=("mask", "eps"))(0.1, mask=decays)
    assert set(injected.init(PARAMS).hyperparams) == {"learning_rate", "betas", "weight_decay"}
    assert_same(run(injected, gradients(3)), run(optim.adamw(0.1, mask=decays), gradients(3)))
    with pytest.raises(cv.errors.ArgumentError, match="no argument 'masks'"):
        optim.inject_hyperparams(optim.adamw, static_args="masks")


def test_an_injected_rate_is_an_input_of_a_trace() -> None:
    injected = optim.inject_hyperparams(optim.scale_by_learning_rate)(0.5)
    state, grad = injected.init(PARAMS), gradients(1)[0]

    def step(rate: Tensor) -> Tensor:
        return injected.update(grad, state.replace(learning_rate=rate), PARAMS)[0]["w"]

    traced = make_fx(step)(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(traced(torch.tensor(0.25, dtype=torch.float64)), -0.25 * grad["w"])


# --- reduce_on_plateau ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"cooldown": 2}, {"rtol": 0.05}, {"min_scale": 0.3}, {"atol": 0.1, "rtol": 0.0},
])  # fmt: skip
def test_plateaus_are_those_of_torch(options: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    threshold = {"threshold": options["atol"], "threshold_mode": "abs"} if "atol" in options else {
        "threshold": options.get("rtol", 1e-4)
    }
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=2, eps=0.0, cooldown=options.get("cooldown", 0),
        min_lr=options.get("min_scale", 0.0), **threshold,
    )  # fmt: skip
    transformation = optim.reduce_on_plateau(factor=0.5, patience=3, **options)
    state = transformation.init(PARAMS)
    losses = 2 - 0.01 * torch.arange(60.0, dtype=torch.float64) + torch.rand(
        60, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    scales = []
    for loss in losses:
        updates, state = transformation.update(PARAMS, state, PARAMS, value=loss)
        scheduler.step(loss.item())
        scales.append(optimizer.param_groups[0]["lr"])
        torch.testing.assert_close(updates["w"], scales[-1] * PARAMS["w"], rtol=1e-14, atol=0)
    assert scales[-1] < 0.6


def test_plateaus_are_of_averages() -> None:
    single = optim.reduce_on_plateau(factor=0.5, patience=2)
    several = optim.reduce_on_plateau(factor=0.5, patience=2, accumulation_size=3)
    one, three = single.init(PARAMS), several.init(PARAMS)
    losses = torch.rand(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
    for i in range(0, 30, 3):
        _, one = single.update(PARAMS, one, value=sum(losses[i : i + 3]) / 3)
        for loss in losses[i : i + 3]:
            _, three = several.update(PARAMS, three, value=loss)
        assert one.scale == three.scale
    assert one.scale < 0.2


def test_the_loss_is_passed_through_a_chain_and_asked_for() -> None:
    transformation = optim.chain(optim.adamw(0.1), optim.reduce_on_plateau(patience=1))
    updates = run(transformation, gradients(3), value=1.0)
    plain = run(optim.adamw(0.1), gradients(3))
    assert_same(updates, [plain[0], 0.1 * plain[1], 0.01 * plain[2]])
    with pytest.raises(cv.errors.ArgumentError, match="value=loss"):
        transformation.update(PARAMS, transformation.init(PARAMS), PARAMS)
    for wrong in ({"factor": 1.0}, {"patience": 0}, {"rtol": -1.0}, {"accumulation_size": 0}):
        with pytest.raises(cv.errors.ArgumentError, match=next(iter(wrong))):
            optim.reduce_on_plateau(**wrong)  # type: ignore[arg-type]


# --- apply_if_finite ------------------------------------------------------------------------------------------------


def spoiled(at: set[int], count: int) -> list[dict[str, Tensor]]:
    grads = gradients(count)
    for i in at:
        grads[i]["w"][1, 0] = float("inf") if i % 2 else float("nan")
    return grads


def test_steps_that_are_not_finite_are_left_out() -> None:
    inner = optim.soap(0.1, refresh=optim.Every(2))
    wrapped = optim.apply_if_finite(inner, 2)
    state, grads, missing = wrapped.init(PARAMS), spoiled({1, 2, 5}, 7), {1, 2, 5}
    expected = iter(run(inner, [g for i, g in enumerate(grads) if i not in missing]))
    for i, grad in enumerate(grads):
        updates, state = wrapped.update(grad, state, PARAMS, step=i + 1)
        assert_same([updates["w"]], [torch.zeros_like(PARAMS["w"]) if i in missing else next(expected)])
        assert bool(state.last_finite) == (i not in missing)
    assert [int(x) for x in (state.notfinite_count, state.total_notfinite)] == [0, 3]


def test_too_many_steps_that_are_not_finite_are_seen() -> None:
    updates = run(optim.apply_if_finite(optim.scale(1.0), 1), spoiled({1, 2, 3}, 5))
    assert [bool(u.isfinite().all()) for u in updates] == [True, True, False, False, True]


def test_a_traced_step_is_left_out_as_an_eager_one() -> None:
    wrapped = optim.apply_if_finite(optim.scale_by_adam(), 3)
    _, state = wrapped.update(gradients(1)[0], wrapped.init(PARAMS))

    def step(grad: Tensor, *leaves: Tensor) -> Any:
        rebuilt = cv.pytree.unflatten(flatten(state)[1], list(leaves))
        updates, new = wrapped.update({"w": grad}, rebuilt)
        return updates["w"], *tensors(new)

    traced = make_fx(step)(gradients(1)[0]["w"], *tensors(state))
    for grad in spoiled({0}, 2):
        updates, new = wrapped.update(grad, state)
        for a, b in zip(traced(grad["w"], *tensors(state)), [updates["w"], *tensors(new)], strict=True):
            assert torch.equal(a, b)


# --- multi_steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
def test_accumulated_gradients_make_the_steps_of_their_means(mean: bool) -> None:
    grads = gradients(9)
    inner = optim.soap(0.1, refresh=optim.Every(2))
    updates = run(optim.multi_steps(inner, 3, use_grad_mean=mean), grads)
    totals = [{"w": sum(g["w"] for g in grads[i : i + 3]) / (3 if mean else 1)} for i in (0, 3, 6)]
    torch.testing.assert_close(updates[2::3], run(inner, totals), rtol=1e-9, atol=1e-12)
    for i in (0, 1, 3, 4, 6, 7):
        assert not updates[i].any()


def test_the_number_of_gradients_follows_a_schedule() -> None:
    transformation = optim.multi_steps(optim.scale(1.0), lambda done: done + 1)
    moved = [bool(update.any()) for update in run(transformation, gradients(6))]
    assert moved == [True, False, True, False, False, True]


def test_traced_steps_are_decided_by_the_number_of_the_call() -> None:
    transformation = optim.multi_steps(optim.scale_by_adam(), 2)
    state, grads = transformation.init(PARAMS), gradients(4)
    eager = run(transformation, grads)
    for i, grad in enumerate(grads):

        def step(g: Tensor, *leaves: Tensor, number: int = i + 1, like: Any = state) -> Any:
            updates, new = transformation.update({"w": g}, cv.pytree.unflatten(flatten(like)[1], leaves), step=number)
            return updates["w"], *tensors(new)

        result = make_fx(step)(grad["w"], *tensors(state))(grad["w"], *tensors(state))
        state = cv.pytree.unflatten(flatten(state)[1], list(result[1:]))
        assert_same([result[0]], [eager[i]])
    with pytest.raises(cv.errors.ArgumentError, match="step="):
        make_fx(lambda g: transformation.update({"w": g}, state)[0]["w"])(grads[0]["w"])


def test_half_precision_accumulates_in_full_precision() -> None:
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    transformation = optim.multi_steps(optim.scale(1.0), 300, use_grad_mean=False)
    state = transformation.init(params)
    for _ in range(300):
        updates, state = transformation.update({"w": torch.ones(1, dtype=torch.bfloat16)}, state)
    assert updates["w"].item() == 300  # bfloat16 would stay at 256
    with pytest.raises(cv.errors.ArgumentError, match="positive number of gradients"):
        optim.multi_steps(optim.identity(), 0)
