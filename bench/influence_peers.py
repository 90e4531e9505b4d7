"""kronfluence and dattri as functions from a model and data to influence scores."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlib as cv

Batch = tuple[Tensor, Tensor]


def linear_layers(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """The network as a function of its linear layers' parameters, which is all that kronfluence attributes."""
    model_fn, params = cv.functional(module)
    names = {
        f"{layer}.{name}"
        for layer, part in module.named_modules()
        if isinstance(part, nn.Linear)
        for name, _ in part.named_parameters()
    }
    frozen = {name: leaf for name, leaf in params.items() if name not in names}
    return lambda some, inputs: model_fn({**frozen, **some}, inputs), {name: params[name] for name in sorted(names)}


class Kronfluence:
    """EKFAC influence by kronfluence; its files go to a temporary folder, its model is a copy.

    Args:
        module: its linear and convolution layers are attributed.
        train: (inputs, targets); the loss is the cross-entropy of the last axis, summed over positions.
        empirical: gradients of targets in place of drawn ones.
        batch_size: of examples.
    """

    def __init__(self, module: nn.Module, train: Batch, *, empirical: bool, batch_size: int = 500) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

        class Terms(Task):
            def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
                outputs = model(batch[0]).flatten(0, -2)
                targets = batch[1].flatten()
                if sample:
                    targets = torch.multinomial(outputs.detach().softmax(-1), 1).flatten()
                return F.cross_entropy(outputs, targets, reduction="sum")

            def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        warnings.filterwarnings("ignore", message=".*GradScaler")
        self.folder = tempfile.TemporaryDirectory()
        self.train, self.batch_size = TensorDataset(*train), batch_size
        self.arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=empirical)
        model = prepare_model(copy.deepcopy(module), Terms())
        self.analyzer: Any = Analyzer(
            "bench", model, Terms(), cpu=True, disable_tqdm=True, output_dir=self.folder.name, log_level=logging.ERROR
        )

    def fit(self) -> None:
        """Factors, eigenbases and eigenvalues."""
        self.analyzer.fit_all_factors(
            "factors",
            self.train,
            per_device_batch_size=self.batch_size,
            factor_args=self.arguments,
            overwrite_output_dir=True,
        )

    def scores(self, queries: Batch, damping: float | None = None, query_batch: int = 100) -> Tensor:
        """Scores [Q, N]; no damping means a tenth of each layer's mean eigenvalue."""
        from kronfluence.arguments import ScoreArguments

        self.analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            TensorDataset(*queries),
            self.train,
            query_batch,
            self.batch_size,
            score_args=ScoreArguments(damping_factor=damping),
            overwrite_output_dir=True,
        )
        return self.analyzer.load_pairwise_scores("scores")["all_modules"]


def mean_loss(module: nn.Module, params: Any, batch: Batch) -> Tensor:
    """The cross-entropy of the last axis, over examples and positions."""
    outputs = torch.func.functional_call(module, params, batch[0])
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def dattri_task(module: nn.Module, *, margin: bool) -> Any:
    """The cross-entropy, or TRAK's margin log p / (1 - p), as dattri wants them."""
    from dattri.task import AttributionTask

    def loss(params: Any, data: Batch) -> Tensor:
        value = mean_loss(module, params, data if data[0].ndim > 1 else (data[0][None], data[1][None]))
        return -value - torch.log1p(-torch.exp(-value).clamp(max=1 - 1e-6)) if margin else value

    return AttributionTask(loss_func=loss, model=module, checkpoints=module.state_dict())


def loader(batch: Batch, batch_size: int) -> DataLoader[Any]:
    """Batches in the order of the data."""
    return DataLoader(TensorDataset(*batch), batch_size, shuffle=False)


def dattri_trak(module: nn.Module, train: Batch, queries: Batch, dimensions: int) -> Tensor:
    """TRAK's scores [Q, N] of one checkpoint: how much training examples raise the margin."""
    from dattri.algorithm.trak import TRAKAttributor

    module = copy.deepcopy(module)

    def probability(params: Any, data: Batch) -> Tensor:
        return torch.exp(-mean_loss(module, params, (data[0][None], data[1][None])))

    attributor = TRAKAttributor(
        dattri_task(module, margin=True), probability, {"proj_dim": dimensions, "proj_max_batch_size": 32}
    )
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        attributor.cache(loader(train, 250))
        return attributor.attribute(loader(queries, 250)).mT


def dattri_ekfac(module: nn.Module, train: Batch, queries: Batch, damping: float) -> Tensor:
    """EKFAC influence [Q, N] with the empirical Fisher as dattri has it.

    It has one damping for all layers: here so many times the mean of all its eigenvalues. Its eigenvectors are
    transposed, and the bias is scrambled where a flat gradient is cut into layers.
    """
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    attributor = IFAttributorEKFAC(dattri_task(copy.deepcopy(module), margin=False))
    with contextlib.redirect_stderr(io.StringIO()):
        attributor.cache(loader(train, 250))
        values = torch.cat([found.flatten() for found in attributor.cached_lambdas.values()])
        attributor.damping = damping * float(values.mean())
        return attributor.attribute(loader(train, 250), loader(queries, 250)).mT.detach()
