"""Eigendecompositions are made once for an object, and never outlive what they were made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from curvlib.operators import (
    BlockDiagonal,
    Dense,
    FactoredTikhonov,
    Kronecker,
    Layout,
    Operator,
    Region,
    RelativeTikhonov,
    Tikhonov,
    ema,
)
from curvlib.pytree import Domain
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    Random,
    assert_close,
    cases,
    every_kind,
    every_mergeable_kind,
    generator,
    moderately,
    tensors,
)


def eigendecompositions(fn: Callable[[], Any]) -> int:
    """How often a function calls torch.linalg.eigh."""
    with mock.patch("torch.linalg.eigh", wraps=torch.linalg.eigh) as counter:
        fn()
    return counter.call_count


def dense_factors(operator: Operator) -> int:
    paths = optree.tree_paths(operator, namespace="curvlib")
    return sum(path[-1:] == ("matrix",) or path[-2:-1] == ("stacks",) for path in paths)


def derive_much(operator: Operator, v: Any, dampings: tuple[Any, ...]) -> None:
    for damping in dampings:
        operator.inverse(damping) @ v
        operator.power(-0.5, damping).diag()
        operator.damp(damping).logdet()
    operator.power(0.5), operator.inverse(), operator.logdet(), operator.eigenvalues()
    operator.map_eigenvalues(torch.exp).trace()
    operator.sample(generator(0))


DAMPINGS = (0.1, Tikhonov(0.5), RelativeTikhonov(0.2), FactoredTikhonov(0.1), FactoredTikhonov(0.1, relative=True))


@pytest.mark.parametrize("kind", ["dense", "dense blocks", "diagonal", "eigen", "kronecker", "eigen kronecker"])
@moderately
@given(data=st.data())
def test_a_factor_is_decomposed_once_for_all_that_derives_from_it(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    assert eigendecompositions(lambda: derive_much(case.operator, case.vector(), DAMPINGS)) == dense_factors(
        case.operator
    )
    assert eigendecompositions(lambda: derive_much(case.operator, case.vector(), DAMPINGS)) == 0


def test_the_blocks_of_a_curvature_are_decomposed_once_each() -> None:
    random = Random(generator(0))
    shapes = {"a": (3, 2), "b": (2, 2)}
    like = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    blocks = {name: Kronecker(*(Dense(random.definite(n)) for n in shape)) for name, shape in shapes.items()}
    places = tuple((name, Layout((Region.whole(i, shape),))) for i, (name, shape) in enumerate(shapes.items()))
    curv = BlockDiagonal(dict(blocks), places, Domain.of(like))
    assert eigendecompositions(lambda: derive_much(curv, like, DAMPINGS)) == 4


@pytest.mark.parametrize("kind", ["sum", "sum of block diagonals"])
@moderately
@given(data=st.data())
def test_an_undamped_sum_is_decomposed_once(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator

    def derive() -> None:
        operator.power(0.5), operator.inverse(), operator.logdet(), operator.eigenvalues()
        operator.map_eigenvalues(torch.exp)

    # of the dense matrix, and for a direct inverse of both sides, each of at most two stacks of blocks
    assert eigendecompositions(derive) <= 5
    assert eigendecompositions(derive) == 0


@every_kind
@moderately
@given(data=st.data())
def test_products_diagonals_and_traces_need_no_decomposition(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))

    def work() -> None:
        case.operator @ case.vector()
        if kind != "solved inverse":  # the others come from its dense matrix
            case.operator.diag(), case.operator.trace()

    assert eigendecompositions(work) == 0


@every_kind
@moderately
@given(data=st.data())
def test_a_factor_changed_in_place_is_decomposed_again(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    operator, v = case.operator, case.vector()
    everything = (operator.logdet(), flat(operator.inverse(0.1) @ v))
    paths, leaves, _ = optree.tree_flatten_with_path(operator, namespace="curvlib")
    for path, leaf in zip(paths, leaves, strict=True):
        if "vectors" not in path:
            leaf.mul_(2)
    dense = operator.to_dense()
    changed = (operator.logdet(), flat(operator.inverse(0.1) @ v))
    assert not torch.allclose(everything[1], changed[1])
    assert abs(float(changed[0] - torch.linalg.slogdet(dense)[1])) <= 1e-10 * max(1.0, abs(float(changed[0])))
    shifted = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    assert_close(shifted @ changed[1], flat(v))


@every_mergeable_kind
@moderately
@given(data=st.data())
def test_an_average_starts_without_memory(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, mergeable=True))
    old, v = case.operator, case.vector()
    old.inverse(0.1), old.logdet(), old.eigenvalues()
    new = optree.tree_map(lambda x: 3 * x, old, namespace="curvlib")
    average = ema(old, new, 0.5)
    dense = average.to_dense()
    assert_close(average.eigenvalues(), torch.linalg.eigvalsh(dense))
    shifted = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    assert_close(shifted @ flat(average.inverse(0.1) @ v), flat(v))
    assert_close(old.eigenvalues(), torch.linalg.eigvalsh(case.dense))


@every_kind
@moderately
@given(data=st.data())
def test_copies_are_changed_apart(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    case.operator.logdet()
    copy = optree.tree_map(lambda x: x.clone(), case.operator, namespace="curvlib")
    copy.logdet()
    for leaf in tensors(case.operator):
        leaf.mul_(0.5)
    assert_close(copy.eigenvalues(), torch.linalg.eigvalsh(case.dense))


def test_nothing_made_under_a_transform_is_remembered() -> None:
    random = Random(generator(0))
    operator = Kronecker(Dense(random.definite(3)), Dense(random.definite(2)))
    torch.func.grad(lambda d: operator.damp(d).logdet())(torch.tensor(0.1, dtype=torch.float64))
    torch.func.vmap(lambda d: operator.inverse(d).diag())(torch.ones(2, dtype=torch.float64))
    torch.func.vmap(lambda scale: (scale * operator).logdet())(torch.ones(2, dtype=torch.float64))
    assert type(operator.eigenvalues()) is Tensor
    assert_close(operator.eigenvalues(), torch.linalg.eigvalsh(operator.to_dense()))


def test_nothing_is_remembered_for_factors_that_require_gradients() -> None:
    random = Random(generator(0))
    matrix = random.definite(3).requires_grad_()
    operator = Dense(matrix)
    for _ in range(2):  # a remembered graph would be gone the second time
        (gradient,) = torch.autograd.grad(operator.logdet(), matrix)
        assert_close(gradient, torch.linalg.inv(matrix.detach()), 1e-10)


def test_nothing_made_of_fake_tensors_is_remembered() -> None:
    random = Random(generator(0))
    operator = Kronecker(Dense(random.definite(3)), Dense(random.definite(2)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(operator.logdet(), FakeTensor)
    assert_close(operator.eigenvalues(), torch.linalg.eigvalsh(operator.to_dense()))
