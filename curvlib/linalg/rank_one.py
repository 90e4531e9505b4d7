"""Rank-one summaries of one gradient: the start of a Kronecker product, and a moving average of squares.

Nothing looks at values: a zero is replaced by `torch.where`.

Sources: Yudin et al. 2025, arXiv 2511.06477 (the start of DyKAF); Shazeer and Stern 2018, arXiv 1804.04235 (second
moments of rank one, there from row and column sums).
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.linalg.gram import full_precision
from curvlib.linalg.middle_gram import middle_gram
from curvlib.linalg.precision import highest_matmul
from curvlib.linalg.projector_splitting import entrywise, inner, unit

SQUARINGS = 14  # a direction falls off as (s_i / s_1)^(2^15): singular values 0.2 percent below s_1 are gone
POLISHING = 2  # products with D and D^T that remove the rounding of the squarings


def leading_pair(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Kronecker product nearest to vec D vec D^T: s^2 u u^T (x) v v^T, with the leading singular triplet of D.

    Found by squaring the Gram matrix of the shorter side, which takes products only: no decomposition that a GPU would
    have to be waited for. Where s_1 and s_2 are closer than 0.2 percent, u and v may lie between the first two.

    Args:
        gradient: D [*, m, n].

    Returns:
        s^2 [*] and the unit factors u u^T [*, m, m] and v v^T [*, n, n], in full precision. A zero gradient has scale 0
        and multiples of the identity, from which `ksl` can reach every direction.

    Example:
        >>> leading_pair(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        (tensor(9.), tensor([[1., 0.],
                [0., 0.]]), tensor([[1., 0.],
                [0., 0.]]))
    """
    gradient = full_precision(gradient)
    m, n = gradient.shape[-2:]
    largest = gradient.abs().amax((-2, -1), keepdim=True)
    zero = largest == 0
    relative = gradient / torch.where(zero, 1, largest)
    short = relative if m <= n else relative.mT  # [*, a, b] with a <= b
    u = leading_direction(middle_gram(short))  # [*, a, 1]
    for _ in range(POLISHING):
        v, _ = unit(highest_matmul(short.mT, u), u.new_zeros(()))
        u, singular = unit(highest_matmul(short, v), u.new_zeros(()))
    if m > n:
        u, v = v, u
    return (largest[..., 0, 0] * singular).square(), projection(u, zero), projection(v, zero)


def leading_direction(matrix: Tensor) -> Tensor:
    """A unit vector [*, d, 1] in the leading eigenspace of a positive semidefinite matrix [*, d, d]."""
    power, _ = unit(matrix, matrix)
    for _ in range(SQUARINGS):
        power, _ = unit(highest_matmul(power, power), power)
    # Columns of the projection on the leading eigenspace lie in it; the longest is farthest from rounding.
    longest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    column = power.take_along_dim(longest, -1)
    return unit(column, column)[0]


def projection(vector: Tensor, zero: Tensor) -> Tensor:
    """The projection u u^T [*, d, d] on a unit vector [*, d, 1]; a unit multiple of the identity where ``zero``."""
    size = vector.shape[-2]
    return torch.where(zero, torch.eye(size, dtype=vector.dtype, device=vector.device) / size**0.5, vector * vector.mT)


def rank_one_moment(
    scale: Tensor, left: Tensor, right: Tensor, squares: Tensor, decay: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a rank-one moving average a l r^T of squared gradients D2.

        l' = (decay a l + (1 - decay) D2 r) / || . ||,   r' = (decay a r + (1 - decay) D2^T l) / || . ||
        a' = decay a <l', l> <r', r> + (1 - decay) l'^T D2 r':

    the parallel form of the rank-one integrator, exact where l r^T and D2 have the same directions. Nothing becomes
    negative.

    Args:
        scale: a [*].
        left: l [*, m], nonnegative, of unit norm.
        right: r [*, n], likewise.
        squares: D2 [*, m, n].
        decay: a number or [*].

    Returns:
        The new scale and unit vectors; where all is zero, scale 0 and the old vectors.

    Example:
        >>> start = torch.tensor([0.6, 0.8])
        >>> rank_one_moment(torch.tensor(0.0), start, start, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 0.0)[1]
        tensor([1., 0.])
    """
    squares = full_precision(squares)
    row, column = left.unsqueeze(-1), right.unsqueeze(-2)  # [*, m, 1], [*, 1, n]
    kept, share = entrywise(decay * scale), entrywise(torch.ones_like(scale) - decay)
    new_row, _ = unit(kept * row + share * (squares * column).sum(-1, keepdim=True), row)
    new_column, _ = unit(kept * column + share * (squares * row).sum(-2, keepdim=True), column)
    old = decay * scale * inner(new_row, row) * inner(new_column, column)
    new = (1 - decay) * inner((squares * new_column).sum(-1, keepdim=True), new_row)
    return old + new, new_row.squeeze(-1), new_column.squeeze(-2)
