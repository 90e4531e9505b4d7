"""Which training examples a prediction is due to: influence scores from gradients and an inverse curvature."""

from curvlib.influence import evaluate
from curvlib.influence.build import build
from curvlib.influence.index import Index, load
from curvlib.influence.measurements import margin, target_logit
from curvlib.influence.scores import scores, self_influence
from curvlib.influence.sizes import estimate_size, sketch_ranks
from curvlib.influence.two_stage import rerank

__all__ = [
    "Index",
    "build",
    "estimate_size",
    "evaluate",
    "load",
    "margin",
    "rerank",
    "scores",
    "self_influence",
    "sketch_ranks",
    "target_logit",
]
