"""Execution: run the model once, record what layers read, and pull vectors back to the layers' outputs.

Two engines execute the same plan. Only gradients of layer outputs are taken, never of weights.

- `functional` adds a zero perturbation to every layer output and takes `torch.func.vjp` with respect to those. It
  composes with vmap, grad and make_fx.
- `autograd` marks layer outputs as requiring gradients and takes `torch.autograd.grad`, streaming: each gradient is
  reduced as soon as it exists. It works with activation checkpointing and with custom autograd functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlib import containers
from curvlib.capture.examples import expand_examples
from curvlib.capture.plan import Plan, Site
from curvlib.capture.routing import located
from curvlib.errors import ArgumentError, CaptureError
from curvlib.layers import REWRITES, TABLE
from curvlib.layers.table import Entry
from curvlib.linalg.eager import differentiable, is_eager, ordinary, own_draws, uncompiled
from curvlib.pytree import Tree, flatten, unflatten

ModelFn = Callable[[Any, Any], Any]
Record = Callable[[int, Tensor | None, Tensor], Any]
Consume = Callable[[int, Any, Tensor], None]

ELEMENTS_AT_ONCE = 1 << 23  # of layer-output gradients that may be alive together when vectors are batched


class Pullback(Protocol):
    """What an engine returns: the outputs, and how to pull vectors back.

    ``pull(parts, consume)`` takes stacks of vectors [K, *outputs.shape] and calls ``consume(site, kept, g)`` once a
    stack for every site that the vectors reach, with ``kept`` what ``record`` returned there and g [K, *site.shape]
    its output gradients. ``kept`` lists what was kept at each site. A stack should hold no more than ``width`` vectors.
    """

    outputs: Tensor
    width: int

    @property
    def kept(self) -> list[Any]:
        """What ``record`` returned at each site."""

    def pull(self, parts: Iterable[Tensor], consume: Consume) -> None:
        """Pulls vectors back to all sites. It may be called once."""


def execute(plan: Plan, model_fn: ModelFn, params: Tree, inputs: Any, record: Record, engine: str | None) -> Pullback:
    """Runs the model once under a plan.

    Args:
        plan: made for this model.
        model_fn: pure function (params, inputs) -> outputs.
        params: pytree of tensors.
        inputs: pytree.
        record: called as record(site number, the operand the site's layers read, the site's output); what it returns
            (a pytree of tensors or None) is kept for ``consume``. A call on chosen rows that this batch lacks is not
            recorded.
        engine: "functional", "autograd", or None: functional under a transform or a trace, else autograd.
    """
    params, inputs = ordinary((params, inputs))
    if plan.routes:
        plan = located(plan, model_fn, params, inputs, examples_in(inputs))
    if plan.writes_inputs:
        model_fn = on_copies(model_fn)
    if engine is None:
        engine = "autograd" if is_eager() else "functional"
    if is_eager():  # under a transform gradients may be wanted; else nothing must refer to the caller's graph
        params = plan.domain.tree([leaf.detach() for leaf in flatten(params)[0]])
        inputs = containers.map_tensors(Tensor.detach, inputs)
    elif engine == "autograd":
        raise ArgumentError(
            "engine='autograd' does not compose with torch.func transforms and tracing; use engine='functional'"
        )
    if engine == "autograd":
        return AutogradPullback(plan, model_fn, params, inputs, record)
    if engine == "functional":
        return FunctionalPullback(plan, model_fn, params, inputs, record)
    raise ArgumentError(f"engine must be 'functional', 'autograd' or None, got {engine!r}")


def on_copies(model_fn: ModelFn) -> ModelFn:
    """A model that changes its inputs in place, on copies of them."""
    return lambda params, inputs: model_fn(params, containers.map_tensors(Tensor.clone, inputs))


class Replay(TorchFunctionMode):
    """Counts the known calls and hands those that the plan names to ``visit``."""

    def __init__(self, plan: Plan, visit: Callable[[int, Site, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.sites = {site.ordinal: (i, site) for i, site in enumerate(plan.sites)}
        self.visit = visit
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REWRITES:
            with self:
                return REWRITES[func](*args, **kwargs)
        entry: Entry | None = TABLE.get(func)
        if entry is None:
            return func(*args, **kwargs)
        number, site = self.sites.get(self.calls, (-1, None))
        self.calls += 1
        result = func(*args, **kwargs)
        if site is None:
            return result
        if site.call != entry.name:
            raise CaptureError(
                f"call {self.calls - 1} is {entry.name}, but the plan has {site.call} there: the model does not make "
                "the same calls each time; make a new plan for this batch"
            )
        if not torch.is_grad_enabled():
            raise CaptureError(
                f"call {site.ordinal}, {site.call}, uses parameters where gradients are disabled (torch.no_grad, or "
                "reentrant activation checkpointing, for which use_reentrant=False is the remedy)"
            )
        operand = site.use.read(entry.arguments(args, kwargs))
        return self.visit(number, site, result, operand)


def check_count(plan: Plan, replay: Replay) -> None:
    """Every call of the plan must have been made, and no other."""
    if replay.calls != plan.calls:
        raise CaptureError(
            f"the model made {replay.calls} known calls, but its plan has {plan.calls}: the model does not make the "
            "same calls each time; make a new plan for this batch"
        )


def check_shape(site: Site, result: Tensor, examples: int) -> None:
    """The output of a site must have the planned shape."""
    shape = site.output_shape(examples)
    if tuple(result.shape) != (shape[1:] if site.expanded else shape):
        raise CaptureError(
            f"call {site.ordinal}, {site.call}, has an output of shape {tuple(result.shape)} where the plan has {shape}"
        )


def examples_in(inputs: Any) -> int:
    """The number of examples: the length of the first axis of the first tensor."""
    tensors = [tensor for tensor in containers.tensors_in(inputs) if tensor.ndim]
    return int(tensors[0].shape[0]) if tensors else 1


def stack_width(plan: Plan, examples: int) -> int:
    """How many vectors may be pulled back together."""
    elements = sum(math.prod(site.output_shape(examples)) for site in plan.sites)
    return max(1, ELEMENTS_AT_ONCE // max(1, elements))


class FunctionalPullback:
    """Engine `functional`: outputs z + e with e = 0, and the vector-Jacobian product with respect to e."""

    def __init__(self, plan: Plan, model_fn: ModelFn, params: Tree, inputs: Any, record: Record) -> None:
        self.plan, self.examples = plan, examples_in(inputs)
        self.width = 1 if plan.unbatched else stack_width(plan, self.examples)
        leaf = flatten(params)[0][0]

        structure: Any = None

        def perturbed(zeros: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            nonlocal structure
            kept: list[Any] = [None] * len(plan.sites)

            def visit(number: int, site: Site, result: Tensor, operand: Tensor | None) -> Tensor:
                check_shape(site, result, self.examples)
                full = result.expand(self.examples, *result.shape) if site.expanded else result
                kept[number] = record(number, operand, full)
                zero = zeros[number]
                if site.expanded and result.ndim and result.shape[0] == 1:
                    zero = zero.squeeze(1)
                return (expand_examples(result, self.examples) if site.expanded else result) + zero

            with Replay(plan, visit) as replay:
                outputs = model_fn(params, inputs)
            check_count(plan, replay)
            tensors, structure = flatten(kept)
            return outputs, tensors

        zeros = [
            torch.zeros((), dtype=site.dtype, device=leaf.device).expand(site.output_shape(self.examples))
            for site in plan.sites
        ]
        with differentiable(), uncompiled(), own_draws([leaf]):
            self.outputs, self._pull, tensors = torch.func.vjp(perturbed, zeros, has_aux=True)  # type: ignore[misc]
        self.kept: list[Any] = unflatten(structure, tensors)

    @differentiable()
    def pull(self, parts: Iterable[Tensor], consume: Consume) -> None:
        """Pulls vectors back to all sites."""
        for part in parts:
            if len(part) == 1:
                gradients = [g.unsqueeze(0) for g in self._pull(part[0])[0]]
            else:
                gradients = torch.func.vmap(self._pull)(part)[0]
            for number, g in enumerate(gradients):
                if self.plan.sites[number].ordinal >= 0:
                    consume(number, self.kept[number], g)


class Tap(torch.autograd.Function):
    """The identity, in place: hangs a layer's output on a common root, so that the root's gradient needs its own."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class RestartError(Exception):
    """The model must run again with inputs that require gradients."""


