"""Inverses by decompositions, where an operator has them: see `CG` for those that are solved for."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, DampingError, SingularError
from curvlib.linalg.eager import is_eager
from curvlib.operators.base import Operator, is_zero
from curvlib.operators.block_side import DenseBlocks
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.cholesky import ShiftedDense
from curvlib.operators.damping import Damping, FactoredTikhonov, as_damping, shift
from curvlib.operators.inverse import Solver
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.lazy import Invertible, dense_operator
from curvlib.operators.low_rank import LowRank
from curvlib.operators.matrices import Dense, Diagonal, EigenMatrix, Matrix, ScaledIdentity
from curvlib.operators.whole import whole

Strength = Damping | float | Tensor


@dataclasses.dataclass(frozen=True)
class Cholesky(Solver):
    """Cholesky decompositions of dense matrices: about a tenth of the time of eigendecompositions.

    The inverse is a dense matrix, side by side for Kronecker products, which are inverted so without damping or with
    `FactoredTikhonov`. What is diagonal, or in eigen-form already, is inverted as ever; sums and matrix-free operators
    as one dense matrix, up to 2048 rows.

    Raises:
        DampingError: a number is added to a Kronecker product, which has no factor a side then.
        SingularError: a matrix is not positive definite to rounding (looked at in eager mode only).
        ArgumentError: a matrix that is neither dense nor in eigen-form.

    Example:
        >>> import curvlib as cv
        >>> cv.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).inverse(1.0, solver=Cholesky()).to_dense()
        tensor([[ 0.3750, -0.1250],
                [-0.1250,  0.3750]])
    """

    def inverse(self, operator: Operator, damping: Strength) -> Operator:
        damping = as_damping(damping)
        match operator:
            case BlockDiagonal():
                return operator.map_blocks(lambda block: self.inverse(block, damping))
            case Kronecker(left=left, right=right) if isinstance(damping, FactoredTikhonov) or is_zero(damping):
                shifts = operator.side_shifts(damping) if isinstance(damping, FactoredTikhonov) else (None, None)
                return Kronecker(definite_inverse(left, shifts[0]), definite_inverse(right, shifts[1]))
            case Kronecker():
                raise DampingError(
                    "G (x) A + d I has no Cholesky factor a side: use FactoredTikhonov damping, or solver=cv.Eigen()"
                )
            case EigenKronecker():
                return operator.power(-1, damping)
            case Invertible() if isinstance(damping, FactoredTikhonov):
                return self.inverse(operator.damp(damping), 0.0)  # term by term
            case Invertible():
                dense = dense_operator(operator, "an operator").blocks["params"]
                assert isinstance(dense, Matrix)
                return whole(definite_inverse(dense, matrix_shift(dense, damping)), operator.domain)
            case Matrix():
                return definite_inverse(operator, matrix_shift(operator, damping))
        raise ArgumentError(f"a {type(operator).__name__} has no Cholesky decomposition: use solver=cv.Eigen()")


@dataclasses.dataclass(frozen=True)
class Eigen(Solver):
    """Eigendecompositions, which further powers and other dampings of the inverse share.

    Sums and matrix-free operators are decomposed as one dense matrix, up to 2048 rows.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(2, 1))
        >>> curv = cv.ggn(model_fn, params, (torch.randn(5, 2), torch.randn(5, 1)), loss=cv.MSE())
        >>> curv.inverse(0.1, solver=Eigen()).eigenvalues().shape
        torch.Size([3])
    """

    def inverse(self, operator: Operator, damping: Strength) -> Operator:
        match operator:
            case BlockDiagonal():
                return operator.map_blocks(lambda block: self.inverse(block, damping))
            case Kronecker(left=left, right=right):
                return Kronecker(left.eigen(), right.eigen()).power(-1, damping)
            case Matrix():
                return operator.eigen().power(-1, damping)
            case Invertible() if isinstance(damping, FactoredTikhonov):
                return self.inverse(operator.damp(damping), 0.0)  # term by term
            case Invertible():
                return operator.dense().power(-1, damping)
        return operator.power(-1, damping)


def matrix_shift(matrix: Matrix, damping: Damping) -> Tensor | None:
    """The multiple of the identity that damping adds to a matrix; None for none."""
    if is_zero(damping):
        return None
    mean = matrix.mean_eigenvalue()
    return torch.as_tensor(shift(damping, mean), dtype=mean.dtype, device=mean.device)


def definite_inverse(matrix: Matrix, shift: Tensor | None) -> Matrix:
    """(M + shift I)^-1 for shifts [*], by Cholesky decompositions of what is dense.

    Raises:
        SingularError: it is not positive definite.
        ArgumentError: the matrix is neither dense nor in eigen-form.
    """
    match matrix:
        case Dense():
            return Dense(cholesky_inverse(matrix.matrix, shift))
        case DenseBlocks():
            return matrix.map_stacks(lambda stack: cholesky_inverse(stack, None if shift is None else shift[..., None]))
        case ShiftedDense(base=base, shift=own):
            return definite_inverse(base, own if shift is None else own + shift)
        case Diagonal() | ScaledIdentity() | LowRank() | EigenMatrix():
            eigen = matrix.eigen()
            values = eigen.values if shift is None else eigen.values + shift.unsqueeze(-1)
            return EigenMatrix(eigen.basis, values)._power(-1, damped=shift is not None)
    raise ArgumentError(f"a {type(matrix).__name__} has no Cholesky decomposition: use solver=cv.Eigen()")


def cholesky_inverse(matrix: Tensor, shift: Tensor | None) -> Tensor:
    """(M + shift I)^-1 for matrices [*, d, d] and shifts [*].

    Raises:
        SingularError: M + shift I is not positive definite, or without a shift singular to rounding.
    """
    if shift is not None:
        unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        matrix = matrix + shift[..., None, None] * unit
    lower, failed = torch.linalg.cholesky_ex(matrix)
    singular = is_eager() and bool(failed.any())
    inverse = lower if singular else torch.cholesky_inverse(lower)
    if is_eager() and shift is None:
        rounding = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
        lost = torch.linalg.matrix_norm(matrix) * torch.linalg.matrix_norm(inverse) * rounding >= 1
        singular = singular or bool(lost.any())
    if singular:
        raise SingularError("a matrix has no Cholesky decomposition, it is not positive definite; pass damping > 0")
    return inverse
