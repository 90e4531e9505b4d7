"""Gradients D_n of N examples for one block, and what is made of them: inner products and projections.

Each of these can be made of rows, D_n = sum_t g_nt a_nt^T, without forming D_n:

    <V, D_n> = sum_t g_nt . (V a_nt),    L D_n R^T = sum_t (L g_nt) (R a_nt)^T.

Which way takes fewer multiplications is a matter of the shapes, and is counted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import curvlib.layers.rows as layer_rows
from curvlib.errors import ShapeError
from curvlib.gradients.uses import WeightUse, in_chunks
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.rows import DenseRows, OneHotRows, Rows, chunks, summed
from curvlib.linalg.gram import writes_in_place
from curvlib.operators.layout import Layout, Region
from curvlib.pytree import register, static

PANEL = 1 << 21  # elements of a part of the gradients that is read again at once
WIDE = 64  # vectors from which on a product with all of them takes much longer than to form what it is with


class BlockGradients(ABC):
    """The gradients of N examples for one block, whose tensor has the shape [*groups, m, n] or [size].

    Results have an axis for the K vectors of each example behind that of the examples, if ``several`` are asked for,
    and none if there is one: (K) in the shapes here. Hooks compute with the axis in front, always.
    """

    several: bool

    def dense(self, start: int, stop: int) -> Tensor:
        """The gradients of these examples, [n, (K,) *shape]."""
        return self._behind(self._dense(start, stop), 1)

    def inner(self, vectors: Tensor) -> Tensor:
        """Inner products <V_q, D_n> with vectors [Q, *shape]: [Q, N, (K)]."""
        return self._behind(self._inner(vectors), 2)

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        """L D_n R^T for L [*groups, p, m] and R [*groups, q, n]: [N, (K,) *groups, p, q]."""
        return self._behind(self._projected(left, right), 1)

    def position_inner(self, vectors: Tensor) -> Tensor:
        """Inner products with what each position of the layer's rows contributes: [Q, N, (K,) T]; over T, `inner`.

        Raises:
            ShapeError: the uses of the block have different numbers of positions.
        """
        return self._behind(self._position_inner(vectors), 2)

    def squared_norms(self) -> Tensor:
        """|D_n|^2: [N, (K)]."""
        return self._behind(self._squared_norms(), 1)

    def _behind(self, found: Tensor, axis: int) -> Tensor:
        """The axis of vectors moved from the front to this place, or dropped."""
        return found.movedim(0, axis) if self.several else found[0]

    @abstractmethod
    def _dense(self, start: int, stop: int) -> Tensor:
        """[K, n, *shape]."""

    @abstractmethod
    def _inner(self, vectors: Tensor) -> Tensor:
        """[K, Q, N]."""

    @abstractmethod
    def _projected(self, left: Tensor, right: Tensor) -> Tensor:
        """[K, N, *groups, p, q]."""

    @abstractmethod
    def _position_inner(self, vectors: Tensor) -> Tensor:
        """[K, Q, N, T]."""

    @abstractmethod
    def _squared_norms(self) -> Tensor:
        """[K, N]."""


@register
class DenseGradients(BlockGradients):
    """Gradients as a tensor, which stand for one position.

    Args:
        values: [K, N, *shape].
        several: whether there is an axis of vectors.
    """

    values: Tensor
    several: bool = static()

    def _dense(self, start: int, stop: int) -> Tensor:
        return self.values[:, start:stop]

    def _inner(self, vectors: Tensor) -> Tensor:
        return vectors.flatten(1) @ self.values.flatten(2).mT

    def _projected(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ self.values @ right.mT

    def _position_inner(self, vectors: Tensor) -> Tensor:
        return self._inner(vectors).unsqueeze(-1)

    def _squared_norms(self) -> Tensor:
        return self.values.square().flatten(2).sum(2)


@register
class RowGradients(BlockGradients):
    """Gradients as rows, of every use of a weight.

    Args:
        rows: a [N, (groups,) T, d], by use.
        g: [K, N, (groups,) T, d_out], by use.
        transposed: by use, whether it is the transposed weight that is used.
        several: whether there is an axis of vectors.
    """

    rows: tuple[Rows, ...]
    g: tuple[Tensor, ...]
    transposed: tuple[bool, ...] = static()
    several: bool = static()

    @classmethod
    def of(cls, uses: Sequence[WeightUse], *, several: bool) -> RowGradients:
        """The gradients of a weight with these uses."""
        rows, g, transposed = zip(*((use.rows, use.g, use.transposed) for use in uses), strict=True)
        return cls(rows, g, transposed, several)

    @property
    def uses(self) -> tuple[WeightUse, ...]:
        """The uses of the weight."""
        return tuple(map(WeightUse, self.rows, self.g, self.transposed))

    def _dense(self, start: int, stop: int) -> Tensor:
        return summed([use.gradients(start, stop) for use in self.uses])

    def _inner(self, vectors: Tensor) -> Tensor:
        return summed([inner(use, oriented(use, vectors)) for use in self.uses])

    def _projected(self, left: Tensor, right: Tensor) -> Tensor:
        parts = [projected(use, right, left).mT if use.transposed else projected(use, left, right) for use in self.uses]
        return summed(parts)

    def _position_inner(self, vectors: Tensor) -> Tensor:
        return by_position([in_pieces(use, oriented(use, vectors), lambda shares: shares) for use in self.uses])

    def _squared_norms(self) -> Tensor:
        if len(self.uses) == 1 and norms_by_rows(self.uses[0]):
            return squared_norms(self.uses[0])
        return torch.cat([part.square().flatten(2).sum(2) for part in in_chunks(self.uses)], 1)


@register
class ElementwiseGradients(BlockGradients):
    """Gradients of scales and shifts.

    Args:
        values: [K, N, size].
        rows: what each position contributes to each scale or shift, [K, N, T, d].
        regions: the elements of parameters that these are.
        layout: of the block.
        several: whether there is an axis of vectors.
    """

    values: Tensor
    rows: tuple[Tensor, ...]
    regions: tuple[Region, ...] = static()
    layout: Layout = static()
    several: bool = static()

    @classmethod
    def of(cls, rows: Sequence[tuple[Region, Tensor]], layout: Layout, *, several: bool) -> ElementwiseGradients:
        """The gradients of a block, from what each position contributes."""
        like = rows[0][1]
        zero = like.new_zeros(())
        leaves: dict[int, Tensor] = {}
        for piece in layout.pieces:
            leaves[piece.leaf] = zero.expand(*like.shape[:2], *piece.leaf_shape)
        for region, part in rows:
            leaves[region.leaf] = leaves[region.leaf] + region.scatter(part.sum(2))
        regions, parts = zip(*rows, strict=True)
        return cls(layout.gather(leaves), parts, regions, layout, several)

    def _dense(self, start: int, stop: int) -> Tensor:
        return self.values[:, start:stop]

    def _inner(self, vectors: Tensor) -> Tensor:
        return vectors @ self.values.mT

    def _projected(self, left: Tensor, right: Tensor) -> Tensor:
        raise ShapeError("a block of scales and shifts has no two sides to be projected on")

    def _squared_norms(self) -> Tensor:
        return self.values.square().sum(2)

    def _position_inner(self, vectors: Tensor) -> Tensor:
        leaves = self.layout.scatter(vectors)
        return by_position(
            [
                torch.einsum("qd,kntd->kqnt", region.read(leaves[region.leaf]), part)
                for region, part in zip(self.regions, self.rows, strict=True)
            ]
        )


def elementwise_rows(layer: Elementwise, x: Tensor | None, g: Tensor, examples: int) -> list[tuple[Region, Tensor]]:
    """What each position contributes [K, N, T, d] to the gradients of a scale and a shift, from gradients g of y.

    The sums over positions are `Elementwise.gradients`.
    """
    rows = layer.axes.rows(g, examples, leading=1)
    result = []
    if layer.scale is not None:
        assert x is not None
        inputs = layer.axes.rows(x.expand(g.shape[1:]), examples).to(rows.dtype)
        result.append((layer.scale, rows * inputs))
    if layer.shift is not None:
        result.append((layer.shift, layer.sign * rows))
    return result


def by_position(shares: Sequence[Tensor]) -> Tensor:
    """The sum of what several uses contribute to each position, [*, T].

    Raises:
        ShapeError: they have different numbers of positions.
    """
    counts = [part.shape[-1] for part in shares]
    if len(set(counts)) > 1:
        raise ShapeError(
            f"the uses of this block have {', '.join(map(str, counts))} positions an example: what one position "
            "contributes is not defined; take the gradients of whole examples"
        )
    return summed(shares)


# --- one use of a weight, vectors and matrices in its own orientation ----------------------------------------------


def oriented(use: WeightUse, vectors: Tensor) -> Tensor:
    """Vectors of a block [Q, *groups, m, n] in the orientation of a use."""
    return vectors.mT if use.transposed else vectors


def formed(use: WeightUse, start: int, stop: int) -> Tensor:
    """D_n of these examples, [K, n, (groups,) d_out, d_in]."""
    return use.rows.part(start, stop).gradients(use.g[:, start:stop])


def inner(use: WeightUse, vectors: Tensor) -> Tensor:
    """<V_q, D_n>, [K, Q, N]."""
    if inner_by_rows(use, len(vectors)):
        return in_pieces(use, vectors, lambda shares: shares.sum(-1))
    if of_one_position(use):
        assert isinstance(use.rows, DenseRows)
        return torch.stack([inner_of_outer(g[:, 0], use.rows.values[:, 0], vectors) for g in use.g])
    flat = vectors.flatten(1)
    return torch.cat([flat @ formed(use, i, j).flatten(2).mT for i, j in chunks(use.rows.shape, use.g)], 2)


def of_one_position(use: WeightUse) -> bool:
    """Whether gradients are single products g_n a_n^T of dense rows."""
    return isinstance(use.rows, DenseRows) and use.g.shape[2:-1] == (1,)


def inner_of_outer(g: Tensor, a: Tensor, vectors: Tensor) -> Tensor:
    """<V_q, g_n a_n^T>, [Q, N], from g [N, m] and a [N, n].

    Some rows of all matrices at a time: products stay as wide as Q and N, and their operands in the cache.
    """
    total = vectors.new_zeros(len(vectors), len(g))
    into = total if writes_in_place(vectors, g, a) else None
    step = max(1, PANEL // max(1, a.numel()))
    for start in range(0, vectors.shape[1], step):
        rows = (g[:, start : start + step, None] * a.unsqueeze(1)).flatten(1)
        total = torch.addmm(total, vectors[:, start : start + step].flatten(1), rows.mT, out=into)
    return total


def inner_by_rows(use: WeightUse, queries: int) -> bool:
    """Whether inner products take fewer multiplications without the gradients, or about as many and are not wide."""
    if of_one_position(use) and queries >= WIDE:
        return False
    positions, d_in, d_out, one_hot = *use.rows.shape[-2:], use.g.shape[-1], isinstance(use.rows, OneHotRows)
    several = len(use.g)
    last = several * d_out if outputs_last(use) else d_in
    without = queries * positions * (several * d_out if one_hot else d_out * d_in + last)
    return without <= several * (positions * d_out * (1 if one_hot else d_in) + queries * d_out * d_in)


def outputs_last(use: WeightUse) -> bool:
    """Whether g_t . (V a_t) takes fewer multiplications than (V^T g_t) . a_t; V a_t is shared by all vectors."""
    return len(use.g) > 1 or use.g.shape[-1] <= use.rows.shape[-1]


def in_pieces(use: WeightUse, vectors: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made of `position_shares`, of as many vectors and examples at a time as fit into memory: [K, Q, N, *]."""
    each = len(use.g) * math.prod(use.rows.shape[1:-1]) * min(use.rows.shape[-1], use.g.shape[-1])
    queries = max(1, layer_rows.GRADIENTS_AT_ONCE // max(1, each))
    examples = max(1, queries // max(1, len(vectors)))
    spans = range(0, use.rows.shape[0], examples)
    parts = [
        torch.cat([finish(position_shares(use, some, i, i + examples)) for i in spans], 2)
        for some in vectors.split(queries)
    ]
    return torch.cat(parts, 1)


def position_shares(use: WeightUse, vectors: Tensor, start: int, stop: int) -> Tensor:
    """<V_q, g_nt a_nt^T> = g_nt . (V_q a_nt) for these examples: [K, Q, n, T]."""
    rows, g = use.rows.part(start, stop), use.g[:, start:stop]
    if isinstance(rows, OneHotRows):
        return torch.einsum("qdnt,kntd->kqnt", vectors[:, :, rows.index], g)
    assert isinstance(rows, DenseRows)
    if outputs_last(use):
        found = (torch.einsum("n...ti,q...oi->qn...to", rows.values, vectors) * g.unsqueeze(1)).sum(-1)
    else:
        found = (torch.einsum("kn...to,q...oi->kqn...ti", g, vectors) * rows.values).sum(-1)
    return found.sum(3) if found.ndim == 5 else found


def projected(use: WeightUse, left: Tensor, right: Tensor) -> Tensor:
    """L D_n R^T, [K, N, (groups,) p, q]."""
    if projected_by_rows(use, left.shape[-2], right.shape[-2]):
        return (use.g @ left.mT).mT @ mapped(use.rows, right)
    p, m, q, n = *left.shape[-2:], *right.shape[-2:]
    left_first = p * n * (m + q) <= m * q * (n + p)
    parts = []
    for start, stop in chunks(use.rows.shape, use.g):
        gradients = formed(use, start, stop)
        parts.append((left @ gradients) @ right.mT if left_first else left @ (gradients @ right.mT))
    return torch.cat(parts, 1)


def projected_by_rows(use: WeightUse, p: int, q: int) -> bool:
    """Whether a projection to [p, q] takes fewer multiplications without the gradients."""
    positions, n, m, one_hot = *use.rows.shape[-2:], use.g.shape[-1], isinstance(use.rows, OneHotRows)
    several = len(use.g)
    without = positions * (several * (m * p + p * q) + (0 if one_hot else n * q))
    return without <= several * (positions * m * (1 if one_hot else n) + min(p * n * (m + q), m * q * (n + p)))


def mapped(rows: Rows, matrix: Tensor) -> Tensor:
    """R a [N, (groups,) T, q] for every row a and a matrix R [(groups,) q, d]."""
    if isinstance(rows, OneHotRows):
        return torch.nn.functional.embedding(rows.index, matrix.mT)
    assert isinstance(rows, DenseRows)
    return rows.values @ matrix.mT


def squared_norms(use: WeightUse) -> Tensor:
    """|D_n|^2 = sum_ts (g_nt . g_ns) (a_nt . a_ns), [K, N]."""
    if isinstance(use.rows, OneHotRows):
        products = (use.rows.index.unsqueeze(-1) == use.rows.index.unsqueeze(-2)).to(use.g.dtype)
    else:
        assert isinstance(use.rows, DenseRows)
        products = use.rows.values @ use.rows.values.mT
    return (use.g @ use.g.mT * products).flatten(2).sum(2)


def norms_by_rows(use: WeightUse) -> bool:
    """Whether norms take fewer multiplications without the gradients."""
    positions, n, m, one_hot = *use.rows.shape[-2:], use.g.shape[-1], isinstance(use.rows, OneHotRows)
    several = len(use.g)
    return positions**2 * (several * m + (0 if one_hot else n)) <= several * m * (positions * (1 if one_hot else n) + n)
