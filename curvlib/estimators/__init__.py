"""Estimators: from a model and data to curvature objects."""

from curvlib.estimators.data import DataSet, over
from curvlib.estimators.diagonal import diagonal
from curvlib.estimators.ekfac import eigenvalue_correct, ekfac, tkfac
from curvlib.estimators.exact import MatrixFree, fisher, ggn, gramian, hessian
from curvlib.estimators.exact_blocks import block_diagonal
from curvlib.estimators.implicit import Implicit, ImplicitInverse, ImplicitSum, solve
from curvlib.estimators.jacobian import Jacobian, TransposedJacobian, jacobian
from curvlib.estimators.kfac import kfac

__all__ = [
    "MatrixFree",
    "block_diagonal",
    "fisher",
    "ggn",
    "gramian",
    "hessian",
    "Implicit",
    "ImplicitInverse",
    "ImplicitSum",
    "solve",
    "Jacobian",
    "TransposedJacobian",
    "jacobian",
    "diagonal",
    "DataSet",
    "eigenvalue_correct",
    "ekfac",
    "kfac",
    "over",
    "tkfac",
]
