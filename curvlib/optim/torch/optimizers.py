"""SOAP, DyKAF, KL-Shampoo, Shampoo, Muon and AdamW as `torch.optim.Optimizer`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.optim.adam import scale_by_adam
from curvlib.optim.dykaf import scale_by_dykaf
from curvlib.optim.grafting import graft
from curvlib.optim.kl_shampoo import scale_by_kl_shampoo
from curvlib.optim.momentum import heavy_ball
from curvlib.optim.muon import Scaling, scale_by_muon
from curvlib.optim.partition import matrices_or_rest
from curvlib.optim.shampoo import scale_by_shampoo
from curvlib.optim.soap import scale_by_soap
from curvlib.optim.torch.adapter import Adapter, Group, ParamsArgument, defaults_of
from curvlib.optim.transformation import GradientTransformation, chain


class SOAP(Adapter):
    """Adam in the eigenbasis of Shampoo's factors: p <- (1 - lr * weight_decay) (p - lr * update).

    With ``transport="permute"`` it takes the same steps as the authors' implementation.

    Args:
        params: parameters, named parameters, or groups with options of their own, as for every torch optimizer.
        lr: learning rate.
        weight_decay: rate of the decoupled decay.
        **options: those of `curvlib.optim.scale_by_soap` (betas, eps, refresh, ...), and those of every torch
            optimizer, as in `Adapter`.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.

    Example:
        >>> import torch, curvlib as cv
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = SOAP(model.parameters(), lr=3e-3, refresh=cv.optim.Every(10))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> optimizer.state[model.weight]["step"]
        tensor(3)
    """

    options = defaults_of(scale_by_soap)

    @classmethod
    def transformation(cls, label: str, options: Group) -> GradientTransformation:
        return scale_by_soap(**options)


class DyKAF(Adapter):
    """Adam in the eigenbasis of a Kronecker product that tracks the Fisher matrix: steps as of `SOAP`.

    Args:
        params: as for `SOAP`, as are the next two.
        lr: learning rate.
        weight_decay: rate of the decoupled decay.
        **options: those of `curvlib.optim.scale_by_dykaf` and of every torch optimizer.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = DyKAF(model.parameters(), lr=3e-3, second_moment="rank-1")
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    options = defaults_of(scale_by_dykaf)

    @classmethod
    def transformation(cls, label: str, options: Group) -> GradientTransformation:
        return scale_by_dykaf(**options)


class KLShampoo(Adapter):
    """Whitening by the factors nearest in the Kullback-Leibler divergence: steps as of `SOAP`.

    Args:
        params: as for `SOAP`, as are the next two.
        lr: learning rate.
        weight_decay: rate of the decoupled decay.
        **options: those of `curvlib.optim.scale_by_kl_shampoo` and of every torch optimizer.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = KLShampoo(model.parameters(), lr=3e-3)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    options = defaults_of(scale_by_kl_shampoo)

    @classmethod
    def transformation(cls, label: str, options: Group) -> GradientTransformation:
        return scale_by_kl_shampoo(**options)


class Shampoo(Adapter):
    """Inverse roots of Kronecker factors with grafting and momentum: steps as of `SOAP`.

    Args:
        params: as for `SOAP`, as are the next two.
        lr: learning rate.
        weight_decay: rate of the decoupled decay.
        **options: ``momentum``: decay of the moving average of updates (0.9); ``grafting``: "adam": each parameter's
            update has the norm of Adam's without a first moment (the default); "none": its own; those of
            `curvlib.optim.scale_by_shampoo` and of every torch optimizer.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = Shampoo(model.parameters(), lr=3e-3)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    options: ClassVar = {"momentum": 0.9, "grafting": "adam", **defaults_of(scale_by_shampoo)}

    @classmethod
    def transformation(cls, label: str, options: Group) -> GradientTransformation:
        momentum, grafting = options.pop("momentum"), options.pop("grafting")
        if grafting not in ("adam", "none"):
            raise ArgumentError(f"grafting must be 'adam' or 'none', got {grafting!r}")
        preconditioner = scale_by_shampoo(**options)
        if grafting == "adam":
            preconditioner = graft(preconditioner, scale_by_adam(betas=(0.0, 0.95)))
        return chain(preconditioner, heavy_ball(momentum, dampening=momentum))

    def waits(self, group: Group) -> bool:
        return False


