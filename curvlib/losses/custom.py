"""Any twice differentiable loss, by automatic differentiation in output space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib import containers
from curvlib.errors import ArgumentError, SingularError, TargetError
from curvlib.linalg.eager import is_eager
from curvlib.linalg.eigh import eigh
from curvlib.linalg.gram import full_precision
from curvlib.losses.base import Loss, check_reduction


@dataclass(frozen=True)
class CustomLoss(Loss):
    """A loss given as a function, which must be convex in the outputs for its curvature to have a square root.

    H_n is the Hessian of l(f_n, y_n) in the D outputs of an example, [D, D] for each of them, and its square root
    S_n = Q diag(sqrt(lambda)) from H_n = Q diag(lambda) Q^T. With outputs at many positions the columns of S_n are
    spread over all of them. Samples are S_n r with independent random signs r: E[r r^T] = I. ``reduction="mean"``
    divides by the N examples.

    Eigenvalues below -tol * max |lambda|, tol = eps^(2/3) and the maximum over the batch, are an error in eager mode;
    other negative ones are set to zero.

    Args:
        fn: (outputs, targets) -> one value an example, [N]. It is called on a batch of one example under
            `torch.func.vmap`. Targets may be any pytree of tensors with a leading axis N.
        reduction: ``mean`` or ``sum``.

    Raises:
        ArgumentError: an unknown reduction; later, a ``fn`` that does not return one value an example.

    Example:
        >>> import torch, curvlib as cv
        >>> poisson = cv.CustomLoss(lambda log_rate, count: (log_rate.exp() - count * log_rate).sum(-1))
        >>> outputs, targets = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])
        >>> poisson.value(outputs, targets)
        tensor(1.)
        >>> poisson.gradient(outputs, targets)
        tensor([[ 0.],
                [-2.]])
    """

    fn: Callable[[Tensor, Any], Tensor]
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        if not callable(self.fn) or isinstance(self.fn, type):
            raise ArgumentError(
                "CustomLoss takes a function (outputs, targets) -> one value an example, [N], got "
                + (f"the class {self.fn.__name__}" if isinstance(self.fn, type) else f"a {type(self.fn).__name__}")
            )

    def mask(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """None: every position counts."""
        return None

    def _check_targets(self, outputs: Tensor, targets: Any) -> None:
        for path, leaf in containers.leaves_with_path(targets):
            if isinstance(leaf, Tensor) and leaf.shape[:1] != outputs.shape[:1]:
                raise TargetError(
                    f"CustomLoss expected targets with a leading axis of {outputs.shape[0]} examples, got "
                    f"targets{path} of shape {tuple(leaf.shape)}"
                )

    def _terms(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._each(self._term, outputs, targets)

    def positions(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._count(full_precision(outputs), targets)

    def _count(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.new_full((), outputs.shape[0])

    def _gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        return self._each(torch.func.grad(self._term), outputs, targets)

    def _sqrt_hessian(self, outputs: Tensor, targets: Any, start: int, stop: int) -> Tensor:
        columns = self._roots(outputs, targets)[..., start:stop]  # [N, D, K]
        return columns.movedim(-1, 0).reshape(stop - start, *outputs.shape)

    def _sample(self, outputs: Tensor, targets: Any, generator: torch.Generator, samples: int) -> Tensor:
        roots = self._roots(outputs, targets)  # [N, D, D]
        shape = (samples, *roots.shape[:2])
        uniform = torch.rand(shape, generator=generator, dtype=roots.dtype, device=roots.device)
        signs = torch.where(uniform < 0.5, -1.0, 1.0).to(roots.dtype)
        return torch.einsum("nde,mne->mnd", roots, signs).reshape(samples, *outputs.shape)

    def _hessian_product(self, outputs: Tensor, targets: Any, v: Tensor) -> Tensor:
        def apply(output: Tensor, target: Any, vector: Tensor) -> Tensor:
            # reverse mode twice (H is symmetric): some operations have no forward mode
            pull = torch.func.vjp(lambda f: torch.func.grad(self._term)(f, target), output)[1]
            product: Tensor = pull(vector)[0]
            return product

        return self._each(apply, outputs, targets, v)

    def _term(self, output: Tensor, target: Any) -> Tensor:
        """l(f, y) of one example, 0-d, by a call of ``fn`` on a batch of one."""
        one = containers.map_tensors(lambda leaf: leaf.unsqueeze(0), target)
        value: Any = self.fn(output.unsqueeze(0), one)
        if not isinstance(value, Tensor) or value.shape != (1,):
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(
                "the function of a CustomLoss must return one value an example, shape [N]; for a batch of one example "
                f"it returned {given}, where (1,) was expected: sum over all axes but the first"
            )
        return value.squeeze(0)

    def _each(self, function: Callable[..., Tensor], outputs: Tensor, targets: Any, *rest: Tensor) -> Tensor:
        """Applies a function of one example to all of them; what is not a tensor in targets is shared."""
        leaves, structure = containers.flatten(targets)
        axes = [0 if isinstance(leaf, Tensor) else None for leaf in leaves]

        def of_one(output: Tensor, target: list[Any], *rest: Tensor) -> Tensor:
            return function(output, containers.unflatten(target, structure), *rest)

        return torch.func.vmap(of_one, in_dims=(0, axes, *(0 for _ in rest)))(outputs, leaves, *rest)

    def _roots(self, outputs: Tensor, targets: Any) -> Tensor:
        """S_n of every example: [N, D, D]."""
        size = self.columns(outputs)
        hessians = self._each(torch.func.jacrev(torch.func.grad(self._term)), outputs, targets)
        hessians = hessians.reshape(outputs.shape[0], size, size)
        eigenvalues, vectors = eigh(0.5 * (hessians + hessians.mT))
        if is_eager():
            tolerance = torch.finfo(eigenvalues.dtype).eps ** (2 / 3)
            spectrum = eigenvalues.detach()
            smallest, largest = float(spectrum.min()), float(spectrum.abs().max())
            if smallest < -tolerance * largest:
                raise SingularError(
                    f"the loss is not convex in the outputs: its Hessian has the eigenvalue {smallest:.3g}, where the "
                    f"largest in magnitude is {largest:.3g}; its curvature has no real square root"
                )
        return vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)
