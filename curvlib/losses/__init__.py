"""Loss curvature in output space: values, gradients, square roots of Hessians and target sampling."""

from curvlib.losses.base import Loss
from curvlib.losses.cross_entropy import CrossEntropy
from curvlib.losses.custom import CustomLoss
from curvlib.losses.elementwise import MSE, BernoulliLogits, Identity
from curvlib.losses.mistakes import check_loss

__all__ = ["MSE", "BernoulliLogits", "CrossEntropy", "CustomLoss", "Identity", "Loss", "check_loss"]
