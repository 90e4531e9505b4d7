"""Scales, shifts and lone biases: their blocks come from per-example gradients and are exact in any model."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import Problem, normal, problem
from pairwise import every_pair
from torch import Tensor, nn

import curvlib as cv


class Transformer(nn.Module):
    """One block of attention and one MLP, with learned positions, pooled to two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3, 4))
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
        self.project, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.project(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(x.mean(1))


def batch_norm() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(normal(8, 4))
    layer.running_var.copy_(normal(9, 4).square() + 0.5)
    return layer.eval()


def image_net(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).eval()


def feature_net(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2))


MODELS = {
    "layer norm": (lambda: feature_net(nn.LayerNorm(4)), (3,), "1"),
    "layer norm without bias": (lambda: feature_net(nn.LayerNorm(4, bias=False)), (3,), "1"),
    "rms norm": (lambda: feature_net(nn.RMSNorm(4)), (3,), "1"),
    "group norm": (lambda: image_net(nn.GroupNorm(2, 4)), (2, 3, 3), "1"),
    "batch norm": (lambda: image_net(batch_norm()), (2, 3, 3), "1"),
    "instance norm": (lambda: image_net(nn.InstanceNorm2d(4, affine=True)), (2, 3, 3), "1"),
    "norm over axes": (lambda: image_net(nn.LayerNorm([4, 2, 2])), (2, 3, 3), "1"),
    "norm in a transformer": (Transformer, (3, 4), "first"),
    "second norm in a transformer": (Transformer, (3, 4), "second"),
}


def make(model: str, kind: str, reduction: str) -> tuple[Problem, list[str]]:
    build, shape, layer = MODELS[model]
    case = problem(build(), normal(2, 4, *shape), kind, reduction, seed=3)
    return case, [name for name in (f"{layer}.weight", f"{layer}.bias") if name in case.params]


def truth(case: Problem, fisher: str, names: list[str]) -> Tensor:
    matrix = case.ggn() if fisher == "type-2" else case.empirical_fisher()
    return reference.block(matrix, case.params, *names)


@every_pair("model, fisher, sharing, reduction", MODELS, ["type-2", "empirical"], ["expand", "reduce"], ["mean", "sum"])
def test_the_diagonal_block_of_a_norm_layer_is_exact(model: str, fisher: str, sharing: str, reduction: str) -> None:
    case, names = make(model, "cross-entropy", reduction)
    curv = case.kfac(fisher=fisher, sharing=sharing)
    block = curv.blocks[names[0]]
    assert isinstance(block, cv.Diagonal)
    found = reference.block(curv.to_dense(), case.params, *names)
    assert reference.relative_error(found, truth(case, fisher, names).diag().diag()) <= 1e-10


@every_pair(
    "model, fisher, kind, reduction",
    MODELS,
    ["type-2", "empirical"],
    ["mse", "bernoulli", "custom"],
    ["mean", "sum"],
)
def test_the_dense_block_of_a_norm_layer_is_exact(model: str, fisher: str, kind: str, reduction: str) -> None:
    case, names = make(model, kind, reduction)
    curv = case.kfac(fisher=fisher, elementwise="dense")
    found = reference.block(curv.to_dense(), case.params, *names)
    assert reference.relative_error(found, truth(case, fisher, names)) <= 1e-10


@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_learned_positions_are_exact(engine: str) -> None:
    case = problem(Transformer(), normal(2, 4, 3, 4), "cross-entropy", "mean")
    exact = truth(case, "type-2", ["position"])
    diagonal = case.kfac(engine=engine).blocks["position"]
    assert reference.relative_error(diagonal.to_dense(), exact.diag().diag()) <= 1e-10
    dense = case.kfac(engine=engine, elementwise="dense").blocks["position"]
    assert reference.relative_error(dense.to_dense(), exact) <= 1e-10


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scalar_that_multiplies_and_a_lone_shift_are_exact(reduction: str) -> None:
    def model_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x * params["scale"]) @ params["weight"].T - params["shift"]

    shapes = {"scale": torch.zeros(1), "weight": torch.zeros(2, 3), "shift": torch.zeros(2)}
    case = problem(model_fn, normal(2, 4, 3), "cross-entropy", reduction, params=shapes, seed=1)
    curv = case.kfac(elementwise="dense")
    for name in ("scale", "shift"):
        exact = reference.block(case.ggn(), case.params, name)
        assert reference.relative_error(curv.blocks[name].to_dense(), exact) <= 1e-10
