"""The best Kronecker product near decay * F + weight * E[vec D vec D^T], one step at a time (DyKAF's factors).

Rearranged, a Kronecker product L (x) R is the rank-one matrix vec(L) vec(R)^T, and E[vec D vec D^T] is the map
X -> E[D X D^T]. So the Kronecker product nearest to a second moment of gradients is the leading singular pair of its
rearrangement, and one that follows a moving average is a rank-one projector-splitting integrator: products with the
map and its transpose, of the cost of Shampoo's factors and one product a side more.

Products F = scale * L (x) R are kept as a scale [*] and factors of unit Frobenius norm, L [*, m, m] and R [*, n, n].
Nothing looks at values: a zero is replaced by `torch.where`.

Sources: Yudin et al. 2025, arXiv 2511.06477 (DyKAF); Lubich and Oseledets 2014, arXiv 1301.1058 (projector splitting);
Ceruti and Lubich 2022, arXiv 2010.02022 (basis update and Galerkin); Van Loan and Pitsianis 1993 (rearrangement).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, ShapeError
from curvlib.linalg.gram import full_precision, writes_in_place
from curvlib.linalg.middle_gram import middle_gram, summed_middle_gram


class Rearranged(NamedTuple):
    """A rearranged second moment F = E[vec D vec D^T] as a linear map and its transpose.

    Args:
        left: X [*, n, n] -> E[D X D^T] [*, m, m].
        right: Y [*, m, m] -> E[D^T Y D] [*, n, n].

    Example:
        >>> target = Rearranged(left=lambda x: 2 * x, right=lambda y: 2 * y)
        >>> ksl(torch.tensor(0.0), torch.eye(1), torch.eye(1), target, 0.5, 0.5)[0]
        tensor(1.)
    """

    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]


def rearranged(gradients: Tensor, observations: int = 0) -> Rearranged:
    """The rearranged vec D vec D^T of a gradient, or its mean over observations.

    Args:
        gradients: D [*, m, n], or [*, N, m, n] with an axis of observations.
        observations: how many axes before the last two are averaged: 0 or 1.

    Returns:
        The map and its transpose, in full precision.

    Raises:
        ArgumentError: the number of axes is neither 0 nor 1.
        ShapeError: the gradients have too few axes.

    Example:
        >>> rearranged(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), observations=1).left(torch.eye(2))
        tensor([[7.]])
    """
    if observations not in (0, 1):
        raise ArgumentError(f"gradients have 0 or 1 axes of observations, got {observations}: flatten them into one")
    if gradients.ndim < 2 + observations:
        raise ShapeError(
            f"gradients of shape {tuple(gradients.shape)} are not matrices with {observations} axes of observations"
        )
    gradients = full_precision(gradients)
    if observations == 0:
        return Rearranged(lambda x: middle_gram(gradients, x), lambda y: middle_gram(gradients.mT, y))
    count = gradients.shape[-3]
    return Rearranged(
        lambda x: summed_middle_gram(gradients, x) / count, lambda y: summed_middle_gram(gradients.mT, y) / count
    )


def ksl(
    scale: Tensor,
    left: Tensor,
    right: Tensor,
    target: Rearranged,
    decay: float | Tensor,
    weight: float | Tensor,
    *,
    sweeps: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the rank-one projector-splitting integrator for decay * scale * L (x) R + weight * F.

    With r = decay * scale and unit factors,

        K: L' = (r L + weight E[D R D^T]) / || . ||
        S: s  = r <L', L>
        L: R' = (s R + weight E[D^T L' D]) / || . ||,   scale' = the norm divided by.

    This is one sweep of alternating least squares started at R, for the rearranged target, and exact where that has
    rank one. More sweeps go on from R' and lead to the best Kronecker product. Positive semidefinite factors stay so:
    all is a sum of positive semidefinite matrices, because S is an inner product of two, and not a difference of norms.

    Args:
        scale: [*].
        left: L [*, m, m], positive semidefinite, of unit Frobenius norm.
        right: R [*, n, n], likewise.
        target: F, rearranged.
        decay: what remains of the old product, a number or [*].
        weight: of F, a number or [*]; decay + weight = 1 for a moving average, both 1 for a sum.
        sweeps: of alternating least squares.

    Returns:
        The new scale and unit factors. Where the target is zero, the scale is 0 and the factors are the old ones.

    Raises:
        ArgumentError: there is no sweep.

    Example:
        >>> unit = torch.eye(2) / 2**0.5
        >>> target = rearranged(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> scale, left, right = ksl(torch.tensor(2.0), unit, unit, target, 0.0, 1.0)
        >>> scale.round(decimals=3), left.round(decimals=3)  # the old product is forgotten
        (tensor(4.), tensor([[1., 0.],
                [0., 0.]]))
    """
    check_sweeps(sweeps)
    old = decay * scale
    new_left, new_right = left, right
    size = scale
    for sweep in range(sweeps):
        kept = old if sweep == 0 else old * inner(new_right, right)
        new_left, _ = unit_sum(left, kept, target.left(new_right), weight)
        new_right, size = unit_sum(right, old * inner(new_left, left), target.right(new_left), weight)
    return size, new_left, new_right


