"""TKFAC and Shampoo keep of a wide side what `wide` says: against dense moments of single examples' gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import KINDS, Problem, generator, normal, problem
from gradient_cases import relative_error, run, unfolding
from pairwise import every_pair
from reference import jacobians
from torch import Tensor, nn

import curvlib as cv
from curvlib.errors import ArgumentError
from curvlib.estimators import dykaf, kl_shampoo, shampoo
from curvlib.layers.wide import Wide
from curvlib.operators import BlockDiagonal, DenseBlocks, Diagonal, Kronecker, LowRank, ScaledIdentity, ScaledPower

CHOICES: dict[str, Callable[[int], Any]] = {
    "diagonal": cv.WideDiagonal,
    "low rank": lambda above: cv.WideLowRank(2, above=above),
    "blocks": lambda above: cv.WideBlocks(3, above=above),
    "identity": cv.WideIdentity,
}
every_choice = pytest.mark.parametrize("choice", CHOICES)
other_choices = pytest.mark.parametrize("choice", [name for name in CHOICES if name != "diagonal"])


def kept(matrices: Tensor, wide: Wide) -> Tensor:
    """What a choice keeps of matrices [*, d, d], made from all of them."""
    width = matrices.shape[-1]
    unit = torch.eye(width, dtype=matrices.dtype)
    if width <= wide.above:
        return matrices
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    match wide:
        case cv.WideDiagonal():
            return matrices * unit
        case cv.WideIdentity():
            return traces / width * unit
        case cv.WideBlocks(size=size):
            number = torch.arange(width) // size
            return matrices * (number[:, None] == number)
        case cv.WideLowRank(rank=rank):
            values, vectors = torch.linalg.eigh(matrices)
            top, u = values[..., -rank:], vectors[..., -rank:]
            rest = (traces - top.sum(-1)[..., None, None]) / (width - rank)
            return (u * top.unsqueeze(-2)) @ u.mT + rest * (unit - u @ u.mT)
    raise AssertionError(wide)


def running(parts: Sequence[Tensor], wide: Wide) -> Tensor:
    """The sum over batches, of which only what is kept is carried on."""
    total = kept(parts[0], wide)
    for part in parts[1:]:
        total = kept(total + kept(part, wide), wide)
    return total


# --- models, and gradients of single examples ---------------------------------------------------------------------

VOCABULARY = 7


def tied_model(p: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(F.embedding(x, p["table"]) @ p["inner"])
    return F.linear(hidden.sum(1), p["table"])


def case_of(model: str) -> Any:
    match model:
        case "net":
            return problem(
                nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)), normal(1, 7, 3), "ignored", "mean"
            )
        case "tokens":
            net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))
            return problem(net, normal(1, 7, 4, 3), "cross-entropy", "sum")
        case "groups":
            net = nn.Sequential(nn.Conv1d(4, 10, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
            return problem(net, normal(1, 7, 4, 4), "cross-entropy", "mean")
        case "embedding":
            net = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
            tokens = torch.randint(VOCABULARY, (7, 3), generator=generator(4))
            return problem(net, tokens, "cross-entropy", "mean")
        case "tied":
            tokens = torch.randint(VOCABULARY, (7, 3), generator=generator(4))
            params = {"table": normal(1, VOCABULARY, 5), "inner": normal(2, 5, 5)}
            return problem(tied_model, tokens, "cross-entropy", "mean", params=params)
    raise AssertionError(model)


MODELS = ("net", "tokens", "groups", "embedding", "tied")


def vectors_of(case: Any, batch: Any, fisher: str, source: torch.Generator) -> Tensor:
    """What is pulled back: [K, N, outputs of one example], with sums over K and N that are those of `fisher`."""
    inputs, targets = batch
    outputs = case.model_fn(case.params, inputs)
    loss = case.kind.loss(case.reduction)
    if fisher == "mc":  # the same draws
        return loss.sample(outputs, targets, source, 2).flatten(2)

    def own_loss(f: Tensor) -> Tensor:
        return case.kind.objective(f, targets, "sum")

    if fisher == "empirical":
        return torch.func.grad(own_loss)(outputs).flatten(1).unsqueeze(0)
    full = torch.func.hessian(own_loss)(outputs)
    blocks = torch.stack([full[n].movedim(outputs.ndim - 1, 0)[n].flatten() for n in range(len(outputs))])
    size = outputs[0].numel()
    values, vectors = torch.linalg.eigh(blocks.reshape(-1, size, size))
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).movedim(-1, 0)


def gradients_of(case: Any, curv: BlockDiagonal, batch: Any, fisher: str, source: torch.Generator) -> dict[str, Tensor]:
    """Every weight's gradients [K N, *groups, m, n], from Jacobians of one example at a time."""
    jacobian = jacobians(case.model_fn, case.params, batch[0])  # [N, outputs, D]
    rows = torch.einsum("kno,nod->knd", vectors_of(case, batch, fisher, source), jacobian).flatten(0, 1)
    trees = [cv.unravel(row, case.params) for row in rows]
    stacked = {name: torch.stack([tree[name] for tree in trees]) for name in case.params}
    found = curv.gather(stacked, 1)
    return {name: found[name] for name, block in curv.blocks.items() if isinstance(block, Kronecker)}


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    return list(zip(*(x.split(list(sizes)) for x in batch), strict=True))


