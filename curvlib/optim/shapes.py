"""From parameters to stacks: which leaves are preconditioned as what, decided once and from shapes alone.

A leaf of order two or more is read with its small dimensions merged and cut into blocks. A state has entries a leaf, of
its blocks; an update stacks the entries of all blocks of one shape, does to them in one call what is to be done, and
takes the stack apart again. Leaves without a side of their own (scalars, vectors, sides that are all too wide) are
concatenated, element by element.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.eager import is_eager
from curvlib.optim.transformation import PerLeaf
from curvlib.pytree import flatten, unflatten

Shape = tuple[int, ...]
Kind = tuple[Shape, torch.dtype, torch.device]  # of a leaf: its shape, and where its state lies and how precisely


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
class LeafBlock:
    """One block of a leaf.

    Args:
        leaf: its number.
        number: of the block among those of the leaf; None: it is the only one.
        starts: where it starts, for each of the leaf's merged dimensions.
    """

    leaf: int
    number: int | None
    starts: Shape


@dataclass(frozen=True)
class Bucket:
    """Blocks of one shape that are stacked along a leading axis, or whole leaves concatenated to one long block.

    Args:
        shape: of a member; of concatenated leaves (N,), all their elements.
        modes: the dimensions of a member that have a factor; none: elements are treated on their own.
        blocks: the members, in order.
        concatenated: whether leaves are concatenated.
        dtype: of the stack.
    """

    shape: Shape
    modes: tuple[int, ...]
    blocks: tuple[LeafBlock, ...]
    concatenated: bool
    dtype: torch.dtype


class Stack(NamedTuple):
    """The entries of a bucket's members, stacked.

    Args:
        values: for each column of entries, a pytree of stacks [k, ...], or [1, N].
        tensors: the leaves of values.
        members: for each of them the tensors that it is made of, if they lie in it already; None: it is a copy.
    """

    values: tuple[Any, ...]
    tensors: list[Tensor]
    members: list[list[Tensor] | None]


@dataclass(frozen=True)
class StackLayout:
    """Where every element of the leaves of a pytree lies in the stacks. Static and hashable.

    Args:
        shapes: of the leaves.
        pieces: for each leaf, for each of its merged dimensions, the widths of its pieces.
        buckets: the stacks.

    Example:
        >>> leaves = [torch.zeros(4, 3), torch.zeros(3), torch.zeros(4, 3), torch.zeros(())]
        >>> layout = StackLayout.of(leaves, Shapes())
        >>> [(bucket.shape, bucket.modes) for bucket in layout.buckets]
        [((4, 3), (0, 1)), ((4,), ())]
        >>> [stack.shape for stack in layout.stacks(leaves)]
        [torch.Size([2, 4, 3]), torch.Size([1, 4])]
    """

    shapes: tuple[Shape, ...]
    pieces: tuple[tuple[Shape, ...], ...]
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, leaves: Sequence[Tensor], how: Shapes, known: PerLeaf | None = None) -> StackLayout:
        """The layout of parameters, or of gradients with the dtypes and devices of what a state knows of them."""
        like = leaves if known is None else [entry[0] if type(entry) is tuple else entry for entry in known.entries]
        kinds = tuple(
            (tuple(leaf.shape), torch.promote_types(x.dtype, torch.float32), x.device)
            for leaf, x in zip(leaves, like, strict=True)
        )
        return layout_of.__wrapped__(kinds, how) if torch.compiler.is_compiling() else layout_of(kinds, how)

    def stacks(self, leaves: Sequence[Tensor]) -> Iterator[Tensor]:
        """The stacks of these leaves, one for each bucket: [k, *shape], in the bucket's dtype."""
        merged = [leaf.reshape(tuple(map(sum, cuts))) for leaf, cuts in zip(leaves, self.pieces, strict=True)]
        for bucket in self.buckets:
            parts = [merged[block.leaf].to(bucket.dtype) for block in bucket.blocks]
            if bucket.concatenated:
                yield (torch.cat(parts) if len(parts) > 1 else parts[0]).unsqueeze(0)
                continue
            for i, block in enumerate(bucket.blocks):
                for axis, (start, width) in enumerate(zip(block.starts, bucket.shape, strict=True)):
                    if width < parts[i].shape[axis]:
                        parts[i] = parts[i].narrow(axis, start, width)
            yield torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)

    def leaves(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The leaves that lie in these stacks, in the stacks' dtypes: the inverse of `stacks`."""
        parts: list[dict[Shape, Tensor]] = [{} for _ in self.pieces]
        for bucket, stack in zip(self.buckets, stacks, strict=True):
            for block, member in zip(bucket.blocks, self.members(bucket, stack), strict=True):
                parts[block.leaf][block.starts] = member
        return [
            assembled(part, cuts, ()).reshape(shape)
            for part, cuts, shape in zip(parts, self.pieces, self.shapes, strict=True)
        ]

    def members(self, bucket: Bucket, stack: Tensor) -> Sequence[Tensor]:
        """The members of a stack, as views of it: blocks, or elements of whole leaves in the leaves' shapes."""
        if not bucket.concatenated:
            return stack.unbind()
        shapes = [self.shapes[block.leaf] for block in bucket.blocks]
        parts = stack.squeeze(0).split([math.prod(shape) for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def gathered(self, columns: Sequence[PerLeaf]) -> list[Stack]:
        """The entries of a state as stacks, one for each bucket; those that lie one after another are not copied."""
        look = is_eager()
        result = []
        for bucket in self.buckets:
            rows = [tuple([entry_of(column, block) for column in columns]) for block in bucket.blocks]
            structure, (leaves, _) = flatten(rows[0])[1], flatten(rows)
            tensors, members = [], []
            for parts in [leaves[i :: structure.num_leaves] for i in range(structure.num_leaves)]:
                stack = adjacent(parts, flat=bucket.concatenated) if look else None
                members.append(parts if stack is not None else None)
                if stack is None and bucket.concatenated:
                    stack = torch.cat([x.reshape(1, -1) for x in parts], 1)
                tensors.append(torch.stack(parts) if stack is None else stack)
            result.append(Stack(unflatten(structure, tensors), tensors, members))
        return result

    def scattered(self, values: Sequence[tuple[Any, ...]], old: Sequence[Stack] | None = None) -> tuple[PerLeaf, ...]:
        """The entries a leaf of stacks: the inverse of `gathered`, whose stacks may be among these, unchanged."""
        columns: list[list[dict[int | None, Any]]] = [[{} for _ in self.shapes] for _ in values[0]]
        for number, (bucket, stacks) in enumerate(zip(self.buckets, values, strict=True)):
            tensors, structure = flatten(stacks)
            parts = []
            for i, x in enumerate(tensors):
                kept = old[number].members[i] if old is not None and x is old[number].tensors[i] else None
                parts.append(self.members(bucket, x) if kept is None else kept)
            rows = zip(*parts, strict=True) if parts else [()] * len(bucket.blocks)
            for block, row in zip(bucket.blocks, rows, strict=True):
                for column, entry in zip(columns, unflatten(structure, row), strict=True):
                    column[block.leaf][block.number] = entry
        return tuple(
            PerLeaf(
                tuple(
                    [
                        blocks[None] if None in blocks else tuple([blocks[i] for i in range(len(blocks))])
                        for blocks in column
                    ]
                )
            )
            for column in columns
        )


@functools.lru_cache(maxsize=256)
def layout_of(kinds: tuple[Kind, ...], how: Shapes) -> StackLayout:
    """The layout of leaves of these kinds."""
    pieces: list[tuple[Shape, ...]] = []
    members: dict[tuple[Shape | None, torch.dtype, torch.device], list[LeafBlock]] = {}
    for i, (shape, dtype, device) in enumerate(kinds):
        cuts = tuple(map(how.cut, how.merged(shape)))
        blocks: list[Shape | None] = list(itertools.product(*cuts))
        if len(shape) < 2 or not any(how.modes(block) for block in blocks if block is not None):
            cuts, blocks = ((math.prod(shape),),), [None]
        for number, (start, block) in enumerate(zip(itertools.product(*map(starts, cuts)), blocks, strict=True)):
            part = LeafBlock(i, number if len(blocks) > 1 else None, start)
            members.setdefault((block, dtype, device), []).append(part)
        pieces.append(cuts)
    buckets = []
    for (block, dtype, _), group in members.items():
        if block is None:
            length = sum(math.prod(kinds[member.leaf][0]) for member in group)
            buckets.append(Bucket((length,), (), tuple(group), True, dtype))
        else:
            buckets.append(Bucket(block, how.modes(block), tuple(group), False, dtype))
    return StackLayout(tuple(shape for shape, _, _ in kinds), tuple(pieces), tuple(buckets))


def entry_of(column: PerLeaf, block: LeafBlock) -> Any:
    """The entry of a block."""
    entry = column.entries[block.leaf]
    return entry if block.number is None else entry[block.number]


def adjacent(tensors: Sequence[Tensor], *, flat: bool) -> Tensor | None:
    """The stack [k, ...] that tensors lie in one after another, or all their elements [1, N]; None: they do not.

    Example:
        >>> stack = torch.arange(6.0).reshape(3, 2)
        >>> adjacent(stack.unbind()[1:], flat=False)
        tensor([[2., 3.],
                [4., 5.]])
        >>> adjacent([stack[0], stack[2]], flat=False) is None
        True
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first.reshape(1, -1) if flat else first.unsqueeze(0)
    strides, size = first.stride(), first.element_size()
    if not first.is_contiguous() and (flat or first.ndim < 2 or not first.mT.is_contiguous()):
        return None
    ends = list(itertools.accumulate(x.numel() for x in tensors))
    places = [first.data_ptr() + size * end for end in (0, *ends[:-1])]
    if [x.data_ptr() for x in tensors] != places or any(x.requires_grad for x in tensors):
        return None
    if not all(x.is_contiguous() if flat else x.stride() == strides for x in tensors):
        return None
    if first.untyped_storage().nbytes() < (first.storage_offset() + ends[-1]) * size:
        return None
    if flat:
        return first.as_strided((1, ends[-1]), (ends[-1], 1))
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *strides))


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
