"""Random pytree domains, and layouts that cut them into blocks, with plain indexing as a twin, for the tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from hypothesis import strategies as st
from torch import Tensor

from curvlib.operators import Layout, Region

Draw = Callable[[st.SearchStrategy], Any]


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Shape:
    """Stands for a leaf while a tree is drawn; a tuple would be taken for a container."""

    sizes: tuple[int, ...]


@dataclass(frozen=True)
class DomainCase:
    """A pytree of zeros, and the numbers of its elements in the order of its flattened leaves."""

    like: Any
    numbers: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return sum(n.numel() for n in self.numbers)


def flat(vector: Any, stacked: bool = False) -> Tensor:
    """All leaves in optree's order, each row-major, as one vector, or one a row."""
    leaves = optree.tree_leaves(vector)
    return torch.cat([leaf.reshape(len(leaf), -1) if stacked else leaf.reshape(-1) for leaf in leaves], -1)


def tree(vector: Tensor, like: Any) -> Any:
    """The inverse of `flat` for vectors [*, D]."""
    leaves, structure = optree.tree_flatten(like)
    parts = vector.split([leaf.numel() for leaf in leaves], -1)
    shaped = [part.reshape(*vector.shape[:-1], *leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return optree.tree_unflatten(structure, shaped)


shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple).filter(lambda sizes: math.prod(sizes) <= 12)


trees = st.recursive(
    shapes.map(Shape),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["weight", "bias", "a", "z"]), inner, min_size=1, max_size=3)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=4,
)


@functools.cache
@st.composite
def domains(draw: Draw) -> DomainCase:
    """Nested dictionaries, lists, tuples and named tuples of up to four tensors."""
    like = optree.tree_map(lambda leaf: torch.zeros(leaf.sizes, dtype=torch.float64), draw(trees))
    leaves = optree.tree_leaves(like)
    numbers = torch.arange(sum(leaf.numel() for leaf in leaves)).split([leaf.numel() for leaf in leaves])
    return DomainCase(like, tuple(n.reshape(leaf.shape) for n, leaf in zip(numbers, leaves, strict=True)))


@dataclass(frozen=True)
class Piece:
    """A region of a leaf, and the same view of the leaf's element numbers by plain indexing."""

    region: Region
    numbers: Tensor

    def reshape(self, *shape: int) -> Piece:
        return Piece(self.region.reshape(*shape), self.numbers.reshape(shape))


def piece(number: int, leaf: Tensor, view: Callable[[Tensor], Tensor]) -> Piece:
    """What a view of leaf number ``number`` selects; ``leaf`` holds element numbers."""
    seen = view(leaf)
    return Piece(Region.strided(number, leaf.shape, seen.storage_offset(), seen.size(), seen.stride()), seen)


uncut = st.sampled_from(["whole", "permuted"])
ways = st.sampled_from(["whole", "permuted", "halves", "interleaved"])


@st.composite
def cuts(draw: Draw, number: int, leaf: Tensor) -> list[Piece]:
    """A leaf as it is, permuted, or cut in two along an axis, every second row or not."""
    leaf = leaf.clone()  # with an offset of its own
    order = draw(st.permutations(range(leaf.ndim)))
    way = draw(ways if leaf.ndim and max(leaf.shape) > 1 else uncut)
    if way == "whole":
        return [Piece(Region.whole(number, leaf.shape), leaf)]
    if way == "permuted":
        return [piece(number, leaf, lambda x: x.permute(order))]
    axis = draw(st.sampled_from([i for i, size in enumerate(leaf.shape) if size > 1]))
    size = leaf.shape[axis]
    if way == "interleaved" and size == 2:
        views = [lambda x, i=i: x.select(axis, i) for i in range(2)]
        return [piece(number, leaf, view) for view in views]
    at = draw(st.integers(1, size - 1))
    ranges = [(0, at), (at, size - at)]
    return [piece(number, leaf, lambda x, r=r: x.narrow(axis, *r).permute(order)) for r in ranges]


@st.composite
def layouts(draw: Draw, domain: DomainCase) -> dict[str, tuple[Layout, Tensor]]:
    """Blocks that hold every element once: {name: (layout, element numbers of the block's tensor)}."""
    pieces = [p for i, leaf in enumerate(domain.numbers) for p in draw(cuts(i, leaf - leaf.min()))]
    starts = [int(leaf.min()) for leaf in domain.numbers]
    pieces = [Piece(p.region, p.numbers + starts[p.region.leaf]) for p in draw(st.permutations(pieces))]
    blocks: dict[str, tuple[Layout, Tensor]] = {}
    while pieces:
        first = pieces.pop()
        if not first.numbers.ndim:  # a row of a vector
            first = first.reshape(1)
        members = [first]
        *front, _ = first.numbers.shape
        if pieces and pieces[-1].numbers.numel() % math.prod(front) == 0 and draw(st.booleans()):
            other = pieces.pop()
            members.append(other.reshape(*front, other.numbers.numel() // math.prod(front)))
        elif first.numbers.ndim == 1 and draw(st.booleans()):
            members = [first.reshape(1, first.numbers.numel())]
        layout = Layout(tuple(p.region for p in members))
        blocks[f"block {len(blocks)}"] = layout, torch.cat([p.numbers for p in members], -1)
    return blocks
