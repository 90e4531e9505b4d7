"""One plain forward and backward pass through a model: what its derivatives agree with, and what it must not do."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlib.capture import plan
from curvlib.capture.engines import ModelFn
from curvlib.errors import CaptureError, EmptyBatchError, UnusedParameterError
from curvlib.estimators.linearization import gradient
from curvlib.estimators.running import Formulas, LeafFn, Leaves, ReplayedDraws, one_tensor, twice_differentiable
from curvlib.pytree import Domain

Weigh = Callable[[Tensor, Tensor], Tensor]  # (outputs, u) -> u, as it is pulled back in a product


@dataclass(frozen=True)
class Probe:
    """What plain reverse mode gives.

    Attributes:
        outputs: of the model.
        cotangent: a random vector u in the space of outputs.
        gradient: J^T u by leaf; None where the outputs do not depend on the parameter.
        tangents: two random vectors of the parameters, leaves [2, *shape].
        writes: the model has changed its inputs in place.
        draws: it has drawn random numbers.
        precision: the narrowest floating dtype that it has computed in.
    """

    outputs: Tensor
    cotangent: Tensor
    gradient: list[Tensor | None]
    tangents: Leaves
    writes: bool
    draws: bool
    precision: torch.dtype


@torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable imports the compiler
def probe(
    model_fn: ModelFn, domain: Domain, leaves: Leaves, inputs: Any, replay: ReplayedDraws, weigh: Weigh | None = None
) -> Probe:
    """Runs the model on copies of everything, and pulls a random vector back.

    Args:
        model_fn: pure function (params, inputs) -> outputs.
        domain: of the parameters.
        leaves: the parameters.
        inputs: a pytree.
        replay: the numbers that the model draws.
        weigh: how a product weighs what it pulls back; it checks the outputs. None: not at all.

    Raises:
        CaptureError: the model changes parameters in place, or gives other outputs each time it is called.
        EmptyBatchError: a tensor of the inputs, or the outputs, have no element.
    """
    if any(x.numel() == 0 for x in tensors(inputs) if x.ndim):
        raise EmptyBatchError("the batch is empty: a tensor of inputs has no element")
    roots = [leaf.detach().requires_grad_() for leaf in leaves]
    with twice_differentiable(), explained():
        copies = [root.clone() for root in roots]
        given = torch_pytree.tree_map_only(Tensor, torch.clone, inputs)
        watched = [(x, y) for x, y in zip(*map(tensors, (given, inputs)), strict=True)]
        with replay.run(), only_torch_draws(), Formulas(), Precision(leaves) as precision:
            value = one_tensor(model_fn(domain.tree(copies), given))
        pairs = zip(domain.names, copies, roots, strict=True)
        written = [name for name, copy, root in pairs if changed(copy, root)]
        if written:
            raise CaptureError(
                f"the model changes {', '.join(map(repr, written))} in place; model_fn must be pure: let it work on a "
                "copy, .clone()"
            )
        draws = any(not torch.equal(a, b) for a, b in zip(replay.batch, replay.after, strict=True))
        outputs = value.detach()
        check_repeats(model_fn, domain, leaves, inputs, replay, outputs)
        if outputs.numel() == 0:
            raise EmptyBatchError(f"the batch is empty: model_fn returned a tensor of shape {tuple(outputs.shape)}")
        cotangent = normal(outputs, seed=0)
        if weigh is not None:
            cotangent = weigh(outputs, cotangent).detach()
            cotangent = cotangent * (outputs.numel() ** 0.5 / cotangent.norm().clamp_min(torch.finfo(value.dtype).tiny))
        pulled: list[Tensor | None] = [None] * len(roots)
        if value.requires_grad:
            pulled = list(torch.autograd.grad(value, roots, cotangent, retain_graph=True, allow_unused=True))
            check_linear(value, roots, cotangent, pulled)
    tangents = [normal(leaf, 2, seed=number + 1) for number, leaf in enumerate(leaves)]
    writes = any(changed(x, y) for x, y in watched)
    return Probe(outputs, cotangent, pulled, tangents, writes, draws, precision.narrowest)


class Precision(TorchFunctionMode):
    """Notes the narrowest floating dtype among tensors and the results of all calls."""

    def __init__(self, leaves: Leaves) -> None:
        super().__init__()
        self.narrowest = torch.float64
        self.note(leaves)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, results: Any) -> None:
        """Takes tensors into account."""
        for x in tensors(results):
            if x.is_floating_point() and torch.finfo(x.dtype).eps > torch.finfo(self.narrowest).eps:
                self.narrowest = x.dtype


def tensors(tree: Any) -> list[Tensor]:
    """The leaves that are tensors."""
    return [x for x in torch_pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def changed(copy: Tensor, original: Tensor) -> bool:
    """Whether a copy has been written to; what is written by way of ``.data`` leaves no other trace than its values."""
    if copy._version or torch.equal(copy, original):
        return copy._version > 0
    nan = (copy != copy) & (original != original)  # not equal to itself
    return not bool(((copy == original) | nan).all())


def check_linear(value: Tensor, roots: Leaves, cotangent: Tensor, pulled: list[Tensor | None]) -> None:
    """Refuses a model whose backward pass is not linear, as where hooks clip gradients.

    A multiple by a power of two is pulled back: rounding makes no difference. Half precision may overflow, which is
    left alone.

    Raises:
        CaptureError: the backward pass is not linear.
    """
    factor = 16.0 if value.dtype == torch.float16 else 2.0**20
    larger = torch.autograd.grad(value, roots, factor * cotangent, allow_unused=True)
    pairs = [(g, h / factor) for g, h in zip(pulled, larger, strict=True) if g is not None and h is not None]
    difference = torch.stack([(g - h).norm() for g, h in pairs]).norm() if pairs else torch.zeros(())
    if torch.isfinite(difference) and difference > 1e-3 * torch.stack([g.norm() for g, _ in pairs]).norm():
        raise CaptureError(
            "the model changes gradients on their way back, and not linearly (a hook that clips or normalizes them): "
            "no curvature belongs to such gradients; leave that out of model_fn"
        )


def normal(like: Tensor, *stack: int, seed: int) -> Tensor:
    """Normal numbers [*stack, *like.shape], the same in every dtype; the global generator is left alone."""
    generator = torch.Generator(like.device).manual_seed(seed)
    single = torch.randn((*stack, *like.shape), generator=generator, device=like.device)
    return single.to(like.dtype)


def check_repeats(
    model_fn: ModelFn, domain: Domain, leaves: Leaves, inputs: Any, replay: ReplayedDraws, outputs: Tensor
) -> None:
    """Refuses a model that gives other outputs when it is called again with the same draws.

    Raises:
        CaptureError: it does.
    """
    copies, given = torch_pytree.tree_map_only(Tensor, torch.clone, (leaves, inputs))
    with torch.no_grad(), replay.run(), Formulas():
        again = one_tensor(model_fn(domain.tree(copies), given))
    difference = (again - outputs if again.shape == outputs.shape else outputs).nan_to_num(posinf=0, neginf=0)
    finite = outputs.nan_to_num(posinf=0, neginf=0)
    if difference.norm() > torch.finfo(outputs.dtype).eps ** 0.5 * finite.norm():
        raise CaptureError(
            "the model gives other outputs when it is called again; model_fn must be pure: let it draw random numbers "
            "from torch's global generator, which is replayed, and neither count calls nor keep what it has computed"
        )


@contextlib.contextmanager
def only_torch_draws() -> Iterator[None]:
    """Refuses a model that draws from the generators of Python or NumPy, and leaves these as they were.

    Raises:
        CaptureError: it does.
    """
    numpy: Any = sys.modules.get("numpy")
    generators: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "random": (random.getstate, random.setstate)
    }
    if numpy is not None:
        generators["numpy.random"] = (lambda: numpy.random.get_state(legacy=False), numpy.random.set_state)
    before = {name: read() for name, (read, _) in generators.items()}
    try:
        yield
        drawn = [name for name, (read, _) in generators.items() if pickle.dumps(read()) != pickle.dumps(before[name])]
    finally:
        for name, (_, write) in generators.items():
            write(before[name])
    if drawn:
        raise CaptureError(
            f"the model draws from the global generator of {' and '.join(drawn)}, anew in each product: let it draw "
            "from torch's, which is replayed, or give it the numbers as inputs"
        )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says what to do about an error that comes of a tensor made in inference mode.

    Raises:
        CaptureError: model_fn closes over such a tensor.
    """
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise CaptureError(
            "model_fn uses a tensor that was made in torch.inference_mode, through which no gradient can be taken: "
            "make it outside, or give model_fn its .clone(), made outside"
        ) from error


