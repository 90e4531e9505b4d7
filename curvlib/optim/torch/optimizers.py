"""SOAP, DyKAF, KL-Shampoo and Shampoo as drop-in replacements of `torch.optim.AdamW`."""

from __future__ import annotations

from typing import Any

import torch

from curvlib.errors import ArgumentError
from curvlib.factors.dykaf import DyKAFFactors
from curvlib.factors.kl_shampoo import KLFactors
from curvlib.factors.shampoo import ShampooFactors
from curvlib.optim.adam import scale_by_adam
from curvlib.optim.dykaf import scale_by_dykaf
from curvlib.optim.grafting import graft
from curvlib.optim.kl_shampoo import scale_by_kl_shampoo
from curvlib.optim.momentum import heavy_ball
from curvlib.optim.refresh import Adaptive, Every, Warmup
from curvlib.optim.shampoo import scale_by_shampoo
from curvlib.optim.soap import scale_by_soap
from curvlib.optim.torch.adapter import Adapter, Group, ParamsArgument, defaults_of, options_of
from curvlib.optim.transformation import GradientTransformation, chain

# options that are values of curvlib's, which `torch.load` may read in a state dictionary
torch.serialization.add_safe_globals([Adaptive, Every, Warmup, DyKAFFactors, KLFactors, ShampooFactors])


class SOAP(Adapter):
    """Adam in the eigenbasis of Shampoo's factors, as a `torch.optim.Optimizer`.

    With ``transport="permute"`` it takes the same steps as the authors' implementation.

    Args:
        params: parameters, named parameters, or groups with options of their own, as for every torch optimizer.
        lr: learning rate.
        weight_decay: rate of the decoupled decay, p <- (1 - lr * weight_decay) (p - lr * update).
        **options: those of `curvlib.optim.scale_by_soap` (betas, eps, refresh, ...).

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
    """

    def __init__(self, params: ParamsArgument, lr: float = 3e-3, *, weight_decay: float = 0.01, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **defaults_of(scale_by_soap, options)})

    def transformation(self, group: Group) -> GradientTransformation:
        return scale_by_soap(**options_of(group))

    def waits(self, group: Group) -> bool:
        return group["start_step"] == 0


class DyKAF(Adapter):
    """Adam in the eigenbasis of a Kronecker product that tracks the Fisher matrix, as a `torch.optim.Optimizer`.

    Args:
        params: as for `SOAP`, as are the next two.
        lr: learning rate.
        weight_decay: rate of the decoupled decay.
        **options: those of `curvlib.optim.scale_by_dykaf`.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = DyKAF(model.parameters(), lr=3e-3, second_moment="rank-1")
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(self, params: ParamsArgument, lr: float = 3e-3, *, weight_decay: float = 0.01, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **defaults_of(scale_by_dykaf, options)})

    def transformation(self, group: Group) -> GradientTransformation:
        return scale_by_dykaf(**options_of(group))

    def waits(self, group: Group) -> bool:
        return group["start_step"] == 0


class KLShampoo(Adapter):
    """Whitening by the factors nearest in the Kullback-Leibler divergence, as a `torch.optim.Optimizer`.

    Args:
        params: as for `SOAP`, as are the next two.
        lr: learning rate.
        weight_decay: rate of the decoupled decay.
        **options: those of `curvlib.optim.scale_by_kl_shampoo`.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = KLShampoo(model.parameters(), lr=3e-3)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(self, params: ParamsArgument, lr: float = 3e-3, *, weight_decay: float = 0.01, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **defaults_of(scale_by_kl_shampoo, options)})

    def transformation(self, group: Group) -> GradientTransformation:
        return scale_by_kl_shampoo(**options_of(group))

    def waits(self, group: Group) -> bool:
        return group["start_step"] == 0


class Shampoo(Adapter):
    """Inverse roots of Kronecker factors with grafting and momentum, as a `torch.optim.Optimizer`.

    Args:
        params: as for `SOAP`.
        lr: learning rate.
        weight_decay: rate of the decoupled decay, as for `SOAP`.
        momentum: decay of the moving average of updates.
        grafting: "adam": each parameter's update has the norm of Adam's without a first moment; "none": its own.
        **options: those of `curvlib.optim.scale_by_shampoo`.

    Raises:
        ArgumentError: an option is out of its range, or there is none of this name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = Shampoo(model.parameters(), lr=3e-3)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsArgument,
        lr: float = 3e-3,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.9,
        grafting: str = "adam",
        **options: Any,
    ) -> None:
        own = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "grafting": grafting}
        super().__init__(params, {**own, **defaults_of(scale_by_shampoo, options)})

    def transformation(self, group: Group) -> GradientTransformation:
        options = options_of(group)
        momentum, grafting = options.pop("momentum"), options.pop("grafting")
        if grafting not in ("adam", "none"):
            raise ArgumentError(f"grafting must be 'adam' or 'none', got {grafting!r}")
        preconditioner = scale_by_shampoo(**options)
        if grafting == "adam":
            preconditioner = graft(preconditioner, scale_by_adam(betas=(0.0, 0.95)))
        return chain(preconditioner, heavy_ball(momentum, dampening=momentum))
