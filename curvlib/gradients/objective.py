"""The gradient of the objective, as an optimizer sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.capture.engines import ModelFn
from curvlib.errors import ArgumentError
from curvlib.linalg.eager import differentiable, is_eager, ordinary, own_draws, uncompiled
from curvlib.losses import Loss
from curvlib.pytree import Domain, Tree, flatten


def objective_gradient(
    model_fn: ModelFn, params: Tree, inputs: Any, targets: Any, loss: Loss, engine: str | None
) -> Tree:
    """The gradient of the reduced objective on a batch; neither the caller's graph nor the global generator is touched.

    Raises:
        ArgumentError: an unknown engine, or ``autograd`` under a transform or a trace.
    """
    if engine not in (None, "functional", "autograd"):
        raise ArgumentError(f"engine must be 'functional', 'autograd' or None, got {engine!r}")
    if engine == "autograd" and not is_eager():
        raise ArgumentError(
            "engine='autograd' does not compose with torch.func transforms and tracing; use engine='functional'"
        )
    params, inputs, targets = ordinary((params, inputs, targets))
    domain, leaves = Domain.of(params), flatten(params)[0]

    def objective(leaves: Sequence[Tensor]) -> Tensor:
        return loss.value(model_fn(domain.tree(leaves), inputs), targets)

    if not is_eager():
        return domain.tree(dense(torch.func.grad(objective)(leaves)))
    with differentiable(), uncompiled(), own_draws(leaves):
        if engine == "functional":
            return domain.tree(dense(torch.func.grad(objective)([leaf.detach() for leaf in leaves])))
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        return domain.tree(dense(torch.autograd.grad(objective(leaves), leaves, materialize_grads=True)))


def dense(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients without the sparse ones of embeddings that ask for them."""
    return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]
