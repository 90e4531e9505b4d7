"""Errors say which block or leaf they are about and what to do, and are built-in errors too."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlib import errors
from curvlib.errors import ArgumentError, CurvlibError, DampingError, PytreeError, ShapeError, SingularError
from curvlib.operators import (
    BlockDiagonal,
    Damping,
    Dense,
    Diagonal,
    EigenKronecker,
    EigenMatrix,
    FactoredTikhonov,
    Kronecker,
    Layout,
    Operator,
    OrthogonalBasis,
    Region,
    RelativeTikhonov,
    ScaledIdentity,
    Tikhonov,
)
from curvlib.pytree import Domain
from tests.operators.operator_cases import (
    Random,
    assert_close,
    cases,
    every_closed_kind,
    every_kind,
    generator,
    moderately,
)

random = Random(generator(0))
BUILT_IN = {
    "PytreeError": ValueError,
    "ShapeError": ValueError,
    "DtypeError": TypeError,
    "DeviceError": ValueError,
    "NonFiniteError": ValueError,
    "EmptyBatchError": ValueError,
    "TargetError": ValueError,
    "DampingError": ValueError,
    "SingularError": ValueError,
    "NotKroneckerError": TypeError,
    "CaptureError": ValueError,
    "UnusedParameterError": ValueError,
    "ArgumentError": ValueError,
    "BlockNameError": KeyError,
    "EigendecompositionError": RuntimeError,
    "ConvergenceError": RuntimeError,
}


def test_every_error_is_a_curvlib_error_and_the_built_in_one_that_fits() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert {c.__name__ for c in classes} >= {*BUILT_IN, "CurvlibError"}
    for one in classes:
        assert issubclass(one, CurvlibError)
        assert one is CurvlibError or issubclass(one, BUILT_IN.get(one.__name__, (ValueError, TypeError, RuntimeError)))


def curvature(**blocks: Operator) -> BlockDiagonal:
    """Operators on tensors of their own, under these names."""
    like = {name: torch.zeros(block.domain.shapes[0]) for name, block in blocks.items()}
    ordered = sorted(blocks)
    places = tuple((name, Layout((Region.whole(i, like[name].shape),))) for i, name in enumerate(ordered))
    return BlockDiagonal(dict(blocks), places, Domain.of(like))


layer = curvature(
    weight=Kronecker(Dense(random.definite(2)), Dense(random.definite(3))), bias=Diagonal(random.positive(2))
)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, r"'bias' is missing"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "gain": torch.zeros(1)}, r"'gain' is unexpected"),
        ({"weight": torch.zeros(2, 3), "offset": torch.zeros(2)}, r"'bias' is missing, 'offset' is unexpected"),
        ({"weight": {"inner": torch.zeros(2, 3)}, "bias": torch.zeros(2)}, r"'weight.inner' is unexpected"),
        ([torch.zeros(2), torch.zeros(2, 3)], r"does not have the structure of params"),
    ],
    ids=["missing", "unexpected", "renamed", "nested", "list"],
)
def test_vectors_of_another_structure_are_refused_and_the_path_is_named(vector: Any, message: str) -> None:
    for call in (layer.matvec, layer.matmat, layer.quadratic, layer.inverse(0.1).matvec):
        with pytest.raises(PytreeError, match=message):
            call(vector)


def test_leaves_of_another_shape_are_refused_by_name() -> None:
    wrong = {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}
    with pytest.raises(ShapeError, match=r"leaf 'weight' should have shape \(2, 3\), got \(3, 2\)"):
        layer @ wrong
    with pytest.raises(ShapeError, match=r"leaf 'bias' should have shape \[k\] \+ \(2,\), got \(2,\)"):
        layer.matmat({"weight": torch.zeros(5, 2, 3), "bias": torch.zeros(2)})


@every_closed_kind
@moderately
@given(data=st.data())
def test_stacked_vectors_are_refused_where_one_is_expected(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    for wrong, call in ((case.vector(stacked=2), case.operator.matvec), (case.vector(), case.operator.matmat)):
        with pytest.raises(ShapeError, match="shape"):
            call(wrong)


NEGATIVE = [-0.1, float("nan")]


@pytest.mark.parametrize("strength", NEGATIVE)
@pytest.mark.parametrize("kind", [Tikhonov, FactoredTikhonov, RelativeTikhonov])
def test_negative_damping_is_refused_when_it_is_made(kind: type, strength: float) -> None:
    with pytest.raises(DampingError, match=f"damping must not be negative, got {strength}"):
        kind(strength)


@every_kind
@moderately
@given(data=st.data())
def test_negative_damping_is_refused_by_every_operator(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    for call in (operator.damp, operator.inverse, lambda d: operator.power(0.5, d)):
        with pytest.raises(DampingError, match=r"damping must not be negative, got -0\.5"):
            call(-0.5)


def test_what_is_no_damping_is_refused() -> None:
    with pytest.raises(DampingError, match="must be a number, Tikhonov, FactoredTikhonov or RelativeTikhonov, got str"):
        layer.inverse("much")


EXACT = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
ZERO = torch.tensor(0.0, dtype=torch.float64)
good = Dense(random.definite(2))
SINGULAR = {
    "dense": Dense(EXACT),
    "diagonal": Diagonal(EXACT.diagonal()),
    "scaled identity": ScaledIdentity(ZERO, (3,)),
    "eigen": EigenMatrix(OrthogonalBasis(random.orthogonal(3)), EXACT.diagonal()),
    "left": Kronecker(Dense(EXACT), good),
    "right": Kronecker(good, Dense(EXACT)),
    "one group of two": Kronecker(Dense(torch.stack([EXACT, EXACT + torch.eye(3)])), good),
    "eigen kronecker": Kronecker(good, Dense(EXACT)).map_eigenvalues(lambda x: x),
    "sum": Kronecker(good, Dense(EXACT)) + Kronecker(good, Dense(2 * EXACT)),
}
every_singular = pytest.mark.parametrize("operator", SINGULAR.values(), ids=SINGULAR.keys())


@every_singular
@pytest.mark.parametrize("exponent", [-1, -0.5, -2])
def test_negative_powers_of_singular_operators_need_damping(operator: Operator, exponent: float) -> None:
    message = rf"the exponent {exponent} needs positive eigenvalues, but the smallest is .*; pass damping > 0"
    with pytest.raises(SingularError, match=message):
        operator.power(exponent)
    assert torch.isfinite(operator.power(exponent, 0.1).to_dense()).all()


@every_singular
def test_the_singular_block_is_named(operator: Operator) -> None:
    curv = curvature(fine=Dense(random.definite(2)), flat=operator)
    with pytest.raises(SingularError, match=r"block 'flat': .* pass damping > 0") as caught:
        curv.inverse()
    assert str(caught.value).count("block '") == 1
    dense = curv.to_dense()
    shifted = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    assert_close(curv.inverse(0.1).to_dense() @ shifted, torch.eye(len(dense), dtype=torch.float64))


@every_singular
def test_logdet_of_singular_operators_is_minus_infinity(operator: Operator) -> None:
    assert operator.logdet() == -torch.inf
    assert curvature(fine=Dense(random.definite(2)), flat=operator).logdet() == -torch.inf
    assert torch.isfinite(operator.damp(0.1).logdet())


@every_singular
def test_nonnegative_powers_of_singular_operators_exist(operator: Operator) -> None:
    root = operator.power(0.5).to_dense()
    assert_close(root @ root, operator.to_dense())


def test_rank_deficient_factors_are_singular() -> None:
    for seed in range(20):
        x = Random(generator(seed)).normal(5, 3)
        with pytest.raises(SingularError):
            Dense(x @ x.mT).inverse()


@pytest.mark.parametrize("exponent", [0.5, -0.5, 1.5])
def test_fractional_powers_of_indefinite_operators_are_refused(exponent: float) -> None:
    indefinite = torch.diag(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    for operator in (Dense(indefinite), Diagonal(indefinite.diagonal()), Kronecker(Dense(indefinite), good)):
        with pytest.raises(SingularError, match=rf"the exponent {exponent} needs (positive|nonnegative) eigenvalues"):
            operator.power(exponent)
        with pytest.raises(SingularError):
            operator.power(exponent, 0.1)


@pytest.mark.parametrize("damping", [0.0, Tikhonov(0), FactoredTikhonov(0.0), RelativeTikhonov(0)])
def test_zero_damping_is_no_damping(damping: Damping | float) -> None:
    with pytest.raises(SingularError):
        Dense(EXACT).inverse(damping)


@pytest.mark.parametrize("relative", [False, True])
def test_factored_damping_of_zero_factors_is_finite(relative: bool) -> None:
    zero = torch.zeros(2, 2, dtype=torch.float64)
    for operator in (Kronecker(Dense(zero), good), Kronecker(Dense(zero), Dense(zero))):
        assert torch.isfinite(operator.damp(FactoredTikhonov(0.1, relative=relative)).to_dense()).all()
    inverse = Kronecker(Dense(zero), Dense(zero)).inverse(FactoredTikhonov(0.25)).to_dense()
    assert_close(inverse, 4 * torch.eye(4, dtype=torch.float64))


def test_infinite_factors_are_refused_and_the_block_is_named() -> None:
    broken = random.definite(2)
    broken[0, 0] = torch.nan
    with pytest.raises(errors.NonFiniteError, match=r"block 'flat'.* not finite"):
        curvature(fine=good, flat=Dense(broken)).inverse(0.1)


@pytest.mark.parametrize("factor", [torch.ones(2), Dense(random.definite(2))], ids=["vector", "operator"])
def test_operators_are_multiplied_by_numbers_only(factor: Any) -> None:
    for operator in (layer, good):
        with pytest.raises(ArgumentError, match="a number or a 0-d tensor only; use @ for vectors"):
            operator * factor


def test_operators_are_added_to_operators_only() -> None:
    with pytest.raises(TypeError):
        good + 1.0


def test_operators_cannot_be_assigned_to() -> None:
    for operator in (good, layer, EigenKronecker(OrthogonalBasis(EXACT), OrthogonalBasis(EXACT), EXACT)):
        for name in operator.__dataclass_fields__:
            with pytest.raises(AttributeError):
                setattr(operator, name, None)
