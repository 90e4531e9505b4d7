"""The algebra of curvature objects: immutable, symmetric operators on pytrees."""

from curvlib.operators.base import Operator
from curvlib.operators.bases import Basis, CanonicalBasis, LowRankBasis, OrthogonalBasis
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.combine import ema, merge_factors
from curvlib.operators.damping import Damping, FactoredTikhonov, RelativeTikhonov, Tikhonov
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.layout import Layout, Region
from curvlib.operators.low_rank import LowRank
from curvlib.operators.matrices import Dense, Diagonal, Eigen, Matrix, ScaledIdentity
from curvlib.operators.nearest import nearest_kronecker
from curvlib.operators.projection import Projection
from curvlib.operators.simultaneous import SimultaneousKronecker
from curvlib.operators.sketch import Sketch, sketch
from curvlib.operators.solved import SolvedInverse
from curvlib.operators.sums import DampedSum, Sum
from curvlib.operators.truncation import TruncationReport, truncation_report

__all__ = [
    "Basis",
    "BlockDiagonal",
    "CanonicalBasis",
    "DampedSum",
    "Damping",
    "Dense",
    "Diagonal",
    "Eigen",
    "EigenKronecker",
    "FactoredTikhonov",
    "Kronecker",
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
