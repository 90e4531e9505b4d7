"""Which training examples a prediction is due to: influence scores from gradients and an inverse curvature."""

from curvlib.influence import evaluate
from curvlib.influence.measurements import margin, target_logit
from curvlib.influence.scores import scores, self_influence

__all__ = ["evaluate", "margin", "scores", "self_influence", "target_logit"]
