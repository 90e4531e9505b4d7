"""The plan: a static, hashable, printable table of which call uses which parameter, and as what."""

from __future__ import annotations

import dataclasses

import torch

from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.convolution import Convolution
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.embedding import Embedding
from curvlib.layers.table import Operand, Use
from curvlib.operators.layout import Layout, Region
from curvlib.pytree import Domain

Size = tuple[int, bool]  # (k, True) means k * N, (k, False) means k


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What is known of a call's R rows that are chosen by values.

    Attributes:
        operand: the shape of the operand that the layers read; (k, True) stands for k R.
        dtype: its dtype.
        loose: which rows belong to one example is not known; else each is another example.
    """

    operand: tuple[Size, ...]
    dtype: torch.dtype
    loose: bool


@dataclasses.dataclass(frozen=True)
class Site:
    """One call that uses parameters.

    Attributes:
        ordinal: which of the known calls of the model it is, counted from 0.
        call: the name of the call's entry in the layer table.
        layers: what the call does with parameters; more than one when weight and bias are accounted for apart.
        operand: the operand that the layers read.
        dtype: the output's dtype.
        shape: the output's shape; (k, True) stands for k times the number of examples, or of chosen rows.
        expanded: the output has no axis of examples and is expanded by one, in front.
        reaches: gradients of the model's output reach the call's output.
        scattered: the rows of one example do not lie together on the axis of examples.
        chosen: not None if the call's rows are chosen by values, so that their number differs from batch to batch.
    """

    ordinal: int
    call: str
    layers: tuple[Layer, ...]
    operand: Operand
    dtype: torch.dtype
    shape: tuple[Size, ...]
    expanded: bool
    reaches: bool = True
    scattered: bool = False
    chosen: Chosen | None = None

    @property
    def use(self) -> Use:
        """The call's use of parameters."""
        return Use(self.layers[0], self.operand)

    def output_shape(self, examples: int) -> tuple[int, ...]:
        """The output's shape for N examples."""
        return tuple(k * examples if batch else k for k, batch in self.shape)


@dataclasses.dataclass(frozen=True)
class Route:
    """How a call of a plan is recognized in a run in which calls before it may be missing.

    Attributes:
        regions: the parameters' elements among its operands.
        site: the call.
        number: the number of the site that accounts for it; None: it adds the bias of another site.
    """

    regions: tuple[Region, ...]
    site: Site
    number: int | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """One use that contributes to a block.

    Attributes:
        site: the number of the site.
        layer: which of its layers.
        transposed: whether the block's matrix is transposed there.
        chosen: whether its rows are chosen by values.
    """

    site: int
    layer: int
    transposed: bool = False
    chosen: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """Parameters whose curvature is kept together.

    Attributes:
        name: the name of the first parameter, the weight if there is one.
        layout: the parameters' elements as one tensor: [*groups, d_out, d_in (+ 1)] or [size].
        kronecker: whether the block is a Kronecker product; else its per-example gradients are formed.
        placements: the uses that contribute.
    """

    name: str
    layout: Layout
    kronecker: bool
    placements: tuple[Placement, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every use of every parameter of a model, in the order of the calls. ``print`` shows it as a table.

    Attributes:
        domain: structure, names and shapes of the parameters.
        sites: the calls that use them.
        blocks: which parameters share a block of the curvature, and which uses contribute to it.
        calls: how many calls of known functions the model makes in all.
        static: whether it holds for every batch of the same shapes (false if control flow depends on values).
        output: the shape of the model's output.
        routes: the calls that use parameters, if the model chooses rows by values: a batch may lack those on such rows.
        mixed: what makes the outputs of an example depend on other examples, in words; None: nothing does.
        writes_inputs: whether the model changes its inputs in place.
        unbatched: whether vectors must be pulled back one at a time by torch.func.

    Example:
        >>> import curvlib as cv
        >>> plan = cv.plan(lambda p, x: torch.tanh(x @ p["v"]) * p["s"], {"v": torch.ones(3, 2), "s": torch.ones(2)},
        ...                torch.zeros(5, 3))
        >>> [(site.call, block.name) for site, block in zip(plan.sites, plan.blocks)]
        [('matmul', 'v'), ('mul', 's')]
    """

    domain: Domain
    sites: tuple[Site, ...]
    blocks: tuple[Block, ...]
    calls: int
    output: tuple[Size, ...]
    static: bool
    routes: tuple[Route, ...] = ()
    mixed: str | None = None
    writes_inputs: bool = False
    unbatched: bool = False

    def output_shape(self, examples: int) -> tuple[int, ...]:
        """The shape of the model's output for N examples."""
        return tuple(k * examples if batch else k for k, batch in self.output)

    def __str__(self) -> str:
        rows = [("call", "output", "parameters", "as")]
        for site in self.sites:
            for layer in site.layers:
                uses = ", ".join(self.describe(region) for region in layer.regions)
                rows.append(
                    (
                        f"{site.ordinal} {site.call}",
                        shape_text(site.shape, "R" if site.chosen else "N"),
                        uses,
                        kind_text(layer),
                    )
                )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(
            f"{len(self.domain.names)} parameters in {len(self.sites)} of {self.calls} known calls, "
            f"{len(self.blocks)} blocks; output {shape_text(self.output)}"
            + ("; R: rows chosen by values" if any(site.chosen for site in self.sites) else "")
            + (f"; examples depend on each other: {self.mixed}" if self.mixed else "")
        )
        return "\n".join(lines)

    def describe(self, region: Region) -> str:
        """A parameter's name, with the slice that is used unless it is the whole."""
        name = self.domain.names[region.leaf]
        if region.is_whole:
            return name
        slices = [
            f"{start}:{start + length}" if length != whole else ":"
            for start, length, whole in zip(region.starts, region.lengths, region.radix, strict=True)
            if whole > 1
        ]
        return f"{name}[{', '.join(slices)}]"


def shape_text(shape: tuple[Size, ...], unit: str = "N") -> str:
    """[N, 128*N, 3]."""
    return "[" + ", ".join((unit if k == 1 else f"{k}*{unit}") if counts else str(k) for k, counts in shape) + "]"


def kind_text(layer: Layer) -> str:
    """What a layer is, in words."""
    match layer:
        case Elementwise(scale=scale, shift=shift):
            words = [word for word, region in (("scale", scale), ("shift", shift)) if region is not None]
            return "elementwise " + " and ".join(words)
        case Embedding():
            return f"embedding {layer.weight.shape[1]} -> {layer.weight.shape[0]}"
        case KroneckerLayer():
            *groups, d_out, d_in = layer.weight.shape
            name = "convolution" if isinstance(layer, Convolution) else "linear"
            times = f"{groups[0]} x " if groups else ""
            return f"{name} {times}{d_in}{' + 1' if layer.bias is not None else ''} -> {d_out}"
    return type(layer).__name__.lower()
