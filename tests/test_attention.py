"""Multi-head attention, class tokens and other things that transformers are made of."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import assert_exact, normal, problem
from torch import Tensor, nn

import curvlib as cv
from curvlib.layers.attention import multi_head_attention

L, S, N, E, HEADS = 3, 4, 2, 6, 2


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of torch's function for self-attention, changed as asked for."""
    x = normal(0, L, N, E)
    found = {
        "query": x, "key": x, "value": x, "embed_dim_to_check": E, "num_heads": HEADS,
        "in_proj_weight": normal(1, 3 * E, E), "in_proj_bias": normal(2, 3 * E), "bias_k": None, "bias_v": None,
        "add_zero_attn": False, "dropout_p": 0.0, "out_proj_weight": normal(3, E, E), "out_proj_bias": normal(4, E),
    }  # fmt: skip
    return {**found, **changes}


MEMORY = normal(5, S, N, E)
CAUSAL = torch.triu(torch.ones(L, L, dtype=torch.bool), 1)
CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "without bias": {"in_proj_bias": None, "out_proj_bias": None},
    "without weights": {"need_weights": False},
    "weights a head": {"average_attn_weights": False},
    "cross": {"key": MEMORY, "value": MEMORY},
    "three inputs": {"key": MEMORY, "value": MEMORY.flip(0)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal with weights": {"attn_mask": CAUSAL, "is_causal": True},
    "additive mask": {"attn_mask": normal(6, L, L), "need_weights": False},
    "mask a head": {"attn_mask": normal(7, N * HEADS, L, L)},
    "padding": {"key_padding_mask": torch.tensor([[False, False, True], [False, True, True]])},
    "padding and mask": {
        "key_padding_mask": torch.tensor([[False, False, True], [False, False, False]]),
        "attn_mask": CAUSAL, "need_weights": False,
    },
    "separate weights": {
        "use_separate_proj_weight": True, "in_proj_weight": None,
        "key": normal(8, S, N, 5), "value": normal(9, S, N, 4),
        "q_proj_weight": normal(10, E, E), "k_proj_weight": normal(11, E, 5), "v_proj_weight": normal(12, E, 4),
    },
    "unbatched": {name: normal(0, L, N, E)[:, 0] for name in ("query", "key", "value")},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_decomposition_computes_what_torch_computes(case: str) -> None:
    given = arguments(**CASES[case])
    expected, expected_weights = F.multi_head_attention_forward(**given)
    outputs, weights = multi_head_attention(**given)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-14)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-14)


def test_what_the_decomposition_lacks_is_refused() -> None:
    for change in ({"add_zero_attn": True}, {"bias_k": normal(1, 1, 1, E), "bias_v": normal(2, 1, 1, E)}):
        with pytest.raises(cv.errors.CaptureError, match="bias_k"):
            multi_head_attention(**arguments(**change))


class SelfAttention(nn.Module):
    """Attention whose examples come first."""

    def __init__(self, *, bias: bool, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, bias=bias, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y = self.attention(x, x, x)[0]
        return y if self.attention.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_projections_of_self_attention_are_one_block(bias: bool, batch_first: bool, training: bool) -> None:
    net = SelfAttention(bias=bias, batch_first=batch_first).train(training)
    case = problem(net, normal(0, N, L, E), "mse", "mean")
    curv = case.kfac()
    name = "attention.in_proj_weight"
    assert [block for block in curv.blocks if block.startswith("attention.in_proj")] == [name]
    assert curv.blocks[name].shape == (3 * E, E + bias)


class Encoder(nn.Module):
    """A class token in front of a transformer encoder with learned positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(positions + 1, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("training", [True, False])
def test_class_token_positions_and_norms_are_exact_in_a_transformer_encoder(training: bool, engine: str) -> None:
    case = problem(Encoder(2).train(training), normal(1, 3, 2, 4), "cross-entropy", "mean")
    exact, curv = case.ggn(), case.kfac(engine=engine, elementwise="dense")
    for name in ("token", "positions", "encoder.layers.0.norm1.weight", "encoder.layers.0.norm2.weight"):
        parameters = [name, name.replace("weight", "bias")] if name.endswith("weight") else [name]
        truth = reference.block(exact, case.params, *parameters)
        assert reference.relative_error(curv.blocks[name].to_dense(), truth) <= 1e-10


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_to_one_position_is_exact_for_one_example(batch_first: bool) -> None:
    class OnePosition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(1 if batch_first else 0)
            return self.head(self.attention(x, x, x)[0].flatten(-2) if batch_first else self.attention(x, x, x)[0][0])

    case = problem(OnePosition(), normal(1, 1, 4), "cross-entropy", "mean")
    labels = reference.block_labels(case.params)
    size = sum(leaf.numel() for leaf in case.params.values())
    for kind in ("weight", "bias"):  # two layers, whose names have the same stem
        labels[f"attention.in_proj_{kind}"].fill_(10 * size)
        labels[f"attention.out_proj.{kind}"].fill_(11 * size)
    assert_exact(case.kfac(), reference.block_diagonal(case.ggn(), labels))


def test_ekfac_is_right_where_examples_are_the_second_axis() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=False)

    def build(first: bool) -> cv.BlockDiagonal:
        module = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=first)
        module.load_state_dict(layer.state_dict())
        model_fn, params = cv.functional(module.double())

        def pooled(p: Any, x: Tensor) -> Tensor:
            out = model_fn(p, x if first else x.transpose(0, 1))
            return out.mean(1 if first else 0)[:, :2]

        batch = (normal(1, 5, 3, 4), torch.tensor([0, 1, 1, 0, 1]))
        return cv.ekfac(pooled, params, batch, fisher="type-2")

    torch.testing.assert_close(build(True).to_dense(), build(False).to_dense(), rtol=1e-9, atol=1e-12)


def test_examples_that_are_flattened_behind_positions_are_refused() -> None:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(-1, 4) @ p["w"]  # [T N, 2]
        return rows.reshape(3, -1, 2).transpose(0, 1)

    with pytest.raises(cv.errors.CaptureError, match=r"'reshape' flattened the axis of examples behind"):
        cv.plan(model_fn, {"w": normal(0, 4, 2)}, normal(1, 5, 3, 4))


@pytest.mark.parametrize("spread", ["expand", "repeat", "broadcast_to", "expand_as"])
def test_a_parameter_that_every_example_gets_a_copy_of_is_exact(spread: str) -> None:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        token = p["t"]
        copies = {
            "expand": lambda: token.expand(len(x), 3), "repeat": lambda: token.repeat(len(x), 1),
            "broadcast_to": lambda: torch.broadcast_to(token, (len(x), 3)), "expand_as": lambda: token.expand_as(x),
        }[spread]()  # fmt: skip
        return torch.tanh(torch.cat([copies, x], 1)) @ p["w"]

    case = problem(
        model_fn, normal(1, 5, 3), "cross-entropy", "mean", params={"t": torch.zeros(3), "w": torch.zeros(6, 2)}
    )
    exact = reference.block(case.ggn(), case.params, "t")
    for engine in ("functional", "autograd"):
        found = case.kfac(elementwise="dense", engine=engine).blocks["t"].to_dense()
        assert reference.relative_error(found, exact) <= 1e-10
