"""What matrix-free operators refuse, as layerwise estimators do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact_cases import MAKERS, assert_close, every_mode, every_operator, mlp, of_module
from exactness_problems import normal
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError, EmptyBatchError, NonFiniteError, UnusedParameterError
from curvlib.estimators import ggn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the checks that layerwise estimators make ------------------------------------------------------------------------


def poisoned(place: str) -> tuple[Any, Any, Any]:
    model_fn, params, (inputs, targets) = mlp()
    if place == "params":
        params["0.bias"][0] = torch.nan
    if place == "inputs":
        inputs = inputs.clone()
        inputs[2, 1] = torch.inf
    if place == "outputs":
        finite = model_fn
        model_fn = lambda p, x: finite(p, x) / 0.0  # noqa: E731
    if place == "derivative":
        finite = model_fn
        model_fn = lambda p, x: (0 * finite(p, x)).abs().sqrt() + finite(p, x)  # noqa: E731
    return model_fn, params, (inputs, targets)


@pytest.mark.parametrize("name", ["ggn", "hessian", "empirical", "mc", "gramian", "jacobian"])
@pytest.mark.parametrize("place", ["params", "inputs", "outputs", "derivative"])
def test_what_is_not_finite_is_refused(name: str, place: str) -> None:
    model_fn, params, batch = poisoned(place)
    with pytest.raises(NonFiniteError, match=r"0\.bias|0\.weight"):
        MAKERS[name](model_fn, params, batch)
    if place == "inputs" and name != "jacobian":
        clean = (torch.zeros_like(batch[0]), batch[1])
        with pytest.raises((NonFiniteError, ArgumentError), match=r"finite|order"):
            MAKERS[name](model_fn, params, cv.over([clean, batch])) @ params


@pytest.mark.parametrize("name", ["ggn", "hessian", "empirical", "mc"])
def test_data_of_which_no_target_counts_are_refused_and_parts_of_data_are_not(name: str) -> None:
    model_fn, params, (inputs, targets) = mlp()
    ignored = torch.full_like(targets, -100)
    with pytest.raises(NonFiniteError, match="no target counts"):
        MAKERS[name](model_fn, params, (inputs, ignored))
    with pytest.raises(NonFiniteError, match="no target counts"):
        MAKERS[name](model_fn, params, cv.over([(inputs, ignored)])) @ params
    some = MAKERS[name](model_fn, params, cv.over([(inputs, ignored), (inputs, targets)]))
    if name != "mc":
        assert_close(some.to_dense(), MAKERS[name](model_fn, params, (inputs, targets)).to_dense())
    outputs_matter_only_where_targets_count = lambda p, x: model_fn(p, x) + x[:, :1] * 0  # noqa: E731
    half, nan = targets.clone(), inputs.clone()
    half[0], nan[0] = -100, 0.0
    curv = MAKERS[name](outputs_matter_only_where_targets_count, params, (nan, half))
    assert torch.isfinite(curv.to_dense()).all()


def test_logits_of_minus_infinity_are_classes_that_cannot_be() -> None:
    model_fn, params, (inputs, targets) = mlp()
    impossible = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    masked = lambda p, x: torch.cat([model_fn(p, x), x[:, :1]], 1) + impossible  # noqa: E731
    assert_close(ggn(masked, params, (inputs, targets)).to_dense(), ggn(model_fn, params, (inputs, targets)).to_dense())


@every_operator
def test_parameters_that_the_outputs_do_not_depend_on_are_refused(name: str) -> None:
    model_fn, params, batch = mlp()
    extended = {**params, "unused": normal(0, 2)}
    with pytest.raises(UnusedParameterError, match="unused"):
        MAKERS[name](lambda p, x: model_fn({k: p[k] for k in params}, x), extended, batch)
    with pytest.raises(UnusedParameterError):  # capture does not understand this model
        MAKERS[name](lambda p, x: x @ p["w"].sin(), {"w": normal(0, 3, 2), "unused": normal(0, 2)}, batch)
    with pytest.raises(UnusedParameterError):
        MAKERS[name](lambda p, x: x, {"unused": normal(0, 2)}, (normal(0, 5, 2), batch[1]))


class Experts(nn.Module):
    """Two experts, of which one may have no row."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        outputs = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero((x[:, 0] > 0).long() == number).flatten()
            outputs = outputs.index_add(0, rows, expert(x[rows]))
        return outputs


class ChosenExperts(Experts):
    """The same, calling only experts that have rows."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero((x[:, 0] > 0).long() == number).flatten()
            if len(rows):
                outputs = outputs.index_add(0, rows, expert(x[rows]))
        return outputs


def test_experts_without_rows_have_no_curvature() -> None:
    for kind in (Experts, ChosenExperts):
        inputs = normal(0, 5, 3)
        inputs[:, 0] = inputs[:, 0].abs()
        model_fn, params, batch = of_module(kind(), inputs)
        data = cv.over([batch, (-batch[0], batch[1])])
        both = ggn(model_fn, params, data).to_dense()
        assert (both.diagonal() > 0).all()
    model_fn, params, batch = of_module(Experts(), inputs)
    assert (ggn(model_fn, params, batch).to_dense().diagonal() == 0).sum() == 8


@every_operator
def test_empty_batches_are_refused(name: str) -> None:
    model_fn, params, _ = mlp()
    with pytest.raises(EmptyBatchError):
        MAKERS[name](model_fn, params, (torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.long)))


@every_operator
@every_mode
def test_empty_leaves_take_part(name: str, mode: str | None) -> None:
    model_fn, params, batch = mlp()
    extended = {**params, "empty": normal(0, 0, 3)}

    def with_empty(p: Any, x: Tensor) -> Tensor:
        return model_fn({k: p[k] for k in params}, x) + F.linear(x, p["empty"]).sum(1, keepdim=True)

    curv = MAKERS[name](with_empty, extended, batch, mode=mode)
    assert_close(curv.to_dense(), MAKERS[name](model_fn, params, batch).to_dense())
    image = (curv.T @ normal(1, 5, 2)) if name == "jacobian" else curv @ extended
    assert image["empty"].shape == (0, 3)
    if name == "ggn":
        dense = curv.to_dense()
        assert_close(
            cv.ravel(curv.inverse(0.1) @ extended),
            torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)).to(dense), cv.ravel(extended)),
            1e-6,
        )
        blocks = cv.estimators.block_diagonal(curv)
        assert_close(blocks.trace(), curv.trace())
        assert_close(cv.spectrum.top_eigenvalues(curv, 1).values, torch.linalg.eigvalsh(dense)[-1:], 1e-7)


class Exhausting(torch.autograd.Function):
    """Runs out of memory in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory is left")


@every_operator
def test_an_out_of_memory_error_is_not_taken_for_a_missing_rule(name: str) -> None:
    model_fn, params, batch = mlp()
    exhausting = lambda p, x: Exhausting.apply(model_fn(p, x))  # noqa: E731
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        MAKERS[name](exhausting, params, batch)
    MAKERS[name](exhausting, params, batch, mode="reverse")
