"""The algebra of curvature objects: immutable, symmetric operators on pytrees."""

from curvlib.operators.base import Operator
from curvlib.operators.bases import Basis, CanonicalBasis, OrthogonalBasis
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.combine import ema, merge_factors
from curvlib.operators.damping import Damping, FactoredTikhonov, RelativeTikhonov, Tikhonov
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.layout import Layout, Region
from curvlib.operators.matrices import Dense, Diagonal, Eigen, Matrix, ScaledIdentity
from curvlib.operators.projection import Projection
from curvlib.operators.sketch import Sketch, sketch
from curvlib.operators.sums import SolvedInverse, Sum

__all__ = [
    "Basis",
    "BlockDiagonal",
    "CanonicalBasis",
    "Damping",
    "Dense",
    "Diagonal",
    "Eigen",
    "EigenKronecker",
    "FactoredTikhonov",
    "Kronecker",
    "Layout",
    "Matrix",
    "Operator",
    "OrthogonalBasis",
    "Projection",
    "Region",
    "RelativeTikhonov",
    "ScaledIdentity",
    "Sketch",
    "SolvedInverse",
    "Sum",
    "Tikhonov",
    "ema",
    "merge_factors",
    "sketch",
]
