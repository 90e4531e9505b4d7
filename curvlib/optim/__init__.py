"""Optimizers as pairs of pure functions: gradient transformations, and chains of them.

``scale_by_*`` is the mathematics of a method; the plain name (`adamw`, `soap`, ...) is a chain of it with weight
decay and a learning rate.
"""

from curvlib.factors.dykaf import DyKAFFactors
from curvlib.factors.kl_shampoo import KLFactors
from curvlib.factors.rule import FactorRule
from curvlib.factors.shampoo import ShampooFactors
from curvlib.optim import torch
from curvlib.optim.accumulation import MultiStepsState, multi_steps
from curvlib.optim.adam import AdamState, scale_by_adam
from curvlib.optim.aliases import adamw, dykaf, kl_shampoo, muon, shampoo, soap
from curvlib.optim.clipping import clip_by_global_norm, clip_by_norm
from curvlib.optim.dykaf import scale_by_dykaf
from curvlib.optim.finite import ApplyIfFiniteState, apply_if_finite
from curvlib.optim.grafting import GraftState, graft
from curvlib.optim.hyperparameters import InjectHyperparamsState, inject_hyperparams
from curvlib.optim.kl_shampoo import scale_by_kl_shampoo
from curvlib.optim.momentum import MomentumState, heavy_ball, nesterov
from curvlib.optim.muon import MuonState, scale_by_muon
from curvlib.optim.partition import PartitionState, matrices_or_rest, partition
from curvlib.optim.plateau import ReduceOnPlateauState, reduce_on_plateau
from curvlib.optim.refresh import Adaptive, Every, Refresh, Warmup
from curvlib.optim.rotated import RotatedState
from curvlib.optim.scaling import ScheduleState, scale, scale_by_learning_rate
from curvlib.optim.schedules import Schedule, constant, warmup_cosine, warmup_stable_decay
from curvlib.optim.shampoo import ShampooState, scale_by_shampoo
from curvlib.optim.soap import scale_by_soap
from curvlib.optim.transformation import (
    ChainState,
    GradientTransformation,
    PerLeaf,
    Stateless,
    apply_updates,
    chain,
    identity,
)
from curvlib.optim.weight_decay import WeightDecayState, add_decayed_weights

__all__ = [
    "AdamState",
    "Adaptive",
    "ApplyIfFiniteState",
    "ChainState",
    "DyKAFFactors",
    "Every",
    "FactorRule",
    "GradientTransformation",
    "GraftState",
    "InjectHyperparamsState",
    "KLFactors",
    "MomentumState",
    "MultiStepsState",
    "MuonState",
    "PartitionState",
    "PerLeaf",
    "ReduceOnPlateauState",
    "Refresh",
    "RotatedState",
    "Schedule",
    "ScheduleState",
    "ShampooFactors",
    "ShampooState",
    "Stateless",
    "Warmup",
    "WeightDecayState",
    "adamw",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "clip_by_norm",
    "constant",
    "dykaf",
    "graft",
    "heavy_ball",
    "identity",
    "inject_hyperparams",
    "kl_shampoo",
    "matrices_or_rest",
    "multi_steps",
    "muon",
    "nesterov",
    "partition",
    "reduce_on_plateau",
    "scale",
    "scale_by_adam",
    "scale_by_dykaf",
    "scale_by_kl_shampoo",
    "scale_by_learning_rate",
    "scale_by_muon",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
    "torch",
    "warmup_cosine",
    "warmup_stable_decay",
]