def divisor(case: Any) -> float:
    return float((case.batch[1] != -100).sum()) if case.reduction == "mean" else 1.0


def expected_moments(
    case: Any, curv: BlockDiagonal, parts: Sequence[Any], fisher: str, wide: Wide
) -> dict[str, tuple[Tensor, Tensor]]:
    """L and R of every weight, over batches."""
    source = generator(5)
    found = [gradients_of(case, curv, batch, fisher, source) for batch in parts]
    count = divisor(case)
    return {
        name: (
            running([(d[name] @ d[name].mT).sum(0) for d in found], wide) / count,
            running([(d[name].mT @ d[name]).sum(0) for d in found], wide) / count,
        )
        for name in found[0]
    }


def trace_restricted(left: Tensor, right: Tensor) -> Tensor:
    """L (x) R / tr L, one block a group."""
    trace = left.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return Kronecker(cv.Dense(left), cv.Dense(right / trace)).to_dense()


@every_pair("model, fisher, sizes, choice", MODELS, ["type-2", "mc", "empirical"], [(7,), (3, 3, 1)], CHOICES)
def test_tkfac_keeps_what_it_says(model: str, fisher: str, sizes: tuple[int, ...], choice: str) -> None:
    case = case_of(model)
    loss = case.kind.loss(case.reduction)
    parts = split(case.batch, sizes)
    for above in (2, 5, 100):  # every side is wide; some are; none is
        wide = CHOICES[choice](above)
        curv = cv.tkfac(
            case.model_fn,
            case.params,
            cv.over(parts),
            loss=loss,
            fisher=fisher,
            mc_samples=2,
            generator=generator(5),
            wide=wide,
        )
        for name, (left, right) in expected_moments(case, curv, parts, fisher, wide).items():
            block = curv.blocks[name]
            assert isinstance(block, Kronecker)
            assert relative_error(block.left.matrices(), left) <= 1e-9
            assert relative_error(block.to_dense(), trace_restricted(left, right)) <= 1e-9


@every_pair("model, fisher, choice", MODELS, ["type-2", "empirical"], CHOICES)
def test_every_choice_keeps_tkfacs_trace(model: str, fisher: str, choice: str) -> None:
    case = case_of(model)
    loss = case.kind.loss(case.reduction)
    truth = cv.fisher(case.model_fn, case.params, case.batch, loss=loss, fisher=fisher).diag()
    wide = CHOICES[choice](2)
    curv = cv.tkfac(case.model_fn, case.params, case.batch, loss=loss, fisher=fisher, wide=wide)
    layouts = dict(curv.layouts)
    for name, block in curv.blocks.items():
        expected = layouts[name].gather([truth[key] for key in sorted(truth)]).sum()
        torch.testing.assert_close(block.trace(), expected, rtol=1e-10, atol=0)


