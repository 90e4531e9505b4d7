"""The interface of a loss: what curvature estimators need to know of it, all in output space.

For N examples with outputs f_n and targets y_n a loss is the reduced sum of one term l(f_n, y_n) an example. Gradients
and Hessians are those of the unreduced terms: an estimator divides by `Loss.normalizer` once, at the end.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor

from curvlib import containers
from curvlib.errors import ArgumentError, DeviceError, DtypeError, EmptyBatchError, TargetError
from curvlib.linalg.gram import full_precision

REDUCTIONS = ("mean", "sum")


class Loss(abc.ABC):
    """A loss of outputs [N, ...], by its reduced value and by the derivatives of its unreduced terms.

    Losses are frozen dataclasses: hashable, and static for transforms and compilers. Half-precision outputs are
    computed with in float32. Only `check` and `value` look at whether the targets fit; the other methods take it
    as given. None of them waits for a device, `check` and `CustomLoss`'s test for convexity in eager mode excepted.

    Example:
        >>> import torch, curvlib as cv
        >>> loss, outputs, targets = cv.CrossEntropy(), torch.zeros(3, 2), torch.tensor([0, 1, 1])
        >>> isinstance(loss, cv.losses.Loss), loss.columns(outputs)
        (True, 2)
        >>> loss.sqrt_hessian(outputs, targets).shape
        torch.Size([2, 3, 2])
    """

    reduction: str

    # --- the interface ------------------------------------------------------------------------------------------

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Checks that targets fit the loss and the outputs.

        Looks at shapes and dtypes only, so that meta and fake tensors will do for the outputs; the values of targets
        are checked too where that is cheap: in eager mode on the CPU.

        Args:
            outputs: [N, ...].
            targets: whatever the loss takes.

        Raises:
            TargetError: the targets do not fit.
            DtypeError: the outputs are not of a floating dtype.
            EmptyBatchError: there is no example.
            DeviceError: targets live on another device than outputs that have values.
        """
        if not isinstance(outputs, Tensor):
            raise TargetError(
                f"{self._name} expected the model's outputs to be one tensor [N, ...], got {_describe(outputs)}; "
                "cv.functional(module, output=...) chooses one of several"
            )
        if outputs.ndim == 0:
            raise TargetError(f"{self._name} expected outputs [N, ...] with a leading axis of examples, got a scalar")
        if not outputs.dtype.is_floating_point:
            raise DtypeError(f"{self._name} expected floating-point outputs, got {outputs.dtype}")
        if outputs.numel() == 0:
            raise EmptyBatchError(
                f"{self._name} needs at least one example and one output, got outputs of shape {tuple(outputs.shape)}"
            )
        self._check_targets(outputs, targets)
        if outputs.device.type != "meta":
            check_device(targets, outputs.device)

    def value(self, outputs: Tensor, targets: Any) -> Tensor:
        """The reduced objective, sum_n l(f_n, y_n) / normalizer: a scalar.

        Raises:
            TargetError: the targets do not fit (see `check`, whose other errors are raised as well).
        """
        self.check(outputs, targets)
        return self.terms(outputs, targets).sum() / self.normalizer(outputs, targets)

    def terms(self, outputs: Tensor, targets: Any) -> Tensor:
        """Each example's own unreduced term l(f_n, y_n), summed over its positions and elements: [N]."""
        return self._terms(full_precision(outputs), targets)

    def normalizer(self, outputs: Tensor, targets: Any) -> Tensor:
        """What the reduction divides the sum of terms by: a 0-d tensor; 1 for ``reduction="sum"``."""
        outputs = full_precision(outputs)
        return outputs.new_ones(()) if self.reduction == "sum" else self._count(outputs, targets)

    @abc.abstractmethod
    def positions(self, outputs: Tensor, targets: Any) -> Tensor:
        """How many positions count, over all examples: with G = I, a sum over terms is that many means; 0-d."""

    @abc.abstractmethod
    def mask(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """Which positions count: bool [N, *positions], or None where all do."""

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """The gradients of the terms, dl(f_n, y_n)/df_n: shape and dtype of ``outputs``."""
        return self._gradient(full_precision(outputs), targets).to(outputs.dtype)

    def columns(self, outputs: Tensor) -> int:
        """K, the number of columns of `sqrt_hessian`: the number of outputs of an example, over all positions."""
        return math.prod(outputs.shape[1:])

    def sqrt_hessian(self, outputs: Tensor, targets: Any, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns s_k of square roots of the terms' Hessians: H_n = sum_k s_nk s_nk^T, with f_n flattened.

        Where positions do not interact each column is non-zero at one position only: columns that share a position
        would interfere when they are pulled back through a model that mixes positions.

        Args:
            outputs: [N, ...].
            targets: as in `check`.
            start: the first column wanted.
            stop: the column after the last one wanted; None: all K.

        Returns:
            Columns [stop - start, *outputs.shape] in the dtype of ``outputs``.

        Raises:
            ArgumentError: not 0 <= start <= stop <= K.
            SingularError: a `CustomLoss` that is not convex in the outputs (eager mode only).
        """
        total = self.columns(outputs)
        stop = total if stop is None else stop
        if not 0 <= start <= stop <= total:
            raise ArgumentError(f"{self._name} has columns 0 to {total} for these outputs, got {start} to {stop}")
        return self._sqrt_hessian(full_precision(outputs), targets, start, stop).to(outputs.dtype)

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator, samples: int) -> Tensor:
        """Gradients of the negative log-likelihood at targets drawn from the model's likelihood, / sqrt(M).

        E[sum_m g_nm g_nm^T] = H_n, the Hessian of term n. Targets only say which positions count, and how much.

        Args:
            outputs: [N, ...].
            targets: as in `check`.
            generator: source of randomness, on the device of ``outputs``; the global one is never touched.
            samples: M, the number of draws an example.

        Returns:
            Gradients [M, *outputs.shape] in the dtype of ``outputs``.

        Raises:
            ArgumentError: ``samples`` is less than 1.
            DeviceError: the generator lives on another device.
            SingularError: a `CustomLoss` that is not convex in the outputs (eager mode only).
        """
        if samples < 1:
            raise ArgumentError(f"{self._name} needs at least one sample, got samples={samples}")
        if generator.device.type != outputs.device.type and outputs.device.type != "meta":
            raise DeviceError(
                f"the generator is on {generator.device} and the outputs are on {outputs.device}: "
                f"make it with torch.Generator({outputs.device.type!r})"
            )
        draws = self._sample(full_precision(outputs), targets, generator, samples)
        return (draws / math.sqrt(samples)).to(outputs.dtype)

    def hessian_product(self, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
        """H_n v_n for every example: shape and dtype of ``outputs``.

        Args:
            outputs: [N, ...].
            targets: as in `check`.
            v: one vector an example, in the shape of ``outputs``.
        """
        outputs_full = full_precision(outputs)
        return self._hessian_product(outputs_full, targets, v.to(outputs_full.dtype)).to(outputs.dtype)

    # --- what a loss implements, for outputs in full precision ------------------------------------------------------

    @abc.abstractmethod
    def _check_targets(self, outputs: Tensor, targets: Any) -> None:
        """Raises TargetError if the targets do not fit outputs that have at least one element."""

    @abc.abstractmethod
    def _terms(self, outputs: Tensor, targets: Any) -> Tensor:
        """[N]."""

    @abc.abstractmethod
    def _count(self, outputs: Tensor, targets: Any) -> Tensor:
        """What ``reduction="mean"`` divides by, 0-d."""

    @abc.abstractmethod
    def _gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Shape of outputs."""

    @abc.abstractmethod
    def _sqrt_hessian(self, outputs: Tensor, targets: Any, start: int, stop: int) -> Tensor:
        """[stop - start, *outputs.shape]."""

    @abc.abstractmethod
    def _sample(self, outputs: Tensor, targets: Any, generator: torch.Generator, samples: int) -> Tensor:
        """[samples, *outputs.shape], not yet divided by sqrt(samples)."""

    @abc.abstractmethod
    def _hessian_product(self, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
        """Shape of outputs."""

    @property
    def _name(self) -> str:
        """What messages call the loss."""
        return type(self).__name__


def check_reduction(reduction: str) -> None:
    """Raises ArgumentError if ``reduction`` is not a documented one."""
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_device(targets: Any, device: torch.device) -> None:
    """Raises DeviceError if a tensor of the targets lives elsewhere; numbers may."""
    for target in containers.tensors_in(targets):
        if target.ndim and target.device != device:
            raise DeviceError(
                f"targets are on {target.device} and the model is on {device}: write targets.to({str(device)!r})"
            )


def _describe(value: Any) -> str:
    """A tensor's dtype and shape, or the name of another value's type."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_like_outputs(name: str, outputs: Tensor, targets: Any) -> None:
    """Raises TargetError unless targets are floating-point numbers in the shape of the outputs."""
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        fitting = isinstance(targets, Tensor) and targets.numel() == outputs.numel()
        raise TargetError(
            f"{name} expected targets of the outputs' shape {tuple(outputs.shape)}, got {_describe(targets)}"
            + (f"; if their order is the same, write targets.reshape{tuple(outputs.shape)}" if fitting else "")
        )
    if not targets.dtype.is_floating_point:
        raise TargetError(f"{name} expected floating-point targets, got {targets.dtype}: convert them with .float()")
