"""DyKAF: Adam in the eigenbasis of factors that follow the Fisher matrix by projector splitting."""

from __future__ import annotations

from typing import Literal

from curvlib.errors import ArgumentError
from curvlib.factors.dykaf import DyKAFFactors
from curvlib.optim.refresh import Every, Refresh
from curvlib.optim.second_moments import FullMoment, RankOneMoment, Transport
from curvlib.optim.shapes import Shapes
from curvlib.optim.soap import rotated_adam
from curvlib.optim.transformation import GradientTransformation

SECOND_MOMENTS = {"full": FullMoment(), "rank-1": RankOneMoment()}


def scale_by_dykaf(
    *,
    betas: tuple[float, float] = (0.95, 0.95),
    factor_beta: float | None = None,
    eps: float = 1e-8,
    bias_correction: bool = True,
    normalize: bool = False,
    max_dimension: int = 10_000,
    one_sided: bool = False,
    merge_dimensions: int | Literal[False] = False,
    block_size: int | None = None,
    start_step: int = 0,
    refresh: Refresh = Every(10),  # noqa: B008
    transport: Transport = "permute",
    integrator: Literal["ksl", "bug"] = "ksl",
    sweeps: int = 1,
    start: Literal["identity", "svd"] = "identity",
    second_moment: Literal["full", "rank-1"] = "full",
) -> GradientTransformation:
    """Adam in the eigenbasis of a Kronecker product that stays close to the moving average of vec(D) vec(D)^T.

    What `scale_by_soap` does, with the factors of `DyKAFFactors`: scale * L (x) R follows

        F <- b F + (1 - b) vec(D) vec(D)^T

    by one sweep of alternating least squares a step, D R D^T for L and then D^T L D for R: two products more than
    Shampoo's factors take.

    Args:
        betas: (b1, b2), in [0, 1).
        factor_beta: b; None: b2.
        eps: added to sqrt(V).
        bias_correction: False: c = 1.
        normalize: divides updates by their root mean squares.
        max_dimension: sides wider than this have no factor.
        one_sided: only the narrower side of a matrix has a factor.
        merge_dimensions: see `Shapes`.
        block_size: sides are cut into pieces of this width.
        start_step: see `scale_by_soap`.
        refresh: `Every`, `Adaptive` or `Warmup`.
        transport: how V follows the basis; see `scale_by_soap`.
        integrator: see `DyKAFFactors`, as for the next two.
        sweeps: of alternating least squares a step.
        start: of the factors, "identity" or "svd".
        second_moment: "full": Adam's V; "rank-1": V ~ a l r^T, which takes memory for two vectors a matrix.

    Raises:
        ArgumentError: a number or a name is not one of those above.
        NonFiniteError: by ``update``, after three failed refreshes of a basis in a row; names the parameter.

    Source:
        Yudin et al. 2025, DyKAF: dynamical Kronecker approximation of the Fisher information matrix for gradient
        preconditioning, arXiv 2511.06477.

    Example:
        >>> import torch
        >>> dykaf = scale_by_dykaf(second_moment="rank-1", start="svd")
        >>> grads = {"w": torch.tensor([[1.0, 2.0], [3.0, 5.0]])}
        >>> _, state = dykaf.update(grads, dykaf.init(grads))
        >>> state.factors.entries[0].scale.round(decimals=2)  # the largest singular value of the gradient, squared
        tensor(38.9700)
    """
    if second_moment not in SECOND_MOMENTS:
        raise ArgumentError(f"second_moment must be 'full' or 'rank-1', got {second_moment!r}")
    return rotated_adam(
        "scale_by_dykaf",
        betas=betas,
        factor_beta=factor_beta,
        eps=eps,
        bias_correction=bias_correction,
        normalize=normalize,
        shapes=Shapes(max_dimension, one_sided, merge_dimensions, block_size),
        start_step=start_step,
        refresh=refresh,
        transport=transport,
        factors=DyKAFFactors(integrator, sweeps, start),
        second_moment=SECOND_MOMENTS[second_moment],
    )
