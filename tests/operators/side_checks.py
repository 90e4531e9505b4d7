"""What every side must do, alone and in a Kronecker product, against its dense twin."""

from __future__ import annotations

from typing import Any

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.operators import Damping, FactoredTikhonov, Kronecker, Matrix, RelativeTikhonov
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    Block,
    Case,
    assert_close,
    assert_number,
    generator,
    matrix_function,
    tensor_case,
    tensors,
)


def alone(operator: Matrix, matrices: Tensor) -> Case:
    """A side [*, d] as a block of its own; its matrices [*, d, d]."""
    return tensor_case((operator, torch.block_diag(*matrices.reshape(-1, *matrices.shape[-2:])), None))


def paired(left: tuple[Matrix, Tensor], right: tuple[Matrix, Tensor]) -> Case:
    """Two sides as a Kronecker product."""
    front = torch.broadcast_shapes(left[1].shape[:-2], right[1].shape[:-2])
    g, a = (x.expand(*front, *x.shape[-2:]).reshape(-1, *x.shape[-2:]).contiguous() for _, x in (left, right))
    sides = tuple(zip(g, a, strict=True))
    block: Block = (Kronecker(left[0], right[0]), torch.block_diag(*(torch.kron(*pair) for pair in sides)), sides)
    return tensor_case(block)


def products_are_the_twins(case: Case) -> None:
    assert_close(case.operator.to_dense(), case.dense)
    assert_close(flat(case.operator @ case.vector()), case.dense @ flat(case.vector()))
    stack = case.vector(stacked=3)
    assert_close(flat(case.operator.matmat(stack), stacked=True), flat(stack, stacked=True) @ case.dense)
    assert_close((2.0 * case.operator).to_dense(), 2 * case.dense)
    total = case.operator + 3.0 * case.operator
    assert_close(flat(total @ case.vector()), 4 * case.dense @ flat(case.vector()))
    assert_number(total.frobenius_norm(), 4 * case.dense.norm())


def what_is_read_off_is_the_twins(case: Case, *, inverted: bool) -> None:
    operator = case.operator.inverse(0.3) if inverted else case.operator
    dense = torch.linalg.inv(case.damped(0.3)) if inverted else case.dense
    assert_close(flat(operator.diag()), dense.diagonal())
    assert_number(operator.trace(), dense.trace())
    assert_number(operator.frobenius_norm(), dense.norm())
    assert_close(operator.eigenvalues(), torch.linalg.eigvalsh(dense))
    assert_number(operator.logdet(), torch.linalg.slogdet(dense)[1])


def powers_are_the_twins(case: Case, damping: Damping | float) -> None:
    assert_close(case.operator.damp(damping).to_dense(), case.damped(damping))
    v = flat(case.vector())
    assert_close(case.damped(damping) @ flat(case.operator.inverse(damping) @ case.vector()), v)
    for exponent in (-1, -0.5, 0, 1.5):
        for strength, dense in ((damping, case.damped(damping)), (0.0, case.dense)):
            power = case.operator.power(exponent, strength)
            expected = matrix_function(dense, lambda x, p=exponent: x**p)
            assert_close(power.to_dense(), expected)
            assert_close(flat(power @ case.vector()), expected @ v)
    mapped = case.operator.map_eigenvalues(lambda x: x / (x + 0.5))
    assert_close(mapped.to_dense(), matrix_function(case.dense, lambda x: x / (x + 0.5)))


def powers_add(case: Case) -> None:
    for p, q in ((0.5, 0.5), (-1, 2), (0.5, -0.25), (1.5, -1)):
        expected = matrix_function(case.dense, lambda x, p=p, q=q: x ** (p + q))
        twice = case.operator.power(p) @ (case.operator.power(q) @ case.vector())
        assert_close(flat(twice), expected @ flat(case.vector()))
        again = case.operator.power(p).power(q)
        assert_close(again.to_dense(), matrix_function(case.dense, lambda x, p=p, q=q: x ** (p * q)))


