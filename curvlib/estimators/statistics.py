"""Sums over the data from which curvature is made: what is measured on a batch, and added over batches."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec, Protocol, Self

import torch
from torch import Tensor

from curvlib.capture import Plan
from curvlib.capture.aliases import tensors_in
from curvlib.capture.engines import Pullback
from curvlib.capture.plan import Block, Placement
from curvlib.errors import ArgumentError, CaptureError, NonFiniteError, naming
from curvlib.layers.base import Layer
from curvlib.layers.wide import Wide, WideDiagonal
from curvlib.linalg.eager import is_eager, may_look_at
from curvlib.losses import Loss, check_loss
from curvlib.operators import BlockDiagonal, Operator
from curvlib.pytree import Domain, flatten, register, static

FISHERS = ("type-2", "mc", "empirical", "forward-only")


@dataclasses.dataclass(frozen=True)
class Options(ABC):
    """What an estimator was asked for; it makes the collectors that measure, and the blocks of what they measured.

    Attributes: as for `kfac`. The engine makes no difference to what is measured.
    """

    estimator: ClassVar[str]

    loss: Loss
    fisher: str = "mc"
    sharing: str = "expand"
    mc_samples: int = 1
    elementwise: str = "diagonal"
    tied: str = "sum"
    wide: Wide = WideDiagonal()  # noqa: RUF009 (immutable)
    engine: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_loss(self.loss)
        allowed = {
            "fisher": FISHERS,
            "sharing": ("expand", "reduce"),
            "elementwise": ("diagonal", "dense"),
            "tied": ("sum", "merge"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ArgumentError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if (self.elementwise, self.fisher) == ("dense", "forward-only"):
            raise ArgumentError("elementwise='dense' needs backpropagated vectors; fisher='forward-only' has none")
        if self.mc_samples < 1:
            raise ArgumentError(f"mc_samples must be at least 1, got {self.mc_samples}")

    @abstractmethod
    def collectors(self, now: Pass) -> tuple[Collector | None, Collector | None]:
        """The collectors of Kronecker and of elementwise blocks; None leaves such blocks out."""

    @abstractmethod
    def block(self, block: Block, statistics: Statistics, *, reuse: bool) -> Operator:
        """A block of the curvature of the reduced objective; ``reuse``: the memory of the sums is free."""


Collectors = Callable[["Pass"], "tuple[Collector | None, Collector | None]"]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One batch going through the model: what the collectors of its measurements need to know."""

    plan: Plan
    options: Options
    examples: int
    mask: Tensor | None
    dtype: torch.dtype
    basis: dict[str, Any] | None = None


class Summand(Protocol):
    """What is measured for a block: a registered pytree that adds up over batches, and can be times a number."""

    def __add__(self, other: Self, /) -> Self:
        """The sum over both batches."""


class Collector(ABC):
    """Takes what flows through the layers in one pass, and makes one summand a block of it.

    Attributes:
        needs_examples: whether it measures gradients of single examples, which must not depend on each other.
    """

    needs_examples: ClassVar[bool] = True

    @abstractmethod
    def record(self, placement: Placement, layer: Layer, operand: Tensor | None, z: Tensor) -> Any:
        """What is to be kept of a layer's input: a pytree of tensors, or None."""

    @abstractmethod
    def consume(self, placement: Placement, layer: Layer, kept: Any, g: Tensor) -> None:
        """Takes gradients g [K, *z.shape] of a layer's output, with what was kept there."""

    @abstractmethod
    def sums(self, block: Block, run: Pullback) -> Summand:
        """The summand of a block, once everything has been pulled back."""


