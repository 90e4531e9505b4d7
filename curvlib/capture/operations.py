"""What the operations of torch do along one axis of their operands, by their names and arguments."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

DIMENSIONS = ("dim", "dims", "dim0", "dim1", "dimension", "axis", "axes")
REARRANGING = {
    "alias", "clone", "detach", "diag_embed", "diagonal", "expand", "movedim", "permute", "repeat", "squeeze", "stack",
    "swapaxes", "t", "transpose", "transpose_", "unsqueeze", "unsqueeze_", "squeeze_", "t_", "_to_copy", "contiguous",
    "lift_fresh",
}  # fmt: skip
RESHAPING = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
CUTTING = {
    "slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind", "narrow",
}  # fmt: skip
INDEXING = {
    "index", "index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_", "index_copy", "index_copy_",
    "index_select", "index_fill", "index_fill_",
}  # fmt: skip
PRODUCTS = {
    "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"), "mv": ("self", "vec"), "addmv": ("mat", "vec"), "dot": ("self", "tensor"),
    "vdot": ("self", "other"),
}  # fmt: skip
SOLUTIONS = {
    "_linalg_solve_ex": ("A", "B"), "linalg_solve_triangular": ("self", "B"), "linalg_lu_solve": ("LU", "B"),
    "linalg_lstsq": ("self", "b"), "cholesky_solve": ("input2", "self"), "triangular_solve": ("A", "self"),
}  # fmt: skip
SPATIAL = re.compile(
    r"_?(adaptive_avg_pool|adaptive_max_pool|avg_pool|max_pool|fractional_max_pool|upsample_\w*?|reflection_pad"
    r"|replication_pad|grid_sampler_|im2col|col2im)([123])d"
)
EVERYWHERE = {"roll", "take", "put", "put_"}
MATRIX = ("_scaled_dot_product", "_fused_sdp", "linalg_", "_linalg", "cholesky", "triangular_solve")
RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")


@functools.cache
def operation(func: Any) -> str:
    """The name of an operation."""
    name: str = func._schema.name.split("::")[-1]
    return name


@functools.cache
def signature(func: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of an operation's arguments, and its defaults."""
    arguments = func._schema.arguments
    return tuple(x.name for x in arguments), {x.name: x.default_value for x in arguments if x.has_default_value()}


def bound(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operation's arguments by name, with its defaults."""
    names, defaults = signature(func)
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def dimensions(arguments: dict[str, Any], ndim: int) -> set[int]:
    """The axes that an operation is told to work along."""
    found: set[int] = set()
    for name in DIMENSIONS:
        value = arguments.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            found.add(value % ndim)
        elif isinstance(value, (list, tuple)):
            found |= {int(axis) % ndim for axis in value}
    return found


def along(name: str, arguments: dict[str, Any], operand: Tensor, axis: int, number: int) -> bool:
    """Whether an operation computes along the axis of examples of an operand, so that entries of several meet.

    Args:
        name: of the operation.
        arguments: of the operation.
        operand: one of them.
        axis: its axis that counts the examples.
        number: of examples.
    """
    ndim = operand.ndim
    if name in REARRANGING or name in RESHAPING or name in ("cat", "linalg_vector_norm"):
        return False
    if name in PRODUCTS:
        left, right = (arguments[part] for part in PRODUCTS[name])
        return (operand is left and axis == ndim - 1) or (operand is right and axis == max(0, ndim - 2))
    if name in SOLUTIONS:
        return solves_along(name, arguments, operand, axis)
    if name.startswith(MATRIX) and name != "linalg_cross":
        return axis >= ndim - 2
    if "convolution" in name:
        one_group_an_example = arguments["groups"] % number == 0
        return axis != 0 and not one_group_an_example if operand is arguments["input"] else not one_group_an_example
    if "batch_norm" in name:
        return axis != 1 and bool(arguments.get("training", arguments.get("train", "with_update" in name)))
    if name in RECURRENT:
        return axis != (0 if arguments.get("batch_first") else 1)
    if name == "native_layer_norm":
        return axis >= ndim - len(arguments["normalized_shape"])
    if name == "constant_pad_nd":
        pad = arguments["pad"]
        return any(pad[2 * (ndim - 1 - axis) : 2 * (ndim - axis)])
    if (spatial := SPATIAL.match(name)) is not None:
        place = axis - (ndim - int(spatial.group(2)))
        kernel = arguments.get("kernel_size")
        return place >= 0 and (kernel is None or kernel[place % len(kernel)] != 1)
    if name == "renorm":
        return axis not in dimensions(arguments, ndim)
    if name == "roll" and arguments["dims"]:
        moved = [dim for dim, shift in zip(arguments["dims"], arguments["shifts"], strict=True) if shift]
        return axis in {dim % ndim for dim in moved}
    if name in EVERYWHERE:
        return True
    first = arguments.get("self")
    if isinstance(first, Tensor) and first.ndim != ndim:  # the axes that are named are those of the first operand
        return False
    return axis in dimensions(arguments, ndim)


def solves_along(name: str, arguments: dict[str, Any], operand: Tensor, axis: int) -> bool:
    """`along` of solutions of A X = B, or X A = B: columns of a right side are solved for one by one."""
    matrix, right = (arguments.get(part) for part in SOLUTIONS[name])
    if operand is not right:
        return axis >= operand.ndim - 2
    if isinstance(matrix, Tensor) and operand.shape == matrix.shape[:-1]:  # a vector for each matrix
        return axis == operand.ndim - 1
    return axis == operand.ndim - (2 if arguments.get("left", True) else 1)


def strided_within(operand: Tensor, axis: int, output: Tensor) -> bool:
    """Whether strides keep the axis of examples, and lead nowhere else within the elements of an example."""
    if output.shape[axis : axis + 1] != operand.shape[axis : axis + 1] or output.stride(axis) != operand.stride(axis):
        return False
    others = [(n - 1) * k for i, (n, k) in enumerate(zip(output.shape, output.stride(), strict=True)) if i != axis]
    return sum(others) < operand.stride(axis)


def is_range(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], number: int) -> bool:
    """Whether an operation makes 0, 1, ..., N - 1."""
    if name != "arange":
        return False
    arguments = bound(func, args, kwargs)
    return (arguments.get("start", 0), arguments["end"], arguments.get("step", 1)) == (0, number, 1)