def check_used(found: Probe, model_fn: ModelFn, domain: Domain, params: Any, inputs: Any, *, all_data: bool) -> None:
    """Refuses parameters that the outputs do not depend on, unless a plan knows where other values would use them.

    Args:
        found: on this batch.
        model_fn: the model.
        domain: of the parameters.
        params: the parameters.
        inputs: of the batch.
        all_data: whether there are no other batches.

    Raises:
        UnusedParameterError: names them.
    """
    pairs = zip(domain.names, domain.shapes, found.gradient, strict=True)
    unused = [name for name, shape, g in pairs if g is None and 0 not in shape]
    if not unused:
        return
    try:
        plan(model_fn, params, inputs)
    except UnusedParameterError:
        raise
    except Exception as error:  # a model that capture does not follow
        if all_data:
            raise UnusedParameterError(
                f"the outputs do not depend on {', '.join(map(repr, unused))}: leave out of params what the model does "
                "not use, by closing over it"
            ) from error


# --- how far derivatives are from those of the plain pass -----------------------------------------------------------


def jacobian_disagreement(found: Probe, images: Tensor, pull: Callable[[Tensor], Leaves]) -> float:
    """How far J v and J^T u are from being one map and its transpose, that of plain reverse mode, relative to both.

    <u, J v> = <J^T u, v> is compared with the size that rounding errors of such sums have.
    """
    pairs = zip(found.tangents, found.gradient, strict=True)
    gradients = [torch.zeros_like(v[0]) if g is None else g for v, g in pairs]
    floor = torch.finfo(found.precision).eps * 100 * float(nonzero(found.cotangent, found.outputs).norm().detach())
    worst = 0.0
    for number, image in enumerate(images):
        there = nonzero(found.cotangent, image)
        back = torch.cat([(g * v[number]).flatten() for g, v in zip(gradients, found.tangents, strict=True)])
        worst = max(worst, ratio(there.sum() - back.sum(), there.norm() + back.norm(), floor))
    pulled = pull(found.cotangent)
    difference = torch.stack([(p - g).norm() for p, g in zip(pulled, gradients, strict=True)]).norm()
    return max(worst, ratio(difference, torch.stack([g.norm() for g in gradients]).norm(), floor))


