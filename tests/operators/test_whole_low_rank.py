"""Low-rank approximations of whole operators: the best of their rank, with the full algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.errors import ArgumentError, ConvergenceError, SingularError
from curvlib.operators import BlockDiagonal, Dense, EigenMatrix, LowRank, Operator, RelativeTikhonov
from curvlib.operators.whole import whole
from curvlib.pytree import Domain, unravel
from curvlib.spectrum import Eigenpairs, low_rank, top_eigenvalues, trace
from tests.operators.domain_cases import domains, flat, tree
from tests.operators.operator_cases import (
    Random,
    assert_close,
    assert_number,
    cases,
    conjugated,
    every_kind,
    generator,
    matrix_function,
)

moderately = settings(deadline=None, max_examples=6)
few = settings(deadline=None, max_examples=3)
PARAMS = {"scalar": torch.zeros(()).double(), "list": [torch.zeros(2, 3).double(), torch.zeros(4).double()]}
SIZE = 11
EXACT = 1e-10  # the tolerance of eigenpairs, and by it of what is made of them


def operator_of(values: Tensor) -> tuple[BlockDiagonal, Tensor]:
    """An operator on the pytrees above with these eigenvalues, and its matrix."""
    dense = conjugated(Random(generator(1)).orthogonal(SIZE), values)
    return whole(Dense(dense), Domain.of(PARAMS)), dense


def spread() -> Tensor:
    """Eigenvalues of either sign, apart from each other in magnitude."""
    return torch.tensor([(-1.0) ** i * 1.5**-i for i in range(SIZE)], dtype=torch.float64)


def best(dense: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by the dense eigendecomposition."""
    values, vectors = torch.linalg.eigh(dense)
    kept = values.abs().argsort(descending=True)[:rank]
    return vectors[:, kept] * values[kept] @ vectors[:, kept].mT


def approximate(operator: Operator, rank: int, trace: float | Tensor | None = None) -> BlockDiagonal:
    return low_rank(operator, rank, trace=trace, tolerance=1e-12)


# --- the approximation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", range(1, SIZE + 1))
def test_it_is_the_best_of_its_rank(rank: int) -> None:
    operator, dense = operator_of(spread())
    approximation = approximate(operator, rank)
    assert_close(approximation.to_dense(), best(dense, rank), EXACT)
    assert int(torch.linalg.matrix_rank(approximation.to_dense(), atol=1e-9)) == rank
    assert isinstance(approximation.blocks["params"], LowRank if rank < SIZE else EigenMatrix)


@pytest.mark.parametrize("rank", range(1, SIZE))
def test_with_a_trace_the_mean_of_the_other_eigenvalues_stands_for_the_rest(rank: int) -> None:
    operator, dense = operator_of(spread())
    kept = best(dense, rank)
    values, vectors = torch.linalg.eigh(dense)
    dropped = vectors[:, values.abs().argsort(descending=True)[rank:]]
    mean = (dense.trace() - kept.trace()) / (SIZE - rank)
    for given_trace in (dense.trace(), float(dense.trace())):
        approximation = approximate(operator, rank, given_trace)
        assert_close(approximation.to_dense(), kept + mean * dropped @ dropped.mT, EXACT)
        assert_number(approximation.trace(), dense.trace())


