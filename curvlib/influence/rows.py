"""The rows of an index: all blocks' sketches of an example's gradient side by side."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from curvlib.capture.engines import ModelFn
from curvlib.errors import NonFiniteError
from curvlib.gradients.per_example import gradients_under
from curvlib.gradients.plans import Plans
from curvlib.influence.examples import SelectedExamples
from curvlib.influence.manifest import block_rows
from curvlib.losses import Loss
from curvlib.operators import Projection
from curvlib.pytree import Tree


@dataclasses.dataclass(frozen=True)
class IndexRows:
    """Makes the rows of examples: their blocks' sketches side by side.

    Args:
        projection: sketches gradients.
        model_fn: pure function (params, inputs) -> outputs.
        params: pytree of tensors.
        loss: the objective.
        dtype: of the rows.
        plans: of the model.
    """

    projection: Projection
    model_fn: ModelFn
    params: Tree
    loss: Loss
    dtype: torch.dtype
    plans: Plans

    def of(self, examples: SelectedExamples, start: int) -> Tensor:
        """The rows [n, width], on the CPU; ``start`` is the number of the first example.

        Raises:
            NonFiniteError: a number is infinite or not a number in the dtype of the rows; names block and example.
        """
        plan = self.plans.fitting(self.model_fn, self.params, examples.batch[0])
        gradients = gradients_under(plan, self.model_fn, self.params, examples.batch, self.loss, "gradient", None)
        sketches = self.projection(gradients)
        names = [name for name, _ in self.projection.layouts]
        rows = torch.cat([sketches[name].detach().flatten(1) for name in names], 1).to("cpu", self.dtype)
        if not rows.isfinite().all():
            self.refuse(rows, start)
        return rows

    def refuse(self, rows: Tensor, start: int) -> None:
        """Raises NonFiniteError for the first row that is not finite."""
        example, place = (~rows.isfinite()).nonzero()[0].tolist()
        block = next(block for block in block_rows(self.projection) if block.part.stop > place)
        raise NonFiniteError(
            f"block {block.name!r}: the sketch of example {start + example} is not finite in {self.dtype}; look at the "
            "example and the damping, or store rows in another dtype"
        )
