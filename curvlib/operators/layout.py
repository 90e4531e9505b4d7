"""Which elements of which leaves make up a block, and in what order: static maps leaf <-> block tensor.

A view of a tensor (transpose, chunk, slice, reshape, ...) selects elements by offset, size and stride. A
`Region` holds such a selection as *reshape, narrow, permute, reshape*, which can be replayed forwards (read)
and backwards (scatter) on any stack of leaves, under `torch.func` transforms too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvlib.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class Region:
    """A rectangular selection of the elements of leaf number ``leaf``.

    read(leaf) = leaf.reshape(radix)[starts : starts + lengths].permute(order).reshape(shape)
    """

    leaf: int
    leaf_shape: tuple[int, ...]
    radix: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, leaf: int, shape: Sequence[int]) -> Region:
        """All elements of a leaf, as they are."""
        shape = tuple(shape)
        return cls(leaf, shape, shape, (0,) * len(shape), shape, tuple(range(len(shape))), shape)

    @classmethod
    def strided(
        cls, leaf: int, leaf_shape: Sequence[int], offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Region:
        """The selection that a view with this offset, size and stride makes in a row-major leaf.

        Axes of stride 0 (expanded ones) count as axes of size 1.

        Raises:
            CaptureError: the view is not a rectangular selection (diagonals, overlapping windows).
        """
        size = tuple(1 if step == 0 else n for n, step in zip(size, stride, strict=True))
        axes = sorted((i for i, n in enumerate(size) if n > 1), key=lambda i: -stride[i])
        total = math.prod(leaf_shape)
        radix: list[int] = []
        starts: list[int] = []
        lengths: list[int] = []
        position: dict[int, int] = {}
        outer, rest = total, offset
        for axis in axes:
            step = stride[axis]
            if outer % step or size[axis] > outer // step - rest // step:
                raise CaptureError(
                    f"a view of size {size}, stride {tuple(stride)} and offset {offset} of a parameter of shape "
                    f"{tuple(leaf_shape)} is not a rectangular selection of its elements; use slices, chunks, "
                    "transposes and reshapes only"
                )
            position[axis] = len(radix)
            radix.append(outer // step)
            starts.append(rest // step)
            lengths.append(size[axis])
            outer, rest = step, rest % step
        if outer > 1:
            radix.append(outer)
            starts.append(rest)
            lengths.append(1)
        for axis, n in enumerate(size):
            if n == 1:
                position[axis] = len(radix)
                radix.append(1)
                starts.append(0)
                lengths.append(1)
        order = [position[axis] for axis in range(len(size))]
        order += [k for k in range(len(radix)) if k not in order]
        return cls(leaf, tuple(leaf_shape), tuple(radix), tuple(starts), tuple(lengths), tuple(order), size)

    @property
    def numel(self) -> int:
        """The number of elements selected."""
        return math.prod(self.lengths)

    @property
    def is_whole(self) -> bool:
        """Whether every element of the leaf is selected."""
        return self.lengths == self.radix

    @property
    def offset(self) -> int:
        """The first element's place in the leaf."""
        return sum(start * math.prod(self.radix[i + 1 :]) for i, start in enumerate(self.starts))

    def _steps(self, order: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(length, stride) along these axes; neighbours that run through memory together are merged."""
        steps: list[tuple[int, int]] = []
        for k in order:
            length, stride = self.lengths[k], math.prod(self.radix[k + 1 :])
            if length == 1:
                continue
            if steps and steps[-1][1] == length * stride:
                length *= steps.pop()[0]
            steps.append((length, stride))
        return tuple(steps)

    @property
    def elements(self) -> tuple[object, ...]:
        """Which elements are selected, whatever their order: equal for equal selections."""
        return (self.leaf, self.offset, self._steps(range(len(self.radix))))

    @property
    def sequence(self) -> tuple[object, ...]:
        """Which elements are selected, in which order and shape: equal regions read the same tensor."""
        return (self.leaf, self.offset, self.shape, self._steps(self.order))

    def transposed(self) -> Region:
        """The same elements with the last two axes swapped.

        Raises:
            CaptureError: an axis of the view was cut in two by a reshape.
        """
        *front, rows, _ = self.shape
        bounds, size = [0], 1
        for target in (math.prod(front), math.prod(front) * rows):
            k = bounds[-1]
            while size < target:
                size *= self.lengths[self.order[k]]
                k += 1
            if size != target:
                raise CaptureError("a reshaped view of a parameter cannot be transposed")
            bounds.append(k)
        first, second = bounds[1:]
        order = self.order[:first] + self.order[second:] + self.order[first:second]
        return dataclasses.replace(self, order=order, shape=(*front, self.shape[-1], rows))

    def permute(self, *axes: int) -> Region:
        """The same elements with the axes of the view permuted."""
        if self.shape != tuple(self.lengths[k] for k in self.order[: len(self.shape)]):
            raise ValueError("a region can be permuted only before it is reshaped")
        order = tuple(self.order[a] for a in axes) + self.order[len(self.shape) :]
        return dataclasses.replace(self, order=order, shape=tuple(self.shape[a] for a in axes))

    def reshape(self, *shape: int) -> Region:
        """The same elements in the same order in another shape."""
        if math.prod(shape) != self.numel:
            raise ValueError(f"a region of {self.numel} elements cannot take the shape {shape}")
        return dataclasses.replace(self, shape=tuple(shape))

    def read(self, leaf: Tensor) -> Tensor:
        """The selected elements of a leaf, or of leaves stacked along leading axes: [*, *shape]."""
        front = leaf.shape[: leaf.ndim - len(self.leaf_shape)]
        view = leaf.reshape((*front, *self.radix))
        for axis, (start, length, whole) in enumerate(zip(self.starts, self.lengths, self.radix, strict=True)):
            if length != whole:
                view = view.narrow(len(front) + axis, start, length)
        view = view.permute((*range(len(front)), *(len(front) + k for k in self.order)))
        return view.reshape((*front, *self.shape))

    def scatter(self, values: Tensor) -> Tensor:
        """The transpose of `read`: a leaf with these elements set and zeros elsewhere."""
        front = values.shape[: values.ndim - len(self.shape)]
        values = values.reshape((*front, *(self.lengths[k] for k in self.order)))
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        values = values.permute((*range(len(front)), *(len(front) + k for k in inverse)))
        if not self.is_whole:
            padding: list[int] = []
            for start, length, whole in zip(self.starts, self.lengths, self.radix, strict=True):
                padding = [start, whole - start - length, *padding]
            values = torch.nn.functional.pad(values, padding)
        return values.reshape((*front, *self.leaf_shape))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A block's tensor is the concatenation of its pieces along the last axis.

    Kronecker blocks of a weight [d_out, d_in] and a bias [d_out] are matrices [d_out, d_in + 1]: the bias is
    the last column. Grouped blocks have the groups in front.
    """

    pieces: tuple[Region, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the block's tensor."""
        *front, _ = self.pieces[0].shape
        return (*front, sum(piece.shape[-1] for piece in self.pieces))

    @property
    def numel(self) -> int:
        """The number of parameters in the block."""
        return math.prod(self.shape)

    def gather(self, leaves: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """All leaves of the domain (each with the same leading axes) -> the block's tensor [*, *shape]."""
        parts = [piece.read(leaves[piece.leaf]) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def scatter(self, block: Tensor) -> dict[int, Tensor]:
        """The block's tensor [*, *shape] -> contributions to leaves, by leaf number."""
        parts = torch.split(block, [piece.shape[-1] for piece in self.pieces], dim=-1)
        leaves: dict[int, Tensor] = {}
        for piece, part in zip(self.pieces, parts, strict=True):
            leaf = piece.scatter(part)
            leaves[piece.leaf] = leaves[piece.leaf] + leaf if piece.leaf in leaves else leaf
        return leaves
