"""Sketches are random matrices with E[R^T R] = I; projections fold them into the factors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlib.errors import ArgumentError, CurvlibError, NotKroneckerError, PytreeError, ShapeError
from curvlib.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    FactoredTikhonov,
    Kronecker,
    Layout,
    Operator,
    Region,
    Sketch,
    sketch,
)
from curvlib.pytree import Domain
from tests.operators.domain_cases import flat
from tests.operators.operator_cases import FACTORS, Random, assert_close, cases, generator, moderately, side

random = Random(generator(0))
like = torch.zeros((), dtype=torch.float64)
KINDS = ("rademacher", "normal", "orthogonal")
every_sketch = pytest.mark.parametrize("kind", KINDS)


def matrix(kind: str, rank: int, width: int, seed: int = 0, block: str = "b", which: str = "left") -> torch.Tensor:
    return sketch({"b": like}, rank=rank, kind=kind, seed=seed).matrix(block, which, width, like)


@every_sketch
@pytest.mark.parametrize(("rank", "width"), [(1, 4), (3, 8), (7, 8)])
def test_the_expectation_of_r_transposed_r_is_the_identity(kind: str, rank: int, width: int) -> None:
    n = 400
    draws = torch.stack([matrix(kind, rank, width, seed) for seed in range(n)])
    assert draws.shape == (n, rank, width)
    products = draws.mT @ draws
    mean, spread = products.mean(0), products.std(0) / math.sqrt(n)
    assert bool(((mean - torch.eye(width, dtype=torch.float64)).abs() <= 5.5 * spread + 1e-12).all())


def test_rademacher_entries_are_signs_over_the_root_of_the_rank() -> None:
    entries = matrix("rademacher", 64, 200)
    torch.testing.assert_close(entries.abs(), torch.full_like(entries, 1 / 8))
    assert abs(float(entries.sign().mean())) <= 5.5 / math.sqrt(entries.numel())


def test_normal_entries_are_normal() -> None:
    entries = matrix("normal", 100, 200).reshape(-1) * 10
    n = entries.numel()
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((entries**power).mean()) - moment) <= 5.5 * math.sqrt(variance / n)


@pytest.mark.parametrize(("rank", "width"), [(1, 3), (4, 9)])
def test_orthogonal_rows_are_orthogonal_and_equally_long(rank: int, width: int) -> None:
    rows = matrix("orthogonal", rank, width)
    assert_close(rows @ rows.mT, width / rank * torch.eye(rank, dtype=torch.float64))


@every_sketch
def test_sketches_are_nested_in_their_rank(kind: str) -> None:
    def unscaled(rank: int) -> torch.Tensor:
        return matrix(kind, rank, 20) * (math.sqrt(rank / 20) if kind == "orthogonal" else math.sqrt(rank))

    for rank in (1, 2, 7):
        assert_close(unscaled(rank), unscaled(16)[:rank])


@every_sketch
def test_sketches_depend_on_seed_block_and_side_and_on_nothing_else(kind: str) -> None:
    first = matrix(kind, 3, 9)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(first, matrix(kind, 3, 9))
    assert torch.equal(state, torch.get_rng_state())
    for other in (matrix(kind, 3, 9, seed=1), matrix(kind, 3, 9, block="c"), matrix(kind, 3, 9, which="right")):
        assert not torch.allclose(first, other)


@every_sketch
@pytest.mark.parametrize("rank", [5, 6, 64])
def test_sides_that_are_not_wider_than_the_rank_are_kept(kind: str, rank: int) -> None:
    assert torch.equal(matrix(kind, rank, 5), torch.eye(5, dtype=torch.float64))


@every_sketch
@moderately
@given(
    rank=st.integers(1, 6), seed=st.integers(0, 2**31), left=st.sampled_from(FACTORS), right=st.sampled_from(FACTORS)
)
def test_a_projection_is_m_left_v_m_right_transposed(kind: str, rank: int, seed: int, left: str, right: str) -> None:
    source = Random(generator(seed))
    (g_side, g), (a_side, a) = side(left, (4,), source), side(right, (5,), source)
    operator, v = Kronecker(g_side, a_side), source.normal(4, 5)
    r = sketch(v, rank=rank, kind=kind, seed=seed)
    rows, columns = r.matrix("params", "left", 4, like), r.matrix("params", "right", 5, like)
    projected = operator.project(r)(v)
    assert projected.keys() == {"params"}
    assert_close(projected["params"], (rows @ g) @ v @ (columns @ a).mT)
    assert_close(projected["params"], rows @ (operator @ v) @ columns.mT)


@every_sketch
def test_groups_are_projected_one_by_one(kind: str) -> None:
    g, a, v = random.definite(2, 3), random.definite(2, 4), random.normal(2, 3, 4)
    r = sketch(v, rank=2, kind=kind)
    rows, columns = r.matrix("params", "left", 3, like), r.matrix("params", "right", 4, like)
    projected = Kronecker(Dense(g), Dense(a)).project(r)(v)["params"]
    for i in range(2):
        assert_close(projected[i], rows @ g[i] @ v[i] @ a[i] @ columns.mT)


def network(**blocks: Operator) -> tuple[BlockDiagonal, Any]:
    params = {name: torch.zeros(block.domain.shapes[0], dtype=torch.float64) for name, block in blocks.items()}
    places = tuple((name, Layout((Region.whole(i, params[name].shape),))) for i, name in enumerate(sorted(blocks)))
    return BlockDiagonal(dict(blocks), places, Domain.of(params)), params


def vector_of(params: Any) -> Any:
    return {name: random.normal(*leaf.shape) for name, leaf in params.items()}


@every_sketch
def test_a_block_without_sides_gets_one_sketch(kind: str) -> None:
    curv, params = network(
        dense=Dense(random.definite(6)), diagonal=Diagonal(random.positive(2, 5)), small=Diagonal(random.positive(2))
    )
    r, v = sketch(params, rank=3, kind=kind), vector_of(params)
    projected, image = curv.project(r)(v), curv @ v
    for name, width in (("dense", 6), ("diagonal", 10), ("small", 2)):
        assert_close(projected[name], r.matrix(name, "rows", width, like) @ image[name].reshape(-1))
    assert torch.equal(projected["small"], image["small"])


def test_inner_products_of_projections_estimate_the_inverse() -> None:
    curv, params = network(
        a=Kronecker(Dense(random.definite(4)), Dense(random.definite(5))), b=Dense(random.definite(3))
    )
    damping = FactoredTikhonov(0.1)
    g, h = vector_of(params), vector_of(params)
    exact = flat(g) @ flat(curv.inverse(damping) @ h)
    root = curv.power(-0.5, damping)
    whole = root.project(sketch(params, rank=8))  # wider than every side: R = I
    assert_close(sum((x * y).sum() for x, y in zip(whole(g).values(), whole(h).values(), strict=True)), exact)
    estimates = []
    for seed in range(400):
        projection = root.project(sketch(params, rank=2, seed=seed))
        pairs = zip(projection(g).values(), projection(h).values(), strict=True)
        estimates.append(sum((x * y).sum() for x, y in pairs))
    found = torch.stack(estimates)
    assert abs(float(found.mean() - exact)) <= 5 * float(found.std()) / math.sqrt(len(found))


@every_sketch
def test_the_error_of_an_estimate_falls_with_the_root_of_the_rank(kind: str) -> None:
    curv, params = network(layer=Dense(random.definite(64)))
    g, h = vector_of(params), vector_of(params)
    root = curv.power(-0.5)
    images = (root @ g)["layer"], (root @ h)["layer"]
    errors = {}
    for rank in (2, 8):
        draws = torch.stack([matrix(kind, rank, 64, seed, "layer", "rows") for seed in range(400)])
        found = (draws @ images[0] * (draws @ images[1])).sum(-1)
        first = root.project(sketch(params, rank=rank, kind=kind))
        assert_close((first(g)["layer"] * first(h)["layer"]).sum(), found[0])
        errors[rank] = float((found - images[0] @ images[1]).square().mean().sqrt())
    assert 0.4 < errors[8] / errors[2] < 0.6


@pytest.mark.parametrize("kind", ["eigen kronecker", "sum"])
@moderately
@given(data=st.data())
def test_operators_without_a_factor_a_side_are_not_projected(kind: str, data: st.DataObject) -> None:
    operator = data.draw(cases(kind)).operator
    curv, params = network(layer=operator)
    message = r"block 'layer'.*has no factor a side.*FactoredTikhonov damping.*R @ curv"
    with pytest.raises(NotKroneckerError, match=message) as caught:
        curv.project(sketch(params, rank=2))
    assert isinstance(caught.value, (CurvlibError, TypeError))


def test_plain_damping_is_named_as_what_prevents_a_projection() -> None:
    curv, params = network(layer=Kronecker(Dense(random.definite(4)), Dense(random.definite(5))))
    curv.inverse(FactoredTikhonov(0.1)).project(sketch(params))
    with pytest.raises(NotKroneckerError, match="its eigenvalues do not factor"):
        curv.inverse(0.1).project(sketch(params))


def test_a_sketch_for_other_parameters_is_refused() -> None:
    curv, params = network(layer=Dense(random.definite(4)))
    for other in ({"layer": torch.zeros(5)}, {"other": torch.zeros(4)}, torch.zeros(4)):
        with pytest.raises(PytreeError, match="make it from params"):
            curv.project(sketch(other))
    projection = curv.project(sketch(params))
    with pytest.raises(PytreeError, match="'layer' is missing"):
        projection({"other": torch.zeros(4)})
    with pytest.raises(ShapeError, match=r"leaf 'layer' should have shape \(4,\)"):
        projection({"layer": torch.zeros(5)})


def test_arguments_of_sketches_are_checked() -> None:
    with pytest.raises(ArgumentError, match="kind must be one of rademacher, normal, orthogonal, got 'uniform'"):
        sketch(like, kind="uniform")
    with pytest.raises(ArgumentError, match="rank must be at least 1, got 0"):
        sketch(like, rank=0)


def test_sketches_and_projections_are_values() -> None:
    params = {"a": torch.zeros(3)}
    assert sketch(params, rank=2) == sketch(params, rank=2)
    assert sketch(params, rank=2) != sketch(params, rank=2, seed=1)
    assert isinstance(sketch(params), Sketch)
