"""An inverse curvature applied to gradients of examples, by block and in the form that is cheapest to contract."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, CaptureError, PytreeError
from curvlib.gradients.block_gradients import BlockGradients, RowGradients
from curvlib.gradients.data import Batch, DataSet, repeatable
from curvlib.gradients.per_example import PerExampleGradients
from curvlib.influence.contractions import BlockVectors, Products, Whole, joined, product, quadratic, rotatable
from curvlib.layers.rows import DenseRows
from curvlib.operators import BlockDiagonal, EigenKronecker, Kronecker, Operator
from curvlib.operators.blocks import Layouts
from curvlib.pytree import Domain, Tree

Inverse = Operator | Callable[[Tree], Tree]

HELD = 1 << 28  # elements of query gradients that are held against one reading of the training data


def check_inverse(inverse: Inverse, domain: Domain) -> None:
    """Refuses an operator that does not act on vectors like params, and what is neither operator nor function.

    Raises:
        PytreeError: the operator acts on other vectors; names the parameters.
        ArgumentError: not an operator or a function.
    """
    if not isinstance(inverse, Operator):
        if not callable(inverse):
            raise ArgumentError(
                "curv_inverse must be an operator such as curv.inverse(damping), or a function of one vector, got a "
                f"{type(inverse).__name__}"
            )
        return
    given = dict(zip(inverse.domain.names, inverse.domain.shapes, strict=True))
    expected = dict(zip(domain.names, domain.shapes, strict=True))
    unequal = [
        f"{name!r} ({given.get(name, 'missing')} in curv_inverse, {expected.get(name, 'missing')} in params)"
        for name in sorted(given.keys() | expected.keys())
        if given.get(name) != expected.get(name)
    ]
    if unequal:
        raise PytreeError(
            f"curv_inverse does not act on vectors like params: {', '.join(unequal)}; take curvature of the same params"
        )


def apply(inverse: Inverse, vectors: Tree, domain: Domain) -> Tree:
    """The inverse applied to vectors that are stacked along the leading axis of every leaf."""
    if isinstance(inverse, Operator):
        return inverse.matmat(vectors)
    leaves = domain.leaves(vectors, 1)
    images = [domain.leaves(inverse(domain.tree(row))) for row in zip(*leaves, strict=True)]
    return domain.tree([torch.stack(column) for column in zip(*images, strict=True)])


def in_blocks(vectors: Tree, gradients: PerExampleGradients) -> dict[str, BlockVectors]:
    """Stacked vectors as tensors of the blocks that the gradients have."""
    leaves = gradients.domain.leaves(vectors, 1)
    return {name: Whole(layout.gather(leaves)) for name, layout in gradients.layouts}


def preconditioned(inverse: Inverse, gradients: PerExampleGradients, start: int, stop: int) -> dict[str, BlockVectors]:
    """The inverse applied to the gradients of these examples."""
    if not isinstance(inverse, BlockDiagonal) or inverse.layouts != gradients.layouts:
        return in_blocks(apply(inverse, gradients.tree(start, stop), gradients.domain), gradients)
    return {name: of_block(block, gradients.blocks[name], start, stop) for name, _, block in inverse.items()}


def of_block(block: Operator, gradients: BlockGradients, start: int, stop: int) -> BlockVectors:
    """A block of the inverse applied to gradients.

    A Kronecker product G (x) A takes the rows of D = sum_t g_t a_t^T one by one: G D A = sum_t (G g_t) (A a_t)^T.
    """
    if isinstance(block, Kronecker) and isinstance(gradients, RowGradients) and len(gradients.uses) == 1:
        use = gradients.uses[0]
        g, rows = use.g[0, start:stop], use.rows.part(start, stop)
        positions, (m, n) = rows.shape[-2], block.shape[-2:]
        if isinstance(rows, DenseRows) and positions**2 * (m + n) < m * n:
            sides = (rows.values, g) if use.transposed else (g, rows.values)
            return Products(block.left.right(sides[0]), block.right.right(sides[1]))
    if isinstance(block, EigenKronecker):
        few = rotatable(gradients, block)
        if few is not None:
            return Whole(product(block, few, start, stop))
    return Whole(block.matmat(gradients.dense(start, stop)))


def of_rank(vectors: BlockVectors, rank: int) -> BlockVectors:
    """The best approximations of rank k (Eckart & Young 1936), where k (m + n) < m n: others are kept."""
    if isinstance(vectors, Products) and vectors.left.shape[-2] <= rank:
        return vectors
    values = vectors.whole().values
    if values.ndim < 3 or rank * sum(values.shape[-2:]) >= math.prod(values.shape[-2:]):
        return vectors
    left, singular, right = torch.linalg.svd(values, full_matrices=False)
    return Products(left[..., :rank].mT * singular[..., :rank, None], right[..., :rank, :])


def quadratic_forms(inverse: Inverse, gradients: PerExampleGradients) -> dict[str, Tensor]:
    """g_n^T curv^-1 g_n for all examples [N], by block."""
    if isinstance(inverse, BlockDiagonal) and inverse.layouts == gradients.layouts:
        return {name: form_of_block(block, gradients.blocks[name], gradients) for name, _, block in inverse.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name, _ in gradients.layouts}
    for start, stop in gradients.ranges():
        vectors = gradients.tree(start, stop)
        images = apply(inverse, vectors, gradients.domain)
        leaves = (gradients.domain.leaves(tree, 1) for tree in (vectors, images))
        products = [a * b for a, b in zip(*leaves, strict=True)]
        for name, layout in gradients.layouts:
            parts[name].append(layout.gather(products).flatten(1).sum(1))
    return {name: torch.cat(found) for name, found in parts.items()}


def form_of_block(block: Operator, gradients: BlockGradients, batch: PerExampleGradients) -> Tensor:
    """The forms of one block [N]; in its eigenbasis, if it has one and the rows are few."""
    if isinstance(block, (Kronecker, EigenKronecker)):
        eigen = block.eigen() if isinstance(block, Kronecker) else block
        use = rotatable(gradients, eigen)
        if use is not None:
            return quadratic(eigen, use)
    parts = []
    for start, stop in batch.ranges():
        vectors = gradients.dense(start, stop)
        parts.append((vectors * block.matmat(vectors)).flatten(1).sum(1))
    return torch.cat(parts)


# --- which queries are held together -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeldQueries:
    """Preconditioned gradients of some queries, by block."""

    layouts: Layouts
    vectors: dict[str, BlockVectors]

    def fitting(self, gradients: PerExampleGradients) -> dict[str, BlockVectors]:
        """The vectors, for gradients of the same blocks.

        Raises:
            CaptureError: the gradients have other blocks.
        """
        if gradients.layouts != self.layouts:
            raise CaptureError(
                "queries and training data do not use the parameters in the same way; their plans differ"
            )
        return self.vectors


def stacks(
    inverse: Inverse,
    source: Iterable[PerExampleGradients],
    train: Batch | DataSet,
    query_batch: int | None,
    rank: int | None,
) -> Iterator[HeldQueries]:
    """Preconditioned gradients of the queries, as many at a time as may be held against one reading of the data."""
    layouts: Layouts = ()
    waiting: list[dict[str, BlockVectors]] = []
    count, elements = 0, 0
    for gradients in source:
        if waiting:
            HeldQueries(layouts, {}).fitting(gradients)
        layouts = gradients.layouts
        for start, stop in gradients.ranges(query_batch):
            found = preconditioned(inverse, gradients, start, stop)
            if rank is not None:
                found = {name: of_rank(vectors, rank) for name, vectors in found.items()}
            size = sum(vectors.elements for vectors in found.values())
            full = elements + size > HELD if query_batch is None else count + stop - start > query_batch
            if waiting and full:
                repeatable(train)
                yield held_together(layouts, waiting)
                waiting, count, elements = [], 0, 0
            waiting.append(found)
            count, elements = count + stop - start, elements + size
    yield held_together(layouts, waiting)


def held_together(layouts: Layouts, parts: list[dict[str, BlockVectors]]) -> HeldQueries:
    """All vectors of a block in one stack."""
    return HeldQueries(layouts, {name: joined([part[name] for part in parts]) for name, _ in layouts})