def samples_have_the_covariance(case: Case) -> None:
    n = 10_000
    draws = flat(case.operator.sample(generator(1), n), stacked=True)
    spread = float((case.dense.trace() ** 2 + case.dense.norm().square()) / n) ** 0.5
    assert float((draws.mT @ draws / n - case.dense).norm()) <= 6 * spread
    first, again = (flat(case.operator.sample(generator(seed))) for seed in (3, 3))
    assert torch.equal(first, again)


def it_is_a_pytree(case: Case) -> None:
    leaves, structure = optree.tree_flatten(case.operator, namespace="curvlib")
    numbered: Any = optree.tree_unflatten(structure, list(range(len(leaves))))
    assert optree.tree_leaves(numbered, namespace="curvlib") == list(range(len(leaves)))
    others, torch_structure = torch_pytree.tree_flatten(case.operator)
    assert {id(x) for x in leaves} == {id(x) for x in others}
    copy = torch_pytree.tree_unflatten(others, torch_structure)
    assert torch.equal(copy.to_dense(), case.operator.to_dense())
    single = case.operator.to(dtype=torch.float32)
    assert {x.dtype for x in tensors(single)} == {torch.float32}
    assert_close(single.to_dense().double(), case.dense, 1e-4)
    assert flat(single.inverse(0.3).diag()).dtype == torch.float32


def transforms_compose(case: Case) -> None:
    stack = case.vector(stacked=3)
    product = torch.func.vmap(lambda v: case.operator @ v)(stack)
    assert_close(flat(product, stacked=True), flat(stack, stacked=True) @ case.dense)

    def everything(operator: Any, v: Any) -> tuple[Tensor, ...]:
        return (
            flat(operator @ v),
            flat(operator.inverse(0.3) @ v),
            flat(operator.inverse(FactoredTikhonov(0.3)) @ v),
            flat(operator.inverse(RelativeTikhonov(0.2)) @ v),
            flat(operator.power(-0.5) @ v),
            operator.logdet(),
        )

    doubled = torch_pytree.tree_map(lambda x: 2 * x, case.operator)
    both = torch_pytree.tree_map(lambda a, b: torch.stack([a, b]), case.operator, doubled)
    mapped = torch.func.vmap(everything)(both, case.vector(stacked=2))
    v = torch_pytree.tree_map(lambda x: x[1], case.vector(stacked=2))
    for actual, expected in zip(mapped, everything(doubled, v), strict=True):
        assert_close(actual[1], expected)
    traced = make_fx(everything)(case.operator, case.vector())
    for actual, expected in zip(traced(doubled, v), everything(doubled, v), strict=True):
        assert_close(actual, expected)


def gradients_are_the_dense_ones(case: Case) -> None:
    v, w = case.vector(1), case.vector(2)
    shift = 0.2 * torch.eye(len(case.dense), dtype=torch.float64)
    pairs = [
        (lambda op: flat(w) @ flat(op @ v), lambda op: flat(w) @ op.to_dense() @ flat(v)),
        (lambda op: op.damp(0.2).logdet(), lambda op: torch.logdet(op.to_dense() + shift)),
    ]
    for by_operator, by_matrix in pairs:
        actual, expected = (torch.func.grad(fn)(case.operator) for fn in (by_operator, by_matrix))
        for a, b in zip(tensors(actual), tensors(expected), strict=True):
            symmetric = (a + a.mT, b + b.mT) if a.ndim > 1 and a.shape[-1] == a.shape[-2] else (a, b)
            assert float((symmetric[0] - symmetric[1]).norm()) <= 1e-8 * max(float(b.norm()), 1.0)


def nothing_is_changed(case: Case) -> None:
    before = [x.clone() for x in tensors(case.operator)]
    versions = [x._version for x in tensors(case.operator)]
    state = torch.get_rng_state()
    for damping in (0.1, FactoredTikhonov(0.1, relative=True)):
        case.operator.inverse(damping).matvec(case.vector())
        case.operator.power(-0.5, damping).sample(generator(0), 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(tensors(case.operator), before, strict=True))
    assert [x._version for x in tensors(case.operator)] == versions
