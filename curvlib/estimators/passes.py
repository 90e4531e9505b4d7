"""One pass of a batch through a model: what its layers see is summed, and added over the batches of a data set."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.arguments import check_model
from curvlib.capture import Plan, execute
from curvlib.capture.aliases import parameters
from curvlib.capture.engines import ModelFn, Pullback, examples_in
from curvlib.capture.plan import Site
from curvlib.errors import CaptureError, naming
from curvlib.estimators.statistics import Collectors, Options, Pass, Statistics
from curvlib.gradients.data import Batch, DataSet, batches
from curvlib.gradients.plans import Plans, require_examples, scattered_rows
from curvlib.gradients.uses import as_wide_as, curvature_dtype
from curvlib.layers.base import KroneckerLayer
from curvlib.linalg.eager import differentiable, may_look_at, ordinary
from curvlib.linalg.gram import full_precision
from curvlib.losses.base import check_device
from curvlib.pytree import Tree, flatten


@differentiable()
def measure(
    plan: Plan,
    model_fn: ModelFn,
    params: Tree,
    batch: Batch,
    options: Options,
    generator: torch.Generator | None,
    collectors: Collectors,
    basis: dict[str, Any] | None = None,
) -> Statistics:
    """Runs the model once on a batch and sums what its layers saw.

    Args:
        plan: the model's plan.
        model_fn: pure function (params, inputs) -> outputs.
        params: pytree of tensors.
        batch: (inputs, targets).
        options: which vectors are backpropagated, and more.
        generator: randomness for ``mc``.
        collectors: makes the collectors of Kronecker and of elementwise blocks; None leaves such blocks out.
        basis: what is given by block, where it is measured in a basis.
    """
    params, (inputs, targets) = ordinary((params, batch))
    loss, examples = options.loss, examples_in(inputs)
    expected = torch.empty(plan.output_shape(examples), device="meta")
    loss.check(expected, targets)
    mask = loss.mask(expected, targets)
    if mask is not None and (plan.routes or may_look_at(mask)) and mask.all():  # choosing rows waits for a device too
        mask = None
    check_routing(plan, options, mask)
    dtype = curvature_dtype(params)
    kronecker, elementwise = collectors(Pass(plan, options, examples, mask, dtype, basis))
    single = [collector.needs_examples for collector in (kronecker, elementwise) if collector is not None]
    check_examples(plan, options, mask, needed=single[0])
    pairs = [(block, kronecker if block.kronecker else elementwise) for block in plan.blocks]
    chosen = {(p.site, p.layer): (p, collector) for block, collector in pairs for p in block.placements}

    missing = {number for number, site in enumerate(plan.sites) if site.chosen is not None}

    def record(number: int, operand: Tensor | None, z: Tensor) -> list[Any]:
        missing.discard(number)
        operand, z = None if operand is None else as_wide_as(dtype, operand), as_wide_as(dtype, z)
        kept: list[Any] = []
        for index, layer in enumerate(plan.sites[number].layers):
            placement, collector = chosen[number, index]
            kept.append(None if collector is None else collector.record(placement, layer, operand, z))
        return kept

    def consume(number: int, kept: Any, g: Tensor) -> None:
        for index, layer in enumerate(plan.sites[number].layers):
            placement, collector = chosen[number, index]
            if collector is not None:
                with blamed(plan, number):
                    collector.consume(placement, layer, kept[index], full_precision(as_wide_as(dtype, g)))

    try:
        run = execute(plan, model_fn, params, inputs, record, options.engine)
    except RuntimeError:
        check_device(targets, flatten(params)[0][0].device)  # a mask made of them meets what layers read
        raise
    check_device(targets, run.outputs.device)
    for number in sorted(missing):
        run.kept[number] = record(number, *no_rows(plan.sites[number], run.outputs.device))
    if options.fisher != "forward-only":
        run.pull(vectors(run, targets, options, generator), consume)
    count = loss.positions if options.fisher == "forward-only" else loss.normalizer
    normalizer = count(run.outputs, targets).to(dtype)
    sums = {block.name: collector.sums(block, run) for block, collector in pairs if collector is not None}
    total = torch.full((), examples, dtype=dtype, device=normalizer.device)
    return Statistics(sums, normalizer, total, basis, plan.blocks, plan.domain, options)


def check_examples(plan: Plan, options: Options, mask: Tensor | None, *, needed: bool) -> None:
    """Refuses what needs the rows or the gradients of single examples, where there are none.

    Raises:
        CaptureError: examples depend on each other, or their rows do not lie together.
    """
    if needed:
        require_examples(plan)
    for site in plan.sites:
        ordered = mask is not None or options.sharing == "reduce"
        if site.scattered and (ordered or not all(isinstance(layer, KroneckerLayer) for layer in site.layers)):
            raise scattered_rows(plan, site)


def warn_of_mixing(plan: Plan) -> None:
    """Says what curvature means whose estimator needs no single examples, where examples depend on each other."""
    if plan.mixed is not None:
        warnings.warn(
            f"examples depend on each other: {plan.mixed}. The output gradient of an example's row is that of the "
            "whole batch's loss, other examples' terms included",
            stacklevel=level_of_caller(),
        )


def level_of_caller() -> int:
    """The ``stacklevel`` at which somebody has called the library, for a warning of the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == __name__.partition(".")[0]:
        frame, level = frame.f_back, level + 1
    return level


