"""From a module to a pure function of its parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Set
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvlib.errors import ArgumentError, PytreeError
from curvlib.linalg.eager import ordinary, uncompiled

WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@dataclasses.dataclass(frozen=True)
class Functional:
    """A module as a function of its parameters; equal to another one of the same module. It pickles if the module does.

    Attributes:
        module: whose frozen parameters and buffers are closed over.
        output: which of the module's outputs is returned; None: what the module returns.
        keywords: the mappings that are passed as keyword arguments.
        names: of the module's parameters.
    """

    module: nn.Module
    output: str | int | None
    keywords: Keywords
    names: frozenset[str] = dataclasses.field(compare=False, repr=False)

    def __call__(self, params: Mapping[str, Tensor], inputs: Any) -> Any:
        """The module's output for these parameters and inputs."""
        self.check(params)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        own = {}
        if not torch.compiler.is_compiling():
            own = {name: ordinary(p) for name, p in self.module.named_parameters() if p.is_inference()}
        unpacked = isinstance(inputs, Mapping) and self.keywords.meant_by(inputs.keys())
        args, kwargs = ((), dict(inputs)) if unpacked else ((inputs,), {})
        compiled = any(hasattr(x, "_orig_mod") or x._compiled_call_impl is not None for x in self.module.modules())
        with uncompiled() if compiled else contextlib.nullcontext():
            outputs = torch.func.functional_call(self.module, {**buffers, **own, **params}, args, kwargs)
        return outputs if self.output is None else chosen(outputs, self.output)

    def check(self, params: Any) -> None:
        """Refuses what is not a dictionary of some of the module's parameters.

        Raises:
            PytreeError: another container, or a name of something else.
        """
        if not (isinstance(params, Mapping) and params.keys() <= self.names):
            raise PytreeError(
                f"{misnamed(self.module, params)}; take params from model_fn, params = cv.functional(module)"
            )


@dataclasses.dataclass(frozen=True)
class Keywords:
    """Which mappings are passed as keyword arguments.

    Attributes:
        always: all, or none; None: those that have the names of arguments.
        names: of arguments.
        others: whether other names are taken as well.
    """

    always: bool | None
    names: frozenset[str] = frozenset()
    others: bool = False

    @classmethod
    def of(cls, forward: Callable[..., Any], *, several_outputs: bool) -> Keywords:
        """By the arguments of ``forward``.

        One that has a single argument, or any, takes a mapping as that argument, unless it has several outputs, as the
        models have that take keywords.
        """
        parameters = inspect.signature(forward).parameters.values()
        named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        names = frozenset(p.name for p in parameters if p.kind in named)
        others = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        if others and not names:
            return cls(several_outputs)
        return cls(False) if len(names) == 1 and not others and not several_outputs else cls(None, names, others)

    def meant_by(self, keys: Set[str]) -> bool:
        """Whether a mapping with these keys is passed as keyword arguments."""
        if self.always is not None:
            return self.always
        return bool(keys & self.names) and (self.others or keys <= self.names)


