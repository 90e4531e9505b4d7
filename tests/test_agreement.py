"""Matrix-free products are those of the model's gradients, or refused, where modes see different functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain
import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import generator, normal, randomized
from pairwise import every_pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvlib as cv
from curvlib.errors import CaptureError
from curvlib.estimators import ggn, gramian, hessian, jacobian

EXACT = 1e-10
ALL = (ggn, hessian, gramian, jacobian)


def assert_close(estimate: Tensor, truth: Tensor) -> None:
    assert reference.relative_error(estimate, truth) <= EXACT


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def classes(number: int, seed: int = 5) -> Tensor:
    return torch.randint(2, (number,), generator=generator(seed))


def of_module(module: nn.Module, inputs: Any) -> tuple[Any, Any, Any]:
    model_fn, params = cv.functional(module.double())
    return model_fn, randomized(params, 3), inputs


class ThroughNumbers(nn.Module):
    """A model that stops gradients in one of many ways."""

    def __init__(self, stop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.stop = nn.Linear(3, 4), nn.Linear(4, 2), stop

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden * self.stop(hidden) + hidden.sin())


def no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return (2 * x).exp()


def no_grad_in_place(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.zeros_like(x)
        y += x
        y.mul_(3)
    return y


def grad_disabled(x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        parts = x.exp().chunk(2, 1)
    return torch.cat(parts, 1)


class Checkpointed(nn.Sequential):
    """Layers under activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Backwards(torch.autograd.Function):
    """x^3 with a backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3 * ctx.saved_tensors[0] ** 2


class WrongForward(torch.autograd.Function):
    """2 x with a wrong rule for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return 2.1 * tangents[0]


