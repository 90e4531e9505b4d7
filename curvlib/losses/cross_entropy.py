"""Softmax cross-entropy, with class indices or class probabilities as targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, TargetError
from curvlib.linalg.eager import is_eager
from curvlib.linalg.gram import full_precision
from curvlib.losses.base import Loss, check_reduction

INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross-entropy of softmax outputs, at one position an example or at many.

    At a position with logits f and p = softmax(f), for a target distribution t of total mass w = sum_c t_c:

        l(f, t) = -sum_c t_c log p_c,    dl/df = w p - t,    H = w (diag(p) - p p^T) = S S^T,
        S = sqrt(w) (diag(sqrt p) - p sqrt(p)^T).

    A class index y is the distribution t = e_y, with t = 0 where y is ``ignore_index``. Label smoothing s replaces t by
    (1 - s) t + s / C: the Hessian does not change for distributions of mass one. Terms sum over an example's positions,
    which do not interact. ``reduction="mean"`` divides by the number of targets that count, over all examples and
    positions, as `torch.nn.functional.cross_entropy` does.

    Outputs are [N, ..., C] with classes on ``class_dim``; targets are integer class indices of that shape without the
    class axis, or floating-point class probabilities of the outputs' shape, for which ``ignore_index`` has no meaning.

    Args:
        reduction: ``mean`` or ``sum``.
        ignore_index: targets with this class index do not count.
        label_smoothing: s in [0, 1].
        class_dim: the axis of the classes: the last by default; 1 for images in torch's layout [N, C, height, width].

    Raises:
        ArgumentError: an unknown reduction, or a label smoothing outside [0, 1].

    Example:
        >>> import torch, curvlib as cv
        >>> outputs, targets = torch.zeros(2, 2), torch.tensor([1, -100])
        >>> cv.CrossEntropy().value(outputs, targets)
        tensor(0.6931)
        >>> cv.CrossEntropy().gradient(outputs, targets)
        tensor([[ 0.5000, -0.5000],
                [ 0.0000,  0.0000]])
        >>> cv.CrossEntropy().mask(outputs, targets)
        tensor([ True, False])
    """

    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    class_dim: int = -1

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        if not 0 <= self.label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")

    def mask(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """Where the target is not ``ignore_index``: bool [N, *positions]; None for class probabilities."""
        # as int64, since comparing a narrow dtype with a number outside its range wraps around
        return None if targets.dtype.is_floating_point else targets.long() != self.ignore_index

    def positions(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._count(full_precision(outputs), targets)

    # --- checks -------------------------------------------------------------------------------------------------

    def _check_targets(self, outputs: Tensor, targets: Any) -> None:
        if outputs.ndim < 2:
            raise TargetError(f"CrossEntropy expected outputs [N, ..., C], got shape {tuple(outputs.shape)}")
        axis = self.class_dim % outputs.ndim if -outputs.ndim <= self.class_dim < outputs.ndim else 0
        if axis == 0:
            raise TargetError(
                f"CrossEntropy(class_dim={self.class_dim}) does not name an axis after the first one of outputs of "
                f"shape {tuple(outputs.shape)}"
            )
        indices_shape = _without(outputs, axis)
        expected = (
            f"CrossEntropy(class_dim={self.class_dim}) expected integer class indices of shape {indices_shape} or "
            f"floating-point class probabilities of shape {tuple(outputs.shape)} for outputs of shape "
            f"{tuple(outputs.shape)}"
        )
        if not isinstance(targets, Tensor):
            advice = "; write torch.tensor(targets)" if isinstance(targets, (list, tuple)) else ""
            raise TargetError(f"{expected}, got {type(targets).__name__}{advice}")
        floating, shape = targets.dtype.is_floating_point, tuple(targets.shape)
        if not floating and targets.dtype not in INDEX_DTYPES:
            raise TargetError(f"{expected}, got dtype {targets.dtype}; convert class indices with .long()")
        if shape == (tuple(outputs.shape) if floating else indices_shape):
            self._check_values(outputs.shape[axis], targets)
            return
        advice = ""
        if floating and shape == indices_shape:
            advice = "; convert class indices with .long()"
        elif not floating and shape == tuple(outputs.shape):
            advice = "; convert class probabilities with .float()"
        elif shape == (*indices_shape, 1):
            advice = "; write targets.squeeze(-1)"
        elif not floating:
            fitting = [d for d in range(1, outputs.ndim) if shape == _without(outputs, d)]
            if fitting:
                layout = ", torch's layout for images" if fitting[0] == 1 else ""
                advice = f"; they fit classes on axis {fitting[0]}{layout}: use CrossEntropy(class_dim={fitting[0]})"
        raise TargetError(f"{expected}, got {targets.dtype} of shape {shape}{advice}")

    def _check_values(self, classes: int, targets: Tensor) -> None:
        """Raises TargetError for indices out of range and negative probabilities, where looking at them is free."""
        if not is_eager() or targets.device.type != "cpu":
            return
        if targets.dtype.is_floating_point:
            if not (targets >= 0).all():
                raise TargetError("CrossEntropy expected class probabilities >= 0, got a negative one or nan")
            return
        indices = targets.long()
        wrong = indices[(indices != self.ignore_index) & ((indices < 0) | (indices >= classes))]
        if wrong.numel():
            raise TargetError(
                f"CrossEntropy expected class indices from 0 to {classes - 1} for {classes} classes, or "
                f"ignore_index={self.ignore_index}, got {int(wrong[0])}"
            )

    # --- the terms and their derivatives ------------------------------------------------------------------------

    def _terms(self, outputs: Tensor, targets: Any) -> Tensor:
        log_p = self._classes_last(outputs).log_softmax(-1)  # [N, *positions, C]
        mask = self.mask(outputs, targets)
        if mask is None:
            terms = -(self._distribution(targets, outputs.dtype) * log_p).sum(-1)
        else:
            index = torch.where(mask, targets.long(), 0)
            terms = -log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            if self.label_smoothing:
                terms = (1 - self.label_smoothing) * terms - self.label_smoothing * log_p.mean(-1)
            terms = torch.where(mask, terms, 0)
        return terms.reshape(outputs.shape[0], -1).sum(1)

    def _count(self, outputs: Tensor, targets: Any) -> Tensor:
        mask = self.mask(outputs, targets)
        if mask is None:
            return outputs.new_full((), outputs.numel() // outputs.shape[self.class_dim])
        return mask.sum().to(outputs.dtype)

    def _gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        p = self._classes_last(outputs).softmax(-1)
        if targets.dtype.is_floating_point:
            t = self._distribution(targets, outputs.dtype)
            return self._classes_back(t.sum(-1, keepdim=True) * p - t, outputs)
        hit = torch.arange(p.shape[-1], device=p.device) == targets.long().unsqueeze(-1)
        gradient = torch.where(hit, p - (1 - self.label_smoothing), p)
        if self.label_smoothing:
            gradient = gradient - self.label_smoothing / p.shape[-1]
        return self._classes_back(_weigh(gradient, self._mass(outputs, targets)), outputs)

    def _sqrt_hessian(self, outputs: Tensor, targets: Any, start: int, stop: int) -> Tensor:
        log_p = self._classes_last(outputs).log_softmax(-1)
        examples, *positions, classes = log_p.shape
        log_p = log_p.reshape(examples, -1, classes).movedim(1, 0)  # [P, N, C]
        mass = self._mass(outputs, targets).reshape(examples, -1).movedim(1, 0)  # [P, N]
        if mass.dtype == torch.bool:
            log_p = torch.where(mass.unsqueeze(-1), log_p, 0)  # ignored outputs need not be finite
        column = torch.arange(start, stop, device=outputs.device)
        position, chosen_class = column // classes, column % classes  # [K]
        # exp(log p / 2) stays accurate where p itself underflows
        at_class = (0.5 * log_p[position, :, chosen_class]).exp()  # [K, N]
        at_class = at_class * mass[position].to(log_p.dtype).sqrt()
        hit = torch.arange(classes, device=outputs.device) == chosen_class.unsqueeze(-1)  # [K, C]
        single = log_p.shape[0] == 1
        p = log_p.exp() if single else log_p.exp()[position]  # [1 or K, N, C]
        columns = at_class.unsqueeze(-1) * (hit.unsqueeze(1).to(p.dtype) - p)  # [K, N, C]
        if not single:
            # where, not a product: zeros stay zeros next to outputs that are not finite
            here = torch.arange(log_p.shape[0], device=outputs.device) == position.unsqueeze(-1)  # [K, P]
            columns = torch.where(here[:, None, :, None], columns.unsqueeze(2), 0)  # [K, N, P, C]
        return self._classes_back(columns.reshape(stop - start, examples, *positions, classes), outputs)

    def _sample(self, outputs: Tensor, targets: Any, generator: torch.Generator, samples: int) -> Tensor:
        p = self._classes_last(outputs).softmax(-1)
        *positions, classes = p.shape
        cumulative = p.reshape(-1, classes).cumsum(-1)  # [R, C]
        shape = (cumulative.shape[0], samples)
        uniform = torch.rand(shape, generator=generator, dtype=p.dtype, device=p.device)
        # the last sum is one only up to rounding; scaling by it keeps classes of probability zero from being drawn
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=classes - 1)
        drawn = drawn.movedim(-1, 0).reshape(samples, *positions, 1)
        hit = torch.arange(classes, device=p.device) == drawn  # [M, N, *positions, C]
        gradient = torch.where(hit, p - 1, p)
        return self._classes_back(_weigh(gradient, self._mass(outputs, targets), exponent=0.5), outputs)

    def _hessian_product(self, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
        p, v = self._classes_last(outputs).softmax(-1), self._classes_last(v)
        product = p * (v - (p * v).sum(-1, keepdim=True))
        return self._classes_back(_weigh(product, self._mass(outputs, targets)), outputs)

    # --- layout and weights -------------------------------------------------------------------------------------

    def _classes_last(self, tensor: Tensor) -> Tensor:
        """[N, ..., C] from the user's layout."""
        return tensor.movedim(self.class_dim, -1)

    def _classes_back(self, tensor: Tensor, outputs: Tensor) -> Tensor:
        """[*, N, ..., C] to the user's layout, with any axes in front."""
        axis = self.class_dim if self.class_dim < 0 else self.class_dim - outputs.ndim
        return tensor.movedim(-1, axis)

    def _distribution(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Smoothed class probabilities t, classes last."""
        t = self._classes_last(targets).to(dtype)
        if self.label_smoothing:
            t = (1 - self.label_smoothing) * t + self.label_smoothing / t.shape[-1]
        return t

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """w, the mass of each target [N, *positions]: the mask for class indices, a sum for probabilities."""
        mask = self.mask(outputs, targets)
        return self._distribution(targets, outputs.dtype).sum(-1) if mask is None else mask


def _weigh(values: Tensor, mass: Tensor, *, exponent: float = 1.0) -> Tensor:
    """mass^exponent * values [*, C]; where a mask is False, zero whatever the value."""
    if mass.dtype == torch.bool:
        return torch.where(mass.unsqueeze(-1), values, 0)
    return mass.pow(exponent).unsqueeze(-1) * values


def _without(outputs: Tensor, axis: int) -> tuple[int, ...]:
    """The outputs' shape without one axis."""
    return tuple(size for d, size in enumerate(outputs.shape) if d != axis)
