"""Matrices that are block-diagonal on runs of neighbouring rows: sides that are too wide for a dense factor.

Blocks of equal width are kept in one stack, and a narrower last block in another one: no row is ever padded, so that
spectra, traces and determinants are those of the blocks and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, ShapeError
from curvlib.linalg.eigh import eigh
from curvlib.operators.base import Operator, remembered
from curvlib.operators.bases import Basis, CanonicalBasis
from curvlib.operators.damping import Damping
from curvlib.operators.matrices import Diagonal, EigenMatrix, Matrix, ScaledIdentity
from curvlib.pytree import register

Stacks = tuple[Tensor, ...]  # of blocks [*, b, w, w], in the order of the rows
Runs = tuple[tuple[int, int], ...]  # (b, w) of every stack


def block_runs(width: int, size: int) -> Runs:
    """The blocks of ``width`` rows: as many of ``size`` rows as there are, and the rest in a narrower one.

    Raises:
        ArgumentError: the size is not positive.

    Example:
        >>> block_runs(50257, 1024), block_runs(6, 3), block_runs(5, 8)
        (((49, 1024), (1, 81)), ((2, 3),), ((1, 5),))
    """
    if size < 1:
        raise ArgumentError(f"the width of a block must be at least 1, got {size}")
    count, rest = divmod(width, size)
    return tuple((b, w) for b, w in ((count, size), (1, rest)) if b * w)


def cut(tensor: Tensor, runs: Runs, axis: int) -> list[Tensor]:
    """[.., d, ..] -> [.., b, w, ..] for every run of rows along a negative axis."""
    parts = tensor.split([b * w for b, w in runs], axis)
    return [part.unflatten(axis, run) for part, run in zip(parts, runs, strict=True)]


def cut_columns(v: Tensor, runs: Runs) -> list[Tensor]:
    """V [*, n, d] -> [*, b, n, w] for every run of columns."""
    return [part.transpose(-3, -2) for part in cut(v, runs, -1)]


def runs_of(stacks: Sequence[Tensor]) -> Runs:
    """The numbers and widths of blocks."""
    return tuple((stack.shape[-3], stack.shape[-1]) for stack in stacks)


def together(parts: Sequence[Tensor], axis: int) -> Tensor:
    """What belongs to the runs, one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def times(stacks: Sequence[Tensor], v: Tensor) -> Tensor:
    """M V for V [*, d, n]."""
    parts = cut(v, runs_of(stacks), -2)
    return together([(stack @ part).flatten(-3, -2) for stack, part in zip(stacks, parts, strict=True)], -2)


def times_from_right(v: Tensor, stacks: Sequence[Tensor]) -> Tensor:
    """V M for V [*, n, d]."""
    parts = cut_columns(v, runs_of(stacks))
    products = [part @ stack for stack, part in zip(stacks, parts, strict=True)]
    return together([product.transpose(-3, -2).flatten(-2) for product in products], -1)


@register
class BlockBasis(Basis):
    """A basis whose vectors are each zero outside of one run of rows.

    Args:
        vectors: stacks of orthogonal matrices [*, b, w, w], in the order of the rows.

    Example:
        >>> basis = BlockBasis((torch.eye(2).flip(0).expand(2, 2, 2), torch.ones(1, 1, 1)))
        >>> basis.width, basis.analyse_left(torch.arange(5.0).unsqueeze(1)).mT
        (5, tensor([[1., 0., 3., 2., 4.]]))
    """

    vectors: Stacks

    @property
    def width(self) -> int:
        return sum(b * w for b, w in self.runs)

    @property
    def runs(self) -> Runs:
        """The numbers and widths of blocks."""
        return runs_of(self.vectors)

    def spread(self, values: Tensor) -> Tensor:
        return values

    def total(self, values: Tensor) -> Tensor:
        return values.sum(-1)

    def analyse_left(self, v: Tensor) -> Tensor:
        return times([q.mT for q in self.vectors], v)

    def synthesise_left(self, c: Tensor) -> Tensor:
        return times(self.vectors, c)

    def analyse_right(self, v: Tensor) -> Tensor:
        return times_from_right(v, self.vectors)

    def synthesise_right(self, c: Tensor) -> Tensor:
        return times_from_right(c, [q.mT for q in self.vectors])

    def square_left(self, c: Tensor) -> Tensor:
        return times([q.square() for q in self.vectors], c)

    def square_right(self, c: Tensor) -> Tensor:
        return times_from_right(c, [q.square().mT for q in self.vectors])

    def forms(self, matrix: Matrix) -> Tensor:
        blocks = diagonal_blocks(matrix, self.runs)
        forms = [(q * (block @ q)).sum(-2).flatten(-2) for q, block in zip(self.vectors, blocks, strict=True)]
        return together(forms, -1)

    def rows(self, index: Tensor, like: Tensor) -> Tensor:
        return self.synthesise_right(torch.nn.functional.one_hot(index, self.width).to(like.dtype))


