"""The three workloads of the cost benchmark: a multilayer perceptron, a small GPT and a convolutional net."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (
            part.view(n, t, self.heads, width // self.heads).transpose(1, 2) for part in self.attend(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(n, t, width))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions; token indices [N, T] -> logits [N, T, vocabulary]."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


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
