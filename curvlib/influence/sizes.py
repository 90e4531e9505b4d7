"""How large an index will be, and the largest sketch that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from curvlib.errors import ArgumentError, naming
from curvlib.influence.manifest import block_rows, dtype_name
from curvlib.influence.shards import HEADER
from curvlib.operators import Operator, Projection
from curvlib.operators.sketch import sketch_shape


def estimate_size(projection: Projection, n: int, dtype: torch.dtype = torch.float32, *, shard_size: int = 4096) -> int:
    """How many bytes the rows of an index take, before any is made.

    Args:
        projection: as for `build`.
        n: how many examples.
        dtype: of the rows.
        shard_size: examples in a file.

    Returns:
        The size of all files of rows together. The projection and the manifest lie beside them.

    Raises:
        DtypeError: rows cannot have this dtype.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(8, 6, bias=False))
        >>> curv = cv.kfac(model_fn, params, (torch.randn(5, 8), torch.randn(5, 6)), loss=cv.MSE())
        >>> projection = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(params, rank=4))
        >>> estimate_size(projection, 1000, torch.bfloat16)  # 4 * 4 numbers an example, and a header
        36096
    """
    dtype_name(dtype)
    width = sum(block.size for block in block_rows(projection))
    return n * width * dtype.itemsize + math.ceil(n / shard_size) * HEADER


def sketch_ranks(curv: Operator, *, bytes_per_example: int, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Ranks for `sketch` or `EigenSketch` that spend a budget: the same for all blocks, the largest that fits.

    A side that is not wider than the rank is kept whole, so that small blocks leave the budget to large ones. An
    `EigenSketch` of a low-rank side may take other sizes: `estimate_size` of the projection has the last word.

    Args:
        curv: what is to be projected, or a curvature with blocks of the same shapes.
        bytes_per_example: what a row may take.
        dtype: of the rows.

    Returns:
        {block: rank}; change entries by hand for blocks that deserve more or less.

    Raises:
        ArgumentError: not even rank 1 fits.
        NotKroneckerError: a block has no sides, and is not a matrix of its own; names it.

    Example:
        >>> import curvlib as cv
        >>> curv = cv.Kronecker(cv.Diagonal(torch.ones(8)), cv.Diagonal(torch.ones(100)))
        >>> sketch_ranks(curv, bytes_per_example=4 * 8 * 20)
        {'params': 20}
    """
    blocks = curv.blocks
    budget = bytes_per_example // dtype.itemsize
    smallest, too_large = 1, max(max(shape) for block in blocks.values() for shape in block.domain.shapes) ** 2 + 1
    least = numbers(blocks, smallest)
    if least > budget:
        raise ArgumentError(
            f"a row of rank 1 takes {least * dtype.itemsize} bytes in {dtype}, more than bytes_per_example="
            f"{bytes_per_example}; take curvature of fewer parameters"
        )
    while too_large - smallest > 1:
        middle = (smallest + too_large) // 2
        if numbers(blocks, middle) <= budget:
            smallest = middle
        else:
            too_large = middle
    return dict.fromkeys(blocks, smallest)


def numbers(blocks: Mapping[str, Operator], rank: int) -> int:
    """How many numbers the sketches of a vector have."""
    total = 0
    for name, block in blocks.items():
        with naming(name):
            total += math.prod(sketch_shape(block, rank))
    return total
