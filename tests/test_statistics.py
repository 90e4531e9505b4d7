"""Statistics: what estimators measure is a vector space over batches, a pytree, and all that a curvature is made of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from exactness_problems import half_ignored, normal, problem, randomized
from layer_zoo import ZOO, Model
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import curvlib as cv
from curvlib.errors import ArgumentError, CaptureError, CurvlibError, NotKroneckerError, PytreeError, ShapeError
from curvlib.estimators.statistics import Statistics
from curvlib.pytree import NAMESPACE, flatten, tree_map

Batch = tuple[Tensor, Tensor]
Given = tuple[Any, Any, Any]


def with_basis(given: Given) -> dict[str, Any]:
    """A basis that is not the one of the batch."""
    model_fn, params, (x, _) = given
    outputs = model_fn(params, x)
    other = (x, torch.zeros(outputs.shape[:-1], dtype=torch.long))
    return {"basis": cv.kfac(model_fn, params, other, fisher="empirical")}


DETERMINISTIC: dict[str, Callable[[Given], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "kfac, type-2": lambda given: (cv.kfac, (), {"fisher": "type-2"}),
    "kfac, empirical": lambda given: (cv.kfac, (), {"fisher": "empirical"}),
    "kfac, forward-only": lambda given: (cv.kfac, (), {"fisher": "forward-only"}),
    "kfac, reduced and merged": lambda given: (cv.kfac, (), {"fisher": "type-2", "sharing": "reduce", "tied": "merge"}),
    "kfac, dense": lambda given: (cv.kfac, (), {"fisher": "empirical", "elementwise": "dense"}),
    "kfac, blocks": lambda given: (cv.kfac, (), {"fisher": "empirical", "wide": cv.WideBlocks(2, above=2)}),
    "kfac, isotropic": lambda given: (cv.kfac, (), {"fisher": "empirical", "wide": cv.WideIdentity(above=2)}),
    "tkfac": lambda given: (cv.tkfac, (), {"fisher": "type-2"}),
    "tkfac, reduced": lambda given: (cv.tkfac, (), {"fisher": "empirical", "sharing": "reduce"}),
    "diagonal": lambda given: (cv.diagonal, (), {"fisher": "type-2"}),
    "diagonal, empirical": lambda given: (cv.diagonal, (), {"fisher": "empirical"}),
    "ekfac in a basis": lambda given: (cv.ekfac, (), {"fisher": "type-2", **with_basis(given)}),
    "ekfac by position": lambda given: (
        cv.ekfac,
        (),
        {"fisher": "empirical", "correction": "position", "elementwise": "dense", **with_basis(given)},
    ),
    "eigenvalue_correct": lambda given: (cv.eigenvalue_correct, (with_basis(given)["basis"],), {"fisher": "type-2"}),
    "shampoo": lambda given: (cv.shampoo, (), {"per_example": True}),
    "shampoo squared": lambda given: (cv.shampoo, (), {"per_example": True, "squared": True}),
}
ONE_PASS = {"ekfac in one pass": lambda given: (cv.ekfac, (), {"fisher": "empirical", "sharing": "expand"})}
OTHERS = {
    "kfac, mc": lambda given: (cv.kfac, (), {"mc_samples": 2}),
    "kfac, low rank": lambda given: (cv.kfac, (), {"fisher": "empirical", "wide": cv.WideLowRank(1, above=2)}),
    "tkfac, mc": lambda given: (cv.tkfac, (), {}),
    "diagonal, mc": lambda given: (cv.diagonal, (), {"fisher": "mc"}),
    "ekfac, mc in one pass": lambda given: (cv.ekfac, (), {"sharing": "reduce"}),
    "ekfac in two passes": lambda given: (cv.ekfac, (), {"mc_samples": 3}),
}
ALL = DETERMINISTIC | ONE_PASS | OTHERS
CASES = [("layer norm", "mean"), ("layer norm", "sum"), ("tied", "mean"), ("conv2d with groups", "mean")]
MORE = [*CASES, ("embeddings", "mean"), ("attention", "mean"), ("slices", "sum")]


def of_zoo(name: str) -> Given:
    case: Model = ZOO[name]()
    return case.model_fn, case.params, (case.inputs, half_ignored(case.model_fn(case.params, case.inputs), 5))


def measure(estimator: str, given: Given, batch: Any = None, reduction: str = "mean") -> Statistics:
    how, first, options = ALL[estimator](given)
    model_fn, params, whole = given
    batch = whole if batch is None else batch
    found: Statistics = how.measure(*first, model_fn, params, batch, loss=cv.CrossEntropy(reduction), **options)
    return found


def estimate(estimator: str, given: Given, batch: Any = None, reduction: str = "mean") -> cv.BlockDiagonal:
    how, first, options = ALL[estimator](given)
    model_fn, params, whole = given
    batch = whole if batch is None else batch
    curv: cv.BlockDiagonal = how(*first, model_fn, params, batch, loss=cv.CrossEntropy(reduction), **options)
    return curv


def parts(given: Given) -> tuple[Batch, Batch]:
    """A batch cut in two of different sizes, of which one has more targets that count."""
    x, y = given[2]
    return (x[:2], y[:2]), (x[2:], y[2:])


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    (one, structure), (two, other) = flatten(a), flatten(b)
    return structure == other and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one, two, strict=True))


def dense(curv: cv.BlockDiagonal) -> Tensor:
    """Its matrix, or for Shampoo's that of its square, whose root would magnify rounding where it is singular."""
    sides = [block.left for block in curv.blocks.values() if isinstance(block, cv.Kronecker)]
    rooted = any(isinstance(side, cv.ScaledPower) for side in sides)
    return (curv.power(2) if rooted else curv).to_dense()


