"""Whether the outputs of an example depend on other examples, found by computing them.

For models that run on real tensors only, where the axis of examples cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from curvlib.linalg.eager import is_eager, uncompiled
from curvlib.pytree import Domain, Tree, flatten

ModelFn = Callable[[Any, Any], Any]


def mixed_by_values(model_fn: ModelFn, params: Tree, inputs: Any, number: int) -> str | None:
    """Computes the outputs with the last example in place of the first: all others must stay what they are.

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
    devices = {leaf.device.index or 0 for leaf in leaves if leaf.device.type == "cuda"}

    def outputs(first: int) -> Tensor:
        def replaced(x: Tensor) -> Tensor:
            x = x.detach().clone()
            if x.ndim and x.shape[0] == number:
                x[0] = x[first]
            return x

        with torch.random.fork_rng(devices), torch.no_grad(), uncompiled():
            values: Tensor = model_fn(params, torch_pytree.tree_map_only(Tensor, replaced, inputs))
        return values[1:]

    expected, found = outputs(0), outputs(-1)
    if expected.shape == found.shape:
        scale = expected.abs().amax() if expected.numel() else 0
        if torch.allclose(found, expected, rtol=0, atol=float(scale) * torch.finfo(expected.dtype).eps ** 0.75):
            return None
    return "another first example changes the outputs of the others"
