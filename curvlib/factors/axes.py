"""Tensors, one mode (dimension) at a time: products along it, and unfoldings.

A stack has one leading axis, [k, n_1, ..., n_d]; where ``order`` d is given there may be any, [*, n_1, ..., n_d].
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.linalg.middle_gram import middle_gram


def mode_product(stack: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Y[.., j, ..] = sum_i X[.., i, ..] Q[i, j] for each member: Q^T X for mode 0 of matrices, X Q for mode 1.

    Args:
        stack: X [k, n_1, ..., n_d].
        matrix: Q [k, n, p], with n the width of the mode.
        mode: from 0 on.

    Returns:
        [k, n_1, ..., p, ..., n_d].

    Example:
        >>> import torch
        >>> stack, matrix = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0], [10.0]]])
        >>> mode_product(stack, matrix, 1)
        tensor([[[21.]]])
    """
    axis, width = mode + 1, matrix.shape[-1]
    shape = (*stack.shape[:axis], width, *stack.shape[axis + 1 :])
    if axis == stack.ndim - 1:
        return (flattened(stack, 1, axis) @ matrix).reshape(shape)
    if axis == 1:
        return (matrix.mT @ stack.flatten(2)).reshape(shape)
    return mode_product(stack.movedim(axis, -1), matrix, stack.ndim - 2).movedim(-1, axis)


def flattened(stack: Tensor, start: int, stop: int) -> Tensor:
    """The axes from start to stop (exclusive) made one; an axis of width one is put in where there are none."""
    return stack.flatten(start, stop - 1) if stop > start else stack.unsqueeze(start)


def outer(vectors: Sequence[Tensor], modes: Sequence[int], order: int) -> Tensor:
    """The product of vectors [k, n_i], each along its mode of a stack of tensors; other modes have width one.

    Example:
        >>> import torch
        >>> outer([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])], (0, 1), 2)
        tensor([[[3.],
                 [6.]]])
    """
    result = None
    for vector, mode in zip(vectors, modes, strict=True):
        factor = vector.reshape(len(vector), *(1,) * mode, -1, *(1,) * (order - mode - 1))
        result = factor if result is None else result * factor
    if result is None:
        raise ArgumentError("outer needs at least one vector")
    return result


def along(order: Tensor, stack: Tensor, mode: int) -> Tensor:
    """The members of a stack with the indices of one mode in another order [k, n].

    Example:
        >>> import torch
        >>> along(torch.tensor([[1, 0]]), torch.tensor([[[1.0, 2.0]]]), 1)
        tensor([[[2., 1.]]])
    """
    axis = mode + 1
    index = order.reshape(len(order), *(1,) * mode, -1, *(1,) * (stack.ndim - axis - 1))
    return stack.gather(axis, index.expand(stack.shape))


def entrywise(numbers: Tensor, values: Tensor) -> Tensor:
    """Numbers [*] in a shape that broadcasts to values [*, ...].

    Example:
        >>> import torch
        >>> entrywise(torch.ones(2), torch.ones(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    return numbers.reshape(*numbers.shape, *(1,) * (values.ndim - numbers.ndim))


def unfolded(tensor: Tensor, axis: int, order: int) -> Tensor:
    """D [*, n_1, ..., n_d] as a matrix with one row for each index of an axis: [*, n_i, rest], a view where it can be.

    Example:
        >>> import torch
        >>> unfolded(torch.arange(6.0).reshape(2, 3), 1, 2)
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
    """
    first = tensor.ndim - order
    if axis == order - 1:
        return flattened(tensor, first, tensor.ndim - 1).mT
    return flattened(tensor.movedim(first + axis, first), first + 1, tensor.ndim)


def folded(matrix: Tensor, axis: int, like: Tensor, order: int) -> Tensor:
    """The inverse of `unfolded`; ``like`` is D."""
    widths = list(like.shape[-order:])
    first = widths.pop(axis)
    tensor = matrix.unflatten(-1, widths) if order > 2 else matrix
    assert tensor.shape[-order] == first
    return tensor.movedim(-order, axis - order)


def mode_gram(gradient: Tensor, axis: int, order: int, *, diagonal: bool) -> Tensor:
    """D_(i) D_(i)^T [*, n_i, n_i] of the unfolding along an axis, or its diagonal [*, n_i]."""
    matrix = unfolded(gradient, axis, order)
    return matrix.square().sum(-1) if diagonal else middle_gram(matrix)
