"""Whether code runs eagerly, outside of every transform and trace, and surroundings that let it be differentiated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from curvlib import containers

Function = TypeVar("Function", bound=Callable[..., Any])


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


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Records gradients inside, wherever it is called: under `torch.no_grad` and `torch.inference_mode` too.

    Tensors that were made in inference mode take part once they are `ordinary`.

    Example:
        >>> with torch.inference_mode():
        ...     w = torch.ones(2)
        ...     with differentiable():
        ...         gradient = torch.func.grad(lambda w: w.square().sum())(ordinary(w))
        >>> gradient
        tensor([2., 2.])
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        with torch.enable_grad():
            yield
    else:
        with torch.inference_mode(False), torch.enable_grad():
            yield


def ordinary(tree: Any) -> Any:
    """A pytree with copies of the tensors that were made in inference mode, through which no gradient can be taken.

    Example:
        >>> with torch.inference_mode():
        ...     made_there = torch.ones(2)
        >>> made_there.is_inference(), ordinary({"w": made_there})["w"].is_inference()
        (True, False)
    """
    if isinstance(tree, Tensor):
        if torch.compiler.is_compiling() or not tree.is_inference():
            return tree
        with torch.inference_mode(False):
            return tree.detach().clone()
    return containers.map_tensors(ordinary, tree)


def own_draws(leaves: list[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Leaves torch's generators as they are, whatever a model draws; under a transform they cannot be set back."""
    if not is_eager():
        return contextlib.nullcontext()
    devices = {leaf.device.index or 0 for leaf in leaves if leaf.device.type == "cuda"}
    return torch.random.fork_rng(devices)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Runs what `torch.compile` has compiled as it was written: compiled code takes part in no transform or mode.

    Example:
        >>> double = torch.compile(lambda x: 2 * x)
        >>> with uncompiled():
        ...     torch.func.jvp(double, (torch.ones(2),), (torch.ones(2),))[1]
        tensor([2., 2.])
    """
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:  # it compiles
        yield
        return
    stance: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    with contextlib.suppress(RuntimeError):  # in what torch.compile runs between two graphs, it may not be changed
        stance = torch.compiler.set_stance("force_eager")
    with stance:
        yield


def constant_when_compiled(function: Function) -> Function:
    """A function whose result a compiler takes for a constant, because it cannot trace the call.

    `torch.compiler.assume_constant_result` does the same, and imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