class AdamW(Adapter):
    """AdamW with the steps of `torch.optim.AdamW`: p <- (1 - lr * weight_decay) p - lr * update.

    Args:
        params: as for `SOAP`.
        lr: learning rate.
        weight_decay: rate of the decoupled decay.
        **options: those of `curvlib.optim.scale_by_adam` and of every torch optimizer.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = AdamW(model.parameters(), betas=(0.9, 0.95))
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    options = defaults_of(scale_by_adam)
    decays_first = True

    def __init__(
        self, params: ParamsArgument, lr: float | Tensor = 1e-3, *, weight_decay: float = 0.01, **options: Any
    ) -> None:
        super().__init__(params, lr, weight_decay=weight_decay, **options)

    @classmethod
    def transformation(cls, label: str, options: Group) -> GradientTransformation:
        return scale_by_adam(**options)


class Muon(Adapter):
    """Muon for matrices and AdamW for the rest: p <- (1 - lr * weight_decay) p - lr * update.

    A group's ``use_muon`` says how its parameters are treated: True, all by Muon; False, all by AdamW; None, as
    `curvlib.optim.matrices_or_rest` finds: by Muon if they have two or more dimensions. An embedding and a head are
    matrices by their shapes; they are best put into a group with ``use_muon=False``. The same groups are understood by
    `AdamW`, which treats them all alike.

    Args:
        params: as for `SOAP`.
        lr: learning rate, of both; with the scaling "rms" Muon's updates are as large as AdamW's.
        weight_decay: rate of the decoupled decay, of both.
        momentum, nesterov, iterations, method, scaling: of Muon, as in `curvlib.optim.scale_by_muon`.
        adamw_betas, adamw_eps: of AdamW.
        use_muon: of the groups that do not say.
        **options: those of every torch optimizer.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.
        ShapeError: by ``step``, a vector or a scalar in a group with ``use_muon=True``; the message names it.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
        >>> optimizer = Muon([
        ...     {"params": model[0].parameters(), "use_muon": False}, {"params": model[1].parameters()},
        ... ])
        >>> model(torch.tensor([0, 2])).square().sum().backward()
        >>> optimizer.step()
        >>> [list(optimizer.state[p]) for p in model.parameters()]
        [['step', 'first', 'second'], ['momentum'], ['step', 'first', 'second']]
    """

    options: ClassVar = {
        **defaults_of(scale_by_muon),
        "adamw_betas": (0.9, 0.95),
        "adamw_eps": 1e-8,
        "use_muon": None,
    }
    decays_first = True

    def __init__(
        self,
        params: ParamsArgument,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        method: Literal["cans", "quintic"] = "cans",
        scaling: Scaling = "rms",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        use_muon: bool | None = None,
        **options: Any,
    ) -> None:
        options |= {"momentum": momentum, "nesterov": nesterov, "iterations": iterations, "method": method}
        options |= {"scaling": scaling, "adamw_betas": adamw_betas, "adamw_eps": adamw_eps, "use_muon": use_muon}
        super().__init__(params, lr, weight_decay=weight_decay, **options)

    @classmethod
    def transformation(cls, label: str, options: Group) -> GradientTransformation:
        use_muon = options.pop("use_muon")
        if use_muon not in (None, True, False):
            raise ArgumentError(f"use_muon must be True, False or None, got {use_muon!r}")
        betas, eps = options.pop("adamw_betas"), options.pop("adamw_eps")
        return scale_by_muon(**options) if label == "matrix" else scale_by_adam(betas=betas, eps=eps)

    def labels(self, group: Group) -> tuple[str, ...]:
        return "matrix", "rest"

    def label(self, group: Group, name: str, parameter: Tensor) -> str:
        if group["use_muon"] is None:
            return matrices_or_rest(name, parameter)
        return "matrix" if group["use_muon"] else "rest"
