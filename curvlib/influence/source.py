"""Examples, of which influence takes the gradients: batch by batch, as often as they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch

from curvlib.capture.engines import ModelFn
from curvlib.gradients.data import Batch, DataSet, batches
from curvlib.gradients.objective import objective_gradient
from curvlib.gradients.per_example import PerExampleGradients, gradients_under
from curvlib.gradients.plans import Plans, planned
from curvlib.losses import Loss
from curvlib.pytree import Tree, tree_map


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples whose gradients are taken, batch by batch."""

    model_fn: ModelFn
    params: Tree
    data: Batch | DataSet
    loss: Loss
    engine: str | None
    plans: Plans

    def __iter__(self) -> Iterator[PerExampleGradients]:
        """Yields the gradients of the examples of every batch."""
        for plan, inputs, targets in planned(self.model_fn, self.params, self.data, self.plans):
            batch = inputs, targets
            yield gradients_under(plan, self.model_fn, self.params, batch, self.loss, "gradient", self.engine)

    def total(self) -> Tree:
        """The sum of all gradients, as a stack of one vector."""
        loss = dataclasses.replace(cast(Any, self.loss), reduction="sum")  # losses are frozen dataclasses
        total: Tree = None
        for inputs, targets in batches(self.data):
            found = objective_gradient(self.model_fn, self.params, inputs, targets, loss, self.engine)
            total = found if total is None else tree_map(torch.add, total, found)
        return tree_map(lambda leaf: leaf.unsqueeze(0), total)
