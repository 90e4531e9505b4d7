"""KL-Shampoo's factors: the Kronecker product that is nearest in the sense of Kullback and Leibler.

For gradients D [m, n] the factors follow

    L <- b L + (1 - b)/n D R^-1 D^T,    R <- b R + (1 - b)/m D^T L^-1 D,

all from the old ones. A tensor with d axes has one factor an axis, and n_i / (n_1 ... n_d) in place of 1/n. `KLFactors`
takes the inverses in eigenbases that somebody else refreshes, `with_inverses` exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.factors.axes import entrywise, folded, mode_gram, mode_product, outer, unfolded
from curvlib.factors.rule import FactorRule, Factors, Modes, Observation, averaged, zeros
from curvlib.linalg.eager import may_look_at
from curvlib.linalg.middle_gram import middle_gram
from curvlib.linalg.orthogonal_iteration import rayleigh
from curvlib.linalg.precision import highest_matmul

Number = float | Tensor
GUARD = 10  # times eps times the trace is added to a factor before it is inverted exactly


@dataclass(frozen=True)
class KLFactors(FactorRule):
    """Factors that minimise the Kullback-Leibler divergence between Gaussians: L <- b L + (1 - b)/n D R^-1 D^T.

    And R <- b R + (1 - b)/m D^T L^-1 D with the old L. Inverses are taken in the current bases as Q diag(1/l) Q^T with
    l = diag(Q^T R Q), which is R^-1 as far as Q diagonalises R. These eigenvalues are kept: their moving average needs
    the projected gradient only, and is exact. Starts from L (x) R = mean(D^2) I of the first gradient that is not zero,
    which then counts like every other, as it does in the authors' code.

    Args:
        damping: relative to the mean eigenvalue of a factor, added to its eigenvalues where they are inverted.

    Raises:
        ArgumentError: the damping is negative.

    Source:
        Lin et al. 2025, Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization,
        arXiv 2509.03378.

    Example:
        >>> gradient = torch.tensor([[[3.0, 4.0]]])
        >>> factors = KLFactors().first(Observation(gradient, gradient, gradient**2), (0, 1), 0.5)
        >>> torch.allclose(factors.matrices[0], factors.eigenvalues[0])
        True
    """

    damping: float = 1e-8

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ArgumentError(f"the damping of KLFactors must not be negative, got {self.damping}")

    def check(self, shape: Sequence[int], modes: Modes) -> None:
        pass

    def empty(self, stack: Tensor, modes: Modes) -> Factors:
        matrices = zeros(stack, modes)
        return Factors(matrices, tuple(matrix.new_zeros(matrix.shape[:2]) for matrix in matrices))

    def begin(self, seen: Observation, modes: Modes) -> Factors:
        values = isotropic(mean_square(seen.gradient, seen.gradient.ndim - 1), widths(seen, modes))
        return Factors(tuple(map(torch.diag_embed, values)), tuple(values))

    def first(self, seen: Observation, modes: Modes, decay: float | None) -> Factors:
        """The factors of the first gradient; without a decay they are the multiple of the identity."""
        return self.begin(seen, modes) if decay is None else super().first(seen, modes, decay)

    def update(
        self, factors: Factors, seen: Observation, modes: Modes, bases: Sequence[Tensor], decay: float | None
    ) -> Factors:
        assert factors.eigenvalues is not None
        empty = factors.eigenvalues[0].sum(-1) == 0
        if not may_look_at(empty) or bool(empty.any()):
            fresh = torch.where(empty, seen.squares.flatten(1).mean(1), 0)
            factors = added(factors, isotropic(fresh, widths(seen, modes)))
        assert factors.eigenvalues is not None
        inverses = [1 / self.damped(values) for values in factors.eigenvalues]
        matrices, eigenvalues = [], []
        for i, mode in enumerate(modes):
            others = [j for j in range(len(modes)) if j != i]
            half = seen.partial
            if i > 0:
                half = seen.gradient
                for j in others[::-1] if bases else ():
                    half = mode_product(half, bases[j], modes[j])
            rows = unfolded(half, mode, half.ndim - 1)
            share = rows.new_full((), 1 / rows.shape[-1])
            weights = share.expand(rows.shape[0], rows.shape[-1])
            if others:
                product = outer([inverses[j] for j in others], [modes[j] for j in others], half.ndim - 1)
                spread = product.expand([1 if axis == mode + 1 else n for axis, n in enumerate(half.shape)])
                weights = share * unfolded(spread, mode, spread.ndim - 1).squeeze(1)
            matrices.append(averaged(factors.matrices[i], middle_gram(rows, weights), decay))
            diagonal = (unfolded(seen.squares, mode, seen.squares.ndim - 1) @ weights.unsqueeze(-1)).squeeze(-1)
            eigenvalues.append(averaged(factors.eigenvalues[i], diagonal, decay))
        return Factors(tuple(matrices), tuple(eigenvalues))

    def damped(self, eigenvalues: Tensor) -> Tensor:
        """Positive, however small the eigenvalues are; 1 where all are zero."""
        mean = eigenvalues.mean(-1, keepdim=True)
        floor = self.damping * mean + torch.finfo(eigenvalues.dtype).tiny
        return torch.where(mean > 0, eigenvalues.clamp(min=0) + floor, 1)

    def rebased(self, factors: Factors, bases: Sequence[Tensor]) -> Factors:
        pairs = zip(factors.matrices, bases, strict=True)
        return Factors(factors.matrices, tuple(rayleigh(matrix, basis)[1] for matrix, basis in pairs))


def widths(seen: Observation, modes: Modes) -> list[int]:
    """The widths of the modes."""
    return [seen.gradient.shape[mode + 1] for mode in modes]


def added(factors: Factors, values: Sequence[Tensor]) -> Factors:
    """The factors plus diagonal matrices of these entries, which are the same in every basis."""
    assert factors.eigenvalues is not None
    pairs = zip(factors.matrices, factors.eigenvalues, values, strict=True)
    matrices, eigenvalues = zip(*((m + torch.diag_embed(x), e + x) for m, e, x in pairs), strict=True)
    return Factors(matrices, eigenvalues)


def mean_square(gradient: Tensor, order: int) -> Tensor:
    """The mean of D o D over the last axes, [*]."""
    return gradient.square().flatten(-order).mean(-1)


def isotropic(mean: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The diagonals [*, n_i] of equal multiples of the identity whose product is mean [*] times the identity.

    Example:
        >>> isotropic(torch.tensor([9.0]), (1, 2))
        [tensor([[3.]]), tensor([[3., 3.]])]
    """
    each = (mean ** (1 / len(widths))).unsqueeze(-1)
    return [each.expand(*mean.shape, width) for width in widths]


