"""Influence is that of single examples, taken one at a time by reverse-mode gradients, or it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cv
import curvlib.influence
from curvlib.errors import CaptureError, CurvlibError
from curvlib.gradients.per_example import per_example_gradients
from tests.influence.influence_cases import Batch, Case, assert_close, examples, generator, normal

Params = dict[str, Tensor]
Model = Callable[[Params, Any], Tensor]
EXAMPLES = (3, 5)  # as many as there are steps in time, or features, and other numbers
A, B, C = (5, 5), (3, 5), (4, 3)  # shapes of weights that follow one another


def one_at_a_time(case: Case, batch: Batch) -> Tensor:
    """The gradient of every example's loss, from a run of its own: [N, D] in the order of ravel."""
    alone = [examples(batch, n, n + 1) for n in range(len(batch[1]))]
    return torch.stack([gradient(case.model_fn, case.params, *pair) for pair in alone])


def gradient(model_fn: Model, params: Params, inputs: Any, targets: Tensor) -> Tensor:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in sorted(params.items())}
    loss = F.cross_entropy(model_fn(leaves, inputs).movedim(-1, 1), targets, reduction="sum")
    return cv.ravel(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))


def of_function(model_fn: Model, shapes: dict[str, tuple[int, ...]], draw: Callable[[int, int], Any], n: int) -> Case:
    params = {name: 0.6 * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    batches = []
    for count, seed in ((n, 50), (n, 51)):
        inputs = draw(count, seed)
        outputs = model_fn(params, inputs)
        batches.append((inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator(seed))))
    return Case(model_fn, params, *batches)


def of_module(module: nn.Module, draw: Callable[[int, int], Any], n: int) -> Case:
    model_fn, params = cv.functional(module.double())
    return of_function(model_fn, {name: tuple(leaf.shape) for name, leaf in params.items()}, draw, n)


