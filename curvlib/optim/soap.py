"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from typing import Literal

from curvlib.errors import ArgumentError
from curvlib.factors.rule import FactorRule
from curvlib.factors.shampoo import ShampooFactors
from curvlib.optim.arguments import at_least_zero, below_one
from curvlib.optim.refresh import Every, Refresh
from curvlib.optim.rotated import RotatedAdam
from curvlib.optim.second_moments import FullMoment, SecondMoment, Transport
from curvlib.optim.shapes import Shapes
from curvlib.optim.transformation import GradientTransformation


def scale_by_soap(
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
    factors: FactorRule = ShampooFactors(),  # noqa: B008
) -> GradientTransformation:
    """Adam in the slowly changing eigenbasis of Kronecker factors of the gradients.

    With the gradient D [m, n] of a matrix, and the eigenbases Q_L of L and Q_R of R,

        P = Q_L^T D Q_R,   M <- b1 M + (1 - b1) P,   V <- b2 V + (1 - b2) P * P
        update = Q_L (c M / (sqrt(V) + eps)) Q_R^T,   c = sqrt(1 - b2^t) / (1 - b1^t)
        L <- b L + (1 - b) D D^T,   R <- b R + (1 - b) D^T D

    A refresh is one QR power iteration of each basis, with the columns sorted by their eigenvalues first. Tensors of
    order d have d factors. Vectors and scalars, and leaves whose sides are all too wide, are treated by Adam.

    This is step for step the authors' implementation: the first gradient only starts factors and bases (an
    eigendecomposition), and its update is zero.

    Args:
        betas: (b1, b2), in [0, 1).
        factor_beta: b; None: b2.
        eps: added to sqrt(V) before the bias correction: the authors' convention, not that of `torch.optim.AdamW`.
        bias_correction: False: c = 1.
        normalize: divides the update of each leaf by its root mean square before c; helps when refreshes are rare.
        max_dimension: sides wider than this have no factor.
        one_sided: only the narrower side of a matrix has a factor.
        merge_dimensions: see `Shapes`.
        block_size: sides are cut into pieces of this width.
        start_step: so many gradients are treated by Adam without a rotation while they collect in the factors; then
            the first bases are made. 0: the first gradient makes the bases and is not used for anything else.
        refresh: `Every`, `Adaptive` or `Warmup`; steps are counted like t.
        transport: how V follows a basis that changes by T = Q_old^T Q_new: "permute": only reordered, as the columns
            were sorted; "hadamard": by the entrywise squares of T, which evens V out and costs time; "none". M is
            always rotated.
        factors: `ShampooFactors`, `KLFactors` or `DyKAFFactors`.

    Returns:
        A transformation whose updates are ascent directions like gradients. Its state is a `RotatedState`.

    Raises:
        ArgumentError: a number or a name is not one of those above.
        NonFiniteError: by ``update``, after three failed refreshes of a basis in a row; names the parameter.

    Source:
        Vyas et al. 2024, SOAP: improving and stabilizing Shampoo using Adam, arXiv 2409.11321.

    Example:
        >>> import torch, curvlib as cv
        >>> import curvlib.optim as optim
        >>> params = {"w": torch.tensor([[3.0, 1.0], [-1.0, 2.0]]), "b": torch.tensor([1.0, -1.0])}
        >>> soap = optim.chain(scale_by_soap(refresh=Every(5)), optim.scale_by_learning_rate(0.1))
        >>> state = soap.init(params)
        >>> for _ in range(100):
        ...     updates, state = soap.update(params, state)  # the gradients of |params|^2 / 2
        ...     params = optim.apply_updates(params, updates)
        >>> bool(cv.ravel(params).norm() < 0.5)
        True
    """
    return rotated_adam(
        "scale_by_soap",
        betas=betas,
        factor_beta=factor_beta,
        eps=eps,
        bias_correction=bias_correction,
        normalize=normalize,
        shapes=Shapes(max_dimension, one_sided, merge_dimensions, block_size),
        start_step=start_step,
        refresh=refresh,
        transport=transport,
        factors=factors,
        second_moment=FullMoment(),
    )


def rotated_adam(
    name: str,
    *,
    betas: tuple[float, float],
    factor_beta: float | None,
    eps: float,
    bias_correction: bool,
    normalize: bool,
    shapes: Shapes,
    start_step: int,
    refresh: Refresh,
    transport: Transport,
    factors: FactorRule,
    second_moment: SecondMoment,
) -> GradientTransformation:
    """`RotatedAdam` with checked arguments, as a transformation.

    Raises:
        ArgumentError: a number or a name is out of its range.
    """
    decay = betas[1] if factor_beta is None else factor_beta
    for argument, beta in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("factor_beta", decay)):
        below_one(argument, beta)
    at_least_zero("eps", eps)
    at_least_zero("start_step", start_step)
    if transport not in ("hadamard", "permute", "none"):
        raise ArgumentError(f"transport must be 'hadamard', 'permute' or 'none', got {transport!r}")
    method = RotatedAdam(
        name,
        betas,
        decay,
        eps,
        bias_correction,
        normalize,
        shapes,
        start_step,
        refresh,
        transport,
        factors,
        second_moment,
    )
    return GradientTransformation(method.init, method.update)