def with_inverses(
    factors: Sequence[Tensor], diagonal: Sequence[bool], gradient: Tensor, kept: Tensor, new: Tensor
) -> list[Tensor]:
    """The factors after one more gradient, kept * M + new * n_i / (n_1 ... n_d) D_(i) (inverses) D_(i)^T.

    Inverses are those of M + 10 eps tr(M) I, with eps the precision of the dtype: that is rounding for factors that can
    be inverted, and keeps singular ones finite. Factors that are all zero start from mean(D o D) I.

    Args:
        factors: [*, n_i, n_i], or the diagonals [*, n_i] of those that are kept diagonal.
        diagonal: which those are.
        gradient: D [*, n_1, ..., n_d].
        kept: the weight of the factors [*].
        new: the weight of the gradient [*].

    Returns:
        The new factors, in the same form.

    Example:
        >>> one, eyes = torch.ones(()), [torch.eye(1), 4 * torch.eye(2)]
        >>> new = with_inverses(eyes, (False, False), torch.tensor([[2.0, 2.0]]), 0 * one, one)
        >>> new[0].round(decimals=3)
        tensor([[1.]])
    """
    order, sizes = len(factors), gradient.shape[-len(factors) :]
    empty = torch.stack([traces(x, flag) for x, flag in zip(factors, diagonal, strict=True)]).prod(0) == 0
    fresh = isotropic(torch.where(empty, mean_square(gradient, order), 0), sizes)
    factors = [
        x + (start if flag else torch.diag_embed(start))
        for x, start, flag in zip(factors, fresh, diagonal, strict=True)
    ]
    guard = GUARD * torch.finfo(gradient.dtype).eps
    roots = [whitening(x, guard, diagonal=flag) for x, flag in zip(factors, diagonal, strict=True)]
    result = []
    for i, factor in enumerate(factors):
        white = gradient
        for j in range(order):
            if j != i:
                rows = unfolded(white, j, order)
                rows = roots[j].unsqueeze(-1) * rows if diagonal[j] else highest_matmul(roots[j], rows)
                white = folded(rows, j, gradient, order)
        gram = mode_gram(white, i, order, diagonal=diagonal[i]) * (sizes[i] / math.prod(sizes))
        result.append(entrywise(kept, factor) * factor + entrywise(new, factor) * gram)
    return result


def whitening(factor: Tensor, guard: float, *, diagonal: bool) -> Tensor:
    """W with W^T W = (M + guard tr(M) I)^-1, [*, n, n], or [*, n] of a diagonal factor; of a zero one, the identity.

    Example:
        >>> whitening(torch.tensor([4.0, 1.0]), 0.0, diagonal=True)
        tensor([0.5000, 1.0000])
    """
    trace = traces(factor, diagonal)
    shift = torch.where(trace > 0, guard * trace, torch.ones_like(trace))
    if diagonal:
        return (factor + shift.unsqueeze(-1)).rsqrt()
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    root, _ = torch.linalg.cholesky_ex(factor + shift[..., None, None] * identity)  # does not wait for a device
    return torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False)


def traces(factor: Tensor, diagonal: bool) -> Tensor:
    """The trace [*] of a factor, or of one that is kept diagonal."""
    return (factor if diagonal else factor.diagonal(dim1=-2, dim2=-1)).sum(-1)