class Stream:
    """What the hooks on layer outputs know. They live as long as the graph, so this must not refer back to it."""

    def __init__(self, plan: Plan, examples: int) -> None:
        self.plan, self.examples = plan, examples
        self.kept: list[Any] = [None] * len(plan.sites)
        self.consume: Consume | None = None

    def take(self, number: int, g: Tensor) -> None:
        """Hands on gradients [K, *z.shape] of a site's output, in the planned shape."""
        if self.consume is not None:
            shape = self.plan.sites[number].output_shape(self.examples)
            with torch.no_grad():
                self.consume(number, self.kept[number], g.reshape(len(g), *shape))


class AutogradPullback:
    """Engine `autograd`: every layer output is tapped; a hook there sees its gradient and lets it go.

    A layer whose output does not reach the model's output has no gradient: its hook is silent, and so is `pull`.
    Under (non-reentrant) activation checkpointing a tap is absent when the forward pass is repeated, which must not
    change what requires a gradient: if the first layers are checkpointed, the inputs are tapped as well.
    """

    def __init__(self, plan: Plan, model_fn: ModelFn, params: Tree, inputs: Any, record: Record) -> None:
        self.plan, self.examples = plan, examples_in(inputs)
        self.width = stack_width(plan, self.examples)
        leaves, _ = flatten(params)
        with differentiable(), uncompiled(), own_draws(leaves):
            self._root = torch.zeros((), device=leaves[0].device, requires_grad=True)
            try:
                self._run(model_fn, params, inputs, record)
            except RestartError:
                self._run(model_fn, params, containers.map_tensors(self._require, inputs), record)

    def _require(self, x: Tensor) -> Tensor:
        return Tap.apply(x.clone(), self._root) if x.is_floating_point() else x

    def _run(self, model_fn: ModelFn, params: Tree, inputs: Any, record: Record) -> None:
        self._stream = stream = Stream(self.plan, self.examples)
        self._edges: dict[int, Any] = {}
        tapped_inputs = any(x.requires_grad for x in containers.tensors_in(inputs))

        def visit(number: int, site: Site, result: Tensor, operand: Tensor | None) -> Tensor:
            check_shape(site, result, self.examples)
            if not result.requires_grad and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                if tapped_inputs:
                    raise CaptureError(
                        f"call {site.ordinal}, {site.call}, is the first of the model and lies under activation "
                        "checkpointing; begin checkpointing after it"
                    )
                raise RestartError
            with torch.no_grad():
                full = result.expand(self.examples, *result.shape) if site.expanded else result
                stream.kept[number] = record(number, None if operand is None else operand.detach(), full.detach())
            if site.expanded:
                result = expand_examples(result, self.examples)
            output = Tap.apply(result.clone() if site.expanded or result._is_view() else result, self._root)
            output.register_hook(lambda g: None if g is None else stream.take(number, g.unsqueeze(0)))
            self._edges[number] = torch.autograd.graph.get_gradient_edge(output)
            return output

        with Replay(self.plan, visit) as replay:
            self._attached = model_fn(params, inputs)
        check_count(self.plan, replay)
        self.outputs = self._attached.detach()

    @property
    def kept(self) -> list[Any]:
        """What ``record`` returned at each site."""
        return self._stream.kept

    @differentiable()
    def pull(self, parts: Iterable[Tensor], consume: Consume) -> None:
        """Pulls vectors back to all sites; the graph is released with the last of them.

        Raises:
            CaptureError: the outputs carry no gradient.
        """
        if not self._attached.requires_grad:
            raise CaptureError(
                "the outputs carry no gradient to any parameter in this batch, though they do in the plan: model_fn "
                "detaches or runs without gradients (torch.no_grad, torch.inference_mode) under conditions of its own"
            )
        remaining = iter(parts)
        part = next(remaining, None)
        while part is not None:
            following = next(remaining, None)
            self._pull(part, consume, retain=following is not None)
            part = following

    def _pull(self, part: Tensor, consume: Consume, *, retain: bool) -> None:
        if len(part) == 1:
            self._stream.consume = consume
            torch.autograd.grad(self._attached, [self._root], part[0], retain_graph=retain, allow_unused=True)
            self._stream.consume = None
            return
        edges = list(self._edges.values())
        gradients = torch.autograd.grad(
            self._attached, edges, part, retain_graph=retain, allow_unused=True, is_grads_batched=True
        )
        self._stream.consume = consume
        for number, g in zip(self._edges, gradients, strict=True):
            if g is not None:
                self._stream.take(number, g)
        self._stream.consume = None
