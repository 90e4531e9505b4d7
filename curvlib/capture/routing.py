"""Plans of models that choose rows by values, brought into agreement with one batch.

An expert that a batch sends no token is not called there, which changes the number of every later call, and the
number of its rows is another in each batch. One more run, forward only, finds both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlib.capture.aliases import COPIES, LIKE, Aliases, parameters, storage, tensors_in
from curvlib.capture.examples import expand_examples
from curvlib.capture.plan import Block, Plan, Route, Site
from curvlib.errors import CaptureError
from curvlib.layers import REWRITES, TABLE
from curvlib.layers.base import Axes, Entries, Layer
from curvlib.layers.contraction import Contraction
from curvlib.layers.elementwise import Elementwise
from curvlib.linalg.eager import differentiable, is_eager, own_draws, uncompiled
from curvlib.operators.layout import Region
from curvlib.pytree import Domain, Tree, flatten

ModelFn = Callable[[Any, Any], Any]


def counted(layer: Layer, *, loose: bool) -> Layer:
    """The same layer on rows that are chosen by values, of which an example may have several if ``loose``.

    Raises:
        CaptureError: it is not a product with a weight, a scale or a shift; or its input has no such rows.
    """
    entries = Entries.LOOSE if loose else Entries.CHOSEN

    def among(axes: Axes) -> Axes:
        if axes.batch is None:
            raise CaptureError(
                "the input has no axis of the rows that are chosen by values: choose rows of the output instead"
            )
        return dataclasses.replace(axes, entries=entries)

    match layer:
        case Contraction(input_axes=input_axes, output_axes=output_axes):
            return dataclasses.replace(layer, input_axes=among(input_axes), output_axes=among(output_axes))
        case Elementwise(axes=axes):
            return dataclasses.replace(layer, axes=among(axes))
    raise CaptureError(
        f"a {type(layer).__name__.lower()} on rows that are chosen by values is not understood: call it on all "
        "examples, and choose rows of its output"
    )


def loosened(domain: Domain, sites: list[Site], blocks: tuple[Block, ...]) -> list[Site]:
    """The sites, where rows of a weight that several calls use do not say any more which example they belong to.

    Raises:
        CaptureError: a scale or a shift, which needs the gradient of each example, is used on rows that do not say it.
    """
    several = {p.site for block in blocks if len(block.placements) > 1 for p in block.placements}
    result = []
    for number, site in enumerate(sites):
        if site.chosen is not None and number in several:
            layers = tuple(counted(layer, loose=True) for layer in site.layers)
            site = dataclasses.replace(site, layers=layers, chosen=dataclasses.replace(site.chosen, loose=True))
        for layer in site.layers:
            if isinstance(layer, Elementwise) and site.chosen is not None and site.chosen.loose:
                raise CaptureError(
                    f"{parameters(domain, [region.leaf for region in layer.regions])} in call {site.ordinal}, "
                    f"{site.call}: a scale or shift needs the gradient of each example, but its rows are chosen by "
                    "values and one example may have several: scale or shift all examples before rows are chosen, "
                    "or leave it out of params by closing over it in model_fn"
                )
        result.append(site)
    return result


def located(plan: Plan, model_fn: ModelFn, params: Tree, inputs: Any, examples: int) -> Plan:
    """The plan for one batch: with the numbers of its calls, and of the rows chosen in it.

    A call that the batch lacks, or makes on no row, keeps its place among the sites, with no rows and the number -1.

    Raises:
        CaptureError: not in eager mode; a call that the plan lacks, or a call of the plan that is not on chosen rows
            and is missing.
    """
    if not is_eager():
        raise CaptureError(
            "the model chooses rows by values (nonzero, where, a mask as an index), which takes a run on values: call "
            "this outside of torch.func transforms and traces"
        )
    leaves = flatten(params)[0]
    with own_draws(leaves), differentiable(), uncompiled(), nothing_saved():
        stand_ins = [leaf.requires_grad_() for leaf in separate([leaf.detach() for leaf in leaves])]
        mode = Locate(plan, stand_ins, examples)
        with mode:
            model_fn(plan.domain.tree(stand_ins), inputs)
    return mode.plan()


def nothing_saved() -> contextlib.AbstractContextManager[None]:
    """Lets a graph be recorded that nobody pulls back: it holds on to no tensor."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x)


