"""Entries of the layer table for products with one weight: linear, matmul, addmm, einsum."""

from __future__ import annotations

import string
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.layers.contraction import bias_shift, contract
from curvlib.layers.table import Inspection, Use, entry
from curvlib.operators.layout import Region

Labels = Sequence[Hashable]


def product(
    call: Inspection,
    operands: Sequence[tuple[str, Tensor, Labels]],
    output: Labels,
    bias: Region | None = None,
    bias_labels: Labels = ("o",),
) -> Use | None:
    """The use that a product of two operands is, one of which may be a parameter."""
    (left, right) = operands
    regions = [call.region(tensor) for _, tensor, _ in operands]
    if regions[0] is not None and regions[1] is not None:
        raise CaptureError(
            "a product of two parameters is not understood: form it outside of model_fn, or close over one of them"
        )
    batch_label = output[call.batch]
    if regions[0] is None and regions[1] is None:
        if bias is None:
            return None
        features = tuple(output.index(label) for label in bias_labels)
        return Use(bias_shift(bias, call.axes(features)))
    weight, (_, _, weight_labels) = (regions[0], left) if regions[0] is not None else (regions[1], right)
    name, _, input_labels = right if regions[0] is not None else left
    assert weight is not None
    return Use(contract(weight, bias, input_labels, weight_labels, output, batch_label), name)


def leading(tensor: Tensor, count: int) -> tuple[int, ...]:
    """Labels of all axes but the last ``count``: their distance from those, so that broadcasting aligns them."""
    return tuple(range(count - tensor.ndim, 0))


@entry(F.linear)
def linear(call: Inspection, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    out: tuple[str, ...] = ("o",) if weight.ndim == 2 else ()
    x = ("input", input, (*leading(input, 1), "i"))
    w = ("weight", weight, (*out, "i"))
    return product(call, (x, w), (*leading(call.output, len(out)), *out), call.region(bias), out)


@entry(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.mv, Tensor.mv)
def matmul(call: Inspection, input: Tensor, other: Tensor) -> Use | None:
    rows: tuple[str, ...] = ("m",) if input.ndim > 1 else ()
    columns: tuple[str, ...] = ("n",) if other.ndim > 1 else ()
    left = ("input", input, (*leading(input, len(rows) + 1), *rows, "k"))
    right = ("other", other, (*leading(other, len(columns) + 1), "k", *columns))
    output = (*leading(call.output, len(rows) + len(columns)), *rows, *columns)
    return product(call, (left, right), output)


@entry(Tensor.__rmatmul__)
def rmatmul(call: Inspection, input: Tensor, other: Tensor) -> Use | None:
    use = matmul(call, other, input)
    if use is None:
        return None
    return Use(use.layer, "input" if use.operand == "other" else "other")


@entry(torch.addmm, Tensor.addmm)
def addmm(
    call: Inspection, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Use | None:
    bias = call.region(input)
    if (beta, alpha) != (1, 1):
        raise CaptureError("addmm with beta or alpha other than 1 is not understood: scale the data before the call")
    if bias is not None and bias.numel != bias.shape[-1]:
        raise CaptureError(
            "addmm with a parameter that is a matrix as its first argument is not understood: use matmul and add"
        )
    left, right = ("mat1", mat1, ("m", "k")), ("mat2", mat2, ("k", "n"))
    output = (*leading(call.output, 2), "m", "n")
    if bias is not None and call.region(mat1) is not None:
        raise CaptureError("addmm with a weight on the left and a bias is not understood: use matmul and add")
    bias_labels = ("n",) if bias is None or bias.numel > 1 or call.output.shape[-1] == 1 else ()
    return product(call, (left, right), output, bias, bias_labels)


def einsum_labels(equation: str, operands: Sequence[Tensor]) -> tuple[list[list[Hashable]], list[Hashable]]:
    """Axis labels of each operand and of the output; an ellipsis stands for axes counted from the right."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")

    def expand(term: str, dots: int) -> list[Hashable]:
        before, ellipsis, after = term.partition("...")
        return [*before, *(range(-dots, 0) if ellipsis else ()), *after]

    dots = [tensor.ndim - len(term.replace("...", "")) for term, tensor in zip(terms, operands, strict=True)]
    inputs = [expand(term, n) for term, n in zip(terms, dots, strict=True)]
    if not arrow:
        letters = [c for c in string.ascii_letters if left.count(c) == 1]
        right = ("..." if "..." in left else "") + "".join(sorted(letters))
    return inputs, expand(right, max((n for term, n in zip(terms, dots, strict=True) if "..." in term), default=0))


def first_operand(arguments: Any) -> Tensor:
    """The first of einsum's operands, given one by one or as a list."""
    operands = arguments["operands"]
    operand: Tensor = operands[0][0] if isinstance(operands[0], (list, tuple)) else operands[0]
    return operand


def second_operand(arguments: Any) -> Tensor:
    """The second of einsum's operands, given one by one or as a list."""
    operands = arguments["operands"]
    operand: Tensor = operands[0][1] if isinstance(operands[0], (list, tuple)) else operands[1]
    return operand


@entry(torch.einsum)
def einsum(call: Inspection, equation: str, *operands: Any) -> Use | None:
    tensors = list(operands[0]) if isinstance(operands[0], (list, tuple)) else list(operands)
    if all(call.region(tensor) is None for tensor in tensors):
        return None
    if len(tensors) != 2:
        raise CaptureError(f"einsum({equation!r}) of {len(tensors)} operands, one of them a parameter: use two")
    (a, b), output = einsum_labels(equation, tensors)
    output = [*(("new", i) for i in range(call.output.ndim - len(output))), *output]
    use = product(call, (("first", tensors[0], a), ("second", tensors[1], b)), output)
    assert use is not None
    return Use(use.layer, first_operand if use.operand == "first" else second_operand)
