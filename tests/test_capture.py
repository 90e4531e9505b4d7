"""What the plan says about every way to use a parameter, and which uses are refused with which words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import assert_exact, normal, problem
from layer_zoo import ZOO, Params
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvlib as cv

X = normal(0, 5, 3)


def leaves(**shapes: tuple[int, ...]) -> Params:
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


# --- the plan -----------------------------------------------------------------------------------------------------


def test_a_plan_is_a_readable_table() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    model_fn, params = cv.functional(net)
    assert str(cv.plan(model_fn, params, torch.zeros(2, 3, 4, 4))).splitlines() == [
        "call           output        parameters        as",
        "-------------  ------------  ----------------  ---------------------------",
        "0 convolution  [N, 8, 4, 4]  0.weight, 0.bias  convolution 27 + 1 -> 8",
        "1 group_norm   [N, 8, 4, 4]  1.weight, 1.bias  elementwise scale and shift",
        "2 linear       [N, 10]       4.weight, 4.bias  linear 128 + 1 -> 10",
        "6 parameters in 3 of 3 known calls, 3 blocks; output [N, 10]",
    ]


@pytest.mark.parametrize("model", ZOO)
def test_a_plan_is_hashable_and_the_same_each_time_and_for_any_number_of_examples(model: str) -> None:
    case = ZOO[model]()
    first, second = (cv.plan(case.model_fn, case.params, case.inputs) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    fewer = cv.pytree.tree_map(lambda x: x[:2], case.inputs)
    assert cv.plan(case.model_fn, case.params, fewer) == first


def test_a_plan_made_before_serves_batches_of_other_sizes() -> None:
    case = ZOO["conv2d"]()
    plan = cv.plan(case.model_fn, case.params, case.inputs)
    inputs, targets = case.inputs[:2], torch.tensor([0, 1])
    expected = cv.kfac(case.model_fn, case.params, (inputs, targets)).to_dense()
    assert torch.equal(cv.kfac(case.model_fn, case.params, (inputs, targets), plan=plan).to_dense(), expected)


def test_planning_computes_nothing() -> None:
    sizes: list[bool] = []

    def model_fn(p: Params, x: Tensor) -> Tensor:
        sizes.append(type(x).__name__ == "FakeTensor")
        return x @ p["w"]

    cv.plan(model_fn, leaves(w=(3, 2)), X)
    assert sizes == [True]


def test_a_model_with_control_flow_that_depends_on_values_works() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        h = F.linear(x, p["0.weight"], p["0.bias"])
        h = torch.tanh(h) if h.sum() > 0 else h.square()
        return F.linear(h, p["1.weight"])

    shapes = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4), "1.weight": torch.zeros(2, 4)}
    case = problem(model_fn, X[:1], "cross-entropy", "mean", params=shapes)
    for sign in (1, -1):
        case.params["0.bias"] = torch.full((4,), sign * 3.0, dtype=torch.float64)
        assert_exact(case.kfac(), case.blocks(case.ggn()))
    assert not cv.plan(case.model_fn, case.params, X).static


@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("condition", ["any", "torch.any", "sum", "count"])
def test_a_branch_on_a_mask_is_the_one_that_is_taken(condition: str, taken: bool, engine: str) -> None:
    exists: dict[str, Callable[[Tensor], object]] = {
        "any": lambda mask: mask.any(),
        "torch.any": torch.any,
        "sum": lambda mask: mask.sum() > 0,
        "count": lambda mask: torch.count_nonzero(mask) > 0,
    }

    def branch(p: Params, x: Tensor, there: object) -> Tensor:
        h = torch.tanh(x @ p["0.weight"])
        h = torch.tanh(h @ p["1.weight"]) if there else torch.sin(h @ p["1.weight"].T)
        return h @ p["2.weight"]

    def model_fn(p: Params, x: Tensor) -> Tensor:
        return branch(p, x, exists[condition](x[:, 0] > 5))

    x = torch.cat([X[:, :1] + (10 if taken else 0), X[:, 1:]], 1)
    params = leaves(**{"0.weight": (3, 4), "1.weight": (4, 4), "2.weight": (4, 2)})
    batch = x, torch.arange(5) % 2
    curv, expected = (
        cv.kfac(f, params, batch, fisher="type-2", engine=engine) for f in (model_fn, lambda p, x: branch(p, x, taken))
    )
    assert curv.layouts == expected.layouts
    torch.testing.assert_close(curv.to_dense(), expected.to_dense(), rtol=1e-12, atol=1e-14)
    assert not cv.plan(model_fn, params, x).static


def test_a_parameter_of_a_branch_that_is_not_taken_is_unused() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        return (x @ p["1.weight"] if (x[:, 0] > 5).any() else x) @ p["2.weight"]

    params = leaves(**{"1.weight": (3, 3), "2.weight": (3, 2)})
    with pytest.raises(cv.errors.UnusedParameterError, match=r"'1\.weight'"):
        cv.kfac(model_fn, params, (X, torch.arange(5) % 2))


def test_the_examples_axis_is_found_where_other_axes_are_as_long() -> None:
    x = normal(1, 3, 3, 3)
    plan = cv.plan(lambda p, x: (x.transpose(0, 1) @ p["w"]).transpose(0, 1), leaves(w=(3, 3)), x)
    assert plan.sites[0].shape == ((3, False), (1, True), (3, False))
    flattened = cv.plan(lambda p, x: (x.reshape(-1, 3) @ p["w"]).reshape(x.shape), leaves(w=(3, 3)), x)
    assert flattened.sites[0].shape == ((3, True), (3, False))


# --- ways to hand a weight on -------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    ".T": lambda w: w.T,
    ".t()": lambda w: w.t(),
    ".mT": lambda w: w.mT,
    ".transpose": lambda w: w.transpose(0, 1),
    ".permute": lambda w: w.permute(1, 0),
    "rearranged": lambda w: w.unsqueeze(0).transpose(1, 2)[0],
    ".to()": lambda w: w.T.to(torch.float64),
    "copied": lambda w: w.T.contiguous().clone(),
    "view": lambda w: w.reshape(2, 2, 3).reshape(4, 3).T,
}


def test_slices_of_a_rearranged_copy_are_recognized() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        copy = p["0.weight"].T.contiguous()
        return torch.cat([x @ copy[:, 1:], x @ copy[:, :1]], 1)

    case = problem(model_fn, X, "mse", "mean", params={"0.weight": torch.zeros(4, 3)})
    assert_exact(case.kfac(), case.ggn())


RESHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda w: w.t().contiguous().view(4, 3).clone(),
    "contiguous slice": lambda w: w.t().contiguous().view(4, 3)[:, :2].contiguous(),
    "cast": lambda w: w.t().contiguous().view(4, 3).to(torch.float32).double(),
    "clone of a view": lambda w: w.t().contiguous().view(2, 6).clone().view(4, 3),
    "flat": lambda w: w.t().contiguous().view(-1).clone().view(4, 3),
}


@pytest.mark.parametrize("copy", RESHAPED)
def test_a_copy_of_a_reshaped_copy_is_refused(copy: str) -> None:
    take = RESHAPED[copy]
    with pytest.raises(cv.errors.CaptureError, match=r"'0\.weight'"):
        cv.kfac(lambda p, x: x @ take(p["0.weight"]).t()[:, :2], {"0.weight": normal(1, 4, 3)}, (X, normal(2, 5, 2)))


@pytest.mark.parametrize("view", VIEWS)
def test_a_weight_is_recognized_through_views_and_copies(view: str) -> None:
    take = VIEWS[view]
    case = problem(lambda p, x: x @ take(p["0.weight"]), X, "mse", "mean", params={"0.weight": torch.zeros(4, 3)})
    assert_exact(case.kfac(), case.ggn())


def test_a_rearranged_copy_is_recognized_where_an_axis_has_two_entries() -> None:
    case = problem(lambda p, x: x @ p["0.w"].T.contiguous(), X, "mse", "mean", params={"0.w": torch.zeros(2, 3)})
    assert_exact(case.kfac(), case.ggn())


def test_chunks_of_a_weight_are_blocks_of_its_slices() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        return torch.cat([x @ part.T for part in p["0.weight"].chunk(2)], 1)

    case = problem(model_fn, X, "mse", "mean", params={"0.weight": torch.zeros(4, 3)})
    curv = case.kfac()
    assert list(curv.blocks) == ["0.weight[0]", "0.weight[1]"]
    assert curv.parameters["0.weight"] == ("0.weight[0]", "0.weight[1]")
    assert_exact(curv, case.ggn())  # the slices share no output


def test_a_weight_in_half_precision_has_factors_in_float32_and_a_domain_in_its_own_dtype() -> None:
    params = {"w": torch.randn(3, 2, dtype=torch.bfloat16)}
    curv = cv.kfac(lambda p, x: x @ p["w"], params, (X.bfloat16(), torch.zeros(5, dtype=torch.long)))
    block = curv.blocks["w"]
    assert isinstance(block, cv.Kronecker)
    assert {block.left.matrix.dtype, block.right.matrix.dtype} == {torch.float32}
    full = cv.kfac(lambda p, x: x @ p["w"], {"w": params["w"].float()}, (X.bfloat16().float(), torch.zeros(5).long()))
    torch.testing.assert_close(block.right.matrix, full.blocks["w"].right.matrix, rtol=1e-6, atol=1e-6)


def test_parameters_in_half_precision_only_inside_the_model() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), p["w"].to(torch.bfloat16)).float()

    curv = cv.kfac(model_fn, {"w": torch.randn(2, 3)}, (X.float(), torch.zeros(5, dtype=torch.long)))
    assert curv.blocks["w"].left.matrix.dtype == torch.float32


def test_a_table_of_positions_gets_an_axis_of_examples() -> None:
    plan = cv.plan(lambda p, x: x + F.embedding(torch.arange(3), p["t"]), leaves(t=(4, 2)), normal(1, 5, 3, 2))
    assert plan.sites[0].expanded
    assert plan.sites[0].shape == ((1, True), (3, False), (2, False))


# --- refused ------------------------------------------------------------------------------------------------------

W, WB = leaves(w=(3, 2)), leaves(w=(3, 2), b=(2,))
REFUSED: dict[str, tuple[Callable[[Params, Tensor], Tensor], Params, list[str]]] = {
    "unknown call": (lambda p, x: x @ p["w"].exp(), W, ["'exp'", "parameter 'w'", "layer table", "closing over"]),
    "divided by": (lambda p, x: x @ p["w"] / p["b"], WB, ["'div'", "parameter 'b'"]),
    "in place": (lambda p, x: x @ p["w"].mul_(2), W, ["'mul_'", "parameter 'w'", "in place", "pure"]),
    "ignored params": (lambda p, x: x[:, :2], W, ["never uses parameter 'w'", "first argument"]),
    "unused leaf": (lambda p, x: x @ p["w"], WB, ["never uses parameter 'b'"]),
    "matrix and scale": (lambda p, x: (x * p["w"][:, 0]) @ p["w"], W, ["parameter 'w'", "both as a weight and"]),
    "used in part": (lambda p, x: x[:, :2] @ p["w"][:2], W, ["only 4 of 6 elements of parameter 'w'"]),
    "overlapping": (
        lambda p, x: x[:, :2] @ p["w"][:2] + x[:, :2] @ p["w"][1:], W, ["parameter 'w'", "overlap"],
    ),
    "two shapes": (
        lambda p, x: x @ p["w"] + x.repeat(1, 2)[:, :2] @ p["w"].reshape(2, 3)[:, :2], W, ["parameter 'w'"],
    ),
    "product of parameters": (lambda p, x: x @ (p["w"] @ p["v"]), leaves(w=(3, 2), v=(2, 2)), ["'v' and 'w'"]),
    "sum of parameters": (lambda p, x: x @ (p["w"] + p["v"]), leaves(w=(3, 2), v=(3, 2)), ["'v' and 'w'", "add"]),
    "scaled weight": (lambda p, x: x @ (2 * p["w"]), W, ["parameter 'w' in call 0, mul", "no axis that"]),
    "summed over examples": (lambda p, x: x @ W["w"] + (p["b"] * x[:, :2]).mean(0) + (p["b"] * 2).mean(0),
        {"b": WB["b"]}, ["parameter 'b'", "examples"]),
    "no tensor": (lambda p, x: (x @ p["w"],), W, ["one tensor", "tuple"]),  # type: ignore[dict-item, return-value]
    "einsum of three": (lambda p, x: torch.einsum("ni,ij,jk->nk", x, p["w"], W["w"].T[:, :2]), W, ["3 operands"]),
    "trained batch norm": (
        lambda p, x: F.batch_norm(x @ W["w"], None, None, p["b"], training=True), {"b": WB["b"]}, ["eval()"],
    ),
    "scaled product": (lambda p, x: torch.addmm(p["b"], x, p["w"], alpha=2), WB, ["alpha", "addmm"]),
    "claimed in part": (
        lambda p, x: F.layer_norm(p["b"], (2,), p["v"]) + x[:, :2] + p["b"], leaves(b=(2,), v=(2,)),
        ["'b' and 'v'", "layer_norm", "uses parameter 'b' in a way"],
    ),
    "no gradients": (torch.no_grad()(lambda p, x: x @ p["w"]), W, ["gradients are disabled"]),
}  # fmt: skip


@pytest.mark.parametrize("use", REFUSED)
def test_what_is_not_understood_is_refused_by_name(use: str) -> None:
    model_fn, params, words = REFUSED[use]
    before = {name: leaf.clone() for name, leaf in params.items()}
    with pytest.raises(cv.errors.CaptureError) as refusal:
        cv.kfac(model_fn, params, (X, torch.zeros(5, dtype=torch.long)))
    for word in words:
        assert word in str(refusal.value)
    assert all(torch.equal(params[name], leaf) for name, leaf in before.items())


@pytest.mark.parametrize(
    ("module", "shape", "call"),
    [(nn.LSTM(3, 2, batch_first=True), (4, 3), "lstm"), (nn.GRU(3, 2, batch_first=True), (4, 3), "gru")],
)
def test_recurrent_modules_are_refused_by_name(module: nn.Module, shape: tuple[int, ...], call: str) -> None:
    model_fn, params = cv.functional(module)
    with pytest.raises(cv.errors.CaptureError, match=f"'{call}'.*weight_hh_l0"):
        cv.plan(lambda p, x: model_fn(p, x)[0], params, torch.zeros(5, *shape))


def test_reentrant_checkpointing_is_refused_with_the_remedy() -> None:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        return checkpoint(lambda h: h @ p["v"], x @ p["w"], use_reentrant=True)

    with pytest.raises(cv.errors.CaptureError, match="use_reentrant=False"):
        cv.kfac(model_fn, leaves(w=(3, 4), v=(4, 2)), (X, torch.zeros(5, dtype=torch.long)))


@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_a_plan_that_does_not_fit_the_model_is_refused(engine: str) -> None:
    params = leaves(w=(3, 4), v=(4, 2))
    plan = cv.plan(lambda p, x: torch.tanh(x @ p["w"]) @ p["v"], params, X)
    targets = torch.zeros(5, dtype=torch.long)
    others: list[tuple[Callable[[Params, Tensor], Tensor], str]] = [
        (lambda p, x: (x + 1) @ p["w"] @ p["v"], "call 0 is add"),
        (lambda p, x: x @ p["w"] @ p["v"] + 1, "3 known calls.* plan has 2"),
        (lambda p, x: x @ p["w"][:, :2] @ p["v"][:2], r"shape \(5, 2\).* plan has \(5, 4\)"),
    ]
    for model_fn, message in others:
        with pytest.raises(cv.errors.CaptureError, match=message):
            cv.kfac(model_fn, params, (X, targets), plan=plan, engine=engine)


def test_freezing_is_closing_over() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].requires_grad_(False)
    model_fn, params = cv.functional(net)
    assert list(params) == ["2.weight", "2.bias"]
    everything_fn, everything = cv.functional(nn.Sequential(*net).requires_grad_(True))
    batch = (X, torch.zeros(5, dtype=torch.long))
    part = cv.kfac(model_fn, params, batch, fisher="type-2").blocks["2.weight"]
    whole = cv.kfac(everything_fn, everything, batch, fisher="type-2").blocks["2.weight"]
    torch.testing.assert_close(part.to_dense(), whole.to_dense(), rtol=1e-13, atol=1e-15)
