"""Block-diagonal operators on pytrees: what every estimator returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from curvlib.errors import naming
from curvlib.operators.base import Operator
from curvlib.operators.damping import Damping, as_damping
from curvlib.operators.interfaces import Determinant
from curvlib.operators.layout import Layout
from curvlib.pytree import Domain, Tree, register, static

Layouts = tuple[tuple[str, Layout], ...]


@register
class BlockDiagonal(Operator, Determinant):
    """One operator a block of parameters, on pytrees like params.

    Args:
        operators: operator by block name.
        layouts: which elements of which parameters make up each block; every element is in exactly one.
        domain: structure, names and shapes of the parameters.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> curv = cv.kfac(model_fn, params, (torch.randn(5, 3), torch.randn(5, 2)), loss=cv.MSE())
        >>> curv.parameters
        {'bias': ('weight',), 'weight': ('weight',)}
        >>> curv.inverse(0.1).to_dense().shape
        torch.Size([8, 8])
    """

    operators: dict[str, Operator]
    layouts: Layouts = static()
    domain: Domain = static()

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return self.operators

    @property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        holders: dict[str, tuple[str, ...]] = dict.fromkeys(self.domain.names, ())
        for name, layout in self.layouts:
            for leaf in dict.fromkeys(self.domain.names[piece.leaf] for piece in layout.pieces):
                holders[leaf] += (name,)
        return holders

    def items(self) -> Iterator[tuple[str, Layout, Operator]]:
        """(name, layout, operator) of every block."""
        for name, layout in self.layouts:
            yield name, layout, self.operators[name]

    def map_blocks(self, fn: Callable[[Operator], Operator]) -> BlockDiagonal:
        """The operator with ``fn`` applied to every block; errors inside name the block."""
        mapped = {}
        for name, _, block in self.items():
            with naming(name):
                mapped[name] = fn(block)
        return BlockDiagonal(mapped, self.layouts, self.domain)

    def scatter(self, parts: Mapping[str, Tensor]) -> Tree:
        """The pytree whose blocks are these tensors."""
        leaves: dict[int, Tensor] = {}
        for name, layout in self.layouts:
            for leaf, value in layout.scatter(parts[name]).items():
                leaves[leaf] = leaves[leaf] + value if leaf in leaves else value
        return self.domain.tree([leaves[i] for i in range(len(self.domain.names))])

    def gather(self, vectors: Tree, leading: int) -> dict[str, Tensor]:
        """The blocks' tensors of a vector of the domain."""
        leaves = self.domain.leaves(vectors, leading)
        return {name: layout.gather(leaves) for name, layout in self.layouts}

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        parts = self.gather(vectors, leading)
        return self.scatter({name: block._apply(parts[name], leading) for name, _, block in self.items()})

    def to_dense(self) -> Tensor:
        matrices = {name: block.to_dense() for name, _, block in self.items()}
        sizes = [torch.Size(shape).numel() for shape in self.domain.shapes]
        numbers = torch.arange(sum(sizes)).split(sizes)
        leaves = [n.reshape(shape) for n, shape in zip(numbers, self.domain.shapes, strict=True)]
        first = next(iter(matrices.values()))
        order = torch.cat([layout.gather(leaves).reshape(-1) for _, layout in self.layouts]).argsort().to(first.device)
        return torch.block_diag(*(matrices[name] for name, _ in self.layouts))[order][:, order]

    def diag(self) -> Tree:
        return self.scatter({name: block.diag() for name, _, block in self.items()})

    def trace(self) -> Tensor:
        return self.total(lambda block: block.trace())

    def frobenius_norm(self) -> Tensor:
        return self.total(lambda block: block.frobenius_norm().square()).sqrt()

    def total(self, fn: Callable[[Operator], Tensor]) -> Tensor:
        """The sum of a number over all blocks."""
        return torch.stack([fn(block) for block in self.operators.values()]).sum()

    def _eigenvalues(self) -> Tensor:
        parts = []
        for name, _, block in self.items():
            with naming(name):
                parts.append(block._eigenvalues())
        return torch.cat(parts)

    def _logdet(self) -> Tensor:
        parts = []
        for name, _, block in self.items():
            with naming(name):
                parts.append(block.logdet())
        return torch.stack(parts).sum()

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> BlockDiagonal:
        return self.map_blocks(lambda block: block.map_eigenvalues(fn))

    def damp(self, damping: Damping | float | Tensor) -> BlockDiagonal:
        damping = as_damping(damping)
        return self.map_blocks(lambda block: block.damp(damping))

    def _power(self, exponent: float, *, damped: bool) -> BlockDiagonal:
        return self.map_blocks(lambda block: block._power(exponent, damped=damped))

    def _scale(self, factor: float | Tensor) -> BlockDiagonal:
        return self.map_blocks(lambda block: block._scale(factor))

    def _add(self, other: Operator) -> Operator | None:
        if not isinstance(other, BlockDiagonal) or (self.layouts, self.domain) != (other.layouts, other.domain):
            return None
        sums = {name: block + other.operators[name] for name, _, block in self.items()}
        return BlockDiagonal(sums, self.layouts, self.domain)

    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        parts = {}
        for name, _, block in self.items():
            with naming(name):
                parts[name] = block._sample(generator, n)
        return self.scatter(parts)
