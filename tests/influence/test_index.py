"""An index of sketches: what its inner products are, and that its bytes depend on the examples only."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlib as cv
import curvlib.influence
from curvlib.errors import ArgumentError, DtypeError, EmptyBatchError, NotKroneckerError, PytreeError, ShapeError
from curvlib.influence.folder import number_of
from tests.influence.index_cases import build, contents, examples, projection_of, ragged, small
from tests.influence.influence_cases import CASES, Case, assert_close, generator, in_batches, of_module, rows, tokens
from tests.influence.influence_cases import examples as part_of

CASE = small()
DATA = examples(30)
DAMPING = cv.FactoredTikhonov(0.1)
ESTIMATORS: dict[str, Callable[..., Any]] = {
    "kfac": lambda *args: cv.kfac(*args, fisher="empirical"),
    "tkfac": lambda *args: cv.tkfac(*args, fisher="empirical"),
    "shampoo": lambda *args: cv.shampoo(*args, per_example=True),
    "kl_shampoo": lambda *args: cv.kl_shampoo(*args, per_example=True),
    "dykaf": lambda *args: cv.dykaf(*args, per_example=True),
}
MODELS: dict[str, Callable[[], Case]] = {
    "bias": lambda: of_module(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), rows(3, 4)),
    "no bias": lambda: of_module(
        nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)), rows(4)
    ),
}


def index_of(path: Path, case: Case, projection: cv.Projection, **options: Any) -> cv.influence.Index:
    return build(path, case, case.train, projection, **{"dtype": torch.float64} | options)


def scores_of(index: cv.influence.Index, case: Case, **options: Any) -> Any:
    return index.scores(case.model_fn, case.params, case.queries, **options)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_inner_products_of_whole_sketches_are_exact_scores(tmp_path: Path, kind: str, model: str) -> None:
    case = MODELS[model]()
    curv = ESTIMATORS[kind](case.model_fn, case.params, case.train)
    projection = curv.power(-0.5, DAMPING).project(cv.sketch(case.params, rank=64))
    found = scores_of(index_of(tmp_path, case, projection), case)
    assert_close(found, case.brute_force(curv.damp(DAMPING).to_dense()))
    assert_close(found, case.scores(curv.inverse(DAMPING)))


@pytest.mark.parametrize("name", ["two layers", "embedding", "norm", "convolution", "grouped convolution"])
def test_eigenvalue_corrected_curvature_takes_an_eigen_sketch_and_no_random_one(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    curv = case.curvature(cv.ekfac)
    projection = curv.power(-0.5, 0.1).project(cv.EigenSketch(rank=512))
    assert_close(scores_of(index_of(tmp_path, case, projection), case), case.scores(curv.inverse(0.1)), 1e-9)
    with pytest.raises(NotKroneckerError, match="FactoredTikhonov"):
        curv.power(-0.5, 0.1).project(cv.sketch(case.params, rank=2))


def test_sketched_scores_are_unbiased_and_their_error_falls_as_the_root_of_the_rank() -> None:
    case = of_module(nn.Linear(32, 3, bias=False), rows(32))  # the side of width 3 is kept whole
    curv = case.curvature()
    root, exact = curv.power(-0.5, DAMPING), case.scores(curv.inverse(DAMPING))

    def estimates(rank: int, draws: int) -> Tensor:
        found = []
        for seed in range(draws):
            projection = root.project(cv.sketch(case.params, rank=rank, seed=seed))
            queries, train = (
                projection(cv.per_example_gradients(case.model_fn, case.params, batch))["weight"].flatten(1)
                for batch in (case.queries, case.train)
            )
            found.append(queries @ train.mT)
        return torch.stack(found)

    errors = {}
    for rank in (4, 16):
        drawn = estimates(rank, 150)
        spread = drawn.std(0) / math.sqrt(150)
        assert bool(((drawn.mean(0) - exact).abs() <= 5 * spread).all())
        errors[rank] = float((drawn - exact).square().mean().sqrt())
    assert 1.85 <= errors[4] / errors[16] <= 2.15


@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_rows_of_fewer_bits_give_scores_to_as_many_digits(tmp_path: Path, dtype: torch.dtype, digits: float) -> None:
    exact = scores_of(index_of(tmp_path / "exact", CASE, projection_of(CASE)), CASE)
    index = index_of(tmp_path / "index", CASE, projection_of(CASE), dtype=dtype)
    found = scores_of(index, CASE)
    assert found.dtype == torch.float32
    error = float((found.double() - exact).norm() / exact.norm())
    assert digits / 100 <= error <= 4 * digits
    assert_close(index.top(CASE.model_fn, CASE.params, CASE.queries, k=3)[0], found.topk(3).values, 1e-6)


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_bytes_do_not_depend_on_the_batches_that_examples_come_in(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("batches")
    build(folder / "whole", CASE, DATA)
    build(folder / "ragged", CASE, ragged(DATA, sizes))
    build(folder / "single", CASE, ragged(DATA, [1]))
    assert contents(folder / "whole") == contents(folder / "ragged") == contents(folder / "single")


def test_sequences_of_several_lengths_and_shared_tensors_are_kept_apart_and_together(tmp_path: Path) -> None:
    case = CASES["embedding"]()

    def model_fn(params: Any, inputs: Any) -> Tensor:
        return case.model_fn(params, inputs["tokens"]) * inputs["scale"]

    scale = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    batches = []
    for count, length, seed in ((3, 4, 0), (2, 4, 1), (4, 3, 2), (1, 4, 3)):
        targets = torch.randint(3, (count, length), generator=generator(seed))
        batches.append(({"tokens": tokens(6, length)(count, seed), "scale": scale}, targets))
    curv = cv.kfac(model_fn, case.params, cv.over(batches), fisher="empirical")
    projection = curv.power(-0.5, DAMPING).project(cv.sketch(case.params, rank=64))
    index = build(tmp_path, case, cv.over(batches), projection, model_fn=model_fn, dtype=torch.float64, batch_size=4)
    found = index.scores(model_fn, case.params, cv.over(batches))
    inverse = curv.inverse(DAMPING)
    expected = [
        torch.cat([cv.influence.scores(inverse, model_fn, case.params, q, t) for t in batches], 1) for q in batches
    ]
    assert_close(found, torch.cat(expected))


def test_queries_are_sketches_or_data_or_one_vector(tmp_path: Path) -> None:
    projection = projection_of(CASE)
    index = index_of(tmp_path, CASE, projection)
    sketches = projection(cv.per_example_gradients(CASE.model_fn, CASE.params, CASE.queries))
    found = scores_of(index, CASE)
    assert torch.equal(index.scores(sketches), found)
    halves = cv.over(in_batches(CASE.queries, 1, 3))
    assert_close(index.scores(CASE.model_fn, CASE.params, halves), found)
    one = cv.unravel(CASE.gradients(CASE.queries)[2], CASE.params)
    assert_close(index.scores(index.projection(one)), found[2:3])
    parts = scores_of(index, CASE, by_block=True)
    assert list(parts) == [block.name for block in index.blocks] == ["0.weight", "2.weight"]
    assert_close(parts["0.weight"] + parts["2.weight"], found)
    margins = scores_of(index, CASE, loss=cv.CustomLoss(lambda outputs, targets: outputs.square().sum(-1)))
    assert not torch.allclose(margins, found)


def test_the_greatest_scores_are_found_across_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlib.influence.index.AT_ONCE", 100)  # two or three rows
    index = build(tmp_path, CASE, DATA)
    found = scores_of(index, CASE)
    for k in (1, 5, 30):
        values, numbers = index.top(CASE.model_fn, CASE.params, CASE.queries, k=k)
        assert_close(values, found.topk(k).values, 1e-6)
        assert_close(found.gather(1, numbers), values, 1e-6)
    for k in (0, 31):
        with pytest.raises(ArgumentError, match="between 1 and the 30 examples"):
            index.top(CASE.model_fn, CASE.params, CASE.queries, k=k)


def test_queries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    index = index_of(tmp_path, CASE, projection_of(CASE))
    sketches = projection_of(CASE)(cv.per_example_gradients(CASE.model_fn, CASE.params, CASE.queries))
    other = {name: leaf + 1 for name, leaf in CASE.params.items()}
    with pytest.raises(ArgumentError, match="same checkpoint"):
        index.scores(CASE.model_fn, other, CASE.queries)
    with pytest.raises(ArgumentError, match="need model_fn and params"):
        index.scores(CASE.queries)
    with pytest.raises(ArgumentError, match=r"blocks 0.weight, 2.weight, got 0.weight"):
        index.scores({"0.weight": sketches["0.weight"]})
    with pytest.raises(ShapeError, match=r"block '2.weight': .*\[Q, 4, 4\], got \(4, 4, 3\)"):
        index.scores(sketches | {"2.weight": sketches["2.weight"][..., :3]})
    with pytest.raises(ShapeError, match="different numbers of queries"):
        index.scores(sketches | {"2.weight": sketches["2.weight"][:2]})


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in ("shard_size", "batch_size"):
        with pytest.raises(ArgumentError, match=f"{name} must be at least 1"):
            build(tmp_path, CASE, DATA, **{name: 0})
    with pytest.raises(DtypeError, match=r"not of torch.int64"):
        build(tmp_path, CASE, DATA, dtype=torch.int64)
    with pytest.raises(PytreeError, match="other shapes"):
        build(tmp_path, CASE, DATA, params={"0.weight": CASE.params["0.weight"]})
    with pytest.raises(EmptyBatchError):
        build(tmp_path / "empty", CASE, part_of(DATA, 0, 0))
    with pytest.raises(ArgumentError, match=r"targets has shape \(29,\)"):
        build(tmp_path / "targets", CASE, (DATA[0], DATA[1][:29]))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two layers", "norm", "grouped convolution"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_known_beforehand(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    projection = case.curvature().power(-0.5, DAMPING).project(cv.sketch(case.params, rank=3))
    index = index_of(tmp_path, case, projection, dtype=dtype, shard_size=3)
    files = sorted(tmp_path.glob("0*.safetensors"))
    size = cv.influence.estimate_size(projection, 7, dtype, shard_size=3)
    assert [file.name for file in files] == ["000000-3.safetensors", "000001-3.safetensors", "000002-1.safetensors"]
    assert sum(file.stat().st_size for file in files) == size
    sketches = projection(cv.per_example_gradients(case.model_fn, case.params, case.train))
    row = torch.cat([sketches[block.name].flatten(1) for block in index.blocks], 1)
    stored = torch.cat([safetensors.torch.load_file(file)["rows"] for file in files])
    assert stored.dtype == dtype
    torch.testing.assert_close(stored, row.to(dtype), rtol=1e-2, atol=1e-6)
    assert sum(block.elements for block in index.blocks) == sum(leaf.numel() for leaf in case.params.values())


def test_the_number_of_examples_is_known_beforehand_where_that_can_be() -> None:
    loader = DataLoader(TensorDataset(*DATA), batch_size=4)
    assert number_of(DATA) == number_of(ragged(DATA, [7, 2])) == 30
    assert number_of(cv.over(loader)) == 32  # to less than a batch
    assert number_of(cv.over(iter(loader))) is None


@pytest.mark.parametrize("budget", [8, 50, 120, 1000])
def test_ranks_spend_a_budget(budget: int) -> None:
    root = CASE.curvature().power(-0.5, DAMPING)
    ranks = cv.influence.sketch_ranks(root, bytes_per_example=4 * budget)

    def numbers(extra: int) -> int:
        more = {name: rank + extra for name, rank in ranks.items()}
        return sum(math.prod(shape) for shape in root.project(cv.sketch(CASE.params, rank=more)).shapes.values())

    assert ranks.keys() == {"0.weight", "2.weight"}
    assert numbers(0) <= budget
    assert numbers(1) > budget or budget >= 5 * 7 + 4 * 6  # all sides are whole
    with pytest.raises(ArgumentError, match="rank 1 takes 4 bytes"):
        cv.influence.sketch_ranks(root, bytes_per_example=3, dtype=torch.bfloat16)


@pytest.mark.parametrize("sketch", [lambda rank: cv.sketch(CASE.params, rank=rank), lambda rank: cv.EigenSketch(rank)])
def test_ranks_may_differ_from_block_to_block(sketch: Callable[[Any], Any]) -> None:
    root = CASE.curvature().power(-0.5, DAMPING)
    projection = root.project(sketch({"0.weight": 2, "2.weight": 3}))
    assert projection.shapes == {"0.weight": (2, 2), "2.weight": (3, 3)}
    for name, rank in (("0.weight", 2), ("2.weight", 3)):
        assert torch.equal(projection(CASE.params)[name], root.project(sketch(rank))(CASE.params)[name])
    with pytest.raises(ArgumentError, match=r"block '2.weight'.*give every block one"):
        root.project(sketch({"0.weight": 2}))
    with pytest.raises(ArgumentError, match="at least 1"):
        sketch({"0.weight": 0})


# --- two stages -------------------------------------------------------------------------------------------------------


def test_exact_scores_put_what_is_recalled_in_order(tmp_path: Path) -> None:
    index, inverse = build(tmp_path, CASE, DATA), CASE.curvature().inverse(DAMPING)
    exact = cv.influence.scores(inverse, CASE.model_fn, CASE.params, CASE.queries, DATA)
    asked: list[int] = []

    def fetch(numbers: Tensor) -> Any:
        asked.extend(numbers.tolist())
        return DATA[0][numbers], DATA[1][numbers]

    def reranked(k: int, recall: float) -> tuple[Tensor, Tensor]:
        asked.clear()
        arguments = inverse, CASE.model_fn, CASE.params, CASE.queries
        return cv.influence.rerank(index, *arguments, k=k, fetch=fetch, recall=recall, batch_size=5)

    values, numbers = reranked(4, 1.0)
    assert asked == list(range(30))
    assert_close(values, exact.topk(4).values)
    assert torch.equal(numbers, exact.topk(4).indices)
    values, numbers = reranked(2, 0.1)
    recalled = index.top(CASE.model_fn, CASE.params, CASE.queries, k=3)[1].unique()
    assert asked == recalled.tolist()
    assert_close(values, exact[:, recalled].topk(2).values)
    assert_close(exact.gather(1, numbers), values)
    with pytest.raises(ArgumentError, match="recall"):
        reranked(2, 0.0)