@register
class DenseBlocks(Matrix):
    """A block-diagonal matrix with dense blocks of neighbouring rows: O(d w) memory in place of O(d^2).

    Powers, damped or not, take one eigendecomposition of w x w a block and have the eigenbasis `BlockBasis`. A
    truncation to k < w eigenpairs takes them from all blocks together; one to more leaves the blocks as they are,
    which take less memory.

    Args:
        stacks: blocks of equal width [*, b, w, w], one tensor for every run of them, in the order of the rows. Only
            symmetric blocks make sense; this is not checked.

    Raises:
        ShapeError: there is no stack, a block is not square, or the leading axes differ.

    Example:
        >>> block = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> curv = DenseBlocks((block.expand(2, 2, 2), torch.full((1, 1, 1), 5.0)))
        >>> curv.eigenvalues().round(decimals=4), curv.trace()
        (tensor([1., 1., 3., 3., 5.]), tensor(13.))
        >>> curv.inverse(1.0).diag()
        tensor([0.3750, 0.3750, 0.3750, 0.3750, 0.1667])
    """

    stacks: Stacks

    def __post_init__(self) -> None:
        shapes = [tuple(stack.shape) for stack in self.stacks]
        square = all(len(shape) > 2 and shape[-2] == shape[-1] for shape in shapes)
        if not square or len({shape[:-3] for shape in shapes}) != 1:
            raise ShapeError(
                f"stacks of blocks should have shapes [*, b, w, w] with the same leading axes, got {shapes}"
            )

    @classmethod
    def of_matrix(cls, matrix: Tensor, size: int) -> DenseBlocks:
        """The diagonal blocks of a matrix [*, d, d]; what lies outside of them is left out.

        Args:
            matrix: [*, d, d], symmetric.
            size: the width of a block; the last one is narrower if d is no multiple of it.

        Raises:
            ArgumentError: the size is not positive.

        Example:
            >>> DenseBlocks.of_matrix(torch.ones(3, 3), 2).to_dense()
            tensor([[1., 1., 0.],
                    [1., 1., 0.],
                    [0., 0., 1.]])
        """
        stacks, start = [], 0
        for b, w in block_runs(matrix.shape[-1], size):
            part = matrix[..., start : start + b * w, start : start + b * w]
            stack = part.unflatten(-1, (b, w)).unflatten(-3, (b, w)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            stacks.append(stack.clone(memory_format=torch.contiguous_format))  # a view would keep the matrix in memory
            start += b * w
        return cls(tuple(stacks))

    @property
    def runs(self) -> Runs:
        """The numbers and widths of blocks."""
        return runs_of(self.stacks)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stacks[0].shape[:-3], sum(b * w for b, w in self.runs))

    def map_stacks(self, fn: Callable[..., Tensor], *others: Sequence[Tensor]) -> DenseBlocks:
        """The matrix made of fn(stack), or of fn(stack, other, ..) for tensors that belong to the same runs."""
        return DenseBlocks(tuple(fn(*stacks) for stacks in zip(self.stacks, *others, strict=True)))

    def left(self, v: Tensor) -> Tensor:
        return times(self.stacks, v)

    def right(self, v: Tensor) -> Tensor:
        return times_from_right(v, self.stacks)

    def diag(self) -> Tensor:
        return together([stack.diagonal(dim1=-2, dim2=-1).flatten(-2) for stack in self.stacks], -1)

    def traces(self) -> Tensor:
        return self.diag().sum(-1)

    def square_norms(self) -> Tensor:
        return torch.stack([stack.square().sum((-3, -2, -1)) for stack in self.stacks]).sum(0)

    def inner(self, other: Matrix) -> Tensor:
        blocks = diagonal_blocks(other, self.runs)
        products = [(mine * block).sum((-3, -2, -1)) for mine, block in zip(self.stacks, blocks, strict=True)]
        return torch.stack(products).sum(0)

    @remembered
    def eigen(self) -> EigenMatrix:
        values, vectors = zip(*map(eigh, self.stacks), strict=True)
        return EigenMatrix(BlockBasis(vectors), together([x.flatten(-2) for x in values], -1))

    def matrices(self) -> Tensor:
        like = self.stacks[0]
        return self.left(torch.eye(self.shape[-1], dtype=like.dtype, device=like.device))

    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> EigenMatrix:
        return self.eigen().map_eigenvalues(fn)

    def damp(self, damping: Damping | float | Tensor) -> EigenMatrix:
        return self.eigen().damp(damping)

    def _power(self, exponent: float, *, damped: bool) -> EigenMatrix:
        return self.eigen()._power(exponent, damped=damped)

    def _scale(self, factor: float | Tensor) -> DenseBlocks:
        return self.map_stacks(lambda stack: factor * stack)

    def _add(self, other: Operator) -> Operator | None:
        fits = isinstance(other, DenseBlocks) and other.runs == self.runs
        if isinstance(other, Matrix) and (fits or isinstance(other, (Diagonal, ScaledIdentity))):
            return self.map_stacks(torch.add, diagonal_blocks(other, self.runs))
        return None


