"""curvlib: functional curvature on PyTorch.

Pure functions turn (model_fn, params, batch) into immutable curvature objects; everything else is algebra on them.
"""

from curvlib import errors, pytree, spectrum
from curvlib.capture import Plan, plan
from curvlib.estimators import (
    Jacobian,
    MatrixFree,
    block_diagonal,
    diagonal,
    eigenvalue_correct,
    ekfac,
    fisher,
    ggn,
    gramian,
    hessian,
    jacobian,
    kfac,
    over,
    solve,
    tkfac,
)
from curvlib.functional import functional
from curvlib.io import load, save
from curvlib.layers.wide import WideBlocks, WideDiagonal, WideIdentity, WideLowRank
from curvlib.losses import MSE, BernoulliLogits, CrossEntropy, CustomLoss, Identity, Loss
from curvlib.operators import (
    BlockDiagonal,
    Dense,
    DenseBlocks,
    Diagonal,
    EigenKronecker,
    FactoredTikhonov,
    Kronecker,
    LowRank,
    Operator,
    Projection,
    RelativeTikhonov,
    ScaledIdentity,
    Sum,
    Tikhonov,
    ema,
    merge_factors,
    nearest_kronecker,
    sketch,
    truncation_report,
)
from curvlib.pytree import ravel, unravel
from curvlib.spectrum import low_rank

__version__ = "0.1.0"

__all__ = [
    "BernoulliLogits",
    "BlockDiagonal",
    "CrossEntropy",
    "CustomLoss",
    "Dense",
    "DenseBlocks",
    "Diagonal",
    "EigenKronecker",
    "FactoredTikhonov",
    "Identity",
    "Jacobian",
    "Kronecker",
    "Loss",
    "LowRank",
    "MSE",
    "MatrixFree",
    "Operator",
    "Plan",
    "Projection",
    "RelativeTikhonov",
    "ScaledIdentity",
    "Sum",
    "Tikhonov",
    "WideBlocks",
    "WideDiagonal",
    "WideIdentity",
    "WideLowRank",
    "block_diagonal",
    "diagonal",
    "eigenvalue_correct",
    "ekfac",
    "ema",
    "errors",
    "fisher",
    "functional",
    "ggn",
    "gramian",
    "hessian",
    "jacobian",
    "kfac",
    "load",
    "low_rank",
    "merge_factors",
    "nearest_kronecker",
    "over",
    "plan",
    "pytree",
    "ravel",
    "save",
    "sketch",
    "solve",
    "spectrum",
    "tkfac",
    "truncation_report",
    "unravel",
]
