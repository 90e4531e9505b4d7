"""Random operators of every class, each with a dense twin that is made without curvlib, for the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optree
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.operators import (
    CG,
    Basis,
    BlockBasis,
    BlockDiagonal,
    CanonicalBasis,
    Damping,
    Dense,
    DenseBlocks,
    Diagonal,
    EigenKronecker,
    EigenMatrix,
    FactoredTikhonov,
    Inverse,
    Kronecker,
    Matrix,
    Operator,
    OrthogonalBasis,
    RelativeTikhonov,
    ScaledIdentity,
    Sum,
    Tikhonov,
)
from curvlib.operators.block_side import block_runs
from curvlib.pytree import Domain
from tests.operators.domain_cases import DomainCase, domains, layouts, tree

Draw = Callable[[st.SearchStrategy], object]
Sides = tuple[tuple[Tensor, Tensor], ...]  # (G, A) of each group

moderately = settings(deadline=None, max_examples=8)
sparingly = settings(deadline=None, max_examples=4)  # of each cell of a grid of options
one_of = functools.cache(st.sampled_from)  # strategies are checked once


@dataclass(frozen=True)
class Terms:
    """The dense twins of the terms of a sum, with the factors of those that are Kronecker products."""

    members: tuple[tuple[Tensor, Sides | None], ...]


@dataclass(frozen=True)
class Part:
    """A diagonal block of the dense twin: its rows, and the factors of each group if it is a Kronecker product."""

    rows: Tensor
    sides: Sides | Terms | None


@dataclass(frozen=True)
class Case:
    """An operator, its dense twin in the order of its flattened vectors, and what its damping depends on."""

    operator: Operator
    dense: Tensor
    parts: tuple[Part, ...]
    like: object  # a vector of the domain
    tolerance: float = 1e-10  # of products with the operator itself

    def vector(self, seed: int = 0, stacked: int | None = None) -> object:
        """A random vector of the domain, or several."""
        front = () if stacked is None else (stacked,)
        return tree(torch.randn(*front, len(self.dense), generator=generator(seed), dtype=torch.float64), self.like)

    def damped(self, damping: Damping | float) -> Tensor:
        """The dense twin plus damping, by the formulas."""
        identity = torch.eye(len(self.dense), dtype=torch.float64)
        if not isinstance(damping, (FactoredTikhonov, RelativeTikhonov)):
            return self.dense + (damping.strength if isinstance(damping, Tikhonov) else damping) * identity
        relative = isinstance(damping, RelativeTikhonov) or damping.relative
        result = self.dense.clone()
        for part in self.parts:
            block = self.dense[part.rows[:, None], part.rows]
            if isinstance(damping, FactoredTikhonov):
                members = part.sides.members if isinstance(part.sides, Terms) else ((block, part.sides),)
                result[part.rows[:, None], part.rows] = factored_terms(members, damping)
                continue
            shift = damping.strength * (block.trace() / len(block) if relative else 1.0)
            result[part.rows, part.rows] += shift
        return result


def factored_terms(members: Sequence[tuple[Tensor, Sides | None]], damping: FactoredTikhonov) -> Tensor:
    """Every product damped on its own, and the sum of the other terms by d I."""
    d, relative = damping.strength, damping.relative
    damped = [
        torch.block_diag(*(factored(g, a, d, relative=relative) for g, a in sides))
        for _, sides in members
        if sides is not None
    ]
    others = [dense for dense, sides in members if sides is None]
    if others:
        rest = torch.stack(others).sum(0)
        shift = d * (rest.trace() / len(rest) if relative else 1.0)
        damped.append(rest + shift * torch.eye(len(rest), dtype=rest.dtype))
    return torch.stack(damped).sum(0)


def factored(g: Tensor, a: Tensor, d: float, *, relative: bool) -> Tensor:
    """(G + sqrt(d) / pi I) (x) (A + pi sqrt(d) I)."""
    mean_g, mean_a = g.trace() / len(g), a.trace() / len(a)
    pi = (mean_a / mean_g) ** 0.5
    root = (d * mean_g * mean_a) ** 0.5 if relative else d**0.5
    eye = torch.eye(len(g), dtype=g.dtype), torch.eye(len(a), dtype=a.dtype)
    return torch.kron(g + root / pi * eye[0], a + pi * root * eye[1])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Random:
    """Well-conditioned random numbers from one generator."""

    source: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.source, dtype=torch.float64)

    def positive(self, *shape: int) -> Tensor:
        return 0.3 + 1.7 * torch.rand(*shape, generator=self.source, dtype=torch.float64)

    def orthogonal(self, *shape: int) -> Tensor:
        return torch.linalg.qr(self.normal(*shape, shape[-1]))[0]

    def definite(self, *shape: int) -> Tensor:
        x = self.normal(*shape, shape[-1] + 1)
        return x @ x.mT / shape[-1] + 0.3 * torch.eye(shape[-1], dtype=torch.float64)


def conjugated(q: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("...ik,...k,...jk->...ij", q, values, q)


# --- one block a tensor -------------------------------------------------------------------------------------------


def side(kind: str, shape: tuple[int, ...], random: Random) -> tuple[Matrix, Tensor]:
    """A matrix operator on vectors [*, d] and its matrices [*, d, d]."""
    width = shape[-1]
    identity = torch.eye(width, dtype=torch.float64).expand(*shape, width)
    match kind:
        case "dense":
            matrix = random.definite(*shape)
            return Dense(matrix), matrix
        case "diagonal":
            values = random.positive(*shape)
            return Diagonal(values), values.unsqueeze(-1) * identity
        case "scaled identity":
            scale = random.positive(1)[0]
            return ScaledIdentity(scale, shape), scale * identity
        case "eigen":
            values, q = random.positive(*shape), random.orthogonal(*shape)
            return EigenMatrix(OrthogonalBasis(q), values), conjugated(q, values)
        case "dense blocks":
            blocks = [random.definite(*shape[:-1], *run) for run in block_runs(width, 2)]
            return DenseBlocks(tuple(blocks)), joined(blocks)
        case "block eigen":
            vectors, values = (
                [random.orthogonal(*shape[:-1], *run) for run in block_runs(width, 2)],
                random.positive(*shape),
            )
            return EigenMatrix(BlockBasis(tuple(vectors)), values), conjugated(joined(vectors), values)
        case _:
            values = random.positive(*shape)
            return EigenMatrix(CanonicalBasis(width), values), values.unsqueeze(-1) * identity


def joined(stacks: Sequence[Tensor]) -> Tensor:
    """The block-diagonal matrices [*, d, d] of stacks of blocks [*, b, w, w]."""
    front = stacks[0].shape[:-3]
    groups = zip(*(stack.reshape(-1, *stack.shape[-3:]) for stack in stacks), strict=True)
    matrices = torch.stack([torch.block_diag(*(block for part in group for block in part)) for group in groups])
    return matrices.reshape(*front, *matrices.shape[-2:])


FACTORS = ("dense", "diagonal", "scaled identity", "dense blocks")
EIGEN = ("eigen", "canonical eigen", "block eigen")
Block = tuple[Operator, Tensor, Sides | Terms | None]  # operator, dense twin, factors
SHARED_SIDES = st.sampled_from([(False, False), (True, False), (False, True)])  # by all groups


def matrix_block(kind: str, shape: tuple[int, ...], random: Random) -> Block:
    operator, matrices = side(kind, shape, random)
    return operator, torch.block_diag(*matrices.reshape(-1, shape[-1], shape[-1])), None


def kronecker_block(draw: Draw, shape: tuple[int, ...], random: Random, kinds: tuple[str, ...]) -> Block:
    *front, m, n = shape
    groups = torch.Size(front).numel()
    shared = draw(SHARED_SIDES) if front else (False, False)
    left, g = side(draw(one_of(kinds)), (*([] if shared[0] else front), m), random)
    right, a = side(draw(one_of(kinds)), (*([] if shared[1] else front), n), random)
    g, a = g.expand(*front, m, m).reshape(groups, m, m), a.expand(*front, n, n).reshape(groups, n, n)
    sides = tuple(zip(g, a, strict=True))
    return Kronecker(left, right), torch.block_diag(*(torch.kron(g, a) for g, a in sides)), sides


def eigen_kronecker_block(draw: Draw, shape: tuple[int, ...], random: Random) -> Block:
    *front, m, n = shape
    bases: list[Basis] = []
    vectors = []
    for width in (m, n):
        if draw(st.booleans()):
            q = random.orthogonal(*front, width)
            bases.append(OrthogonalBasis(q))
        else:
            q = torch.eye(width, dtype=torch.float64).expand(*front, width, width)
            bases.append(CanonicalBasis(width))
        vectors.append(q.reshape(-1, width, width).contiguous())
    values = random.positive(*shape)
    joint = [torch.kron(p, q) for p, q in zip(*vectors, strict=True)]
    blocks = [conjugated(q, x) for q, x in zip(joint, values.reshape(-1, m * n), strict=True)]
    return EigenKronecker(*bases, values), torch.block_diag(*blocks), None


def block(draw: Draw, shape: tuple[int, ...], random: Random, *, mergeable: bool = False) -> Block:
    """An operator of any class on tensors of this shape; ``mergeable``: not in eigen-form."""
    sides = FACTORS if mergeable else FACTORS + EIGEN
    kinds = sides if len(shape) == 1 else ("diagonal", "kronecker", "kronecker", "sum")
    if len(shape) > 1 and not mergeable:
        kinds += ("eigen kronecker",)
    match kind := draw(one_of(kinds)):
        case "kronecker":
            return kronecker_block(draw, shape, random, sides)
        case "eigen kronecker":
            return eigen_kronecker_block(draw, shape, random)
        case "sum":
            return sum_block(draw, shape, random, mergeable=mergeable)
        case _:
            return matrix_block(kind, shape, random)


def sum_block(draw: Draw, shape: tuple[int, ...], random: Random, *, mergeable: bool = False) -> Block:
    sides = FACTORS if mergeable else FACTORS + EIGEN
    terms = [kronecker_block(draw, shape, random, sides) for _ in range(draw(st.integers(1, 2)))]
    last = draw(one_of(("diagonal", "kronecker") if mergeable else ("diagonal", "kronecker", "eigen")))
    match last:
        case "diagonal":
            terms.append(matrix_block("diagonal", shape, random))
        case "kronecker":
            terms.append(kronecker_block(draw, shape, random, sides))
        case _:
            terms.append(eigen_kronecker_block(draw, shape, random))
    return sum_of_blocks(terms)


def sum_of_blocks(blocks: Sequence[Block]) -> Block:
    members = tuple((dense, sides) for _, dense, sides in blocks if not isinstance(sides, Terms))
    total = torch.stack([dense for dense, _ in members]).sum(0)
    return Sum(tuple(term for term, _, _ in blocks)), total, Terms(members)


def tensor_case(built: Block) -> Case:
    operator, dense, sides = built
    like = torch.zeros(operator.domain.shapes[0], dtype=torch.float64)
    return Case(operator, dense, (Part(torch.arange(len(dense)), sides),), like)


# --- pytrees ------------------------------------------------------------------------------------------------------


def block_diagonal(draw: Draw, domain: DomainCase, random: Random, *, mergeable: bool = False) -> Case:
    operators, parts = {}, []
    dense = torch.zeros(domain.size, domain.size, dtype=torch.float64)
    laid_out = draw(layouts(domain))
    for name, (_, numbers) in laid_out.items():
        operators[name], matrix, sides = block(draw, tuple(numbers.shape), random, mergeable=mergeable)
        rows = numbers.reshape(-1)
        dense[rows[:, None], rows] = matrix
        parts.append(Part(rows, sides))
    pairs = tuple((name, layout) for name, (layout, _) in laid_out.items())
    return Case(BlockDiagonal(operators, pairs, Domain.of(domain.like)), dense, tuple(parts), domain.like)


def whole(operator: Operator, dense: Tensor, like: object, tolerance: float = 1e-10) -> Case:
    """A case without blocks of its own."""
    return Case(operator, dense, (Part(torch.arange(len(dense)), None),), like, tolerance)


def solved_inverse(draw: Draw, shape: tuple[int, ...], random: Random) -> Case:
    total = tensor_case(sum_block(draw, shape, random))
    rough = tensor_case(kronecker_block(draw, shape, random, FACTORS)).operator
    # a relative residual of 1e-8 is an error of that times the condition number
    tolerance = 1e-8 * float(torch.linalg.cond(total.dense))
    inverse = Inverse(total.operator, CG(rough._power(-1, damped=False)))
    return whole(inverse, torch.linalg.inv(total.dense), total.like, tolerance)


TENSORS = (*FACTORS, *EIGEN, "kronecker", "eigen kronecker", "sum")
CLOSED = (*TENSORS, "block diagonal", "sum of block diagonals")
KINDS = (*CLOSED, "solved inverse")
MERGEABLE = (*FACTORS, "kronecker", "sum", "block diagonal")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_closed_kind = pytest.mark.parametrize("kind", CLOSED)
every_mergeable_kind = pytest.mark.parametrize("kind", MERGEABLE)
every_damping = pytest.mark.parametrize(
    "damping",
    [0.3, Tikhonov(0.7), FactoredTikhonov(0.2), FactoredTikhonov(0.4, relative=True), RelativeTikhonov(0.1)],
    ids=["number", "tikhonov", "factored", "factored relative", "relative"],
)

extents, small = st.integers(1, 4), st.integers(1, 3)
matrix_shapes = st.tuples(extents) | st.tuples(extents, extents)
any_shapes = st.lists(small, min_size=1, max_size=3).map(tuple)
product_shapes = st.tuples(extents, extents) | st.tuples(small, small, small)
seeds = st.integers(0, 2**31)


@functools.cache
@st.composite
def cases(draw: Draw, kind: str, *, mergeable: bool = False) -> Case:
    """An operator of one class, and its twin."""
    random = Random(generator(draw(seeds)))
    sides = FACTORS if mergeable else FACTORS + EIGEN
    match kind:
        case "block diagonal":
            return block_diagonal(draw, draw(domains()), random, mergeable=mergeable)
        case "sum of block diagonals":
            domain = draw(domains())
            terms = [block_diagonal(draw, domain, random) for _ in range(2)]
            return whole(Sum(tuple(t.operator for t in terms)), terms[0].dense + terms[1].dense, domain.like)
        case "dense" | "eigen" | "canonical eigen" | "dense blocks" | "block eigen":
            return tensor_case(matrix_block(kind, draw(matrix_shapes), random))
        case "diagonal" | "scaled identity":
            return tensor_case(matrix_block(kind, draw(any_shapes), random))
    shape = draw(product_shapes)
    match kind:
        case "kronecker":
            return tensor_case(kronecker_block(draw, shape, random, sides))
        case "eigen kronecker":
            return tensor_case(eigen_kronecker_block(draw, shape, random))
        case "sum":
            return tensor_case(sum_block(draw, shape, random, mergeable=mergeable))
        case "solved inverse":
            return solved_inverse(draw, shape, random)
    raise ValueError(kind)


# --- comparisons --------------------------------------------------------------------------------------------------


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """||actual - expected|| <= tolerance * ||expected||, for numbers, vectors and matrices."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype
    error, size = float((actual - expected).norm()), float(expected.norm())
    assert error <= tolerance * max(size, 1e-300), f"a relative error of {error / max(size, 1e-300):.1e}"


def assert_number(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """0-d tensors that agree; ``scale`` is the size of the terms that they are sums of."""
    assert actual.shape == ()
    assert abs(float(actual - expected)) <= 1e-10 * max(abs(float(expected)), scale)


def matrix_function(matrix: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return conjugated(vectors, fn(values))


def tensors(node: object) -> list[Tensor]:
    return optree.tree_leaves(node, namespace="curvlib")