@every_pair("model, squared, engine, choice", MODELS, [False, True], ["functional", "autograd"], CHOICES)
def test_shampoo_of_examples_keeps_what_it_says(model: str, squared: bool, engine: str, choice: str) -> None:
    case = case_of(model)
    parts = split(case.batch, (4, 3))
    for above in (2, 5, 100):
        wide = CHOICES[choice](above)
        curv = shampoo(
            case.model_fn,
            case.params,
            cv.over(parts),
            loss=case.kind.loss(case.reduction),
            per_example=True,
            squared=squared,
            wide=wide,
            engine=engine,
        )
        for name, (left, right) in expected_moments(case, curv, parts, "empirical", wide).items():
            block = curv.blocks[name]
            assert relative_error(block.left.base.matrices(), left) <= 1e-9
            assert relative_error(block.right.base.matrices(), right) <= 1e-9
            if squared:
                assert relative_error(block.to_dense(), trace_restricted(left, right)) <= 1e-9


@every_pair("model, squared, choice", MODELS, [False, True], CHOICES)
def test_shampoo_of_objectives_keeps_what_it_says(model: str, squared: bool, choice: str) -> None:
    case = case_of(model)
    parts = split(case.batch, (2, 4, 1))
    loss = case.kind.loss(case.reduction)
    parts = [(x, y) for x, y in parts if bool((y != -100).any())]
    for above in (2, 5):
        wide = CHOICES[choice](above)
        curv = shampoo(case.model_fn, case.params, cv.over(parts), loss=loss, squared=squared, wide=wide)
        gradients = [
            curv.gather(
                torch.func.grad(lambda p, b=batch: case.kind.objective(case.model_fn(p, b[0]), b[1], case.reduction))(
                    case.params
                ),
                0,
            )
            for batch in parts
        ]
        for name, block in curv.blocks.items():
            if not isinstance(block, Kronecker):
                continue
            stream = [d[name] for d in gradients]
            for side, moment in ((block.left, lambda d: d @ d.mT), (block.right, lambda d: d.mT @ d)):
                expected = average([moment(d) for d in stream], wide)
                assert isinstance(side, ScaledPower)
                assert relative_error(side.base.matrices(), expected) <= 1e-9


def average(parts: Sequence[Tensor], wide: Wide) -> Tensor:
    """The mean over batches, of which only what is kept is carried on."""
    mean = kept(parts[0], wide)
    for t, part in enumerate(parts[1:], 1):
        mean = kept(t / (t + 1) * mean + kept(part, wide) / (t + 1), wide)
    return mean


# --- from gradients ------------------------------------------------------------------------------------------------


def grads(seed: int) -> dict[str, Tensor]:
    """The first axis of the tensor is wide, as are its matrix's second and the vector."""
    return {"matrix": normal(seed, 4, 7), "tensor": normal(seed + 1, 6, 3, 4), "vector": normal(seed + 2, 8)}


@every_pair("squared, decay, choice", [False, True], [None, 0.0, 0.9, 1.0], CHOICES)
def test_updates_keep_what_they_say(squared: bool, decay: float | None, choice: str) -> None:
    wide, stream = CHOICES[choice](4), [grads(10 * t) for t in range(4)]
    curv = run(shampoo, stream, decay, squared=squared, elementwise="dense", wide=wide)
    old, new = (1.0, 1.0) if decay is None else (decay, 1 - decay)
    for name in ("matrix", "tensor", "vector"):
        block = curv.blocks[name]
        factors = [block] if name == "vector" else [curv_side.base for curv_side in modes(block)]
        for axis, factor in enumerate(factors):
            parts = [unfolding(g[name], axis) @ unfolding(g[name], axis).mT for g in stream]
            expected = kept(parts[0], wide)
            for part in parts[1:]:
                expected = kept(old * expected + new * kept(part, wide), wide)
            assert relative_error(factor.matrices(), expected) <= 1e-9


def modes(block: Any) -> list[Any]:
    return [block.left, *(block.right.factors if hasattr(block.right, "factors") else (block.right,))]


