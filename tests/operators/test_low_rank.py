"""Low-rank sides with an isotropic remainder: the full algebra against dense twins, and its memory."""

from __future__ import annotations

import math
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from curvlib.errors import ShapeError, SingularError
from curvlib.operators import (
    Damping,
    EigenKronecker,
    FactoredTikhonov,
    Kronecker,
    LowRank,
    Matrix,
    RelativeTikhonov,
    ScaledIdentity,
    Sum,
    sketch,
)
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import (
    Block,
    Case,
    Draw,
    Random,
    Terms,
    assert_close,
    assert_number,
    conjugated,
    every_damping,
    generator,
    matrix_function,
    side,
    tensor_case,
)

KINDS = ("matrix", "groups", "two low-rank sides", "one low-rank side", "groups of products", "eigen grid", "sum")
OTHERS = ("dense", "diagonal", "scaled identity", "eigen", "canonical eigen")

every_kind = pytest.mark.parametrize("kind", KINDS)
moderately = settings(deadline=None, max_examples=4)


def low_rank(shape: tuple[int, ...], rank: int, random: Random) -> tuple[LowRank, Tensor]:
    """A matrix on vectors [*, d], and its dense twin [*, d, d]."""
    *front, width = shape
    q = random.orthogonal(*shape)
    values, remainder = random.positive(*front, rank), random.positive(*front, 1)
    everything = torch.cat([values, remainder.expand(*front, width - rank)], -1)
    return LowRank(q[..., :rank].contiguous(), values, remainder[..., 0]), conjugated(q, everything)


@st.composite
def low_rank_sides(draw: Draw, front: tuple[int, ...], random: Random) -> tuple[Matrix, Tensor]:
    width = draw(st.integers(2, 5))
    return low_rank((*front, width), draw(st.integers(1, width - 1)), random)


def product(left: tuple[Matrix, Tensor], right: tuple[Matrix, Tensor], groups: int) -> Block:
    g, a = (dense.expand(max(groups, 1), *dense.shape[-2:]) for _, dense in (left, right))
    sides = tuple((x.contiguous(), y.contiguous()) for x, y in zip(g, a, strict=True))
    return Kronecker(left[0], right[0]), torch.block_diag(*(torch.kron(x, y) for x, y in sides)), sides


@st.composite
def cases(draw: Draw, kind: str) -> Case:
    random = Random(generator(draw(st.integers(0, 2**31))))
    low = draw(low_rank_sides((2,) if kind in ("groups", "groups of products") else (), random))
    match kind:
        case "matrix" | "groups":
            matrices = low[1].reshape(-1, *low[1].shape[-2:])
            return tensor_case((low[0], torch.block_diag(*matrices), None))
        case "two low-rank sides":
            return tensor_case(product(low, draw(low_rank_sides((), random)), 0))
        case "one low-rank side" | "groups of products":
            front = draw(st.sampled_from([(), (2,)])) if kind == "groups of products" else ()
            other = side(draw(st.sampled_from(OTHERS)), (*front, draw(st.integers(1, 4))), random)
            pair = (low, other) if draw(st.booleans()) else (other, low)
            return tensor_case(product(*pair, 2 if kind == "groups of products" else 0))
        case "eigen grid":
            right = draw(low_rank_sides((), random))
            bases = low[0].eigen().basis, right[0].eigen().basis
            values = random.positive(low[0].values.shape[-1] + 1, right[0].values.shape[-1] + 1)
            # the projectors onto every eigenspace of a side, made from the dense twins alone
            p, q = (projectors(matrix, twin) for matrix, twin in (low, right))
            dense = sum(values[i, j] * torch.kron(x, y) for i, x in enumerate(p) for j, y in enumerate(q))
            return tensor_case((EigenKronecker(*bases, values), dense, None))
    terms = [product(low, low_rank((3,), rank, random), 0) for rank in (1, 2)]
    members = Terms(tuple((dense, sides) for _, dense, sides in terms))
    return tensor_case((Sum(tuple(term[0] for term in terms)), terms[0][1] + terms[1][1], members))


def projectors(matrix: LowRank, dense: Tensor) -> list[Tensor]:
    ranges = [torch.outer(u, u) for u in matrix.vectors.mT]
    return [*ranges, torch.eye(len(dense), dtype=torch.float64) - torch.stack(ranges).sum(0)]


