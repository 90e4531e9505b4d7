"""Optimizers by their usual names: a preconditioner, decoupled weight decay, and a learning rate."""

from __future__ import annotations

from typing import Any, Literal

from curvlib.optim.adam import scale_by_adam
from curvlib.optim.dykaf import scale_by_dykaf
from curvlib.optim.grafting import graft
from curvlib.optim.kl_shampoo import scale_by_kl_shampoo
from curvlib.optim.momentum import heavy_ball
from curvlib.optim.muon import Scaling, scale_by_muon
from curvlib.optim.partition import Rule
from curvlib.optim.scaling import LearningRate, scale_by_learning_rate
from curvlib.optim.shampoo import scale_by_shampoo
from curvlib.optim.soap import scale_by_soap
from curvlib.optim.transformation import GradientTransformation, chain
from curvlib.optim.weight_decay import add_decayed_weights
from curvlib.pytree import Tree


def optimizer(
    preconditioner: GradientTransformation,
    learning_rate: LearningRate,
    *,
    weight_decay: float,
    mask: Rule | Tree | None = None,
) -> GradientTransformation:
    """The chain that every alias is: params move by -lr (preconditioned gradient + weight_decay * params).

    Args:
        preconditioner: ``scale_by_*`` of a method.
        learning_rate: as in `scale_by_learning_rate`.
        weight_decay: as in `add_decayed_weights`.
        mask: which leaves decay, as there.

    Raises:
        ArgumentError: a number is negative.

    Example:
        >>> import torch
        >>> transformation = optimizer(scale_by_adam(), 0.1, weight_decay=0.5)
        >>> params = torch.tensor([2.0])
        >>> transformation.update(torch.tensor([7.0]), transformation.init(params), params)[0]
        tensor([-0.2000])
    """
    return chain(preconditioner, add_decayed_weights(weight_decay, mask=mask), scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: LearningRate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    mask: Rule | Tree | None = None,
) -> GradientTransformation:
    """AdamW, with the conventions and defaults of `torch.optim.AdamW`.

    Args:
        learning_rate: a number, or a function of the number of the step, as in `scale_by_learning_rate`.
        betas: decays of the moments, as in `scale_by_adam`.
        eps: what keeps the denominator away from 0.
        weight_decay: rate of the decoupled decay.
        mask: which leaves decay, as in `add_decayed_weights`.

    Raises:
        ArgumentError: a number is out of its range.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019.

    Example:
        >>> import torch, curvlib.optim as optim
        >>> transformation = optim.adamw(0.1, weight_decay=0.0)
        >>> params = {"w": torch.tensor([1.0, -1.0])}
        >>> state = transformation.init(params)
        >>> for _ in range(100):
        ...     grads = {"w": 2 * params["w"]}
        ...     updates, state = transformation.update(grads, state, params)
        ...     params = optim.apply_updates(params, updates)
        >>> bool(params["w"].norm() < 0.01)
        True
    """
    return optimizer(scale_by_adam(betas=betas, eps=eps), learning_rate, weight_decay=weight_decay, mask=mask)


def muon(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    method: Literal["cans", "quintic"] = "cans",
    scaling: Scaling = "spectral",
    weight_decay: float = 0.1,
    mask: Rule | Tree | None = None,
) -> GradientTransformation:
    """Muon, for parameters that are matrices or of higher order, with the defaults of `torch.optim.Muon`.

    Args:
        learning_rate: a number, or a function of the number of the step, as in `scale_by_learning_rate`.
        momentum: its decay, as in `scale_by_muon`, like the next four.
        nesterov: whether the newest gradient is counted once more.
        iterations: polynomials of the orthogonalization.
        method: of the orthogonalization.
        scaling: of the updates, by their shape.
        weight_decay: rate of the decoupled decay.
        mask: which leaves decay, as in `add_decayed_weights`.

    Raises:
        ArgumentError: a number is out of its range.
        ShapeError: init finds a vector or a scalar; use `partition`.

    Source: Jordan et al., Muon, 2024 (https://kellerjordan.github.io/posts/muon).

    Example:
        >>> import torch, curvlib.optim as optim
        >>> parts = {"matrix": optim.muon(0.02), "rest": optim.adamw(3e-4)}
        >>> transformation = optim.partition(parts, optim.matrices_or_rest)
        >>> params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
        >>> updates, state = transformation.update(params, transformation.init(params), params)
        >>> updates["b"].shape, updates["w"].shape
        (torch.Size([3]), torch.Size([3, 2]))
    """
    preconditioner = scale_by_muon(
        momentum=momentum, nesterov=nesterov, iterations=iterations, method=method, scaling=scaling
    )
    return optimizer(preconditioner, learning_rate, weight_decay=weight_decay, mask=mask)


