"""Options of a transformation as tensors in its state, where schedules and the host change them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.eager import may_look_at
from curvlib.optim.transformation import GradientTransformation, State, first_step, own_state
from curvlib.pytree import Tree, register, tree_map


@register
class InjectHyperparamsState:
    """The options that may change, and the state of the transformation.

    Args:
        count: number of steps, 0-d int64 on the CPU.
        hyperparams: 0-d float64 tensors on the CPU, or tuples of them, by the names of the options.
        inner: of the transformation.
    """

    count: Tensor
    hyperparams: dict[str, Any]
    inner: State

    def replace(self, **values: Any) -> InjectHyperparamsState:
        """The same state with other values of some options, which hold from the next step on.

        Raises:
            ArgumentError: there is no option of this name.
        """
        unknown = sorted(values.keys() - self.hyperparams.keys())
        if unknown:
            raise ArgumentError(f"there is no option {unknown[0]!r}; there are {', '.join(self.hyperparams)}")
        changed = {name: as_tensors(value) for name, value in values.items()}
        return InjectHyperparamsState(self.count, {**self.hyperparams, **changed}, self.inner)


def inject_hyperparams(
    inner_factory: Callable[..., GradientTransformation], static_args: str | Iterable[str] = ()
) -> Callable[..., GradientTransformation]:
    """A function that makes the same transformations, with options that may change from step to step.

    Step t = 0, 1, ... is one of inner_factory(theta_t). An option that is given as a float, or a tuple of floats, is a
    tensor in the state, theta_(t+1) = theta_t, until somebody replaces it; one that is given as a function of t has its
    value, theta_t = f(t), as `scale_by_learning_rate` would call it. Other options are as they were given.

    Args:
        inner_factory: such as `adamw` or `scale_by_soap`.
        static_args: names of options that stay as they are given although they are floats or functions.

    Returns:
        A function with the arguments of ``inner_factory``. Its transformations have an `InjectHyperparamsState`.

    Raises:
        ArgumentError: ``inner_factory`` has no argument of a name in ``static_args``.

    Source: optax, of the same name.

    Example:
        >>> import curvlib.optim as optim
        >>> transformation = inject_hyperparams(optim.scale_by_learning_rate)(learning_rate=0.5)
        >>> params = torch.ones(1)
        >>> state = transformation.init(params)
        >>> updates, state = transformation.update(torch.ones(1), state)
        >>> updates, transformation.update(torch.ones(1), state.replace(learning_rate=0.25))[0]
        (tensor([-0.5000]), tensor([-0.2500]))
    """
    signature = inspect.signature(inner_factory)
    fixed = {static_args} if isinstance(static_args, str) else set(static_args)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = sorted(fixed - signature.parameters.keys())
    if unknown and not open_ended:
        raise ArgumentError(f"there is no argument {unknown[0]!r}; there are {', '.join(signature.parameters)}")

    def make(*args: Any, **kwargs: Any) -> GradientTransformation:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name)
        free = {name: value for name, value in given.items() if name not in fixed}
        schedules = {name: value for name, value in free.items() if callable(value)}
        numbers = {name: as_tensors(value) for name, value in free.items() if is_numeric(value)}
        rest = {name: value for name, value in given.items() if name not in schedules and name not in numbers}
        return injected(partial(inner_factory, **rest), schedules, numbers)

    return make


def injected(
    factory: Callable[..., GradientTransformation], schedules: dict[str, Any], numbers: dict[str, Any]
) -> GradientTransformation:
    """The transformation made by a factory of scheduled options and of numbers that lie in the state."""

    def current(count: Tensor, hyperparams: dict[str, Any]) -> dict[str, Any]:
        step = int(count) if may_look_at(count) else count.double()
        return {**hyperparams, **{name: as_tensors(schedule(step)) for name, schedule in schedules.items()}}

    def transformation(hyperparams: dict[str, Any]) -> GradientTransformation:
        return factory(**{name: tree_map(as_number, value) for name, value in hyperparams.items()})

    def init(params: Tree) -> InjectHyperparamsState:
        hyperparams = current(first_step(), numbers)
        return InjectHyperparamsState(first_step(), hyperparams, transformation(hyperparams).init(params))

    def update(
        grads: Tree, state: InjectHyperparamsState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, InjectHyperparamsState]:
        state = own_state(state, InjectHyperparamsState, "inject_hyperparams")
        hyperparams = current(state.count, state.hyperparams)
        updates, inner = transformation(hyperparams).update(grads, state.inner, params, **extra)
        return updates, InjectHyperparamsState(state.count + 1, hyperparams, inner)

    return GradientTransformation(init, update)


def is_numeric(value: object) -> bool:
    """Whether an option is a float or a tuple of floats.

    Example:
        >>> [is_numeric(value) for value in (0.1, (0.9, 0.99), 10, True, "none", ())]
        [True, True, False, False, False, False]
    """
    if isinstance(value, tuple):
        return bool(value) and all(map(is_numeric, value))
    return isinstance(value, float) or (isinstance(value, Tensor) and value.ndim == 0)


def as_tensors(value: Any) -> Any:
    """A number as a 0-d float64 tensor on the CPU; a tuple of them likewise."""
    if isinstance(value, tuple):
        return tuple(map(as_tensors, value))
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def as_number(tensor: Tensor) -> float | Tensor:
    """The number in a tensor; under a transform or a trace, where none can be read, the tensor."""
    return tensor.item() if may_look_at(tensor) else tensor