@register
class Statistics:
    """What an estimator measured: sums over examples, of which a curvature is made.

    Statistics add up over batches, ``sum([a, b])`` being those of both together, whatever their sizes. A number times
    statistics is what a batch of that weight holds; the number of examples is weighted alike, so that a moving average
    ``0.95 * a + 0.05 * b`` from nothing has no bias to correct for a mean loss. They are pytrees, may be saved and
    loaded, and reduced over devices tensor by tensor, but for the nonlinear sums of `WideLowRank` and of `ekfac` in
    one pass.

    Attributes:
        sums: by the name of a block that was measured.
        normalizer: what the loss's mean divides by, or for forward-only the number of its terms; 0-d, added up.
        examples: N, 0-d.
        basis: for an estimator that measures in a given basis: by block, what was given.
        blocks: the blocks of the plan.
        domain: structure, names and shapes of the parameters.
        options: what the estimator was asked for.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> parts = [cv.kfac.measure(model_fn, params, (x[i], y[i]), fisher="type-2") for i in ([0, 1], [2, 3, 4])]
        >>> curv, joint = sum(parts).curvature(), cv.kfac(model_fn, params, (x, y), fisher="type-2")
        >>> torch.allclose(curv.to_dense(), joint.to_dense())
        True
        >>> parts[0]
        Statistics of cv.kfac: 92 bytes
        block   sums     shapes              dtype
        weight  UseSums  [4, 4], [], [2, 2]  float32
    """

    sums: dict[str, Any]
    normalizer: Tensor
    examples: Tensor
    basis: dict[str, Any] | None
    blocks: tuple[Block, ...] = static()
    domain: Domain = static()
    options: Options = static()

    def curvature(self) -> BlockDiagonal:
        """The curvature that the estimator makes of the sums.

        Raises:
            NonFiniteError: a block is not finite; names it.
        """
        return assemble(self)

    def divisor(self) -> Tensor:
        """What sums over backpropagated vectors are divided by for the curvature of the reduced objective.

        With G = I (forward-only), a mean needs no division, and a sum is as many means as the loss has terms.
        """
        one = torch.ones_like(self.normalizer)
        if self.options.fisher == "forward-only":
            return one if self.options.loss.reduction == "mean" else 1 / self.normalizer
        return one if self.options.loss.reduction == "sum" else self.normalizer

    def __add__(self, other: Statistics) -> Statistics:
        """Those of the examples of both.

        Raises:
            ArgumentError: the estimators, their options or their bases differ.
            CaptureError: the models do not use the same parameters in the same way.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        check_one_kind(self, other)
        return dataclasses.replace(
            self,
            sums={name: mine + other.sums[name] for name, mine in self.sums.items()},
            normalizer=self.normalizer + other.normalizer,
            examples=self.examples + other.examples,
        )

    def __radd__(self, other: int) -> Statistics:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # what `sum` begins with

    def __mul__(self, weight: float | Tensor) -> Statistics:
        """Those of examples of this weight.

        Raises:
            ArgumentError: no number or 0-d tensor; or a negative one, and what was measured is kept as rows or pairs.
        """
        if not isinstance(weight, (int, float, Tensor)) or (isinstance(weight, Tensor) and weight.ndim):
            raise ArgumentError("statistics can be multiplied by a number or a 0-d tensor only")
        weight = weight.to(self.normalizer) if isinstance(weight, Tensor) else weight
        return dataclasses.replace(
            self,
            sums={name: mine * weight for name, mine in self.sums.items()},
            normalizer=self.normalizer * weight,
            examples=self.examples * weight,
        )

    def __rmul__(self, weight: float | Tensor) -> Statistics:
        return self * weight

    def __sub__(self, other: Statistics) -> Statistics:
        return self + -1 * other

    def __repr__(self) -> str:
        rows = [("block", "sums", "shapes", "dtype")]
        for name, sums in self.sums.items():
            tensors = flatten(sums)[0]
            shapes = ", ".join(str(list(x.shape)) for x in tensors)
            dtypes = dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in tensors)
            rows.append((name, type(sums).__name__, shapes, ", ".join(dtypes)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        size = sum(x.numel() * x.element_size() for x in flatten(self)[0])
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([f"Statistics of {self.options.estimator}: {size:,} bytes", *lines])


def check_one_kind(a: Statistics, b: Statistics) -> None:
    """Refuses to add what is not the same sum, over other examples."""
    mine, others = a.options, b.options
    if type(mine) is not type(others):
        raise ArgumentError(
            f"statistics of different estimators, {mine.estimator} and {others.estimator}, cannot be added"
        )
    for field in dataclasses.fields(mine):
        one, two = getattr(mine, field.name), getattr(others, field.name)
        if field.compare and one != two:
            raise ArgumentError(
                f"statistics of {mine.estimator} with different options cannot be added: {field.name} is {one!r} in "
                f"one, and {two!r} in the other"
            )
    if a.blocks != b.blocks or a.domain != b.domain or a.sums.keys() != b.sums.keys():
        raise CaptureError("the batches of a data set do not use the parameters in the same way; their plans differ")
    if not equal(a.basis, b.basis):
        raise ArgumentError(f"statistics of {mine.estimator} in different bases cannot be added: give both the same")


def equal(a: Any, b: Any) -> bool:
    """Whether two pytrees hold the same; under a transform or a trace, of the same shapes."""
    if a is b:
        return True
    (one, structure), (two, other) = flatten(a), flatten(b)
    return structure == other and all(
        x is y or ((x.shape, x.dtype) == (y.shape, y.dtype) and (not is_eager() or torch.equal(x, y)))
        for x, y in zip(one, two, strict=True)
    )


def assemble(
    statistics: Statistics, known: Mapping[str, Operator] | None = None, *, reuse: bool = False
) -> BlockDiagonal:
    """The operator whose blocks are made of the sums.

    Args:
        statistics: the sums.
        known: blocks that are made already.
        reuse: whether the memory of the sums may be used for the blocks.

    Raises:
        NonFiniteError: a block is not finite; names it.
    """
    blocks: dict[str, Operator] = dict(known or {})
    for block in statistics.blocks:
        with naming(block.name):
            if block.name not in blocks:
                blocks[block.name] = statistics.options.block(block, statistics, reuse=reuse)
            check_finite(blocks[block.name])
    layouts = tuple((block.name, block.layout) for block in statistics.blocks)
    return BlockDiagonal({name: blocks[name] for name, _ in layouts}, layouts, statistics.domain)


def check_finite(block: Operator) -> None:
    """Refuses a block with an infinite or undefined entry, where its values may be looked at."""
    for tensor in tensors_in(block):
        if may_look_at(tensor) and not torch.isfinite(tensor.sum()):
            raise NonFiniteError(
                "the factor is not finite: the inputs, the parameters or the outputs contain inf or nan, or no "
                "target counts"
            )


P = ParamSpec("P")


def then_assemble(measure: Callable[P, Statistics]) -> Callable[P, BlockDiagonal]:
    """An estimator from its first half: it has the same arguments, and uses the memory of the sums again."""

    @functools.wraps(measure)
    def estimate(*args: P.args, **kwargs: P.kwargs) -> BlockDiagonal:
        return assemble(measure(*args, **kwargs), reuse=True)

    signature = inspect.signature(measure).replace(return_annotation="BlockDiagonal")
    names = {"__name__": "__call__", "__qualname__": measure.__qualname__.replace(measure.__name__, "__call__")}
    estimate.__dict__.update(__signature__=signature)
    estimate.__name__, estimate.__qualname__ = names.values()
    estimate.__doc__ = "The curvature: `measure`, and then `Statistics.curvature`."
    return estimate
