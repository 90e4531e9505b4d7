"""`plan`: the public door to discovery, and the order in which runs are tried."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from curvlib import containers
from curvlib.arguments import check_model
from curvlib.capture.aliases import parameters
from curvlib.capture.blocks import assign, split_lone_biases
from curvlib.capture.discover import Discover
from curvlib.capture.examples import Examples
from curvlib.capture.flow import FakeRun, RealRun
from curvlib.capture.independence import mixed_by_values
from curvlib.capture.plan import Plan, Site, shape_text
from curvlib.capture.routing import loosened, nothing_saved
from curvlib.errors import (
    BatchAxisError,
    CaptureError,
    CurvlibError,
    EmptyBatchError,
    UnusedParameterError,
)
from curvlib.functional import one_of_several
from curvlib.linalg.eager import differentiable, is_eager, own_draws, uncompiled
from curvlib.pytree import Domain, Tree, flatten

ModelFn = Callable[[Any, Any], Any]

READ = (
    "read its first argument (it uses no parameter at all, or none outside of torch.vmap, inside of which uses cannot "
    "be seen: call it on the whole batch)"
)
PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)


def plan(model_fn: ModelFn, params: Tree, inputs: Any) -> Plan:
    """Finds out which call uses which parameter, and as what, without computing anything.

    The model runs once on fake tensors. If it chooses rows by values (the tokens that are routed to an expert), by
    `nonzero`, `where` or a mask as an index, they are rows of unknown number. A model whose control flow depends on
    values in other ways runs on a copy of its parameters instead.

    Args:
        model_fn: pure function (params, inputs) -> outputs [N, ...].
        params: pytree of floating-point tensors; every one must be used.
        inputs: pytree, passed on as it is; the first axis of its tensors counts the N examples.

    Returns:
        The plan; ``print`` shows it as a table.

    Raises:
        CaptureError: a parameter is used by a call that is not understood; names both.
        UnusedParameterError: a parameter is never used; names it.
        EmptyBatchError: the inputs hold no example.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> print(cv.plan(model_fn, params, torch.zeros(5, 3)))
        call      output  parameters    as
        --------  ------  ------------  -----------------
        0 linear  [N, 2]  weight, bias  linear 3 + 1 -> 2
        2 parameters in 1 of 1 known calls, 1 blocks; output [N, 2]
    """
    check_model(model_fn, params, valued=False)
    domain = Domain.of(params)
    leaves, _ = flatten(params)
    tensors = [tensor for tensor in containers.tensors_in(inputs) if tensor.ndim]
    number = int(tensors[0].shape[0]) if tensors else 1
    if any(tensor.numel() == 0 for tensor in tensors):
        raise EmptyBatchError("the batch is empty: a tensor of inputs has no element")
    prime, chosen = unused_primes(
        [*domain.shapes, *(tuple(map(int, t.shape[int(t.shape[0]) == number :])) for t in tensors)]
    )
    counting = [tensor for tensor in tensors if tensor.shape[0] == number]
    marked = Examples(prime, marked=True)
    runs = [(marked, counting, True), (Examples(prime, marked=True, chosen=chosen), counting, True)]
    # a tensor that all examples share may be as long as the batch is large: it does not count them
    runs += [(marked, [x for x in counting if x is not shared], True) for shared in counting[1:]]
    runs.append((Examples(number, marked=False), counting, True))
    if is_eager():
        runs.append((Examples(number, marked=False), counting, False))
    failure: Exception | None = None
    for examples, counting, fake in runs:
        with outside_transforms(), quiet():
            try:
                found = discover(model_fn, domain, leaves, (inputs, counting), examples, fake=fake)
            except CurvlibError:
                raise
            except Exception as error:  # a model may refuse fake tensors in any way; the last run is a real one
                failure = error
                continue
        if examples.marked:
            return found
        mixed = mixed_by_values(model_fn, params, inputs, number)
        for site in found.sites:
            if mixed is not None and site.expanded:
                raise BatchAxisError(
                    f"{named(domain, site)} in call {site.ordinal}, {site.call}: the output has no axis that counts "
                    f"examples, and {mixed}: give model_fn inputs with the examples in front and transpose inside"
                )
        return dataclasses.replace(found, mixed=mixed)
    assert failure is not None
    raise failure


def discover(
    model_fn: ModelFn,
    domain: Domain,
    leaves: list[Tensor],
    batch: tuple[Any, list[Tensor]],
    examples: Examples,
    *,
    fake: bool,
) -> Plan:
    """Runs the model; the output of a site without an axis of examples (a table of positions, say) is given one.

    Per-example gradients exist there only then. It must not change what the model computes: if it fails, and the
    model runs without it, that is an error that names the site.
    """
    mode = Discover(domain, leaves, examples, expand=True)
    try:
        outputs = run(model_fn, mode, batch, fake=fake)
        check_outputs(outputs, examples)
        if mode.expanded and not examples.marked:  # the axis of examples may be none but the one that a site was given
            plain = Discover(domain, leaves, examples, expand=False)
            check_outputs(run(model_fn, plain, batch, fake=fake), examples)
    except Exception as error:
        if isinstance(error, CurvlibError) and not isinstance(error, BatchAxisError):
            if mode.follows_branches:
                raise GuessError from error
            raise
        if not mode.expanded:
            raise
        plain = Discover(domain, leaves, examples, expand=False)
        check_outputs(run(model_fn, plain, batch, fake=fake), examples)
        lonely = [f"{named(domain, site)} in call {site.ordinal}, {site.call}" for site in plain.sites if site.expanded]
        raise CaptureError(
            f"{', '.join(lonely)}: the output has no axis that counts examples, and giving it one breaks the "
            f"model: {error}"
            + (
                ""
                if examples.marked
                else "; rows that are chosen by values are followed if nonzero, where or a mask "
                "as an index chooses them"
            )
        ) from error
    if mode.follows_branches:
        raise GuessError
    found, routes = mode.settled(outputs)
    mixed = mode.flow.content(outputs)
    sites = split_lone_biases(found)
    used = {region.leaf for site in sites for layer in site.layers for region in layer.regions}
    unused = [leaf for leaf in range(len(domain.names)) if leaf not in used]
    if unused:
        raise UnusedParameterError(
            f"the model never uses {parameters(domain, unused)}: leave out of params what it does not use"
            + ("" if used else f", or make model_fn {READ}")
        )
    blocks = assign(domain, sites)
    sites = loosened(domain, sites, blocks)
    if not any(site.reaches for site in sites):
        raise CaptureError(
            f"no gradient of the outputs reaches {parameters(domain, sorted(used))}: somewhere between them model_fn "
            "detaches, runs without gradients (torch.no_grad, torch.inference_mode), or takes integers (argmax)"
        )
    return Plan(
        domain,
        tuple(sites),
        blocks,
        mode.calls,
        examples.sizes(outputs),
        static=fake,
        routes=routes,
        mixed=mode.hooked if mixed is None or mixed.mixed is None else mixed.mixed,
        writes_inputs=mode.flow.writes_inputs,
        unbatched=mode.flow.unbatched,
    )


class GuessError(Exception):
    """Values were guessed that no row depends on that is chosen; another way to run the model knows them."""


def check_outputs(outputs: Any, examples: Examples) -> None:
    """A model returns one tensor, whose first axis counts the examples."""
    if not isinstance(outputs, Tensor):
        raise CaptureError(one_of_several(outputs))
    if outputs.ndim == 0 or outputs.shape[0] != examples.number:
        raise BatchAxisError(
            "model_fn must return outputs whose first axis counts the examples, as the first axis of the first tensor "
            f"of the inputs does, got the shape {shape_text(examples.sizes(outputs))} for N examples: if the examples "
            "are on another axis (time first, say), give model_fn inputs with the examples in front and transpose "
            "inside; put what has no row for each example (a table, a mask of positions) after it, or close over it in "
            "model_fn"
        )


def named(domain: Domain, site: Site) -> str:
    """The parameters that a site uses, for messages."""
    return parameters(domain, dict.fromkeys(region.leaf for layer in site.layers for region in layer.regions))


def run(model_fn: ModelFn, mode: Discover, batch: tuple[Any, list[Tensor]], *, fake: bool) -> Any:
    """Runs the model under `Discover`, on fake inputs or on the real ones, with stand-ins for the parameters.

    The batch is the inputs, and those of their tensors whose first axis counts examples.
    """
    inputs, counting = batch
    domain, examples = mode.domain, mode.examples
    with contextlib.ExitStack() as stack:
        stack.enter_context(differentiable())  # gradients tell which uses of a parameter carry one
        stack.enter_context(uncompiled())

        def stand_in(x: Tensor) -> Tensor:
            if not fake:
                return x.detach().clone(memory_format=torch.contiguous_format)
            shape = tuple(map(int, x.shape))
            shape = (examples.number, *shape[1:]) if any(x is y for y in counting) else shape
            return FakeTensor(fake_run, torch.empty(shape, dtype=x.dtype, device="meta"), x.device)

        fake_run = FakeRun(mode.flow)
        if not fake:
            stack.enter_context(own_draws(mode.originals))
            stack.enter_context(nothing_saved())
        inputs = containers.map_tensors(stand_in, inputs)
        stand_ins = [stand_in(x).requires_grad_() for x in mode.originals]
        mode.follow(stand_ins, inputs)
        stack.enter_context(fake_run if fake else RealRun(mode.flow))
        stack.enter_context(mode)
        return model_fn(domain.tree(stand_ins), inputs)


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Suspends torch.func transforms and tracing: a plan depends on shapes alone."""
    with temporarily_clear_interpreter_stack(), disable_proxy_modes_tracing(), unset_fake_temporarily():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch from logging errors that a fake run raises: they are caught, or raised again."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def unused_primes(shapes: list[tuple[int, ...]]) -> list[int]:
    """Two primes that divide no size among these shapes."""
    sizes = {size for shape in shapes for size in shape}
    return [prime for prime in PRIMES if not any(size and size % prime == 0 for size in sizes)][:2]
