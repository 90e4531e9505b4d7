"""The diagonal blocks of an exact operator, formed: what block-diagonal approximations are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.operators import BlockDiagonal, Dense, Layout, Operator, Region
from curvlib.operators.base import check_operator
from curvlib.operators.blocks import Layouts
from curvlib.operators.lazy import ELEMENTS_AT_ONCE, MAX_DENSE, zero_like
from curvlib.operators.whole import whole
from curvlib.pytree import Domain, flatten


def block_diagonal(
    operator: Operator,
    blocks: Mapping[str, Sequence[str]] | BlockDiagonal | None = None,
    *,
    max_rows: int = MAX_DENSE,
) -> BlockDiagonal:
    """The diagonal blocks of an exact operator as dense matrices; what lies between blocks is dropped.

    Each block's columns are products with its unit vectors, many at once: as many products as there are parameters, and
    one walk through the data for each stack of them.

    Args:
        operator: `ggn`, `hessian`, `fisher` or `gramian`, or any other operator.
        blocks: names of parameters by name of block, each parameter in one of them. Or a block-diagonal curvature
            (``cv.kfac(...)``): its blocks, so that the two agree on names and on the order of rows. None: one block a
            parameter.
        max_rows: the largest block that is formed.

    Returns:
        An operator on the same pytrees.

    Raises:
        ArgumentError: a block has more than ``max_rows`` rows; a parameter is in no block, in two, or is none of the
            operator's; names it.

    Example:
        >>> import torch, curvlib as cv
        >>> from curvlib.estimators import block_diagonal
        >>> model_fn, params = cv.functional(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        >>> batch = (torch.randn(1, 3), torch.randn(1, 2))
        >>> exact = block_diagonal(cv.ggn(model_fn, params, batch, loss=cv.MSE()))
        >>> {name: block.domain.size for name, block in exact.blocks.items()}
        {'0.bias': 4, '0.weight': 12, '1.bias': 2, '1.weight': 8}
        >>> kfac = cv.kfac(model_fn, params, batch, loss=cv.MSE(), fisher="type-2")  # exact for one example
        >>> truth = block_diagonal(cv.ggn(model_fn, params, batch, loss=cv.MSE()), kfac)
        >>> [torch.allclose(truth.blocks[k].to_dense(), kfac.blocks[k].to_dense(), atol=1e-6) for k in kfac.blocks]
        [True, True]
    """
    check_operator(operator)
    domain = operator.domain
    match blocks:
        case BlockDiagonal():
            layouts = same_domain(blocks, domain).layouts
        case None:
            layouts = grouped({name: (name,) for name in domain.names}, domain)
        case _:
            layouts = grouped(blocks, domain)
    for name, layout in layouts:
        if layout.numel > max_rows:
            raise ArgumentError(
                f"block {name!r} would be a dense matrix of {layout.numel} rows, more than max_rows={max_rows}: cut it "
                "into smaller blocks, raise max_rows, or use products (cv.spectrum.top_eigenvalues, cv.low_rank)"
            )
    return BlockDiagonal({name: dense_block(operator, layout) for name, layout in layouts}, layouts, domain)


def grouped(blocks: Mapping[str, Sequence[str]], domain: Domain) -> Layouts:
    """One flat layout a group of whole parameters.

    Raises:
        ArgumentError: the groups are not a partition of the parameters.
    """
    members = [name for group in blocks.values() for name in group]
    unknown = [name for name in members if name not in domain.names]
    counted = {name: members.count(name) for name in domain.names}
    if unknown:
        raise ArgumentError(f"blocks name {unknown[0]!r}, which is no parameter; there are {', '.join(domain.names)}")
    for name, count in counted.items():
        if count != 1:
            raise ArgumentError(f"parameter {name!r} is in {count} blocks; each must be in one")

    def flat(name: str) -> Region:
        number = domain.names.index(name)
        leaf = Region.whole(number, domain.shapes[number])
        return leaf.reshape(leaf.numel)

    return tuple((block, Layout(tuple(map(flat, group)))) for block, group in blocks.items() if group)


def same_domain(blocks: BlockDiagonal, domain: Domain) -> BlockDiagonal:
    """The blocks, if they are those of this domain.

    Raises:
        ArgumentError: they are blocks of other parameters.
    """
    if blocks.domain != domain:
        one, two = (dict(zip(x.names, x.shapes, strict=True)) for x in (domain, blocks.domain))
        unequal = [name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
        raise ArgumentError(
            f"the blocks are those of other parameters than the operator's: {', '.join(map(repr, unequal))}"
        )
    return blocks


def dense_block(operator: Operator, layout: Layout) -> Operator:
    """One diagonal block, from products with its unit vectors."""
    like, domain = zero_like(operator), operator.domain
    columns = torch.arange(layout.numel, device=like.device)
    parts: list[Tensor] = []
    for numbers in columns.split(max(1, ELEMENTS_AT_ONCE // operator.domain.size)):
        units = (numbers.unsqueeze(1) == columns).to(like).reshape(len(numbers), *layout.shape)
        leaves = [like.expand(len(numbers), *shape) for shape in domain.shapes]
        for number, leaf in layout.scatter(units).items():
            leaves[number] = leaf
        images = flatten(operator.matmat(domain.tree(leaves)))[0]
        parts.append(layout.gather(images).reshape(len(numbers), layout.numel))
    matrix = torch.cat(parts)
    dense = Dense((matrix + matrix.mT) / 2)
    # a block of a matrix-shaped tensor has the rows in that tensor's order
    return dense if len(layout.shape) == 1 else whole(dense, Domain.of_tensor(layout.shape))
