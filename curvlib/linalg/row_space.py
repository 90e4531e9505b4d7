"""Eigenpairs of the Gram matrix of few rows, within the space that they span."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.linalg.eigh import eigh
from curvlib.linalg.gram import full_precision, gram


def row_space(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of X^T X for a wide X, without forming it: all but d - n zero eigenvalues.

    With X^T = Q R, X^T X = Q (R R^T) Q^T. Vectors are orthonormal to rounding, even where rows depend on each other.

    Args:
        rows: X [*, n, d], n <= d.

    Returns:
        Vectors [*, d, n] in columns, and eigenvalues [*, n], ascending; half precision gives float32.

    Raises:
        NonFiniteError: a row is not finite.

    Example:
        >>> vectors, values = row_space(torch.tensor([[0.0, 3.0, 4.0]]))
        >>> values.round(decimals=3), vectors.abs().mT.round(decimals=4)
        (tensor([25.]), tensor([[0.0000, 0.6000, 0.8000]]))
    """
    basis, triangle = torch.linalg.qr(full_precision(rows).mT)
    values, vectors = eigh(gram(triangle.mT))
    return basis @ vectors, values
