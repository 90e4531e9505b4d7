"""One small model for every kind of layer and way to write it, to be run through both engines and all transforms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exactness_problems import generator, normal, randomized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvlib as cv

Params = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Model:
    """A pure model with two outputs at the end, its parameters in float64, and inputs of five examples."""

    model_fn: Callable[[Any, Any], Tensor]
    params: Any
    inputs: Any

    def batch(self, kind: str = "classes") -> tuple[Any, Tensor]:
        outputs = self.model_fn(self.params, self.inputs)
        if kind == "classes":
            return self.inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator(1))
        return self.inputs, normal(2, *outputs.shape)


def of_module(module: nn.Module, *shape: int, tokens: int | None = None) -> Model:
    """A module, with buffers as they are."""
    inputs = normal(3, 5, *shape) if tokens is None else torch.randint(tokens, (5, *shape), generator=generator(3))
    model_fn, params = cv.functional(module.double())
    return Model(model_fn, randomized(params, 11), inputs)


def of_function(model_fn: Callable[[Params, Tensor], Tensor], params: dict[str, tuple[int, ...]], *shape: int) -> Model:
    """A hand-written function, by the shapes of its parameters."""
    zeros = {name: torch.zeros(size) for name, size in params.items()}
    return Model(model_fn, randomized(zeros, 13), normal(3, 5, *shape))


def image_head(channels: int, size: int) -> tuple[nn.Module, ...]:
    return nn.Tanh(), nn.Flatten(), nn.Linear(channels * size, 2)


class Positions(nn.Module):
    """Token and position embeddings, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(7, 3), nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(x) + self.positions(torch.arange(x.shape[1]))))


class Attention(nn.Module):
    """One head of causal self-attention on three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.project(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


class Tied(nn.Module):
    """A table that is embedding and output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.table(x)), self.table.weight)


def batch_norm() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(normal(8, 3))
    layer.running_var.copy_(normal(9, 3).square() + 0.5)
    return layer.eval()


def conv_addmm(p: Params, x: Tensor) -> Tensor:
    """GPT-2's way to write a linear layer."""
    flat = torch.addmm(p["b"], x.view(-1, x.shape[-1]), p["w"])
    return torch.tanh(flat).view(*x.shape[:-1], -1)


BLOCK = {"w": (3, 4), "b": (4,), "v": (4, 2)}

ZOO: dict[str, Callable[[], Model]] = {
    "linear": lambda: of_module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 3),
    "linear without bias": lambda: of_module(nn.Sequential(nn.Linear(3, 2, bias=False)), 3),
    "linear on tokens": lambda: of_module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 2, 4, 3),
    "in-place activation": lambda: of_module(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), 3
    ),
    "conv1d": lambda: of_module(nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), *image_head(3, 6)), 2, 6),
    "conv2d": lambda: of_module(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *image_head(3, 42)), 2, 6, 7),
    "conv2d with stride": lambda: of_module(
        nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=2, dilation=(1, 2), padding=1), *image_head(3, 9)), 2, 5, 6
    ),
    "conv2d with groups": lambda: of_module(nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), *image_head(4, 4)), 4, 3, 3),
    "conv2d that wraps": lambda: of_module(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), *image_head(3, 9)), 2, 3, 3
    ),
    "conv3d": lambda: of_module(nn.Sequential(nn.Conv3d(2, 3, 2), *image_head(3, 8)), 2, 3, 3, 3),
    "layer norm": lambda: of_module(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), 3),
    "rms norm": lambda: of_module(nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2)), 3),
    "group norm": lambda: of_module(nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), *image_head(4, 4)), 2, 3, 3),
    "batch norm": lambda: of_module(nn.Sequential(nn.Conv2d(2, 3, 2), batch_norm(), *image_head(3, 4)), 2, 3, 3),
    "embeddings": lambda: of_module(Positions(), 4, tokens=7),
    "attention": lambda: of_module(Attention(), 3, 4),
    "tied": lambda: of_module(Tied(), 4, tokens=6),
    "matmul": lambda: of_function(lambda p, x: torch.tanh(x @ p["w"] + p["b"]) @ p["v"], BLOCK, 3),
    "transposed": lambda: of_function(
        lambda p, x: torch.tanh(x @ p["w"].T + p["b"]) @ p["v"].t().mT, {"w": (4, 3), "b": (4,), "v": (4, 2)}, 3
    ),
    "einsum": lambda: of_function(
        lambda p, x: torch.einsum("nth,ho->nto", torch.tanh(torch.einsum("ntd,dh->nth", x, p["w"]) + p["b"]), p["v"]),
        BLOCK, 2, 3,
    ),
    "addmm": lambda: of_function(lambda p, x: conv_addmm(p, x) @ p["v"], BLOCK, 2, 3),
    "experts": lambda: of_function(
        lambda p, x: torch.einsum("neh,eho->no", torch.tanh(torch.einsum("nd,edh->neh", x, p["w"])), p["v"]),
        {"w": (3, 4, 2), "v": (3, 2, 2)}, 4,
    ),
    "scale and shift": lambda: of_function(
        lambda p, x: torch.tanh(p["c"] * (x * p["s"] + p["t"]) - p["u"]) @ p["v"],
        {"s": (3,), "t": (2, 3), "u": (1,), "v": (3, 2), "c": ()}, 2, 3,
    ),
    "slices": lambda: of_function(
        lambda p, x: torch.tanh(x @ p["w"].chunk(2, 1)[0]) + (x @ p["w"][:, 2:]).sin(),
        {"w": (3, 4)}, 3,
    ),
    "copies": lambda: of_function(
        lambda p, x: torch.tanh(x @ p["w"].clone().contiguous() + p["b"].to(torch.float64)) @ p["v"].double(), BLOCK, 3
    ),
    "nested": lambda: Model(
        lambda p, x: torch.tanh(x["a"] @ p["first"][0]) @ p["second"]["w"] + x["b"] @ p["first"][1],
        {"first": (normal(1, 3, 4), normal(2, 2, 2)), "second": {"w": normal(3, 4, 2)}},
        {"a": normal(4, 5, 3), "b": normal(5, 5, 2)},
    ),
}  # fmt: skip


def checkpointed(p: Params, x: Tensor) -> Tensor:
    """Both layers under activation checkpointing."""
    hidden = checkpoint(lambda x: torch.tanh(x @ p["w"] + p["b"]), x, use_reentrant=False)
    return checkpoint(lambda h: h @ p["v"], hidden, use_reentrant=False)
