"""The pass over data: batches, plans, and the gradients of an objective and of single examples."""

from curvlib.gradients.data import DataSet, over
from curvlib.gradients.objective import objective_gradient
from curvlib.gradients.per_example import PerExampleGradients, per_example_gradients
from curvlib.gradients.plans import Plans

__all__ = ["DataSet", "PerExampleGradients", "Plans", "objective_gradient", "over", "per_example_gradients"]