def assert_close(a: cv.BlockDiagonal, b: cv.BlockDiagonal, tolerance: float = 1e-12) -> None:
    one, two = dense(a), dense(b)
    assert float((one - two).abs().max()) <= tolerance * float(two.abs().max())


# --- two halves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize(("model", "reduction"), CASES)
def test_an_estimate_is_the_curvature_of_what_is_measured_bit_for_bit(
    estimator: str, model: str, reduction: str
) -> None:
    given = of_zoo(model)
    statistics = measure(estimator, given, reduction=reduction)
    before = tree_map(Tensor.clone, statistics)
    assert same(statistics.curvature(), estimate(estimator, given, reduction=reduction))
    assert same(statistics, before)
    assert same(statistics.curvature(), estimate(estimator, given, reduction=reduction))


@pytest.mark.parametrize("estimator", ALL)
def test_a_data_set_is_measured_as_its_batches_are(estimator: str) -> None:
    given = of_zoo("layer norm")
    data = cv.over(list(parts(given)))
    assert same(measure(estimator, given, data).curvature(), estimate(estimator, given, data))
    if estimator in DETERMINISTIC:
        assert same(measure(estimator, given, data), sum(measure(estimator, given, part) for part in parts(given)))


@pytest.mark.parametrize("how", [cv.kfac, cv.ekfac, cv.tkfac, cv.diagonal, cv.eigenvalue_correct, cv.shampoo])
def test_both_halves_have_the_same_documented_arguments(how: Any) -> None:
    whole, half = inspect.signature(how), inspect.signature(how.measure)
    assert {"model_fn", "params", "batch", "loss", "plan"} <= set(whole.parameters)
    assert whole.parameters == half.parameters
    assert (whole.return_annotation, half.return_annotation) == ("BlockDiagonal", "Statistics")
    assert "Example:" in type(how).__doc__
    assert dataclasses.is_dataclass(how)
    assert how == type(how)()


# --- a vector space -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", DETERMINISTIC)
@pytest.mark.parametrize(("model", "reduction"), MORE)
def test_the_sum_over_two_batches_is_that_of_the_joint_batch(estimator: str, model: str, reduction: str) -> None:
    given = of_zoo(model)
    one, two = (measure(estimator, given, part, reduction) for part in parts(given))
    joint = measure(estimator, given, reduction=reduction)
    for total in (one + two, sum([two, one])):
        assert isinstance(total, Statistics)
        assert_close(total.curvature(), joint.curvature())
        assert float(total.examples) == 5.0


