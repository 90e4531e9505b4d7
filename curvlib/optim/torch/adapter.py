"""What the `torch.optim` adapters share: parameter groups, missing gradients, state dictionaries.

An adapter owns no mathematics. It holds the state of a gradient transformation for every cohort of parameters, and
moves the parameters in place. A cohort is a set of parameters of one group that got their first gradient in the same
step; it is split when only some of its members get one.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, DtypeError
from curvlib.optim.torch.restriction import Params, State, restricted, state_of, tensors_of
from curvlib.optim.transformation import GradientTransformation

Group = dict[str, Any]
ParamsArgument = Iterable[Any]

OUTSIDE = ("params", "param_names", "lr", "initial_lr", "weight_decay")  # of a group, but not for its transformation


def options_of(group: Group) -> Group:
    """The options of a group that its transformation takes."""
    return {name: value for name, value in group.items() if name not in OUTSIDE}


def defaults_of(scale_by: Callable[..., GradientTransformation], given: Group) -> Group:
    """All options of a transformation: those given, and the others' defaults.

    Raises:
        ArgumentError: there is no option of a name given.

    Example:
        >>> import curvlib.optim as optim
        >>> defaults_of(optim.scale_by_adam, {"eps": 1e-6})
        {'betas': (0.9, 0.999), 'eps': 1e-06, 'bias_correction': True}
    """
    defaults = {name: option.default for name, option in inspect.signature(scale_by).parameters.items()}
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise ArgumentError(f"there is no option {unknown[0]!r}; there are {', '.join(defaults)}")
    return {**defaults, **given}


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Parameters, by their places in a group, and the state of their transformation."""

    members: tuple[int, ...]
    state: State


class Adapter(torch.optim.Optimizer):
    """A gradient transformation as a `torch.optim.Optimizer`.

    One step is p <- (1 - lr * weight_decay) (p - lr * update). Parameters without a gradient are left alone, and so is
    their state.
    """

    def __init__(self, params: ParamsArgument, defaults: Group) -> None:
        if isinstance(params, (torch.nn.Module, Mapping)):
            raise ArgumentError(
                f"params must be parameters, named parameters or groups of them, got a {type(params).__name__}: give "
                "module.parameters()"
            )
        super().__init__(params, defaults)

    @abstractmethod
    def transformation(self, group: Group) -> GradientTransformation:
        """What makes updates of the gradients of a group, from its options."""

    def waits(self, group: Group) -> bool:
        """Whether the first gradient of a parameter only starts its state, and nothing is done to the parameter."""
        return False

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters, with its own options.

        Raises:
            ArgumentError: the learning rate or the weight decay is negative, or another option is out of its range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay"):
            if not group[name] >= 0:
                raise ArgumentError(f"{name} must not be negative, got {group[name]}")
        self.transformation(group)

    def named(self, number: int, places: Iterable[int]) -> dict[str, Tensor]:
        """Parameters of a group by name: their own if the optimizer was given named parameters."""
        group = self.param_groups[number]
        names = group.get("param_names")
        return {
            names[place] if names else f"param_groups[{number}].params[{place:06d}]": group["params"][place]
            for place in places
        }

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The loss, if there is a closure.

        Raises:
            ArgumentError: the loss is given in place of a closure.
            DtypeError: a gradient is sparse; names the parameter.
            NonFiniteError: a preconditioner could not be refreshed three times in a row; names the parameter.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise ArgumentError(
                    f"step takes a function that evaluates the loss, got a {type(closure).__name__}: call "
                    "loss.backward(), and step() without it"
                )
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            self.step_group(number, group)
        return loss

    def step_group(self, number: int, group: Group) -> None:
        """One step of a group."""
        transformation = self.transformation(group)
        active = {place for place, p in enumerate(group["params"]) if p.grad is not None}
        cohorts: list[Cohort] = []
        for cohort in self.cohorts(group):
            cohorts += self.split(number, cohort, active, transformation)
        known = {place for cohort in cohorts for place in cohort.members}
        new = tuple(sorted(active - known))
        if new:
            cohorts.append(Cohort(new, transformation.init(self.named(number, new))))
        for i, cohort in enumerate(cohorts):
            if cohort.members[0] in active:
                waits = cohort.members == new and self.waits(group)
                cohorts[i] = self.advanced(number, cohort, transformation, waits=waits)
        for cohort in cohorts:
            self.state[group["params"][cohort.members[0]]] = {"cohort": cohort}

    def cohorts(self, group: Group) -> list[Cohort]:
        """The cohorts of a group, each of which is kept with its first member."""
        return [self.state[p]["cohort"] for p in group["params"] if p in self.state]

    def split(
        self, number: int, cohort: Cohort, active: set[int], transformation: GradientTransformation
    ) -> list[Cohort]:
        """The cohort, or the two parts of it that do and do not have gradients."""
        parts = [tuple(m for m in cohort.members if (m in active) == has) for has in (True, False)]
        if not all(parts):
            return [cohort]
        params = self.named(number, cohort.members)
        result = []
        for members in parts:
            some = self.named(number, members)
            state = restricted(cohort.state, params, list(some), transformation.init(some))
            result.append(Cohort(members, state))
        return result

    def advanced(self, number: int, cohort: Cohort, transformation: GradientTransformation, *, waits: bool) -> Cohort:
        """Moves the parameters of a cohort, and returns it with its next state."""
        group = self.param_groups[number]
        params = self.named(number, cohort.members)
        gradients = {name: dense_gradient(name, p) for name, p in params.items()}
        updates, state = transformation.update(gradients, cohort.state, params)
        if not waits:
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            names = list(params)
            leaves = [params[name] for name in names]
            torch._foreach_add_(leaves, [updates[name].to(params[name].dtype) for name in names], alpha=-lr)
            if decay:
                torch._foreach_mul_(leaves, 1 - lr * decay)
        return Cohort(cohort.members, state)

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings, lists and tensors, which `torch.save` and ``torch.load`` can handle.

        Each cohort's state is listed with its first parameter: the places of its members in their group, and the
        tensors of the transformation's state.
        """
        result: dict[str, Any] = super().state_dict()
        result["state"] = {
            key: {"members": list(entry["cohort"].members), "tensors": tensors_of(entry["cohort"].state)}
            for key, entry in result["state"].items()
        }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the options and the state of an optimizer of the same parameters.

        Raises:
            ValueError: other groups.
            FormatError: the state does not belong to such an optimizer; nothing has been changed then.
        """
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        places = {
            number: (i, j) for i, g in enumerate(state_dict["param_groups"]) for j, number in enumerate(g["params"])
        }
        found: dict[Tensor, Any] = {}
        if len(numbers) == sum(len(group["params"]) for group in self.param_groups):  # else super raises
            for key, entry in state_dict["state"].items():
                group, place = places[key]
                params: Params = self.named(group, entry["members"])
                options = {**self.param_groups[group], **state_dict["param_groups"][group]}
                state = state_of(entry["tensors"], self.transformation(options), params)
                found[self.param_groups[group]["params"][place]] = {"cohort": Cohort(tuple(entry["members"]), state)}
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(found)


def dense_gradient(name: str, parameter: Tensor) -> Tensor:
    """The gradient of a parameter.

    Raises:
        DtypeError: it is sparse.
    """
    assert parameter.grad is not None
    if parameter.grad.layout != torch.strided:
        raise DtypeError(f"the gradient of parameter {name!r} is sparse; use an embedding with sparse=False")
    return parameter.grad
