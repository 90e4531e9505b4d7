"""Factor-wise means of operators: cheap, approximate, and called by their names."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, NotKroneckerError, PytreeError, naming
from curvlib.operators.base import Operator
from curvlib.operators.block_side import DenseBlocks
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.cholesky import CholeskyInverse, ShiftedDense
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.kronecker_side import KroneckerSide
from curvlib.operators.matrices import Dense, Diagonal, EigenMatrix, Matrix, ScaledIdentity
from curvlib.operators.scaled_power import ScaledPower, as_matrix
from curvlib.operators.sums import Sum
from curvlib.operators.vectors import widest

Weights = tuple[float | Tensor, float | Tensor]


def merge_factors(a: Operator, b: Operator, *, weights: Weights | None = None) -> Operator:
    """The factor-wise weighted mean: (w_a G_a + w_b G_b) (x) (w_a A_a + w_b A_b) for Kronecker products.

    This is not the mean of the operators, for which write ``w_a * a + w_b * b``.

    Args:
        a: an operator.
        b: an operator of the same structure.
        weights: w_a and w_b; None: a half each.

    Raises:
        PytreeError: the operators differ in structure or shape; names the block.
        NotKroneckerError: an operator is in eigen-form, whose factors are gone.

    Example:
        >>> import torch, curvlib as cv
        >>> two, four = cv.Dense(2 * torch.eye(2)), cv.Dense(4 * torch.eye(2))
        >>> cv.merge_factors(cv.Kronecker(two, two), cv.Kronecker(four, four)).trace()  # 3 * 2 * 3 * 2
        tensor(36.)
    """
    return merge(a, b, (0.5, 0.5) if weights is None else weights).to(dtype=widest([a.dtype, b.dtype]))


def ema(old: Operator | None, new: Operator, decay: float | Tensor) -> Operator:
    """Factor-wise exponential moving average: decay * old + (1 - decay) * new for every factor.

    Args:
        old: the average so far; None: there is none yet, and the average of one estimate is the estimate.
        new: the latest estimate, of the same structure.
        decay: between 0 and 1.

    Raises:
        ArgumentError: the decay is not between 0 and 1.
        PytreeError: the operators differ in structure or shape; names the block.

    Example:
        >>> import torch, curvlib as cv
        >>> cv.ema(cv.Dense(torch.eye(2)), cv.Dense(torch.zeros(2, 2)), 0.9).trace()
        tensor(1.8000)
    """
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ArgumentError(f"decay must lie between 0 and 1, got {decay}")
    return new if old is None else merge_factors(old, new, weights=(decay, 1 - decay))


def merge(a: Operator, b: Operator, weights: Weights) -> Operator:
    """`merge_factors`, by class."""
    on_a, on_b = a.domain.shapes, b.domain.shapes
    if type(a) is not type(b) or on_a != on_b:
        raise PytreeError(f"cannot merge a {type(a).__name__} on {on_a} with a {type(b).__name__} on {on_b}")
    wa, wb = weights
    match a, b:
        case BlockDiagonal(), BlockDiagonal():
            if (a.layouts, a.domain) != (b.layouts, b.domain):
                raise PytreeError("cannot merge operators whose blocks are laid out differently")
            blocks = {}
            for name, _, block in a.items():
                with naming(name):
                    blocks[name] = merge(block, b.blocks[name], weights)
            return BlockDiagonal(blocks, a.layouts, a.domain)
        case Kronecker(), Kronecker():
            left, right = merge(a.left, b.left, weights), merge(a.right, b.right, weights)
            assert isinstance(left, Matrix)
            assert isinstance(right, Matrix)
            return Kronecker(left, right)
        case KroneckerSide(), KroneckerSide() if a.widths == b.widths:
            pairs = zip(a.factors, b.factors, strict=True)
            return KroneckerSide(tuple(as_matrix(merge(x, y, weights)) for x, y in pairs))
        case KroneckerSide(), KroneckerSide():
            raise PytreeError(f"cannot merge Kronecker products of different widths, {a.widths} and {b.widths}")
        case ScaledPower(), ScaledPower() if a.exponent == b.exponent and a.exponent:
            # the factors are those matrices that are raised to the power, each with its scale
            base = as_matrix(merge(a.absorbed(), b.absorbed(), weights))
            return ScaledPower(base, torch.ones_like(a.scale), a.exponent)
        case ScaledPower(), ScaledPower():
            raise PytreeError(
                f"cannot merge powers {a.exponent} and {b.exponent} of matrices; take powers of the merged ones"
            )
        case Dense(), Dense():
            return Dense(wa * a.matrix + wb * b.matrix)
        case Diagonal(), Diagonal():
            return Diagonal(wa * a.values + wb * b.values)
        case DenseBlocks(), DenseBlocks() if a.runs == b.runs:
            return a.map_stacks(lambda x, y: wa * x + wb * y, b.stacks)
        case DenseBlocks(), DenseBlocks():
            raise PytreeError(
                f"cannot merge blocks of different widths: (number, width) is {a.runs} and {b.runs}; "
                "estimate both with the same size"
            )
        case ScaledIdentity(), ScaledIdentity():
            return ScaledIdentity(wa * a.scale + wb * b.scale, a.vector)
        case Sum(), Sum() if len(a.terms) == len(b.terms):
            return Sum(tuple(merge(x, y, weights) for x, y in zip(a.terms, b.terms, strict=True)))
        case ShiftedDense(), ShiftedDense():
            dense = merge(a.base, b.base, weights)
            assert isinstance(dense, Dense)
            return ShiftedDense(dense, wa * a.shift + wb * b.shift)
        case ((EigenMatrix() | EigenKronecker() | CholeskyInverse()), _):
            raise NotKroneckerError(
                "operators in eigen-form have different eigenvectors and no factors left to merge; merge the factors "
                "first and take inverses and powers of the result"
            )
    raise PytreeError(f"{type(a).__name__} has no factors to merge")
