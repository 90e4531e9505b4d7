"""KL-Shampoo: the whitening by Kronecker factors that are nearest in the Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Literal

from curvlib.factors.kl_shampoo import KLFactors
from curvlib.optim.refresh import Every, Refresh
from curvlib.optim.second_moments import FactorMoment
from curvlib.optim.shapes import Shapes
from curvlib.optim.soap import rotated_adam
from curvlib.optim.transformation import GradientTransformation


def scale_by_kl_shampoo(
    *,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    bias_correction: bool = True,
    max_dimension: int = 10_000,
    one_sided: bool = False,
    merge_dimensions: int | Literal[False] = False,
    block_size: int | None = None,
    start_step: int = 0,
    refresh: Refresh = Every(10),  # noqa: B008
    damping: float = 1e-8,
) -> GradientTransformation:
    """Updates L^(-1/2) M R^(-1/2), with the factors of `KLFactors` and the moving average M of the gradients.

    The roots are taken in the bases Q_L, Q_R that QR power iterations refresh: with P = Q_L^T D Q_R,

        M <- b1 M + (1 - b1) P,   l <- b2 l + (1 - b2)/n (P * P) / r,   r <- b2 r + (1 - b2)/m (P * P)^T / l
        update = Q_L (c M / (sqrt(l r^T) + eps)) Q_R^T,   c = 1 / (1 - b1^t)

    where l = diag(Q_L^T L Q_L) and r = diag(Q_R^T R Q_R) hold exactly, between refreshes by these averages and after a
    refresh by definition. Vectors and scalars are treated by Adam. No second moment is kept besides.

    Args:
        betas: (b1, b2), in [0, 1); b1 = 0 whitens the gradient itself.
        eps: added to the root of the eigenvalues.
        bias_correction: False: c = 1.
        max_dimension: sides wider than this have no factor.
        one_sided: only the narrower side of a matrix has a factor.
        merge_dimensions: see `Shapes`.
        block_size: sides are cut into pieces of this width.
        start_step: see `scale_by_soap`; with 0 the first gradient starts factors and bases, and its update is zero.
        refresh: `Every`, `Adaptive` or `Warmup`.
        damping: of inverses of factors, relative; see `KLFactors`.

    Raises:
        ArgumentError: a number is out of its range.
        NonFiniteError: by ``update``, after three failed refreshes of a basis in a row; names the parameter.

    Source:
        Lin et al. 2025, Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization,
        arXiv 2509.03378.

    Example:
        >>> import torch
        >>> grads = {"w": torch.tensor([[1.0, 0.0], [0.0, 100.0]])}
        >>> whitening = scale_by_kl_shampoo(betas=(0.0, 0.9))
        >>> state = whitening.init(grads)
        >>> for _ in range(200):
        ...     updates, state = whitening.update(grads, state)
        >>> torch.round(updates["w"].diagonal(), decimals=3)  # large and small gradients alike
        tensor([1.4140, 1.4140])
    """
    return rotated_adam(
        "scale_by_kl_shampoo",
        betas=betas,
        factor_beta=None,
        eps=eps,
        bias_correction=bias_correction,
        normalize=False,
        shapes=Shapes(max_dimension, one_sided, merge_dimensions, block_size),
        start_step=start_step,
        refresh=refresh,
        transport="none",
        factors=KLFactors(damping),
        second_moment=FactorMoment(),
    )