def check_routing(plan: Plan, options: Options, mask: Tensor | None) -> None:
    """Refuses what needs to know which example the rows belong to that a model chooses by values."""
    for site in plan.sites:
        leaves = dict.fromkeys(region.leaf for layer in site.layers for region in layer.regions)
        names = parameters(plan.domain, leaves)
        if site.chosen is None:
            continue
        if mask is not None:
            raise CaptureError(
                f"{names}: rows of call {site.ordinal}, {site.call}, are chosen by values, and which of them belong to "
                "targets that are ignored is not known: leave out those examples, or close over the parameter"
            )
        if options.sharing == "reduce" and site.chosen.loose:
            raise CaptureError(
                f"{names}: rows of call {site.ordinal}, {site.call}, are chosen by values, and which of them belong to "
                "one example is not known, as sharing='reduce' needs: use sharing='expand'"
            )
        if options.fisher == "forward-only" and not all(isinstance(x, KroneckerLayer) for x in site.layers):
            raise CaptureError(
                f"{names} in call {site.ordinal}, {site.call}: fisher='forward-only' is not defined for a scale or "
                "shift of rows that are chosen by values: use another fisher"
            )


def blamed(plan: Plan, number: int) -> contextlib.AbstractContextManager[None]:
    """Errors on rows that are chosen by values name the parameter they are for."""
    site = plan.sites[number]
    if site.chosen is None:
        return contextlib.nullcontext()
    return naming(plan.domain.names[site.layers[0].regions[0].leaf])


def no_rows(site: Site, device: torch.device) -> tuple[Tensor, Tensor]:
    """Operand and output of a call on chosen rows where none is chosen."""
    assert site.chosen is not None
    shapes = (tuple(0 if counts else k for k, counts in shape) for shape in (site.chosen.operand, site.shape))
    operand, output = (
        torch.empty(shape, dtype=dtype, device=device)
        for shape, dtype in zip(shapes, (site.chosen.dtype, site.dtype), strict=True)
    )
    return operand, output


def vectors(run: Pullback, targets: Any, options: Options, generator: torch.Generator | None) -> Iterator[Tensor]:
    """The backpropagated vectors, in stacks that the engine can hold: [K, *outputs.shape]."""
    loss, outputs = options.loss, run.outputs
    if options.fisher == "empirical":
        yield loss.gradient(outputs, targets).unsqueeze(0)
    elif options.fisher == "mc":
        assert generator is not None
        yield from loss.sample(outputs, targets, generator, options.mc_samples).split(run.width)
    else:
        columns = loss.columns(outputs)
        for start in range(0, columns, run.width):
            yield loss.sqrt_hessian(outputs, targets, start, min(start + run.width, columns))


def measure_all(
    model_fn: ModelFn,
    params: Tree,
    data: Batch | DataSet,
    options: Options,
    generator: torch.Generator | None,
    plan: Plan | Plans | None,
    collectors: Collectors | None = None,
    basis: dict[str, Any] | None = None,
) -> Statistics:
    """`measure` over a batch or a whole data set, with one plan for all batches of the same shapes.

    ``collectors`` takes the place of those that the options make.
    """
    check_model(model_fn, params)
    plans = Plans.of(plan)
    total: Statistics | None = None
    for inputs, targets in batches(data):
        known = plans.fitting(model_fn, params, inputs)
        if generator is None and options.fisher == "mc":
            generator = default_generator(params)
        collect = collectors or options.collectors
        statistics = measure(known, model_fn, params, (inputs, targets), options, generator, collect, basis)
        if total is None:
            warn_of_mixing(known)
        total = statistics if total is None else total + statistics
    assert total is not None
    return total


def default_generator(params: Tree) -> torch.Generator:
    """Where targets are drawn from if nobody says where: the same draws at each call."""
    return torch.Generator(flatten(params)[0][0].device).manual_seed(0)
