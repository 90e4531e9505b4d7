"""The optimizers as `torch.optim.Optimizer`, for training loops that have one already."""

from curvlib.optim.torch.adapter import Adapter
from curvlib.optim.torch.optimizers import SOAP, AdamW, DyKAF, KLShampoo, Muon, Shampoo

__all__ = ["SOAP", "Adapter", "AdamW", "DyKAF", "KLShampoo", "Muon", "Shampoo"]
