"""Whether the outputs of an example depend on other examples, found by computing them.

For models that run on real tensors only, where the axis of examples cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlib import containers
from curvlib.linalg.eager import is_eager, own_draws, uncompiled
from curvlib.pytree import Domain, Tree, flatten

ModelFn = Callable[[Any, Any], Any]


TRIED = 16  # examples that are tried by themselves


def mixed_by_values(model_fn: ModelFn, params: Tree, inputs: Any, number: int) -> str | None:
    """Compares the outputs of a batch with those of its examples by themselves, for up to 16 of them.

    Where the model takes no batch of one (its size is written down, say), an example by itself is a batch of copies.

    Args:
        model_fn: pure function (params, inputs) -> outputs [N, ...].
        params: pytree of tensors.
        inputs: pytree.
        number: N.

    Returns:
        What was found, in words; None: nothing, or it cannot be tried (one example, or under a transform).
    """
    if number < 2 or not is_eager():
        return None
    leaves, _ = flatten(params)
    params = Domain.of(params).tree([leaf.detach() for leaf in leaves])

    def outputs(index: Tensor) -> Tensor:
        def chosen(x: Tensor) -> Tensor:
            rows = x.ndim > 0 and x.shape[0] == number
            return x.detach()[index.to(x.device)] if rows else x.detach().clone()

        with torch.no_grad(), uncompiled():
            values: Tensor = model_fn(params, containers.map_tensors(chosen, inputs))
        return values

    with own_draws(leaves):
        together = outputs(torch.arange(number))
        tolerance = float(together.abs().amax()) * torch.finfo(together.dtype).eps ** 0.75
        if not torch.allclose(outputs(torch.arange(number)), together, rtol=0, atol=tolerance):
            return None  # the model draws numbers, and values tell nothing
        copies = 1
        for n in torch.linspace(0, number - 1, min(number, TRIED)).long().unique().tolist():
            try:
                alone = outputs(torch.full((copies,), n))
            except Exception:  # a model may refuse a batch of one in any way
                copies = number
                alone = outputs(torch.full((copies,), n))
            if len(alone) != copies or not torch.allclose(alone[0], together[n], rtol=0, atol=tolerance):
                return "the outputs of an example by itself are others than in the batch"
    return None
