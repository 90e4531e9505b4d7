"""Matrix-free curvature operators, against dense automatic differentiation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import KINDS, few, generator, normal, problem, reductions, seeds
from hypothesis import given
from hypothesis import strategies as st
from layer_zoo import ZOO, checkpointed
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlib as cv
from curvlib.errors import ArgumentError, EmptyBatchError, PytreeError, TargetError
from curvlib.estimators import MatrixFree, fisher, ggn, gramian, hessian, jacobian

EXACT = 1e-10
every_kind = st.sampled_from([*KINDS])
modes = pytest.mark.parametrize("mode", ["forward", "reverse"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(kind: str = "cross-entropy", reduction: str = "mean", seed: int = 0) -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return problem(model, normal(seed, 5, 3), kind, reduction, seed=seed)


def dense_hessian(case: Any) -> Tensor:
    """torch.func.hessian of torch's loss, in the order of ravel."""
    inputs, targets = case.batch

    def value(vector: Tensor) -> Tensor:
        return case.kind.objective(case.model_fn(cv.unravel(vector, case.params), inputs), targets, case.reduction)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.hessian(value)(cv.ravel(case.params))


def dense_jacobian(model_fn: Any, params: Any, inputs: Any) -> Tensor:
    return reference.jacobians(model_fn, params, inputs).flatten(0, 1)


def drawn_fisher(case: Any, vectors: Tensor) -> Tensor:
    """The sum over examples and draws of g g^T with g = J_n^T s_nm, reduced."""
    jacobians = reference.jacobians(case.model_fn, case.params, case.batch[0])  # [N, K, D]
    g = torch.einsum("nkd,mnk->mnd", jacobians, vectors.flatten(2)).flatten(0, 1)
    outputs = case.model_fn(case.params, case.batch[0])
    return g.mT @ g / reference.divisor(outputs, case.batch[1], case.kind.objective, case.reduction)


def assert_close(estimate: Tensor, truth: Tensor, tolerance: float = EXACT) -> None:
    assert reference.relative_error(estimate, truth) <= tolerance


# --- each operator is the matrix it is named after ----------------------------------------------------------------


@few
@given(kind=every_kind, reduction=reductions, seed=seeds)
def test_ggn_and_type_2_fisher_are_the_ggn(kind: str, reduction: str, seed: int) -> None:
    case = mlp(kind, reduction, seed)
    loss = case.kind.loss(reduction)
    assert_close(ggn(case.model_fn, case.params, case.batch, loss=loss).to_dense(), case.ggn())
    assert_close(fisher(case.model_fn, case.params, case.batch, loss=loss, fisher="type-2").to_dense(), case.ggn())


@few
@given(kind=every_kind, reduction=reductions, seed=seeds)
def test_hessian_is_the_hessian(kind: str, reduction: str, seed: int) -> None:
    case = mlp(kind, reduction, seed)
    curv = hessian(case.model_fn, case.params, case.batch, loss=case.kind.loss(reduction))
    assert_close(curv.to_dense(), dense_hessian(case))


@few
@given(kind=every_kind, reduction=reductions, seed=seeds)
def test_empirical_fisher_is_the_second_moment_of_the_gradients(kind: str, reduction: str, seed: int) -> None:
    case = mlp(kind, reduction, seed)
    curv = fisher(case.model_fn, case.params, case.batch, loss=case.kind.loss(reduction), fisher="empirical")
    assert_close(curv.to_dense(), case.empirical_fisher())


@few
@given(kind=every_kind, reduction=reductions, seed=seeds, samples=st.integers(1, 3))
def test_mc_fisher_is_the_second_moment_of_its_draws(kind: str, reduction: str, seed: int, samples: int) -> None:
    case = mlp(kind, reduction, seed)
    loss = case.kind.loss(reduction)
    options: dict[str, Any] = {"fisher": "mc", "mc_samples": samples, "generator": generator(seed)}
    curv = fisher(case.model_fn, case.params, case.batch, loss=loss, **options)
    outputs = case.model_fn(case.params, case.batch[0])
    vectors = loss.sample(outputs, case.batch[1], generator(seed), samples)
    assert_close(curv.to_dense(), drawn_fisher(case, vectors))


