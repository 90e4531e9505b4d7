"""The algebra of curvature objects: immutable, symmetric operators on pytrees."""

from curvlib.operators.base import Operator
from curvlib.operators.bases import Basis, CanonicalBasis, LowRankBasis, OrthogonalBasis
from curvlib.operators.block_side import BlockBasis, DenseBlocks
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.cholesky import CholeskyInverse, ShiftedDense
from curvlib.operators.combine import ema, merge_factors
from curvlib.operators.damping import Damping, FactoredTikhonov, RelativeTikhonov, Tikhonov
from curvlib.operators.differences import Difference
from curvlib.operators.eigen_sketch import EigenSketch
from curvlib.operators.implicit import Implicit
from curvlib.operators.inverse import CG, Inverse, Solver, solve
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.kronecker_side import KroneckerBasis, KroneckerSide
from curvlib.operators.layout import Layout, Region
from curvlib.operators.low_rank import LowRank
from curvlib.operators.matrices import Dense, Diagonal, EigenMatrix, Matrix, ScaledIdentity
from curvlib.operators.nearest import nearest_kronecker
from curvlib.operators.projection import Projection
from curvlib.operators.row_blocks import RowBlocks
from curvlib.operators.scaled_power import ScaledPower
from curvlib.operators.shifted import Shifted
from curvlib.operators.simultaneous import SimultaneousKronecker
from curvlib.operators.sketch import Sketch, sketch
from curvlib.operators.solvers import Cholesky, Eigen
from curvlib.operators.sums import Sum
from curvlib.operators.truncation import TruncationReport, truncation_report

__all__ = [
    "Basis",
    "BlockBasis",
    "BlockDiagonal",
    "CG",
    "CanonicalBasis",
    "Cholesky",
    "CholeskyInverse",
    "Damping",
    "Dense",
    "DenseBlocks",
    "Diagonal",
    "Difference",
    "EigenMatrix",
    "Eigen",
    "EigenKronecker",
    "EigenSketch",
    "FactoredTikhonov",
    "Implicit",
    "Inverse",
    "Kronecker",
    "KroneckerBasis",
    "KroneckerSide",
    "Layout",
    "LowRank",
    "LowRankBasis",
    "Matrix",
    "Operator",
    "OrthogonalBasis",
    "Projection",
    "Region",
    "RelativeTikhonov",
    "RowBlocks",
    "ScaledIdentity",
    "ScaledPower",
    "Shifted",
    "ShiftedDense",
    "SimultaneousKronecker",
    "Sketch",
    "Solver",
    "Sum",
    "Tikhonov",
    "TruncationReport",
    "ema",
    "merge_factors",
    "nearest_kronecker",
    "sketch",
    "solve",
    "truncation_report",
]
