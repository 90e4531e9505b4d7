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
from curvlib.estimators.correction import Use
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.rows import DenseRows, OneHotRows, Rows, chunks, summed
from curvlib.linalg.gram import writes_in_place
from curvlib.operators.layout import Layout, Region
from curvlib.pytree import register, static

PANEL = 1 << 21  # elements of a part of the gradients that is read again at once
WIDE = 64  # vectors from which on a product with all of them takes much longer than to form what it is with


class BlockGradients(ABC):
    """The gradients of N examples for one block, whose tensor has the shape [*groups, m, n] or [size]."""

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        """The gradients of these examples, [n, *shape]."""

    @abstractmethod
    def inner(self, vectors: Tensor) -> Tensor:
        """Inner products <V_q, D_n> with vectors [Q, *shape]: [Q, N]."""

    @abstractmethod
    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        """L D_n R^T for L [*groups, p, m] and R [*groups, q, n]: [N, *groups, p, q]."""

    @abstractmethod
    def position_inner(self, vectors: Tensor) -> Tensor:
        """Inner products with the share of each position of the layer's rows: [Q, N, T]; their sum over T is `inner`.

        Raises:
            ShapeError: the uses of the block have different numbers of positions.
        """


@register
class DenseGradients(BlockGradients):
    """Gradients as a tensor, which stand for one position.

    Args:
        values: [N, *shape].
    """

    values: Tensor

    def dense(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def inner(self, vectors: Tensor) -> Tensor:
        return vectors.flatten(1) @ self.values.flatten(1).mT

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ self.values @ right.mT

    def position_inner(self, vectors: Tensor) -> Tensor:
        return self.inner(vectors).unsqueeze(-1)


@register
class RowGradients(BlockGradients):
    """Gradients as rows, of every use of a weight.

    Args:
        rows: a [N, (groups,) T, d], by use.
        g: [1, N, (groups,) T, d_out], by use.
        transposed: by use, whether it is the transposed weight that is used.
    """

    rows: tuple[Rows, ...]
    g: tuple[Tensor, ...]
    transposed: tuple[bool, ...] = static()

    @classmethod
    def of(cls, uses: Sequence[Use]) -> RowGradients:
        """The gradients of a weight with these uses."""
        return cls(*(tuple(getattr(use, name) for use in uses) for name in ("rows", "g", "transposed")))

    @property
    def uses(self) -> tuple[Use, ...]:
        """The uses of the weight."""
        return tuple(map(Use, self.rows, self.g, self.transposed))

    def dense(self, start: int, stop: int) -> Tensor:
        return summed([use.gradients(start, stop)[0] for use in self.uses])

    def inner(self, vectors: Tensor) -> Tensor:
        return summed([inner(use, oriented(use, vectors)) for use in self.uses])

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        parts = [projected(use, right, left).mT if use.transposed else projected(use, left, right) for use in self.uses]
        return summed(parts)

    def position_inner(self, vectors: Tensor) -> Tensor:
        return by_position([in_pieces(use, oriented(use, vectors), lambda shares: shares) for use in self.uses])


@register
class ElementwiseGradients(BlockGradients):
    """Gradients of scales and shifts.

    Args:
        values: [N, size].
        rows: what each position contributes to each scale or shift, [N, T, d].
        regions: the elements of parameters that these are.
        layout: of the block.
    """

    values: Tensor
    rows: tuple[Tensor, ...]
    regions: tuple[Region, ...] = static()
    layout: Layout = static()

    @classmethod
    def of(cls, rows: Sequence[tuple[Region, Tensor]], layout: Layout) -> ElementwiseGradients:
        """The gradients of a block, from what each position contributes."""
        like = rows[0][1]
        zero = like.new_zeros(())
        leaves: dict[int, Tensor] = {}
        for piece in layout.pieces:
            leaves[piece.leaf] = zero.expand(len(like), *piece.leaf_shape)
        for region, part in rows:
            leaves[region.leaf] = leaves[region.leaf] + region.scatter(part.sum(1))
        regions, parts = zip(*rows, strict=True)
        return cls(layout.gather(leaves), parts, regions, layout)

    def dense(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def inner(self, vectors: Tensor) -> Tensor:
        return vectors @ self.values.mT

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        raise ShapeError("a block of scales and shifts has no two sides to be projected on")

    def position_inner(self, vectors: Tensor) -> Tensor:
        leaves = self.layout.scatter(vectors)
        return by_position(
            [
                torch.einsum("qd,ntd->qnt", region.read(leaves[region.leaf]), part)
                for region, part in zip(self.regions, self.rows, strict=True)
            ]
        )


def elementwise_rows(layer: Elementwise, x: Tensor | None, g: Tensor, examples: int) -> list[tuple[Region, Tensor]]:
    """What each position contributes [N, T, d] to the gradients of a scale and a shift, from gradients g [1, *y.shape].

    The sums over positions are `Elementwise.gradients`.
    """
    rows = layer.axes.rows(g, examples, leading=1)[0]
    result = []
    if layer.scale is not None:
        assert x is not None
        inputs = layer.axes.rows(x.expand(g.shape[1:]), examples).to(rows.dtype)
        result.append((layer.scale, rows * inputs))
    if layer.shift is not None:
        result.append((layer.shift, layer.sign * rows))
    return result


def by_position(shares: Sequence[Tensor]) -> Tensor:
    """The sum of what several uses contribute to each position, [Q, N, T].

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


def oriented(use: Use, vectors: Tensor) -> Tensor:
    """Vectors of a block [Q, *groups, m, n] in the orientation of a use."""
    return vectors.mT if use.transposed else vectors


def formed(use: Use, start: int, stop: int) -> Tensor:
    """D_n of these examples, [n, (groups,) d_out, d_in]."""
    return use.rows.part(start, stop).gradients(use.g[:, start:stop])[0]


def inner(use: Use, vectors: Tensor) -> Tensor:
    """<V_q, D_n>, [Q, N]."""
    if inner_by_rows(use, len(vectors)):
        return in_pieces(use, vectors, lambda shares: shares.sum(-1))
    if of_one_position(use):
        assert isinstance(use.rows, DenseRows)
        return inner_of_outer(use.g[0, :, 0], use.rows.values[:, 0], vectors)
    flat = vectors.flatten(1)
    return torch.cat([flat @ formed(use, i, j).flatten(1).mT for i, j in chunks(use.rows.shape, use.g)], 1)


def of_one_position(use: Use) -> bool:
    """Whether gradients are single products g_n a_n^T of dense rows."""
    return isinstance(use.rows, DenseRows) and use.rows.shape[1:-1] == (1,)


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


def inner_by_rows(use: Use, queries: int) -> bool:
    """Whether inner products take fewer multiplications without the gradients, or about as many and are not wide."""
    if of_one_position(use) and queries >= WIDE:
        return False
    positions, d_in, d_out, one_hot = *use.rows.shape[-2:], use.g.shape[-1], isinstance(use.rows, OneHotRows)
    without = queries * positions * (d_out if one_hot else d_out * d_in + min(d_out, d_in))
    return without <= positions * d_out * (1 if one_hot else d_in) + queries * d_out * d_in


def in_pieces(use: Use, vectors: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made of `position_shares`, for as many vectors and examples at a time as fit into memory: [Q, N, *]."""
    each = math.prod(use.rows.shape[1:-1]) * min(use.rows.shape[-1], use.g.shape[-1])
    queries = max(1, layer_rows.GRADIENTS_AT_ONCE // max(1, each))
    examples = max(1, queries // max(1, len(vectors)))
    spans = range(0, use.rows.shape[0], examples)
    parts = [
        torch.cat([finish(position_shares(use, some, i, i + examples)) for i in spans], 1)
        for some in vectors.split(queries)
    ]
    return torch.cat(parts)


def position_shares(use: Use, vectors: Tensor, start: int, stop: int) -> Tensor:
    """<V_q, g_nt a_nt^T> = g_nt . (V_q a_nt) for these examples: [Q, n, T]."""
    rows, g = use.rows.part(start, stop), use.g[0, start:stop]
    if isinstance(rows, OneHotRows):
        return torch.einsum("qdnt,ntd->qnt", vectors[:, :, rows.index], g)
    assert isinstance(rows, DenseRows)
    if g.shape[-1] <= rows.shape[-1]:
        found = (torch.einsum("n...ti,q...oi->qn...to", rows.values, vectors) * g).sum(-1)
    else:
        found = (torch.einsum("n...to,q...oi->qn...ti", g, vectors) * rows.values).sum(-1)
    return found.sum(2) if found.ndim == 4 else found


def projected(use: Use, left: Tensor, right: Tensor) -> Tensor:
    """L D_n R^T, [N, (groups,) p, q]."""
    if projected_by_rows(use, left.shape[-2], right.shape[-2]):
        return (use.g[0] @ left.mT).mT @ mapped(use.rows, right)
    p, m, q, n = *left.shape[-2:], *right.shape[-2:]
    left_first = p * n * (m + q) <= m * q * (n + p)
    parts = []
    for start, stop in chunks(use.rows.shape, use.g):
        gradients = formed(use, start, stop)
        parts.append((left @ gradients) @ right.mT if left_first else left @ (gradients @ right.mT))
    return torch.cat(parts)


def projected_by_rows(use: Use, p: int, q: int) -> bool:
    """Whether a projection to [p, q] takes fewer multiplications without the gradients."""
    positions, n, m, one_hot = *use.rows.shape[-2:], use.g.shape[-1], isinstance(use.rows, OneHotRows)
    without = positions * (m * p + (0 if one_hot else n * q) + p * q)
    return without <= positions * m * (1 if one_hot else n) + min(p * n * (m + q), m * q * (n + p))


def mapped(rows: Rows, matrix: Tensor) -> Tensor:
    """R a [N, (groups,) T, q] for every row a and a matrix R [(groups,) q, d]."""
    if isinstance(rows, OneHotRows):
        return torch.nn.functional.embedding(rows.index, matrix.mT)
    assert isinstance(rows, DenseRows)
    return rows.values @ matrix.mT
