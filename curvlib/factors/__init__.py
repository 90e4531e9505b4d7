"""How the Kronecker factors of gradients follow them, on tensors only: the rules of Shampoo, KL-Shampoo and DyKAF.

Estimators make operators of factors, optimizers the state of a preconditioner; both take the same steps.
"""

from curvlib.factors.dykaf import DyKAFFactors
from curvlib.factors.kl_shampoo import KLFactors
from curvlib.factors.rule import FactorRule, Factors, Observation
from curvlib.factors.shampoo import ShampooFactors

__all__ = ["DyKAFFactors", "FactorRule", "Factors", "KLFactors", "Observation", "ShampooFactors"]