def bug(
    scale: Tensor,
    left: Tensor,
    right: Tensor,
    target: Rearranged,
    decay: float | Tensor,
    weight: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The parallel form of `ksl` (basis update and Galerkin): both factors are made from the old ones.

    With r = decay * scale and unit factors,

        U = (r L + weight E[D R D^T]) / || . ||,   V = (r R + weight E[D^T L D]) / || . ||
        scale' = r <L, U> <R, V> + weight <U, E[D V D^T]>:

    the best scale for U (x) V.

    Args:
        scale: [*].
        left: L [*, m, m], positive semidefinite, of unit Frobenius norm.
        right: R [*, n, n], likewise.
        target: F, rearranged.
        decay: what remains of the old product, a number or [*].
        weight: of F, a number or [*].

    Returns:
        The new scale and unit factors. Where the target is zero, the scale is 0 and the factors are the old ones.

    Example:
        >>> unit = torch.eye(2) / 2**0.5
        >>> scale, _, _ = bug(torch.tensor(2.0), unit, unit, rearranged(torch.eye(2)), 0.5, 0.5)
        >>> torch.round(scale, decimals=4)  # 0.5 * 2 + 0.5 * 1
        tensor(1.5000)
    """
    old = decay * scale
    new_left, _ = unit_sum(left, old, target.left(right), weight)
    new_right, _ = unit_sum(right, old, target.right(left), weight)
    kept = old * inner(new_left, left) * inner(new_right, right)
    return kept + weight * inner(new_left, target.left(new_right)), new_left, new_right


def unit_sum(old: Tensor, kept: Tensor, new: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """The sum kept * old + weight * new of positive semidefinite matrices divided by its norm, and the norm [*].

    It is the old matrix, of unit norm, where the sum is zero. As the largest entries of semidefinite matrices are on
    their diagonals, the sum is made at a size where no square leaves the range of float32, in few passes over memory.
    """
    size = torch.maximum(kept * largest_entry(old), weight * largest_entry(new))
    zero = size <= 0
    divisor = torch.where(zero, 1, size)
    total = torch.addcmul(entrywise(weight / divisor) * new, entrywise(torch.where(zero, 1, kept / divisor)), old)
    norm = torch.where(zero, 1, torch.linalg.matrix_norm(total))
    in_place = writes_in_place(total, old, kept, new)
    unit_total = torch.div(total, entrywise(norm), out=total if in_place else None)
    return unit_total, torch.where(zero, 0, norm * size)


def largest_entry(matrix: Tensor) -> Tensor:
    """The largest entry [*] of a positive semidefinite matrix [*, d, d]."""
    return matrix.diagonal(dim1=-2, dim2=-1).amax(-1)


def unit(matrix: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [*, a, b] divided by its Frobenius norm, and the norm [*]; the fallback where that is zero.

    Entries are divided by the largest before they are squared, so that no square leaves the range of float32.
    """
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    zero = largest == 0
    relative = matrix / torch.where(zero, 1, largest)
    norm = torch.linalg.vector_norm(relative, dim=(-2, -1), keepdim=True)
    found = relative / torch.where(zero, 1, norm)
    return torch.where(zero, fallback, found), (largest * norm)[..., 0, 0]


def inner(first: Tensor, second: Tensor) -> Tensor:
    """The Frobenius inner product [*] of matrices [*, a, b]."""
    return (first * second).sum((-2, -1))


def entrywise(numbers: Tensor) -> Tensor:
    """Numbers [*] that multiply matrices [*, a, b]."""
    return numbers[..., None, None]


def check_sweeps(sweeps: int) -> None:
    """Refuses to do nothing."""
    if sweeps < 1:
        raise ArgumentError(f"at least one sweep is needed, got sweeps={sweeps}")