def hessian_disagreement(tangents: Leaves, products: Leaves, gradient: Leaves, expected: Leaves | None) -> float:
    """How far H is from being symmetric, and H v from what plain reverse mode gives, relative to both."""
    first, second = (
        torch.cat([(v[i] * h[1 - i]).flatten() for v, h in zip(tangents, products, strict=True)]) for i in (0, 1)
    )
    size = torch.stack([g.norm() for g in gradient]).norm()
    floor = torch.finfo(size.dtype).eps * 100 * float(size.detach())
    worst = ratio(first.sum() - second.sum(), first.norm() + second.norm(), floor)
    if expected is None:
        return worst
    difference = torch.stack([(h - e).norm() for h, e in zip(products, expected, strict=True)]).norm()
    return max(worst, ratio(difference, torch.stack([e.norm() for e in expected]).norm(), floor))


def nonzero(u: Tensor, image: Tensor) -> Tensor:
    """The products u * image, zero where u is: images may be undefined where no target counts."""
    return torch.where(u == 0, 0, u * image)


def ratio(difference: Tensor, size: Tensor, floor: float) -> float:
    """The relative size of a difference; 0 for one that is undefined or below the floor."""
    value = float(difference.detach().abs())
    return value / (float(size.detach()) + floor) if value > floor else 0.0


def hessian_by_autograd(objective: LeafFn, leaves: Leaves, tangents: Leaves) -> tuple[Leaves, Leaves | None]:
    """The gradient, and H v for stacked tangents by plain autograd, None where the backward pass has no derivative."""
    roots = [leaf.detach().requires_grad_() for leaf in leaves]
    value = objective(roots)
    try:
        gradients = gradient([value], roots, [torch.ones_like(value)], create_graph=True)
        each = [gradient(gradients, roots, [v[i] for v in tangents]) for i in range(len(tangents[0]))]
    except RuntimeError:
        return gradient([objective(roots)], roots, [torch.ones_like(value)]), None
    return [g.detach() for g in gradients], [torch.stack(rows) for rows in zip(*each, strict=True)]
