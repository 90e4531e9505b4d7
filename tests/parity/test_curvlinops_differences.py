"""Where KFAC differs from curvlinops', brute force decides, in cases in which KFAC is exact.

Single linear layers, convolutions and linear nets with squared error have an exact KFAC (or one known by hand), which
is the GGN from per-example Jacobians.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_curvlinops_agreement import (
    Batches,
    Matrices,
    Move,
    Pool,
    assert_close,
    assert_equal,
    both,
    from_curvlinops,
    normal,
    one_batch,
    ragged,
)
from torch import Tensor, nn

import curvlib as cv
from tests import reference

pytestmark = pytest.mark.parity

both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
both_sharings = pytest.mark.parametrize("sharing", ["expand", "reduce"])


def whole(batches: Batches) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def exact_ggn(net: nn.Module, batches: Batches, reduction: str) -> Tensor:
    """Brute force, of the squared error; its blocks layer by layer."""
    model_fn, params = cv.functional(net)
    matrix = reference.ggn(model_fn, params, whole(batches), reference.squared_error, reduction)
    return reference.block_diagonal(matrix, reference.block_labels(params))


def assert_differs(theirs: Tensor, truth: Tensor) -> None:
    assert reference.relative_error(theirs, truth) > 0.05


def assert_curvlib_is_right(matrices: tuple[Matrices, Matrices], truth: Tensor) -> None:
    ours, theirs = matrices
    assert_close(ours.dense, truth)
    assert_differs(theirs.dense, truth)


# --- forward-only under sum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@both_sharings
def test_curvlinops_differs_in_forward_only_under_sum_and_brute_force_agrees_with_curvlib(
    sharing: str, bias: bool, split: bool
) -> None:
    """A sum over N examples is N times their mean; curvlinops' matrix is the same for both."""
    net = nn.Linear(4, 3, bias=bias).double()
    batches = one_batch(net, normal(1, 6, 4), "mse")
    batches = ragged(batches) if split else batches
    half_square = exact_ggn(net, batches, "sum") / 2  # its Hessian is I
    matrices = both(net, batches, "mse", "sum", "forward-only", sharing)
    assert_curvlib_is_right(matrices, half_square)
    assert_close(6 * matrices[1].dense, half_square)


@pytest.mark.parametrize("loss", ["mse", "cross-entropy", "bce"])
@both_sharings
def test_forward_only_under_sum_is_as_many_times_curvlinops_as_there_are_examples(sharing: str, loss: str) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Pool(1), nn.Linear(5, 3)).double()
    batches = one_batch(net, normal(1, 6, 2, 4), loss)
    ours, theirs = both(net, batches, loss, "sum", "forward-only", sharing)
    gradients = {name: 6 * factor for name, factor in theirs.gradients.items()}
    assert_equal(ours, Matrices(theirs.inputs, gradients, 6 * theirs.dense))


# --- type-2 with several loss terms an example --------------------------------------------------------------------


@both_reductions
@both_sharings
def test_curvlinops_differs_in_type_2_of_a_layer_with_outputs_at_several_positions_and_brute_force_agrees_with_curvlib(
    sharing: str, reduction: str
) -> None:
    """A vector backpropagated from all positions at once has cross terms that the Hessian has not."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))).double()
    batches = one_batch(net, normal(1, 6, 4), "mse")
    assert_curvlib_is_right(both(net, batches, "mse", reduction, "type-2", sharing), exact_ggn(net, batches, reduction))


@both_reductions
def test_curvlinops_differs_in_type_2_of_channels_first_outputs_and_brute_force_agrees_with_curvlib(
    reduction: str,
) -> None:
    """For squared errors curvlinops takes the last axis as the outputs of a loss term, here the width of an image."""
    net = nn.Conv2d(2, 3, 2, padding=1).double()
    batches = one_batch(net, normal(1, 4, 2, 3, 2), "mse")
    assert_curvlib_is_right(
        both(net, batches, "mse", reduction, "type-2", "expand"), exact_ggn(net, batches, reduction)
    )


@pytest.mark.parametrize("bias", [True, False])
@both_reductions
def test_curvlinops_differs_in_type_2_reduce_with_a_loss_at_every_position_and_brute_force_agrees_with_curvlib(
    reduction: str, bias: bool
) -> None:
    """With equal tokens `reduce` is exact; curvlinops adds up the vectors of the 3 positions before it squares."""
    net = nn.Sequential(nn.Linear(4, 3, bias=bias), nn.Linear(3, 2, bias=bias)).double()
    batches = one_batch(net, normal(1, 6, 1, 4).expand(6, 3, 4), "mse")
    exact = exact_ggn(net, batches, reduction)
    matrices = both(net, batches, "mse", reduction, "type-2", "reduce")
    assert_curvlib_is_right(matrices, exact)
    assert_close(matrices[1].dense / 3, exact)


# --- positions and uses that curvlinops does not see --------------------------------------------------------------


@both_reductions
def test_curvlinops_differs_for_tokens_folded_into_the_batch_and_brute_force_agrees_with_curvlib(
    reduction: str,
) -> None:
    net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3), nn.Unflatten(0, (-1, 3))).double()
    batches = one_batch(net, normal(1, 6, 3, 4), "mse")
    matrices = both(net, batches, "mse", reduction, "type-2", "expand")
    exact = exact_ggn(net, batches, reduction)
    assert_curvlib_is_right(matrices, exact)
    assert_close(matrices[1].dense / (27 if reduction == "mean" else 3), exact)


class Twice(nn.Module):
    """One layer for both halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(half) for half in x.chunk(2, 1)], 1)