def block_runs_of(matrix: Matrix) -> Runs | None:
    """The runs of a matrix that is kept in blocks, or None for another one."""
    match matrix:
        case DenseBlocks():
            return matrix.runs
        case EigenMatrix(basis=BlockBasis() as basis):
            return basis.runs
    return None


def diagonal_blocks(matrix: Matrix, runs: Runs) -> Stacks:
    """The diagonal blocks of any matrix, in memory O(d w): a stack [*, b, w, w] for every run of rows.

    Example:
        >>> [block] = diagonal_blocks(Diagonal(torch.tensor([1.0, 2.0])), ((1, 2),))
        >>> block
        tensor([[[1., 0.],
                 [0., 2.]]])
    """
    match matrix:
        case DenseBlocks() if matrix.runs == runs:
            return matrix.stacks
        case EigenMatrix(basis=BlockBasis() as basis) if basis.runs == runs:
            values = cut(matrix.values, runs, -1)
            return tuple((q * v.unsqueeze(-2)) @ q.mT for q, v in zip(basis.vectors, values, strict=True))
        case Diagonal() | ScaledIdentity() | EigenMatrix(basis=CanonicalBasis()):
            return tuple(map(torch.diag_embed, cut(matrix.diag(), runs, -1)))
    return tuple(blocks_by_products(matrix, runs))


def blocks_by_products(matrix: Matrix, runs: Runs) -> list[Tensor]:
    """Diagonal blocks read off products with the unit vectors of one block at a time."""
    like, stacks, start = matrix.diag(), [], 0
    for count, width in runs:
        unit, blocks = torch.eye(width, dtype=like.dtype, device=like.device), []
        for _ in range(count):
            below = matrix.shape[-1] - start - width
            columns = matrix.left(torch.nn.functional.pad(unit, (0, 0, start, below)))
            blocks.append(columns.narrow(-2, start, width))
            start += width
        stacks.append(torch.stack(blocks, -3))
    return stacks
