"""Estimators: from a model and data to curvature objects."""

from curvlib.estimators.diagonal import ExactDiagonal, diagonal
from curvlib.estimators.dykaf import DyKAF, dykaf
from curvlib.estimators.ekfac import EKFAC, TKFAC, EigenvalueCorrection, eigenvalue_correct, ekfac, tkfac
from curvlib.estimators.exact import MatrixFree, fisher, ggn, gramian, hessian
from curvlib.estimators.exact_blocks import block_diagonal
from curvlib.estimators.jacobian import Jacobian, TransposedJacobian, jacobian
from curvlib.estimators.kfac import KFAC, kfac
from curvlib.estimators.kl_shampoo import KLShampoo, kl_shampoo
from curvlib.estimators.shampoo import Shampoo, shampoo
from curvlib.estimators.statistics import Statistics

__all__ = [
    "DyKAF",
    "EKFAC",
    "EigenvalueCorrection",
    "ExactDiagonal",
    "KFAC",
    "KLShampoo",
    "MatrixFree",
    "Shampoo",
    "Statistics",
    "TKFAC",
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
