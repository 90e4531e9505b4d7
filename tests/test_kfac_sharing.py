"""Where KFAC must equal the exact curvature, and where it must not: layers that are applied at many positions.

With linear nets and squared error, `expand` is exact where the loss sums over positions, `reduce` where the net sums
over them first. In between lie convolutions: of two in a row the second sees patches of the first, whose
backpropagated vectors differ between border and interior, unless the borders wrap around.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import (
    CONSTANT_HESSIAN,
    KINDS,
    Problem,
    assert_exact,
    deep_linear,
    engines,
    few,
    generator,
    normal,
    problem,
    reductions,
    seeds,
)
from hypothesis import given
from hypothesis import strategies as st
from pairwise import every_pair
from torch import Tensor, nn

import curvlib as cv

both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
both_sharings = pytest.mark.parametrize("sharing", ["expand", "reduce"])


class Pool(nn.Module):
    """Sum or mean over some axes."""

    def __init__(self, how: str, *axes: int) -> None:
        super().__init__()
        self.how, self.axes = how, axes

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.axes) if self.how == "sum" else x.mean(self.axes)


# --- linear layers on tokens ------------------------------------------------------------------------------------


@few
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    positions=st.sampled_from([(1,), (3,), (2, 3)]),
    bias=st.booleans(),
    seed=seeds,
    reduction=reductions,
    engine=engines,
)
@pytest.mark.parametrize("kind", CONSTANT_HESSIAN)
def test_expand_is_exact_for_linear_nets_whose_loss_sums_over_positions(
    kind: str, widths: list[int], positions: tuple[int, ...], bias: bool, seed: int, reduction: str, engine: str
) -> None:
    inputs = normal(seed, 3, *positions, widths[0])
    case = problem(deep_linear(widths, bias=bias), inputs, kind, reduction, seed=seed)
    assert_exact(case.kfac(sharing="expand", engine=engine), case.blocks(case.ggn()))


@few
@given(
    before=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    after=st.lists(st.integers(1, 3), min_size=0, max_size=2),
    how=st.sampled_from(["mean", "sum"]),
    bias=st.booleans(),
    seed=seeds,
    reduction=reductions,
    engine=engines,
)
@pytest.mark.parametrize("kind", CONSTANT_HESSIAN)
def test_reduce_is_exact_for_linear_nets_that_pool(
    kind: str, before: list[int], after: list[int], how: str, bias: bool, seed: int, reduction: str, engine: str
) -> None:
    first, second = deep_linear([3, *before], bias=bias), deep_linear([before[-1], *after], bias=bias)
    case = problem(nn.Sequential(first, Pool(how, 1), second), normal(seed, 4, 5, 3), kind, reduction, seed=seed)
    assert_exact(case.kfac(sharing="reduce", engine=engine), case.blocks(case.ggn()))


@both_reductions
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_pooling_in_the_middle_tells_expand_from_reduce(how: str, reduction: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), Pool(how, 1), nn.Linear(3, 4), nn.Linear(4, 2))
    case = problem(net, normal(1, 4, 5, 3), "mse", reduction)
    exact = case.blocks(case.ggn())
    expand, reduce = (case.kfac(sharing=sharing).to_dense() for sharing in ("expand", "reduce"))

    def of(matrix: Tensor, layer: int) -> Tensor:
        return reference.block(matrix, case.params, f"{layer}.weight", f"{layer}.bias")

    for layer in (3, 4):
        assert reference.relative_error(of(expand, layer), of(exact, layer)) <= 1e-10
    for layer in (0, 1, 3, 4):
        assert reference.relative_error(of(reduce, layer), of(exact, layer)) <= 1e-10
    for layer in (0, 1):
        assert reference.relative_error(of(expand, layer), of(exact, layer)) > 0.05


@every_pair(
    "fisher, sharing, reduction",
    ["type-2", "empirical", "forward-only"],
    ["expand", "reduce"],
    ["mean", "sum"],
)
def test_one_position_is_no_sharing(fisher: str, sharing: str, reduction: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    flat = problem(net, normal(1, 4, 3), "mse", reduction)
    x, y = flat.batch
    loss = cv.MSE(reduction)
    shared = cv.kfac(flat.model_fn, flat.params, (x[:, None], y[:, None]), loss=loss, fisher=fisher, sharing=sharing)
    torch.testing.assert_close(shared.to_dense(), flat.kfac(fisher=fisher).to_dense(), rtol=1e-12, atol=1e-14)


@both_reductions
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "custom"])
def test_expand_counts_the_positions_that_the_loss_counts(kind: str, reduction: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    case = problem(net, normal(2, 4, 3, 3), kind, reduction)
    case.params["0.weight"] = torch.zeros_like(case.params["0.weight"])  # equal backpropagated vectors everywhere
    assert_exact(case.kfac(sharing="expand"), case.blocks(case.ggn()))


def masked_problem(kind: str, reduction: str) -> tuple[Problem, Tensor]:
    """A layer at five positions, of which the targets of some are ignored, and a mask [N, T] of those that count."""
    if kind == "linear":
        net, inputs = nn.Sequential(nn.Linear(3, 4)), normal(1, 6, 5, 3)
    elif kind == "embedding":
        net, inputs = nn.Sequential(nn.Embedding(7, 4)), torch.randint(7, (6, 5), generator=generator(1))
    elif kind == "convolution":
        net, inputs = nn.Sequential(nn.Conv1d(2, 4, 2), Swap()), normal(1, 6, 2, 6)
    else:
        net, inputs = nn.Sequential(nn.Conv1d(4, 4, 2, groups=2, bias=kind == "groups"), Swap()), normal(1, 6, 4, 6)
    case = problem(net, inputs, "ignored", reduction)
    targets = case.batch[1]
    targets[0], targets[1], targets[2, 1:] = -100, 1, -100  # none, all and one of an example's
    return case, targets != -100


class Swap(nn.Module):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def inputs_and_gradients(case: Problem, kind: str) -> tuple[Tensor, Tensor]:
    """A [N, G, T, d_in (+ 1)] and the gradients of single examples' terms by the outputs, [N, G, T, d_out]."""
    x, targets = case.batch
    outputs = case.model_fn(case.params, x)
    g = torch.func.grad(lambda z: case.kind.objective(z, targets, "sum"))(outputs)
    if kind == "linear":
        a = F.pad(x, (0, 1), value=1.0).unsqueeze(1)
    elif kind == "embedding":
        a = F.one_hot(x, 7).double().unsqueeze(1)
    else:
        groups = 1 if kind == "convolution" else 2
        a = x.unfold(2, 2, 1).unflatten(1, (groups, 2)).permute(0, 1, 3, 2, 4).flatten(-2)
        a = a if kind == "groups without bias" else F.pad(a, (0, 1), value=1.0)
        return a, g.unflatten(2, (groups, -1)).movedim(2, 1)
    return a, g.unsqueeze(1)


