"""Strategies for parameters: pytrees of tensors, and vectors of a domain."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from curvlib.pytree import Domain, Tree, tree_map


@st.composite
def trees(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    max_leaves: int = 4,
    max_order: int = 3,
    max_elements: int = 12,
) -> Tree:
    """Nested dictionaries, lists and tuples of small tensors with random entries.

    Args:
        draw: given by hypothesis.
        dtype: of the tensors.
        max_leaves: how many there may be.
        max_order: how many axes one may have; there is at least one.
        max_elements: how many entries one may have.

    Returns:
        A strategy.

    Example:
        >>> from curvlib.testing import trees
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, deadline=None)
        ... @given(params=trees())
        ... def test_ravel(params):
        ...     assert cv.ravel(params).ndim == 1
        >>> import curvlib as cv
        >>> test_ravel()
    """
    sizes = st.lists(st.integers(1, 3), min_size=1, max_size=max_order).map(tuple)
    shapes = sizes.filter(lambda shape: math.prod(shape) <= max_elements).map(Shape)
    structure = draw(
        st.recursive(
            shapes,
            lambda inner: (
                st.lists(inner, min_size=1, max_size=3)
                | st.tuples(inner, inner)
                | st.dictionaries(st.sampled_from(["weight", "bias", "a", "z"]), inner, min_size=1, max_size=3)
            ),
            max_leaves=max_leaves,
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return tree_map(lambda leaf: torch.randn(leaf.sizes, generator=generator, dtype=dtype), structure)


class Shape:
    """Stands for a tensor while a tree is drawn; a tuple would be taken for a container."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes


def vectors(domain: Domain, *, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> st.SearchStrategy[Tree]:
    """Vectors of a domain with small whole numbers as entries, in few places or in all.

    Args:
        domain: structure and shapes, such as ``operator.domain``.
        dtype: of the leaves.
        device: of the leaves.

    Returns:
        A strategy whose simplest vectors have one entry 1 and zeros elsewhere.

    Example:
        >>> import torch, curvlib as cv
        >>> from hypothesis import find
        >>> from curvlib.testing import vectors
        >>> domain = cv.pytree.Domain.of({"w": torch.zeros(2)})
        >>> find(vectors(domain), lambda v: v["w"].sum() > 0)
        {'w': tensor([1., 0.], dtype=torch.float64)}
    """
    size = domain.size

    def sparse(entries: list[tuple[int, int]]) -> Tensor:
        vector = torch.zeros(size, dtype=dtype, device=device)
        for place, value in entries:
            vector[place] = value
        return vector

    def full(entries: list[int]) -> Tensor:
        return torch.tensor(entries, dtype=dtype, device=device).repeat(-(-size // len(entries)))[:size]

    entry = st.tuples(st.integers(0, size - 1), st.sampled_from([1, 2, -1, -3]))
    few = st.lists(entry, min_size=1, max_size=4, unique_by=lambda x: x[0]).map(sparse)
    number = min(size, 32)
    many = st.lists(st.integers(-3, 3), min_size=number, max_size=number).map(full)
    return (few | many).map(lambda vector: domain.stacked(vector.unsqueeze(0), front=()))
