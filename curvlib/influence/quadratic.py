"""Quadratic forms of an inverse curvature in the gradients of single examples, g^T curv^-1 g."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.gradients.per_example import BlockGradients, ExampleGradients
from curvlib.influence.preconditioning import Inverse, apply, ranges
from curvlib.influence.rotated_rows import quadratic, rotatable
from curvlib.operators import BlockDiagonal, EigenKronecker, Kronecker, Operator


def quadratic_forms(inverse: Inverse, gradients: ExampleGradients) -> dict[str, Tensor]:
    """g_n^T curv^-1 g_n for all examples [N], by block."""
    if isinstance(inverse, BlockDiagonal) and inverse.layouts == gradients.layouts:
        return {name: of_block(block, gradients.blocks[name], gradients) for name, _, block in inverse.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name, _ in gradients.layouts}
    for start, stop in ranges(gradients, None):
        vectors = gradients.tree(start, stop)
        images = apply(inverse, vectors, gradients.domain)
        leaves = (gradients.domain.leaves(tree, 1) for tree in (vectors, images))
        products = [a * b for a, b in zip(*leaves, strict=True)]
        for name, layout in gradients.layouts:
            parts[name].append(layout.gather(products).flatten(1).sum(1))
    return {name: torch.cat(found) for name, found in parts.items()}


def of_block(block: Operator, gradients: BlockGradients, batch: ExampleGradients) -> Tensor:
    """The forms of one block [N]; in its eigenbasis, if it has one and the rows are few."""
    if isinstance(block, (Kronecker, EigenKronecker)):
        eigen = block.eigen() if isinstance(block, Kronecker) else block
        use = rotatable(gradients, eigen)
        if use is not None:
            return quadratic(eigen, use)
    parts = []
    for start, stop in ranges(batch, None):
        vectors = gradients.dense(start, stop)
        parts.append((vectors * block.matmat(vectors)).flatten(1).sum(1))
    return torch.cat(parts)
