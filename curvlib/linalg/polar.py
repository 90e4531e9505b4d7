"""The orthogonal polar factor by matrix products only: odd polynomials that send all singular values to one.

An odd polynomial p(x) = x (a + b x^2 + c x^4) of a matrix M = U S V^T is (a I + b M M^T + c (M M^T)^2) M = U p(S) V^T,
and costs three products.

Sources: Grishina, Smirnov and Rakhuba 2025, arXiv 2506.10935 (CANS: Newton-Schulz with Chebyshev-optimal polynomials);
Amsel et al. 2025, arXiv 2505.16932 (composing best polynomials is optimal); Jordan et al. 2024, Muon (the fixed one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.precision import product_eps
from curvlib.linalg.quintics import margin, quintics

LOWER = 1e-3  # singular values, relative to the largest, from which on the default polynomials are the best ones
MUON = (3.4445, -4.7750, 2.0315)


def polar(matrix: Tensor, *, iterations: int = 5, method: str = "cans") -> Tensor:
    """The orthogonal polar factor U V^T of M = U S V^T: the nearest matrix with singular values 1.

    ``"cans"`` converges: each polynomial is the best one on the interval that its predecessor leaves, from singular
    values of 0.001 relative to the norm on. ``"quintic"`` is the fixed polynomial of Muon, for runs that follow
    published ones: it does not converge, and leaves singular values between 0.7 and 1.2.

    Args:
        matrix: M [*, m, n].
        iterations: polynomials, of three products each.
        method: "cans" or "quintic".

    Returns:
        [*, m, n], in the dtype of M, in which it is computed, at the global matmul precision. Zero for a zero matrix.

    Raises:
        ArgumentError: the method is unknown, or there is no iteration.

    Example:
        >>> factor = polar(torch.tensor([[3.0, 0.0], [0.0, -0.5]]), iterations=8)
        >>> torch.allclose(factor, torch.tensor([[1.0, 0.0], [0.0, -1.0]]), atol=1e-3)
        True
    """
    if iterations < 1:
        raise ArgumentError(f"at least one iteration is needed, got iterations={iterations}")
    if method == "cans":
        coefficients = quintics(LOWER, margin(product_eps(matrix)), iterations)
    elif method == "quintic":
        coefficients = (MUON,) * iterations
    else:
        raise ArgumentError(f'method must be "cans" or "quintic", got {method!r}')
    tall = matrix.shape[-2] > matrix.shape[-1]
    short = matrix.mT if tall else matrix
    largest = short.abs().amax((-2, -1), keepdim=True)
    short = short / torch.where(largest == 0, 1, largest)  # so that no square leaves the range of half precision
    squared = short @ short.mT
    # ||M M^T||_F bounds the largest squared singular value more tightly than ||M||_F^2, and costs nothing here.
    bound = torch.linalg.matrix_norm(squared, keepdim=True)
    bound = torch.where(bound == 0, 1, bound)
    short, squared = short / bound.sqrt(), squared / bound
    for index, (a, b, c) in enumerate(coefficients):
        if index > 0:
            squared = short @ short.mT
        short = a * short + (b * squared + c * (squared @ squared)) @ short
    return short.mT if tall else short
