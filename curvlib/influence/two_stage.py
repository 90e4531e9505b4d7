"""Two stages: an index recalls some examples, and exact scores put those in order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from torch import Tensor

from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn, examples_in
from curvlib.errors import ArgumentError, ShapeError
from curvlib.gradients.data import Batch, DataSet, batches, repeatable
from curvlib.gradients.plans import Plans
from curvlib.influence.index import Index
from curvlib.influence.preconditioning import Inverse
from curvlib.influence.scores import scores
from curvlib.losses import CrossEntropy, Loss
from curvlib.pytree import Tree


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A loader of the batches of some examples."""

    fetch: Callable[[Tensor], Batch]
    examples: Tensor
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches in the order of the numbers."""
        for part in self.examples.split(self.batch_size):
            batch = self.fetch(part)
            [(inputs, _)] = batches(batch)
            if examples_in(inputs) != len(part):
                raise ShapeError(
                    f"fetch was given the numbers of {len(part)} examples and returned {examples_in(inputs)}; it must "
                    "return (inputs, targets) of these examples, in their order"
                )
            yield batch


def rerank(
    index: Index,
    curv_inverse: Inverse,
    model_fn: ModelFn,
    params: Tree,
    queries: Batch | DataSet,
    *,
    k: int,
    fetch: Callable[[Tensor], Batch],
    recall: float = 0.01,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    measurement: Loss | None = None,
    batch_size: int = 32,
    plan: Plan | Plans | None = None,
) -> tuple[Tensor, Tensor]:
    """The k examples with the greatest exact scores among those that sketches recall.

    The greatest sketched scores of every query choose max(k, recall N) examples. Exact scores are computed for all that
    are chosen for any query, and every query may rank all of them.

    Args:
        index: sketches of the training data.
        curv_inverse: as for `scores`.
        model_fn: pure function (params, inputs) -> outputs.
        params: pytree of tensors, those that the index was made for.
        queries: (inputs, targets), or a data set `over` a loader; it is read twice.
        k: how many examples are wanted for every query.
        fetch: a function of an integer tensor [n], ascending numbers of training examples, that returns these
            examples (inputs, targets), in this order.
        recall: the share of the training data that is looked at for a query.
        loss: the loss that the model was trained with.
        measurement: what is measured on queries in place of the loss.
        batch_size: examples that are fetched together.
        plan: the model's `plan`, if already made for inputs of these shapes; or `Plans`.

    Returns:
        (exact scores [Q, k], descending; numbers of the examples [Q, k]).

    Raises:
        ArgumentError: not 0 < recall <= 1, or k or params do not fit the index, or queries cannot be read twice, or
            come in random order.
        ShapeError: ``fetch`` does not return as many examples as it was asked for.

    Example:
        >>> import tempfile
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(6, 4))
        >>> inputs, targets = torch.randn(50, 6), torch.randint(4, (50,))
        >>> curv, damping = cv.kfac(model_fn, params, (inputs, targets)), cv.FactoredTikhonov(0.1)
        >>> projection = curv.power(-0.5, damping).project(cv.EigenSketch(rank=3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = cv.influence.build(folder, projection, model_fn, params, (inputs, targets))
        ...     values, examples = rerank(
        ...         index, curv.inverse(damping), model_fn, params, (inputs[:3], targets[:3]), k=2, recall=0.2,
        ...         fetch=lambda numbers: (inputs[numbers], targets[numbers]),
        ...     )
        >>> values.shape, examples.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """
    if not 0 < recall <= 1:
        raise ArgumentError(f"recall must be a share of the examples, 0 < recall <= 1, got {recall}")
    if not 1 <= k <= len(index):
        raise ArgumentError(f"k must lie between 1 and the {len(index)} examples of the index, got {k}")
    repeatable(queries)
    count = max(k, math.ceil(recall * len(index)))
    plans = Plans.of(plan)
    _, recalled = index.top(model_fn, params, queries, k=count, loss=measurement or loss, plan=plans)
    examples = recalled.unique()
    train = DataSet(Fetched(fetch, examples.cpu(), batch_size), progress=False)
    exact = scores(
        curv_inverse, model_fn, params, queries, train, loss=loss, measurement=measurement, plan=plans
    )
    assert isinstance(exact, Tensor)
    values, places = exact.topk(k, dim=1)
    return values, examples.to(places.device)[places]
