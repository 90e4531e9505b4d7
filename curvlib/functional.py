"""From a module to a pure function of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.errors import PytreeError
from curvlib.linalg.eager import ordinary, uncompiled


def functional(module: nn.Module) -> tuple[Callable[[dict[str, Tensor], Any], Any], dict[str, Tensor]]:
    """A module as a pure function and its parameters.

    The parameters are detached but not copied. Tied parameters appear once. Frozen parameters (those that do not
    require a gradient) and buffers are closed over; a call that would change buffers (batch norm in training mode)
    changes copies. A compiled module (`torch.compile`, ``module.compile()``) runs as it was written, and so do its
    compiled parts.

    Args:
        module: any module whose ``forward`` takes one argument; it may be a pytree.

    Returns:
        model_fn: f(params, inputs) -> module(inputs) with these parameters.
        params: dictionary of tensors by qualified name.

    Raises:
        PytreeError: every parameter is frozen.

    Example:
        >>> model_fn, params = functional(nn.Linear(3, 2))
        >>> model_fn(params, torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise PytreeError("no parameter of the module requires a gradient: nothing is left to take curvature in")
    frozen = {name: ordinary(p) for name, p in module.named_parameters() if p.is_inference() and not p.requires_grad}

    def model_fn(params: dict[str, Tensor], inputs: Any) -> Any:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with uncompiled():
            return torch.func.functional_call(module, {**buffers, **frozen, **params}, (inputs,))

    return model_fn, params
