"""Sums of products that are diagonal on one side have a matrix a row: the full algebra against dense twins."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib.operators import (
    CanonicalBasis,
    Damping,
    Dense,
    Diagonal,
    EigenKronecker,
    EigenMatrix,
    FactoredTikhonov,
    Inverse,
    Kronecker,
    Matrix,
    Operator,
    RowBlocks,
    ScaledIdentity,
    Sum,
)
from curvlib.operators import row_blocks as row_blocks_module
from tests.operators import side_checks
from tests.operators.kronecker_sum_cases import big, eye
from tests.operators.operator_cases import (
    Case,
    Random,
    assert_close,
    every_damping,
    generator,
    matrix_block,
    sum_of_blocks,
    tensor_case,
)

moderately = settings(deadline=None, max_examples=3)
seeds = st.integers(0, 2**31)
every_layout = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
every_count = pytest.mark.parametrize("uses", [2, 3])


def table(seed: int, uses: int, *, columns: bool, definite: bool = True, tokens: int = 5, width: int = 3) -> Case:
    """The curvature of a table of tokens: the last use knows all of them, the others some."""
    random = Random(generator(seed))
    blocks = []
    for use in range(uses):
        counts = random.positive(tokens)
        if use < uses - 1 or not definite:
            occurs = (torch.rand(tokens, generator=random.source) < 0.4) | (torch.arange(tokens) == use)
            counts = counts * occurs
        kinds: list[Matrix] = [Diagonal(counts), EigenMatrix(CanonicalBasis(tokens), counts)]
        outer, matrix = kinds[use % 2], random.definite(width)
        inner = Dense(matrix)
        product = Kronecker(inner, outer) if columns else Kronecker(outer, inner)
        sides = (matrix, counts.diag()) if columns else (counts.diag(), matrix)
        blocks.append((product, torch.kron(*sides), (sides,)))
    return tensor_case(sum_of_blocks(blocks))


def by_rows(case: Case) -> Case:
    """The same case with the operator in rows."""
    assert isinstance(case.operator, Sum)
    rows = case.operator.dense()
    assert isinstance(rows, RowBlocks)
    return tensor_case((rows, case.dense, None))


@every_layout
@every_count
@moderately
@given(seed=seeds)
def test_the_algebra_of_rows_is_that_of_the_twin(columns: bool, uses: int, seed: int) -> None:
    case = by_rows(table(seed, uses, columns=columns))
    side_checks.products_are_the_twins(case)
    for inverted in (False, True):
        side_checks.what_is_read_off_is_the_twins(case, inverted=inverted)
    side_checks.powers_add(case)
    side_checks.nothing_is_changed(case)


@every_layout
@every_count
@every_damping
def test_powers_of_the_sum_and_of_its_rows_are_those_of_the_twin(
    columns: bool, uses: int, damping: Damping | float
) -> None:
    case = table(0, uses, columns=columns)
    side_checks.powers_are_the_twins(case, damping)
    side_checks.powers_are_the_twins(by_rows(case), damping)


@every_layout
@every_count
def test_the_sum_goes_through_transforms_in_which_no_value_is_looked_at(columns: bool, uses: int) -> None:
    case = table(1, uses, columns=columns)
    side_checks.transforms_compose(case)
    side_checks.gradients_are_the_dense_ones(case)


def test_samples_have_the_covariance() -> None:
    side_checks.samples_have_the_covariance(by_rows(table(3, 2, columns=False)))


@every_layout
@pytest.mark.parametrize("limit", [0, row_blocks_module.MAX_ROW_ELEMENTS], ids=["solved", "dense"])
@pytest.mark.parametrize("definite", [False, True])
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_a_damped_table_is_solved_at_any_size(columns: bool, limit: int, definite: bool, damping: float) -> None:
    case = table(2, 3, columns=columns, definite=definite, tokens=12)
    with big(), mock.patch.object(row_blocks_module, "MAX_ROW_ELEMENTS", limit):
        inverse = case.operator.inverse(damping)
    assert isinstance(inverse, RowBlocks)
    assert any(isinstance(part, Inverse) for part in inverse.parts) == (limit == 0)
    v = case.vector(stacked=4)
    shifted = case.dense + damping * eye(case.dense)
    tolerance = 1e-10 if limit else 1.01e-8
    assert_close(inverse.matmat(v).reshape(4, -1) @ shifted, v.reshape(4, -1), tolerance)
    assert_close(inverse.inverse().to_dense(), shifted, 1e-12)


def test_only_rows_with_two_terms_have_matrices_of_their_own() -> None:
    random = Random(generator(0))
    counts = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0], [0.0, 3.0, 1.0, 0.0, 2.0]], dtype=torch.float64)
    total = Sum(tuple(Kronecker(Diagonal(d), Dense(random.definite(3))) for d in counts))
    rows = total.dense()
    assert isinstance(rows, RowBlocks)
    assert [(type(part), part.domain.shapes[0]) for part in rows.parts] == [
        (EigenKronecker, (2, 3)),
        (EigenKronecker, (2, 3)),
        (Dense, (1, 3)),
    ]
    assert rows.order.tolist() == [0, 3, 1, 4, 2]
    assert_close(rows.to_dense(), total.to_dense())


def test_matrices_are_decomposed_once_for_all_dampings_and_rows_not_at_all() -> None:
    case = table(4, 2, columns=False)
    with mock.patch("torch.linalg.eigh", wraps=torch.linalg.eigh) as decompositions:
        for damping in (0.1, 0.2):
            case.operator.inverse(damping) @ case.vector()
    assert 1 <= decompositions.call_count <= 2


def test_sides_that_are_diagonal_throughout_make_a_diagonal() -> None:
    random = Random(generator(0))
    one = ScaledIdentity(torch.tensor(2.0, dtype=torch.float64), (3,))
    terms = [Kronecker(Diagonal(random.positive(4)), side) for side in (one, Diagonal(random.positive(3)), one)]
    total = Sum(tuple(terms))
    assert isinstance(total.dense(), Diagonal)
    with big():
        inverse = total.inverse(0.1)
    assert_close(inverse.to_dense(), torch.linalg.inv(total.to_dense() + 0.1 * eye(total.to_dense())))


def other_sums() -> dict[str, Operator]:
    random = Random(generator(0))

    def product(*sides: Matrix) -> Kronecker:
        return Kronecker(*sides)

    dense, diagonal = Dense(random.definite(3)), Diagonal(random.positive(3))
    groups = product(Diagonal(random.positive(2, 3)), Dense(random.definite(3)))
    return {
        "dense": product(dense, dense) + product(diagonal, dense),
        "groups": groups + groups,
        "another term": product(diagonal, dense) + matrix_block("diagonal", (3, 3), random)[0],
    }


@pytest.mark.parametrize("name", other_sums())
def test_other_sums_are_not_taken_apart(name: str) -> None:
    total = other_sums()[name]
    assert not isinstance(total.dense(), RowBlocks)
    dense = total.to_dense()
    assert_close(total.inverse(0.1).to_dense(), torch.linalg.inv(dense + 0.1 * eye(dense)))


@every_layout
def test_it_is_moved_to_another_dtype_with_its_order(columns: bool) -> None:
    rows = by_rows(table(5, 2, columns=columns)).operator
    for single in (rows.to(dtype=torch.float32), rows.widened(torch.float32)):
        assert single.order.dtype == torch.int64
        assert single.dtypes == {torch.float32}
        assert_close(single.to_dense().double(), rows.to_dense(), 1e-6)


@every_count
def test_factored_damping_damps_every_use_on_its_own(uses: int) -> None:
    case = table(6, uses, columns=True)
    for damping in (FactoredTikhonov(0.1), FactoredTikhonov(0.1, relative=True)):
        damped = case.operator.damp(damping)
        assert isinstance(damped, Sum)
        assert_close(damped.to_dense(), torch.stack([x.damp(damping).to_dense() for x in case.operator.terms]).sum(0))
        assert_close(case.operator.damp(0.2).damp(damping).to_dense(), damped.to_dense() + 0.2 * eye(case.dense))
