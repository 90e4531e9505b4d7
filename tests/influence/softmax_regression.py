"""Softmax regression with weight decay: a convex problem, trained to the exact minimum on any subset.

l(W) = mean of the cross-entropy + decay / 2 |W|^2,    W [C, d + 1] with the bias as the last column.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

DECAY = 1e-2


@dataclass(frozen=True)
class Data:
    """Pairs of images [N, d] and labels [N], to train on and to measure; pixels have mean 0 and variance 1."""

    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]

    @classmethod
    def standardized(cls, train: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> Data:
        """The data, with the mean and the variance of all training pixels taken out."""
        mean, deviation = train[0].mean(), train[0].std()
        return cls(((train[0] - mean) / deviation, train[1]), ((queries[0] - mean) / deviation, queries[1]))


def digits(examples: int, queries: int) -> Data:
    """8 x 8 images from scikit-learn, shuffled."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: examples + queries]
    images, labels = images[order].double(), labels[order].long()
    return Data.standardized((images[:examples], labels[:examples]), (images[examples:], labels[examples:]))


def fashion(examples: int, queries: int) -> Data:
    """Fashion-MNIST at 14 x 14; see `fashion_folder`."""
    return Data.standardized(read_fashion("train", examples), read_fashion("t10k", queries))


def fashion_folder() -> Path:
    """Where the Debian package dataset-fashion-mnist has its files, below the root that DATASETS_ROOT names."""
    return Path(os.environ.get("DATASETS_ROOT", os.sep)) / "usr" / "share" / "datasets" / "fashion-mnist"


def read_fashion(split: str, number: int) -> tuple[Tensor, Tensor]:
    """The first images of a split, 2 x 2 pixels averaged, and their labels."""

    def read(name: str, header: int, size: int) -> Tensor:
        with gzip.open(fashion_folder() / f"{split}-{name}.gz") as file:
            file.read(header)
            return torch.frombuffer(bytearray(file.read(number * size)), dtype=torch.uint8)

    pixels = read("images-idx3-ubyte", 16, 28 * 28).reshape(number, 14, 2, 14, 2).double()
    return pixels.mean((2, 4)).flatten(1), read("labels-idx1-ubyte", 8, 1).long()


def fit(data: Data, subsets: Tensor, tolerance: float = 1e-9) -> Tensor:
    """The minima on all subsets [S, N] at once: W [S, C, d + 1].

    Newton's method; its systems are solved by conjugate gradients, preconditioned by the inverse Hessian of the whole
    data at the whole data's minimum, where every subset starts.
    """
    inputs, hot = with_bias(data.train[0]), torch.nn.functional.one_hot(data.train[1]).double()  # [N, d + 1], [N, C]
    zeros = inputs.new_zeros(1, hot.shape[1], inputs.shape[1])
    whole = torch.ones_like(subsets[:1])
    start = minimum(inputs, hot, whole, zeros, None, tolerance)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian(inputs, start[0])))
    return minimum(inputs, hot, subsets, start.expand(len(subsets), -1, -1), inverse, tolerance)


def with_bias(images: Tensor) -> Tensor:
    """[N, d + 1]: a last column of ones."""
    return torch.cat([images, torch.ones_like(images[:, :1])], 1)


def query_losses(data: Data, weights: Tensor) -> Tensor:
    """Cross-entropy of the queries under each W: [S, Q]."""
    images, labels = data.queries
    return -(with_bias(images) @ weights.mT).log_softmax(-1)[:, torch.arange(len(labels)), labels]


def hessian(inputs: Tensor, weights: Tensor) -> Tensor:
    """Of the objective on all inputs: [C (d + 1), C (d + 1)]."""
    p = (inputs @ weights.mT).softmax(1)
    spread = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)  # [N, C, C]
    classes, width = weights.shape
    blocks = torch.stack([(spread[:, i].mT.unsqueeze(2) * inputs).mT @ inputs for i in range(classes)])  # [C, C, d, d]
    dense = blocks.permute(0, 2, 1, 3).reshape(classes * width, classes * width) / len(inputs)
    return dense + DECAY * torch.eye(classes * width, dtype=inputs.dtype)


def minimum(
    inputs: Tensor, hot: Tensor, subsets: Tensor, weights: Tensor, inverse: Tensor | None, tolerance: float
) -> Tensor:
    """Newton's iterations from ``weights`` [S, C, d + 1]; ``inverse`` is the preconditioner."""
    share = subsets.double() / subsets.sum(1, keepdim=True)  # [S, N]

    def precondition(residual: Tensor) -> Tensor:
        return residual if inverse is None else (residual.flatten(1) @ inverse).reshape(residual.shape)

    for _ in range(50):
        p = (inputs @ weights.mT).softmax(-1)  # [S, N, C]
        gradient = (share.unsqueeze(2) * (p - hot)).mT @ inputs + DECAY * weights
        norm = gradient.flatten(1).norm(dim=1).max()
        if norm < tolerance:
            return weights

        def product(v: Tensor, p: Tensor = p) -> Tensor:
            change = inputs @ v.mT
            change = p * (change - (p * change).sum(2, keepdim=True))
            return (share.unsqueeze(2) * change).mT @ inputs + DECAY * v

        step = conjugate_gradients(product, gradient, precondition, norm.sqrt().clamp(max=0.1))
        for _ in range(20):  # halved where the objective would rise by more than rounding
            worse = objective(inputs, hot, share, weights - step) > objective(inputs, hot, share, weights) + 1e-12
            if not worse.any():
                break
            step = torch.where(worse[:, None, None], step / 2, step)
        weights = weights - step
    raise AssertionError(f"Newton's method did not converge: the gradient's norm is {norm}")


def objective(inputs: Tensor, hot: Tensor, share: Tensor, weights: Tensor) -> Tensor:
    """l(W) on every subset: [S]."""
    losses = -((inputs @ weights.mT).log_softmax(-1) * hot).sum(2)  # [S, N]
    return (share * losses).sum(1) + DECAY / 2 * weights.square().sum((1, 2))


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, precondition: Callable[[Tensor], Tensor], relative: Tensor
) -> Tensor:
    """Solutions of a stack of systems, until every residual is ``relative`` of its right-hand side."""
    solution, residual = torch.zeros_like(right), right
    direction = z = precondition(residual)
    rho = inner(residual, z)
    goal = relative**2 * inner(right, right)
    for _ in range(500):
        active = inner(residual, residual) > goal  # the others rest: their next step could be 0 / 0
        if not active.any():
            return solution
        image = product(direction)
        step = torch.where(active, rho / inner(direction, image), 0)
        solution, residual = solution + step * direction, residual - step * image
        z = precondition(residual)
        rho, previous = inner(residual, z), rho
        direction = z + torch.where(active, rho / previous, 0) * direction
    raise AssertionError("conjugate gradients did not converge")


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each pair of matrices: [S, 1, 1]."""
    return (a * b).sum((1, 2), keepdim=True)