def functional(
    module: nn.Module, *, output: str | int | None = None, keywords: bool | None = None
) -> tuple[Callable[[dict[str, Tensor], Any], Any], dict[str, Tensor]]:
    """A module as a pure function and its parameters.

    The parameters are detached but not copied. Tied parameters appear once. Frozen parameters (those that do not
    require a gradient) and buffers are closed over; a call that would change buffers (batch norm in training mode)
    changes copies. A compiled module (`torch.compile`, ``module.compile()``) runs as it was written, and so do its
    compiled parts.

    A Hugging Face model takes keyword arguments and returns several things. With ``output="logits"`` a batch is
    ``(encoding, labels)``, the encoding being what the tokenizer returned.

    Args:
        module: any module whose ``forward`` takes one argument, which may be a pytree, or keyword arguments.
        output: the key, attribute or number of what is meant, where the module returns more than one tensor.
        keywords: whether a mapping is passed as keyword arguments, ``module(**inputs)``, or as the one argument. None:
            as keyword arguments if ``forward`` has arguments of these names; but a ``forward`` with a single argument
            gets the mapping itself, unless ``output`` is given.

    Returns:
        model_fn: f(params, inputs) -> module(inputs) with these parameters; those left out are the module's own.
        params: dictionary of tensors by qualified name.

    Raises:
        ArgumentError: no module, or one that cannot be called with other parameters: a wrapper that copies or shards
            it, a scripted, quantized or lazy one; says what to give in its place.
        PytreeError: every parameter is frozen.

    Example:
        >>> model_fn, params = functional(nn.Linear(3, 2))
        >>> model_fn(params, torch.zeros(5, 3)).shape
        torch.Size([5, 2])
        >>> model_fn, params = functional(nn.LSTM(3, 2, batch_first=True), output=0)  # the outputs, not the state
        >>> model_fn(params, torch.zeros(5, 7, 3)).shape
        torch.Size([5, 7, 2])
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    check_module(module)
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise PytreeError(
            "no parameter of the module requires a gradient: nothing is left to take curvature in; thaw some, as "
            "module.requires_grad_() does with all"
        )
    how = Keywords(keywords)
    if keywords is None:
        how = Keywords.of(module.forward, several_outputs=output is not None)
    return Functional(module, output, how, frozenset(name for name, _ in module.named_parameters())), params


def chosen(outputs: Any, key: str | int) -> Any:
    """One of several outputs.

    Raises:
        ArgumentError: there is none of this name or number; lists those there are.
    """
    if isinstance(outputs, Tensor):
        raise ArgumentError(f"the module returns one tensor: leave out output={key!r}")
    try:
        return outputs[key] if isinstance(outputs, Mapping) or isinstance(key, int) else getattr(outputs, key)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ArgumentError(f"the module returns no output {key!r}; it returns {several(outputs)}") from error


def several(outputs: Any) -> str:
    """What a module returns in place of one tensor, for messages."""
    if isinstance(outputs, Mapping):
        return f"a {type(outputs).__name__} of {', '.join(map(repr, outputs))}"
    if isinstance(outputs, (tuple, list)):
        return f"a {type(outputs).__name__} of {len(outputs)}"
    return f"a {type(outputs).__name__}"


def one_of_several(outputs: Any) -> str:
    """What to do where a model does not return one tensor, for messages."""
    return (
        f"model_fn must return one tensor [N, ...], not {several(outputs)}: choose one by "
        "cv.functional(module, output='logits') (a key, an attribute or a number), or in a model_fn of your own"
    )


# --- what is refused ----------------------------------------------------------------------------------------------


def misnamed(module: nn.Module, params: Any) -> str:
    """What is wrong with parameters that are not a dictionary of some of the module's."""
    if not isinstance(params, Mapping):
        return f"params must be a dictionary of tensors by name, got a {type(params).__name__}"
    names = {name for name, _ in module.named_parameters()}
    name = min(map(str, params.keys() - names), default="")
    if name in dict(module.named_buffers()):
        return f"params[{name!r}] is a buffer, no parameter (module.state_dict() has both)"
    if name in dict(module.named_parameters(remove_duplicate=False)):
        return f"params[{name!r}] is tied to a parameter that goes by another name"
    return f"params[{name!r}] is none of the module's parameters"


def check_module(module: Any) -> None:
    """Refuses what is no module, and modules that cannot be called with other parameters.

    Raises:
        ArgumentError: says what to give in its place.
    """
    if not isinstance(module, nn.Module):
        what = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        advice = "make an instance first" if isinstance(module, type) else "a function (params, inputs) is a model_fn"
        raise ArgumentError(f"cv.functional takes a module (nn.Module), got {what}; {advice}")
    for path, part in module.named_modules():
        here = f"module.{path}" if path else "module"
        kind = type(part).__name__
        if any(base.__name__ in WRAPPERS and base.__module__.startswith("torch.") for base in type(part).__mro__):
            raise ArgumentError(
                f"{here} is a {kind}, which copies or shards its parameters: give the module inside, {here}.module"
                + (", with whole parameters" if kind.startswith("Fully") else "")
            )
        if isinstance(part, torch.jit.ScriptModule) and any(True for _ in part.parameters()):
            raise ArgumentError(
                f"{here} is scripted or traced (a {kind}): how it uses its parameters cannot be seen; give the module "
                "that it was made of"
            )
        if ".quantized." in type(part).__module__ and type(part).__module__.startswith("torch."):
            raise ArgumentError(
                f"{here} is quantized (a {kind}) and has no gradients: give the module as it was before quantization"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ArgumentError(
                f"{name!r} of the module is not initialized: a lazy module must run once before, module(inputs)"
            )
