"""From parameters to stacks: which leaves are preconditioned as what, decided once and from shapes alone.

A leaf of order two or more is read with its small dimensions merged, cut into blocks, and each block joins the stack of
all blocks of its shape. Everything that an optimizer does to a stack it does to all of its members in one call. Leaves
without a side of their own (scalars, vectors, sides that are all too wide) are strung together, element by element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.gram import full_precision
from curvlib.pytree import Domain, Tree

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """How leaves are cut and which sides of a block have a factor.

    Args:
        max_dimension: a side wider than this has none (the identity).
        one_sided: only the narrower side of a matrix has one; of a tensor, all sides but the widest (the last such).
        merge_dimensions: from the last dimension on, neighbours are merged while their product is at most this:
            [128, 64, 3, 3] becomes [128, 576] for any number from 576 to 73,727. The original implementation of SOAP
            merges from the first dimension on: with 10,000 it makes [8192, 9] of that. False: nothing is merged.
        block_size: sides are cut into pieces of this width, and a ragged last one. None: nothing is cut.

    Raises:
        ArgumentError: a width is not a positive integer.

    Example:
        >>> shapes = Shapes(merge_dimensions=1024, block_size=512)
        >>> shapes.merged((128, 64, 3, 3)), shapes.cut(1100), Shapes(one_sided=True).modes((128, 576))
        ((128, 576), (512, 512, 76), (0,))
    """

    max_dimension: int = 10_000
    one_sided: bool = False
    merge_dimensions: int | Literal[False] = False
    block_size: int | None = None

    def __post_init__(self) -> None:
        widths = {"max_dimension": self.max_dimension, "block_size": self.block_size}
        for name, width in widths.items():
            if width is not None and width < 1:
                raise ArgumentError(f"{name} must be a positive integer, got {width}")
        if self.merge_dimensions is not False and (self.merge_dimensions is True or self.merge_dimensions < 1):
            raise ArgumentError(f"merge_dimensions must be False or a positive integer, got {self.merge_dimensions}")

    def merged(self, shape: Shape) -> Shape:
        """The shape with small neighbours merged."""
        if self.merge_dimensions is False:
            return shape
        result: list[int] = []  # last dimension first
        for width in reversed(shape):
            if result and result[-1] * width <= self.merge_dimensions:
                result[-1] *= width
            else:
                result.append(width)
        return tuple(reversed(result))

    def cut(self, width: int) -> Shape:
        """The widths of the pieces of a side."""
        if self.block_size is None or width <= self.block_size:
            return (width,)
        whole, tail = divmod(width, self.block_size)
        return (self.block_size,) * whole + ((tail,) if tail else ())

    def modes(self, shape: Shape) -> tuple[int, ...]:
        """The dimensions of a block that have a factor."""
        if math.prod(shape) == 0:
            return ()
        eligible = tuple(mode for mode, width in enumerate(shape) if width <= self.max_dimension)
        if not self.one_sided or len(shape) == 1:
            return eligible
        widest = max(range(len(shape)), key=lambda mode: (shape[mode], mode))
        return tuple(mode for mode in eligible if mode != widest)


@dataclass(frozen=True)
class Block:
    """One block of a leaf: the leaf's number and, for each merged dimension, where the block starts."""

    leaf: int
    starts: Shape


@dataclass(frozen=True)
class Bucket:
    """Blocks of one shape that are stacked along a leading axis, or whole leaves strung together to one long block.

    Args:
        shape: of a member; of strung leaves (N,), all their elements.
        modes: the dimensions of a member that have a factor; none: elements are treated on their own.
        blocks: the members, in order.
        strung: whether leaves are strung together.
    """

    shape: Shape
    modes: tuple[int, ...]
    blocks: tuple[Block, ...]
    strung: bool


