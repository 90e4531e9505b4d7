"""Operators as pytrees: round trips, transforms, traces, moves, and no side effects."""

from __future__ import annotations

from typing import Any

import optree
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.operators import Dense, FactoredTikhonov, Kronecker, RelativeTikhonov
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    assert_close,
    cases,
    every_closed_kind,
    every_kind,
    generator,
    moderately,
    tensors,
)


def doubled(tree: Any) -> Any:
    return torch_pytree.tree_map(lambda x: 2 * x, tree)


@every_kind
@moderately
@given(data=st.data())
def test_operators_survive_a_round_trip_through_optree(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    leaves, structure = optree.tree_flatten(operator, namespace="curvlib")
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    copy = optree.tree_unflatten(structure, leaves)
    assert type(copy) is type(operator)
    assert torch.equal(copy.to_dense(), operator.to_dense())
    assert optree.tree_structure(copy, namespace="curvlib") == structure


@every_kind
@moderately
@given(data=st.data())
def test_operators_survive_a_round_trip_through_torchs_pytrees(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    leaves, structure = torch_pytree.tree_flatten(operator)
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in tensors(operator)}
    copy = torch_pytree.tree_unflatten(leaves, structure)
    assert type(copy) is type(operator)
    assert torch.equal(copy.to_dense(), operator.to_dense())
    assert torch_pytree.tree_structure(copy) == structure


@every_kind
@moderately
@given(data=st.data())
def test_unflattening_accepts_anything_as_leaves(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    leaves, structure = optree.tree_flatten(operator, namespace="curvlib")
    numbered = optree.tree_unflatten(structure, list(range(len(leaves))))
    assert optree.tree_leaves(numbered, namespace="curvlib") == list(range(len(leaves)))


@every_closed_kind
@moderately
@given(data=st.data())
def test_vmap_over_vectors_is_matmat(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    v = case.vector(stacked=3)
    product = torch.func.vmap(lambda w: case.operator @ w)(v)
    assert_close(flat(product, stacked=True), flat(v, stacked=True) @ case.dense)


@every_closed_kind
@moderately
@given(data=st.data())
def test_vmap_over_stacked_operators_is_each_operators_result(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    operators = [case.operator, doubled(case.operator)]
    stacked = torch_pytree.tree_map(lambda a, b: torch.stack([a, b]), *operators)
    v = case.vector(stacked=2)
    rows = flat(v, stacked=True)

    def everything(operator: Any, w: Any) -> tuple[Any, ...]:
        solved = operator.inverse(0.3) @ w
        relative = operator.inverse(RelativeTikhonov(0.3)) @ w
        factored = operator.inverse(FactoredTikhonov(0.3)) @ w
        return operator @ w, solved, relative, factored, operator.quadratic(w), operator.trace(), operator.logdet()

    *products, quadratics, traces, logdets = torch.func.vmap(everything)(stacked, v)
    for i, operator in enumerate(operators):
        w = torch_pytree.tree_map(lambda x, i=i: x[i], v)
        *expected, quadratic, trace, logdet = everything(operator, w)
        for product, one in zip(products, expected, strict=True):
            assert_close(flat(product, stacked=True)[i], flat(one), 1e-10)
        assert_close(quadratics[i], quadratic)
        assert_close(traces[i], trace)
        assert abs(float(logdets[i] - logdet)) <= 1e-10 * max(1.0, abs(float(logdet)))
    assert rows.shape == (2, len(case.dense))


def factors_of(gradient: Any) -> list[Tensor]:
    """The leaves of an operator but for eigenvectors, which cannot be varied freely."""
    paths, leaves, _ = optree.tree_flatten_with_path(gradient, namespace="curvlib")
    return [leaf for path, leaf in zip(paths, leaves, strict=True) if "vectors" not in path]


@every_closed_kind
@moderately
@given(data=st.data())
def test_gradients_through_matvec_are_those_of_the_dense_matrix(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    v, w = case.vector(1), case.vector(2)
    by_operator = torch.func.grad(lambda op: flat(w) @ flat(op @ v))(case.operator)
    by_matrix = torch.func.grad(lambda op: flat(w) @ op.to_dense() @ flat(v))(case.operator)
    assert_gradients_agree(by_operator, by_matrix)
    by_vector = torch.func.grad(lambda x: flat(w) @ flat(case.operator @ x))(v)
    assert_close(flat(by_vector), case.dense @ flat(w))


@every_closed_kind
@moderately
@given(data=st.data())
def test_gradients_through_logdet_are_those_of_the_dense_matrix(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    by_operator = torch.func.grad(lambda op: op.damp(0.2).logdet())(case.operator)
    shift = 0.2 * torch.eye(len(case.dense), dtype=torch.float64)
    by_matrix = torch.func.grad(lambda op: torch.logdet(op.to_dense() + shift))(case.operator)
    assert_gradients_agree(by_operator, by_matrix)
    by_damping = torch.func.grad(lambda d: case.operator.damp(d).logdet())(torch.tensor(0.2, dtype=torch.float64))
    assert_close(by_damping, torch.linalg.inv(case.dense + shift).trace())


def assert_gradients_agree(actual: Any, expected: Any) -> None:
    for a, b in zip(factors_of(actual), factors_of(expected), strict=True):
        symmetric = (a + a.mT, b + b.mT) if a.ndim > 1 and a.shape[-1] == a.shape[-2] else (a, b)
        assert float((symmetric[0] - symmetric[1]).norm()) <= 1e-9 * max(float(b.norm()), 1.0)


@every_closed_kind
@settings(deadline=None, max_examples=2)
@given(data=st.data())
def test_a_trace_computes_what_was_traced(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))

    def everything(operator: Any, v: Any) -> tuple[Any, ...]:
        return operator @ v, operator.inverse(0.3) @ v, operator.inverse(FactoredTikhonov(0.3)) @ v, operator.logdet()

    traced = make_fx(everything)(case.operator, case.vector())
    other, v = doubled(case.operator), case.vector(7)
    results, expected = traced(other, v), everything(other, v)
    for a, b in zip(results[:3], expected[:3], strict=True):
        assert_close(flat(a), flat(b))
    assert abs(float(results[3] - expected[3])) <= 1e-10 * max(1.0, abs(float(expected[3])))


@every_kind
@moderately
@given(data=st.data())
def test_to_changes_the_dtype_of_every_tensor_and_little_else(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    single = case.operator.to(dtype=torch.float32)
    assert type(single) is type(case.operator)
    assert {leaf.dtype for leaf in tensors(single)} == {torch.float32}
    assert {leaf.dtype for leaf in tensors(case.operator)} == {torch.float64}
    dense = single.to_dense()
    assert dense.dtype == torch.float32
    assert_close(dense.double(), case.dense, 1e-4)
    assert single.logdet().dtype == torch.float32
    assert flat(single.inverse(0.3).diag()).dtype == torch.float32
    assert flat(single.sample(generator(0))).dtype == torch.float32


@every_closed_kind
@moderately
@given(data=st.data())
def test_to_moves_every_tensor_to_a_device(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    moved = case.operator.to("meta")
    assert {leaf.device.type for leaf in tensors(moved)} == {"meta"}
    product = moved @ optree.tree_map(lambda x: x.to("meta"), case.vector())
    leaves = optree.tree_leaves(product)
    assert {leaf.device.type for leaf in leaves} == {"meta"}
    assert [tuple(leaf.shape) for leaf in leaves] == list(moved.domain.shapes)


@every_kind
@moderately
@given(data=st.data())
def test_nothing_is_changed_by_any_operation(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    operator, v, stack = case.operator, case.vector(), case.vector(stacked=2)
    inputs = [*tensors(operator), *optree.tree_leaves(v), *optree.tree_leaves(stack)]
    before, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    state = torch.get_rng_state()
    operator.matvec(v), operator.matmat(stack), operator.quadratic(v), operator.to_dense()
    operator.diag(), operator.trace(), operator.logdet(), operator.eigenvalues(), operator.frobenius_norm()
    for damping in (0.1, FactoredTikhonov(0.1, relative=True), RelativeTikhonov(0.1)):
        inverse = operator.inverse(damping)
        inverse.matvec(v), inverse.diag(), operator.power(-0.5, damping).sample(generator(0), 2)
    operator.map_eigenvalues(torch.sqrt), operator + 2.0 * operator, operator.to(dtype=torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert [x._version for x in inputs] == versions
    assert not any(x.requires_grad for x in inputs)


def test_gradients_flow_through_the_inverse_in_plain_autograd() -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    factor = (x @ x.mT).requires_grad_()
    right = torch.diag(torch.tensor([1.0, 2.5], dtype=torch.float64))
    v = torch.randn(3, 2, dtype=torch.float64)
    operator = Kronecker(Dense(factor), Dense(right))
    (actual,) = torch.autograd.grad(operator.inverse(0.1).quadratic(v), factor)
    dense = torch.kron(factor, right) + 0.1 * torch.eye(6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(v.reshape(-1) @ torch.linalg.solve(dense, v.reshape(-1)), factor)
    assert_close(actual + actual.mT, expected + expected.mT, 1e-9)
    with torch.no_grad():
        assert_close(operator.inverse(0.1).to_dense(), torch.linalg.inv(dense))
