"""Entries of the layer table for elementwise scale and shift: sums, products, norm layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.layers.base import VARIES, Arguments
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.table import Inspection, Operand, Use, entry
from curvlib.operators.layout import Region


def broadcast(
    call: Inspection, scale: Region | None, shift: Region | None, operand: Operand = None, sign: int = 1
) -> Use | None:
    """Y = scale * x + shift, where a parameter is broadcast against the output as torch does: from the right."""
    present = [region for region in (scale, shift) if region is not None]
    if not present:
        return None
    shape = present[0].shape
    offset = call.output.ndim - len(shape)
    features = tuple(offset + i for i, n in enumerate(shape) if n > 1)
    if call.batch in features:
        raise CaptureError(VARIES)
    return affine(call, scale, shift, features, operand, sign)


def affine(
    call: Inspection,
    scale: Region | None,
    shift: Region | None,
    features: tuple[int, ...],
    operand: Operand,
    sign: int = 1,
) -> Use | None:
    """Y = scale * x + shift along these axes of the output."""
    if scale is None and shift is None:
        return None
    flat = [None if region is None else region.reshape(region.numel) for region in (scale, shift)]
    return Use(Elementwise(call.axes(features), flat[0], flat[1], sign), operand if scale is not None else None)


def one_of(call: Inspection, input: object, other: object) -> tuple[Region | None, str]:
    """The parameter among two operands, and the name of the other one."""
    left, right = call.region(input), call.region(other)
    if left is not None and right is not None:
        raise CaptureError(
            "both operands are parameters, which is not understood: combine them outside of model_fn, or close over one"
        )
    return (left, "other") if left is not None else (right, "input")


@entry(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat, torch.tile, Tensor.tile)
def expand(call: Inspection, input: Tensor, *sizes: object) -> Use | None:
    return broadcast(call, None, call.region(input))


@entry(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(call: Inspection, input: Tensor, other: Tensor, *, alpha: float = 1) -> Use | None:
    region, _ = one_of(call, input, other)
    if region is not None and alpha != 1:
        raise CaptureError("add with alpha other than 1 is not understood: scale the data before the call")
    return broadcast(call, None, region)


@entry(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__)
def sub(call: Inspection, input: Tensor, other: Tensor, *, alpha: float = 1) -> Use | None:
    region, data = one_of(call, input, other)
    if region is not None and alpha != 1:
        raise CaptureError("sub with alpha other than 1 is not understood: scale the data before the call")
    return broadcast(call, None, region, sign=-1 if data == "input" else 1)


@entry(Tensor.__rsub__)
def rsub(call: Inspection, input: Tensor, other: Tensor) -> Use | None:
    region, data = one_of(call, input, other)
    return broadcast(call, None, region, sign=1 if data == "input" else -1)


def other_operand(arguments: Arguments) -> Tensor:
    """The second factor as a tensor."""
    return torch.as_tensor(arguments["other"])


@entry(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def mul(call: Inspection, input: Tensor, other: Tensor) -> Use | None:
    region, data = one_of(call, input, other)
    return broadcast(call, region, None, other_operand if data == "other" else data)


def layer_normalized(arguments: Arguments) -> Tensor:
    """The input of a layer norm, normalized, before scale and shift."""
    return F.layer_norm(arguments["input"], arguments["normalized_shape"], eps=arguments.get("eps", 1e-5))


@entry(F.layer_norm)
def layer_norm(
    call: Inspection,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Use | None:
    return broadcast(call, call.region(weight), call.region(bias), layer_normalized)


def rms_normalized(arguments: Arguments) -> Tensor:
    """The input of an RMS norm, normalized, before the scale."""
    return F.rms_norm(arguments["input"], arguments["normalized_shape"], eps=arguments.get("eps"))


@entry(F.rms_norm)
def rms_norm(
    call: Inspection,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Use | None:
    return broadcast(call, call.region(weight), None, rms_normalized)


def channels(call: Inspection, weight: object, bias: object, normalized: Callable[[Arguments], Tensor]) -> Use | None:
    """Scale and shift of a norm whose parameters vary along axis 1."""
    if call.output.ndim > 1 and call.batch == 0:
        return affine(call, call.region(weight), call.region(bias), (1,), normalized)
    if call.region(weight) is None and call.region(bias) is None:
        return None
    raise CaptureError(
        "a norm over channels needs an input whose first axis counts the examples: transpose it before the call"
    )


def group_normalized(arguments: Arguments) -> Tensor:
    """The input of a group norm, normalized, before scale and shift."""
    return F.group_norm(arguments["input"], arguments["num_groups"], eps=arguments.get("eps", 1e-5))


@entry(F.group_norm)
def group_norm(
    call: Inspection,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Use | None:
    return channels(call, weight, bias, group_normalized)


def batch_normalized(arguments: Arguments) -> Tensor:
    """The input of a batch norm in evaluation mode, normalized, before scale and shift."""
    return F.batch_norm(
        arguments["input"], arguments["running_mean"], arguments["running_var"], eps=arguments.get("eps", 1e-5)
    )


@entry(F.batch_norm)
def batch_norm(
    call: Inspection,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use | None:
    if training:
        raise CaptureError(
            "batch_norm in training mode makes the examples of a batch depend on each other, and the curvature of "
            "one example is not defined: call module.eval() first"
        )
    return channels(call, weight, bias, batch_normalized)


def instance_normalized(arguments: Arguments) -> Tensor:
    """The input of an instance norm, normalized, before scale and shift."""
    eps = arguments.get("eps", 1e-5)
    if arguments.get("use_input_stats", True):
        return F.instance_norm(arguments["input"], eps=eps)
    running = {name: arguments[name] for name in ("running_mean", "running_var")}
    return F.instance_norm(arguments["input"], **running, use_input_stats=False, eps=eps)


@entry(F.instance_norm)
def instance_norm(
    call: Inspection,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use | None:
    return channels(call, weight, bias, instance_normalized)