@pytest.mark.parametrize(("model", "reduction"), MORE)
def test_sums_of_one_pass_have_the_eigenbasis_of_all_examples(model: str, reduction: str) -> None:
    given = of_zoo(model)
    one, two = (measure("ekfac in one pass", given, part, reduction) for part in parts(given))
    assert_close((one + two).curvature(), estimate("ekfac in one pass", given, reduction=reduction), 1e-10)


@pytest.mark.parametrize("sizes", [(3, 5), (40, 50), (3, 140), (140, 3), (140, 150)])
def test_sums_of_one_pass_do_not_depend_on_how_few_rows_are_held(sizes: tuple[int, int]) -> None:
    params = randomized({"w": torch.zeros(2, 256), "v": torch.zeros(3, 2)}, 3)

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w"].mT) @ p["v"].mT

    x, y = normal(1, sum(sizes), 256), torch.arange(sum(sizes)) % 3
    given = (model_fn, params, (x, y))
    halves = (slice(sizes[0]), slice(sizes[0], None))
    one, two = (measure("ekfac in one pass", given, (x[half], y[half])) for half in halves)
    assert_close((one + two).curvature(), estimate("ekfac in one pass", given), 1e-9)
    assert_close((0.5 * one + 0.5 * two).curvature(), estimate("ekfac in one pass", given), 1e-9)


@pytest.mark.parametrize("estimator", DETERMINISTIC | ONE_PASS)
@pytest.mark.parametrize(("model", "reduction"), CASES)
def test_a_batch_weighs_as_much_as_copies_of_it(estimator: str, model: str, reduction: str) -> None:
    given = of_zoo(model)
    first, second = parts(given)
    one, two = measure(estimator, given, first, reduction), measure(estimator, given, second, reduction)
    copies = tuple(torch.cat([torch.cat([x, x, x]), y]) for x, y in zip(first, second, strict=True))
    expected = measure(estimator, given, copies, reduction).curvature()
    for weighted in (3 * one + two, one * torch.tensor(3.0) + two, torch.tensor(3.0) * one + two):
        assert_close(weighted.curvature(), expected, 1e-10)
    quarter = 0.25 * expected if reduction == "sum" else expected
    if (estimator, reduction) != ("eigenvalue_correct", "sum"):  # its other blocks are given, and stay as they are
        assert_close((0.75 * one + 0.25 * two).curvature(), quarter, 1e-10)


@pytest.mark.parametrize("estimator", DETERMINISTIC | ONE_PASS)
def test_a_moving_average_from_nothing_has_no_bias(estimator: str) -> None:
    given = of_zoo("layer norm")
    now = measure(estimator, given)
    average = 0.05 * now
    for _ in range(3):
        average = 0.95 * average + 0.05 * now
        assert_close(average.curvature(), now.curvature(), 1e-10)


def test_a_moving_average_weighs_batches_by_what_they_hold() -> None:
    given = of_zoo("layer norm")
    one, two = (measure("diagonal", given, part) for part in parts(given))
    average = (0.95 * one + 0.05 * two).curvature().to_dense()
    a, b = 0.95 * one.normalizer, 0.05 * two.normalizer
    expected = (a * one.curvature().to_dense() + b * two.curvature().to_dense()) / (a + b)
    torch.testing.assert_close(average, expected, rtol=1e-12, atol=0)
    assert float(one.normalizer) != float(two.normalizer) * 2 / 3  # the batches differ in targets an example that count


@pytest.mark.parametrize("estimator", DETERMINISTIC)
def test_a_batch_can_be_subtracted(estimator: str) -> None:
    given = of_zoo("embeddings")
    first, second = parts(given)
    rest = measure(estimator, given) - measure(estimator, given, second)
    assert float(rest.examples) == 2.0
    assert_close(rest.curvature(), estimate(estimator, given, first), 1e-10)


@pytest.mark.parametrize("estimator", ["kfac, low rank", "ekfac in one pass"])
def test_rows_and_eigenpairs_are_not_subtracted(estimator: str) -> None:
    statistics = measure(estimator, of_zoo("linear"))
    for weight in (-1, torch.tensor(-1.0)):
        with pytest.raises(ArgumentError, match="not be negative"):
            weight * statistics