@every_choice
def test_the_factors_are_of_the_form_that_was_asked_for(choice: str) -> None:
    forms = {"diagonal": Diagonal, "low rank": LowRank, "blocks": DenseBlocks, "identity": ScaledIdentity}
    curv = run(shampoo, [grads(1), grads(2)], 0.9, elementwise="dense", wide=CHOICES[choice](6))
    assert type(curv.blocks["vector"]) is forms[choice]
    assert [type(side.base) for side in modes(curv.blocks["matrix"])] == [cv.Dense, forms[choice]]
    assert [type(side.base) for side in modes(curv.blocks["tensor"])] == [cv.Dense] * 3


@pytest.mark.parametrize("axis", [1, 2])
def test_low_rank_factors_of_tensors_are_refused_but_for_the_first(axis: int) -> None:
    gradient = {"w": normal(0, 3, 3, 3).repeat_interleave(2, axis)}
    with pytest.raises(ArgumentError, match=r"block 'w': a tensor of order 3 .*or keep WideBlocks"):
        shampoo.init(gradient, wide=cv.WideLowRank(2, above=4))
    for choice in ("diagonal", "blocks", "identity"):
        v = shampoo.init(gradient, wide=CHOICES[choice](4)).inverse(0.1) @ gradient
        assert bool(v["w"].isfinite().all())


@every_choice
def test_a_narrower_side_is_what_it_was(choice: str) -> None:
    stream = [grads(t) for t in range(3)]
    plain, curv = (run(shampoo, stream, 0.5, wide=wide) for wide in (cv.WideDiagonal(), CHOICES[choice](8)))
    assert torch.equal(plain.to_dense(), curv.to_dense())


@other_choices
def test_a_scaled_curvature_goes_on_from_scaled_moments(choice: str) -> None:
    wide, first, second = CHOICES[choice](4), grads(1), grads(2)
    for squared in (False, True):
        curv = shampoo.update(3.0 * shampoo.init(first, squared=squared, wide=wide), second, 0.5)
        scaled = {name: 3.0**0.5 * x for name, x in first.items()}
        expected = shampoo.update(shampoo.init(scaled, squared=squared, wide=wide), second, 0.5)
        for name in ("matrix", "tensor"):
            for a, b in zip(modes(curv.blocks[name]), modes(expected.blocks[name]), strict=True):
                assert relative_error(a.base.matrices(), b.base.matrices()) <= 1e-9


@every_choice
def test_the_algebra_works_on_factors_from_gradients(choice: str, tmp_path: Any) -> None:
    curv = run(shampoo, [grads(t) for t in range(30)], None, elementwise="dense", wide=CHOICES[choice](4))
    v, dense = grads(99), curv.to_dense()
    identity, order = torch.eye(len(dense), dtype=torch.float64), cv.ravel(grads(99))
    assert relative_error(cv.ravel(curv @ v), dense @ order) <= 1e-9
    assert relative_error(cv.ravel(curv.inverse(0.1) @ v), torch.linalg.solve(dense + 0.1 * identity, order)) <= 1e-9
    values, vectors = torch.linalg.eigh(dense + 0.1 * identity)
    assert relative_error(cv.ravel(curv.power(-0.5, 0.1) @ v), (vectors * values**-0.5) @ vectors.mT @ order) <= 1e-9
    assert relative_error(curv.trace(), dense.trace()) <= 1e-10
    cv.save(curv, tmp_path / "curv.safetensors")
    again = shampoo.update(cv.load(tmp_path / "curv.safetensors"), v, 0.9)
    assert torch.equal(again.to_dense(), shampoo.update(curv, v, 0.9).to_dense())


@other_choices
@pytest.mark.parametrize("how", [kl_shampoo, dykaf], ids=["kl-shampoo", "dykaf"])
def test_coupled_factors_refuse_what_their_steps_cannot_keep(how: Any, choice: str) -> None:
    case, wide = case_of("net"), CHOICES[choice](4)
    loss = case.kind.loss(case.reduction)
    calls = [
        lambda: how.init(grads(1), wide=wide),
        lambda: how(case.model_fn, case.params, case.batch, loss=loss, wide=wide),
        lambda: how(case.model_fn, case.params, case.batch, loss=loss, wide=wide, per_example=True),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=r"wide must be a WideDiagonal, got Wide.*shampoo take every choice"):
            call()


