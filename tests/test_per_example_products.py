"""Inner products with per-example gradients and projections of them, made with or without the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import few, normal, problem
from hypothesis import given
from hypothesis import strategies as st
from layer_zoo import ZOO
from test_per_example import assert_close, brute_force, every_model, of_model, of_problem, stacked
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import curvlib as cv
from curvlib.errors import ShapeError
from curvlib.gradients import block_gradients
from curvlib.gradients.per_example import ElementwiseGradients, RowGradients, per_example_gradients


@pytest.mark.parametrize("memory", [1 << 23, 1])
@pytest.mark.parametrize("queries", [1, 40])
@every_model
def test_inner_products_are_those_of_the_gradients(
    name: str, queries: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", memory)
    found = of_model(ZOO[name]())
    vectors = {block: normal(i, queries, *layout.shape) for i, (block, layout) in enumerate(found.layouts)}
    products = {block: gradients.inner(vectors[block]) for block, gradients in found.blocks.items()}
    for block, gradients in found.blocks.items():
        dense = gradients.dense(0, 5)
        assert_close(products[block], torch.einsum("qk,nk->qn", vectors[block].flatten(1), dense.flatten(1)))
        shares = gradients.position_inner(vectors[block])
        assert shares.ndim == 3
        assert_close(shares.sum(-1), products[block])


@pytest.mark.parametrize("memory", [1 << 23, 1])
@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 9), (9, 2)])
@every_model
def test_projections_are_those_of_the_gradients(
    name: str, p: int, q: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvlib.layers.rows.GRADIENTS_AT_ONCE", memory)
    for gradients in of_model(ZOO[name]()).blocks.values():
        if isinstance(gradients, ElementwiseGradients):
            continue
        dense = gradients.dense(0, 5)
        *groups, m, n = dense.shape[1:]
        left, right = normal(1, *groups, p, m), normal(2, *groups, q, n)
        assert_close(gradients.projected(left, right), left @ dense @ right.mT)


@pytest.mark.parametrize(("rows", "panel"), [(True, 1), (False, 1), (False, 1 << 21)])
@every_model
def test_both_orders_of_multiplication_give_the_same(
    name: str, rows: bool, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = of_model(ZOO[name]())
    vectors = {block: normal(i, 3, *layout.shape) for i, (block, layout) in enumerate(found.layouts)}
    products = {block: gradients.inner(vectors[block]) for block, gradients in found.blocks.items()}
    monkeypatch.setattr(block_gradients, "inner_by_rows", lambda *_: rows)
    monkeypatch.setattr(block_gradients, "projected_by_rows", lambda *_: rows)
    monkeypatch.setattr(block_gradients, "PANEL", panel)
    for block, gradients in found.blocks.items():
        assert_close(gradients.inner(vectors[block]), products[block])
        if isinstance(gradients, RowGradients):
            dense = gradients.dense(0, 5)
            left, right = normal(1, 2, dense.shape[-2]), normal(2, 3, dense.shape[-1])
            assert_close(gradients.projected(left, right), left @ dense @ right.mT)


@every_model
def test_inner_products_with_many_vectors_are_those_of_the_gradients(name: str) -> None:
    found = of_model(ZOO[name]())
    for i, (block, layout) in enumerate(found.layouts):
        vectors = normal(i, block_gradients.WIDE, *layout.shape)
        expected = vectors.flatten(1) @ found.blocks[block].dense(0, 5).flatten(1).mT
        assert_close(found.blocks[block].inner(vectors), expected)


@few
@given(data=st.data(), positions=st.sampled_from([1, 2, 9, 40]))
def test_the_order_taken_is_the_cheaper_one(data: st.DataObject, positions: int) -> None:
    m, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    p, q = data.draw(st.integers(1, m)), data.draw(st.integers(1, n))
    case = problem(nn.Linear(n, m, bias=False), normal(0, 3, positions, n), "mse", "mean")
    gradients = of_problem(case).blocks["weight"]
    left, right = normal(1, p, m), normal(2, q, n)

    def multiplications() -> int:
        with FlopCounterMode(display=False) as counter:
            gradients.projected(left, right)
        return counter.get_total_flops()

    taken, both = multiplications(), []
    for rows in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_gradients, "projected_by_rows", lambda *_, rows=rows: rows)
            both.append(multiplications())
    assert taken == min(both)


@pytest.mark.parametrize("transposed", [False, True])
def test_shares_of_positions_are_gradients_of_the_weight_at_one_position(transposed: bool) -> None:
    x, w, v = normal(0, 4, 3, 5), normal(1, 5, 2), normal(2, 6, 5, 2)
    model_fn = (lambda p, x: F.linear(x, p["w"])) if transposed else (lambda p, x: x @ p["w"])
    params = {"w": w.mT if transposed else w}
    targets = torch.randint(2, (4, 3))
    [block] = per_example_gradients(model_fn, params, (x, targets)).blocks.values()
    several = {"w": w.expand(3, 5, 2)}
    expected = reference.gradients(
        lambda p, x: torch.einsum("nti,tio->nto", x, p["w"]), several, (x, targets), reference.cross_entropy
    ).reshape(4, 3, 5, 2)
    assert_close(block.position_inner(v.mT), torch.einsum("qio,ntio->qnt", v, expected))


def test_shares_of_positions_of_a_weight_that_is_used_at_different_ones_are_refused() -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w"]).mean(1) @ p["w"]

    case = problem(model_fn, normal(0, 5, 4, 3), "mse", "mean", params={"w": torch.zeros(3, 3)})
    found = of_problem(case)
    assert_close(stacked(found), brute_force(case))
    with pytest.raises(ShapeError, match=r"4, 1 positions|1, 4 positions"):
        found.blocks["w"].position_inner(torch.zeros(1, 3, 3).double())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_one_hot_rows_are_never_made() -> None:
    examples, positions, vocabulary, width = 8, 6, 1000, 4
    model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Tanh(), nn.Linear(width, 2))
    case = problem(model, torch.arange(48).reshape(examples, positions), "cross-entropy", "mean")
    left, right, vectors = normal(0, 2, width), normal(1, 2, vocabulary), normal(2, 3, width, vocabulary)
    plan = cv.plan(case.model_fn, case.params, case.batch[0])
    with Largest() as largest:
        block = of_problem(case, engine="functional", plan=plan).blocks["0.weight"]
        block.projected(left, right)
        block.inner(vectors)
        block.position_inner(vectors)
    assert largest.elements < examples * positions * vocabulary / 2
    assert_close(block.projected(left, right), left @ block.dense(0, examples) @ right.mT)
