"""Multi-head attention as the products it is made of, so that each of its projections is seen.

`torch.nn.functional.multi_head_attention_forward` is one call to those who watch calls. It is replaced by this
decomposition, which computes the same and keeps the axis of examples apart from that of positions throughout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.layers.table import rewrite


@rewrite(F.multi_head_attention_forward)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The function of the same arguments in `torch.nn.functional`: [L, N, E] -> [L, N, E] and weights."""
    if bias_k is not None or bias_v is not None or static_k is not None or static_v is not None or add_zero_attn:
        raise CaptureError(
            "multi-head attention with bias_k, bias_v, static keys or add_zero_attn is not understood: make the module "
            "without add_bias_kv and add_zero_attn, or write it with linear and scaled_dot_product_attention"
        )
    batched = query.ndim == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        assert q_proj_weight is not None
        assert k_proj_weight is not None
        assert v_proj_weight is not None
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias)
            for x, weight, bias in zip(
                (query, key, value), (q_proj_weight, k_proj_weight, v_proj_weight), biases, strict=True
            )
        )
    else:
        assert in_proj_weight is not None
        q, k, v = packed_projection(query, key, value, in_proj_weight, in_proj_bias)

    def heads(x: Tensor) -> Tensor:
        """[L, N, E] -> [N, heads, L, E / heads]."""
        return x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)

    q, k, v = heads(q), heads(k), heads(v)
    mask = None if is_causal and key_padding_mask is None and not need_weights else attention_mask(attn_mask, q)
    is_causal = is_causal and mask is None
    if key_padding_mask is not None:
        padding = attention_mask(key_padding_mask, q)
        assert padding is not None
        padding = padding[:, None, None, :]
        mask = padding if mask is None else mask + padding
    dropout_p = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
        attended = weights @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
    outputs = F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        outputs, weights = outputs.squeeze(1), None if weights is None else weights.squeeze(0)
    return outputs, weights


def packed_projection(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Queries, keys and values by one weight [3 E, E]: in as few products as inputs differ."""
    if query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    width = query.shape[-1]
    first, others = weight.split([width, 2 * width])
    bias_first, bias_others = (None, None) if bias is None else bias.split([width, 2 * width])
    queries = F.linear(query, first, bias_first)
    if key is value:
        return (queries, *F.linear(key, others, bias_others).chunk(2, -1))
    biases = (None, None) if bias_others is None else bias_others.chunk(2)
    weights = others.chunk(2)
    return queries, F.linear(key, weights[0], biases[0]), F.linear(value, weights[1], biases[1])


def attention_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores [N, heads, L, S]: minus infinity where a mask of booleans says so."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    return mask.unflatten(0, like.shape[:2]) if mask.ndim == 3 else mask
