"""The projector-splitting step of `ksl` for tensors of any order: one higher-order power method sweep.

Rearranged, a Kronecker product of d factors is the rank-one tensor of their vectors, of order d with axes n_i^2, and
vec D vec D^T is a tensor that is contracted with all but one factor by mode products with D.

Sources: De Lathauwer, De Moor and Vandewalle 2000, On the best rank-1 and rank-(R1, ..., RN) approximation of
higher-order tensors (the power method); Yudin et al. 2025, arXiv 2511.06477.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvlib.errors import ShapeError
from curvlib.linalg.gram import full_precision
from curvlib.linalg.middle_gram import symmetric_product
from curvlib.linalg.precision import highest_matmul
from curvlib.linalg.projector_splitting import check_sweeps, inner, unit_sum


def hopm(
    scale: Tensor,
    factors: tuple[Tensor, ...],
    gradient: Tensor,
    decay: float | Tensor,
    weight: float | Tensor,
    *,
    sweeps: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step for decay * scale * U_1 (x) ... (x) U_d + weight * vec D vec D^T, for a gradient of order d.

    In turn, each factor becomes the contraction of the sum with all others,

        U_i' = (decay * scale * prod_{j != i} <U_j, U_j'> U_i + weight * D_(i) (x)_{j != i} U_j' D_(i)^T) / || . ||

    where U_j' is the newest one, and the scale is the last norm. It is `ksl` for d = 2, started at the right factor,
    the exact moving average for d = 1, and, with many sweeps, a Kronecker product that no change of one factor brings
    nearer. Positive semidefinite factors stay so.

    Args:
        scale: [*].
        factors: U_i [*, n_i, n_i], positive semidefinite, of unit Frobenius norm.
        gradient: D [*, n_1, ..., n_d].
        decay: what remains of the old product, a number or [*].
        weight: of the gradient, a number or [*].
        sweeps: over all factors.

    Returns:
        The new scale and unit factors. Where all is zero, the scale is 0 and the factors are the old ones.

    Raises:
        ArgumentError: there is no sweep.
        ShapeError: the factors do not fit the gradient.

    Example:
        >>> units = tuple(torch.eye(n) / n**0.5 for n in (1, 2, 2))
        >>> scale, factors = hopm(torch.tensor(0.0), units, torch.ones(1, 2, 2), 0.5, 0.5)
        >>> torch.round(scale, decimals=4), torch.round(factors[1], decimals=4)
        (tensor(2.), tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]]))
    """
    check_sweeps(sweeps)
    order = len(factors)
    sizes = tuple(factor.shape[-1] for factor in factors)
    if order == 0 or gradient.shape[-order:] != sizes:
        raise ShapeError(f"factors of sizes {sizes} need gradients with these last axes, got {tuple(gradient.shape)}")
    gradient = full_precision(gradient)
    newest = list(factors)
    kept = decay * scale
    overlaps = [torch.ones_like(scale)] * order
    for _ in range(sweeps):
        for mode, factor in enumerate(factors):
            others = math.prod(overlaps[:mode] + overlaps[mode + 1 :], start=kept)
            newest[mode], scale = unit_sum(factor, others, mode_gram(gradient, newest, mode), weight)
            overlaps[mode] = inner(newest[mode], factor)
    return scale, tuple(newest)


def mode_gram(gradient: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """D_(i) (U_1 (x) ... without U_i ... (x) U_d) D_(i)^T [*, n_i, n_i] for the unfolding D_(i) along a mode."""
    order = len(factors)
    product = gradient
    for other, factor in enumerate(factors):
        if other != mode:
            product = along(product, factor, other - order)
    return symmetric_product(unfolded(gradient, mode, order), unfolded(product, mode, order))


def along(tensor: Tensor, factor: Tensor, axis: int) -> Tensor:
    """The mode product of a symmetric factor [*, n, n] with an axis of length n, counted from the end."""
    last = tensor.movedim(axis, -1)
    rows = last.reshape(*factor.shape[:-2], -1, last.shape[-1])
    return highest_matmul(rows, factor).reshape(last.shape).movedim(-1, axis)


def unfolded(tensor: Tensor, mode: int, order: int) -> Tensor:
    """The unfolding [*, n_i, product of the others] of a tensor [*, n_1, ..., n_d]."""
    first = tensor.ndim - order
    return tensor.unsqueeze(-1).movedim(first + mode, first).flatten(first + 1)
