"""Models that keep examples apart, that make them depend on each other, and that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exactness_problems import normal
from flow_layers import Layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Params = dict[str, Tensor]
ModelFn = Callable[[Params, Any], Tensor]
Case = tuple[ModelFn, Params, Any]
N = 5
INPUTS = {
    "rows": normal(0, N, 4),
    "sequences": normal(1, N, 3, 4),
    "grids": normal(2, N, 2, 2, 4),
    "videos": normal(3, N, 2, 3, 4),
    "square": normal(4, N, N, 4),
}


def weights(**shapes: tuple[int, ...]) -> Params:
    return {name: 0.5 * normal(10 + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


AB = weights(a=(4, 4), b=(4, 2))
ATTENTION = weights(q=(4, 4), k=(4, 4), v=(4, 4), b=(4, 2))
ROWS, SEQUENCES, SQUARE = INPUTS["rows"], INPUTS["sequences"], INPUTS["square"]
IMAGES, TOKENS = normal(5, N, 2, 6, 6), torch.arange(3 * N).reshape(N, 3) % 7
PAIR = (ROWS, normal(6, N, 4))
LENGTHS = {"lengths": torch.tensor([1, 2, 3, 3, 2]), "x": SEQUENCES}


def between(layer: Layer) -> ModelFn:
    return lambda p, x: layer(torch.tanh(x @ p["a"])) @ p["b"]


# --- attention ----------------------------------------------------------------------------------------------------

Split = Callable[[Tensor, int, int], Tensor]
LAYOUTS: dict[str, tuple[Split, Split]] = {
    "heads second": (
        lambda h, n, t: h.view(n, t, 2, 2).transpose(1, 2),
        lambda y, n, t: y.transpose(1, 2).reshape(n, t, 4),
    ),
    "time first, examples times heads": (
        lambda h, n, t: h.transpose(0, 1).contiguous().view(t, n * 2, 2).transpose(0, 1),
        lambda y, n, t: y.transpose(0, 1).contiguous().view(t, n, 4).transpose(0, 1),
    ),
    "examples times heads": (
        lambda h, n, t: h.view(n, t, 2, 2).permute(0, 2, 1, 3).reshape(n * 2, t, 2),
        lambda y, n, t: y.view(n, 2, t, 2).permute(0, 2, 1, 3).reshape(n, t, 4),
    ),
    "heads times examples": (
        lambda h, n, t: h.view(n, t, 2, 2).permute(2, 0, 1, 3).reshape(2 * n, t, 2),
        lambda y, n, t: y.view(2, n, t, 2).permute(1, 2, 0, 3).reshape(n, t, 4),
    ),
    "heads concatenated": (
        lambda h, n, t: torch.cat(h.chunk(2, 2), 0),
        lambda y, n, t: torch.cat(y.chunk(2, 0), 2),
    ),
    "heads concatenated, split by length": (
        lambda h, n, t: torch.cat(h.chunk(2, 2), 0),
        lambda y, n, t: torch.cat(y.split(n, 0), 2),
    ),
    "head by head in front": (
        lambda h, n, t: torch.stack(h.chunk(2, 2)),
        lambda y, n, t: torch.cat(y.unbind(0), 2),
    ),
}


def attention(split: Split, join: Split, *, fused: bool = True) -> ModelFn:
    def model_fn(p: Params, x: Tensor) -> Tensor:
        n, times = x.shape[:2]
        q, k, v = (split(x @ p[name], n, times) for name in "qkv")
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            future = torch.triu(torch.ones(times, times, dtype=torch.bool), 1)
            y = (q @ k.mT).masked_fill(future, float("-inf")).softmax(-1) @ v
        return join(y, n, times) @ p["b"]

    return model_fn


def rotary(p: Params, x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1]).double()[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    turns = torch.polar(torch.ones_like(angles), angles)[None]
    q, k = (
        torch.view_as_real(torch.view_as_complex((x @ p[n]).unflatten(-1, (2, 2))) * turns).flatten(2) for n in "qk"
    )
    return F.scaled_dot_product_attention(q, k, x @ p["v"]) @ p["b"]


def linear_biases(p: Params, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    bias = -0.5 * (places[None] - places[:, None]).abs().double()
    return F.scaled_dot_product_attention(x @ p["q"], x @ p["k"], x @ p["v"], attn_mask=bias) @ p["b"]


def merged_biases(p: Params, x: Tensor) -> Tensor:
    n, times, _ = x.shape
    places = (x[..., 0] < 9).long().cumsum(-1)[:, None, :]
    bias = (torch.tensor([0.5, 0.25])[:, None] * places).reshape(n * 2, 1, times).double()
    q, k, v = ((x @ p[name]).view(n, times, 2, 2).transpose(1, 2).reshape(n * 2, times, 2) for name in "qkv")
    weights = torch.baddbmm(bias, q, k.mT).view(n, 2, times, times).softmax(-1).view(n * 2, times, times)
    return torch.bmm(weights, v).view(n, 2, times, 2).permute(0, 2, 1, 3).reshape(n, times, 4) @ p["b"]


def windows(p: Params, x: Tensor) -> Tensor:
    """Attention in shifted windows of an image."""
    n, w = len(x), 3
    h = torch.roll(x.permute(0, 2, 3, 1) @ p["e"], (-1, -1), (1, 2))
    tiles = h.view(n, 2, w, 2, w, 4).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, 4)
    y = F.scaled_dot_product_attention(tiles @ p["q"], tiles @ p["k"], tiles @ p["v"])
    n = int(y.shape[0] / 4)
    y = y.view(n, 2, 2, w, w, -1).permute(0, 1, 3, 2, 4, 5).contiguous().view(n, 6, 6, -1)
    return torch.roll(y, (1, 1), (1, 2)).mean((1, 2)) @ p["b"]


# --- time, images, rows -------------------------------------------------------------------------------------------


def recurrent(p: Params, x: Tensor) -> Tensor:
    state, states = x.new_zeros(x.shape[0], 4), []
    for t in range(x.shape[1]):
        state = torch.tanh(x[:, t] @ p["a"] + state @ p["u"])
        states.append(state)
    return torch.stack(states, 1) @ p["b"]


def recurrent_over_time_first(p: Params, x: Tensor) -> Tensor:
    state, out = torch.zeros(x.shape[0], 4, dtype=x.dtype), x.new_zeros(x.shape[0], x.shape[1], 4)
    for t, now in enumerate(x.transpose(0, 1)):
        state = torch.tanh(now @ p["a"] + state @ p["u"])
        out[:, t] = state
    return out @ p["b"]


def temporal_shift(p: Params, x: Tensor) -> Tensor:
    n, times = x.shape[:2]
    h = (x.reshape(n * times, 3, 4) @ p["a"]).view(n, times, 3, 4)
    shifted = torch.zeros_like(h)
    shifted[:, :-1, :, :2] = h[:, 1:, :, :2]
    shifted[:, 1:, :, 2:] = h[:, :-1, :, 2:]
    return shifted.view(n * times, 3, 4).mean(1).view(n, times, -1).mean(1) @ p["b"]


def filled(p: Params, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 6)
    out[:, :4] = x @ p["a"]
    out[:, 4:] = x[:, :2]
    return out @ p["b"]


def in_place(p: Params, x: Tensor) -> Tensor:
    h = x.mul_(2) @ p["a"]
    h += 1
    h[:, :2].mul_(0.5)
    return h.relu_() @ p["b"]


def padding_mask(p: Params, batch: dict[str, Tensor]) -> Tensor:
    x, lengths = batch["x"], batch["lengths"]
    kept = (torch.arange(x.size(1)).expand(len(lengths), -1) < lengths.unsqueeze(1)).double()
    return (torch.tanh(x @ p["a"]) * kept[..., None]).sum(1) / kept.sum(1, keepdim=True) @ p["b"]


def last_token(p: Params, batch: dict[str, Tensor]) -> Tensor:
    x, lengths = batch["x"], batch["lengths"]
    return torch.tanh(x @ p["a"])[torch.arange(x.shape[0], device=x.device), lengths - 1] @ p["b"]


def last_token_gathered(p: Params, batch: dict[str, Tensor]) -> Tensor:
    places = (batch["lengths"] - 1)[:, None, None].expand(-1, 1, 4)
    return torch.tanh(batch["x"] @ p["a"]).gather(1, places).squeeze(1) @ p["b"]


def halting(p: Params, x: Tensor) -> Tensor:
    h, spent = x, torch.zeros(len(x), 1, dtype=x.dtype)
    for _ in range(3):
        spent = spent + h[:, :1].sigmoid()
        h = torch.where(spent < 1, torch.tanh(h @ p["a"]), h)
    return h @ p["b"]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def frozen(cell: type[nn.RNNBase], **options: Any) -> Any:
    torch.manual_seed(0)
    return cell(4, 4, **options).double().requires_grad_(False)


LSTM, GRU = frozen(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True), frozen(nn.GRU)

WHOLE: dict[str, Case] = {
    "rotary": (rotary, ATTENTION, SEQUENCES),
    "rotary, as long as the batch": (rotary, ATTENTION, SQUARE),
    "linear biases": (linear_biases, ATTENTION, SEQUENCES),
    "linear biases, as long as the batch": (linear_biases, ATTENTION, SQUARE),
    "biases merged with heads": (merged_biases, ATTENTION, SEQUENCES),
    "shifted windows": (windows, ATTENTION | weights(e=(2, 4)), IMAGES),
    "recurrent": (recurrent, AB | weights(u=(4, 4)), SEQUENCES),
    "recurrent, as long as the batch": (recurrent, AB | weights(u=(4, 4)), SQUARE),
    "recurrent over time first": (recurrent_over_time_first, AB | weights(u=(4, 4)), SQUARE),
    "frozen GRU over time first": (between(lambda h: GRU(h.transpose(0, 1))[0].transpose(0, 1)), AB, SQUARE),
    "frozen LSTM": (lambda p, x: LSTM(x @ p["a"])[0] @ p["b"], weights(a=(4, 4), b=(8, 2)), SQUARE),
    "frozen LSTM, last state": (
        lambda p, x: LSTM(x @ p["a"])[1][0].permute(1, 0, 2).flatten(1) @ p["b"], weights(a=(4, 4), b=(16, 2)), SQUARE,
    ),
    "temporal shift": (temporal_shift, AB, INPUTS["videos"]),
    "patches by unfold": (
        lambda p, x: (F.unfold(x, 3, stride=3).mT @ p["a"]).tanh().mean(1) @ p["b"], weights(a=(18, 4), b=(4, 2)),
        IMAGES,
    ),
    "patches by unfold twice": (
        lambda p, x: (x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).flatten(3) @ p["a"]).mean((1, 2)),
        weights(a=(18, 4)), IMAGES,
    ),
    "channels last": (
        lambda p, x: F.conv2d(x.to(memory_format=torch.channels_last), p["a"]).tanh().flatten(1) @ p["b"],
        weights(a=(4, 2, 3, 3), b=(64, 2)), IMAGES,
    ),
    "an image a channel": (
        lambda p, x: F.conv2d(
            F.conv2d(x, p["a"]).reshape(1, -1, 4, 4), x.new_ones(1, 1, 3, 3).repeat(len(x) * 4, 1, 1, 1),
            groups=len(x) * 4,
        ).view(len(x), -1) @ p["b"],
        weights(a=(4, 2, 3, 3), b=(16, 2)), IMAGES,
    ),
    "pixel shuffle": (
        lambda p, x: F.pixel_shuffle(F.conv2d(x, p["a"]), 2).flatten(1) @ p["b"], weights(a=(4, 2, 3, 3), b=(64, 2)),
        IMAGES,
    ),
    "filled": (filled, weights(a=(4, 4), b=(6, 2)), ROWS),
    "in place": (in_place, AB, ROWS),
    "padding mask": (padding_mask, AB, LENGTHS),
    "last token": (last_token, AB, LENGTHS),
    "last token gathered": (last_token_gathered, AB, LENGTHS),
    "positions counted by a mask": (
        lambda p, t: (F.embedding(t, p["e"]) + F.embedding((t.ne(0).int().cumsum(1) * t.ne(0)).long(), p["e"])).mean(1)
        @ p["b"],
        weights(e=(7, 4), b=(4, 2)), TOKENS,
    ),
    "halting": (halting, AB, ROWS),
    "class token": (
        lambda p, x: F.scaled_dot_product_attention(
            *[torch.cat([p["c"].expand(x.shape[0], -1, -1), x @ p["a"]], 1)] * 3)[:, 0] @ p["b"],
        AB | weights(c=(1, 1, 4)), SEQUENCES,
    ),
    "pairs, two calls": (
        lambda p, xy: (torch.tanh(xy[0] @ p["a"]) - torch.tanh(xy[1] @ p["a"])).abs() @ p["b"], AB, PAIR,
    ),
    "pairs, stacked": (
        lambda p, xy: torch.tanh(torch.stack(xy, 1).flatten(0, 1) @ p["a"]).unflatten(0, (-1, 2)).diff(dim=1)[:, 0]
        @ p["b"],
        AB, PAIR,
    ),
    "similarity of pairs": (
        lambda p, xy: (F.normalize(xy[0] @ p["a"]) * F.normalize(xy[1] @ p["b"])).sum(-1, keepdim=True),
        weights(a=(4, 3), b=(4, 3)), PAIR,
    ),
    "views of an example": (
        lambda p, x: torch.tanh(x.repeat_interleave(3, 0) @ p["a"]).view(len(x), 3, -1).mean(1) @ p["b"], AB, ROWS,
    ),
    "beams": (
        lambda p, x: (x[:, None].expand(-1, 3, -1).reshape(-1, 4) @ p["a"]).tanh().view(-1, 3, 4).mean(1) @ p["b"],
        AB, ROWS,
    ),
    "graphs of their own": (
        lambda p, batch: (batch["edges"] @ torch.tanh(batch["x"] @ p["a"])).mean(1) @ p["b"], AB,
        {"edges": (normal(7, N, N, N) > 0).double(), "x": SQUARE},
    ),
    "straight through": (lambda p, x: StraightThrough.apply(x @ p["a"]) @ p["b"], AB, ROWS),
    "a mean that is not used": (between(lambda h: h + 0 if h.mean(0).ndim else h), AB, ROWS),
    "all axes of one length": (
        lambda p, x: torch.tanh(x.transpose(0, 1) @ p["a"]).softmax(0).transpose(0, 1) @ p["b"],
        weights(a=(N, N), b=(N, N)), normal(8, N, N, N),
    ),
    "weights on the left": (lambda p, x: (p["b"].T @ torch.tanh(p["a"] @ x.T)).T, AB, ROWS),
}  # fmt: skip


# --- examples that depend on each other -----------------------------------------------------------------------------


def summed_into_a_buffer(p: Params, x: Tensor) -> Tensor:
    h, total = x @ p["a"], x.new_zeros(4)
    total += h.sum(0)
    return (h + total) @ p["b"]


def sum_written_out(p: Params, x: Tensor) -> Tensor:
    total = x.new_zeros(1, 4)
    torch.sum(x, 0, keepdim=True, out=total)
    return (x + total) @ p["a"] @ p["b"]


def centred_view(p: Params, x: Tensor) -> Tensor:
    h = (x @ p["a"]).clone()
    h[:, :2].sub_(h.mean(0)[:2])
    return h @ p["b"]


def neighbours(p: Params, x: Tensor) -> Tensor:
    h = torch.tanh(x @ p["a"])
    return h[torch.cdist(h, h).argsort(1)[:, 1]] @ p["b"]


def contrasted(p: Params, xy: tuple[Tensor, Tensor]) -> Tensor:
    z = F.normalize(torch.cat(xy) @ p["a"], dim=-1)
    return (z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -9.0).softmax(-1)[: len(xy[0]), :3]


SOURCE, TARGET = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2])
DEPENDENT: dict[str, Case] = {
    "summed into a buffer": (summed_into_a_buffer, AB, ROWS),
    "a sum written out": (sum_written_out, AB, ROWS),
    "a view centred in place": (centred_view, AB, ROWS),
    "inputs centred in place": (lambda p, x: x.sub_(x.mean(0)) @ p["a"] @ p["b"], AB, ROWS),
    "copied in another order": (
        lambda p, x: x.new_zeros(len(x), 4).copy_((x @ p["a"]).flip(0)) @ p["b"], AB, ROWS,
    ),
    "mixed with neighbours": (lambda p, x: (0.7 * x + 0.3 * x.roll(1, 0)) @ p["a"] @ p["b"], AB, ROWS),
    "mixed by a permutation": (
        lambda p, x: (0.7 * x[0] + 0.3 * x[0][x[1]]) @ p["a"] @ p["b"], AB, (ROWS, torch.tensor([1, 2, 3, 4, 0])),
    ),
    "a graph over examples": (
        lambda p, x: torch.zeros_like(x).index_add(0, TARGET, torch.tanh(x @ p["a"])[SOURCE]) @ p["b"], AB, ROWS,
    ),
    "nearest neighbours": (neighbours, AB, ROWS),
    "contrasted": (contrasted, weights(a=(4, 3)), PAIR),
    "similarity of all pairs": (
        lambda p, xy: F.normalize(xy[0] @ p["a"]) @ F.normalize(xy[1] @ p["b"]).T, weights(a=(4, 3), b=(4, 3)), PAIR,
    ),
    "attention between examples": (
        lambda p, x: F.scaled_dot_product_attention((x @ p["a"])[None], x[None], x[None])[0] @ p["b"], AB, ROWS,
    ),
    "one long sequence": (lambda p, x: (x @ p["a"]).reshape(1, -1).cumsum(1).view(x.shape) @ p["b"], AB, ROWS),
    "every other row of batches in a row": (
        lambda p, xy: (lambda z: z[::2] - z[1::2])(torch.tanh(torch.cat(xy) @ p["a"])) @ p["b"], AB, PAIR,
    ),
    "states of an LSTM, layers in front": (
        lambda p, x: LSTM(x @ p["a"])[1][0].reshape(len(x), -1) @ p["b"], weights(a=(4, 4), b=(16, 2)), SEQUENCES,
    ),
    "under activation checkpointing": (
        lambda p, x: checkpoint(lambda h: (h @ p["a"]) - (h @ p["a"]).mean(0), x, use_reentrant=False) @ p["b"],
        AB, ROWS,
    ),
    "all axes of one length": (
        lambda p, x: torch.tanh(x.transpose(0, 1) @ p["a"]).softmax(1).transpose(0, 1) @ p["b"],
        weights(a=(N, N), b=(N, N)), normal(8, N, N, N),
    ),
}  # fmt: skip


# --- batches in a row -----------------------------------------------------------------------------------------------


def embedded(p: Params, batches: Any) -> Tensor:
    return torch.tanh(torch.cat(batches) @ p["a"])


IN_A_ROW: dict[str, Case] = {
    "chunk": (lambda p, xy: torch.sub(*embedded(p, xy).chunk(2)) @ p["b"], AB, PAIR),
    "split": (lambda p, xy: torch.sub(*embedded(p, xy).split(len(xy[0]))) @ p["b"], AB, PAIR),
    "slices": (
        lambda p, xy: (embedded(p, xy)[: len(xy[0])] - embedded(p, xy)[len(xy[0]) :]) @ p["b"], AB, PAIR,
    ),
    "view": (lambda p, xy: embedded(p, xy).view(2, -1, 4).mean(0) @ p["b"], AB, PAIR),
    "triplets": (
        lambda p, xyz: torch.cat(embedded(p, xyz).tensor_split(3), 1) @ p["b"], weights(a=(4, 4), b=(12, 2)),
        (*PAIR, normal(9, N, 4)),
    ),
}  # fmt: skip


# --- what has no examples -------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[ModelFn, str]] = {
    "a loop over examples": (lambda p, x: torch.stack([row @ p["a"] for row in x]) @ p["b"], "piece by piece"),
    "a loop over hidden rows": (
        lambda p, x: torch.stack([row.tanh() for row in x @ p["a"]]) @ p["b"], "piece by piece",
    ),
    "a weight that is clamped": (lambda p, x: x @ p["a"].clamp_(-1, 1) @ p["b"], "'a' in place"),
    "a weight that is clamped by its data": (lambda p, x: x @ p["a"].data.clamp_(-1, 1) @ p["b"], "'a' in place"),
    "outputs transposed": (lambda p, x: (x @ p["a"] @ p["b"]).T, "first axis counts the examples"),
    "a loss instead of outputs": (lambda p, x: (x @ p["a"] @ p["b"]).sum(), "first axis counts the examples"),
}  # fmt: skip
