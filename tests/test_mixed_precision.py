"""Models that compute in several dtypes: one dtype for the curvature, and the numbers of the same model in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlib as cv
from curvlib.operators import Operator
from curvlib.pytree import flatten

HALF, SINGLE, DOUBLE, FLOAT16 = torch.bfloat16, torch.float32, torch.float64, torch.float16
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Three layers whose numbers all dtypes hold exactly: small integers for ReLU, or bfloat16 ones for tanh."""

    def __init__(self, dtypes: tuple[torch.dtype, ...], forward: Forward, exact: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        for x in self.parameters():
            normal = torch.randn(x.shape, generator=generator)
            x.data = normal.round().clamp(-1, 1) if exact else (0.6 * normal).bfloat16().float()
        for layer, dtype in zip((self.a, self.b, self.c), dtypes, strict=True):
            layer.to(dtype)
        self.run, self.f = forward, torch.relu if exact else torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.c(net.f(net.b(net.f(net.a(x)))))


def under_autocast(dtype: torch.dtype) -> Forward:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return plain(net, x)

    return forward


def one_layer_under_autocast(net: Net, x: Tensor) -> Tensor:
    h = net.f(net.a(x))
    with torch.autocast("cpu", dtype=HALF):
        h = net.b(h)
    return net.c(net.f(h.float()))


def each_layer_in_its_dtype(net: Net, x: Tensor) -> Tensor:
    h = net.f(net.a(x.to(net.a.weight.dtype)))
    h = net.f(net.b(h.to(net.b.weight.dtype)))
    return net.c(h.to(net.c.weight.dtype))


def weights_cast(dtype: torch.dtype) -> Forward:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = net.f(net.a(x)).to(dtype)
        h = nn.functional.linear(h, net.b.weight.to(dtype), net.b.bias.to(dtype))
        return net.c(net.f(h).to(x.dtype))

    return forward


def with_outputs(dtype: torch.dtype, forward: Forward = plain) -> Forward:
    return lambda net, x: forward(net, x).to(dtype)


CASES: dict[str, tuple[tuple[torch.dtype, ...], Forward]] = {
    "autocast": ((SINGLE,) * 3, under_autocast(HALF)),
    "autocast to float16": ((SINGLE,) * 3, under_autocast(FLOAT16)),
    "autocast, float outputs": ((SINGLE,) * 3, with_outputs(SINGLE, under_autocast(HALF))),
    "autocast, double outputs": ((SINGLE,) * 3, with_outputs(DOUBLE, under_autocast(HALF))),
    "one layer under autocast": ((SINGLE,) * 3, one_layer_under_autocast),
    "bfloat16 layer": ((SINGLE, HALF, SINGLE), each_layer_in_its_dtype),
    "float16 layer": ((SINGLE, FLOAT16, SINGLE), each_layer_in_its_dtype),
    "double layer": ((SINGLE, DOUBLE, SINGLE), each_layer_in_its_dtype),
    "double last layer": ((SINGLE, SINGLE, DOUBLE), each_layer_in_its_dtype),
    "single last layer of a double model": ((DOUBLE, DOUBLE, SINGLE), each_layer_in_its_dtype),
    "weights cast to bfloat16": ((SINGLE,) * 3, weights_cast(HALF)),
    "weights cast to double": ((SINGLE,) * 3, weights_cast(DOUBLE)),
    "bfloat16": ((HALF,) * 3, plain),
    "float16": ((FLOAT16,) * 3, plain),
    "bfloat16, float outputs": ((HALF,) * 3, with_outputs(SINGLE)),
    "float16, float outputs": ((FLOAT16,) * 3, with_outputs(SINGLE)),
    "bfloat16, double outputs": ((HALF,) * 3, with_outputs(DOUBLE)),
    "single, double outputs": ((SINGLE,) * 3, with_outputs(DOUBLE)),
    "single, bfloat16 outputs": ((SINGLE,) * 3, with_outputs(HALF)),
    "double, float outputs": ((DOUBLE,) * 3, with_outputs(SINGLE)),
    "double, bfloat16 outputs": ((DOUBLE,) * 3, with_outputs(HALF)),
}
every_case = pytest.mark.parametrize("name", CASES)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its parameters and a batch; and the same in float64 throughout."""

    model: tuple[Any, Any, Any]
    twin: tuple[Any, Any, Any]
    dtype: torch.dtype  # of the curvature

    @classmethod
    def of(cls, name: str, *, exact: bool, targets: str = "values") -> Problem:
        dtypes, forward = CASES[name]
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(16, 4, generator=generator)
        x = x.round().clamp(-2, 2) if exact else x.bfloat16().float()
        y = torch.randn(16, 3, generator=generator).round() if targets == "values" else torch.arange(16) % 3
        model_fn, params = cv.functional(Net(dtypes, forward, exact))
        twin_fn, twin_params = cv.functional(Net((DOUBLE,) * 3, plain, exact))
        typed = y if targets == "classes" else y.to(model_fn(params, x.to(dtypes[0])).dtype)
        widest = torch.float64 if DOUBLE in dtypes else torch.float32
        double = y if targets == "classes" else y.double()
        return cls((model_fn, params, (x.to(dtypes[0]), typed)), (twin_fn, twin_params, (x.double(), double)), widest)

    @property
    def eps(self) -> float:
        """The rounding of the narrowest dtype that numbers pass through."""
        model_fn, params, (x, _) = self.model
        seen = {leaf.dtype for leaf in flatten(params)[0]} | {model_fn(params, x).dtype}
        seen |= {site.dtype for site in cv.plan(model_fn, params, x).sites}
        return max(torch.finfo(dtype).eps for dtype in seen)


sums = {"loss": cv.Identity("sum")}
EXACT: dict[str, Callable[..., Operator]] = {
    "kfac": lambda *problem: cv.kfac(*problem, fisher="type-2", **sums),
    "kfac, functional": lambda *problem: cv.kfac(*problem, fisher="type-2", engine="functional", **sums),
    "kfac, forward-only": lambda *problem: cv.kfac(*problem, fisher="forward-only", **sums),
    "kfac, reduce": lambda *problem: cv.kfac(*problem, fisher="type-2", sharing="reduce", **sums),
    "diagonal": lambda *problem: cv.diagonal(*problem, **sums),
    "diagonal, functional": lambda *problem: cv.diagonal(*problem, engine="functional", **sums),
    "ggn": lambda *problem: cv.ggn(*problem, **sums),
    "ggn, reverse": lambda *problem: cv.ggn(*problem, mode="reverse", **sums),
    "gramian": lambda *problem: cv.gramian(*problem),
}
mean = {"loss": cv.MSE()}
ROUNDED: dict[str, Callable[..., Operator]] = {
    "kfac": lambda *problem: cv.kfac(*problem, fisher="type-2", **mean),
    "kfac, empirical, functional": lambda *problem: cv.kfac(*problem, fisher="empirical", engine="functional", **mean),
    "ekfac in one pass": lambda *problem: cv.ekfac(*problem, fisher="empirical", **mean),
    "ekfac in two passes": lambda *problem: cv.ekfac(*problem, fisher="type-2", **mean),
    "tkfac": lambda *problem: cv.tkfac(*problem, fisher="type-2", **mean),
    "eigenvalue-corrected tkfac": lambda *problem: cv.eigenvalue_correct(
        cv.tkfac(*problem, fisher="type-2", **mean), *problem, fisher="type-2", **mean
    ),
    "diagonal": lambda *problem: cv.diagonal(*problem, **mean),
    "shampoo": lambda *problem: cv.shampoo(*problem, per_example=True, **mean),
    "kl_shampoo": lambda *problem: cv.kl_shampoo(*problem, per_example=True, **mean),
    "dykaf": lambda *problem: cv.dykaf(*problem, per_example=True, **mean),
    "shampoo of the batch": lambda *problem: cv.shampoo(*problem, **mean),
    "dykaf of the batch": lambda *problem: cv.dykaf(*problem, **mean),
    "ggn": lambda *problem: cv.ggn(*problem, **mean),
    "fisher": lambda *problem: cv.fisher(*problem, kind="empirical", **mean),
    "hessian": lambda *problem: cv.hessian(*problem, **mean),
}