# --- scales, shifts and lone biases -------------------------------------------------------------------------------


@every_choice
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_dense_blocks_of_scales_and_shifts_keep_what_they_say(fisher: str, choice: str) -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x * p["scale"]) @ p["w"]

    params = {"scale": normal(1, 7), "w": normal(2, 7, 3)}
    case = problem(model_fn, normal(3, 6, 7), "cross-entropy", "mean", params=params)
    exact = case.ggn() if fisher == "type-2" else case.empirical_fisher()
    for above in (4, 7):
        wide = CHOICES[choice](above)
        for parts in ([case.batch], split(case.batch, (6,))):
            curv = cv.kfac(case.model_fn, case.params, cv.over(parts), fisher=fisher, elementwise="dense", wide=wide)
            assert relative_error(curv.blocks["scale"].to_dense(), kept(exact[:7, :7], wide)) <= 1e-9


def test_an_embeddings_moment_is_whole_where_examples_have_several_tokens() -> None:
    case = case_of("embedding")
    curv = cv.tkfac(case.model_fn, case.params, case.batch, fisher="empirical")
    right = curv.blocks["0.weight"].right.matrices()
    assert float((right - torch.diag(right.diagonal())).norm()) > 0.1 * float(right.norm())
    net = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Tanh(), nn.Linear(6, 3))
    one = problem(net, case.batch[0][:, 0], "mse", "mean")
    side = cv.tkfac(one.model_fn, one.params, one.batch, loss=cv.MSE()).blocks["0.weight"].right
    assert isinstance(side, Diagonal)  # of one token it is diagonal


def test_batches_of_one_token_and_of_several_add_up() -> None:
    params = {"table": normal(1, VOCABULARY, 4)}

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.embedding(x, p["table"]).sum(1)

    tokens = torch.randint(VOCABULARY, (6, 3), generator=generator(2))
    targets = torch.arange(6) % 4
    parts = [(tokens[:4], targets[:4]), (tokens[4:, :1], targets[4:])]
    case = Problem(model_fn, params, (tokens, targets), KINDS["cross-entropy"], "mean")
    for batches in (parts, parts[::-1]):
        curv = cv.tkfac(model_fn, params, cv.over(batches), fisher="empirical")
        [(left, right)] = expected_moments(case, curv, batches, "empirical", cv.WideDiagonal()).values()
        assert relative_error(curv.blocks["table"].to_dense(), trace_restricted(left, right)) <= 1e-10


@every_choice
@pytest.mark.parametrize("how", [cv.kfac, cv.ekfac, cv.tkfac])
def test_groups_of_wide_sides_have_the_algebra(how: Any, choice: str) -> None:
    case = case_of("groups")
    curv = how(case.model_fn, case.params, case.batch, fisher="type-2", wide=CHOICES[choice](4))
    if how is cv.kfac:
        dense, block = case.kfac().blocks["0.weight"], curv.blocks["0.weight"]
        assert relative_error(block.left.matrices(), kept(dense.left.matrices(), CHOICES[choice](4))) <= 1e-9
        assert relative_error(block.right.matrices(), kept(dense.right.matrices(), CHOICES[choice](4))) <= 1e-9
    matrix, v = curv.to_dense(), cv.ravel(case.params)
    unit = torch.eye(len(matrix), dtype=torch.float64)
    solved = torch.linalg.solve(matrix + 0.1 * unit, v)
    assert relative_error(cv.ravel(curv @ case.params), matrix @ v) <= 1e-10
    assert relative_error(cv.ravel(curv.inverse(0.1) @ case.params), solved) <= 1e-9
    assert relative_error(curv.damp(0.1).logdet(), torch.logdet(matrix + 0.1 * unit)) <= 1e-10
    assert relative_error(cv.ravel(curv.diag()), matrix.diagonal()) <= 1e-10