MASKED = ("linear", "embedding", "convolution", "groups", "groups without bias")


@every_pair("kind, engine, reduction", MASKED, ["functional", "autograd"], ["mean", "sum"])
def test_reduce_takes_means_over_the_positions_that_count(kind: str, engine: str, reduction: str) -> None:
    case, counts = masked_problem(kind, reduction)
    a, g = inputs_and_gradients(case, kind)
    means = [rows[:, seen].mean(1) for rows, seen in zip(a, counts, strict=True) if seen.any()]  # one example at a time
    inputs = torch.stack([torch.einsum("gi,gj->gij", mean, mean) for mean in means]).mean(0)
    total = g.sum(2)
    outputs = torch.einsum("ngi,ngj->gij", total, total) / (counts.sum() if reduction == "mean" else 1)
    for batch in (case.batch, cv.over(list(zip(*(x.split([1, 3, 2]) for x in case.batch), strict=True)))):
        if isinstance(batch, tuple) or reduction == "sum":
            curv = cv.kfac(
                case.model_fn,
                case.params,
                batch,
                loss=case.kind.loss(reduction),
                fisher="empirical",
                sharing="reduce",
                engine=engine,
            )
            block = curv.blocks["0.weight"]
            torch.testing.assert_close(block.right.matrices().reshape(inputs.shape), inputs, rtol=1e-11, atol=1e-14)
            torch.testing.assert_close(block.left.matrices().reshape(outputs.shape), outputs, rtol=1e-11, atol=1e-14)