# --- a pytree -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("model", ["layer norm", "tied"])
def test_statistics_are_a_pytree_of_tensors(estimator: str, model: str) -> None:
    statistics = measure(estimator, of_zoo(model))
    leaves, structure = flatten(statistics)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert sorted(map(id, leaves)) == sorted(map(id, torch_pytree.tree_leaves(statistics)))
    assert same(optree.tree_unflatten(structure, leaves).curvature(), statistics.curvature())
    half = optree.tree_map(lambda x: x.float() if x.is_floating_point() else x, statistics, namespace=NAMESPACE)
    assert {leaf.dtype for leaf in flatten(half.curvature())[0]} == {torch.float32}


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("model", ["layer norm", "tied"])
def test_both_halves_are_traced(estimator: str, model: str) -> None:
    given = of_zoo(model)
    if "mc" in estimator or "two passes" in estimator:
        pytest.skip("draws are not traced")
    model_fn, _, batch = given

    def half(params: Any) -> Any:
        return measure(estimator, (model_fn, params, batch))

    def averaged(a: Any, b: Any) -> Any:
        return (0.9 * a + 0.1 * b).curvature()

    statistics = half(given[1])
    traced = make_fx(half)(given[1])(given[1])
    assert_close(traced.curvature(), statistics.curvature(), 1e-9)
    if "low rank" not in estimator:
        assert_close(make_fx(averaged)(statistics, statistics)(statistics, traced), statistics.curvature(), 1e-9)


@pytest.mark.parametrize("estimator", DETERMINISTIC | ONE_PASS)
@pytest.mark.parametrize("model", ["layer norm", "tied"])
def test_an_ensemble_is_measured_under_vmap(estimator: str, model: str) -> None:
    model_fn, params, batch = given = of_zoo(model)
    how, first, options = ALL[estimator](given)
    members = [params, tree_map(lambda x: 1.5 * x, params)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *members)

    def half(p: Any) -> Statistics:
        found: Statistics = how.measure(*first, model_fn, p, batch, **options)
        return found

    ensemble = torch.func.vmap(half)(stacked)
    assert isinstance(ensemble, Statistics)
    curvs = torch.func.vmap(lambda s: (0.5 * (s + s)).curvature())(ensemble)
    for i, member in enumerate(members):
        curv = tree_map(lambda x, i=i: x[i], curvs)
        assert_close(curv, half(member).curvature(), 1e-9)


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("model", ["layer norm", "tied", "embeddings"])
def test_statistics_are_saved_and_loaded_bit_for_bit(estimator: str, model: str, tmp_path: Path) -> None:
    given = of_zoo(model)
    first, second = parts(given)
    statistics = measure(estimator, given, first)
    cv.save(statistics, tmp_path / "statistics.safetensors")
    loaded = cv.load(tmp_path / "statistics.safetensors")
    assert same(loaded, statistics)
    assert same(loaded.curvature(), statistics.curvature())
    if estimator in DETERMINISTIC:
        more = measure(estimator, given, second)
        assert same(loaded + more, statistics + more)


def test_the_table_of_statistics_shows_shapes_and_no_values() -> None:
    given = of_zoo("layer norm")
    text = repr(measure("kfac, type-2", given))
    assert text.splitlines() == [
        "Statistics of cv.kfac: 584 bytes",
        "block     sums     shapes              dtype",
        "0.weight  UseSums  [4, 4], [], [4, 4]  float64",
        "1.weight  Tensor   [8]                 float64",
        "2.weight  UseSums  [5, 5], [], [2, 2]  float64",
    ]
    assert all("tensor(" not in repr(measure(estimator, given)) for estimator in ALL)


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(error: type[CurvlibError], a: Statistics, b: Any, *words: str) -> None:
    with pytest.raises(error) as caught:
        a + b
    assert all(word in str(caught.value) for word in words)


