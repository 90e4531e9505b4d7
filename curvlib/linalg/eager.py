"""Whether code runs eagerly, outside of every transform and trace."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def is_eager() -> bool:
    """Whether no `torch.func` transform, dispatch mode, proxy trace or compilation is active.

    Only then may a value be looked at, a result remembered, or a buffer written in place.

    Example:
        >>> is_eager()
        True
        >>> torch.func.vmap(lambda x: x * is_eager())(torch.ones(2))
        tensor([0., 0.])
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and not _get_current_dispatch_mode_stack()
        and not torch.compiler.is_compiling()
    )


def may_look_at(tensor: Tensor) -> bool:
    """Whether a tensor's values may decide what is done: eagerly, and without waiting for a device.

    Example:
        >>> may_look_at(torch.ones(2))
        True
        >>> torch.func.vmap(lambda x: x * may_look_at(x))(torch.ones(2))
        tensor([0., 0.])
    """
    return is_eager() and tensor.device.type == "cpu"