@modes
@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_model_in_both_modes(name: str, mode: str) -> None:
    model = ZOO[name]()
    batch = model.batch()
    arguments: Any = (model.model_fn, model.params, batch)
    J = dense_jacobian(model.model_fn, model.params, model.inputs)
    exact = reference.ggn(*arguments, reference.cross_entropy, "mean")
    assert_close(ggn(*arguments, mode=mode).to_dense(), exact)
    assert_close(gramian(*arguments, mode=mode).to_dense(), J.mT @ J)
    linear = jacobian(model.model_fn, model.params, model.inputs, mode=mode)
    assert_close(linear.to_dense(), J)
    curv = hessian(*arguments, mode=mode)

    def gradient(params: Any) -> Tensor:
        return cv.ravel(
            torch.func.grad(lambda p: F.cross_entropy(model.model_fn(p, batch[0]).movedim(-1, 1), batch[1]))(params)
        )

    with sdpa_kernel(SDPBackend.MATH):
        columns = reference.rows(torch.func.jacrev(gradient)(model.params), curv.domain.size)
    assert_close(curv.to_dense(), columns)


# --- how products are taken ---------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("make", [ggn, hessian, fisher, gramian])
def test_stacked_products_are_the_products_one_by_one(make: Callable[..., MatrixFree], mode: str) -> None:
    case = mlp()
    curv = make(case.model_fn, case.params, case.batch, mode=mode)
    stack = {name: normal(3, 4, *leaf.shape) for name, leaf in case.params.items()}
    one_by_one = torch.stack([cv.ravel(curv @ reference.example_of(stack, k)) for k in range(4)])
    assert_close(reference.rows(curv.matmat(stack), 4), one_by_one)
    by_vmap = torch.func.vmap(curv.matvec)(stack)
    assert_close(reference.rows(by_vmap, 4), one_by_one)
    narrow = dataclasses.replace(curv, width=3)
    assert_close(reference.rows(narrow.matmat(stack), 4), one_by_one)
    assert curv.width >= 4


def test_drawn_targets_are_those_of_an_operator_made_outside_where_one_is_made_in_a_transform() -> None:
    case = mlp()
    options: dict[str, Any] = {"fisher": "mc", "mc_samples": 2}
    outside = fisher(case.model_fn, case.params, case.batch, **options)

    def image(factor: Tensor) -> Tensor:
        return cv.ravel(fisher(case.model_fn, case.params, case.batch, **options) @ {
            name: factor * leaf for name, leaf in case.params.items()
        })  # fmt: skip

    _, tangent = torch.func.jvp(image, (torch.ones((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))
    assert_close(tangent, cv.ravel(outside @ case.params))


def test_stacked_vectors_share_one_forward_pass() -> None:
    case, calls = mlp(), []

    def model_fn(params: Any, inputs: Any) -> Tensor:
        calls.append(1)
        return case.model_fn(params, inputs)

    curv = ggn(model_fn, case.params, case.batch)
    calls.clear()
    curv.to_dense()
    assert len(calls) == 1


@pytest.mark.parametrize("make", [ggn, hessian, gramian])
def test_products_can_be_traced(make: Callable[..., MatrixFree]) -> None:
    case = mlp()

    def product(params: Any, v: Any) -> Any:
        return make(case.model_fn, params, case.batch) @ v

    v = {name: normal(3, *leaf.shape) for name, leaf in case.params.items()}
    other = {name: normal(4, *leaf.shape) for name, leaf in case.params.items()}
    traced = make_fx(product)(other, v)
    assert_close(cv.ravel(traced(case.params, v)), cv.ravel(product(case.params, v)))


class Cube(torch.autograd.Function):
    """An old-style function: no forward mode, and none of torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3 * ctx.saved_tensors[0] ** 2


def test_models_without_forward_mode_are_differentiated_backwards_twice() -> None:
    def model(cube: Callable[[Tensor], Tensor]) -> reference.ModelFn:
        return lambda p, x: cube(x @ p["w"]) @ p["v"]

    shapes = {"w": torch.zeros(3, 4), "v": torch.zeros(4, 2)}
    case = problem(model(lambda x: x**3), normal(1, 5, 3), "cross-entropy", "mean", params=shapes)
    for make, truth in ((ggn, case.ggn()), (hessian, dense_hessian(case))):
        curv = make(model(Cube.apply), case.params, case.batch)
        assert curv.mode == "reverse"
        assert_close(curv.to_dense(), truth)


def test_activation_checkpointing_is_differentiated_backwards_twice() -> None:
    shapes = {"w": torch.zeros(3, 4), "b": torch.zeros(4), "v": torch.zeros(4, 2)}
    case = problem(checkpointed, normal(1, 5, 3), "cross-entropy", "mean", params=shapes)
    plain = problem(
        lambda p, x: torch.tanh(x @ p["w"] + p["b"]) @ p["v"], case.batch[0], "cross-entropy", "mean", params=shapes
    )
    assert_close(ggn(checkpointed, case.params, case.batch).to_dense(), plain.ggn())
    assert_close(hessian(checkpointed, case.params, case.batch).to_dense(), dense_hessian(plain))


class Double(torch.autograd.Function):
    """Has forward and reverse mode, but no rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return 2 * tangents[0]


def test_models_that_cannot_be_run_for_stacked_vectors_are_run_for_one_at_a_time() -> None:
    case = mlp()
    curv = ggn(lambda p, x: Double.apply(case.model_fn(p, x)) / 2, case.params, case.batch)
    assert (curv.mode, curv.width) == ("forward", 1)
    assert_close(curv.to_dense(), case.ggn())


# --- whole data sets ----------------------------------------------------------------------------------------------


def loader(case: Any) -> cv.gradients.DataSet:
    inputs, targets = case.batch
    return cv.over([(inputs[:2], targets[:2]), (inputs[2:3], targets[2:3]), (inputs[3:], targets[3:])])


@few
@given(kind=every_kind, reduction=reductions, seed=seeds)
def test_a_data_set_gives_what_one_batch_gives(kind: str, reduction: str, seed: int) -> None:
    case = mlp(kind, reduction, seed)
    loss = case.kind.loss(reduction)
    for make, options in ((ggn, {}), (hessian, {}), (fisher, {"fisher": "empirical"})):
        whole = make(case.model_fn, case.params, case.batch, loss=loss, **options)
        parts = make(case.model_fn, case.params, loader(case), loss=loss, **options)
        assert_close(parts.to_dense(), whole.to_dense())
    parts = gramian(case.model_fn, case.params, loader(case))
    assert_close(parts.to_dense(), gramian(case.model_fn, case.params, case.batch).to_dense())


def test_every_walk_through_a_data_set_draws_the_same_targets_and_other_operators_draw_others() -> None:
    case, source = mlp(), generator(1)
    first, second = (fisher(case.model_fn, case.params, loader(case), generator=source) for _ in range(2))
    assert torch.equal(first.to_dense(), first.to_dense())
    assert not torch.equal(first.to_dense(), second.to_dense())
    dense = first.to_dense()
    assert_close(dense, dense.mT)


def test_data_that_cannot_be_walked_through_again_are_refused() -> None:
    case = mlp()
    with pytest.raises(ArgumentError, match="read only once"):
        ggn(case.model_fn, case.params, cv.over(iter([case.batch])))
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*case.batch), 2, shuffle=True)
    with pytest.raises(ArgumentError, match="random order"):
        fisher(case.model_fn, case.params, cv.over(shuffled))
    assert_close(ggn(case.model_fn, case.params, cv.over(shuffled)).to_dense(), case.ggn())
    with pytest.raises(EmptyBatchError):
        ggn(case.model_fn, case.params, cv.over([]))


