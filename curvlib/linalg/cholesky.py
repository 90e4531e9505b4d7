"""Cholesky decomposition of wide matrices in panels, at the speed of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.linalg.gram import writes_in_place

PANEL = 256  # columns that are decomposed together


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The factor L of M = L L^T, in which M is positive definite.

    On a CPU, wide matrices are decomposed panel by panel, each a product with all panels before it, a small
    decomposition and a triangular solve: LAPACK's own takes nearly twice as long for widths of some thousands.

    Args:
        matrix: M [*, d, d], symmetric, in float32 or float64.

    Returns:
        L [*, d, d], and [*] what is not zero where M is not positive definite, as `torch.linalg.cholesky_ex` has it.

    Example:
        >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
        (tensor([[2., 0.],
                [1., 2.]]), tensor(0, dtype=torch.int32))
    """
    if matrix.shape[-1] <= 4 * PANEL or matrix.device.type != "cpu" or not writes_in_place(matrix):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        return factor, failed
    upper = matrix.clone(memory_format=torch.contiguous_format)  # L^T: L by columns, as LAPACK's solvers take it
    failures = []
    for start in range(0, matrix.shape[-1], PANEL):
        panel = upper[..., start : start + PANEL, start:]
        done = upper[..., :start, start:]
        panel -= done[..., :PANEL].mT @ done
        factor, failed = torch.linalg.cholesky_ex(panel[..., :PANEL])
        panel[..., :PANEL] = factor.mT
        panel[..., PANEL:] = torch.linalg.solve_triangular(factor, panel[..., PANEL:], upper=False)
        failures.append(failed)
    return upper.triu_().mT, torch.stack(failures).amax(0)
