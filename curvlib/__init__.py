"""curvlib: functional curvature on PyTorch.

Pure functions turn (model_fn, params, batch) into immutable curvature objects; everything else is algebra on them.
"""

from curvlib import errors, pytree, spectrum
from curvlib.capture import Plan, plan
from curvlib.estimators import eigenvalue_correct, ekfac, kfac, over, tkfac
from curvlib.functional import functional
from curvlib.io import load, save
from curvlib.losses import MSE, BernoulliLogits, CrossEntropy, CustomLoss, Identity, Loss
from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    FactoredTikhonov,
    Kronecker,
    Operator,
    Projection,
    RelativeTikhonov,
    ScaledIdentity,
    Sum,
    Tikhonov,
    ema,
    merge_factors,
    sketch,
)
from curvlib.pytree import ravel, unravel

__version__ = "0.1.0"

__all__ = [
    "MSE",
    "BernoulliLogits",
    "BlockDiagonal",
    "CrossEntropy",
    "CustomLoss",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "FactoredTikhonov",
    "Identity",
    "Kronecker",
    "Loss",
    "Operator",
    "Plan",
    "Projection",
    "RelativeTikhonov",
    "ScaledIdentity",
    "Sum",
    "Tikhonov",
    "eigenvalue_correct",
    "ekfac",
    "ema",
    "errors",
    "functional",
    "kfac",
    "load",
    "merge_factors",
    "over",
    "plan",
    "pytree",
    "ravel",
    "save",
    "sketch",
    "spectrum",
    "tkfac",
    "unravel",
]
