"""One rule for dtypes: computed in the widest one, returned in the vector's, leaf by leaf."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import curvlib as cv
from curvlib.errors import ArgumentError, DtypeError
from curvlib.operators import (
    Dense,
    Diagonal,
    EigenSketch,
    Kronecker,
    KroneckerSide,
    LowRank,
    Operator,
    ScaledIdentity,
    ScaledPower,
)
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    KINDS,
    TENSORS,
    Case,
    Random,
    cases,
    every_mergeable_kind,
    generator,
    moderately,
    sparingly,
    tensor_case,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
dtypes = st.sampled_from(DTYPES)
pairs = st.sampled_from(list(itertools.product(DTYPES, DTYPES)))


def wide_case(kind: str, seed: int) -> Case:
    """Operators that `operator_cases` has no kind for."""
    random = Random(generator(seed))
    low_rank = LowRank(random.orthogonal(5)[:, :2], random.positive(2), random.positive(1)[0])
    match kind:
        case "low rank":
            operator: Operator = low_rank
        case "low-rank side":
            operator = Kronecker(Dense(random.definite(3)), low_rank)
        case "eigen with a low-rank side":
            operator = Kronecker(Dense(random.definite(3)), low_rank).damp(0.3)
        case "kronecker side":
            sides = Dense(random.definite(2)), Diagonal(random.positive(3))
            operator = Kronecker(Dense(random.definite(3)), KroneckerSide(sides))
        case _:
            power = ScaledPower(Dense(random.definite(4)), random.positive(1)[0], 0.5)
            operator = Kronecker(power, ScaledIdentity(random.positive(1)[0], (3,)))
    return tensor_case((operator, operator.to_dense(), None))


WIDE = ("low rank", "low-rank side", "eigen with a low-rank side", "kronecker side", "scaled power")
every_kind_at_all = pytest.mark.parametrize("kind", [*KINDS, *WIDE])
MADE: dict[str, Callable[[Operator], Operator]] = {
    "itself": lambda operator: operator,
    "scaled": lambda operator: 2.0 * operator,
    "damped": lambda operator: operator.damp(0.3),
    "inverse": lambda operator: operator.inverse(0.3),
    "factored inverse": lambda operator: operator.inverse(cv.FactoredTikhonov(0.3)),
    "inverse root": lambda operator: operator.power(-0.5, 0.3),
    "sum": lambda operator: operator + operator,
    "damped sum": lambda operator: (operator + 2.0 * operator).damp(0.3),
    "inverse of a sum": lambda operator: (operator + 2.0 * operator).inverse(0.3),
}


@st.composite
def any_case(draw: Callable, kind: str) -> Case:
    return wide_case(kind, draw(st.integers(0, 2**31))) if kind in WIDE else draw(cases(kind))


def cast(vector: object, dtype: torch.dtype) -> object:
    return optree.tree_map(lambda leaf: leaf.to(dtype), vector)


def leaf_dtypes(vector: object) -> list[torch.dtype]:
    return [leaf.dtype for leaf in optree.tree_leaves(vector)]


def assert_bitwise(actual: object, expected: object) -> None:
    for one, two in zip(optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


def in_double(operator: Operator) -> Operator:
    """An operator in float64 whose numbers are those of a narrower one."""
    return operator.widened(torch.float64)


@every_kind_at_all
@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
@sparingly
@given(data=st.data(), pair=pairs)
def test_products_are_computed_in_the_wider_dtype_and_returned_in_the_vectors(
    kind: str, made: Callable[[Operator], Operator], data: st.DataObject, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    case = data.draw(any_case(kind))
    operator = made(case.operator.to(dtype=pair[0]))
    wide = torch.promote_types(operator.dtype, pair[1])
    v, stacked = cast(case.vector(), pair[1]), cast(case.vector(1, stacked=3), pair[1])
    widened = operator.widened(wide)
    assert_bitwise(operator @ v, cast(widened @ cast(v, wide), pair[1]))
    assert_bitwise(operator.matvec(v), operator @ v)
    assert_bitwise(operator.matmat(stacked), cast(widened.matmat(cast(stacked, wide)), pair[1]))
    assert operator.quadratic(v).dtype == wide
    assert torch.equal(operator.quadratic(v), widened.quadratic(cast(v, wide)))


@every_kind_at_all
@moderately
@given(data=st.data(), pair=pairs)
def test_products_are_right_to_the_rounding_of_the_wider_dtype(
    kind: str, data: st.DataObject, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    case = data.draw(any_case(kind))
    operator = case.operator.to(dtype=pair[0])
    v = cast(case.vector(), pair[1])
    exact = flat(in_double(operator) @ cast(v, torch.float64))
    eps = torch.finfo(pair[1]).eps + 8 * torch.finfo(torch.promote_types(*pair)).eps
    error = float((flat(operator @ v).double() - exact).norm())
    condition = float(torch.linalg.cond(case.dense))
    bound = case.tolerance + eps * (8 * condition if kind == "solved inverse" else 2)
    assert error <= bound * float(in_double(operator).frobenius_norm() * flat(v).double().norm())


@pytest.mark.parametrize("kind", ["block diagonal", "sum of block diagonals"])
@moderately
@given(data=st.data(), dtype=dtypes)
def test_each_leaf_comes_back_in_its_own_dtype(kind: str, data: st.DataObject, dtype: torch.dtype) -> None:
    case = data.draw(cases(kind))
    operator = case.operator.to(dtype=dtype)
    own = [data.draw(dtypes) for _ in operator.domain.shapes]
    leaves, structure = optree.tree_flatten(case.vector())
    v = structure.unflatten([leaf.to(d) for leaf, d in zip(leaves, own, strict=True)])
    wide = cv.operators.vectors.widest([dtype, *own])
    image = operator @ v
    assert leaf_dtypes(image) == own
    whole = optree.tree_leaves(operator.to(dtype=wide) @ cast(v, wide))
    assert_bitwise(image, structure.unflatten([leaf.to(d) for leaf, d in zip(whole, own, strict=True)]))
    inverse = operator.inverse(0.3)
    assert leaf_dtypes(inverse @ v) == own
    assert operator.quadratic(v).dtype == wide


@every_kind_at_all
@every_dtype
@sparingly
@given(data=st.data())
def test_what_needs_no_vector_has_the_operators_dtype(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    operator = data.draw(any_case(kind)).operator.to(dtype=dtype)
    precise = torch.promote_types(dtype, torch.float32)
    assert operator.dtype == dtype
    assert leaf_dtypes(operator.sample(generator(0))) == [dtype] * len(operator.domain.shapes)
    assert leaf_dtypes(operator.sample(generator(0), n=2)) == [dtype] * len(operator.domain.shapes)
    assert operator.eigenvalues().dtype == operator.logdet().dtype == precise
    assert operator.inverse(0.3).dtype == operator.power(0.5).dtype == precise
    assert operator.inverse(0.3).to_dense().dtype == precise
    if kind != "solved inverse":
        assert leaf_dtypes(operator.diag()) == [dtype] * len(operator.domain.shapes)
        assert operator.to_dense().dtype == operator.trace().dtype == dtype
        error = (operator.trace().double() - in_double(operator).trace()).abs()
        assert float(error) <= 32 * torch.finfo(dtype).eps * float(in_double(operator).trace())


@every_kind_at_all
@every_dtype
@sparingly
@given(data=st.data(), factor=dtypes)
def test_numbers_do_not_change_the_dtype(
    kind: str, dtype: torch.dtype, data: st.DataObject, factor: torch.dtype
) -> None:
    operator = data.draw(any_case(kind)).operator.to(dtype=dtype)
    number = torch.tensor(0.5, dtype=factor)
    precise = torch.promote_types(dtype, torch.float32)
    assert (number * operator).dtypes == (0.5 * operator).dtypes == {dtype}
    assert operator.inverse(number).dtypes == operator.inverse(cv.RelativeTikhonov(number)).dtypes == {precise}


@every_kind_at_all
@moderately
@given(data=st.data(), pair=pairs)
def test_sums_are_in_the_wider_dtype(kind: str, data: st.DataObject, pair: tuple[torch.dtype, torch.dtype]) -> None:
    operator = data.draw(any_case(kind)).operator
    one, two = (operator.to(dtype=dtype) for dtype in pair)
    wide = torch.promote_types(*pair)
    total = one + two
    assert total.dtypes == {wide}
    assert (two + one).dtypes == {wide}
    assert total.inverse(0.3).dtypes == {torch.promote_types(wide, torch.float32)}
    if wide == torch.float64 and kind != "solved inverse":
        assert torch.equal(total.to_dense(), (one.widened(wide) + two.widened(wide)).to_dense())


@every_mergeable_kind
@moderately
@given(data=st.data(), pair=pairs)
def test_factors_are_merged_in_the_wider_dtype(
    kind: str, data: st.DataObject, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    operator = data.draw(cases(kind, mergeable=True)).operator
    one, two = (operator.to(dtype=dtype) for dtype in pair)
    decay = torch.tensor(0.9, dtype=torch.float64)
    for merged in (cv.merge_factors(one, two), cv.ema(one, two, 0.9), cv.ema(one, two, decay)):
        assert merged.dtypes == {torch.promote_types(*pair)}


@pytest.mark.parametrize("pair", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_sides_of_two_dtypes_are_multiplied_in_the_wider(pair: tuple[torch.dtype, torch.dtype]) -> None:
    random = Random(generator(0))
    left, right = random.definite(3), random.definite(2)
    operator = Kronecker(Dense(left.to(pair[0])), Dense(right.to(pair[1])))
    wide = torch.promote_types(*pair)
    whole = Kronecker(Dense(left.to(pair[0]).to(wide)), Dense(right.to(pair[1]).to(wide)))
    for dtype in DTYPES:
        v = random.normal(3, 2).to(dtype)
        assert torch.equal(operator @ v, whole @ v)
        assert torch.equal(operator.inverse(0.1) @ v, whole.inverse(0.1) @ v)
    assert operator.eigenvalues().dtype == torch.promote_types(wide, torch.float32)


@pytest.mark.parametrize("kind", [kind for kind in TENSORS if kind != "sum"])
@moderately
@given(data=st.data(), pair=pairs, random=st.booleans())
def test_projections_are_in_the_dtype_of_the_vector(
    kind: str, data: st.DataObject, pair: tuple[torch.dtype, torch.dtype], random: bool
) -> None:
    case = data.draw(cases(kind))
    v = cast(case.vector(), pair[1])
    drawn = random and kind != "eigen kronecker"  # whose eigenvalues do not factor
    sketch = cv.sketch(case.like, rank=2) if drawn else EigenSketch(rank=2)
    projection = case.operator.to(dtype=pair[0]).project(sketch)
    own = torch.promote_types(pair[0], torch.float32)
    assert {side.dtype for side in optree.tree_leaves(projection, namespace="curvlib")} == {own}
    wide = torch.promote_types(own, pair[1])
    widened = optree.tree_map(lambda side: side.to(wide), projection, namespace="curvlib")
    assert_bitwise(projection(v), cast(widened(cast(v, wide)), pair[1]))
    with pytest.raises(DtypeError, match=r"leaf 'params' of the vector has dtype torch.int64"):
        projection(cast(v, torch.int64))


@every_kind_at_all
@sparingly
@given(data=st.data())
def test_vectors_of_other_dtypes_are_refused(kind: str, data: st.DataObject) -> None:
    case = data.draw(any_case(kind))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        v, stacked = cast(case.vector(), dtype), cast(case.vector(stacked=2), dtype)
        for multiply, x in (
            (case.operator.__matmul__, v),
            (case.operator.matvec, v),
            (case.operator.matmat, stacked),
            (case.operator.quadratic, v),
        ):
            with pytest.raises(DtypeError, match=f"leaf '.*' of the vector has dtype {dtype}"):
                multiply(x)


@every_kind_at_all
@sparingly
@given(data=st.data())
def test_a_sample_needs_a_generator(kind: str, data: st.DataObject) -> None:
    operator = data.draw(any_case(kind)).operator
    for other in (3, None, 0.5, torch.tensor(3)):
        with pytest.raises(ArgumentError, match=r"sample\(generator, n=3\)"):
            operator.sample(other)
