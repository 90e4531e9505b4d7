"""The choice of how to differentiate a model, and how many vectors at a time, found out by trials on one batch."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, get_args

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from curvlib.capture.engines import ModelFn
from curvlib.errors import ArgumentError, CaptureError, CurvlibError, NonFiniteError
from curvlib.estimators.kinds import Draws, How, Kind, SampledFisher
from curvlib.estimators.linearization import ElementCount, Mode
from curvlib.estimators.probe import Probe, check_used, explained, probe
from curvlib.estimators.running import LeafFn, Leaves, ReplayedDraws, Running, twice_differentiable
from curvlib.linalg.eager import is_eager
from curvlib.pytree import Domain, Tree, flatten

MODES: tuple[Mode, ...] = get_args(Mode)
ELEMENTS_AT_ONCE = 1 << 26  # of intermediate results that may be alive together when vectors are stacked
BLURRED = {torch.float32: 0.03}  # relative differences that rounding may make in deep models; in half precision .3


class DisagreementError(RuntimeError):
    """Products in this mode are not those of the model's gradients."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of curvature of a model on one batch."""

    kind: Kind
    model_fn: ModelFn
    params: Tree
    inputs: Any
    targets: Any
    draws: Draws
    running: Running
    replay: ReplayedDraws

    @property
    def leaves(self) -> Leaves:
        """The parameters' leaves."""
        return flatten(self.params)[0]

    def probed(self) -> tuple[Case, Probe]:
        """Plain derivatives, and the case with what has become known of it: draws, and whether inputs are changed."""
        case = self

        def weigh(outputs: Tensor, u: Tensor) -> Tensor:
            nonlocal case
            case = self.drawn(outputs)
            return self.kind.weigh(outputs, self.targets, case.draws)(u)

        found = probe(self.model_fn, Domain.of(self.params), self.leaves, self.inputs, self.replay, weigh)
        return dataclasses.replace(case, running=dataclasses.replace(self.running, writes=found.writes)), found

    def drawn(self, outputs: Tensor) -> Case:
        """The case with its targets checked, and gradients drawn if they are to be."""
        self.kind.normalizer(outputs, self.targets)
        if not isinstance(self.kind, SampledFisher) or not isinstance(self.draws, torch.Generator):
            return self
        return dataclasses.replace(self, draws=self.kind.vectors(outputs, self.targets, self.draws))

    def function(self) -> LeafFn:
        """The model's outputs as a function of the parameters' leaves."""
        return self.running.on_leaves(self.model_fn, Domain.of(self.params), self.inputs, self.replay)

    def products(self, found: Probe, how: How, count: ElementCount) -> tuple[Leaves, float]:
        """See `Kind.trial`."""
        with twice_differentiable():
            return self.kind.trial(self.function(), self.leaves, self.targets, self.draws, found, how, count)

    def untested(self, how: How, count: ElementCount) -> float:
        """Multiplies zeros, in a trace or a transform, where values cannot be looked at: no difference is found."""
        zeros = [x.new_zeros(how[1], *x.shape) for x in self.leaves]
        with twice_differentiable(), count:
            self.kind.multiply(self.function(), self.leaves, self.targets, self.draws, zeros, how)
        return 0.0

    def in_double(self) -> Case:
        """The same with every floating-point tensor in float64."""

        def double(x: Tensor) -> Tensor:
            return x.double() if x.is_floating_point() else x

        moved = torch_pytree.tree_map_only(Tensor, double, (self.leaves, self.inputs, self.targets, self.draws))
        leaves, inputs, targets, draws = moved
        params = Domain.of(self.params).tree(leaves)
        return dataclasses.replace(self, params=params, inputs=inputs, targets=targets, draws=draws)


def settle(case: Case, mode: Mode | None, *, all_data: bool) -> tuple[Case, Probe | None, Mode, int]:
    """Checks a model on one batch, and finds out how to multiply.

    Args:
        case: the batch.
        mode: to be taken as given; None: forward mode unless it fails.
        all_data: whether there are no other batches.

    Returns:
        The case with what has become known of it, plain derivatives (None where values cannot be looked at), the mode,
        and how many vectors to multiply at a time.

    Raises:
        ArgumentError: an unknown mode.
        CaptureError: the model is not pure, or no mode has products that agree with its gradients.
        UnusedParameterError: the outputs do not depend on a parameter; names it.
        NonFiniteError: a product is infinite or undefined.
        RuntimeError: whatever the model raises in the last resort, reverse mode and one vector at a time.
    """
    if mode is not None and mode not in MODES:
        raise ArgumentError(f"mode must be one of {', '.join(MODES)} or None, got {mode!r}")
    found: Probe | None = None
    if is_eager():
        case, found = case.probed()
        check_used(found, case.model_fn, Domain.of(case.params), case.params, case.inputs, all_data=all_data)
    elif isinstance(case.draws, torch.Generator):
        with twice_differentiable(), torch.no_grad():
            case = case.drawn(case.function()(case.leaves))
    with explained():
        return case, found, *choose(case, found, (mode,) if mode else MODES)


