"""D X D^T: the one operation that all Kronecker factors from gradients are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import ShapeError
from curvlib.linalg.gram import fill_symmetric, full_precision, writes_in_place
from curvlib.linalg.precision import highest_matmul, highest_operands


def middle_gram(gradient: Tensor, middle: Tensor | None = None) -> Tensor:
    """The symmetric product D X D^T, with each symmetric pair of entries computed about once.

    Half precision is accumulated in float32, and float32 keeps its accuracy whatever the global matmul precision.

    Args:
        gradient: D [*, m, n].
        middle: X: symmetric [*, n, n], or the diagonal [*, n] of a diagonal matrix; None: the identity.

    Returns:
        [*, m, m], in full precision.

    Raises:
        ShapeError: X does not fit the columns of D.

    Example:
        >>> gradient = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> middle_gram(gradient, torch.tensor([1.0, 10.0]))
        tensor([[41., 20.],
                [20., 10.]])
    """
    gradient = full_precision(gradient)
    return symmetric_product(gradient, times_middle(gradient, middle))


def summed_middle_gram(gradients: Tensor, middle: Tensor | None = None) -> Tensor:
    """The sum over observations i of D_i X D_i^T, as one product: no [m, m] matrix an observation exists.

    Args:
        gradients: the D_i [*, N, m, n].
        middle: X, as in `middle_gram`, without the axis of observations.

    Returns:
        [*, m, m], in full precision.

    Raises:
        ShapeError: X does not fit the columns of the D_i.

    Example:
        >>> summed_middle_gram(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.eye(2))
        tensor([[14.]])
    """
    gradients = full_precision(gradients)
    if middle is not None:
        middle = middle.unsqueeze(gradients.ndim - 3)  # the axis of observations
    return symmetric_product(side_by_side(gradients), side_by_side(times_middle(gradients, middle)))


def times_middle(gradient: Tensor, middle: Tensor | None) -> Tensor:
    """D X [*, m, n]."""
    if middle is None:
        return gradient
    middle = full_precision(middle)
    columns = gradient.shape[-1]
    if middle.ndim == gradient.ndim - 1 and middle.shape[-1] == columns:
        return gradient * middle.unsqueeze(-2)
    if middle.ndim == gradient.ndim and middle.shape[-2:] == (columns, columns):
        return highest_matmul(gradient, middle)
    raise ShapeError(
        f"gradients of shape {tuple(gradient.shape)} need a middle [*, {columns}] or [*, {columns}, {columns}] with "
        f"as many leading axes, got {tuple(middle.shape)}"
    )


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """A B^T, known to be symmetric, of A and B [*, m, k]."""
    first, second = highest_operands(left, right.mT)
    if not writes_in_place(first, second):
        return (first @ second).to(left.dtype)
    size = left.shape[-2]
    front = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    return fill_symmetric(first.new_empty(*front, size, size), first.mT, second).to(left.dtype)


def side_by_side(matrices: Tensor) -> Tensor:
    """[*, N, m, n] becomes [*, m, N n]."""
    return matrices.transpose(-3, -2).flatten(-2)