def soap(
    learning_rate: LearningRate, *, weight_decay: float = 1e-2, mask: Rule | Tree | None = None, **options: Any
) -> GradientTransformation:
    """SOAP: Adam in the eigenbasis of Shampoo's factors; vectors get plain Adam.

    Args:
        learning_rate: a number, or a function of the number of the step, as in `scale_by_learning_rate`.
        weight_decay: rate of the decoupled decay.
        mask: which leaves decay, as in `add_decayed_weights`.
        **options: those of `scale_by_soap`.

    Raises:
        ArgumentError: an option is out of its range.

    Source: Vyas et al. 2024, arXiv 2409.11321.

    Example:
        >>> import torch, curvlib.optim as optim
        >>> transformation = optim.soap(3e-3, refresh=optim.Every(5))
        >>> params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
        >>> updates, state = transformation.update(params, transformation.init(params), params)
        >>> updates["w"].shape
        torch.Size([3, 2])
    """
    return optimizer(scale_by_soap(**options), learning_rate, weight_decay=weight_decay, mask=mask)


def dykaf(
    learning_rate: LearningRate, *, weight_decay: float = 1e-2, mask: Rule | Tree | None = None, **options: Any
) -> GradientTransformation:
    """DyKAF: Adam in the eigenbasis of a Kronecker product that tracks the Fisher matrix.

    Args:
        learning_rate: as in `soap`, as are the next two.
        weight_decay: rate of the decoupled decay.
        mask: which leaves decay.
        **options: those of `scale_by_dykaf`.

    Raises:
        ArgumentError: an option is out of its range.

    Source: Yudin et al. 2025, arXiv 2511.06477.

    Example:
        >>> import torch, curvlib.optim as optim
        >>> transformation = optim.dykaf(3e-3, second_moment="rank-1")
        >>> params = {"w": torch.ones(3, 2)}
        >>> updates, state = transformation.update(params, transformation.init(params), params)
        >>> updates["w"].shape
        torch.Size([3, 2])
    """
    return optimizer(scale_by_dykaf(**options), learning_rate, weight_decay=weight_decay, mask=mask)


def kl_shampoo(
    learning_rate: LearningRate, *, weight_decay: float = 1e-2, mask: Rule | Tree | None = None, **options: Any
) -> GradientTransformation:
    """KL-Shampoo: whitening by the factors that are nearest in the Kullback-Leibler divergence.

    Args:
        learning_rate: as in `soap`, as are the next two.
        weight_decay: rate of the decoupled decay.
        mask: which leaves decay.
        **options: those of `scale_by_kl_shampoo`.

    Raises:
        ArgumentError: an option is out of its range.

    Source: Lin et al. 2025, arXiv 2509.03378.

    Example:
        >>> import torch, curvlib.optim as optim
        >>> transformation = optim.kl_shampoo(3e-3)
        >>> params = {"w": torch.ones(3, 2)}
        >>> updates, state = transformation.update(params, transformation.init(params), params)
        >>> updates["w"].shape
        torch.Size([3, 2])
    """
    return optimizer(scale_by_kl_shampoo(**options), learning_rate, weight_decay=weight_decay, mask=mask)


def shampoo(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.9,
    grafting: GradientTransformation | None = None,
    weight_decay: float = 1e-2,
    mask: Rule | Tree | None = None,
    **options: Any,
) -> GradientTransformation:
    """Shampoo: gradients times inverse roots of their factors, with grafting and momentum; vectors get Adagrad's rule.

    Args:
        learning_rate: as in `soap`.
        momentum: decay of the moving average of updates.
        grafting: gives the norm of each leaf's update (`graft`); None: Adam without a first moment.
        weight_decay: rate of the decoupled decay.
        mask: which leaves decay.
        **options: those of `scale_by_shampoo`.

    Raises:
        ArgumentError: an option is out of its range.

    Source: Gupta, Koren and Singer 2018, arXiv 1802.09568; Anil et al. 2020, arXiv 2002.09018.

    Example:
        >>> import torch, curvlib.optim as optim
        >>> transformation = optim.shampoo(3e-3, grafting=optim.identity())
        >>> params = {"w": torch.ones(3, 2)}
        >>> updates, state = transformation.update(params, transformation.init(params), params)
        >>> updates["w"].shape
        torch.Size([3, 2])
    """
    magnitude = scale_by_adam(betas=(0.0, 0.95)) if grafting is None else grafting
    preconditioner = chain(graft(scale_by_shampoo(**options), magnitude), heavy_ball(momentum, dampening=momentum))
    return optimizer(preconditioner, learning_rate, weight_decay=weight_decay, mask=mask)
