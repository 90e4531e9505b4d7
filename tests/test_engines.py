"""The two engines agree, and kfac composes with torch.func and tracing, for every kind of layer."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from exactness_problems import generator
from layer_zoo import BLOCK, ZOO, checkpointed, of_function
from pairwise import every_pair
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import curvlib as cv
from curvlib.capture import execute
from curvlib.pytree import flatten

every_model = pytest.mark.parametrize("model", ZOO)
every_fisher = pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])


def assert_equal(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    """Equal structures, and leaves that agree to rounding."""
    (x, first), (y, second) = flatten(a), flatten(b)
    assert first == second
    for one, other in zip(x, y, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().amax().clamp(min=1)))


@every_pair("sharing, fisher, model", ["expand", "reduce"], ["type-2", "mc", "empirical", "forward-only"], ZOO)
def test_engines_agree(model: str, fisher: str, sharing: str) -> None:
    case = ZOO[model]()
    one, other = (
        cv.kfac(case.model_fn, case.params, case.batch(), fisher=fisher, sharing=sharing, mc_samples=2, engine=engine)
        for engine in ("functional", "autograd")
    )
    assert_equal(one, other)


@every_pair(
    "shape, bias, examples, fisher",
    [(3,), (1, 3), (1, 1, 3), (1, 3, 3)],
    [True, False],
    [1, 5],
    ["type-2", "mc", "empirical", "forward-only"],
)
def test_engines_agree_where_a_layers_input_is_constant(
    shape: tuple[int, ...], bias: bool, examples: int, fisher: str
) -> None:
    constant = torch.randn(shape, generator=generator(1), dtype=torch.float64)

    def model_fn(p: Any, x: Tensor) -> Tensor:
        z = torch.tanh(torch.nn.functional.linear(constant, p["w"], p.get("b")))
        z = z.sum(1) if z.ndim == 3 else z
        return torch.tanh(x @ p["v"]) * z

    shapes = {"w": (2, 3), "v": (4, 2)} | ({"b": (2,)} if bias else {})
    case = of_function(model_fn, shapes, 4)
    batch = case.inputs[:examples], torch.arange(examples) % 2
    one, other = (
        cv.kfac(model_fn, case.params, batch, fisher=fisher, engine=engine) for engine in ("functional", "autograd")
    )
    assert_equal(one, other)
    if fisher == "type-2" and shape != (1, 3, 3):  # of one position that is the same for all examples KFAC is exact
        exact = cv.ggn(model_fn, case.params, batch).to_dense()
        names = [name for name, leaf in sorted(case.params.items()) for _ in range(leaf.numel())]
        index = torch.tensor([name != "v" for name in names]).nonzero().squeeze(1)
        torch.testing.assert_close(one.to_dense()[index][:, index], exact[index][:, index], rtol=1e-10, atol=1e-13)


@every_model
def test_engines_agree_on_dense_elementwise_blocks_and_merged_uses(model: str) -> None:
    case = ZOO[model]()
    one, other = (
        cv.kfac(case.model_fn, case.params, case.batch("numbers"), loss=cv.MSE(), fisher="type-2",
                elementwise="dense", engine=engine)
        for engine in ("functional", "autograd")
    )  # fmt: skip
    assert_equal(one, other)


@every_model
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_vmap_over_an_ensemble_is_the_plain_call_for_each_member(model: str, fisher: str) -> None:
    case = ZOO[model]()
    members = [case.params, cv.pytree.tree_map(lambda leaf: 0.5 * leaf + 0.1, case.params)]
    stacked = cv.pytree.tree_map(lambda *leaves: torch.stack(leaves), *members)

    batch = case.batch()

    def estimate(params: Any) -> cv.BlockDiagonal:
        return cv.kfac(case.model_fn, params, batch, fisher=fisher)

    together = torch.func.vmap(estimate)(stacked)
    for i, member in enumerate(members):
        assert_equal(cv.pytree.tree_map(lambda leaf, i=i: leaf[i], together), estimate(member))


@every_model
@pytest.mark.parametrize("tracing", ["real", "symbolic"])
def test_a_trace_replays_for_other_params_and_data(model: str, tracing: str) -> None:
    case = ZOO[model]()
    inputs, targets = case.batch()

    def factors(params: Any, inputs: Any, targets: Tensor) -> list[Tensor]:
        return flatten(cv.kfac(case.model_fn, params, (inputs, targets), fisher="empirical"))[0]

    closed_over = tracing == "symbolic"  # buffers
    graph = make_fx(factors, tracing_mode=tracing, _allow_non_fake_inputs=closed_over)(case.params, inputs, targets)
    params = cv.pytree.tree_map(lambda leaf: 0.5 * leaf + 0.1, case.params)
    flipped = cv.pytree.tree_map(lambda x: x.flip(0), inputs)
    assert_equal(graph(params, flipped, targets), factors(params, flipped, targets))


@pytest.mark.parametrize("model", ["linear", "conv2d", "layer norm", "embeddings"])
def test_the_gradient_of_a_trace_is_its_finite_difference(model: str) -> None:
    case = ZOO[model]()
    batch = case.batch()

    def trace(params: Any) -> Tensor:
        return cv.kfac(case.model_fn, params, batch, fisher="type-2").trace()

    gradient = cv.ravel(torch.func.grad(trace)(case.params))
    direction = torch.randn(gradient.shape, generator=generator(0), dtype=torch.float64)
    step = cv.unravel(1e-5 * direction, case.params)
    ahead, behind = (trace(move(case.params, step)) for move in (cv.pytree.add, cv.pytree.subtract))
    torch.testing.assert_close((ahead - behind) / 2e-5, gradient @ direction, rtol=1e-6, atol=1e-10)


def test_draws_under_vmap_are_those_of_the_plain_call() -> None:
    case = ZOO["linear"]()
    batch = case.batch()
    stacked = cv.pytree.tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), case.params)
    together = torch.func.vmap(lambda p: cv.kfac(case.model_fn, p, batch, mc_samples=3), randomness="same")(stacked)
    alone = cv.kfac(case.model_fn, case.params, batch, mc_samples=3)
    assert_equal(cv.pytree.tree_map(lambda leaf: leaf[0], together), alone)


@every_fisher
def test_activation_checkpointing_changes_nothing(fisher: str) -> None:
    plain, case = ZOO["matmul"](), of_function(checkpointed, BLOCK, 3)
    expected = cv.kfac(plain.model_fn, plain.params, plain.batch(), fisher=fisher)
    assert_equal(cv.kfac(case.model_fn, case.params, plain.batch(), fisher=fisher), expected)


class Scaled(torch.autograd.Function):
    """A function of the old style, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * gradients[0]


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_custom_autograd_functions_of_the_old_style_work(fisher: str) -> None:
    plain = of_function(lambda p, x: torch.tanh(2 * (x @ p["w"] + p["b"])) @ p["v"], BLOCK, 3)
    case = of_function(lambda p, x: torch.tanh(Scaled.apply(x @ p["w"] + p["b"])) @ p["v"], BLOCK, 3)
    expected = cv.kfac(plain.model_fn, plain.params, plain.batch(), fisher=fisher)
    assert_equal(cv.kfac(case.model_fn, case.params, plain.batch(), fisher=fisher), expected)


@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_nothing_of_a_call_stays_alive(engine: str) -> None:
    case = ZOO["linear"]()
    plan = cv.plan(case.model_fn, case.params, case.inputs)
    gc.collect()
    gc.disable()
    try:
        run = execute(plan, case.model_fn, case.params, case.inputs, lambda number, operand, z: z.square(), engine)
        run.pull([torch.ones_like(run.outputs).unsqueeze(0).detach()], lambda number, kept, g: None)
        kept = weakref.ref(run.kept[0])
        del run
        assert kept() is None
    finally:
        gc.enable()


def test_type_2_in_pieces_equals_type_2_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ZOO["attention"]()
    expected = cv.kfac(case.model_fn, case.params, case.batch(), fisher="type-2")
    for engine in ("functional", "autograd"):
        monkeypatch.setattr("curvlib.capture.engines.ELEMENTS_AT_ONCE", 1)
        one_by_one = cv.kfac(case.model_fn, case.params, case.batch(), fisher="type-2", engine=engine)
        assert_equal(one_by_one, expected)