def vectors(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda n, seed: normal(seed, n, *shape)


def tokens(vocabulary: int, *shape: int) -> Callable[[int, int], Tensor]:
    return lambda n, seed: torch.randint(vocabulary, (n, *shape), generator=generator(seed))


def every_answer(case: Case, inverse: Any, gradients: tuple[Tensor, Tensor], matrix: Tensor | None) -> None:
    """Compares all that influence says with what it is made of; ``matrix`` is what the inverse inverts."""
    asked, known = gradients
    solved = known if matrix is None else torch.linalg.solve(matrix, known.mT).mT
    expected = asked @ solved.mT
    assert_close(case.scores(inverse), expected, 1e-8)
    assert_close(case.scores(inverse, aggregate="train"), expected.sum(1), 1e-8)
    assert_close(case.scores(inverse, aggregate="queries"), expected.sum(0), 1e-8)
    diagonal = cv.influence.self_influence(inverse, case.model_fn, case.params, case.train)
    assert isinstance(diagonal, Tensor)
    assert_close(diagonal, (known * solved).sum(1), 1e-8)


def check(case: Case) -> None:
    """Gradients of single examples, and scores from the identity and from curvatures."""
    gradients = one_at_a_time(case, case.queries), one_at_a_time(case, case.train)
    for batch, expected in zip((case.queries, case.train), gradients, strict=True):
        found = per_example_gradients(case.model_fn, case.params, batch).tree()
        assert_close(torch.cat([found[name].flatten(1) for name in sorted(found)], 1), expected)
    every_answer(case, lambda v: v, gradients, None)
    for curv in (case.curvature(), case.curvature(cv.ekfac)):
        every_answer(case, curv.inverse(0.1), gradients, curv.damp(0.1).to_dense())


def either(case: Case) -> None:
    """Right, or refused by an error that names a parameter."""
    try:
        check(case)
    except CaptureError as error:
        named(case, error)


def named(case: Case, error: CaptureError) -> None:
    assert any(name in str(error) for name in case.params), str(error)


# --- examples of their own --------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent network written as a loop, whose inner layout is time-first."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.carry, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.read(x.transpose(0, 1))  # [T, N, d]
        state = torch.zeros_like(steps[0])
        for step in steps:
            state = torch.tanh(step + self.carry(state))
        return self.head(state)


class TimeFirst(nn.Module):
    """Layers that see [T, N, d], and a sum over time."""

    def __init__(self, total: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.head, self.total = nn.Linear(4, 5), nn.Linear(5, 3), total

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.total(torch.tanh(self.read(x.transpose(0, 1)))))


class Heads(nn.Module):
    """Attention whose heads come before the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.mix, self.head = nn.Linear(6, 18), nn.Linear(2, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.project(x).reshape(n, length, 3, 3, 2).permute(2, 3, 0, 1, 4)  # [heads, N, T, 2]
        seen = (q @ k.mT).softmax(-1) @ v
        return self.head(self.mix(seen).permute(1, 2, 0, 3).reshape(n, length, 6).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.table(x)), self.table.weight)


def padded(n: int) -> Case:
    module = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3))
    return of_module(module, tokens(3, 3), n)


RIGHT: dict[str, Callable[[int], Case]] = {
    "embedding": lambda n: of_module(
        nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)), tokens(7, 5), n
    ),
    "tied": lambda n: of_module(Tied(), tokens(6, 3), n),
    "used twice": lambda n: of_function(
        lambda p, x: torch.tanh(torch.tanh(x @ p["a"]) @ p["a"]) @ p["b"].mT, {"a": A, "b": B}, vectors(5), n
    ),
    "dropout that is off": lambda n: of_module(
        nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).eval(), vectors(5), n
    ),
    "batch norm that is off": lambda n: of_module(
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)).eval(), vectors(5), n
    ),
    "a mean over positions": lambda n: of_function(
        lambda p, x: torch.tanh(x @ p["a"]).mean(1) @ p["b"].mT, {"a": A, "b": B}, vectors(3, 5), n
    ),
    "a mean over features": lambda n: of_function(
        lambda p, x: torch.tanh(x @ p["a"]) @ p["b"].mT + x.mean(1, keepdim=True), {"a": A, "b": B}, vectors(5), n
    ),
    "statistics of an example's own": lambda n: of_module(
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)),
        vectors(2, 5), n,
    ),
    "softmax over positions": lambda n: of_function(
        lambda p, x: (x @ p["a"]).softmax(1).mul(x).sum(1) @ p["b"].mT, {"a": A, "b": B}, vectors(3, 5), n
    ),
}  # fmt: skip


@pytest.mark.parametrize("n", EXAMPLES)
@pytest.mark.parametrize("name", RIGHT)
def test_influence_is_that_of_single_examples(name: str, n: int) -> None:
    check(RIGHT[name](n))


# --- uses without a gradient, and layouts in which examples come second -----------------------------------------------


def with_use(use: Callable[[Tensor], Tensor]) -> Callable[[int], Case]:
    """A model that reads a weight twice, once through ``use``."""

    def model_fn(p: Params, x: Tensor) -> Tensor:
        return (torch.tanh(x @ p["a"]) + x @ use(p["a"])) @ p["b"].mT

    return lambda n: of_function(model_fn, {"a": A, "b": B}, vectors(5), n)


def frozen_use(a: Tensor) -> Tensor:
    with torch.no_grad():
        return a * 1.0


def frozen_branch(p: Params, x: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = x @ p["a"]
    return (torch.tanh(x @ p["a"]) + frozen) @ p["b"].mT


EITHER: dict[str, Callable[[int], Case]] = {
    "padding_idx": padded,
    "functional padding_idx": lambda n: of_function(
        lambda p, x: F.embedding(x, p["a"], padding_idx=2).flatten(1) @ p["b"].mT,
        {"a": (3, 5), "b": (4, 15)}, tokens(3, 3), n,
    ),
    "negative padding_idx": lambda n: of_function(
        lambda p, x: F.embedding(x, p["a"], padding_idx=-1).flatten(1) @ p["b"].mT,
        {"a": (3, 5), "b": (4, 15)}, tokens(3, 3), n,
    ),
    "detach": with_use(lambda a: a.detach()),
    "detach and clone": with_use(lambda a: a.detach().clone()),
    "data": with_use(lambda a: a.data),
    "no_grad": with_use(frozen_use),
    "detach of a transpose": with_use(lambda a: a.mT.detach()),
    "transpose of what is detached": with_use(lambda a: a.detach().mT),
    "a branch without gradient": lambda n: of_function(frozen_branch, {"a": A, "b": B}, vectors(5), n),
    "detached activations": lambda n: of_function(
        lambda p, x: torch.tanh(x @ p["a"]) @ p["b"].mT + torch.tanh(x @ p["a"]).detach() @ p["b"].mT,
        {"a": A, "b": B}, vectors(5), n,
    ),
    "detached bias": lambda n: of_function(
        lambda p, x: F.linear(torch.tanh(F.linear(x, p["a"], p["c"].detach()) + p["c"]), p["b"]),
        {"a": A, "b": B, "c": (5,)}, vectors(5), n,
    ),
    "straight-through rounding": lambda n: of_function(
        lambda p, x: torch.tanh(x @ (p["a"] + (p["a"].round() - p["a"]).detach())) @ p["b"].mT,
        {"a": A, "b": B}, vectors(5), n,
    ),
    "recurrent, time first": lambda n: of_module(Recurrent(), vectors(3, 4), n),
    "sum over time, time first": lambda n: of_module(TimeFirst(lambda h: h.sum(0)), vectors(3, 4), n),
    "mean over time, time first": lambda n: of_module(TimeFirst(lambda h: h.mean(0)), vectors(5, 4), n),
    "the last step, time first": lambda n: of_module(TimeFirst(lambda h: h[-1]), vectors(3, 4), n),
    "running sum, time first": lambda n: of_module(TimeFirst(lambda h: h.cumsum(0)[-1]), vectors(5, 4), n),
    "softmax over time, time first": lambda n: of_module(
        TimeFirst(lambda h: (h.softmax(0) * h).sum(0)), vectors(3, 4), n
    ),
    "back to examples first": lambda n: of_module(TimeFirst(lambda h: h.transpose(0, 1)), vectors(3, 4), n),
    "heads first": lambda n: of_module(Heads(), vectors(3, 6), n),
    "features first": lambda n: of_function(
        lambda p, x: (p["b"] @ torch.tanh(p["a"] @ x.mT)).mT, {"a": A, "b": B}, vectors(5), n
    ),
    "a fused recurrent layer": lambda n: of_module(Fused(), vectors(3, 4), n),
}  # fmt: skip


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("n", EXAMPLES)
@pytest.mark.parametrize("name", EITHER)
def test_influence_is_right_or_refused(name: str, n: int) -> None:
    either(EITHER[name](n))


# --- examples that depend on each other -------------------------------------------------------------------------------


def between(mix: Callable[[Tensor], Tensor]) -> Callable[[int], Case]:
    """A model that mixes what examples hold between two layers."""

    def model_fn(p: Params, x: Tensor) -> Tensor:
        return mix(torch.tanh(x @ p["a"])) @ p["b"].mT

    return lambda n: of_function(model_fn, {"a": A, "b": B}, vectors(5), n)


DEPENDENT: dict[str, Callable[[int], Case]] = {
    "batch norm": lambda n: of_module(
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)).train(), vectors(5), n
    ),
    "batch norm with weights": lambda n: of_module(
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train(), vectors(5), n
    ),
    "mean": between(lambda h: h - h.mean(0)),
    "mean of all": between(lambda h: h - h.mean()),
    "sum": between(lambda h: h + h.sum(0, keepdim=True)),
    "variance": between(lambda h: h / (1 + h.var(0))),
    "norm": between(lambda h: h / (1 + h.norm(dim=0))),
    "softmax": between(lambda h: h.softmax(0)),
    "running sum": between(lambda h: h.cumsum(0)),
    "greatest": between(lambda h: h - h.amax(0)),
    "attention": between(lambda h: (h @ h.mT).softmax(-1) @ h),
    "einsum": between(lambda h: torch.einsum("nd,md->nm", h, h) @ h),
    "neighbours": between(lambda h: h + h.roll(1, 0)),
    "mirrored": between(lambda h: h + h.flip(0)),
    "the first": between(lambda h: h + h[:1]),
    "mean of inputs": lambda n: of_function(
        lambda p, x: torch.tanh((x - x.mean(0)) @ p["a"]) @ p["b"].mT, {"a": A, "b": B}, vectors(5), n
    ),
    "mean of outputs": lambda n: of_function(
        lambda p, x: (lambda z: z - z.mean(0))(torch.tanh(x @ p["a"]) @ p["b"].mT), {"a": A, "b": B}, vectors(5), n
    ),
    "mean, then layers": lambda n: of_function(
        lambda p, x: x @ p["a"] @ p["b"].mT + (x.mean(0) @ p["c"]).tanh() @ p["b"].mT,
        {"a": A, "b": B, "c": A}, vectors(5), n,
    ),
}  # fmt: skip


@pytest.mark.parametrize("n", EXAMPLES)
@pytest.mark.parametrize("name", DEPENDENT)
def test_influence_of_examples_that_depend_on_each_other_is_refused(name: str, n: int) -> None:
    case = DEPENDENT[name](n)
    apart, together = one_at_a_time_outputs(case)
    assert not torch.allclose(apart, together)  # they do depend on each other
    for action in (
        lambda: case.scores(lambda v: v),
        lambda: cv.influence.self_influence(lambda v: v, case.model_fn, case.params, case.train),
    ):
        with pytest.raises(CaptureError):
            action()


def one_at_a_time_outputs(case: Case) -> tuple[Tensor, Tensor]:
    inputs, _ = case.train
    eight = torch.cat([inputs] * 2)  # batch norm wants two examples at least
    alone = torch.cat([case.model_fn(case.params, x.repeat(2, 1))[:1] for x in inputs.split(1)])
    return alone, case.model_fn(case.params, eight)[: len(inputs)]


# --- inputs whose examples come second --------------------------------------------------------------------------------


class Gated(nn.Module):
    """A fused recurrent layer, which is time-first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][-1])


