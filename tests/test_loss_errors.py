"""What losses refuse, and custom losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from curvlib.errors import (
    ArgumentError,
    CurvlibError,
    DeviceError,
    DtypeError,
    EmptyBatchError,
    SingularError,
    TargetError,
)
from curvlib.losses import MSE, BernoulliLogits, CrossEntropy, CustomLoss, Identity, Loss
from tests.loss_problems import (
    assert_equal,
    every_kind,
    generator,
    make,
    one_thread,  # noqa: F401
    outer,
    poisson,
)


def test_custom_loss_agrees_with_the_closed_form() -> None:
    problem = make("indices", positions=(2,))
    f, y = problem.outputs, problem.targets
    custom = CustomLoss(lambda f, y: functional.cross_entropy(f.movedim(-1, 1), y, reduction="none").sum(1))
    for reduction in ("mean", "sum"):
        value = replace(custom, reduction=reduction).value(f, y)
        assert_equal(value, problem.loss.terms(f, y).sum() / (len(f) if reduction == "mean" else 1))
    assert_equal(custom.gradient(f, y), problem.loss.gradient(f, y))
    assert_equal(outer(custom.sqrt_hessian(f, y)), outer(problem.loss.sqrt_hessian(f, y)))
    assert_equal(custom.hessian_product(f, y, f), problem.loss.hessian_product(f, y, f))


def test_custom_loss_takes_targets_of_any_structure() -> None:
    f = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    targets = {"mean": torch.ones(3, 2, dtype=torch.float64), "rest": [torch.tensor([1.0, 2.0, 3.0]), None, "note"]}

    def weighted(f: Tensor, y: Any) -> Tensor:
        assert f.shape == y["mean"].shape == (1, 2)
        assert y["rest"][1:] == [None, "note"]
        return y["rest"][0] * (f - y["mean"]).square().sum(1)

    loss, weights = CustomLoss(weighted), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss.check(f, targets)
    assert_equal(loss.gradient(f, targets), 2 * weights[:, None] * (f - 1))
    expected = 2 * weights[:, None, None] * torch.eye(2, dtype=torch.float64)
    assert_equal(outer(loss.sqrt_hessian(f, targets)), expected)


def test_custom_loss_without_curvature_has_zero_columns() -> None:
    f, y = torch.randn(3, 2, generator=generator()), torch.ones(3, 2)
    assert (CustomLoss(lambda f, y: (f * y).sum(1)).sqrt_hessian(f, y) == 0).all()


def test_custom_loss_refuses_to_take_a_root_where_it_is_not_convex() -> None:
    f, y = torch.tensor([[0.5], [3.0]], dtype=torch.float64), torch.zeros(2, 1)
    loss = CustomLoss(lambda f, y: f.sin().sum(1))
    with pytest.raises(SingularError, match=r"not convex in the outputs: its Hessian has the eigenvalue -0.479"):
        loss.sqrt_hessian(f, y)
    with pytest.raises(SingularError, match="not convex"):
        loss.sample(f, y, generator(), 1)
    assert_equal(loss.hessian_product(f, y, torch.ones_like(f)), -f.sin())


@pytest.mark.parametrize(
    ("fn", "result"),
    [
        (lambda f, y: (f - y).square(), r"\(1, 2\)"),
        (lambda f, y: (f - y).square().sum(), r"\(\)"),
        (lambda f, y: 1.0, "float"),
    ],
)
def test_custom_loss_must_return_one_value_an_example(fn: Callable[[Tensor, Any], Any], result: str) -> None:
    with pytest.raises(ArgumentError, match=rf"one value an example, shape \[N\].*returned .*{result}"):
        CustomLoss(fn).value(torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "message"),
    [
        (
            CrossEntropy(),
            (3, 4),
            torch.zeros(2, dtype=torch.long),
            r"indices of shape \(3,\).*got torch.int64 of shape \(2,\)",
        ),
        (
            CrossEntropy(),
            (3, 4),
            torch.zeros(3),
            r"got torch.float32 of shape \(3,\); convert class indices with \.long\(\)",
        ),
        (CrossEntropy(), (3, 4), torch.zeros(3, 4).long(), r"convert class probabilities with \.float\(\)"),
        (CrossEntropy(), (3, 4), torch.zeros(3, dtype=torch.bool), r"got dtype torch\.bool"),
        (CrossEntropy(), (3, 4), [0, 1, 2], r"got list"),
        (CrossEntropy(), (3,), torch.zeros(3).long(), r"expected outputs \[N, \.\.\., C\], got shape \(3,\)"),
        (
            CrossEntropy(),
            (2, 3, 5, 6),
            torch.zeros(2, 5, 6).long(),
            r"classes on axis 1, torch's layout for images: use CrossEntropy\(class_dim=1\)",
        ),
        (
            CrossEntropy(class_dim=1),
            (2, 5, 3),
            torch.zeros(2, 5).long(),
            r"they fit classes on axis 2: use CrossEntropy\(class_dim=2\)",
        ),
        (
            CrossEntropy(class_dim=0),
            (2, 3),
            torch.zeros(2).long(),
            r"class_dim=0\) does not name an axis after the first",
        ),
        (
            CrossEntropy(class_dim=2),
            (2, 3),
            torch.zeros(2).long(),
            r"class_dim=2\) does not name an axis after the first",
        ),
        (
            CrossEntropy(),
            (3, 4),
            torch.tensor([0, 4, 1]),
            r"indices from 0 to 3 for 4 classes, or ignore_index=-100, got 4",
        ),
        (CrossEntropy(), (3, 4), torch.tensor([0, -1, 1]), r"got -1"),
        (CrossEntropy(), (1, 2), torch.tensor([[1.5, -0.5]]), r"probabilities >= 0, got a negative one"),
        (
            MSE(),
            (3, 4),
            torch.zeros(3),
            r"MSE expected targets of the outputs' shape \(3, 4\), got torch.float32 of shape \(3,\)",
        ),
        (MSE(), (3, 1), torch.zeros(3), r"shape \(3, 1\), got .*\(3,\)"),
        (MSE(), (3, 4), torch.zeros(3, 4).long(), r"MSE expected floating-point targets, got torch.int64"),
        (
            BernoulliLogits(),
            (3,),
            torch.zeros(3, dtype=torch.bool),
            r"expected floating-point targets, got torch.bool.*\.float\(\)",
        ),
        (BernoulliLogits(), (3,), None, r"BernoulliLogits expected targets .*, got NoneType"),
        (Identity(), (3, 2), torch.zeros(3), r"Identity expected targets of the outputs' shape"),
        (CustomLoss(poisson), (3, 2), {"a": [torch.zeros(2)]}, r"3 examples, got targets\['a'\]\[0\] of shape \(2,\)"),
        (CustomLoss(poisson), (3, 2), torch.tensor(1.0), r"3 examples, got targets of shape \(\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss: Loss, outputs: tuple[int, ...], targets: Any, message: str) -> None:
    for result in (torch.zeros(outputs), torch.zeros(outputs, device="meta")):
        with pytest.raises(TargetError, match=message) as caught:
            loss.check(result, targets)
        assert isinstance(caught.value, CurvlibError)
        assert isinstance(caught.value, ValueError)
    with pytest.raises(TargetError, match=message):
        loss.value(torch.zeros(outputs), targets)


@every_kind
def test_targets_that_fit_are_accepted_for_real_and_for_meta_outputs(kind: str) -> None:
    problem = make(kind, positions=(2,))
    meta = problem.outputs.to("meta", torch.float32)
    problem.loss.check(problem.outputs, problem.targets)
    problem.loss.check(meta, problem.targets)
    mask, expected = (problem.loss.mask(f, problem.targets) for f in (meta, problem.outputs))
    assert (mask is None and expected is None) or torch.equal(mask, expected)


@every_kind
def test_outputs_that_no_loss_is_defined_for_are_refused(kind: str) -> None:
    loss = make(kind).loss
    with pytest.raises(EmptyBatchError, match=r"at least one example .* shape \(0, 4\)"):
        loss.check(torch.zeros(0, 4), torch.zeros(0))
    with pytest.raises(DtypeError, match=r"expected floating-point outputs, got torch\.int64"):
        loss.check(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3))
    with pytest.raises(TargetError, match="got a scalar"):
        loss.check(torch.zeros(()), torch.zeros(3))
    with pytest.raises(TargetError, match=r"one tensor \[N, \.\.\.\], got tuple"):
        loss.check((torch.zeros(3, 4),), torch.zeros(3))


def test_ignore_index_may_lie_outside_the_classes() -> None:
    CrossEntropy(ignore_index=255).check(torch.zeros(2, 3), torch.tensor([255, 1], dtype=torch.uint8))
    with pytest.raises(TargetError, match="ignore_index=255, got -100"):
        CrossEntropy(ignore_index=255).check(torch.zeros(2, 3), torch.tensor([-100, 1]))


@every_kind
def test_options_out_of_range_are_refused(kind: str) -> None:
    problem = make(kind)
    loss, f, y = problem.loss, problem.outputs, problem.targets
    with pytest.raises(ArgumentError, match="reduction must be one of mean, sum, got 'none'"):
        replace(loss, reduction="none")  # type: ignore[type-var]
    for start, stop in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ArgumentError, match=rf"columns 0 to 4 for these outputs, got {start} to {stop}"):
            loss.sqrt_hessian(f, y, start, stop)
    assert loss.sqrt_hessian(f, y, 2, 2).shape == (0, *f.shape)
    with pytest.raises(ArgumentError, match="at least one sample, got samples=0"):
        loss.sample(f, y, generator(), 0)
    with pytest.raises(DeviceError, match=r"make it with torch\.Generator\('cuda'\)"):
        loss.sample(OnCuda(f), y, generator(), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [-0.1, 1.1])
def test_label_smoothing_outside_its_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ArgumentError, match=rf"label_smoothing must be in \[0, 1\], got {smoothing}"):
        CrossEntropy(label_smoothing=smoothing)


class OnCuda(torch.Tensor):
    """Says that it lives on a GPU."""

    device = torch.device("cuda")