def test_the_structures_of_operators_on_streamed_data_are_told_apart_by_the_walk_and_not_by_values() -> None:
    case = mlp()
    operators = [ggn(case.model_fn, case.params, loader(case)) for _ in range(2)]
    first, second = (cv.pytree.flatten(operator)[1] for operator in operators)
    again = cv.pytree.flatten(operators[0])[1]
    assert first == again
    assert hash(first) == hash(again)
    assert first != second  # each reads batches of its own, though their values agree


def test_wrong_arguments_are_refused_when_the_operator_is_made() -> None:
    case = mlp()
    inputs, targets = case.batch
    for make in (ggn, hessian, fisher):
        with pytest.raises(TargetError):
            make(case.model_fn, case.params, (inputs, targets[:3]))
        with pytest.raises(ArgumentError, match="mode"):
            make(case.model_fn, case.params, case.batch, mode="backward")
    with pytest.raises(ArgumentError, match="fisher"):
        fisher(case.model_fn, case.params, case.batch, fisher="forward-only")
    with pytest.raises(PytreeError):
        ggn(case.model_fn, case.params, case.batch) @ {"w": torch.zeros(3)}


REST_TO_COMPILE = [(ggn, "reverse"), (hessian, "forward"), (gramian, "forward"), (gramian, "reverse")]


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (ggn, "forward"),
        (hessian, "reverse"),
        *(pytest.param(make, mode, marks=pytest.mark.slow) for make, mode in REST_TO_COMPILE),
    ],
)
def test_products_compile_into_one_graph(make: Callable[..., MatrixFree], mode: str) -> None:
    case = mlp()
    curv = make(case.model_fn, case.params, case.batch, mode=mode)
    compiled = torch.compile(lambda v: curv.matvec(v), backend="eager", fullgraph=True)
    torch.compiler.reset()
    assert_close(cv.ravel(compiled(case.params)), cv.ravel(curv @ case.params))
