"""The algebra of curvature objects: immutable, symmetric operators on pytrees."""

from curvlib.operators.base import Operator
from curvlib.operators.bases import Basis, CanonicalBasis, LowRankBasis, OrthogonalBasis
from curvlib.operators.block_side import BlockBasis, DenseBlocks
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.combine import ema, merge_factors
from curvlib.operators.damping import Damping, FactoredTikhonov, RelativeTikhonov, Tikhonov
from curvlib.operators.eigen_sketch import EigenSketch
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.kronecker_side import KroneckerBasis, KroneckerSide
from curvlib.operators.layout import Layout, Region
from curvlib.operators.low_rank import LowRank
from curvlib.operators.matrices import Dense, Diagonal, Eigen, Matrix, ScaledIdentity
from curvlib.operators.nearest import nearest_kronecker
from curvlib.operators.projection import Projection
from curvlib.operators.scaled_power import ScaledPower
from curvlib.operators.simultaneous import SimultaneousKronecker
from curvlib.operators.sketch import Sketch, sketch
from curvlib.operators.solved import SolvedInverse
from curvlib.operators.sums import DampedSum, Sum
from curvlib.operators.truncation import TruncationReport, truncation_report

__all__ = [
    "Basis",
    "BlockBasis",
    "BlockDiagonal",
    "CanonicalBasis",
    "DampedSum",
    "Damping",
    "Dense",
    "DenseBlocks",
    "Diagonal",
    "Eigen",
    "EigenKronecker",
    "EigenSketch",
    "FactoredTikhonov",
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
    "ScaledIdentity",
    "ScaledPower",
    "SimultaneousKronecker",
    "Sketch",
    "SolvedInverse",
    "Sum",
    "Tikhonov",
    "TruncationReport",
    "ema",
    "merge_factors",
    "nearest_kronecker",
    "sketch",
    "truncation_report",
]