class Round(torch.autograd.Function):
    """Rounding, whose gradient is taken to be one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


MODELS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "padding": lambda: of_module(
        nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 2)),
        torch.randint(3, (5, 3), generator=generator(1)),
    ),
    "padding at the end": lambda: of_module(
        nn.Sequential(nn.Embedding(4, 3, padding_idx=-1), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)),
        torch.randint(4, (5, 2), generator=generator(1)),
    ),
    "padding, torch.embedding": lambda: (
        lambda p, x: torch.embedding(p["w"], x, 1).flatten(1) @ p["v"],
        {"v": normal(1, 6, 2), "w": normal(2, 4, 3)},
        torch.randint(4, (5, 2), generator=generator(1)),
    ),
    "padding, checkpointed": lambda: of_module(
        Checkpointed(nn.Embedding(4, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)),
        torch.randint(4, (5, 2), generator=generator(1)),
    ),
    "sparse": lambda: of_module(
        nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)),
        torch.randint(4, (5, 2), generator=generator(1)),
    ),
    "no_grad": lambda: of_module(ThroughNumbers(no_grad), normal(0, 5, 3)),
    "no_grad, in place": lambda: of_module(ThroughNumbers(no_grad_in_place), normal(0, 5, 3)),
    "set_grad_enabled": lambda: of_module(ThroughNumbers(grad_disabled), normal(0, 5, 3)),
    "detach": lambda: of_module(ThroughNumbers(lambda x: x.detach().exp()), normal(0, 5, 3)),
    "data": lambda: of_module(ThroughNumbers(lambda x: x.data), normal(0, 5, 3)),
    "straight through": lambda: of_module(ThroughNumbers(lambda x: x + (x.round() - x).detach()), normal(0, 5, 3)),
    "straight through, no_grad": lambda: of_module(
        ThroughNumbers(lambda x: x + no_grad(x) - x.detach()), normal(0, 5, 3)
    ),
    "stopped weight": lambda: (
        lambda p, x: (torch.tanh(x @ p["a"]) + x @ p["a"].detach()) @ p["b"],
        {"a": normal(1, 3, 4), "b": normal(2, 4, 2)},
        normal(3, 5, 3),
    ),
    "backward only": lambda: of_module(ThroughNumbers(Backwards.apply), normal(0, 5, 3)),
    "wrong forward mode": lambda: of_module(ThroughNumbers(WrongForward.apply), normal(0, 5, 3)),
    "plain": lambda: of_module(ThroughNumbers(lambda x: x), normal(0, 5, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_plain_reverse_mode(name: str) -> None:
    model_fn, params, inputs = MODELS[name]()
    batch = (inputs, classes(len(inputs)))
    J = plain.jacobian(model_fn, params, inputs)
    assert_close(ggn(model_fn, params, batch).to_dense(), plain.ggn(model_fn, params, batch, cross_entropy))
    assert_close(gramian(model_fn, params, batch).to_dense(), J.mT @ J)
    linear = jacobian(model_fn, params, inputs)
    assert_close(linear.to_dense(), J)
    v = {name: normal(9, *leaf.shape) for name, leaf in params.items()}
    assert_close((linear @ v).flatten(), J @ cv.ravel(v))
    truth = plain.hessian(model_fn, params, batch, cross_entropy)
    assert_close(truth, truth.mT)
    assert_close(hessian(model_fn, params, batch).to_dense(), truth)


@pytest.mark.parametrize("make", [ggn, hessian])
def test_systems_are_solved_where_padding_has_no_gradient(make: Any) -> None:
    model_fn, params, inputs = MODELS["padding"]()
    curv = make(model_fn, params, (inputs, classes(5)))
    x = curv.inverse(10.0, solver=cv.CG(tolerance=1e-12)) @ params
    assert_close(cv.ravel(curv.damp(10.0) @ x), cv.ravel(params))


@pytest.mark.parametrize("name", ["padding", "padding at the end", "sparse", "no_grad", "set_grad_enabled", "plain"])
def test_forward_mode_serves_models_whose_calls_stop_gradients(name: str) -> None:
    model_fn, params, inputs = MODELS[name]()
    for make in (ggn, hessian):
        assert make(model_fn, params, (inputs, classes(5))).mode == "forward"


def test_a_given_mode_that_disagrees_is_refused() -> None:
    model_fn, params, inputs = MODELS["wrong forward mode"]()
    batch = (inputs, classes(5))
    for make in (ggn, hessian, gramian):
        with pytest.raises(CaptureError, match="mode='reverse'"):
            make(model_fn, params, batch, mode="forward")
        assert make(model_fn, params, batch, mode="reverse").mode == "reverse"


# --- calls that are run by their formulas -----------------------------------------------------------------------------


def bags(table: Tensor, tokens: Tensor, kind: str, padding: int | None) -> Tensor:
    """Sums or means of rows, bag by bag."""
    result = []
    for bag in tokens:
        rows = [table[token] for token in bag.tolist() if token != padding]
        total = torch.stack(rows).sum(0) if rows else torch.zeros_like(table[0])
        result.append(total / max(1, len(rows)) if kind == "mean" else total)
    return torch.stack(result)


@every_pair("kind, padding, sparse, mode", ["sum", "mean"], [None, 1], [False, True], ["forward", "reverse"])
def test_bags_of_rows_are_sums_of_rows(kind: str, padding: int | None, sparse: bool, mode: str) -> None:
    layer = nn.EmbeddingBag(5, 3, mode=kind, padding_idx=padding, sparse=sparse).double()
    tokens = torch.tensor([[1, 1, 1], [0, 1, 4], [3, 3, 2], [2, 0, 1]])
    params = {"table": normal(1, 5, 3), "w": normal(2, 3, 2)}
    offsets = torch.arange(0, 15, 3)

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return torch.tanh(torch.func.functional_call(layer, {"weight": p["table"]}, (x,))) @ p["w"]

    def with_offsets(p: Any, x: Tensor) -> Tensor:
        flat = F.embedding_bag(
            x.flatten(), p["table"], offsets, mode=kind, padding_idx=padding, sparse=sparse, include_last_offset=True
        )
        return torch.tanh(flat) @ p["w"]

    def by_hand(p: Any, x: Tensor) -> Tensor:
        return torch.tanh(bags(p["table"], x, kind, padding)) @ p["w"]

    batch = (tokens, classes(4))
    for model in (model_fn, with_offsets):
        truth = plain.ggn(by_hand, params, batch, cross_entropy)
        assert_close(ggn(model, params, batch, mode=mode).to_dense(), truth)
        truth = plain.hessian(by_hand, params, batch, cross_entropy)
        assert_close(hessian(model, params, batch, mode=mode).to_dense(), truth)


def test_bags_of_weighed_rows_are_weighed_sums_and_largest_rows_are_refused() -> None:
    params = {"table": normal(1, 5, 3), "weights": normal(3, 4, 3)}
    batch = (torch.randint(5, (4, 3), generator=generator(2)), normal(4, 4, 3))

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return F.embedding_bag(x, p["table"], mode="sum", per_sample_weights=p["weights"])

    def by_hand(p: Any, x: Tensor) -> Tensor:
        return (p["table"][x] * p["weights"].unsqueeze(-1)).sum(1)

    for make in (ggn, hessian):
        estimate, truth = (make(f, params, batch, loss=cv.MSE()).to_dense() for f in (model_fn, by_hand))
        assert_close(estimate, truth)
    with pytest.raises(CaptureError, match="amax"):
        ggn(lambda p, x: F.embedding_bag(x, p["table"], mode="max"), {"table": params["table"]}, batch, loss=cv.MSE())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@every_pair(
    "dim, normalize, mode",
    [0, 1, None],
    [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm],
    ["forward", "reverse"],
)
def test_normalized_weights_have_the_curvature_of_their_formula(normalize: Any, mode: str, dim: int | None) -> None:
    model_fn, params, inputs = of_module(
        nn.Sequential(normalize(nn.Linear(3, 4), dim=dim), nn.Tanh(), nn.Linear(4, 2)), normal(0, 5, 3)
    )
    names = sorted(name for name in params if name.startswith("0.") and name != "0.bias")
    g, v = names  # original0 and original1, or weight_g and weight_v

    def by_hand(p: Any, x: Tensor) -> Tensor:
        norm = p[v].norm() if dim is None else p[v].norm(dim=1 - dim, keepdim=True)
        return F.linear(torch.tanh(F.linear(x, p[v] * p[g] / norm, p["0.bias"])), p["2.weight"], p["2.bias"])

    batch = (inputs, classes(5))
    assert_close(ggn(model_fn, params, batch, mode=mode).to_dense(), plain.ggn(by_hand, params, batch, cross_entropy))
    truth = plain.hessian(by_hand, params, batch, cross_entropy)
    assert_close(hessian(model_fn, params, batch, mode=mode).to_dense(), truth)


# --- what has no curvature --------------------------------------------------------------------------------------------


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -0.5 * gradients[0]


def hooked(hook: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def through(x: Tensor) -> Tensor:
        y = x.exp()
        if y.requires_grad:
            y.register_hook(hook)
        return y

    return through


CLIPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "clamped": hooked(lambda g: g.clamp(-1, 1)),
    "clipped by norm": hooked(lambda g: g * (10 / g.norm()).clamp(max=1)),
    "normalized": hooked(lambda g: g / (g.norm() + 1e-8)),
    "rounded": hooked(lambda g: (64 * g).round() / 64),
}


@pytest.mark.parametrize("make", [ggn, gramian])
@pytest.mark.parametrize("name", CLIPPED)
def test_hooks_that_change_gradients_are_refused(name: str, make: Any) -> None:
    model_fn, params, inputs = of_module(ThroughNumbers(CLIPPED[name]), normal(0, 5, 3))
    with pytest.raises(CaptureError, match="changes gradients on their way back"):
        make(model_fn, params, (inputs, classes(5)))


def test_hooks_that_look_at_gradients_are_fine() -> None:
    seen: list[Tensor] = []
    model_fn, params, inputs = of_module(ThroughNumbers(hooked(lambda g: seen.append(g))), normal(0, 5, 3))
    batch = (inputs, classes(5))
    assert_close(ggn(model_fn, params, batch).to_dense(), plain.ggn(model_fn, params, batch, cross_entropy))
    assert seen


class Between(ThroughNumbers):
    """A model with something between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.stop(self.first(x))))