@every_kind
@moderately
@given(data=st.data())
def test_products_are_the_twins(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    assert_close(case.operator.to_dense(), case.dense)
    assert_close(flat(case.operator @ case.vector()), case.dense @ flat(case.vector()))
    stack = case.vector(stacked=3)
    assert_close(flat(case.operator.matmat(stack), stacked=True), flat(stack, stacked=True) @ case.dense)
    assert_close((2.0 * case.operator).to_dense(), 2 * case.dense)


@every_kind
@moderately
@given(data=st.data(), inverted=st.booleans())
def test_everything_that_is_read_off_is_the_twins(kind: str, data: st.DataObject, inverted: bool) -> None:
    case = data.draw(cases(kind))
    operator = case.operator.inverse(0.3) if inverted else case.operator
    dense = torch.linalg.inv(case.damped(0.3)) if inverted else case.dense
    assert_close(flat(operator.diag()), dense.diagonal())
    assert_number(operator.trace(), dense.trace())
    assert_number(operator.frobenius_norm(), dense.norm())
    assert_close(operator.eigenvalues(), torch.linalg.eigvalsh(dense))
    assert_number(operator.logdet(), torch.linalg.slogdet(dense)[1])


@every_kind
@every_damping
@moderately
@given(data=st.data())
def test_powers_and_inverses_are_the_twins_with_every_damping(
    kind: str, damping: Damping | float, data: st.DataObject
) -> None:
    case = data.draw(cases(kind))
    assert_close(case.operator.damp(damping).to_dense(), case.damped(damping))
    for exponent in (-1, -0.5, 0, 1.5):
        expected = matrix_function(case.damped(damping), lambda x, p=exponent: x**p)
        power = case.operator.power(exponent, damping)
        assert_close(power.to_dense(), expected)
        assert_close(flat(power @ case.vector()), expected @ flat(case.vector()))
    mapped = case.operator.map_eigenvalues(lambda x: x / (x + 0.5))
    assert_close(mapped.to_dense(), matrix_function(case.dense, lambda x: x / (x + 0.5)))


@every_kind
@moderately
@given(data=st.data())
def test_samples_have_the_operator_as_covariance(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    n = 20_000
    draws = flat(case.operator.sample(generator(1), n), stacked=True)
    spread = math.sqrt(float(case.dense.trace() ** 2 + case.dense.norm() ** 2) / n)
    assert float((draws.mT @ draws / n - case.dense).norm()) <= 6 * spread
    assert case.operator.sample(generator(1)).shape == case.operator.domain.shapes[0]


@pytest.mark.parametrize("other", ["low rank", *OTHERS])
@moderately
@given(data=st.data(), shared=st.booleans())
def test_the_algebra_of_sides_is_the_twins(other: str, data: st.DataObject, shared: bool) -> None:
    random = Random(generator(data.draw(st.integers(0, 2**31))))
    one, m = low_rank((5,) if shared else (2, 5), 2, random)
    two, n = low_rank((2, 5), 3, random) if other == "low rank" else side(other, (2, 5), random)
    v = random.normal(2, 5, 3)
    assert_close(one.left(v), m @ v)
    assert_close(one.right(v.mT), v.mT @ m)
    assert_close(one.diag(), m.diagonal(dim1=-2, dim2=-1).clone())
    assert_close(one.traces(), m.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert_close(one.square_norms(), m.square().sum((-2, -1)))
    assert_close(one.inner(two), (m * n).sum((-2, -1)))
    assert_close(two.inner(one), (m * n).sum((-2, -1)))


@every_kind
@settings(deadline=None, max_examples=2)
@given(data=st.data())
def test_round_trips_transforms_and_traces(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    leaves, structure = optree.tree_flatten(case.operator, namespace="curvlib")
    assert torch.equal(optree.tree_unflatten(structure, leaves).to_dense(), case.operator.to_dense())
    numbers = optree.tree_unflatten(structure, list(range(len(leaves))))  # no validation may look at leaves
    assert optree.tree_leaves(numbers, namespace="curvlib") == list(range(len(leaves)))
    leaves, spec = torch_pytree.tree_flatten(case.operator)
    assert torch.equal(torch_pytree.tree_unflatten(leaves, spec).to_dense(), case.operator.to_dense())

    def everything(operator: Any, v: Any) -> tuple[Tensor, ...]:
        factored = operator.inverse(FactoredTikhonov(0.3)) @ v
        relative = operator.inverse(RelativeTikhonov(0.3)) @ v
        return (
            operator @ v,
            operator.inverse(0.3) @ v,
            factored,
            relative,
            operator.trace(),
            operator.damp(0.1).logdet(),
        )

    stacked = torch_pytree.tree_map(lambda x: torch.stack([x, x]), case.operator)
    v = case.vector(stacked=2)
    batched = torch.func.vmap(everything)(stacked, v)
    traced = make_fx(everything)(case.operator, case.vector())
    for i in range(2):
        for result, again, one in zip(
            batched, traced(case.operator, v[i]), everything(case.operator, v[i]), strict=True
        ):
            assert float((result[i] - one).norm()) <= 1e-10 * max(1.0, float(one.norm()))
            assert float((again - one).norm()) <= 1e-10 * max(1.0, float(one.norm()))


def test_gradients_of_eigenvalues_are_those_of_the_dense_matrix() -> None:
    curv = product(low_rank((4,), 2, Random(generator(0))), low_rank((3,), 1, Random(generator(1))), 0)[0]
    for fn in (lambda op: op.damp(0.2).logdet(), lambda op: torch.logdet(op.damp(0.2).to_dense())):
        gradient = torch.func.grad(fn)(curv)
        mu, nu = curv.left.joined(), curv.right.joined()
        weights = torch.outer(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2])) / (torch.outer(mu, nu) + 0.2)
        expected = (weights * nu).sum(1)
        assert_close(torch.cat([gradient.left.values, gradient.left.remainder[None]]), expected)


# --- memory -------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest storage that any call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch_pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def wide(width: int, rank: int, seed: int) -> LowRank:
    random = Random(generator(seed))
    return LowRank(torch.linalg.qr(random.normal(width, rank))[0], random.positive(rank), random.positive(1)[0])


def test_no_method_makes_a_matrix_as_large_as_a_wide_side() -> None:
    width, rank, other = 400, 3, 4
    curv = Kronecker(wide(width, rank, 0), wide(other, 2, 1))
    total = curv + Kronecker(wide(width, rank, 2), wide(other, 1, 3))
    mixed = Sum((curv, Kronecker(ScaledIdentity(curv.trace(), (width,)), wide(other, 1, 3))))
    v = torch.ones(width, other, dtype=torch.float64)
    few = sketch(v, rank=5)
    with LargestTensor() as largest:
        for damping in (0.1, FactoredTikhonov(0.1), RelativeTikhonov(0.1)):
            damped = curv.damp(damping)
            for operator in (damped, damped._power(-1, damped=True), damped._power(-0.5, damped=True)):
                operator @ v, operator.diag(), operator.trace(), operator.logdet(), operator.frobenius_norm()
                operator.sample(generator(0))
        curv.inverse(0.1).eigenvalues(), curv.left.inverse().eigenvalues(), curv.left.inner(curv.left)
        curv.project(few)(v), curv.left.sample(generator(0), 3)
        for operator in (total, mixed):
            operator @ v, operator.frobenius_norm(), operator.diag(), operator.sample(generator(0))
        curv.left.updated(torch.ones(30, width, dtype=torch.float64), 0.9)
    assert largest.numel <= 30 * width  # the 30 rows of the update; a square has 400 times as many entries as a column


def test_joint_spectra_of_wide_sides_stay_on_the_coarse_grid() -> None:
    curv = Kronecker(wide(500, 2, 0), wide(400, 3, 1))
    with LargestTensor() as largest:
        inverse = curv.inverse(0.1)
        damped = curv.damp(0.1)
        damped.logdet(), damped.trace(), damped.frobenius_norm(), damped.map_eigenvalues(torch.exp), curv.logdet()
        curv.map_eigenvalues(torch.sqrt), curv.power(-0.5), inverse.trace(), inverse.logdet()
    assert isinstance(inverse, EigenKronecker)
    assert inverse.values.shape == (3, 4)
    assert largest.numel <= 12
    assert Kronecker(curv.left, side("dense", (5,), Random(generator(2)))[0]).damp(0.1).values.shape == (3, 5)


# --- errors -------------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="leave no remainder"):
        LowRank(torch.eye(2), torch.ones(2), torch.tensor(1.0))
    for values, remainder in ((torch.ones(2), torch.tensor(1.0)), (torch.ones(1), torch.ones(1))):
        with pytest.raises(ShapeError, match=r"\[\*, d, k\], \[\*, k\] and \[\*\]"):
            LowRank(torch.eye(3)[:, :1], values, remainder)


def test_without_a_remainder_there_is_no_inverse_without_damping() -> None:
    curv = LowRank(torch.eye(3)[:, :1].double(), torch.ones(1).double(), torch.tensor(0.0).double())
    assert curv.logdet() == -math.inf
    with pytest.raises(SingularError, match="damping"):
        curv.inverse()
    assert_close(curv.inverse(0.5).diag(), torch.tensor([1 / 1.5, 2.0, 2.0], dtype=torch.float64))
