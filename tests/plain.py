"""Plain reverse mode, one example at a time: the truth where other ways to differentiate see other functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference
import torch
from torch import Tensor

import curvlib as cv

Objective = Callable[[Tensor, Tensor], Tensor]


def flat_gradient(value: Tensor, roots: dict[str, Tensor], *, keep: bool = False) -> Tensor:
    """The gradient of a number, in the order of ravel; zeros where it does not depend on a parameter."""
    zeros = {name: torch.zeros_like(root) for name, root in roots.items()}
    if not value.requires_grad:
        return cv.ravel(zeros)
    found = torch.autograd.grad(value, list(roots.values()), create_graph=keep, retain_graph=True, allow_unused=True)
    return cv.ravel({n: zeros[n] if g is None else g.to_dense() for n, g in zip(roots, found, strict=True)})


def roots_of(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}


def jacobian(model_fn: reference.ModelFn, params: dict[str, Tensor], inputs: Any, *, whole: bool = False) -> Tensor:
    """[N K, D]; ``whole``: all examples in one batch, where they depend on each other or on common draws."""
    rows = []
    copies = [inputs] if whole else [reference.example(inputs, n) for n in range(reference.number_of_examples(inputs))]
    for one in copies:
        roots = roots_of(params)
        outputs = model_fn(roots, one).flatten()
        rows += [flat_gradient(value, roots) for value in outputs]
    return torch.stack(rows)


def ggn(
    model_fn: reference.ModelFn, params: dict[str, Tensor], batch: Any, objective: Objective, **options: Any
) -> Tensor:
    """J^T H J with the Hessian of the reduced objective in all outputs."""
    outputs = model_fn(params, batch[0]).detach()
    H = torch.func.hessian(lambda f: objective(f, batch[1]))(outputs).reshape(outputs.numel(), -1)
    J = jacobian(model_fn, params, batch[0], **options)
    return J.mT @ H @ J


def hessian(model_fn: reference.ModelFn, params: dict[str, Tensor], batch: Any, objective: Objective) -> Tensor:
    """Reverse mode twice, over the whole batch."""
    roots = roots_of(params)
    gradient = flat_gradient(objective(model_fn(roots, batch[0]), batch[1]), roots, keep=True)
    return torch.stack([flat_gradient(g, roots) for g in gradient])