@few
@every_kind
@given(data=st.data())
def test_any_operator_has_one(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    rank = data.draw(st.integers(1, len(case.dense)))
    approximation = low_rank(case.operator, rank, tolerance=1e-8, like=case.like)
    values = torch.linalg.eigvalsh(case.dense).abs().sort().values
    error = torch.linalg.matrix_norm(case.dense - approximation.to_dense())  # eigenvectors may be any of several
    expected = values[: len(values) - rank].norm()
    assert abs(float(error - expected)) <= 1e-6 * float(values[-1])
    assert approximation.domain.shapes == case.operator.domain.shapes
    v = case.vector(5)
    assert_close(flat(approximation @ v), approximation.to_dense() @ flat(v))


@moderately
@given(domain=domains())
def test_it_acts_on_the_pytrees_of_the_operator(domain: object) -> None:
    random = Random(generator(0))
    dense = random.definite(domain.size)
    approximation = approximate(whole(Dense(dense), Domain.of(domain.like)), domain.size)
    v = tree(random.normal(3, domain.size), domain.like)
    assert_close(flat(approximation.matmat(v), stacked=True), flat(v, stacked=True) @ dense, 1e-8)


def test_an_estimated_trace_will_do() -> None:
    operator, dense = operator_of(spread().abs())
    estimate = trace(operator, 2 * SIZE, generator(0))  # as many vectors as rows: exact
    assert_number(approximate(operator, 3, estimate.value).trace(), dense.trace())


# --- its algebra --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remainder", [False, True])
def test_it_has_the_full_algebra(remainder: bool) -> None:
    operator, dense = operator_of(spread().abs())
    approximation = approximate(operator, 3, dense.trace() if remainder else None)
    twin = approximation.to_dense()
    identity = torch.eye(SIZE, dtype=torch.float64)
    v = unravel(Random(generator(2)).normal(SIZE), PARAMS)
    damped = twin + 0.1 * identity
    assert_close(approximation.inverse(0.1).to_dense(), damped.inverse())
    assert_close(damped @ flat(approximation.inverse(0.1) @ v), flat(v))
    assert_close(approximation.power(-0.5, 0.1).to_dense(), matrix_function(damped, lambda x: x**-0.5))
    assert_close(approximation.map_eigenvalues(torch.exp).to_dense(), matrix_function(twin, torch.exp))
    relative = twin + 0.2 * twin.trace() / SIZE * identity
    assert_close(approximation.inverse(RelativeTikhonov(0.2)).to_dense(), relative.inverse())
    assert_number(approximation.damp(0.1).logdet(), torch.linalg.slogdet(damped)[1])
    assert_number(approximation.trace(), twin.trace())
    assert_number(approximation.frobenius_norm(), twin.norm())
    assert_number(approximation.quadratic(v), flat(v) @ twin @ flat(v))
    assert_close(flat(approximation.diag()), twin.diagonal())
    assert_close(approximation.eigenvalues(), torch.linalg.eigvalsh(twin), 1e-9)
    assert_close((2 * approximation + operator).to_dense(), 2 * twin + dense)
    draws = flat(approximation.sample(generator(0), 40_000), stacked=True)
    width = 6 * math.sqrt(float(twin.trace() ** 2 + twin.norm() ** 2) / 40_000)
    assert float((draws.mT @ draws / 40_000 - twin).norm()) <= width


def test_without_a_trace_it_is_singular() -> None:
    approximation = approximate(operator_of(spread().abs())[0], 3)
    assert float(approximation.logdet()) == -math.inf
    with pytest.raises(SingularError, match="pass damping"):
        approximation.inverse()


# --- pairs, errors ------------------------------------------------------------------------------------------------


def test_residuals_are_reached_by_way_of_the_pairs() -> None:
    operator, dense = operator_of(spread())
    pairs = top_eigenvalues(operator, 4, which="magnitude", vectors=True, tolerance=1e-12)
    twin = pairs.operator().to_dense()
    assert_close(twin, best(dense, 4), EXACT)
    # the residuals bound how far the range of the approximation is from an invariant subspace
    assert (
        float((dense @ twin - twin @ dense).norm()) <= 2 * float((pairs.residuals * pairs.values.abs()).sum()) + 1e-13
    )


def test_the_generator_decides_and_the_default_is_a_seed() -> None:
    operator = operator_of(spread())[0]
    first, again, default, other = (
        low_rank(operator, 2, generator=source).blocks["params"].vectors
        for source in (generator(0), generator(0), None, generator(1))
    )
    assert torch.equal(first, again)
    assert torch.equal(first, default)
    assert not torch.equal(first, other)


def test_what_makes_no_sense_is_refused() -> None:
    operator = operator_of(spread())[0]
    for rank, message in ((0, "k must be at least 1"), (SIZE + 1, "11 rows, which is less than k=12")):
        with pytest.raises(ArgumentError, match=message):
            low_rank(operator, rank)
    with pytest.raises(ArgumentError, match="vectors=True"):
        Eigenpairs(torch.ones(1), torch.zeros(1)).operator()
    with pytest.raises(ConvergenceError, match="raise max_iterations"):
        low_rank(operator, 1, max_iterations=1, tolerance=1e-12)
