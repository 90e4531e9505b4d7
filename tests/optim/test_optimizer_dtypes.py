"""Gradients in other dtypes than the parameters': the state and its arithmetic are in the parameters' precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlib.optim as optim
from curvlib.pytree import flatten
from tests.optim.optimizers_cases import CASES, Case, random_leaves

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
every_pair = pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=pytest.mark.slow) if torch.float16 in pair else pair for pair in PAIRS],
    ids=lambda pair: "-".join(str(x)[6:] for x in pair),
)

# what has no state of its own, or takes its direction or its norm from the gradient itself, is in the gradient's dtype
OF_GRADIENTS = ("sgd", "clipped sgd", "leafwise clipped sgd", "graft")
of_states = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in OF_GRADIENTS], ids=lambda case: case.name
)


def precision(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def run(case: Case, params: list[Tensor], dtype: torch.dtype, *, then: torch.dtype | None = None) -> tuple[Any, Any]:
    """The updates and the state after five gradients of a dtype, which are then widened if asked for."""
    transformation = case.make(case.rate)
    state = transformation.init(params)
    updates: Any = None
    for seed in range(5):
        gradients = random_leaves(case, 10 + seed, dtype)
        gradients = gradients if then is None else [g.to(then) for g in gradients]
        updates, state = transformation.update(gradients, state, params)
        params = optim.apply_updates(params, updates)
    return updates, state


@every_pair
@of_states
def test_gradients_of_any_dtype_count_as_what_they_are_in_the_parameters_precision(
    case: Case, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    own, of_gradients = pair
    wide = precision(own)
    params = random_leaves(case, 0, own)
    updates, state = run(case, params, of_gradients)
    expected = run(case, params, of_gradients, then=wide)
    tolerance = 1e-5 if "graft" in case.name else 0.0  # its norm is taken in the gradient's own precision
    for one, two in zip(flatten(updates)[0], flatten(expected[0])[0], strict=True):
        assert one.dtype == two.dtype
        assert float((one - two).norm()) <= tolerance * float(two.norm())
    for one, two in zip(flatten(state)[0], flatten(expected[1])[0], strict=True):
        assert one.dtype == two.dtype
        assert not one.is_floating_point() or one.dtype == wide


@every_pair
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_keep_their_dtype(case: Case, pair: tuple[torch.dtype, torch.dtype]) -> None:
    params = random_leaves(case, 0, pair[0])
    before = [p.clone() for p in params]
    updates, _ = run(case, params, pair[1])
    assert [p.dtype for p in optim.apply_updates(params, updates)] == [pair[0]] * len(params)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(bool(u.isfinite().all()) for u in updates)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_leaves_of_several_dtypes_keep_theirs(case: Case) -> None:
    dtypes = [DTYPES[i % 3] for i in range(len(case.orders))]
    params = [p.to(dtype) for p, dtype in zip(random_leaves(case, 0), dtypes, strict=True)]
    for of_gradients in DTYPES:
        updates, _ = run(case, params, of_gradients)
        assert [p.dtype for p in optim.apply_updates(params, updates)] == dtypes
