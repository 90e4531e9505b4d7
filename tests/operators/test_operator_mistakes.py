"""The likeliest mistakes with operators: each error says what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import curvlib as cv
from curvlib.errors import PytreeError
from curvlib.operators import lazy
from tests.operators.operator_cases import Random, assert_close, generator
from tests.pairwise import every_pair

net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
model_fn, params = cv.functional(net)
batch = (torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64))
mse = {"loss": cv.MSE()}
KFAC, GGN, JACOBIAN = (
    cv.kfac(model_fn, params, batch, **mse),
    cv.ggn(model_fn, params, batch, **mse),
    cv.jacobian(model_fn, params, batch[0]),
)
MAPS: dict[str, Any] = {
    "kfac": KFAC,
    "inverse": KFAC.inverse(0.1),
    "sum": KFAC + 2.0 * KFAC,
    "ggn": GGN,
    "inverse ggn": GGN.inverse(0.1),
    "matrix": cv.Dense(torch.eye(3, dtype=torch.float64)),
    "kronecker": KFAC.blocks["0.weight"],
    "jacobian": JACOBIAN,
    "transposed jacobian": JACOBIAN.T,
}
every_map = pytest.mark.parametrize("name", MAPS)
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "@": lambda a, b: a @ b,
    "matvec": lambda a, b: a.matvec(b),
    "matmat": lambda a, b: a.matmat(b),
}
every_way = pytest.mark.parametrize("way", WAYS)


@every_pair("other, way, name", MAPS, WAYS, MAPS)
def test_products_of_two_maps_are_not_formed(name: str, way: str, other: str) -> None:
    with pytest.raises(PytreeError, match=r"is a linear map itself.*a @ \(b @ v\)"):
        WAYS[way](MAPS[name], MAPS[other])


@every_map
@every_way
def test_a_module_is_no_vector(name: str, way: str) -> None:
    with pytest.raises(PytreeError, match=r"a Sequential is a module: .*cv.functional\(module\)"):
        WAYS[way](MAPS[name], net)


@every_map
@every_way
@pytest.mark.parametrize(
    "views",
    [params.values, params.items, params.keys, net.parameters, net.named_parameters, lambda: iter([1])],
    ids=["values", "items", "keys", "parameters", "named_parameters", "iterator"],
)
def test_views_and_iterators_are_no_vectors(name: str, way: str, views: Callable[[], Any]) -> None:
    with pytest.raises(PytreeError, match=r"has no structure: give the whole pytree, params in place of params.values"):
        WAYS[way](MAPS[name], views())


@every_pair("number, way, name", [3, 0.5], WAYS, MAPS)
def test_numbers_are_multiplied_with_a_star(name: str, way: str, number: float) -> None:
    with pytest.raises(PytreeError, match=rf"is a number: write {number} \* curv"):
        WAYS[way](MAPS[name], number)


@every_map
@pytest.mark.parametrize("vector", ["text", None, [], {"other": torch.ones(2)}, range(2)], ids=repr)
def test_other_things_are_no_vectors_either(name: str, vector: object) -> None:
    with pytest.raises(cv.errors.CurvlibError):
        MAPS[name] @ vector


def test_what_looks_similar_works() -> None:
    named = dict(net.named_parameters())
    expected = KFAC @ params
    assert_close(cv.ravel(KFAC @ named).detach(), cv.ravel(expected))
    assert_close(cv.ravel(KFAC @ dict(params.items())), cv.ravel(expected))
    assert_close((JACOBIAN @ named).detach(), JACOBIAN @ params)
    assert_close(JACOBIAN @ (KFAC @ params), JACOBIAN.to_dense().reshape(6, 2, -1) @ cv.ravel(expected))
    with pytest.raises(TypeError):
        torch.ones(3) @ KFAC


def test_the_average_starts_from_none() -> None:
    average = None
    for decay in (0.9, 0.5):
        average = cv.ema(average, KFAC, decay)
    assert_close(average.to_dense(), KFAC.to_dense())
    assert cv.ema(None, KFAC, 0.9) is KFAC
    with pytest.raises(cv.errors.ArgumentError, match="between 0 and 1"):
        cv.ema(None, KFAC, 1.5)


@pytest.mark.parametrize("damping", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
def test_the_first_power_of_a_large_sum_is_the_damped_sum(damping: Any) -> None:
    random = Random(generator(0))
    one, two = (cv.Kronecker(cv.Dense(random.definite(50)), cv.Dense(random.definite(42))) for _ in range(2))
    assert one.domain.size > lazy.MAX_DENSE
    v = random.normal(50, 42)
    total = one + two
    assert_close(total.power(1, damping) @ v, one @ v + two @ v + 0.1 * v)
    assert_close(total.power(1) @ v, one @ v + two @ v)
    assert_close(total.damp(0.1).power(1, damping) @ v, one @ v + two @ v + 0.2 * v)
    with pytest.raises(cv.errors.ArgumentError, match="have no closed form"):
        total.power(2, damping)


@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "tkfac", "shampoo", "kl_shampoo", "dykaf", "diagonal"])
def test_sides_of_one_block_share_a_dtype(estimator: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).to(dtype)
        fn, start = cv.functional(module)
        targets = torch.tensor([0, 1, 1, 0])
        for widened in (fn, lambda p, x, fn=fn: fn(p, x).double(), lambda p, x, fn=fn: fn(p, x).float()):
            curv = getattr(cv, estimator)(widened, start, (torch.randint(5, (4, 2)), targets))
            for block in curv.blocks.values():
                assert block.dtypes == {torch.promote_types(dtype, torch.float32)}
