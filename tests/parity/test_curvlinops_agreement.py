"""KFAC equals curvlinops' where both mean the same: the factors of every layer, and the whole matrix.

Everything is in float64. What curvlinops computes differently is in test_curvlinops_differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import curvlib as cv
from tests import reference

pytestmark = pytest.mark.parity

TOLERANCE = 1e-10
RAGGED = (3, 1, 2)  # sizes of the batches of a data set
Batches = list[tuple[Tensor, Tensor]]


class Move(nn.Module):
    """Moves an axis."""

    def __init__(self, source: int, destination: int) -> None:
        super().__init__()
        self.source, self.destination = source, destination

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(self.source, self.destination)


class Pool(nn.Module):
    """Mean over some axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


# --- losses and data ----------------------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Loss:
    """One loss in both libraries, with random targets for outputs; cross-entropy has its classes on axis 1."""

    curvlinops: type[nn.Module]
    curvlib: Callable[[str], cv.Loss]
    targets: Callable[[Tensor], Tensor]


LOSSES = {
    "mse": Loss(nn.MSELoss, cv.MSE, lambda f: normal(5, *f.shape)),
    "cross-entropy": Loss(
        nn.CrossEntropyLoss, lambda r: cv.CrossEntropy(r, class_dim=1), lambda f: normal(5, *f.shape).argmax(1)
    ),
    "bce": Loss(nn.BCEWithLogitsLoss, cv.BernoulliLogits, lambda f: (normal(5, *f.shape) > 0).double()),
}


def one_batch(net: nn.Module, inputs: Tensor, loss: str) -> Batches:
    return [(inputs, LOSSES[loss].targets(net(inputs).detach()))]


def ragged(batches: Batches) -> Batches:
    ((x, y),) = batches
    return list(zip(x.split(RAGGED), y.split(RAGGED), strict=True))


# --- the two libraries --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrices:
    """Factors by layer, and the matrix in the order of `curvlib.ravel`."""

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    dense: Tensor


def from_curvlinops(
    net: nn.Module, batches: Batches, loss: nn.Module, fisher: str, sharing: str, *, separate: bool = False
) -> Matrices:
    import curvlinops

    parameters = [p for _, p in sorted(net.named_parameters())]
    operator = curvlinops.KFACLinearOperator(
        net,
        loss,
        parameters,
        batches,
        check_deterministic=False,
        fisher_type=fisher,
        kfac_approx=sharing,
        separate_weight_and_bias=separate,
    )
    dense = operator @ torch.eye(sum(p.numel() for p in parameters), dtype=torch.float64)
    return Matrices(operator._input_covariances, operator._gradient_covariances, dense)


def from_curvlib(net: nn.Module, batches: Batches, loss: cv.Loss, fisher: str, sharing: str) -> Matrices:
    model_fn, params = cv.functional(net)
    batch = batches[0] if len(batches) == 1 else cv.over(batches)
    curv = cv.kfac(model_fn, params, batch, loss=loss, fisher=fisher, sharing=sharing)
    blocks = {reference.layer_of(name): block for name, block in curv.blocks.items()}
    inputs = {name: block.right.to_dense() for name, block in blocks.items()}
    gradients = {name: block.left.to_dense() for name, block in blocks.items()}
    return Matrices(inputs, gradients, curv.to_dense())


def both(
    net: nn.Module, batches: Batches, loss: str, reduction: str, fisher: str, sharing: str
) -> tuple[Matrices, Matrices]:
    """curvlib's and curvlinops'."""
    ours = from_curvlib(net, batches, LOSSES[loss].curvlib(reduction), fisher, sharing)
    return ours, from_curvlinops(net, batches, LOSSES[loss].curvlinops(reduction=reduction), fisher, sharing)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.norm() > 0
    assert reference.relative_error(ours, theirs) <= TOLERANCE


def assert_equal(ours: Matrices, theirs: Matrices) -> None:
    assert ours.inputs.keys() == theirs.inputs.keys()
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name in ours.inputs:
        assert_close(ours.inputs[name], theirs.inputs[name])
        assert_close(ours.gradients[name], theirs.gradients[name])
    assert_close(ours.dense, theirs.dense)


# --- one loss term an example -------------------------------------------------------------------------------------


def image_net(convolution: nn.Conv2d) -> nn.Module:
    net = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    net(normal(0, 1, convolution.in_channels, 5, 4))
    return net


