"""Estimators: from a model and data to curvature objects."""

from curvlib.estimators.data import DataSet, over
from curvlib.estimators.kfac import kfac

__all__ = ["DataSet", "kfac", "over"]