class NoGradient(torch.autograd.Function):
    """The identity with a backward pass that is the derivative of no function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.saved_tensors[0].roll(1, -1)


def test_a_hessian_of_gradients_of_no_function_is_refused_and_their_ggn_is_that_of_the_gradients() -> None:
    model_fn, params, inputs = of_module(Between(NoGradient.apply), normal(0, 5, 3))
    batch = (inputs, classes(5))
    assert_close(ggn(model_fn, params, batch).to_dense(), plain.ggn(model_fn, params, batch, cross_entropy))
    with pytest.raises(CaptureError, match="no curvature belongs to them"):
        hessian(model_fn, params, batch)


@pytest.mark.parametrize("make", [ggn, hessian])
def test_reversed_gradients_have_the_curvature_of_a_reversed_layer(make: Any) -> None:
    model_fn, params, inputs = of_module(Between(Reversal.apply), normal(0, 5, 3))
    batch = (inputs, classes(5))
    truth = getattr(plain, make.__name__)(model_fn, params, batch, cross_entropy)
    assert_close(truth, truth.mT)
    assert_close(make(model_fn, params, batch).to_dense(), truth)


def test_straight_through_gradients_have_the_curvature_of_a_shifted_model() -> None:
    model_fn, params, inputs = of_module(Between(Round.apply), 3 * normal(0, 5, 3))
    batch = (inputs, classes(5))
    assert_close(ggn(model_fn, params, batch).to_dense(), plain.ggn(model_fn, params, batch, cross_entropy))
    truth = plain.hessian(model_fn, params, batch, cross_entropy)
    assert_close(truth, truth.mT)
    assert_close(hessian(model_fn, params, batch).to_dense(), truth)


@every_pair(
    "frozen, kind, option, make",
    [False, True],
    [nn.Embedding, nn.EmbeddingBag],
    [{"max_norm": 0.5}, {"scale_grad_by_freq": True}],
    ALL,
)
def test_tables_that_change_or_count_are_refused_and_stay_as_they_are(
    make: Any, option: Any, kind: Any, frozen: Any
) -> None:
    net = nn.Sequential(kind(7, 4, **option), nn.Flatten(), nn.Linear(12 if kind is nn.Embedding else 4, 2)).double()
    tokens = torch.randint(7, (5, 3), generator=generator(1))
    net[0].weight.requires_grad_(not frozen)
    before = net[0].weight.detach().clone()
    model_fn, params = cv.functional(net)
    with pytest.raises(CaptureError, match=next(iter(option))):
        make(model_fn, params, tokens if make is jacobian else (tokens, classes(5)))
    assert torch.equal(before, net[0].weight)


# --- low precision ----------------------------------------------------------------------------------------------------


def deep(dtype: torch.dtype, *, norm: bool) -> tuple[Any, Any, Tensor]:
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(16, 16), *([nn.LayerNorm(16)] if norm else []), nn.GELU()]
    model_fn, params = cv.functional(nn.Sequential(*layers, nn.Linear(16, 2)).to(dtype))
    values = randomized(params, 5)
    return model_fn, {name: leaf.to(dtype) for name, leaf in values.items()}, normal(3, 20, 16).to(dtype)


@every_pair("make, norm, dtype", [ggn, hessian], [False, True], [torch.float32, torch.bfloat16])
def test_rounding_is_no_disagreement(make: Any, dtype: torch.dtype, norm: bool) -> None:
    model_fn, params, inputs = deep(dtype, norm=norm)
    assert make(model_fn, params, (inputs, classes(20))).mode == "forward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_closed_over_tensors_in_low_precision_are_no_disagreement(dtype: torch.dtype) -> None:
    model_fn, params, inputs = deep(torch.float32, norm=True)
    weight = normal(1, 16, 16).to(dtype)

    def cast(p: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model_fn(p, (x.to(dtype) @ weight).to(x.dtype))

    assert ggn(cast, params, (inputs, classes(20))).mode == "forward"


@pytest.mark.parametrize("make", [ggn, gramian])
def test_faults_of_some_per_cent_are_noticed_in_float32(make: Any) -> None:
    class Off(WrongForward):
        generate_vmap_rule = True

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
            return 2.2 * tangents[0]

    model_fn, params = cv.functional(ThroughNumbers(Off.apply))
    for double in (False, True):
        offset = torch.zeros(3, dtype=torch.float64 if double else torch.float32)
        curv = make(lambda p, x, o=offset: model_fn(p, (x + o).float()), params, (torch.randn(5, 3), classes(5)))
        assert curv.mode == "reverse"


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_rounding_that_cancellation_enlarges_is_no_disagreement(mode: str) -> None:
    x, params = normal(1, 6, 3), {"a": normal(2, 3, 2), "b": normal(3, 3, 2)}

    def model_fn(p: Any, x: Tensor) -> Tensor:
        large = 1e4 * torch.tanh(x @ p["a"])
        return (large + torch.sin(x @ p["b"])) - 1e4 * torch.tanh(x @ p["a"]) + x @ p["a"]

    batch = (x, torch.tensor([0, 1, 1, 0, 1, 0]))
    product = cv.ggn(model_fn, params, batch, mode=mode) @ params
    exact = cv.ggn(lambda p, x: torch.sin(x @ p["b"]) + x @ p["a"], params, batch) @ params
    for name in params:
        torch.testing.assert_close(product[name], exact[name], rtol=1e-9, atol=1e-9)
