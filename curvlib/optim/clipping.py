"""Gradients of bounded norm, without looking at a value."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.linalg.gram import full_precision
from curvlib.optim.arguments import above_zero
from curvlib.optim.transformation import GradientTransformation, stateless
from curvlib.pytree import Tree, flatten, tree_map


def clip_by_global_norm(limit: float) -> GradientTransformation:
    """All gradients times one number, min(1, limit / ||g||), where ||g|| is the Euclidean norm of all leaves together.

    If an element is inf or nan, so are the updates.

    Args:
        limit: the largest norm that stays as it is.

    Raises:
        ArgumentError: ``limit`` is not positive.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013.

    Example:
        >>> transformation = clip_by_global_norm(1.0)
        >>> grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> transformation.update(grads, transformation.init(grads))[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    above_zero("limit", limit)

    def update(grads: Tree, params: Tree | None) -> Tree:
        leaves, _ = flatten(grads)
        if not leaves:
            return grads
        norms = [norm(leaf).to(leaves[0].device, non_blocking=True) for leaf in leaves]
        factor = shrinking(torch.linalg.vector_norm(torch.stack(wide(norms))), limit)
        return tree_map(lambda leaf: leaf * factor.to(leaf.device, leaf.dtype, non_blocking=True), grads)

    return stateless("clip_by_global_norm", update)


def clip_by_norm(limit: float) -> GradientTransformation:
    """Each leaf g times min(1, limit / ||g||), with its own Euclidean norm.

    Args:
        limit: the largest norm of a leaf that stays as it is.

    Raises:
        ArgumentError: ``limit`` is not positive.

    Example:
        >>> transformation = clip_by_norm(1.0)
        >>> grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.5])}
        >>> transformation.update(grads, transformation.init(grads))[0]
        {'a': tensor([0.6000, 0.8000]), 'b': tensor([0.5000])}
    """
    above_zero("limit", limit)
    return stateless(
        "clip_by_norm",
        lambda grads, params: tree_map(lambda leaf: leaf * shrinking(norm(leaf), limit).to(leaf.dtype), grads),
    )


def norm(leaf: Tensor) -> Tensor:
    """The Euclidean norm of all elements, a 0-d tensor; of half precision in float32.

    Example:
        >>> norm(torch.tensor([[3.0], [4.0]]))
        tensor(5.)
    """
    return torch.linalg.vector_norm(full_precision(leaf))


def shrinking(size: Tensor, limit: float) -> Tensor:
    """min(1, limit / size), and exactly 1 up to the limit.

    Example:
        >>> shrinking(torch.tensor([0.0, 2.0, 8.0]), 2.0)
        tensor([1.0000, 1.0000, 0.2500])
    """
    return limit / size.clamp(min=limit)


def wide(numbers: list[Tensor]) -> list[Tensor]:
    """The same numbers in the widest of their dtypes."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in numbers) else torch.float32
    return [x.to(dtype) for x in numbers]
