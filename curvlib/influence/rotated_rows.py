"""Rows of per-example gradients in a Kronecker eigenbasis, where few rows stand for a large matrix.

The coordinates Q_L^T D Q_R of D = sum_t g_t a_t^T are sum_t (Q_L^T g_t) (Q_R^T a_t)^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.estimators.correction import Use
from curvlib.gradients.block_gradients import BlockGradients, RowGradients
from curvlib.layers.rows import DenseRows, chunks
from curvlib.operators import EigenKronecker
from curvlib.operators.bases import CanonicalBasis


def rotatable(gradients: BlockGradients, eigen: EigenKronecker) -> Use | None:
    """The one use whose rows it takes fewer multiplications to rotate than gradients [m, n], or None."""
    if not isinstance(gradients, RowGradients) or len(gradients.uses) > 1:
        return None
    use = gradients.uses[0]
    if not isinstance(use.rows, DenseRows):  # one-hot rows, which only the canonical basis keeps so
        return use if isinstance(eigen.left if use.transposed else eigen.right, CanonicalBasis) else None
    m, n = eigen.shape[-2:]
    return use if use.rows.shape[-2] * (m**2 + n**2) <= m * n * (m + n) else None


def rotated(eigen: EigenKronecker, use: Use) -> Use:
    """The use in the coordinates of the eigenbasis."""
    left, right = (eigen.right, eigen.left) if use.transposed else (eigen.left, eigen.right)
    return Use(use.rows.in_basis(right, use.g), left.analyse_right(use.g), use.transposed)


def product(eigen: EigenKronecker, use: Use, start: int, stop: int) -> Tensor:
    """The operator applied to the gradients of these examples: [n, *shape]."""
    part = rotated(eigen, Use(use.rows.part(start, stop), use.g[:, start:stop], use.transposed))
    return eigen.synthesise(eigen.spread(eigen.values) * part.gradients(0, stop - start)[0])


def quadratic(eigen: EigenKronecker, use: Use) -> Tensor:
    """sum_ij l_ij (Q_L^T D_n Q_R)_ij^2 for every example: [N]."""
    values, use = eigen.spread(eigen.values), rotated(eigen, use)
    if isinstance(use.rows, DenseRows) and use.rows.shape[-2] == 1:  # (g a^T) o (g a^T) = (g o g) (a o a)^T
        g, a = use.g[0].square(), use.rows.values.square()  # [N, (groups,) 1, d]
        g = g.movedim(0, -2).squeeze(-3) @ (values.mT if use.transposed else values)  # one product a group
        return (g * a.movedim(0, -2).squeeze(-3)).sum(-1).reshape(-1, len(a)).sum(0)
    parts = [
        (use.gradients(start, stop)[0].square() * values).flatten(1).sum(1)
        for start, stop in chunks(use.rows.shape, use.g)
    ]
    return torch.cat(parts)
