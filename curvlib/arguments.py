"""What the likeliest first mistakes are told, at the door of every function that takes a model and its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvlib.errors import ArgumentError, DeviceError, PytreeError
from curvlib.functional import Functional
from curvlib.pytree import Domain, Tree, flatten, names

WRITE = "write model_fn, params = cv.functional(module)"


def check_model(model_fn: Any, params: Tree, *, valued: bool = True) -> None:
    """Refuses what is no function (params, inputs) -> outputs, and parameters that are no pytree of tensors.

    Raises:
        ArgumentError: a module or something else in place of the function, or the two in the wrong order.
        PytreeError, DtypeError: not a pytree of floating-point tensors.
        DeviceError: parameters live on several devices, or on the meta device and ``valued`` ones are needed.
    """
    if isinstance(model_fn, torch.jit.ScriptFunction):
        raise ArgumentError("model_fn is a scripted function, whose calls cannot be seen: give the Python function")
    if isinstance(model_fn, nn.Module) or (isinstance(model_fn, type) and issubclass(model_fn, nn.Module)):
        name = model_fn.__name__ if isinstance(model_fn, type) else type(model_fn).__name__
        raise ArgumentError(f"model_fn is a module, {name}, not a function (params, inputs) -> outputs: {WRITE}")
    if not callable(model_fn):
        swapped = callable(params) and not isinstance(params, nn.Module)
        advice = "the first two arguments are swapped" if swapped else WRITE
        raise ArgumentError(
            f"model_fn must be a function (params, inputs) -> outputs, got a {type(model_fn).__name__}: {advice}"
        )
    if isinstance(model_fn, Functional):
        model_fn.check(params)
    check_params(params, valued=valued)


def check_params(params: Tree, *, valued: bool = True) -> None:
    """Refuses parameters that are no pytree of tensors on one device, with values."""
    if is_module_or_iterator(params):
        raise PytreeError(
            f"params is a {type(params).__name__}, not a pytree of tensors (module.parameters() and "
            f"module.named_parameters() are none either): {WRITE}, or dict(module.named_parameters())"
        )
    leaves = flatten(params)[0]
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.dtype.is_floating_point for leaf in leaves):
        Domain.of(params)  # names the leaf
    if len({leaf.device for leaf in leaves}) > 1:
        devices = {name: str(leaf.device) for name, leaf in zip(names(params), leaves, strict=True)}
        raise DeviceError(f"parameters live on different devices: {devices}; move them to one")
    if valued and leaves[0].device.type == "meta":
        raise DeviceError(
            f"parameter {names(params)[0]!r} is on the meta device and has no values: give the module memory by "
            "module.to_empty(device=...), and load its weights"
        )


def check_grads(grads: Tree) -> None:
    """Refuses gradients that are no pytree of tensors.

    Raises:
        PytreeError, DtypeError: names the leaf.
    """
    if is_module_or_iterator(grads):
        raise PytreeError(
            f"grads is a {type(grads).__name__}, not a pytree of tensors: write "
            "{name: p.grad for name, p in module.named_parameters()}, or use torch.func.grad"
        )
    Domain.of(grads)


def is_module_or_iterator(tree: Any) -> bool:
    """Whether something holds parameters, but is no pytree."""
    return isinstance(tree, nn.Module) or hasattr(tree, "__next__")
