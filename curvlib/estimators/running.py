"""How a model is run so that its derivatives can be taken more than once: with the same calls, and the same draws.

Forward mode, reverse mode and a plain call must see one and the same function. So the model runs by formulas that can
be differentiated twice, blocks without gradients stop tangents too, and each run draws the same random numbers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from curvlib.capture.engines import ModelFn
from curvlib.errors import CaptureError, DtypeError
from curvlib.functional import one_of_several
from curvlib.gradients.data import own_generators
from curvlib.linalg.eager import differentiable, uncompiled
from curvlib.pytree import Domain

Leaves = list[Tensor]
LeafFn = Callable[[Leaves], Tensor]


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Surroundings in which a model runs as it was written, with calls that have all derivatives.

    Attention runs by its formula: the fused kernels have no forward mode and can be differentiated once only. Gradients
    are recorded, whatever surrounds the caller.
    """
    with differentiable(), uncompiled(), sdpa_kernel(SDPBackend.MATH):
        yield


class Formulas(TorchFunctionMode):
    """Makes a model's calls have the same derivative in forward mode as in reverse mode.

    Under a transform nothing flows through what is computed where gradients are disabled, or through padding of
    embeddings: forward mode alone would carry tangents there. Embeddings have dense gradients, and calls whose kernels
    lack a derivative run by their formulas. That a mode is active keeps modules of attention off their path for
    inference, which has no derivative.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rewrite = REWRITES.get(func)
        result = func(*args, **kwargs) if rewrite is None else rewrite(*args, **kwargs)
        if torch.is_grad_enabled() or not transformed():
            return result
        return stopped(result, (args, kwargs))


def transformed() -> bool:
    """Whether a `torch.func` transform is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def stopped(result: Any, operands: Any) -> Any:
    """A result through which no derivative flows; what was written in place is still what it was."""
    if not isinstance(result, (Tensor, tuple, list)) or isinstance(result, torch.Size):
        return result
    written = [x for x in torch_pytree.tree_leaves(operands) if isinstance(x, Tensor)]
    return torch_pytree.tree_map_only(Tensor, lambda x: x if any(x is y for y in written) else x.detach(), result)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding` with the same derivative in forward and in reverse mode."""
    check_table("embedding", max_norm, scale_grad_by_freq)
    rows = F.embedding(input, weight, padding_idx)
    if padding_idx is None or not transformed():
        return rows
    padded = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padded, rows.detach(), rows)


def embedding_bag(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.embedding_bag` by its formula: sums of rows, which have all derivatives.

    Raises:
        CaptureError: the largest entries are taken.
    """
    call = inspect.signature(F.embedding_bag).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    check_table("embedding_bag", given["max_norm"], given["scale_grad_by_freq"])
    if given["mode"] == "max":
        raise CaptureError("embedding_bag(mode='max') cannot be differentiated twice: use embedding(...).amax(1)")
    indices, table, offsets = given["input"], given["weight"], given["offsets"]
    if indices.ndim == 2:
        offsets = indices.shape[1] * torch.arange(len(indices), device=indices.device)
    elif given["include_last_offset"]:
        offsets = offsets[:-1]
    flat = indices.reshape(-1)
    bag = torch.searchsorted(offsets, torch.arange(len(flat), device=flat.device, dtype=offsets.dtype), right=True) - 1
    weights = table.new_ones(len(flat))
    if given["padding_idx"] is not None:
        weights = (flat != given["padding_idx"] % len(table)).to(table.dtype)
    counts = table.new_zeros(len(offsets)).index_add(0, bag, weights)
    if given["per_sample_weights"] is not None:
        weights = weights * given["per_sample_weights"].reshape(-1)
    rows = F.embedding(flat, table) * weights.unsqueeze(1)
    sums = rows.new_zeros(len(offsets), table.shape[1]).index_add(0, bag, rows)
    return sums / counts.clamp(min=1).unsqueeze(1) if given["mode"] == "mean" else sums


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm` by its formula: the second derivative of torch's kernel is wrong."""
    if dim == -1:  # one norm of the whole
        return v * (g / v.norm())
    others = [axis for axis in range(v.ndim) if axis != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def check_table(name: str, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    """Refuses options of embeddings with which a model is no function, or has no derivative.

    Raises:
        CaptureError: such an option.
    """
    if max_norm is not None:
        raise CaptureError(
            f"{name}(max_norm={max_norm}) changes its weight in place; model_fn must be pure: scale the rows once, "
            "with torch.embedding_renorm_, and leave out max_norm"
        )
    if scale_grad_by_freq:
        raise CaptureError(
            f"{name}(scale_grad_by_freq=True) gives gradients that are not those of its outputs, and depend on the "
            "other examples of the batch: leave it out"
        )


REWRITES: dict[Any, Callable[..., Any]] = {
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    torch._weight_norm: weight_norm,
}


# --- random numbers -------------------------------------------------------------------------------------------------


class ReplayedDraws:
    """Lets every run of a model on one batch draw the same numbers, and leaves torch's generators as they were.

    Args:
        generators: what numbers are drawn from.
        start: their states, where the walk through the data starts.
    """

    def __init__(self, generators: Sequence[torch.Generator], start: Sequence[Tensor]) -> None:
        self.generators = generators
        self.batch, self.after = start, start

    def states(self) -> list[Tensor]:
        """The generators' present states."""
        return [generator.get_state() for generator in self.generators]

    def turn(self, states: Sequence[Tensor]) -> None:
        """Sets the generators' states."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    @contextlib.contextmanager
    def isolated(self) -> Iterator[None]:
        """Surrounds a walk."""
        before = self.states()
        try:
            self.turn(self.batch)
            yield
        finally:
            self.turn(before)

    def begin(self) -> None:
        """Notes where the runs on the next batch start: behind what the loader has drawn."""
        self.batch = self.states()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Surrounds one run of the model."""
        self.turn(self.batch)
        yield
        self.after = self.states()

    def end(self) -> None:
        """Goes on behind the batch, wherever derivatives have left the generators."""
        self.turn(self.after)


def global_generators(leaves: Leaves) -> list[torch.Generator]:
    """The generators that calls draw from if they are not told another, of the CPU and of the tensors' devices."""
    devices = sorted({(x.device.type, x.device.index or 0) for x in leaves if x.device.type in ("cuda", "xpu")})
    return [torch.default_generator, *(getattr(torch, kind).default_generators[number] for kind, number in devices)]


@dataclass(frozen=True)
class Running:
    """How a model is run in every product: static for transforms, and it can be pickled.

    Args:
        start: the states of the generators when the operator was made, from which each product draws.
        writes: the model changes its inputs in place, and is given copies.
    """

    start: tuple[bytes, ...] = ()
    writes: bool = False

    @classmethod
    def now(cls, leaves: Leaves, loader: Any = None) -> Running:
        """The present states of the generators of a model and a loader."""
        generators = [*global_generators(leaves), *own_generators(loader)]
        return cls(tuple(bytes(generator.get_state().tolist()) for generator in generators))

    def replay(self, leaves: Leaves, loader: Any = None) -> ReplayedDraws:
        """A walk from the start. In a trace, and under dispatch modes, numbers are drawn as ever."""
        if not self.start or torch.compiler.is_compiling() or _get_current_dispatch_mode_stack():
            return ReplayedDraws([], [])
        states = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.start]
        return ReplayedDraws([*global_generators(leaves), *own_generators(loader)], states)

    def on_leaves(self, model_fn: ModelFn, domain: Domain, inputs: Any, replay: ReplayedDraws) -> LeafFn:
        """The model's output as a function of the parameters' leaves."""
        given, structure = torch_pytree.tree_flatten(inputs)  # the model may change the containers too

        def outputs(leaves: Leaves) -> Tensor:
            copies = [x.clone() if isinstance(x, Tensor) else x for x in given] if self.writes else list(given)
            with replay.run(), Formulas():
                result = model_fn(domain.tree(leaves), torch_pytree.tree_unflatten(copies, structure))
            return one_tensor(result)

        return outputs


def one_tensor(result: Any) -> Tensor:
    """What a model returns, if that is one floating-point tensor.

    Raises:
        CaptureError, DtypeError: it is not.
    """
    if not isinstance(result, Tensor):
        raise CaptureError(one_of_several(result))
    if not result.is_floating_point():
        raise DtypeError(f"model_fn must return a floating-point tensor, got {result.dtype}")
    return result