@both_reductions
@pytest.mark.parametrize("kind", MASKED)
def test_tkfac_reduces_over_the_positions_that_count(kind: str, reduction: str) -> None:
    case, counts = masked_problem(kind, reduction)
    a, g = inputs_and_gradients(case, kind)
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    d = torch.einsum("ngo,ngi->ngoi", g.sum(2), torch.einsum("ngti,nt->ngi", a, share))
    count = counts.sum() if reduction == "mean" else 1
    left, right = torch.einsum("ngoi,ngpi->gop", d, d) / count, torch.einsum("ngoi,ngoj->gij", d, d) / count
    loss = case.kind.loss(reduction)
    curv = cv.tkfac(case.model_fn, case.params, case.batch, loss=loss, fisher="empirical", sharing="reduce")
    block = curv.blocks["0.weight"]
    right = right / left.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    torch.testing.assert_close(block.left.matrices().reshape(left.shape), left, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(block.right.matrices().reshape(right.shape), right, rtol=1e-11, atol=1e-14)


@both_reductions
@both_sharings
def test_doubling_the_data_leaves_a_mean_and_doubles_a_sum_with_sharing(sharing: str, reduction: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2, padding=1), Pool("mean", 2, 3))
    case = problem(net, normal(3, 3, 2, 4, 4), "cross-entropy", reduction)
    batch = tuple(torch.cat([x, x]) for x in case.batch)
    loss = cv.CrossEntropy(reduction)
    twice = cv.kfac(case.model_fn, case.params, batch, loss=loss, fisher="type-2", sharing=sharing).to_dense()
    factor = 1 if reduction == "mean" else 2
    torch.testing.assert_close(twice, factor * case.kfac(sharing=sharing).to_dense(), rtol=1e-11, atol=1e-14)


# --- convolutions -----------------------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, Callable[[bool], tuple[nn.Module, tuple[int, ...]]]] = {
    "plain": lambda bias: (nn.Conv2d(2, 4, 3, bias=bias), (2, 5, 4)),
    "stride and padding": lambda bias: (nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=bias), (2, 5, 4)),
    "rectangular": lambda bias: (nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 0), bias=bias), (2, 4, 5)),
    "dilation": lambda bias: (nn.Conv2d(2, 4, 2, dilation=(2, 1), padding=1, bias=bias), (2, 4, 3)),
    "same": lambda bias: (nn.Conv2d(2, 4, (2, 3), padding="same", bias=bias), (2, 3, 4)),
    "circular": lambda bias: (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=bias), (2, 3, 4)),
    "groups": lambda bias: (nn.Conv2d(4, 4, 2, groups=2, bias=bias), (4, 3, 4)),
    "depthwise": lambda bias: (nn.Conv2d(4, 4, 3, groups=4, padding=1, stride=2, bias=bias), (4, 3, 4)),
    "1d": lambda bias: (nn.Conv1d(2, 4, 3, stride=2, padding=1, bias=bias), (2, 6)),
    "1d groups": lambda bias: (nn.Conv1d(4, 4, 3, groups=2, padding=1, bias=bias), (4, 5)),
    "3d": lambda bias: (nn.Conv3d(2, 4, (2, 1, 2), stride=(1, 2, 1), padding=(0, 0, 1), bias=bias), (2, 3, 3, 2)),
}


def groups_of(layer: nn.Module) -> dict[str, int]:
    return {"0": int(layer.groups)}  # type: ignore[call-overload]


@every_pair("bias, convolution, reduction", [True, False], CONVOLUTIONS, ["mean", "sum"])
def test_expand_is_exact_for_a_convolution_with_a_loss_a_pixel(convolution: str, bias: bool, reduction: str) -> None:
    layer, shape = CONVOLUTIONS[convolution](bias)
    case = problem(nn.Sequential(layer), normal(1, 3, *shape), "mse", reduction)
    assert_exact(case.kfac(sharing="expand"), case.blocks(case.ggn(), groups=groups_of(layer)))


@every_pair("how, bias, convolution, reduction", ["mean", "sum"], [True, False], CONVOLUTIONS, ["mean", "sum"])
def test_reduce_is_exact_for_a_shallow_linear_cnn(how: str, convolution: str, bias: bool, reduction: str) -> None:
    layer, shape = CONVOLUTIONS[convolution](bias)
    net = nn.Sequential(layer, Pool(how, *range(2, len(shape) + 1)), nn.Linear(4, 2, bias=bias))
    case = problem(net, normal(2, 3, *shape), "mse", reduction)
    exact = case.blocks(case.ggn(), groups=groups_of(layer))
    assert_exact(case.kfac(sharing="reduce"), exact)
    assert reference.relative_error(case.kfac(sharing="expand").to_dense(), exact) > 0.01


@every_pair("sharing, convolution, reduction", ["expand", "reduce"], CONVOLUTIONS, ["mean", "sum"])
def test_both_engines_agree_on_convolutions(sharing: str, convolution: str, reduction: str) -> None:
    layer, shape = CONVOLUTIONS[convolution](True)
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, *shape))
    case = problem(net, normal(2, 3, *shape), "cross-entropy", reduction)
    one, other = (case.kfac(sharing=sharing, engine=engine).to_dense() for engine in ("functional", "autograd"))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@both_reductions
