"""Influence scores equal kronfluence's (1.0.1) for the same data, targets and damping.

kronfluence's matrices are means over examples, and its damping, unless it is given one, a tenth of a layer's mean
eigenvalue: `RelativeTikhonov`. Terms of an example are summed over positions in either library; under
``CrossEntropy("sum")`` curvlib's matrices are sums over examples, so scores are multiplied by their number here.
Its KFAC is compared where a layer has one row an example: with more, both of its factors are means over rows. In
float64 no difference remains; in float32 the one that does is in the eigenvectors, see the test of that name.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cv
from tests import reference

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HEURISTIC = 0.1  # kronfluence's factor of the mean eigenvalue, if it is given no damping
Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )


class Case(NamedTuple):
    """A model, an input's shape and a target's."""

    module: nn.Module
    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    def batch(self, n: int, seed: int, dtype: torch.dtype) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(n, *self.inputs, generator=generator, dtype=dtype)
        return inputs, torch.randint(3, (n, *self.targets), generator=generator)


def case(name: str) -> Case:
    torch.manual_seed(0)
    made = {
        "mlp": Case(mlp(), (5,), ()),
        "a loss at every position": Case(mlp(), (4, 5), (4,)),
        "convolutions": Case(convolutions(), (2, 4, 4), ()),
    }
    return made[name]


CASES = ("mlp", "a loss at every position", "convolutions")


def kronfluence_scores(
    folder: Path, module: nn.Module, queries: Batch, train: Batch, strategy: str, damping: float | None
) -> tuple[Tensor, Tensor]:
    """Scores [Q, N] and self-influence [N], everything in the dtype of the data."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Terms(Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            assert not sample
            return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten(), reduction="sum")

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    dtype = train[0].dtype
    factor_kinds = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    score_kinds = ("per_sample_gradient", "precondition", "score", "query_gradient_svd")
    factors: Any = {f"{kind}_dtype": dtype for kind in factor_kinds}
    measured: Any = {f"{kind}_dtype": dtype for kind in score_kinds}
    factor_args = FactorArguments(strategy=strategy, use_empirical_fisher=True, **factors)
    score_args = ScoreArguments(damping_factor=damping, **measured)

    model = prepare_model(copy.deepcopy(module), Terms())
    analyzer = Analyzer("parity", model, Terms(), cpu=True, disable_tqdm=True, output_dir=str(folder))
    asked, known = TensorDataset(*queries), TensorDataset(*train)
    analyzer.fit_all_factors("factors", known, per_device_batch_size=5, factor_args=factor_args)
    analyzer.compute_pairwise_scores("pairs", "factors", asked, known, 2, 7, score_args=score_args)
    analyzer.compute_self_scores("self", "factors", known, 7, score_args=score_args)
    return (
        analyzer.load_pairwise_scores("pairs")["all_modules"],
        analyzer.load_self_scores("self")["all_modules"],
    )


def curvlib_scores(
    module: nn.Module, queries: Batch, train: Batch, strategy: str, damping: float | None
) -> tuple[Tensor, Tensor]:
    """The same by curvlib, multiplied by what a sum of matrices is larger by than kronfluence's mean."""
    model_fn, params = cv.functional(module)
    loss = cv.CrossEntropy("sum")
    estimate = {"ekfac": cv.ekfac, "kfac": cv.kfac, "diagonal": cv.diagonal, "identity": cv.kfac}[strategy]
    curv: Any = estimate(model_fn, params, train, loss=loss, fisher="empirical")
    if strategy == "identity":
        inverse, scale = curv.map_eigenvalues(torch.ones_like), 1
    else:
        scale = len(train[0])
        if damping is None and strategy != "diagonal":
            inverse = curv.inverse(cv.RelativeTikhonov(HEURISTIC))
        else:
            inverse = curv.inverse(scale * (damping or 0.0))
    arguments: Any = {"loss": loss}
    pairs = cv.influence.scores(inverse, model_fn, params, queries, train, **arguments)
    own = cv.influence.self_influence(inverse, model_fn, params, train, **arguments)
    return scale * pairs, scale * own


def linear_layers(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """The model as a function of the parameters that kronfluence attributes."""
    model_fn, params = cv.functional(module)
    kept = {name: leaf for name, leaf in params.items() if isinstance(module.get_submodule(name[:1]), nn.Linear)}
    return lambda some, inputs: model_fn({**params, **some}, inputs), kept


def assert_agree(folder: Path, name: str, dtype: torch.dtype, strategy: str, damping: float | None) -> None:
    problem = case(name)
    module = problem.module.to(dtype)
    queries, train = problem.batch(5, 1, dtype), problem.batch(40, 2, dtype)
    theirs = kronfluence_scores(folder, module, queries, train, strategy, damping)
    ours = curvlib_scores(module, queries, train, strategy, damping)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert other.norm() > 0
        assert reference.relative_error(mine, other) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("damping", [None, 1e-3])
def test_ekfac_scores_agree(name: str, dtype: torch.dtype, damping: float | None, tmp_path: Path) -> None:
    assert_agree(tmp_path, name, dtype, "ekfac", damping)


def test_what_float32_loses_is_in_the_eigenvectors(tmp_path: Path) -> None:
    """Of close eigenvalues, float32 mixes the eigenvectors; kronfluence decomposes float32 factors in float64."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48), nn.LayerNorm(48), nn.Linear(48, 3))
    problem = Case(module, (8, 48), (8,))
    queries, train = problem.batch(4, 1, torch.float32), problem.batch(30, 2, torch.float32)
    theirs, _ = kronfluence_scores(tmp_path, module, queries, train, "ekfac", None)

    loss: Any = cv.CrossEntropy("sum")
    empirical: Any = {"loss": loss, "fisher": "empirical"}
    model_fn, params = linear_layers(module)
    factors = cv.kfac(model_fn, params, train, **empirical).to(dtype=torch.float64)
    exact_fn, exact = linear_layers(copy.deepcopy(module).double())
    queries, train = ((inputs.double(), targets) for inputs, targets in (queries, train))
    curv = cv.eigenvalue_correct(factors, exact_fn, exact, train, **empirical)
    inverse = curv.inverse(cv.RelativeTikhonov(HEURISTIC))
    ours = len(train[0]) * cv.influence.scores(inverse, exact_fn, exact, queries, train, loss=loss)
    assert reference.relative_error(ours, theirs.double()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("damping", [None, 1e-3])
def test_kfac_scores_agree(dtype: torch.dtype, damping: float | None, tmp_path: Path) -> None:
    assert_agree(tmp_path, "mlp", dtype, "kfac", damping)


@pytest.mark.parametrize("name", CASES)
def test_scores_without_curvature_agree(name: str, tmp_path: Path) -> None:
    assert_agree(tmp_path, name, torch.float64, "identity", None)


@pytest.mark.parametrize("name", CASES)
def test_diagonal_scores_agree(name: str, tmp_path: Path) -> None:
    assert_agree(tmp_path, name, torch.float64, "diagonal", 1e-3)
