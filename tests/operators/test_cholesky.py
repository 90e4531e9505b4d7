"""Damped dense sides and their inverses by Cholesky decomposition, against dense twins."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.errors import NonFiniteError, NotKroneckerError, SingularError
from curvlib.operators import (
    CholeskyInverse,
    Damping,
    Dense,
    Diagonal,
    EigenMatrix,
    FactoredTikhonov,
    Kronecker,
    Matrix,
    ScaledIdentity,
    ShiftedDense,
    merge_factors,
)
from tests.operators import side_checks
from tests.operators.operator_cases import Case, Random, assert_close, every_damping, factored, generator

CLASSES = ("damped", "inverse")
LAYOUTS = ("alone", "groups", "one matrix for all groups", "left", "right", "both", "sides of groups")
every_class = pytest.mark.parametrize("kind", CLASSES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
moderately = settings(deadline=None, max_examples=3)
seeds = st.integers(0, 2**31)


def damped_side(random: Random, front: tuple[int, ...], width: int, groups: tuple[int, ...]) -> tuple[Matrix, Tensor]:
    """M + c I with M [*front, d, d] and c [*groups]."""
    matrix, shift = random.definite(*front, width), random.positive(1, *groups)[0]
    return ShiftedDense(Dense(matrix), shift), matrix + shift[..., None, None] * torch.eye(width, dtype=matrix.dtype)


def inverse_side(random: Random, front: tuple[int, ...], width: int, groups: tuple[int, ...]) -> tuple[Matrix, Tensor]:
    """c M^-1 with M [*front, d, d] and c [*groups]."""
    matrix, scale = random.definite(*front, width), random.positive(1, *groups)[0]
    inverse = CholeskyInverse(torch.linalg.cholesky(matrix), scale)
    return inverse, scale[..., None, None] * torch.linalg.inv(matrix)


def case(kind: str, layout: str, seed: int) -> Case:
    random = Random(generator(seed))
    make = damped_side if kind == "damped" else inverse_side
    match layout:
        case "alone":
            return side_checks.alone(*make(random, (), 4, ()))
        case "groups":
            return side_checks.alone(*make(random, (2,), 3, (2,)))
        case "one matrix for all groups":
            return side_checks.alone(*make(random, (), 3, (2,)))
        case "both":
            return side_checks.paired(make(random, (), 3, ()), make(random, (), 2, ()))
        case "sides of groups":
            return side_checks.paired(make(random, (2,), 3, (2,)), make(random, (), 2, (2,)))
    matrix = random.definite(3)
    other: tuple[Matrix, Tensor] = (Dense(matrix), matrix)
    mine = make(random, (), 2, ())
    return side_checks.paired(mine, other) if layout == "left" else side_checks.paired(other, mine)


@every_class
@every_layout
@moderately
@given(seed=seeds)
def test_the_algebra_is_that_of_the_twin(kind: str, layout: str, seed: int) -> None:
    made = case(kind, layout, seed)
    side_checks.products_are_the_twins(made)
    for inverted in (False, True):
        side_checks.what_is_read_off_is_the_twins(made, inverted=inverted)
    side_checks.powers_add(made)


@every_class
@every_layout
@every_damping
def test_powers_are_those_of_the_twin(kind: str, layout: str, damping: Damping | float) -> None:
    side_checks.powers_are_the_twins(case(kind, layout, 0), damping)


@every_class
@every_layout
def test_it_is_a_pytree_that_transforms_and_is_not_changed(kind: str, layout: str) -> None:
    made = case(kind, layout, 1)
    side_checks.it_is_a_pytree(made)
    side_checks.transforms_compose(made)
    side_checks.nothing_is_changed(made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_twin(layout: str) -> None:
    side_checks.gradients_are_the_dense_ones(case("damped", layout, 2))


@every_class
def test_samples_have_the_covariance(kind: str) -> None:
    side_checks.samples_have_the_covariance(case(kind, "both", 3))


def pairs() -> dict[str, Kronecker]:
    random = Random(generator(0))
    one = ScaledIdentity(torch.tensor(2.0, dtype=torch.float64), (4,))
    return {
        "dense": Kronecker(Dense(random.definite(4)), Dense(random.definite(3))),
        "dense and diagonal": Kronecker(Dense(random.definite(4)), Diagonal(random.positive(3))),
        "groups": Kronecker(Dense(random.definite(2, 4)), Dense(random.definite(3))),
        "identity": Kronecker(one, Dense(random.definite(3))),
    }


@pytest.mark.parametrize("name", pairs())
@pytest.mark.parametrize("damping", [FactoredTikhonov(0.1), FactoredTikhonov(1e-3, relative=True)])
def test_an_inverse_with_damped_sides_decomposes_nothing_until_it_is_asked_for_eigenvalues(
    name: str, damping: FactoredTikhonov
) -> None:
    curv = pairs()[name]
    v = Random(generator(1)).normal(2, *curv.domain.shapes[0])
    with mock.patch("torch.linalg.eigh", wraps=torch.linalg.eigh) as decompositions:
        inverse = curv.inverse(damping)
        solved = inverse.matmat(v)
        inverse.diag(), inverse.trace(), inverse.frobenius_norm()
        assert decompositions.call_count == 0
        inverse.eigenvalues(), inverse.logdet(), inverse.power(0.5), inverse.sample(generator(0))
        assert decompositions.call_count == sum(
            isinstance(side, CholeskyInverse) for side in (inverse.left, inverse.right)
        )
    dense = curv.damp(damping).to_dense()
    assert_close(solved.reshape(2, -1) @ dense, v.reshape(2, -1))
    assert_close(inverse.inverse().to_dense(), dense)


def test_every_damping_of_a_matrix_shares_its_eigendecomposition() -> None:
    curv = pairs()["dense"]
    with mock.patch("torch.linalg.eigh", wraps=torch.linalg.eigh) as decompositions:
        for d in (0.1, 0.2):
            curv.damp(FactoredTikhonov(d)).logdet(), curv.power(-0.5, FactoredTikhonov(d))
    assert decompositions.call_count == 2


def test_what_rounding_makes_indefinite_is_inverted_in_the_eigenbasis_of_the_matrix() -> None:
    x = Random(generator(0)).normal(6, 2)
    matrix = x @ x.mT - 1e-16 * torch.eye(6, dtype=torch.float64)
    inverse = ShiftedDense(Dense(matrix), torch.tensor(1e-17, dtype=torch.float64))._power(-1, damped=True)
    assert isinstance(inverse, EigenMatrix)
    assert float(inverse.eigenvalues().amin()) > 0


def test_indefinite_sides_are_inverted_and_singular_ones_refused() -> None:
    fine = Dense(torch.eye(2, dtype=torch.float64))
    negative = Dense(torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64)))
    curv = Kronecker(fine, negative)
    dense = curv.damp(FactoredTikhonov(1e-6)).to_dense()
    assert_close(curv.inverse(FactoredTikhonov(1e-6)).to_dense(), torch.linalg.inv(dense))
    with pytest.raises(SingularError, match="pass damping > 0"):
        ShiftedDense(negative, torch.tensor(0.5, dtype=torch.float64))._power(-1, damped=True)


@pytest.mark.parametrize("entry", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", [(0, 0), (1, 1), (1, 0)])
def test_sides_that_are_not_finite_are_refused(entry: float, place: tuple[int, int]) -> None:
    broken = torch.eye(2, dtype=torch.float64)
    broken[place] = broken[place[::-1]] = entry
    with pytest.raises(NonFiniteError):
        Kronecker(Dense(torch.eye(2, dtype=torch.float64)), Dense(broken)).inverse(FactoredTikhonov(0.1))


def test_without_damping_a_nearly_singular_side_is_refused_as_ever() -> None:
    x = Random(generator(0)).normal(6, 2)
    side = ShiftedDense(Dense(x @ x.mT), torch.tensor(1e-16, dtype=torch.float64))
    with pytest.raises(SingularError, match="pass damping > 0"):
        Kronecker(side, side).inverse()


def test_damped_sides_are_merged_and_inverses_are_not() -> None:
    one, two = (Kronecker(*(Dense(Random(generator(s)).definite(n)) for n in (3, 2))) for s in (0, 1))
    damping = FactoredTikhonov(0.1)
    merged = merge_factors(one.damp(damping), two.damp(damping))
    means = [torch.stack([a, b]).mean(0) for a, b in zip(parts(one), parts(two), strict=True)]
    assert_close(merged.to_dense(), torch.kron(*means))
    with pytest.raises(NotKroneckerError, match="merge the factors first"):
        merge_factors(one.inverse(damping), two.inverse(damping))


def parts(curv: Kronecker) -> tuple[Tensor, Tensor]:
    """The sides of a product that is damped by FactoredTikhonov(0.1)."""
    g, a = curv.left.to_dense(), curv.right.to_dense()
    ratio = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
    eyes = [torch.eye(len(x), dtype=x.dtype) for x in (g, a)]
    both = g + 0.1**0.5 / ratio * eyes[0], a + 0.1**0.5 * ratio * eyes[1]
    assert_close(torch.kron(*both), factored(g, a, 0.1, relative=False))
    return both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_are_solved_in_single(dtype: torch.dtype) -> None:
    curv = pairs()["dense"].to(dtype=torch.float32)
    inverse, v = curv.inverse(FactoredTikhonov(0.1)), Random(generator(1)).normal(4, 3)
    half = inverse.to(dtype=dtype) @ v.to(dtype)
    assert half.dtype == dtype
    assert_close(half.double(), inverse @ v, 0.05)
