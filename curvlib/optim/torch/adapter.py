"""What the `torch.optim` adapters share: parameter groups, gradients that are missing, the step.

An adapter owns no mathematics. It holds the state of a gradient transformation parameter by parameter, as every torch
optimizer does, and moves the parameters in place. In a step, parameters whose states have the same counts are treated
together: as one state, in one update.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, DtypeError, FormatError
from curvlib.optim.arguments import at_least_zero
from curvlib.optim.torch.leaf_states import Entries, Form, StateForms, joined, rule, separated
from curvlib.optim.torch.loading import restored, settled
from curvlib.optim.torch.plain import comparable, plain
from curvlib.optim.torch.sharded import own_part, part_like, whole
from curvlib.optim.transformation import GradientTransformation

Group = dict[str, Any]
ParamsArgument = Iterable[Any]


def defaults_of(scale_by: Callable[..., GradientTransformation]) -> Group:
    """The options of a transformation and their defaults.

    Example:
        >>> import curvlib.optim as optim
        >>> defaults_of(optim.scale_by_adam)
        {'betas': (0.9, 0.999), 'eps': 1e-08, 'bias_correction': True}
    """
    return {name: option.default for name, option in inspect.signature(scale_by).parameters.items()}


@dataclass(frozen=True)
class Member:
    """A parameter that has a gradient, and its state.

    Args:
        name: of the parameter.
        parameter: itself.
        rule: what treats it.
        form: of its state.
        entries: its state.
    """

    name: str
    parameter: Tensor
    rule: StateForms
    form: Form
    entries: Entries

    @property
    def companions(self) -> tuple[Any, ...]:
        """What parameters that are treated together have in common."""
        return self.rule, self.parameter.device, *(self.entries[name].item() for name in self.form.shared)

    @property
    def is_new(self) -> bool:
        """Whether this is its first gradient."""
        return "step" in self.entries and not self.entries["step"].item()


class Adapter(torch.optim.Optimizer):
    """A gradient transformation as a `torch.optim.Optimizer`.

    Parameters without a gradient are left alone, and so is their state. ``state[p]`` is a flat dictionary of tensors;
    ``step``, where there is one, counts the gradients of p. Groups may hold keys of their own.

    Args:
        params: parameters, named parameters, or groups of them with options of their own.
        lr: learning rate.
        weight_decay: rate of the decoupled decay.
        maximize: whether to ascend.
        differentiable: whether steps are recorded, so that what the parameters became can be differentiated.
        foreach, fused, capturable: accepted for the sake of callers that set them; no effect.
        **options: of the transformation.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.
    """

    options: ClassVar[Group]
    decays_first: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsArgument,
        lr: float | Tensor = 3e-3,
        *,
        weight_decay: float = 0.01,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        if isinstance(params, (torch.nn.Module, Mapping)):
            raise ArgumentError(
                f"params must be parameters, named parameters or groups of them, got a {type(params).__name__}: give "
                "module.parameters()"
            )
        unknown = sorted(options.keys() - self.options.keys())
        if unknown:
            raise ArgumentError(f"there is no option {unknown[0]!r}; there are {', '.join(self.options)}")
        torchs = {"maximize": maximize, "foreach": foreach, "capturable": capturable, "fused": fused}
        own = {"lr": lr, "weight_decay": weight_decay, **torchs, "differentiable": differentiable}
        super().__init__(params, {**own, **self.options, **options})

    @classmethod
    @abstractmethod
    def transformation(cls, label: str, options: Group) -> GradientTransformation:
        """What makes updates of the gradients of the parameters with a label, from all ``options``."""

    def labels(self, group: Group) -> tuple[str, ...]:
        """The labels that parameters of a group may have."""
        return ("",)

    def label(self, group: Group, name: str, parameter: Tensor) -> str:
        """Which of the transformations treats a parameter."""
        return ""

    def waits(self, group: Group) -> bool:
        """Whether the first gradient of a parameter only starts its state, and nothing is done to the parameter."""
        return group.get("start_step") == 0

    def rule(self, group: Group, label: str) -> StateForms:
        """The transformation of a label, with the options of a group."""
        options = tuple((name, comparable(group[name])) for name in self.options)
        try:
            return rule(self.transformation, label, options)
        except TypeError:  # a value that cannot be hashed
            return rule.__wrapped__(self.transformation, label, options)

    def names(self, number: int) -> Sequence[str]:
        """Names of the parameters of a group: their own if the optimizer was given named parameters."""
        group = self.param_groups[number]
        names, count = group.get("param_names", ()), len(group["params"])
        return names if len(names) == count else [f"param_groups[{number}].params[{i}]" for i in range(count)]

    # --- groups and files ---------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters, with its own options; a group that is refused is not kept.

        Raises:
            ArgumentError: the learning rate or the weight decay is negative, another option is out of its range, or
                two parameters have the same name.
        """
        before = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            for name in ("lr", "weight_decay"):
                at_least_zero(name, float(group[name]))
            for label in self.labels(group):
                self.rule(group, label)
            names = self.names(before)
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ArgumentError(f"two parameters have the name {twice[0]!r}")
        except Exception:
            del self.param_groups[before:]
            raise

    def form(self, group: Group, name: str, parameter: Tensor) -> Form:
        """What the state of a parameter consists of."""
        return self.rule(group, self.label(group, name, parameter)).form(name, parameter)

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups: `torch.optim.Optimizer.state_dict`, with options as plain data."""
        result: dict[str, Any] = super().state_dict()
        groups = [{name: plain(value) for name, value in group.items()} for group in result["param_groups"]]
        return {**result, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the options and the state of an optimizer: `torch.optim.Optimizer.load_state_dict`.

        States keep their dtypes. Parameters that were saved with the names that they have here, but for what
        `torch.compile` and data parallelism put in front of them, are found by name, others by their order.

        Raises:
            ValueError: other groups.
            FormatError: the state does not belong to such an optimizer; nothing has been changed then.
        """
        last = self.register_load_state_dict_pre_hook(settled)  # sees what the others have made of it
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        restored(self)

    # --- steps --------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

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
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for number, group in enumerate(self.param_groups):
                together: dict[Any, list[Member]] = {}
                for member in self.members(number, group):
                    together.setdefault(member.companions, []).append(member)
                for members in together.values():
                    self.advance(group, members)
        return loss

    def members(self, number: int, group: Group) -> Iterable[Member]:
        """The parameters of a group that have a gradient, with their states."""
        rules = {label: self.rule(group, label) for label in self.labels(group)}
        for name, parameter in zip(self.names(number), group["params"], strict=True):
            if parameter.grad is None or not parameter.numel():
                continue
            if parameter.grad.layout != torch.strided:
                raise DtypeError(f"the gradient of parameter {name!r} is sparse; use an embedding with sparse=False")
            treated_by = rules[self.label(group, name, parameter)]
            form = treated_by.form(name, parameter)
            yield Member(name, parameter, treated_by, form, self.entries(name, parameter, treated_by, form))

    def entries(self, name: str, parameter: Tensor, treated_by: StateForms, form: Form) -> Entries:
        """The state of a parameter, where the parameter is; a fresh one before its first gradient.

        Raises:
            FormatError: the state is that of other options.
        """
        kept, like = self.state.get(parameter), form.like
        if not kept or kept.keys().isdisjoint(like):
            return separated([form], treated_by.transformation.init({name: whole(parameter)}))[0]
        mismatch = None if kept.keys() == like.keys() else form.mismatch(kept)
        if mismatch:
            raise FormatError(f"{mismatch} in the state of parameter {name!r}: it was made with other options")
        return {
            key: kept[key].to(parameter.device if expected.is_meta else expected.device)
            for key, expected in like.items()
        }

    def advance(self, group: Group, members: Sequence[Member]) -> None:
        """One step of parameters whose states have the same counts."""
        forms = [member.form for member in members]
        state = joined(forms, [member.entries for member in members])
        gradients, params = OrderedDict(), OrderedDict()
        for member in members:
            gradient = whole(member.parameter.grad)
            gradients[member.name] = -gradient if group["maximize"] else gradient
            params[member.name] = whole(member.parameter)
        updates, state = members[0].rule.transformation.update(gradients, state, params)
        if not (members[0].is_new and self.waits(group)):
            parts = [part_like(updates[m.name], m.parameter).to(m.parameter.dtype) for m in members]
            self.move(group, [own_part(m.parameter) for m in members], parts)
        for member, entries in zip(members, separated(forms, state), strict=True):
            self.state[member.parameter].update(entries)

    def move(self, group: Group, params: list[Tensor], updates: list[Tensor]) -> None:
        """Moves parameters against their updates, in place."""
        lr, decay = group["lr"], group["weight_decay"]
        if group["differentiable"]:
            for p, update in zip(params, updates, strict=True):
                old, kept = p.clone(), 1 - lr * decay  # what the graph holds is not written over
                p.copy_(kept * old - lr * update if self.decays_first else kept * (old - lr * update))
            return
        lr, decay = float(lr), float(decay)
        if decay and self.decays_first:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, updates, alpha=-lr)
        if decay and not self.decays_first:
            torch._foreach_mul_(params, 1 - lr * decay)