@pytest.mark.parametrize("bias", [True, False])
def test_reduce_is_exact_for_a_deep_linear_cnn_whose_borders_wrap_around(bias: bool, reduction: str) -> None:
    wrap = {"padding": 1, "padding_mode": "circular", "bias": bias}
    net = nn.Sequential(nn.Conv2d(2, 3, 3, **wrap), nn.Conv2d(3, 4, 3, **wrap), Pool("mean", 2, 3), nn.Linear(4, 2))
    case = problem(net, normal(3, 3, 2, 4, 3), "mse", reduction)
    assert_exact(case.kfac(sharing="reduce"), case.blocks(case.ggn()))


@both_reductions
def test_reduce_is_not_exact_for_a_deep_linear_cnn_with_zero_padding(reduction: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1), Pool("mean", 2, 3))
    case = problem(net, normal(3, 3, 2, 4, 3), "mse", reduction)
    assert reference.relative_error(case.kfac(sharing="reduce").to_dense(), case.blocks(case.ggn())) > 0.001


# --- embeddings -------------------------------------------------------------------------------------------------


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(5, shape, generator=generator(seed))


@few
@given(seed=seeds, reduction=reductions, padding=st.sampled_from([None, 0, -1]), engine=engines)
def test_expand_is_exact_for_an_embedding_with_a_loss_a_token(
    seed: int, reduction: str, padding: int | None, engine: str
) -> None:
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Linear(3, 2))
    case = problem(net, tokens(seed, 3, 4), "mse", reduction, seed=seed)
    assert_exact(case.kfac(sharing="expand", engine=engine), case.blocks(case.ggn()))


@few
@given(seed=seeds, reduction=reductions, how=st.sampled_from(["mean", "sum"]), engine=engines)
def test_reduce_is_exact_for_pooled_embeddings(seed: int, reduction: str, how: str, engine: str) -> None:
    net = nn.Sequential(nn.Embedding(5, 3), Pool(how, 1), nn.Linear(3, 2))
    case = problem(net, tokens(seed, 4, 3), "mse", reduction, seed=seed)
    assert_exact(case.kfac(sharing="reduce", engine=engine), case.blocks(case.ggn()))


@few
@given(seed=seeds, reduction=reductions)
def test_reduce_is_exact_for_means_of_as_many_embeddings_as_are_not_padding(seed: int, reduction: str) -> None:
    def bag_of_words(params: dict[str, Tensor], words: Tensor) -> Tensor:
        vectors = F.embedding(words, params["0.weight"], padding_idx=0)
        real = (words != 0).unsqueeze(-1)
        return (vectors * real).sum(1) / real.sum(1) @ params["1.weight"].T

    words = tokens(seed, 4, 4)
    words[:, 0] = 1  # no example is all padding
    words[1:3, -2:] = 0  # lengths differ
    shapes = {"0.weight": torch.zeros(5, 3), "1.weight": torch.zeros(2, 3)}
    case = problem(bag_of_words, words, "mse", reduction, params=shapes, seed=seed)
    assert_exact(case.kfac(sharing="reduce"), case.blocks(case.ggn()))


def test_the_input_factor_of_an_embedding_is_the_diagonal_of_token_frequencies() -> None:
    words = tokens(0, 4, 3)
    case = problem(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), words, "mse", "mean")
    side = case.kfac(sharing="expand").blocks["0.weight"].right
    assert isinstance(side, cv.Diagonal)
    torch.testing.assert_close(side.values, words.flatten().bincount(minlength=5).double() / 12)


@both_reductions
@pytest.mark.parametrize("kind", ["mse", "ignored"])
def test_forward_only_has_the_scale_of_the_reduction_at_every_position(kind: str, reduction: str) -> None:
    case = problem(nn.Sequential(nn.Linear(3, 2)), normal(4, 4, 3, 3), kind, reduction)
    case.params["0.weight"], case.params["0.bias"] = torch.zeros(2, 3).double(), torch.zeros(2).double()
    curv = case.kfac(fisher="forward-only").to_dense()
    exact = case.kfac(fisher="type-2").to_dense()
    ratio = {"mse": {"mean": 1.0, "sum": 2.0}, "ignored": {"mean": 0.25, "sum": 0.25}}[kind][reduction]
    torch.testing.assert_close(exact.trace(), ratio * curv.trace(), rtol=1e-12, atol=0)