def choose(case: Case, found: Probe | None, modes: tuple[Mode, ...]) -> tuple[Mode, int]:
    """The first mode, and the larger number of vectors, that works; the mode in less doubt if there is some in all."""
    unlike: DisagreementError | NonFiniteError | None = None
    failure: RuntimeError | None = None
    doubtful: list[tuple[float, Mode, int]] = []
    for mode in modes:
        for k in (2, 1):
            count = ElementCount()
            try:
                doubt = case.untested((mode, k), count) if found is None else attempt(case, found, (mode, k), count)
            except torch.OutOfMemoryError:
                raise
            except (DisagreementError, NonFiniteError) as error:
                unlike = error
                break
            except RuntimeError as error:  # no forward mode, no batching rule: NotImplementedError and its bases
                failure = error
                continue
            width = 1 if k == 1 else max(1, ELEMENTS_AT_ONCE // max(1, count.total))
            if not doubt:
                return mode, width
            doubtful.append((doubt, mode, width))
            break
    if doubtful:
        _, mode, width = min(doubtful, key=lambda x: x[0] if x[1] == "forward" else 4 * x[0])
        return mode, width
    if isinstance(unlike, NonFiniteError):
        raise unlike
    if unlike is not None:
        raise CaptureError(
            f"{unlike}: model_fn changes gradients on their way back (a hook, or an autograd function "
            "whose backward is not its derivative), so that no curvature belongs to them: leave that out of model_fn"
            + ("; or use mode='reverse'" if modes == ("forward",) else "")
        ) from failure
    assert failure is not None
    raise failure


@torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable imports the compiler
def attempt(case: Case, found: Probe, how: How, count: ElementCount) -> float:
    """Multiplies, and compares with plain derivatives; in low precision once more in float64 if they differ.

    Returns:
        How large a difference remains that may be rounding, relative to the products; 0 if there is none.

    Raises:
        DisagreementError: they differ by more than that.
        NonFiniteError: a product is infinite or undefined.
        RuntimeError: the model cannot be differentiated so.
    """
    products, difference = case.products(found, how, count)
    check_finite(case, found, products)
    dtype = found.precision
    allowed = torch.finfo(dtype).eps ** 0.5
    if difference <= allowed:
        return 0.0
    if dtype != torch.float64:
        allowed = BLURRED.get(dtype, 0.3)
        with contextlib.suppress(RuntimeError, CurvlibError):  # it may close over tensors of another dtype
            wider, again = case.in_double().probed()
            exactly = wider.products(again, how, ElementCount())[1]
            if again.precision == torch.float64:
                difference = exactly if exactly > torch.finfo(torch.float64).eps ** 0.5 else 0.0
                allowed = 0.0
    if difference > allowed:
        raise DisagreementError(
            f"products with the derivative in {how[0]} mode are not those of the model's gradients (they differ by "
            f"{difference:.1g} of their size)"
        )
    return difference


def check_finite(case: Case, found: Probe, products: Leaves) -> None:
    """Refuses products with an infinite or undefined entry.

    Raises:
        NonFiniteError: names the parameter, and what else is not finite.
    """
    names = Domain.of(case.params).names
    wrong = [name for name, x in zip(names, products, strict=True) if not torch.isfinite(x.sum()).item()]
    if not wrong:
        return
    causes = [f"parameter {name!r}" for name, x in zip(names, case.leaves, strict=True) if not torch.isfinite(x).all()]
    for what, tree in (("the inputs", case.inputs), ("the outputs", found.outputs)):
        tensors = [x for x in torch_pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]
        if not all(torch.isfinite(x).all() for x in tensors):
            causes.append(what)
    if causes or found.outputs.dtype != torch.float16:  # in half precision a product may just be too large
        raise NonFiniteError(
            f"a product with the curvature is inf or nan at parameter {wrong[0]!r}: "
            + (f"inf or nan is in {', '.join(causes)}" if causes else "the model's derivative is not finite there")
        )