def separate(leaves: list[Tensor]) -> list[Tensor]:
    """Contiguous tensors that share no storage; copies only where leaves are not."""
    seen: set[int] = set()
    result = []
    for leaf in leaves:
        copied = not leaf.is_contiguous() or storage(leaf) in seen
        seen.add(storage(leaf))
        result.append(leaf.clone(memory_format=torch.contiguous_format) if copied else leaf)
    return result


class Locate(TorchFunctionMode):
    """Finds the calls of a plan in a run on values, by the parameters that they use."""

    def __init__(self, plan: Plan, stand_ins: list[Tensor], examples: int) -> None:
        super().__init__()
        self.planned, self.examples = plan, examples
        self.aliases = Aliases(plan.domain)
        self.aliases.follow(stand_ins)
        self.pending: dict[tuple[str, tuple[Region, ...]], list[Route]] = {}
        for route in plan.routes:
            self.pending.setdefault((route.site.call, route.regions), []).append(route)
        self.sites: dict[int, Site] = {}
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REWRITES:
            with self:
                return REWRITES[func](*args, **kwargs)
        entry = TABLE.get(func)
        self.calls += entry is not None
        result = func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        operands = [x for x in tensors if self.aliases.of(x) is not None]
        if not operands:
            return result
        if entry is not None:
            return self.match(entry.name, operands, result)
        made = any(self.aliases.of(output) is None for output in tensors_in(result))
        if made and func in COPIES and tensors[0] is operands[0]:
            self.aliases.follow_copy(operands[0], result)
        elif made and func not in COPIES and func not in LIKE:
            raise self.unplanned(repr(getattr(func, "__name__", str(func))), operands)
        return result

    def match(self, name: str, operands: list[Tensor], result: Tensor) -> Tensor:
        """Takes the next call of the plan that uses the same parameters and has a fitting output."""
        routes = self.pending.get((name, self.aliases.regions(operands)), [])
        route = next((route for route in routes if self.fits(route.site, result)), None)
        if route is None:
            if self.aliases.of(result) is not None:
                return result
            raise self.unplanned(f"call {self.calls - 1}, {name},", operands)
        routes.remove(route)
        site = route.site
        if route.number is not None:
            ordinal = self.calls - 1 if result.numel() else -1
            self.sites[route.number] = placed(self.planned.sites[route.number], ordinal, tuple(result.shape))
        result = result.clone() if self.aliases.of(result) is not None else result
        return expand_examples(result, self.examples) if site.expanded else result

    def fits(self, site: Site, result: Tensor) -> bool:
        """Whether a call's output has the planned shape, but for the number of chosen rows."""
        planned = site.shape[1:] if site.expanded else site.shape
        return len(planned) == result.ndim and all(
            size == (k * self.examples if counts else k) or (counts and site.chosen is not None)
            for (k, counts), size in zip(planned, result.shape, strict=True)
        )

    def unplanned(self, what: str, operands: list[Tensor]) -> CaptureError:
        """The error for a call that is not in the plan."""
        leaves = sorted({alias.leaf for alias in map(self.aliases.of, operands) if alias is not None})
        return CaptureError(
            f"{what} uses {parameters(self.planned.domain, leaves)} in this batch, but not in the plan: rows are "
            "chosen by values, and the model may differ from its plan only in how many there are"
        )

    def plan(self) -> Plan:
        """The plan for this batch."""
        sites = []
        for number, site in enumerate(self.planned.sites):
            if number not in self.sites and site.chosen is None:
                leaves = dict.fromkeys(region.leaf for layer in site.layers for region in layer.regions)
                raise CaptureError(
                    f"{parameters(self.planned.domain, leaves)}: the plan has call {site.ordinal}, {site.call}, which "
                    "this batch lacks, although its rows are not chosen by values; make a new plan for this batch"
                )
            missing = tuple(0 if counts else k for k, counts in site.shape)
            sites.append(self.sites[number] if number in self.sites else placed(site, -1, missing))
        return dataclasses.replace(self.planned, sites=tuple(sites), calls=self.calls, routes=())


def placed(site: Site, ordinal: int, shape: tuple[int, ...]) -> Site:
    """A site at this place in a run; on chosen rows, with this shape of the output."""
    if site.chosen is None:
        return dataclasses.replace(site, ordinal=ordinal)
    return dataclasses.replace(site, ordinal=ordinal, shape=tuple((size, False) for size in shape))
