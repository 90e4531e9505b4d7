"""Plans of a model for the batches it is given: each is made once, and handed down to all that need it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch

from curvlib import containers
from curvlib.arguments import check_model
from curvlib.capture import Plan
from curvlib.capture import plan as make_plan
from curvlib.capture.aliases import parameters
from curvlib.capture.engines import ModelFn
from curvlib.capture.plan import Site
from curvlib.errors import CaptureError
from curvlib.gradients.data import Batch, DataSet, batches
from curvlib.operators.blocks import Layouts
from curvlib.pytree import Tree, flatten


@final
class Plans:
    """The plans of one model: one for all batches of the same shapes, made when the first of them comes.

    Whatever takes ``plan=`` takes `Plans` too, and shares what is found out about the model with all others that are
    given the same object. It belongs to one ``model_fn``; other parameters may follow. The plan of a model that decides
    by values what it calls is not kept.

    Args:
        only: the plan to use for every batch; None: plans are made.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch, plans = (torch.randn(5, 3), torch.randn(5, 2)), Plans()
        >>> curv = cv.kfac(model_fn, params, batch, loss=cv.MSE(), plan=plans)
        >>> gradients = cv.per_example_gradients(model_fn, params, batch, loss=cv.MSE(), plan=plans)
        >>> plans  # for both
        Plans(1)
    """

    def __init__(self, only: Plan | None = None) -> None:
        self.only = only
        self.known: dict[object, Plan] = {}

    @classmethod
    def of(cls, plan: Plan | Plans | None) -> Plans:
        """What a function was given as ``plan=``."""
        return plan if isinstance(plan, Plans) else cls(plan)

    def __repr__(self) -> str:
        return f"Plans({len(self.known) if self.only is None else 'one that is given'})"

    def fitting(self, model_fn: ModelFn, params: Tree, inputs: Any) -> Plan:
        """The plan for inputs of these shapes.

        Raises:
            CaptureError, UnusedParameterError: as for `plan`, where one has to be made.
        """
        if self.only is not None:
            return self.only
        leaves, structure = flatten(params)
        key = (structure, tuple((tuple(map(int, leaf.shape)), leaf.dtype) for leaf in leaves), shapes(inputs))
        plan = self.known.get(key)
        if plan is None:
            plan = make_plan(model_fn, params, inputs)
            if plan.static:
                self.known[key] = plan
        return plan


def planned(
    model_fn: ModelFn, params: Tree, data: Batch | DataSet, plan: Plan | Plans | None
) -> Iterator[tuple[Plan, Any, Any]]:
    """(plan, inputs, targets) of every batch, with one plan for all batches of the same shapes.

    Raises:
        CaptureError: the batches do not use the parameters in the same way.
    """
    check_model(model_fn, params)
    plans, first = Plans.of(plan), None
    for inputs, targets in batches(data):
        known = plans.fitting(model_fn, params, inputs)
        first = known if first is None else first
        if known is not first and layouts_of(known) != layouts_of(first):
            raise CaptureError(
                "the batches of a data set do not use the parameters in the same way; their plans differ"
            )
        yield known, inputs, targets


def layouts_of(plan: Plan) -> Layouts:
    """Which elements of which parameters make up each block."""
    return tuple((block.name, block.layout) for block in plan.blocks)


def shapes(inputs: Any) -> tuple[object, ...]:
    """Structure, shapes and dtypes of inputs but for the number of examples, which a plan leaves open."""
    leaves, structure = containers.flatten(inputs)
    number = next((int(x.shape[0]) for x in leaves if isinstance(x, torch.Tensor) and x.ndim), 1)
    key: list[object] = [str(structure)]
    for x in leaves:
        if isinstance(x, torch.Tensor):
            counts = x.ndim > 0 and int(x.shape[0]) == number
            key.append((counts, tuple(map(int, x.shape[counts:])), x.dtype))
        else:
            key.append(repr(x))
    return tuple(key)


def require_examples(plan: Plan) -> None:
    """Refuses a model whose examples have no gradients of their own.

    Raises:
        CaptureError: examples depend on each other, or their rows do not lie together.
    """
    if plan.mixed is not None:
        raise CaptureError(
            f"examples depend on each other: {plan.mixed}, so that the gradient of a single example is not defined. "
            "Batch norm: call module.eval() first; batches with another axis in front (time): transpose inside "
            "model_fn; entries picked by a flat index: torch.gather, or an index x[torch.arange(N), i]. `cv.kfac`, "
            "`cv.shampoo` (per_example=False), `cv.ggn` and `cv.hessian` need no single examples"
        )
    for site in plan.sites:
        if site.scattered:
            raise scattered_rows(plan, site)


def scattered_rows(plan: Plan, site: Site) -> CaptureError:
    """The error for rows of one example that do not lie together."""
    names = parameters(plan.domain, dict.fromkeys(region.leaf for layer in site.layers for region in layer.regions))
    return CaptureError(
        f"{names} in call {site.ordinal}, {site.call}: the rows of one example do not lie together, as batches were "
        "concatenated along the axis of examples; use torch.stack(batches, 1).flatten(0, 1), or cv.kfac with "
        "sharing='expand', which needs no single examples"
    )
