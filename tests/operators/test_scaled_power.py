"""A side that is a scaled power of a matrix it remembers: the full algebra against dense twins."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.errors import NotKroneckerError, PytreeError, SingularError
from curvlib.operators import (
    Damping,
    Dense,
    Diagonal,
    EigenMatrix,
    Kronecker,
    KroneckerSide,
    Matrix,
    OrthogonalBasis,
    ScaledPower,
    ema,
    merge_factors,
)
from curvlib.operators.scaled_power import times
from tests.operators import side_checks
from tests.operators.operator_cases import (
    EIGEN,
    FACTORS,
    Case,
    Draw,
    Random,
    assert_close,
    conjugated,
    every_damping,
    generator,
    matrix_function,
    side,
)

KINDS = ("alone", "groups", "left side", "right side", "both sides", "sides of groups")
every_kind = pytest.mark.parametrize("kind", KINDS)
moderately = settings(deadline=None, max_examples=3)
few = settings(deadline=None, max_examples=2)
exponents = st.sampled_from([1.0, 0.5, 0.25, 1 / 3, 2.0, -0.5])


def powered(draw: Draw, shape: tuple[int, ...], random: Random) -> tuple[Matrix, Tensor]:
    """c M^p on vectors [*, d], and its matrices."""
    base, matrices = side(draw(st.sampled_from(FACTORS + EIGEN)), shape, random)
    exponent = draw(exponents)
    scale = random.positive(*shape[:-1]) if len(shape) > 1 and draw(st.booleans()) else random.positive(1)[0]
    twin = scale[..., None, None] * matrix_function(matrices, lambda x: x**exponent)
    return ScaledPower(base, scale, exponent), twin


@st.composite
def cases(draw: Draw, kind: str) -> Case:
    random = Random(generator(draw(st.integers(0, 2**31))))
    width = draw(st.integers(1, 4))
    match kind:
        case "alone":
            return side_checks.alone(*powered(draw, (width,), random))
        case "groups":
            return side_checks.alone(*powered(draw, (2, width), random))
        case "both sides":
            return side_checks.paired(powered(draw, (width,), random), powered(draw, (3,), random))
        case "sides of groups":
            return side_checks.paired(powered(draw, (2, width), random), powered(draw, (2, 3), random))
    other = side(draw(st.sampled_from(FACTORS)), (3,), random)
    mine = powered(draw, (width,), random)
    return side_checks.paired(mine, other) if kind == "left side" else side_checks.paired(other, mine)


@every_kind
@moderately
@given(data=st.data())
def test_products_are_the_twins(kind: str, data: st.DataObject) -> None:
    side_checks.products_are_the_twins(data.draw(cases(kind)))


@every_kind
@moderately
@given(data=st.data(), inverted=st.booleans())
def test_everything_that_is_read_off_is_the_twins(kind: str, data: st.DataObject, inverted: bool) -> None:
    side_checks.what_is_read_off_is_the_twins(data.draw(cases(kind)), inverted=inverted)


@every_kind
@every_damping
@few
@given(data=st.data())
def test_powers_and_inverses_are_the_twins_with_every_damping(
    kind: str, damping: Damping | float, data: st.DataObject
) -> None:
    side_checks.powers_are_the_twins(data.draw(cases(kind)), damping)


@every_kind
@moderately
@given(data=st.data())
def test_powers_add_and_multiply(kind: str, data: st.DataObject) -> None:
    side_checks.powers_add(data.draw(cases(kind)))


@pytest.mark.parametrize("kind", ["alone", "both sides", "sides of groups"])
@few
@given(data=st.data())
def test_it_is_a_pytree_that_composes_with_transforms(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    side_checks.it_is_a_pytree(case)
    side_checks.transforms_compose(case)
    side_checks.nothing_is_changed(case)
    side_checks.samples_have_the_covariance(case)


@moderately
@given(seed=st.integers(0, 2**31), exponent=exponents)
def test_gradients_are_the_dense_ones(seed: int, exponent: float) -> None:
    random = Random(generator(seed))
    case = side_checks.alone(
        ScaledPower(Dense(random.definite(3)), random.positive(1)[0], exponent), random.definite(3)
    )
    side_checks.gradients_are_the_dense_ones(case)


def test_all_powers_share_one_eigendecomposition_of_the_matrix() -> None:
    random = Random(generator(0))
    operator = ScaledPower(Dense(random.definite(4)), torch.tensor(2.0, dtype=torch.float64), 0.5)
    with mock.patch("torch.linalg.eigh", wraps=torch.linalg.eigh) as eigh:
        operator.inverse(0.1), operator.power(-0.5).power(3), operator.logdet(), operator @ random.normal(4)
        power = operator.power(0.25)
        assert isinstance(power, ScaledPower)
        assert power.base is operator.base
        assert eigh.call_count == 1


def test_the_first_power_needs_no_eigendecomposition() -> None:
    random = Random(generator(0))
    matrix = random.definite(4)
    operator = ScaledPower(Dense(matrix), torch.tensor(2.0, dtype=torch.float64), 1.0)
    with mock.patch("torch.linalg.eigh", side_effect=AssertionError):
        v = random.normal(4)
        assert_close(operator @ v, 2 * matrix @ v)
        assert_close(operator.trace(), 2 * matrix.trace())
        assert_close(operator.diag(), 2 * matrix.diagonal())
        assert_close(operator.frobenius_norm(), 2 * matrix.norm())


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_singular_matrix_stays_singular_under_a_root(exponent: float) -> None:
    # rounding leaves eigenvalues of 1e-17, whose roots of 1e-9 are no eigenvalues either
    rows = Random(generator(3)).normal(2, 5)
    operator = ScaledPower(Dense(rows.mT @ rows), torch.tensor(1.0, dtype=torch.float64), exponent)
    with pytest.raises(SingularError, match=r"damping > 0"):
        operator.power(-0.5)
    identity = torch.eye(5, dtype=torch.float64)
    assert_close(operator.inverse(0.1).to_dense(), torch.linalg.inv(operator.to_dense() + 0.1 * identity))


def test_what_has_no_root_is_refused() -> None:
    indefinite = Dense(torch.diag(torch.tensor([-1.0, 2.0], dtype=torch.float64)))
    one = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(SingularError, match="nonnegative"):
        ScaledPower(indefinite, one, 0.5).to_dense()
    with pytest.raises(SingularError, match="nonnegative"):
        ScaledPower(indefinite, one, 2.0).power(0.5)  # |M| is not M
    with pytest.raises(SingularError, match="positive"):
        ScaledPower(Dense(torch.eye(2, dtype=torch.float64)), 0 * one, 1.0).power(-1)
    negative = ScaledPower(indefinite, one, 1.0).power(-1)
    assert_close(negative.to_dense(), torch.diag(torch.tensor([-1.0, 0.5], dtype=torch.float64)))


@moderately
@given(seed=st.integers(0, 2**31), exponent=exponents, decay=st.floats(0, 1))
def test_the_mean_of_two_is_that_of_the_matrices_they_remember(seed: int, exponent: float, decay: float) -> None:
    random = Random(generator(seed))
    one, other = random.definite(2, 3), random.definite(2, 3)
    scales = random.positive(2), random.positive(2)
    sides = [ScaledPower(Dense(m), c, exponent) for m, c in zip((one, other), scales, strict=True)]
    roots = [c[:, None, None] ** (1 / exponent) * m for m, c in zip((one, other), scales, strict=True)]
    expected = matrix_function(decay * roots[0] + (1 - decay) * roots[1], lambda x: x**exponent)
    mean = ema(sides[0], sides[1], decay)
    assert isinstance(mean, ScaledPower)
    assert_close(mean.matrices(), expected)
    right = Diagonal(random.positive(2, 4))
    product = merge_factors(Kronecker(sides[0], right), Kronecker(sides[1], right), weights=(decay, 1 - decay))
    assert_close(product.trace(), (expected.diagonal(dim1=-2, dim2=-1).sum(-1) * right.values.sum(-1)).sum())


def test_powers_that_cannot_be_merged_say_so() -> None:
    base, one = Dense(torch.eye(2)), torch.tensor(1.0)
    with pytest.raises(PytreeError, match=r"powers 0\.5 and 1\.0"):
        ema(ScaledPower(base, one, 0.5), ScaledPower(base, one, 1.0), 0.5)
    eigen = EigenMatrix(OrthogonalBasis(torch.eye(2)), torch.ones(2))
    with pytest.raises(NotKroneckerError, match="eigen-form"):
        ema(ScaledPower(eigen, one, 0.5), ScaledPower(eigen, one, 0.5), 0.5)


@pytest.mark.parametrize("kind", FACTORS + EIGEN)
def test_a_matrix_is_multiplied_with_one_number_a_group(kind: str) -> None:
    random = Random(generator(0))
    base, matrices = side(kind, (2, 3), random)
    factor = random.positive(2)
    expected = factor[:, None, None] * matrices
    assert_close(times(base, factor).matrices(), expected)
    assert_close(times(ScaledPower(base, torch.ones(2).double(), 1.0), factor).matrices(), expected)
    assert_close(times(KroneckerSide((base,)), factor).matrices(), expected)


def test_conjugation_is_that_of_the_matrix() -> None:
    random = Random(generator(0))
    q, values = random.orthogonal(3), random.positive(3)
    operator = ScaledPower(Dense(conjugated(q, values)), torch.tensor(3.0, dtype=torch.float64), 0.5)
    assert_close(operator.to_dense(), 3 * conjugated(q, values.sqrt()))
