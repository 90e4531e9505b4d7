"""Mixtures of experts that see only the rows routed to them: how many there are depends on values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import Problem, assert_exact, normal, problem
from layer_zoo import Params
from pairwise import every_pair
from torch import Tensor

import curvlib as cv

EXPERTS, WIDTH = 3, 3
Expert = Callable[[int, Tensor], Tensor]
ENGINES = ("functional", "autograd")
every_engine = pytest.mark.parametrize("engine", ENGINES)


def rule(x: Tensor) -> Tensor:
    """A fixed routing: 0, 1 or 2 by the signs of two features."""
    return (x[..., 0] > 0).long() + (x[..., 1] > 0).long()


# --- ways to write it: (expert of each row, rows, expert) -> outputs --------------------------------------------------


def by_nonzero(chosen: Tensor, x: Tensor, expert: Expert) -> Tensor:
    out = x.new_zeros(len(x), 2)
    for e in range(EXPERTS):
        tokens = (chosen == e).nonzero()[:, 0]
        out = out.index_add(0, tokens, expert(e, x[tokens]))
    return out


def skipping_empty(chosen: Tensor, x: Tensor, expert: Expert) -> Tensor:
    out = x.new_zeros(len(x), 2)
    for e in range(EXPERTS):
        tokens = (chosen == e).nonzero(as_tuple=True)[0]
        if len(tokens) == 0:
            continue
        out.index_add_(0, tokens, expert(e, x[tokens]))
    return out


def by_mask(chosen: Tensor, x: Tensor, expert: Expert) -> Tensor:
    out = x.new_zeros(len(x), 2)
    for e in range(EXPERTS):
        mask = chosen == e
        if mask.any():
            out[mask] = expert(e, x[mask])
    return out


def by_counted_mask(chosen: Tensor, x: Tensor, expert: Expert) -> Tensor:
    out = x.new_zeros(len(x), 2)
    for e in range(EXPERTS):
        mask = chosen == e
        if int(mask.sum()) == 0:
            continue
        out[mask] += expert(e, x[mask])
    return out


def by_where(chosen: Tensor, x: Tensor, expert: Expert) -> Tensor:
    """As earlier versions of Mixtral do it."""
    out, expert_mask = x.new_zeros(len(x), 2), F.one_hot(chosen.unsqueeze(1), EXPERTS).permute(2, 1, 0)
    for e in range(EXPERTS):
        _, top_x = torch.where(expert_mask[e])
        if top_x.shape[0] == 0:
            continue
        out.index_add_(0, top_x, expert(e, x[None, top_x.tolist()].reshape(-1, x.shape[-1])))
    return out


def by_experts_hit(chosen: Tensor, x: Tensor, expert: Expert) -> Tensor:
    """As later versions of Mixtral do it."""
    out, expert_mask = x.new_zeros(len(x), 2), F.one_hot(chosen.unsqueeze(1), EXPERTS).permute(2, 1, 0)
    for hit in torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero():
        _, top_x = torch.where(expert_mask[hit].squeeze(0))
        out.index_add_(0, top_x, expert(int(hit), x[top_x]))
    return out


FORMS = {f.__name__: f for f in (by_nonzero, skipping_empty, by_mask, by_counted_mask, by_where, by_experts_hit)}
every_form = pytest.mark.parametrize("form", FORMS)
SHAPES: dict[str, tuple[int, ...]] = {}
for e in range(EXPERTS):
    SHAPES |= {f"{e}a.weight": (4, WIDTH), f"{e}a.bias": (4,), f"{e}b.weight": (2, 4)}


def mixture(form: str, activation: Callable[[Tensor], Tensor]) -> Callable[[Params, Tensor], Tensor]:
    """Experts of two layers; inputs [N, d], or [N, T, d], which are flattened before they are routed."""

    def model_fn(p: Params, x: Tensor) -> Tensor:
        def expert(e: int, rows: Tensor) -> Tensor:
            hidden = F.linear(rows, p[f"{e}a.weight"], p[f"{e}a.bias"])
            return activation(hidden) @ p[f"{e}b.weight"].T

        rows = x.reshape(-1, WIDTH)
        return FORMS[form](rule(rows), rows, expert).reshape(*x.shape[:-1], 2)

    return model_fn


def load(form: str, activation: Callable[[Tensor], Tensor], kind: str, x: Tensor, reduction: str = "mean") -> Problem:
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return problem(mixture(form, activation), x, kind, reduction, params=zeros)


def identity(x: Tensor) -> Tensor:
    return x


X = normal(3, 9, WIDTH)
POSITIVE, MIXED, NEGATIVE = (torch.tensor(signs) for signs in ([1.0, 1, 1], [1.0, -1, 1], [-1.0, -1, 1]))


def sent_to(x: Tensor, expert: int) -> Tensor:
    """The same rows with signs that send all of them to one expert."""
    return x.abs() * (NEGATIVE, MIXED, POSITIVE)[expert]


# --- exact cases --------------------------------------------------------------------------------------------------


@every_pair("form, engine, shape", FORMS, ENGINES, [(9, WIDTH), (4, 3, WIDTH)])
def test_kfac_is_exact_for_linear_experts(form: str, engine: str, shape: tuple[int, ...]) -> None:
    found = load(form, identity, "mse", normal(3, *shape))
    assert sorted({int(e) for e in rule(found.batch[0]).flatten()}) == [0, 1, 2]
    assert_exact(found.kfac(engine=engine), found.blocks(found.ggn()))


@every_form
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_kfac_is_exact_for_one_example_and_zero_for_experts_that_do_not_see_it(form: str, expert: int) -> None:
    found = load(form, torch.tanh, "cross-entropy", sent_to(X[:1], expert), "sum")
    curv = found.kfac()
    assert_exact(curv, found.blocks(found.ggn()))
    for name, block in curv.blocks.items():
        assert bool(block.to_dense().any()) == name.startswith(str(expert))


@every_engine
def test_factors_are_the_mean_over_routed_rows_and_the_sum_of_their_gradients(engine: str) -> None:
    found = load("by_mask", torch.tanh, "cross-entropy", normal(4, 4, 3, WIDTH))
    x, targets = found.batch
    curv = found.kfac(fisher="empirical", engine=engine)
    for e in range(EXPERTS):
        routed = rule(x) == e
        hidden = F.linear(x[routed], found.params[f"{e}a.weight"], found.params[f"{e}a.bias"]).requires_grad_()
        outputs = torch.tanh(hidden) @ found.params[f"{e}b.weight"].T
        (g,) = torch.autograd.grad(F.cross_entropy(outputs, targets[routed], reduction="sum"), hidden)
        a = F.pad(x[routed], (0, 1), value=1.0)
        expected = torch.kron(g.mT @ g / targets.numel(), a.mT @ a / len(a))
        torch.testing.assert_close(curv.blocks[f"{e}a.weight"].to_dense(), expected, rtol=1e-11, atol=1e-14)


@every_pair("form, engine, shape", FORMS, ENGINES, [(9, WIDTH), (4, 3, WIDTH)])
def test_the_trace_of_corrected_curvature_is_that_of_the_exact_ggn(
    form: str, engine: str, shape: tuple[int, ...]
) -> None:
    found = load(form, torch.tanh, "cross-entropy", normal(4, *shape))
    correction = "example" if len(shape) == 2 and "where" not in form and "hit" not in form else "position"
    options: dict[str, Any] = {"fisher": "type-2", "engine": engine}
    curv = cv.ekfac(found.model_fn, found.params, found.batch, correction=correction, **options)
    torch.testing.assert_close(curv.trace(), found.ggn().trace(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("estimate", [cv.tkfac, cv.diagonal])
def test_per_example_estimators_work_where_every_row_is_another_example(estimate: Any) -> None:
    found = load("by_mask", torch.tanh, "cross-entropy", X)
    curv = estimate(found.model_fn, found.params, found.batch, fisher="type-2")
    torch.testing.assert_close(curv.trace(), found.ggn().trace(), rtol=1e-11, atol=0)
    if estimate is cv.diagonal:
        torch.testing.assert_close(cv.ravel(curv.diag()), found.ggn().diagonal(), rtol=1e-10, atol=1e-14)


# --- experts without a row, data sets, plans ----------------------------------------------------------------------


ESTIMATORS: dict[str, Callable[..., cv.BlockDiagonal]] = {
    "kfac": cv.kfac,
    "kfac, wide": lambda *args, **options: cv.kfac(*args, wide=cv.WideDiagonal(above=3), **options),
    "kfac, forward-only": lambda *args, **options: cv.kfac(*args, **{**options, "fisher": "forward-only"}),
    "ekfac": cv.ekfac,
    "ekfac, one vector": lambda *args, **options: cv.ekfac(*args, **{**options, "fisher": "empirical"}),
    "tkfac": cv.tkfac,
}
POSITIONWISE = ("kfac", "kfac, wide", "kfac, forward-only")
EXAMPLEWISE = ("ekfac", "ekfac, one vector", "tkfac")  # need the gradients of whole examples
REDUCTIONS = ("mean", "sum")


@pytest.mark.parametrize(
    ("form", "estimator"),
    [*itertools.product(FORMS, POSITIONWISE), *itertools.product(["by_nonzero"], EXAMPLEWISE)],
)
def test_experts_without_a_row_have_zero_blocks_and_damping_does_the_rest(form: str, estimator: str) -> None:
    found = load(form, torch.tanh, "cross-entropy", sent_to(X, 1))
    curv = ESTIMATORS[estimator](found.model_fn, found.params, found.batch, fisher="type-2")
    step = curv.inverse(0.5) @ found.params
    for name, leaf in found.params.items():
        (block,) = curv.parameters[name]
        assert bool(curv.blocks[block].to_dense().any()) == name.startswith("1")
        assert name.startswith("1") or torch.allclose(step[name], 2 * leaf, rtol=1e-12)


@every_pair("estimator, form, reduction", POSITIONWISE, FORMS, REDUCTIONS)
def test_a_data_set_whose_batches_hit_different_experts_is_one_big_batch(
    form: str, estimator: str, reduction: str
) -> None:
    check_pieces(form, estimator, reduction)


@every_pair("estimator, reduction", EXAMPLEWISE, REDUCTIONS)
def test_such_a_data_set_is_one_big_batch_for_estimators_of_whole_examples(estimator: str, reduction: str) -> None:
    check_pieces("by_mask", estimator, reduction)


def check_pieces(form: str, estimator: str, reduction: str) -> None:
    found = load(form, torch.tanh, "cross-entropy", torch.cat([sent_to(X, 0)[:4], X[:2], sent_to(X, 2)]))
    pieces = list(zip(*(tensor.split([4, 2, 9]) for tensor in found.batch), strict=True))
    options: dict[str, Any] = {"loss": cv.CrossEntropy(reduction), "fisher": "type-2"}
    one, other = (
        ESTIMATORS[estimator](found.model_fn, found.params, data, **options).to_dense()
        for data in (found.batch, cv.over(pieces))
    )
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-13)


@every_form
def test_a_plan_serves_any_routing(form: str) -> None:
    found = load(form, torch.tanh, "cross-entropy", X)
    plan = cv.plan(found.model_fn, found.params, sent_to(X[:2], 0))
    same = cv.plan(found.model_fn, found.params, X)
    assert plan == same
    assert hash(plan) == hash(same)
    for engine in ENGINES:
        assert torch.equal(found.kfac(plan=plan, engine=engine).to_dense(), found.kfac(engine=engine).to_dense())


def test_a_plan_says_which_rows_are_chosen_by_values() -> None:
    found = load("skipping_empty", torch.tanh, "cross-entropy", X)
    assert str(cv.plan(found.model_fn, found.params, X)).splitlines() == [
        "call      output  parameters          as",
        "--------  ------  ------------------  -----------------",
        "1 linear  [R, 4]  0a.weight, 0a.bias  linear 3 + 1 -> 4",
        "2 matmul  [R, 2]  0b.weight           linear 4 -> 2",
        "3 linear  [R, 4]  1a.weight, 1a.bias  linear 3 + 1 -> 4",
        "4 matmul  [R, 2]  1b.weight           linear 4 -> 2",
        "5 linear  [R, 4]  2a.weight, 2a.bias  linear 3 + 1 -> 4",
        "6 matmul  [R, 2]  2b.weight           linear 4 -> 2",
        "9 parameters in 6 of 7 known calls, 6 blocks; output [N, 2]; R: rows chosen by values",
    ]


def test_routing_is_refused_under_transforms_and_in_ways_that_are_not_followed() -> None:
    found = load("by_mask", torch.tanh, "cross-entropy", X)
    plan = cv.plan(found.model_fn, found.params, X)
    with pytest.raises(cv.errors.CaptureError, match=r"outside of torch\.func transforms"):
        torch.func.vmap(lambda p: cv.kfac(found.model_fn, p, found.batch, plan=plan).trace())(
            {name: leaf.unsqueeze(0) for name, leaf in found.params.items()}
        )

    def sorted_by_expert(p: Params, x: Tensor) -> Tensor:
        order, counts = rule(x).argsort(), rule(x).bincount(minlength=EXPERTS).tolist()
        parts = [rows @ p["0.weight"][e] for e, rows in enumerate(x[order].split(counts))]
        return torch.cat(parts)[order.argsort()]

    other = problem(sorted_by_expert, X, "mse", "mean", params={"0.weight": torch.zeros(EXPERTS, WIDTH, 2)})
    with pytest.raises(cv.errors.CaptureError, match=r"'0\.weight'.*nonzero, where or a mask"):
        other.kfac()


def test_what_needs_the_examples_of_routed_rows_is_refused_behind_other_layers_too() -> None:
    zeros = {"first": torch.zeros(WIDTH, WIDTH)} | {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def behind_a_layer(p: Params, x: Tensor) -> Tensor:
        return mixture("by_mask", torch.tanh)(p, x @ p["first"])

    found = problem(behind_a_layer, X, "cross-entropy", "mean", params=zeros)
    classes = torch.arange(9) % 2
    cv.kfac(behind_a_layer, found.params, (X, classes))
    with pytest.raises(cv.errors.CaptureError, match=r"'0a\.weight'.*targets that are ignored is not known"):
        cv.kfac(behind_a_layer, found.params, (X, classes.index_fill(0, torch.tensor([4]), -100)))
    positions = X.reshape(3, 3, WIDTH)
    with pytest.raises(cv.errors.CaptureError, match=r"'0a\.weight'.*as sharing='reduce' needs"):
        cv.kfac(behind_a_layer, found.params, (positions, classes.reshape(3, 3)), sharing="reduce")
