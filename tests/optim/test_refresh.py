"""Refresh policies, orthogonal iteration, and refreshes that fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib.optim as optim
from curvlib.errors import ArgumentError, CurvlibError, NonFiniteError
from curvlib.linalg.orthogonal_iteration import off_diagonality, orthogonal_iteration
from curvlib.optim import Adaptive, Every, Refresh, Warmup
from curvlib.optim.turns import Choice, chosen, refreshed, started
from tests.optim.optimizers_cases import stack_of


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(seed: int, *shape: int) -> Tensor:
    rows = random(seed, *shape)
    return rows @ rows.mT


# --- policies -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(period=st.integers(1, 7), first=st.integers(1, 9), tolerance=st.floats(0, 1))
def test_policies_are_due_when_they_say(period: int, first: int, tolerance: float) -> None:
    warmup = Warmup(first, Adaptive(tolerance, every=period))
    for step in range(1, 30):
        assert Every(period).due(step) == (step % period == 0)
        assert warmup.due(step) == (step <= first or step % period == 0)
        assert warmup.limit(step) == (None if step <= first else tolerance)


@pytest.mark.parametrize(
    "make", [lambda: Every(0), lambda: Warmup(0), lambda: Adaptive(-0.1), lambda: Adaptive(0.1, every=0)]
)
def test_policies_refuse_what_makes_no_sense(make: Callable[[], Refresh]) -> None:
    with pytest.raises(ArgumentError):
        make()


# --- orthogonal iteration -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 100), width=st.integers(1, 6))
def test_one_iteration_is_a_qr_decomposition_of_the_sorted_image(seed: int, width: int) -> None:
    matrix, basis = gram(seed, 2, width, width), torch.linalg.qr(random(seed + 1, 2, width, width))[0]
    found, order = orthogonal_iteration(matrix, basis)
    for i in range(2):
        quotients = (basis[i].T @ matrix[i] @ basis[i]).diagonal()
        assert torch.equal(quotients[order[i]], quotients.sort(descending=True)[0])
        expected = torch.linalg.qr(matrix[i] @ basis[i][:, order[i]])[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)


def test_iterations_converge_to_the_eigenbasis_in_descending_order() -> None:
    eigenbasis = torch.linalg.qr(random(0, 5, 5))[0]
    matrix = eigenbasis @ torch.diag(torch.tensor([16.0, 8, 4, 2, 1], dtype=torch.float64)) @ eigenbasis.T
    basis = torch.linalg.qr(random(1, 5, 5))[0]
    for _ in range(80):
        basis, order = orthogonal_iteration(matrix, basis)
    assert torch.equal(order, torch.arange(5))
    torch.testing.assert_close((eigenbasis.T @ basis).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 100), width=st.integers(1, 6))
def test_off_diagonality_is_the_norm_of_what_is_off_the_diagonal(seed: int, width: int) -> None:
    matrix, basis = gram(seed, 2, width, width), torch.linalg.qr(random(seed + 1, 2, width, width))[0]
    inside = basis.mT @ matrix @ basis
    outside = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    expected = torch.linalg.matrix_norm(outside) / torch.linalg.matrix_norm(matrix)
    torch.testing.assert_close(off_diagonality(matrix, basis), expected, rtol=0, atol=1e-12)
    assert float(off_diagonality(matrix, torch.linalg.eigh(matrix)[1]).max()) < 1e-14
    assert float(off_diagonality(0 * matrix, basis).max()) == 0


# --- members and failures -------------------------------------------------------------------------------------------


def test_only_members_beyond_the_limit_are_chosen_and_changed() -> None:
    matrix = gram(0, 3, 4, 4)
    basis, failures = started(
        matrix, torch.eye(4, dtype=torch.float64).expand(3, 4, 4), torch.zeros(3, dtype=torch.int32)
    )
    moved = matrix.clone()
    moved[1] += 5 * gram(1, 4, 1)
    (choice,) = chosen([moved], [basis.new], 0.01)
    assert choice.members is not None
    assert choice.members.tolist() == [1]
    turn, _ = refreshed(moved, basis.new, failures, choice)
    bases = turn.placed(basis.new)
    assert torch.equal(bases[[0, 2]], basis.new[[0, 2]])
    assert torch.equal(bases[1], orthogonal_iteration(moved[1:2], basis.new[1:2])[0][0])
    masked, _ = refreshed(moved, basis.new, failures, Choice(mask=torch.tensor([False, True, False])))
    torch.testing.assert_close(masked.new, bases)
    assert chosen([moved], [basis.new], 1.0)[0].members.tolist() == []
    assert chosen([moved], [basis.new], None) == [Choice()]


def test_a_basis_that_cannot_be_refreshed_is_kept_and_its_neighbours_are_not() -> None:
    matrix, basis = gram(0, 2, 3, 3), torch.linalg.qr(random(1, 2, 3, 3))[0]
    broken = matrix.clone()
    broken[0, 1, 1] = torch.inf
    failures = torch.tensor([1, 1], dtype=torch.int32)
    for (turn, counts), expected in (
        (refreshed(broken, basis, failures, Choice()), refreshed(matrix, basis, failures, Choice())[0]),
        (started(broken, basis, failures), started(matrix, basis, failures)[0]),
    ):
        assert torch.equal(turn.new[0], basis[0])
        assert torch.equal(turn.new[1], expected.new[1])
        assert turn.order[0].tolist() == [0, 1, 2]
        assert counts.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("transformation", "survived"),
    [
        (optim.scale_by_soap(refresh=Every(2)), 4),
        (optim.scale_by_soap(refresh=Adaptive(0.1, every=2)), 4),
        (optim.scale_by_dykaf(refresh=Every(2)), 4),
        (optim.scale_by_kl_shampoo(refresh=Every(2)), 4),
        (optim.scale_by_shampoo(refresh=Every(2)), 5),
    ],
    ids=["soap", "adaptive soap", "dykaf", "kl-shampoo", "shampoo"],
)
def test_the_third_failure_in_a_row_is_an_error_that_names_the_parameter(
    transformation: optim.GradientTransformation, survived: int
) -> None:
    good = {"a": random(0, 3, 4), "b": random(1, 3, 4)}
    state = transformation.init(good)
    for _ in range(2):
        _, state = transformation.update(good, state)
    bad = {"a": good["a"], "b": good["b"].clone()}
    bad["b"][0, 0] = torch.nan
    for _ in range(survived):  # refreshes after every other step, of which the third fails for the third time
        _, state = transformation.update(bad, state)
    with pytest.raises(NonFiniteError, match="'b'") as error:
        transformation.update(bad, state)
    assert isinstance(error.value, CurvlibError)


@pytest.mark.parametrize("refresh", [Every(1), Warmup(2, Every(5)), Adaptive(0.0)])
def test_every_policy_keeps_bases_orthogonal(refresh: Refresh) -> None:
    transformation = optim.scale_by_soap(refresh=refresh)
    params = {"w": random(0, 5, 3)}
    state = transformation.init(params)
    for seed in range(12):
        _, state = transformation.update({"w": random(seed, 5, 3)}, state)
    for basis in stack_of(state).bases:
        identity = torch.eye(basis.shape[-1], dtype=basis.dtype)
        torch.testing.assert_close(basis[0].T @ basis[0], identity, rtol=0, atol=1e-13)
    assert int(state.refreshes) == {Every(1): 12, Warmup(2, Every(5)): 1 + 2 + 2, Adaptive(0.0): 12}[refresh]
