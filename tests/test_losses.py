"""Values, gradients and Hessians of losses against torch's own functions and `torch.func`."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from curvlib.losses import MSE, BernoulliLogits, CrossEntropy, CustomLoss, Identity
from tests.loss_problems import (
    KINDS,
    Problem,
    assert_equal,
    every_kind,
    generator,
    make,
    moderately,
    one_thread,  # noqa: F401
    outer,
    poisson,
    problems,
)


@every_kind
@moderately
@given(data=st.data())
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_is_torchs_function_of_that_name_and_reduction(kind: str, reduction: str, data: st.DataObject) -> None:
    positions = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    problem = make(kind, data.draw(st.integers(1, 4)), positions, data.draw(st.integers(1, 5)))
    result = replace(problem.loss, reduction=reduction).value(problem.outputs, problem.targets)  # type: ignore[type-var]
    expected = problem.value(problem.outputs, problem.targets, reduction)
    assert result.shape == ()
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


@moderately
@given(problems())
def test_terms_are_the_examples_own_unreduced_losses(problem: Problem) -> None:
    terms = problem.loss.terms(problem.outputs, problem.targets)
    torch.testing.assert_close(terms, problem.terms(problem.outputs, problem.targets), rtol=1e-12, atol=1e-14)
    one = [problem.loss.terms(problem.outputs[n : n + 1], problem.example(n)) for n in range(len(terms))]
    torch.testing.assert_close(torch.cat(one), terms, rtol=1e-13, atol=1e-14)


@every_kind
def test_normalizer_of_mean_counts_what_torch_divides_by_and_of_sum_is_one(kind: str) -> None:
    problem = make(kind, examples=4, positions=(3,), classes=5)
    counted = {"mse": 60, "bernoulli": 60, "identity": 4, "no targets": 4, "custom": 4}.get(kind, 12)
    if kind == "ignored":
        counted = int((problem.targets != 1).sum())
    if kind in ("smoothed", "channels first"):
        counted = int((problem.targets != -100).sum())
    mean = problem.loss.normalizer(problem.outputs, problem.targets)
    assert mean.shape == ()
    assert mean.dtype == torch.float64
    assert mean == counted
    summed = replace(problem.loss, reduction="sum")  # type: ignore[type-var]
    assert summed.normalizer(problem.outputs, problem.targets) == 1


@every_kind
def test_derivatives_do_not_depend_on_the_reduction(kind: str) -> None:
    problem = make(kind, positions=(2,))
    f, y = problem.outputs, problem.targets
    summed = replace(problem.loss, reduction="sum")  # type: ignore[type-var]
    assert torch.equal(problem.loss.gradient(f, y), summed.gradient(f, y))
    assert torch.equal(problem.loss.sqrt_hessian(f, y), summed.sqrt_hessian(f, y))
    assert torch.equal(problem.loss.sample(f, y, generator(), 2), summed.sample(f, y, generator(), 2))


def test_mask_says_which_positions_count() -> None:
    f, y = torch.zeros(2, 3, 4), torch.tensor([[0, -100, 1], [-100, 3, 2]])
    expected = torch.tensor([[True, False, True], [False, True, True]])
    assert torch.equal(CrossEntropy().mask(f, y), expected)
    assert torch.equal(CrossEntropy(class_dim=1).mask(f.movedim(-1, 1), y), expected)
    assert CrossEntropy().mask(f, y.clamp(min=0)).all()
    for loss in (MSE(), BernoulliLogits(), Identity(), CustomLoss(poisson), CrossEntropy()):
        assert loss.mask(f, torch.zeros(2, 3, 4)) is None


def test_mask_compares_narrow_integers_without_wrapping_around() -> None:
    targets = torch.tensor([156, 0], dtype=torch.uint8)  # -100 modulo 256 is 156
    assert CrossEntropy().mask(torch.zeros(2, 200), targets).all()


@every_kind
@moderately
@given(data=st.data())
def test_gradient_is_that_of_the_summed_terms(kind: str, data: st.DataObject) -> None:
    positions = data.draw(st.sampled_from([(), (3,), (2, 2)]))
    problem = make(kind, data.draw(st.integers(1, 4)), positions, data.draw(st.integers(2, 5)))
    expected = torch.func.grad(lambda f: problem.terms(f, problem.targets).sum())(problem.outputs)
    assert_equal(problem.loss.gradient(problem.outputs, problem.targets), expected)


@every_kind
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_columns_square_to_the_hessian_of_each_term(kind: str, data: st.DataObject) -> None:
    positions = data.draw(st.sampled_from([(), (3,), (2, 2)]))
    problem = make(kind, data.draw(st.integers(1, 3)), positions, data.draw(st.integers(1, 4)))
    columns = problem.loss.sqrt_hessian(problem.outputs, problem.targets)
    assert columns.shape == (problem.loss.columns(problem.outputs), *problem.outputs.shape)
    expected = problem.hessians()
    scale = expected.abs().max().clamp(min=1)  # one class: the Hessian is zero but for rounding
    assert (outer(columns) - expected).abs().max() <= 1e-12 * scale


@every_kind
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_hessian_product_applies_the_hessian_of_each_term(kind: str, data: st.DataObject) -> None:
    positions = data.draw(st.sampled_from([(), (3,), (2, 2)]))
    problem = make(kind, data.draw(st.integers(1, 3)), positions, data.draw(st.integers(2, 4)))
    v = torch.randn(problem.outputs.shape, generator=generator(1), dtype=torch.float64)
    expected = torch.einsum("nde,ne->nd", problem.hessians(), v.reshape(len(v), -1)).reshape(v.shape)
    result = problem.loss.hessian_product(problem.outputs, problem.targets, v)
    assert (result - expected).abs().max() <= 1e-12 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "custom"])
def test_each_column_lives_at_one_position(kind: str) -> None:
    problem = make(kind, positions=(2, 3), classes=3)
    columns = problem.loss.sqrt_hessian(problem.outputs, problem.targets)
    axis = getattr(problem.loss, "class_dim", -1)
    used = columns.movedim(axis if axis < 0 else axis + 1, -1).ne(0).any(-1).flatten(2)  # [K, N, P]
    mask = problem.loss.mask(problem.outputs, problem.targets)
    counted = torch.ones(3, 6, dtype=torch.bool) if mask is None else mask.flatten(1)
    own = torch.arange(18)[:, None] // 3 == torch.arange(6)  # positions in order, each with 3 columns
    assert torch.equal(used, own[:, None] & counted)


@every_kind
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_columns_in_parts_are_the_columns(kind: str, data: st.DataObject) -> None:
    problem = make(kind, positions=data.draw(st.sampled_from([(), (2,)])), classes=3)
    f, y = problem.outputs, problem.targets
    total = problem.loss.columns(f)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, total), max_size=3))), total]
    parts = [problem.loss.sqrt_hessian(f, y, a, b) for a, b in itertools.pairwise(cuts)]
    assert_equal(torch.cat(parts), problem.loss.sqrt_hessian(f, y), 1e-14)


def test_label_smoothing_changes_the_gradient_and_not_the_hessian() -> None:
    problem = make("indices")
    f, y = problem.outputs, problem.targets
    plain, smoothed = CrossEntropy(), CrossEntropy(label_smoothing=0.3)
    assert torch.equal(plain.sqrt_hessian(f, y), smoothed.sqrt_hessian(f, y))
    assert not torch.allclose(plain.gradient(f, y), smoothed.gradient(f, y))


def test_one_hot_probabilities_are_class_indices() -> None:
    problem = make("indices", positions=(2,))
    f, y = problem.outputs, problem.targets
    one_hot = functional.one_hot(y, f.shape[-1]).double()
    for loss in (CrossEntropy(), CrossEntropy(label_smoothing=0.2)):
        assert_equal(loss.terms(f, one_hot), loss.terms(f, y))
        assert_equal(loss.gradient(f, one_hot), loss.gradient(f, y))
        assert_equal(loss.sqrt_hessian(f, one_hot), loss.sqrt_hessian(f, y))
        assert_equal(loss.sample(f, one_hot, generator(), 3), loss.sample(f, y, generator(), 3))


def test_class_dim_only_moves_an_axis() -> None:
    problem = make("ignored", positions=(2, 3))
    last, y = problem.loss, problem.targets
    first = replace(last, class_dim=1)  # type: ignore[type-var]
    f, g = problem.outputs, problem.outputs.movedim(-1, 1)
    v = torch.randn(f.shape, generator=generator(), dtype=f.dtype)
    assert_equal(first.gradient(g, y), last.gradient(f, y).movedim(-1, 1))
    assert_equal(first.sqrt_hessian(g, y), last.sqrt_hessian(f, y).movedim(-1, 2))
    assert_equal(first.sample(g, y, generator(), 2), last.sample(f, y, generator(), 2).movedim(-1, 2))
    assert_equal(first.hessian_product(g, y, v.movedim(-1, 1)), last.hessian_product(f, y, v).movedim(-1, 1))


def test_ignored_positions_give_zeros_even_where_outputs_are_not_finite() -> None:
    f = torch.randn(2, 3, 4, generator=generator(), dtype=torch.float64)
    f[0, 1], f[1, 2] = math.nan, math.inf
    y = torch.tensor([[0, -100, 2], [1, 3, -100]])
    loss, ignored = CrossEntropy(), y == -100
    clean = torch.where(ignored.unsqueeze(-1), 0, f)
    for function in (
        loss.gradient,
        loss.sqrt_hessian,
        lambda f, y: loss.sample(f, y, generator(), 3),
        lambda f, y: loss.hessian_product(f, y, torch.ones_like(f)),
    ):
        result = function(f, y)
        assert torch.equal(result, function(clean, y))
        assert (result[..., ignored, :] == 0).all()
    assert torch.equal(loss.value(f, y), loss.value(clean, y))


def test_curvature_stays_accurate_for_confident_outputs() -> None:
    f, y = torch.tensor([[0.0, 1400.0]], dtype=torch.float64), torch.tensor([1])
    column = CrossEntropy().sqrt_hessian(f, y)[0, 0]
    assert column[0] == pytest.approx(math.exp(-700), rel=1e-12, abs=0)
    far = torch.tensor([[40.0, -40.0]], dtype=torch.float64)
    tail = math.exp(-40) / (1 + math.exp(-40)) ** 2
    product = BernoulliLogits().hessian_product(far, torch.zeros_like(far), torch.ones_like(far))
    root = BernoulliLogits().sqrt_hessian(far, torch.zeros_like(far)).sum(0)
    assert product[0].tolist() == pytest.approx([tail, tail], rel=1e-12, abs=0)
    assert root[0].tolist() == pytest.approx([math.sqrt(tail)] * 2, rel=1e-12, abs=0)


def test_columns_can_be_differentiated() -> None:
    problem = make("indices")

    def trace(f: Tensor) -> Tensor:
        return problem.loss.sqrt_hessian(f, problem.targets).square().sum()

    expected = torch.func.grad(lambda f: (f.softmax(-1) * (1 - f.softmax(-1))).sum())(problem.outputs)
    assert_equal(torch.func.grad(trace)(problem.outputs), expected)
