"""Float32 products that keep float32's accuracy where the global matmul precision is lower.

`torch.set_float32_matmul_precision("high")` lets a device round the operands of float32 products to TF32 or bfloat16.
Models bear it; factors and roots do not: small eigenvalues drown in the rounding of large ones. The setting is global
and belongs to the user, so it is read and never changed; operands are rewritten such that it has nothing to round away.

Source: Henry, Tang and Heinecke 2019, arXiv 1904.06376 (a float32 as the sum of three bfloat16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.linalg.eager import constant_when_compiled

UPPER_HALF = -65536  # the bits of a float32 that bfloat16 has
ROUNDING = {"tf32": 2.0**-10, "bf16": 2.0**-7}  # of the operands of float32 products


def highest_matmul(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product, float32 at the precision "highest" whatever the global setting.

    Args:
        left: [*, m, k].
        right: [*, k, n], of the same dtype.

    Returns:
        [*, m, n].

    Example:
        >>> highest_matmul(torch.ones(1, 2), torch.tensor([[1.0], [2.0**-20]])).item() == 1 + 2.0**-20
        True
    """
    left_operand, right_operand = highest_operands(left, right)
    return (left_operand @ right_operand).to(left.dtype)


def highest_operands(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Operands [*, m, k'] and [*, k', n] whose product, rounded to the dtype of left, is that of left and right.

    They are the given ones unless the global setting would round them. Then they are in float64 on a CPU; on other
    devices, where float64 may be slow, they are pieces next to each other, with the six products that matter.

    Example:
        >>> left, right = torch.ones(2, 3), torch.ones(3, 2)
        >>> all(a is b for a, b in zip(highest_operands(left, right), (left, right), strict=True))
        True
    """
    if product_eps(left) == torch.finfo(left.dtype).eps:
        return left, right
    if left.device.type == "cpu":
        return left.double(), right.double()
    return in_pieces(left, right)


def in_pieces(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Operands of bfloat16 pieces: six of the nine products of pieces are above the rounding of float32.

    Example:
        >>> left, right = in_pieces(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0], [2.0]]))
        >>> left.shape, left @ right
        (torch.Size([1, 12]), tensor([[7.]]))
    """
    a, b, c = pieces(left)
    x, y, z = pieces(right)
    return torch.cat([a, a, a, b, b, c], -1), torch.cat([x, y, z, x, y, x], -2)


def pieces(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three float32 tensors that bfloat16 holds exactly, and whose sum is the tensor exactly."""
    first = truncated(tensor)
    second = truncated(tensor - first)
    return first, second, tensor - first - second


def truncated(tensor: Tensor) -> Tensor:
    """A float32 tensor cut to bfloat16's digits, with the derivative of the identity.

    Bits are masked because compilers remove a cast to bfloat16 and back.
    """
    constant = tensor.detach()
    cut = (constant.view(torch.int32) & UPPER_HALF).view(torch.float32)
    return tensor + (cut - constant)


def product_eps(operand: Tensor) -> float:
    """The relative rounding in plain products with a tensor, under the global setting.

    Example:
        >>> product_eps(torch.ones(1, dtype=torch.bfloat16))
        0.0078125
    """
    eps = torch.finfo(operand.dtype).eps
    return ROUNDING.get(current_setting(operand.device.type), eps) if operand.dtype == torch.float32 else eps


@constant_when_compiled  # and compiled again when it changes
def current_setting(device: str) -> str:
    """The global setting of float32 products on a type of device: "none", "ieee", "tf32" or "bf16"."""
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision
