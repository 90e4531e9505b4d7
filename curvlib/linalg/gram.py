"""Gram matrices X^T X of rows, with each symmetric pair of entries computed about once."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.linalg.eager import is_eager


def gram(rows: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The Gram matrix sum_r w_r x_r x_r^T.

    Half precision is accumulated in float32.

    Args:
        rows: [*, n, d].
        weights: [*, n], nonnegative; None: all ones.

    Returns:
        [*, d, d].

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[1., 2.],
                [2., 5.]])
    """
    rows, weighted = weighted_rows(rows, weights)
    if writes_in_place(rows, weighted):
        return fill_symmetric(rows.new_empty(*rows.shape[:-2], rows.shape[-1], rows.shape[-1]), rows, weighted)
    return rows.mT @ weighted


def augmented_gram(rows: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The Gram matrix of rows [x; 1], without appending the ones: its border holds sum w x and sum w.

    Args:
        rows: [*, n, d].
        weights: [*, n], nonnegative; None: all ones.

    Returns:
        [*, d + 1, d + 1].

    Example:
        >>> augmented_gram(torch.tensor([[1.0], [3.0]]))
        tensor([[10.,  4.],
                [ 4.,  2.]])
    """
    rows, weighted = weighted_rows(rows, weights)
    sums = weighted.sum(-2)
    total = sums.new_full((), rows.shape[-2]) if weights is None else weights.sum(-1).to(sums.dtype)
    if not writes_in_place(rows, weighted):
        return bordered(rows.mT @ weighted, sums, total)
    width = rows.shape[-1]
    result = rows.new_empty(*rows.shape[:-2], width + 1, width + 1)
    fill_symmetric(result[..., :width, :width], rows, weighted)
    result[..., :width, width] = sums
    result[..., width, :width] = sums
    result[..., width, width] = total
    return result


def full_precision(tensor: Tensor) -> Tensor:
    """Half precision becomes float32, in which sums are accumulated; other dtypes stay as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def weighted_rows(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows in full precision, and the rows times their weights."""
    rows = full_precision(rows)
    return rows, rows if weights is None else rows * weights.unsqueeze(-1)


def writes_in_place(*operands: Tensor) -> bool:
    """Whether products may be written into a buffer: eagerly, and with no gradient to record."""
    return is_eager() and not (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands))


def fill_symmetric(result: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Writes left^T right, known to be symmetric, into result [*, d, d], panel by panel from the diagonal on."""
    width = left.shape[-1]
    step = -(-width // panels(width, result.device))
    for start in range(0, width, step):
        stop = min(start + step, width)
        torch.matmul(left[..., start:stop].mT, right[..., start:], out=result[..., start:stop, start:])
        result[..., stop:, start:stop] = result[..., start:stop, stop:].mT
    return result


def panels(width: int, device: torch.device) -> int:
    """How many panels a Gram matrix is made in: p of them take (p + 1) / 2 p of the multiplications."""
    smallest = 128 if device.type == "cpu" else 1024  # narrower products are faster in one piece
    if width < smallest:
        return 1
    return 4 if width <= 4 * smallest else 8


def bordered(inner: Tensor, sums: Tensor, total: Tensor) -> Tensor:
    """[[inner, sums], [sums^T, total]] from [*, d, d], [*, d] and [*]."""
    corner = total.expand(sums.shape[:-1])[..., None, None]
    top = torch.cat([inner, sums.unsqueeze(-1)], -1)
    return torch.cat([top, torch.cat([sums.unsqueeze(-2), corner], -1)], -2)