@dataclass(frozen=True)
class Layout:
    """Where every element of a pytree of parameters lies in the stacks. Static and hashable.

    Args:
        domain: the pytree.
        pieces: for each leaf, for each of its merged dimensions, the widths of its pieces.
        buckets: the stacks.

    Example:
        >>> params = {"a": torch.zeros(4, 3), "b": torch.zeros(3), "c": torch.zeros(4, 3), "d": torch.zeros(())}
        >>> layout = Layout.of(params, Shapes())
        >>> [(bucket.shape, bucket.modes) for bucket in layout.buckets]
        [((4, 3), (0, 1)), ((4,), ())]
        >>> [stack.shape for stack in layout.stacks(params)]
        [torch.Size([2, 4, 3]), torch.Size([1, 4])]
    """

    domain: Domain
    pieces: tuple[tuple[Shape, ...], ...]
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, params: Tree, shapes: Shapes) -> Layout:
        """The layout of these parameters.

        Raises:
            PytreeError, DtypeError: params is not a pytree of floating-point tensors.
        """
        domain = Domain.of(params)
        pieces: list[tuple[Shape, ...]] = []
        members: dict[tuple[Shape | None, torch.dtype, torch.device], list[Block]] = {}
        for i, leaf in enumerate(domain.leaves(params)):
            cuts = tuple(map(shapes.cut, shapes.merged(domain.shapes[i])))
            blocks: list[Shape | None] = list(itertools.product(*cuts))
            if leaf.ndim < 2 or not any(shapes.modes(shape) for shape in blocks if shape is not None):
                cuts, blocks = ((leaf.numel(),),), [None]
            for start, shape in zip(itertools.product(*map(starts, cuts)), blocks, strict=True):
                members.setdefault((shape, leaf.dtype, leaf.device), []).append(Block(i, start))
            pieces.append(cuts)
        buckets = []
        for (shape, *_), group in members.items():
            if shape is None:
                length = sum(math.prod(domain.shapes[block.leaf]) for block in group)
                buckets.append(Bucket((length,), (), tuple(group), True))
            else:
                buckets.append(Bucket(shape, shapes.modes(shape), tuple(group), False))
        return cls(domain, tuple(pieces), tuple(buckets))

    def names(self, bucket: Bucket) -> tuple[str, ...]:
        """The names of the parameters that the members of a bucket belong to."""
        return tuple(self.domain.names[block.leaf] for block in bucket.blocks)

    def stacks(self, tree: Tree) -> Iterator[Tensor]:
        """The stacks of a vector of the domain, one for each bucket: [k, *shape]; half precision becomes float32.

        Raises:
            PytreeError, ShapeError: the tree does not fit; the message names the leaf.
        """
        leaves = self.domain.leaves(tree)
        merged = [leaf.reshape(tuple(map(sum, cuts))) for leaf, cuts in zip(leaves, self.pieces, strict=True)]
        for bucket in self.buckets:
            parts = [merged[block.leaf] for block in bucket.blocks]
            if bucket.strung:
                stack = (torch.cat(parts) if len(parts) > 1 else parts[0]).unsqueeze(0)
            else:
                for i, block in enumerate(bucket.blocks):
                    for axis, (start, width) in enumerate(zip(block.starts, bucket.shape, strict=True)):
                        if width < parts[i].shape[axis]:
                            parts[i] = parts[i].narrow(axis, start, width)
                stack = torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)
            yield full_precision(stack)

    def leaves(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The leaves that lie in these stacks, in the stacks' dtypes: the inverse of `stacks`."""
        parts: list[dict[Shape, Tensor]] = [{} for _ in self.pieces]
        for bucket, stack in zip(self.buckets, stacks, strict=True):
            lengths = [math.prod(self.domain.shapes[block.leaf]) for block in bucket.blocks]
            members = stack.squeeze(0).split(lengths) if bucket.strung else stack.unbind()
            for block, member in zip(bucket.blocks, members, strict=True):
                parts[block.leaf][block.starts] = member
        return [
            assembled(part, cuts, ()).reshape(shape)
            for part, cuts, shape in zip(parts, self.pieces, self.domain.shapes, strict=True)
        ]


def starts(widths: Shape) -> Shape:
    """Where pieces of these widths start.

    Example:
        >>> starts((512, 512, 76))
        (0, 512, 1024)
    """
    return tuple(itertools.accumulate(widths, initial=0))[:-1]


def assembled(blocks: dict[Shape, Tensor], cuts: Sequence[Shape], first: Shape) -> Tensor:
    """The tensor made of the blocks whose starts begin with ``first``."""
    axis = len(first)
    if axis == len(cuts):
        return blocks[first]
    pieces = [assembled(blocks, cuts, (*first, start)) for start in starts(cuts[axis])]
    return torch.cat(pieces, axis) if len(pieces) > 1 else pieces[0]
