"""Estimators: from a model and data to curvature objects."""

from curvlib.estimators.diagonal import DiagonalEstimator, diagonal
from curvlib.estimators.dykaf import DyKAFEstimator, dykaf
from curvlib.estimators.ekfac import (
    EigenvalueCorrection,
    EKFACEstimator,
    TKFACEstimator,
    eigenvalue_correct,
    ekfac,
    tkfac,
)
from curvlib.estimators.exact import MatrixFree, fisher, ggn, gramian, hessian
from curvlib.estimators.exact_blocks import block_diagonal
from curvlib.estimators.jacobian import Jacobian, TransposedJacobian, jacobian
from curvlib.estimators.kfac import KFACEstimator, kfac
from curvlib.estimators.kl_shampoo import KLShampooEstimator, kl_shampoo
from curvlib.estimators.shampoo import ShampooEstimator, shampoo
from curvlib.estimators.statistics import Statistics

__all__ = [
    "DyKAFEstimator",
    "EKFACEstimator",
    "EigenvalueCorrection",
    "DiagonalEstimator",
    "KFACEstimator",
    "KLShampooEstimator",
    "MatrixFree",
    "ShampooEstimator",
    "Statistics",
    "TKFACEstimator",
    "block_diagonal",
    "dykaf",
    "fisher",
    "ggn",
    "gramian",
    "hessian",
    "Jacobian",
    "TransposedJacobian",
    "jacobian",
    "diagonal",
    "eigenvalue_correct",
    "ekfac",
    "kfac",
    "kl_shampoo",
    "shampoo",
    "tkfac",
]
