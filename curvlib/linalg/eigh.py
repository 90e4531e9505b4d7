"""Symmetric eigendecomposition that does not give up at the first failure."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import EigendecompositionError, NonFiniteError
from curvlib.linalg.eager import is_eager


def tolerance(eigenvalues: Tensor) -> Tensor:
    """What counts as zero among eigenvalues [*, d]: d * eps * max |eigenvalue|, as [*, 1]."""
    size = eigenvalues.shape[-1]
    return size * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().amax(-1, keepdim=True)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices: M = Q diag(l) Q^T.

    A failure in working precision is followed by a try in float64. Half precision is decomposed in float32.
    Eigenvalues in [-tol, 0), with tol = d * eps * max |eigenvalue|, are rounding and become 0; others are kept.

    Args:
        matrix: [*, d, d], symmetric.

    Returns:
        Eigenvalues [*, d], ascending, and eigenvectors [*, d, d] in columns.

    Raises:
        NonFiniteError: the matrix has an infinite or undefined entry.
        EigendecompositionError: both tries failed.

    Example:
        >>> eigenvalues, vectors = eigh(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> eigenvalues.round(decimals=4)
        tensor([1., 2.])
    """
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    if is_eager() and not matrix.isfinite().all():
        raise NonFiniteError("the factor is not finite: it has an entry that is inf or nan")
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # torch.linalg.LinAlgError is one, and so is a failure inside a driver
        try:
            eigenvalues, vectors = (x.to(matrix.dtype) for x in torch.linalg.eigh(matrix.double()))
        except RuntimeError as error:
            raise EigendecompositionError(
                f"the symmetric eigendecomposition of a {tuple(matrix.shape)} factor failed in {matrix.dtype} and in "
                f"float64: {error}"
            ) from error
    rounding = (eigenvalues < 0) & (eigenvalues >= -tolerance(eigenvalues))
    return torch.where(rounding, torch.zeros_like(eigenvalues), eigenvalues), vectors
