"""A side that is itself a Kronecker product: the full algebra against dense twins, and its memory."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import curvlib as cv
from curvlib.errors import ArgumentError, PytreeError, ShapeError
from curvlib.operators import (
    Damping,
    Dense,
    Diagonal,
    EigenKronecker,
    Kronecker,
    KroneckerBasis,
    KroneckerSide,
    LowRank,
    Matrix,
    ScaledPower,
    ema,
)
from tests.operators import side_checks
from tests.operators.operator_cases import (
    EIGEN,
    FACTORS,
    Case,
    Draw,
    Random,
    assert_close,
    every_damping,
    generator,
    side,
)

KINDS = ("alone", "groups", "left side", "right side", "both sides", "sides of groups")
every_kind = pytest.mark.parametrize("kind", KINDS)
moderately = settings(deadline=None, max_examples=3)
few = settings(deadline=None, max_examples=2)


def kron(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of matrices [*, m, m] and [*, n, n]."""
    product = torch.einsum("...ij,...kl->...ikjl", a, b)
    return product.flatten(-4, -3).flatten(-2)


def product_side(draw: Draw, front: tuple[int, ...], random: Random) -> tuple[Matrix, Tensor]:
    """F_1 (x) F_2 (x) ... on vectors [*, d], and its matrices."""
    widths = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    kinds = [draw(st.sampled_from(FACTORS + EIGEN)) for _ in widths]
    factors, matrices = zip(*(side(k, (*front, n), random) for k, n in zip(kinds, widths, strict=True)), strict=True)
    return KroneckerSide(tuple(factors)), functools.reduce(kron, matrices)


@st.composite
def cases(draw: Draw, kind: str) -> Case:
    random = Random(generator(draw(st.integers(0, 2**31))))
    match kind:
        case "alone":
            return side_checks.alone(*product_side(draw, (), random))
        case "groups":
            return side_checks.alone(*product_side(draw, (2,), random))
        case "both sides":
            return side_checks.paired(product_side(draw, (), random), product_side(draw, (), random))
        case "sides of groups":
            return side_checks.paired(product_side(draw, (2,), random), product_side(draw, (2,), random))
    other = side(draw(st.sampled_from(FACTORS + EIGEN)), (3,), random)
    mine = product_side(draw, (), random)
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


