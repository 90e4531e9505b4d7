"""Strategies for operators of every kind, each with a dense matrix that is made without curvlib."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.operators import (
    BlockDiagonal,
    CanonicalBasis,
    Dense,
    DenseBlocks,
    Diagonal,
    EigenKronecker,
    EigenMatrix,
    Kronecker,
    Layout,
    LowRank,
    Matrix,
    Operator,
    OrthogonalBasis,
    Region,
    ScaledIdentity,
    ScaledPower,
    Sum,
)
from curvlib.pytree import Domain, flatten
from curvlib.testing.trees import trees

PLAIN = ("dense", "diagonal", "scaled identity", "dense blocks", "low rank")
MATRICES = (*PLAIN, "eigen", "canonical eigen", "scaled power")
BLOCKS = ("kronecker", "eigen kronecker", "sum of kronecker")
KINDS = (*MATRICES, *BLOCKS, "block diagonal", "sum of block diagonals")


@dataclasses.dataclass(frozen=True)
class Twin:
    """An operator and the matrix that it should be.

    Attributes:
        operator: positive definite, in float64.
        dense: the matrix [D, D], in the order of `ravel` of the operator's vectors.
    """

    operator: Operator
    dense: Tensor


@st.composite
def operators(draw: st.DrawFn, kind: str | None = None) -> Twin:
    """Positive definite operators in float64, each with its dense matrix.

    Args:
        draw: given by hypothesis.
        kind: one of ``dense``, ``diagonal``, ``scaled identity``, ``dense blocks``, ``low rank``, ``eigen``,
            ``canonical eigen``, ``scaled power``, ``kronecker``, ``eigen kronecker``, ``sum of kronecker``, ``block
            diagonal``, ``sum of block diagonals``; None: any.

    Returns:
        A strategy.

    Raises:
        ArgumentError: an unknown kind.

    Example:
        >>> from hypothesis import given, settings
        >>> from curvlib.testing import check_operator, operators
        >>> @settings(max_examples=2, deadline=None, database=None)
        ... @given(twin=operators("kronecker"))
        ... def test_kronecker(twin):
        ...     check_operator(twin.operator, twin.dense)
        >>> test_kronecker()
    """
    if kind is not None and kind not in KINDS:
        raise ArgumentError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    chosen = draw(st.sampled_from(KINDS)) if kind is None else kind
    numbers = Numbers(torch.Generator().manual_seed(draw(st.integers(0, 2**20))))
    if chosen == "block diagonal":
        return block_diagonal(draw, draw(trees()), numbers)
    if chosen == "sum of block diagonals":
        params = draw(trees())
        one, two = (block_diagonal(draw, params, numbers) for _ in range(2))
        return Twin(one.operator + two.operator, one.dense + two.dense)
    if chosen in BLOCKS:
        return block(draw, chosen, (draw(widths), draw(widths)), numbers)
    operator, dense = matrix(chosen, draw(widths), numbers)
    return Twin(operator, dense)


widths = st.integers(1, 4)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Random tensors that make well-conditioned operators."""

    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def positive(self, *shape: int) -> Tensor:
        return 0.3 + 1.7 * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def orthogonal(self, width: int) -> Tensor:
        return torch.linalg.qr(self.normal(width, width))[0]

    def definite(self, width: int) -> Tensor:
        factor = self.normal(width, width + 1)
        return factor @ factor.mT / width + 0.3 * torch.eye(width, dtype=torch.float64)


def matrix(kind: str, width: int, numbers: Numbers) -> tuple[Matrix, Tensor]:
    """A matrix operator on vectors [width], and its matrix."""
    identity, values = torch.eye(width, dtype=torch.float64), numbers.positive(width)
    match kind:
        case "dense":
            dense = numbers.definite(width)
            return Dense(dense), dense
        case "diagonal":
            return Diagonal(values), values.diag()
        case "scaled identity":
            return ScaledIdentity(values[0], (width,)), values[0] * identity
        case "dense blocks":
            first = (width + 1) // 2
            blocks = [numbers.definite(n) for n in (first, width - first) if n]
            return DenseBlocks(tuple(x.unsqueeze(0) for x in blocks)), torch.block_diag(*blocks)
        case "low rank":
            basis, rank = numbers.orthogonal(width), width // 2
            if rank == 0:  # nothing would be orthogonal to it
                return matrix("dense", width, numbers)
            vectors, remainder = basis[:, :rank], numbers.positive(1)[0]
            excess = vectors * (values[:rank] - remainder) @ vectors.mT
            return LowRank(vectors, values[:rank], remainder), remainder * identity + excess
        case "eigen":
            basis = numbers.orthogonal(width)
            return EigenMatrix(OrthogonalBasis(basis), values), basis * values @ basis.mT
        case "canonical eigen":
            return EigenMatrix(CanonicalBasis(width), values), values.diag()
    dense = numbers.definite(width)
    eigenvalues, basis = torch.linalg.eigh(dense)
    return ScaledPower(Dense(dense), values[0], 0.5), values[0] * (basis * eigenvalues.sqrt() @ basis.mT)


def kronecker(draw: st.DrawFn, shape: tuple[int, int], numbers: Numbers) -> Twin:
    """G (x) A."""
    (left, g), (right, a) = (matrix(draw(st.sampled_from(MATRICES)), width, numbers) for width in shape)
    return Twin(Kronecker(left, right), torch.kron(g, a))


def block(draw: st.DrawFn, kind: str, shape: tuple[int, int], numbers: Numbers) -> Twin:
    """An operator on matrices [m, n] and its dense matrix on their rows, one after the other."""
    if kind == "kronecker":
        return kronecker(draw, shape, numbers)
    if kind == "sum of kronecker":
        terms = [kronecker(draw, shape, numbers) for _ in range(draw(st.integers(2, 3)))]
        return Twin(Sum(tuple(x.operator for x in terms)), torch.stack([x.dense for x in terms]).sum(0))
    bases, values = [numbers.orthogonal(width) for width in shape], numbers.positive(*shape)
    joint = torch.kron(*bases)
    operator = EigenKronecker(OrthogonalBasis(bases[0]), OrthogonalBasis(bases[1]), values)
    return Twin(operator, joint * values.flatten() @ joint.mT)


def block_diagonal(draw: st.DrawFn, params: Any, numbers: Numbers) -> Twin:
    """One block a leaf: of a matrix a Kronecker product or the like, of another tensor one matrix."""
    domain = Domain.of(params)
    operators_, layouts, dense = {}, [], []
    for number, (name, leaf) in enumerate(zip(domain.names, flatten(params)[0], strict=True)):
        region = Region.whole(number, tuple(leaf.shape))
        if leaf.ndim == 2:
            twin = block(draw, draw(st.sampled_from(BLOCKS)), tuple(leaf.shape), numbers)
        else:
            size = math.prod(leaf.shape)
            region = region.reshape(size)
            twin = Twin(*matrix(draw(st.sampled_from(MATRICES)), size, numbers))
        operators_[name] = twin.operator
        layouts.append((name, Layout((region,))))
        dense.append(twin.dense)
    return Twin(BlockDiagonal(operators_, tuple(layouts), domain), torch.block_diag(*dense))
