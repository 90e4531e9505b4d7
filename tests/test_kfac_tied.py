"""Weights used by several calls, or in slices: exact where every use is exact and the uses do not interact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import assert_exact, normal, problem
from torch import Tensor

import curvlib as cv

both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])

Params = dict[str, Tensor]
SQUARE = {"0.weight": torch.zeros(3, 3)}
BIASED = {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2)}


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, 0], x[:, 1]


def side_by_side(*outputs: Tensor) -> Tensor:
    """Every use has outputs of its own: their cross terms in the GGN of the squared error vanish."""
    return torch.cat(outputs, 1)


def twice(params: Params, x: Tensor) -> Tensor:
    a, b = halves(x)
    return side_by_side(a @ params["0.weight"].T, b @ params["0.weight"].T)


def transposed(params: Params, x: Tensor) -> Tensor:
    a, b = halves(x)
    return side_by_side(a @ params["0.weight"].T, b @ params["0.weight"])


def with_bias(params: Params, x: Tensor) -> Tensor:
    return side_by_side(*(F.linear(part, params["0.weight"], params["0.bias"]) for part in halves(x)))


def at_two_depths(params: Params, x: Tensor) -> Tensor:
    a, b = halves(x)
    fixed = normal(9, 3, 3)
    return side_by_side(a @ params["0.weight"].T @ fixed, b @ params["0.weight"].T)


def three_times(params: Params, x: Tensor) -> Tensor:
    a, b = halves(x)
    return side_by_side(*(part @ params["0.weight"].T for part in (a, b, a - b)))


USES: dict[str, tuple[Callable[[Params, Tensor], Tensor], Params]] = {
    "twice": (twice, SQUARE),
    "transposed": (transposed, SQUARE),
    "with bias": (with_bias, BIASED),
    "at two depths": (at_two_depths, SQUARE),
    "three times": (three_times, SQUARE),
}


@both_reductions
@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("uses", USES)
def test_the_sum_over_uses_of_a_tied_weight_is_exact(uses: str, engine: str, reduction: str) -> None:
    model_fn, shapes = USES[uses]
    case = problem(model_fn, normal(1, 4, 2, 3), "mse", reduction, params=shapes)
    curv = case.kfac(engine=engine)
    assert isinstance(curv.blocks["0.weight"], cv.Sum)
    assert_exact(curv, case.ggn())


@both_reductions
@pytest.mark.parametrize("uses", ["twice", "with bias", "three times"])
def test_merged_uses_are_exact_where_their_output_factors_are_equal(uses: str, reduction: str) -> None:
    model_fn, shapes = USES[uses]
    case = problem(model_fn, normal(1, 4, 2, 3), "mse", reduction, params=shapes)
    curv = case.kfac(tied="merge")
    assert isinstance(curv.blocks["0.weight"], cv.Kronecker)
    assert_exact(curv, case.ggn())


@both_reductions
def test_merged_uses_are_not_exact_where_their_output_factors_differ(reduction: str) -> None:
    case = problem(at_two_depths, normal(1, 4, 2, 3), "mse", reduction, params=SQUARE)
    assert reference.relative_error(case.kfac(tied="merge").to_dense(), case.ggn()) > 0.01


@both_reductions
def test_a_table_that_is_embedding_and_head_is_exact_where_its_uses_do_not_interact(reduction: str) -> None:
    def model_fn(params: Params, inputs: tuple[Tensor, Tensor]) -> Tensor:
        word, vector = inputs
        return side_by_side(F.embedding(word, params["0.weight"]), vector @ params["0.weight"].T)

    inputs = (torch.tensor([0, 3, 3, 1]), normal(2, 4, 3))
    case = problem(model_fn, inputs, "mse", reduction, params={"0.weight": torch.zeros(5, 3)})
    assert_exact(case.kfac(), case.ggn())


@both_reductions
def test_a_bias_shared_by_two_weights_is_a_block_of_its_own_from_the_sum_of_its_gradients(reduction: str) -> None:
    def model_fn(params: Params, x: Tensor) -> Tensor:
        a, b = halves(x)
        first = F.linear(a, params["0.weight"], params["2.bias"])
        return first * torch.tanh(F.linear(b, params["1.weight"], params["2.bias"]))

    shapes = {"0.weight": torch.zeros(2, 3), "1.weight": torch.zeros(2, 3), "2.bias": torch.zeros(2)}
    case = problem(model_fn, normal(3, 4, 2, 3), "mse", reduction, params=shapes)
    exact = reference.block(case.ggn(), case.params, "2.bias")
    dense = case.kfac(elementwise="dense").blocks["2.bias"].to_dense()
    assert reference.relative_error(dense, exact) <= 1e-10
    diagonal = case.kfac().blocks["2.bias"].to_dense()
    assert reference.relative_error(diagonal, exact.diag().diag()) <= 1e-10


@both_reductions
def test_slices_of_a_weight_for_different_inputs_are_blocks_of_their_own(reduction: str) -> None:
    def model_fn(params: Params, x: Tensor) -> Tensor:
        first, second = params["0.weight"].chunk(2)
        a, b = halves(x)
        return a @ first.T + b @ second.T

    case = problem(model_fn, normal(4, 4, 2, 3), "mse", reduction, params={"0.weight": torch.zeros(4, 3)})
    labels = {"0.weight": torch.tensor([0, 0, 1, 1]).unsqueeze(1).expand(4, 3)}
    assert_exact(case.kfac(), reference.block_diagonal(case.ggn(), labels))


@both_reductions
def test_outputs_cut_into_slices_belong_to_one_block(reduction: str) -> None:
    def model_fn(params: Params, x: Tensor) -> Tensor:
        query, key = F.linear(x, params["0.weight"], params["0.bias"]).chunk(2, -1)
        return query - 2 * key

    shapes = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4)}
    case = problem(model_fn, normal(5, 4, 3), "mse", reduction, params=shapes)
    assert_exact(case.kfac(), case.ggn())


@both_reductions
def test_an_embedding_and_a_head_merge_with_the_trace_of_their_sum(reduction: str) -> None:
    def model_fn(params: Params, word: Tensor) -> Tensor:
        return torch.tanh(F.embedding(word, params["0.weight"])) @ params["0.weight"].T

    words = torch.tensor([[0, 3], [3, 1], [4, 4]])
    case = problem(model_fn, words, "cross-entropy", reduction, params={"0.weight": torch.zeros(5, 3)})
    total, merged = case.kfac(), case.kfac(tied="merge")
    assert isinstance(merged.blocks["0.weight"], cv.Kronecker)
    torch.testing.assert_close(merged.trace(), total.trace(), rtol=1e-12, atol=0)
    assert reference.relative_error(merged.to_dense(), total.to_dense()) < 0.6
    assert merged.inverse(0.1).logdet().isfinite()


# --- damped inverses ----------------------------------------------------------------------------------------------

WORDS = torch.tensor([[0, 3, 3], [3, 1, 0], [5, 5, 1]])  # tokens 2, 4 and 6 never occur


def language_model(params: Params, word: Tensor) -> Tensor:
    hidden = torch.tanh(F.embedding(word, params["table"])) @ params["mix"].T
    return hidden @ params["head" if "head" in params else "table"].T


def with_two_tables_in_one(params: Params, word: Tensor) -> Tensor:
    hidden = torch.tanh(F.embedding(word, params["table"])) + F.embedding(word.flip(1), params["table"]) ** 2
    return hidden @ params["mix"].T @ params["table"].T


TIED = {"table": torch.zeros(7, 4), "mix": torch.zeros(4, 4)}
MODELS: dict[str, tuple[Callable[[Params, Tensor], Tensor], Params, int]] = {
    "tied": (language_model, TIED, 2),
    "untied": (language_model, {**TIED, "head": torch.zeros(7, 4)}, 1),
    "three uses": (with_two_tables_in_one, TIED, 3),
}
DAMPINGS: dict[str, cv.Damping | float] = {
    "factored": cv.FactoredTikhonov(1e-3),
    "relative": cv.FactoredTikhonov(1e-2, relative=True),
    "number": 1e-3,
}
every_model = pytest.mark.parametrize("name", MODELS)
every_damping = pytest.mark.parametrize("damping", DAMPINGS.values(), ids=DAMPINGS)
diagonal_or_dense = pytest.mark.parametrize("wide", ["diagonal", "dense"])


def language_curvature(name: str, wide: str) -> cv.BlockDiagonal:
    model_fn, shapes, _ = MODELS[name]
    case = problem(model_fn, WORDS, "cross-entropy", "mean", params=shapes)
    return case.kfac(wide=cv.WideDiagonal(5)) if wide == "diagonal" else case.kfac()


def term_by_term(block: cv.Operator, damping: cv.Damping | float) -> Tensor:
    """The dense matrix of a block that is damped by the formulas."""
    terms = block.terms if isinstance(block, cv.Sum) else (block,)
    dense = [torch.kron(term.left.to_dense(), term.right.to_dense()) for term in terms]
    if not isinstance(damping, cv.FactoredTikhonov):
        return torch.stack(dense).sum(0) + damping * torch.eye(len(dense[0]), dtype=torch.float64)
    damped = []
    for term in terms:
        g, a = term.left.to_dense(), term.right.to_dense()
        means = [x.trace() / len(x) for x in (g, a)]
        root = (damping.strength * (means[0] * means[1] if damping.relative else 1.0)) ** 0.5
        pi = (means[1] / means[0]) ** 0.5
        eyes = [torch.eye(len(x), dtype=x.dtype) for x in (g, a)]
        damped.append(torch.kron(g + root / pi * eyes[0], a + pi * root * eyes[1]))
    return torch.stack(damped).sum(0)


@every_model
@every_damping
@diagonal_or_dense
def test_a_damped_inverse_of_a_language_model_is_the_dense_solution(
    name: str, damping: cv.Damping | float, wide: str
) -> None:
    curv = language_curvature(name, wide)
    table = curv.blocks["table"]
    assert len(getattr(table, "terms", (table,))) == MODELS[name][2]
    inverse = curv.inverse(damping)
    vectors = {key: normal(7, 3, *x.shape) for key, x in MODELS[name][1].items()}
    solved, mapped = inverse.matmat(vectors), torch.func.vmap(lambda v: inverse @ v)(vectors)
    for key, block in curv.blocks.items():
        rows = vectors[key] if block.domain.shapes[0] == vectors[key].shape[1:] else vectors[key].mT
        dense = term_by_term(block, damping)
        expected = torch.linalg.solve(dense, rows.reshape(3, -1).mT).mT.reshape(rows.shape)
        expected = expected if rows is vectors[key] else expected.mT
        assert reference.relative_error(solved[key], expected) <= 1e-10
        assert reference.relative_error(mapped[key], expected) <= 1e-10
        inverted = inverse.blocks[key]
        assert reference.relative_error(inverted.trace(), torch.linalg.inv(dense).trace()) <= 1e-10
        assert reference.relative_error(inverted.logdet(), -torch.logdet(dense)) <= 1e-10
        root = inverted.power(0.5).to_dense()
        assert reference.relative_error(root @ root @ dense, torch.eye(len(dense), dtype=dense.dtype)) <= 1e-9
        assert reference.relative_error(inverted.inverse().to_dense(), dense) <= 1e-10


@every_damping
def test_no_value_is_looked_at_where_a_curvature_is_inverted_under_a_transform(damping: cv.Damping | float) -> None:
    curv = language_curvature("tied", "diagonal")
    vector = {key: normal(8, *x.shape) for key, x in TIED.items()}
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    mapped = torch.func.vmap(lambda s: (s * curv).inverse(damping) @ vector)(scales)
    for i, scale in enumerate(scales):
        expected = (scale * curv).inverse(damping) @ vector
        assert all(reference.relative_error(mapped[key][i], expected[key]) <= 1e-10 for key in vector)


def test_the_table_of_a_language_model_is_inverted_without_iterations() -> None:
    curv = language_curvature("tied", "diagonal")
    assert isinstance(curv.inverse(cv.FactoredTikhonov(1e-3)).blocks["table"], cv.operators.SimultaneousKronecker)
    assert isinstance(curv.inverse(1e-3).blocks["table"], cv.operators.RowBlocks)