@pytest.mark.parametrize("kind", ["alone", "both sides", "sides of groups"])
@few
@given(data=st.data())
def test_it_is_a_pytree_that_composes_with_transforms(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    side_checks.powers_add(case)
    side_checks.it_is_a_pytree(case)
    side_checks.transforms_compose(case)
    side_checks.nothing_is_changed(case)
    side_checks.samples_have_the_covariance(case)


@moderately
@given(seed=st.integers(0, 2**31))
def test_gradients_are_the_dense_ones(seed: int) -> None:
    random = Random(generator(seed))
    operator = KroneckerSide((Dense(random.definite(2)), Diagonal(random.positive(2)), Dense(random.definite(2))))
    side_checks.gradients_are_the_dense_ones(side_checks.alone(operator, random.definite(8)))


@moderately
@given(seed=st.integers(0, 2**31))
def test_the_basis_is_the_product_of_bases(seed: int) -> None:
    random = Random(generator(seed))
    pairs = [side(kind, (n,), random) for kind, n in (("dense", 2), ("diagonal", 3), ("eigen", 2))]
    operator = KroneckerSide(tuple(matrix for matrix, _ in pairs))
    matrices = functools.reduce(kron, [dense for _, dense in pairs])
    eigen, width = operator.eigen(), len(matrices)
    basis, unit = eigen.basis, torch.eye(len(matrices), dtype=torch.float64)
    q = basis.synthesise_left(unit)
    assert_close(q.mT @ q, unit)
    assert_close(q @ torch.diag(eigen.values) @ q.mT, matrices)
    v, w = random.normal(width, 2), random.normal(2, width)
    assert_close(basis.analyse_left(v), q.mT @ v)
    assert_close(basis.analyse_right(w), w @ q)
    assert_close(basis.synthesise_right(w), w @ q.mT)
    assert_close(basis.square_left(v), q.square() @ v)
    assert_close(basis.square_right(w), w @ q.square().mT)
    index = torch.arange(width).flip(0)
    assert_close(basis.rows(index, v), q.mT[index])
    dense = random.definite(width)
    assert_close(basis.forms(Dense(dense)), (q.mT @ dense @ q).diagonal())
    assert_close(basis.forms(operator), eigen.values)
    assert_close(basis.total(eigen.values), matrices.trace())
    values = random.positive(3, width)
    joint = EigenKronecker(Dense(random.definite(3)).eigen().basis, basis, values)
    assert_close(joint.to_dense().trace(), values.sum())


def test_a_tensor_has_the_algebra_of_a_matrix() -> None:
    random = Random(generator(1))
    factors = [random.definite(n) for n in (2, 3, 4)]
    tensor = random.normal(2, 3, 4)
    curv = Kronecker(Dense(factors[0]), KroneckerSide((Dense(factors[1]), Dense(factors[2]))))
    expected = torch.einsum("ia,jb,kc,abc->ijk", *factors, tensor)
    assert_close((curv @ tensor.reshape(2, 12)).reshape(2, 3, 4), expected)
    corrected = curv.damp(0.1)
    assert isinstance(corrected, EigenKronecker)
    dense = torch.kron(torch.kron(factors[0], factors[1]), factors[2]) + 0.1 * torch.eye(24, dtype=torch.float64)
    assert_close(corrected._power(-1, damped=True).to_dense(), torch.linalg.inv(dense))
    assert_close(corrected.diag().flatten(), dense.diagonal())


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_the_square_of_the_width_is_never_formed() -> None:
    random = Random(generator(0))
    factors = tuple(Dense(random.definite(n)) for n in (12, 15, 16))  # a width of 2880
    curv = Kronecker(Dense(random.definite(3)), KroneckerSide(factors))
    v = random.normal(3, 2880)
    with Largest() as largest:
        curv.power(-0.5) @ v, curv.inverse(0.1) @ v, curv.inverse(0.1).diag(), curv.diag()
        curv.eigenvalues(), curv.logdet(), curv.frobenius_norm(), curv.quadratic(v)
        curv.sample(generator(0), 2), curv.right.eigen().basis.rows(torch.tensor([0, 2879]), v)
        (curv + 2.0 * curv).frobenius_norm()
    assert largest.numel <= 3 * 3 * 2880


def test_its_mean_is_taken_factor_by_factor() -> None:
    random = Random(generator(0))
    matrices = [[random.definite(n) for n in (2, 3)] for _ in range(2)]
    one, other = (KroneckerSide((Dense(a), ScaledPower(Dense(b), torch.ones(()).double(), 0.5))) for a, b in matrices)
    mean = ema(one, other, 0.25)
    assert isinstance(mean, KroneckerSide)
    first, second = (0.25 * x + 0.75 * y for x, y in zip(*matrices, strict=True))
    values, vectors = torch.linalg.eigh(second)
    assert_close(mean.to_dense(), torch.kron(first, vectors @ torch.diag(values.sqrt()) @ vectors.mT))
    with pytest.raises(PytreeError, match="widths"):
        ema(KroneckerSide((Dense(torch.eye(2)), Dense(torch.eye(3)))), KroneckerSide((Dense(torch.eye(6)),)), 0.5)


def test_projections_and_truncations_take_it_as_a_side() -> None:
    random = Random(generator(0))
    matrices = random.definite(2), random.definite(3)
    side_, dense = KroneckerSide(tuple(map(Dense, matrices))), kron(*matrices)
    params = {"w": random.normal(3, side_.shape[-1])}
    curv = Kronecker(Dense(random.definite(3)), side_)
    projected = cv.BlockDiagonal(
        {"w": curv},
        (("w", cv.operators.Layout((cv.operators.Region.whole(0, params["w"].shape),))),),
        cv.pytree.Domain.of(params),
    ).project(cv.sketch(params, rank=100))
    assert_close(projected(params)["w"], curv.left.to_dense() @ params["w"] @ dense)
    assert_close(curv.truncate(rank=3).to_dense(), curv.to_dense())


def test_what_it_cannot_be_made_of_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one factor"):
        KroneckerSide(())
    low = LowRank(torch.eye(3)[:, :1], torch.tensor([4.0]), torch.tensor(1.0))
    with pytest.raises(ArgumentError, match="one a row"):
        KroneckerSide((low, Dense(torch.eye(2)))).inverse(0.1)


def test_files_hold_it(tmp_path: Any) -> None:
    random = Random(generator(0))
    one = torch.tensor(2.0, dtype=torch.float64)
    side_ = KroneckerSide((Dense(random.definite(2)), ScaledPower(Diagonal(random.positive(3)), one, 0.5)))
    curv = Kronecker(ScaledPower(Dense(random.definite(2)), one, 1.0), side_)
    for operator in (curv, curv.inverse(0.1)):
        cv.save(operator, tmp_path / "curv")
        loaded = cv.load(tmp_path / "curv")
        assert type(loaded) is type(operator)
        assert torch.equal(loaded.to_dense(), operator.to_dense())
    assert isinstance(curv.inverse(0.1).right, KroneckerBasis)
