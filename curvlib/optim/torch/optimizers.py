"""SOAP, DyKAF, KL-Shampoo and Shampoo as drop-in replacements of `torch.optim.AdamW`."""

from __future__ import annotations

from typing import Literal

import torch

from curvlib.errors import ArgumentError
from curvlib.optim.adam import scale_by_adam
from curvlib.optim.dykaf import scale_by_dykaf
from curvlib.optim.dykaf_factors import DyKAFFactors
from curvlib.optim.factors import FactorRule, KLFactors, ShampooFactors
from curvlib.optim.grafting import graft
from curvlib.optim.kl_shampoo import scale_by_kl_shampoo
from curvlib.optim.momentum import heavy_ball
from curvlib.optim.refresh import Adaptive, Every, Refresh, Warmup
from curvlib.optim.second_moments import Transport
from curvlib.optim.shampoo import scale_by_shampoo
from curvlib.optim.soap import scale_by_soap
from curvlib.optim.torch.adapter import Adapter, Group, ParamsArgument
from curvlib.optim.transformation import GradientTransformation, chain

OUTSIDE = ("params", "param_names", "lr", "initial_lr", "weight_decay")  # what is not for the transformation


# options that are values of curvlib's, which `torch.load` may read in a state dictionary
torch.serialization.add_safe_globals([Adaptive, Every, Warmup, DyKAFFactors, KLFactors, ShampooFactors])


def options(group: Group) -> Group:
    """The options of a group that its transformation takes."""
    return {name: value for name, value in group.items() if name not in OUTSIDE}


class SOAP(Adapter):
    """Adam in the eigenbasis of Shampoo's factors, `scale_by_soap`, as a `torch.optim.Optimizer`.

    With ``transport="permute"`` it takes the same steps as the authors' implementation.

    Args:
        params: parameters, named parameters, or groups with options of their own, as for every torch optimizer.
        lr: learning rate.
        weight_decay: rate of the decoupled decay, p <- (1 - lr * weight_decay) (p - lr * update).
        betas, factor_beta, eps, bias_correction, normalize, max_dimension, one_sided, merge_dimensions, block_size,
            start_step, refresh, transport, factors: see `curvlib.optim.scale_by_soap`.

    Raises:
        ArgumentError: an option is out of its range.

    Example:
        >>> import torch, curvlib as cv
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = SOAP(model.parameters(), lr=3e-3, refresh=cv.optim.Every(10))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 4)).square().sum().backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        params: ParamsArgument,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = None,
        bias_correction: bool = True,
        normalize: bool = False,
        max_dimension: int = 10_000,
        one_sided: bool = False,
        merge_dimensions: int | Literal[False] = False,
        block_size: int | None = None,
        start_step: int = 0,
        refresh: Refresh = Every(10),  # noqa: B008 (immutable)
        transport: Transport = "hadamard",
        factors: FactorRule = ShampooFactors(),  # noqa: B008 (immutable)
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, given)

    def transformation(self, group: Group) -> GradientTransformation:
        return scale_by_soap(**options(group))

    def waits(self, group: Group) -> bool:
        return group["start_step"] == 0


class DyKAF(Adapter):
    """Adam in the eigenbasis of a tracked Kronecker product, `scale_by_dykaf`, as a `torch.optim.Optimizer`.

    Args:
        params: as for `SOAP`.
        lr: learning rate.
        weight_decay: as for `SOAP`.
        betas, factor_beta, eps, bias_correction, normalize, max_dimension, one_sided, merge_dimensions, block_size,
            start_step, refresh, transport, integrator, sweeps, start_from, second_moment: see
            `curvlib.optim.scale_by_dykaf`.

    Raises:
        ArgumentError: an option is out of its range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = DyKAF(model.parameters(), lr=3e-3, second_moment="rank-1")
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsArgument,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = None,
        bias_correction: bool = True,
        normalize: bool = False,
        max_dimension: int = 10_000,
        one_sided: bool = False,
        merge_dimensions: int | Literal[False] = False,
        block_size: int | None = None,
        start_step: int = 0,
        refresh: Refresh = Every(10),  # noqa: B008 (immutable)
        transport: Transport = "hadamard",
        integrator: Literal["ksl", "bug"] = "ksl",
        sweeps: int = 1,
        start_from: Literal["svd", "identity"] = "svd",
        second_moment: Literal["full", "rank-1"] = "full",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, given)

    def transformation(self, group: Group) -> GradientTransformation:
        return scale_by_dykaf(**options(group))

    def waits(self, group: Group) -> bool:
        return group["start_step"] == 0


class KLShampoo(Adapter):
    """Whitening by the factors nearest in Kullback-Leibler divergence, `scale_by_kl_shampoo`, for torch.

    Args:
        params: as for `SOAP`.
        lr: learning rate.
        weight_decay: as for `SOAP`.
        betas, eps, bias_correction, max_dimension, one_sided, merge_dimensions, block_size, start_step, refresh,
            damping: see `curvlib.optim.scale_by_kl_shampoo`.

    Raises:
        ArgumentError: an option is out of its range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = KLShampoo(model.parameters(), lr=3e-3)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsArgument,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        max_dimension: int = 10_000,
        one_sided: bool = False,
        merge_dimensions: int | Literal[False] = False,
        block_size: int | None = None,
        start_step: int = 0,
        refresh: Refresh = Every(10),  # noqa: B008 (immutable)
        damping: float = 1e-8,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, given)

    def transformation(self, group: Group) -> GradientTransformation:
        return scale_by_kl_shampoo(**options(group))

    def waits(self, group: Group) -> bool:
        return group["start_step"] == 0


class Shampoo(Adapter):
    """Inverse roots of Kronecker factors with grafting and momentum, as `curvlib.optim.shampoo`, for torch.

    Args:
        params: as for `SOAP`.
        lr: learning rate.
        weight_decay: as for `SOAP`.
        momentum: decay of the moving average of updates.
        grafting: "adam": each parameter's update has the norm of Adam's without a first moment; "none": its own.
        factor_beta, eps, bias_correction, exponent, method, max_dimension, one_sided, merge_dimensions, block_size,
            start_step, refresh: see `curvlib.optim.scale_by_shampoo`.

    Raises:
        ArgumentError: an option is out of its range.

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
        momentum: float = 0.9,
        factor_beta: float | None = 0.95,
        weight_decay: float = 0.01,
        *,
        eps: float = 1e-12,
        grafting: Literal["adam", "none"] = "adam",
        bias_correction: bool = True,
        exponent: float | None = None,
        method: Literal["eigh", "coupled-newton", "newton-schulz"] = "eigh",
        max_dimension: int = 10_000,
        one_sided: bool = False,
        merge_dimensions: int | Literal[False] = False,
        block_size: int | None = None,
        start_step: int = 0,
        refresh: Refresh = Every(10),  # noqa: B008 (immutable)
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, given)

    def transformation(self, group: Group) -> GradientTransformation:
        given = options(group)
        momentum, grafting = given.pop("momentum"), given.pop("grafting")
        if grafting not in ("adam", "none"):
            raise ArgumentError(f"grafting must be 'adam' or 'none', got {grafting!r}")
        preconditioner = scale_by_shampoo(**given)
        if grafting == "adam":
            preconditioner = graft(preconditioner, scale_by_adam(betas=(0.0, 0.95)))
        return chain(preconditioner, heavy_ball(momentum, dampening=momentum))