class Over(nn.Module):
    """Layers that see [T, N, d], and one way to get rid of time."""

    def __init__(self, total: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.head, self.total = nn.Linear(4, 5), nn.Linear(5, 3), total

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.total(torch.tanh(self.read(x))))


SECOND: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: Over(lambda h: h.sum(0)),
    "mean": lambda: Over(lambda h: h.mean(0)),
    "the last step": lambda: Over(lambda h: h[-1]),
    "weighted": lambda: Over(lambda h: (h.softmax(0) * h).sum(0)),
    "running sum": lambda: Over(lambda h: h.cumsum(0)[-1]),
    "fused": Gated,
    "running sum at each step": lambda: Over(lambda h: h.cumsum(0)),
    "a position a step": lambda: Over(lambda h: (h + normal(9, 4, 1, 5)[: len(h)]).tanh().sum(0)),
    "a weight a step": lambda: Over(lambda h: torch.einsum("t,tnd->nd", normal(9, 4)[: len(h)], h)),
    "so many steps": lambda: Over(lambda h: h.unflatten(0, (len(h), 1))[:4].sum((0, 1))),
    "steps by number": lambda: Over(lambda h: h[0] + 2 * h[1] - h[2]),
    "back to examples first": lambda: Over(lambda h: (h + normal(9, 4, 1, 5)[: len(h)]).transpose(0, 1).sum(1)),
}


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("name", SECOND)
def test_influence_of_inputs_that_are_time_first_is_right_or_refused(name: str, steps: int) -> None:
    model_fn, params = cv.functional(SECOND[name]().double())
    params = {key: 0.6 * normal(i, *leaf.shape) for i, (key, leaf) in enumerate(params.items())}
    batches, rows = [], []
    for seed in (1, 2):
        inputs = normal(seed, steps, 4, 4)  # [T, N, d]
        targets = torch.randint(2, model_fn(params, inputs).shape[:-1], generator=generator(seed))
        batches.append((inputs, targets))
        alone = [(inputs[:, n : n + 1], targets[..., n : n + 1]) for n in range(4)]
        rows.append(torch.stack([gradient(model_fn, params, *pair) for pair in alone]))
    try:
        found = cv.influence.scores(lambda v: v, model_fn, params, *batches)
    except CurvlibError:
        return
    assert isinstance(found, Tensor)
    assert_close(found, rows[0] @ rows[1].mT)
