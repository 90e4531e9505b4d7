"""The optimizers as `torch.optim.Optimizer`, for training loops that have one already."""

from curvlib.optim.torch.optimizers import SOAP, DyKAF, KLShampoo, Shampoo

__all__ = ["SOAP", "DyKAF", "KLShampoo", "Shampoo"]