def test_different_estimators_and_options_are_not_added() -> None:
    given = of_zoo("layer norm")
    kfac = measure("kfac, type-2", given)
    refused(ArgumentError, kfac, measure("tkfac", given), "cv.kfac", "cv.tkfac")
    refused(ArgumentError, kfac, measure("kfac, empirical", given), "fisher", "'type-2'", "'empirical'")
    refused(ArgumentError, kfac, measure("kfac, reduced and merged", given), "sharing", "'expand'", "'reduce'")
    refused(ArgumentError, kfac, measure("kfac, type-2", given, reduction="sum"), "loss", "'mean'", "'sum'")
    refused(ArgumentError, measure("shampoo", given), measure("shampoo squared", given), "squared")
    for engine in ("functional", "autograd"):  # it makes no difference to what is measured
        assert float((kfac + cv.kfac.measure(*given, fisher="type-2", engine=engine)).examples) == 10.0


def test_different_models_are_not_added() -> None:
    a, b = measure("diagonal", of_zoo("linear")), measure("diagonal", of_zoo("layer norm"))
    refused(CaptureError, a, b, "plans differ")
    model_fn, params, batch = of_zoo("linear")

    def renamed(p: Any, x: Tensor) -> Tensor:
        return model_fn({name.removeprefix("my."): leaf for name, leaf in p.items()}, x)

    other = (renamed, {f"my.{name}": leaf for name, leaf in params.items()}, batch)
    refused(CaptureError, a, measure("diagonal", other), "plans differ")


def test_different_bases_are_not_added() -> None:
    model_fn, params, batch = given = of_zoo("layer norm")
    bases = [cv.kfac(model_fn, params, part, fisher="empirical") for part in (batch, parts(given)[1])]
    bases.append(tree_map(Tensor.clone, bases[0]))
    options: dict[str, Any] = {"fisher": "type-2"}
    a, b, again = (cv.ekfac.measure(*given, basis=basis, **options) for basis in bases)
    refused(ArgumentError, a, b, "different bases")
    assert_close((a + again).curvature(), a.curvature())
    two_passes = cv.ekfac.measure(*given, **options)
    refused(ArgumentError, a, two_passes, "different bases")
    refused(ArgumentError, a, cv.ekfac.measure(*given, fisher="empirical"), "one pass")


def test_only_numbers_and_statistics_take_part() -> None:
    statistics = measure("kfac, type-2", of_zoo("linear"))
    for factor in (torch.ones(2), "2", None):
        with pytest.raises((ArgumentError, TypeError)):
            factor * statistics  # type: ignore[operator]
    for other in (1, 0.5, torch.zeros(()), "x"):
        with pytest.raises(TypeError):
            statistics + other  # type: ignore[operator]
        with pytest.raises(TypeError):
            other + statistics  # type: ignore[operator]


def test_a_basis_must_have_the_blocks_of_the_model() -> None:
    given = problem(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), normal(1, 5, 3), "mse", "mean")
    args, loss = (given.model_fn, given.params, given.batch), {"loss": cv.MSE()}
    with pytest.raises(NotKroneckerError, match=r"block '0\.weight'.*Diagonal"):
        cv.eigenvalue_correct(cv.diagonal(*args, **loss), *args, **loss)
    with pytest.raises(NotKroneckerError, match=r"block '0\.weight'.*missing"):
        cv.ekfac(*args, basis=cv.diagonal(*args, **loss), **loss)
    for correct in (cv.eigenvalue_correct, cv.eigenvalue_correct.measure):
        with pytest.raises(ShapeError, match=r"block '0\.weight'"):
            correct(cv.shampoo.init(given.params), *args, **loss)
    renamed = {f"my.{name}": leaf for name, leaf in given.params.items()}
    with pytest.raises(PytreeError, match="other parameters"):
        cv.ekfac(*args, basis=cv.shampoo.init(renamed), **loss)
    unbiased = problem(nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4)), normal(1, 5, 3), "mse", "mean")
    args = (unbiased.model_fn, unbiased.params, unbiased.batch)
    with pytest.raises(ShapeError, match=r"block '1\.weight'"):
        cv.eigenvalue_correct(cv.shampoo.init(unbiased.params), *args, **loss)


def test_shampoo_of_gradients_of_batches_is_no_sum() -> None:
    with pytest.raises(ArgumentError, match="per_example=True"):
        cv.shampoo.measure(*of_zoo("linear"))
