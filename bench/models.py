"""The three workloads of the cost benchmark: a multilayer perceptron, a small GPT and a convolutional net."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from language_model import GPT, shakespeare  # noqa: F401 (from here, because of the path)

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, batches for it, and how its outputs are laid out.

    Attributes:
        name: for tables.
        description: sizes.
        module: makes a model with fresh weights.
        batch: makes a batch from a generator; inputs [N, ...], class indices [N] or [N, T].
        positions: T, the loss terms of an example.
        fishers: which Fisher types to measure.
    """

    name: str
    description: str
    module: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    positions: int = 1
    fishers: tuple[str, ...] = ("mc", "empirical")


def mlp(widths: tuple[int, ...]) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: tuple[int, ...], size: int, classes: int) -> nn.Module:
    """3x3 convolutions with ReLU, each but the first followed by 2x2 pooling, and a linear head."""
    layers: list[nn.Module] = []
    for i, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
        if i > 0:
            layers.append(nn.MaxPool2d(2))
    side = size // 2 ** (len(channels) - 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, classes))


def workloads(*, quick: bool = False) -> tuple[Workload, ...]:
    """The three workloads, or toy sizes of them."""
    n, widths = (32, (20, 16, 10)) if quick else (512, (784, 1024, 1024, 512, 10))
    sequences, length, width, heads, depth, vocabulary = (2, 8, 12, 2, 1, 11) if quick else (16, 128, 192, 6, 4, 65)
    images, size, channels = (4, 8, (3, 4, 4)) if quick else (64, 32, (3, 32, 64, 128, 128))

    def vectors(generator: torch.Generator) -> Batch:
        return torch.randn(n, widths[0], generator=generator), torch.randint(10, (n,), generator=generator)

    def text(generator: torch.Generator) -> Batch:
        tokens = torch.randint(vocabulary, (sequences, length + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def pictures(generator: torch.Generator) -> Batch:
        inputs = torch.randn(images, channels[0], size, size, generator=generator)
        return inputs, torch.randint(10, (images,), generator=generator)

    return (
        Workload(
            "MLP",
            f"{'-'.join(map(str, widths))}, ReLU, {n} examples",
            lambda: mlp(widths),
            vectors,
            fishers=("mc", "empirical", "type-2"),
        ),
        Workload(
            "GPT",
            f"{depth} layers, width {width}, {heads} heads, vocabulary {vocabulary}, {sequences} x {length} tokens",
            lambda: GPT(depth, width, heads, vocabulary, length),
            text,
            positions=length,
        ),
        Workload(
            "CNN",
            f"3x3 convolutions {'-'.join(map(str, channels))}, linear head, {images} images {size} x {size}",
            lambda: cnn(channels, size, 10),
            pictures,
        ),
    )