IMAGE = (6, 2, 5, 4)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), (6, 4)),
    "lone linear": (lambda: nn.Linear(4, 3), (6, 4)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "mlp without bias": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)),
        (6, 4),
    ),
    "mlp with one bias": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)),
        (6, 4),
    ),
    "pooled tokens": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), Pool(1), nn.Linear(4, 3)
        ),
        (6, 3, 4),
    ),
    "pooled tokens on two axes": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Pool(1, 2), nn.Linear(5, 3)),
        (6, 3, 2, 4),
    ),
    "convolution": (lambda: image_net(nn.Conv2d(2, 3, 3)), IMAGE),
    "convolution without bias": (lambda: image_net(nn.Conv2d(2, 3, 3, bias=False)), IMAGE),
    "stride": (lambda: image_net(nn.Conv2d(2, 3, 2, stride=(2, 1))), IMAGE),
    "padding": (lambda: image_net(nn.Conv2d(2, 3, 3, padding=(2, 1))), IMAGE),
    "dilation": (lambda: image_net(nn.Conv2d(2, 3, 2, dilation=(3, 2))), IMAGE),
    "rectangular kernel, stride, padding and dilation": (
        lambda: image_net(nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 2), dilation=(2, 1))),
        IMAGE,
    ),
    "same padding": (lambda: image_net(nn.Conv2d(2, 3, 3, padding="same")), IMAGE),
    "two convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(3, 4, 2, stride=2, bias=False),
            nn.Tanh(),
            Pool(2, 3),
            nn.Linear(4, 3),
        ),
        IMAGE,
    ),
}

every_loss = pytest.mark.parametrize("loss", LOSSES)
same_fishers = pytest.mark.parametrize(  # forward-only under sum: see test_curvlinops_differences
    ("fisher", "reduction"),
    [("type-2", "mean"), ("type-2", "sum"), ("empirical", "mean"), ("empirical", "sum"), ("forward-only", "mean")],
)
batchings = pytest.mark.parametrize("batching", ["one batch", "ragged batches"])


def batched(net: nn.Module, shape: tuple[int, ...], loss: str, batching: str) -> Batches:
    batches = one_batch(net, normal(1, *shape), loss)
    return batches if batching == "one batch" else ragged(batches)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("net", NETS)
@every_loss
@same_fishers
@batchings
def test_factors_and_matrix_agree(
    net: str, loss: str, fisher: str, reduction: str, sharing: str, batching: str
) -> None:
    make, shape = NETS[net]
    module = make().double()
    assert_equal(*both(module, batched(module, shape, loss, batching), loss, reduction, fisher, sharing))


# --- a loss term at every position --------------------------------------------------------------------------------


def tokens() -> list[nn.Module]:
    return [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 3)]


DENSE_NETS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "tokens": (tokens, (6, 3, 4)),
    "tokens on two axes": (tokens, (6, 3, 2, 4)),
    "pixels": (
        lambda: [nn.Conv2d(2, 4, 3, padding=1, stride=(1, 2)), nn.Tanh(), Move(1, -1), nn.Linear(4, 3)],
        IMAGE,
    ),
    "last convolution": (lambda: [nn.Conv2d(2, 3, (3, 2), padding=(1, 0), dilation=2), Move(1, -1)], IMAGE),
}


def dense_net(net: str, loss: str) -> tuple[nn.Module, tuple[int, ...]]:
    """With the outputs' last axis moved to where cross-entropy has its classes."""
    make, shape = DENSE_NETS[net]
    last = [Move(-1, 1)] if loss == "cross-entropy" else []
    return nn.Sequential(*make(), *last).double(), shape


@pytest.mark.parametrize("net", DENSE_NETS)
@every_loss
@same_fishers
@batchings
def test_expand_agrees_with_a_loss_at_every_position(
    net: str, loss: str, fisher: str, reduction: str, batching: str
) -> None:
    module, shape = dense_net(net, loss)
    assert_equal(*both(module, batched(module, shape, loss, batching), loss, reduction, fisher, "expand"))


@pytest.mark.parametrize("net", DENSE_NETS)
@every_loss
@pytest.mark.parametrize(
    ("fisher", "reduction"), [("empirical", "mean"), ("empirical", "sum"), ("forward-only", "mean")]
)
@batchings
def test_reduce_agrees_with_a_loss_at_every_position_but_for_type_2(
    net: str, loss: str, fisher: str, reduction: str, batching: str
) -> None:
    module, shape = dense_net(net, loss)
    assert_equal(*both(module, batched(module, shape, loss, batching), loss, reduction, fisher, "reduce"))


# --- weights and biases apart, curvlinops' default ----------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "padding"])
@every_loss
@same_fishers
def test_separate_weights_and_biases_are_the_same_matrix_without_their_cross_blocks(
    net: str, loss: str, fisher: str, reduction: str
) -> None:
    make, shape = NETS[net]
    module = make().double()
    batches = one_batch(module, normal(1, *shape), loss)
    ours, _ = both(module, batches, loss, reduction, fisher, "expand")
    torch_loss = LOSSES[loss].curvlinops(reduction=reduction)
    theirs = from_curvlinops(module, batches, torch_loss, fisher, "expand", separate=True)
    _, params = cv.functional(module)
    labels = {name: torch.full(leaf.shape, i) for i, (name, leaf) in enumerate(params.items())}
    assert_close(reference.block_diagonal(ours.dense, labels), theirs.dense)