@both_reductions
@pytest.mark.parametrize("tied", ["sum", "merge"])
def test_curvlinops_differs_for_a_layer_called_twice_and_brute_force_agrees_with_curvlib(
    tied: str, reduction: str
) -> None:
    """curvlinops' input factor is the sum over the two calls, not their mean."""
    net = Twice().double()
    batches = one_batch(net, normal(1, 6, 8), "mse")
    exact = exact_ggn(net, batches, reduction)
    model_fn, params = cv.functional(net)
    ours = cv.kfac(model_fn, params, batches[0], loss=cv.MSE(reduction), fisher="type-2", tied=tied)
    theirs = from_curvlinops(net, batches, nn.MSELoss(reduction=reduction), "type-2", "expand")
    assert_close(ours.to_dense(), exact)
    assert_differs(theirs.dense, exact)
    assert_close(theirs.dense / 2, exact)


# --- convolutions -------------------------------------------------------------------------------------------------


def convolution(sharing: str, layer: nn.Conv2d) -> nn.Module:
    """With a squared error at every pixel, where `expand` is exact, or of the pooled pixels, where `reduce` is."""
    return nn.Sequential(layer, Move(1, -1) if sharing == "expand" else Pool(2, 3)).double()


@pytest.mark.parametrize("groups", [2, 4])
@both_reductions
@both_sharings
def test_curvlinops_differs_for_grouped_convolutions_and_brute_force_agrees_with_curvlib(
    sharing: str, reduction: str, groups: int
) -> None:
    """curvlinops averages the input channels over the groups; each group has its own input factor."""
    net = convolution(sharing, nn.Conv2d(4, 4, 2, groups=groups, padding=1))
    batches = one_batch(net, normal(1, 6, 4, 3, 2), "mse")
    assert_curvlib_is_right(both(net, batches, "mse", reduction, "type-2", sharing), exact_ggn(net, batches, reduction))


@pytest.mark.parametrize("groups", [2, 4])
@both_reductions
@both_sharings
@pytest.mark.parametrize("fisher", ["type-2", "forward-only"])
def test_grouped_convolutions_agree_where_all_groups_see_the_same_channels(
    fisher: str, sharing: str, reduction: str, groups: int
) -> None:
    net = convolution(sharing, nn.Conv2d(4, 4, 2, groups=groups, stride=2, padding=1))
    batches = one_batch(net, normal(1, 6, 4 // groups, 3, 2).repeat(1, groups, 1, 1), "mse")
    ours, theirs = both(net, batches, "mse", reduction, fisher, sharing)
    terms = 6 * (4 if sharing == "expand" else 1)  # of the loss: one a pixel, or one an image
    assert_close(ours.dense, (terms if (fisher, reduction) == ("forward-only", "sum") else 1) * theirs.dense)


@both_reductions
@both_sharings
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_curvlinops_differs_for_padding_other_than_zeros_and_brute_force_agrees_with_curvlib(
    mode: str, sharing: str, reduction: str
) -> None:
    net = convolution(sharing, nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode))
    batches = one_batch(net, normal(1, 6, 2, 3, 2), "mse")
    assert_curvlib_is_right(both(net, batches, "mse", reduction, "type-2", sharing), exact_ggn(net, batches, reduction))


# --- targets that do not count ------------------------------------------------------------------------------------


@both_reductions
@both_sharings
def test_curvlinops_differs_for_ignored_targets_and_brute_force_agrees_with_curvlib(
    sharing: str, reduction: str
) -> None:
    """At weights of zero all classes are equally likely, and one Hessian for all examples makes KFAC exact."""
    net = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(net.weight)
    targets = torch.tensor([0, -100, 2, -100, -100, 1])
    batches = [(normal(1, 6, 4), targets)]
    model_fn, params = cv.functional(net)
    exact = reference.ggn(model_fn, params, batches[0], reference.cross_entropy, reduction)
    assert_curvlib_is_right(both(net, batches, "cross-entropy", reduction, "type-2", sharing), exact)


# --- the scale of exact cases in which both are right -------------------------------------------------------------

EXACT_NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Linear(4, 3), (6, 4), "expand"),
    "deep linear": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2, bias=False), nn.Linear(2, 3)),
        (6, 4),
        "expand",
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), (6, 2, 4), "expand"),
    "pooled tokens": (lambda: nn.Sequential(nn.Linear(4, 5), Pool(1), nn.Linear(5, 3)), (6, 2, 4), "reduce"),
    "pixels": (lambda: convolution("expand", nn.Conv2d(2, 3, 2, padding=1, stride=2)), (6, 2, 3, 2), "expand"),
    "pooled pixels": (lambda: convolution("reduce", nn.Conv2d(2, 3, 2, dilation=2)), (6, 2, 4, 3), "reduce"),
}


@pytest.mark.parametrize("net", EXACT_NETS)
@both_reductions
@pytest.mark.parametrize("split", [False, True])
def test_curvlinops_and_brute_force_agree_with_curvlib(net: str, reduction: str, split: bool) -> None:
    make, shape, sharing = EXACT_NETS[net]
    module = make().double()
    batches = one_batch(module, normal(1, *shape), "mse")
    batches = ragged(batches) if split else batches
    exact = exact_ggn(module, batches, reduction)
    for matrices in both(module, batches, "mse", reduction, "type-2", sharing):
        assert_close(matrices.dense, exact)
