"""Influence of training examples on queries, from uncompressed gradients: g_q^T curv^-1 g_t (Koh & Liang 2017)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from curvlib.arguments import check_model
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.errors import ArgumentError, ShapeError, naming
from curvlib.gradients.data import Batch, DataSet, check_order
from curvlib.gradients.per_example import PerExampleGradients
from curvlib.gradients.plans import Plans
from curvlib.influence.contractions import BlockVectors
from curvlib.influence.preconditioning import Inverse, apply, check_inverse, in_blocks, quadratic_forms, stacks
from curvlib.influence.source import Source
from curvlib.layers.rows import summed
from curvlib.losses import CrossEntropy, Loss, check_loss
from curvlib.pytree import Domain, Tree, tree_map

AGGREGATES = ("queries", "train")
Scores = Tensor | dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How finely scores are resolved."""

    by_block: bool
    per_token: bool

    def of(self, vectors: dict[str, BlockVectors], gradients: PerExampleGradients) -> Scores:
        """The scores of the examples of one batch: [Q, N], or [Q, N, T]."""
        found = {}
        for name, stack in vectors.items():
            block = gradients.blocks[name]
            with naming(name):
                found[name] = stack.position_inner(block) if self.per_token else stack.inner(block)
        if self.by_block:
            return found
        if self.per_token:
            check_positions(found)
        return summed(list(found.values()))

    def over(
        self, batches: Iterable[PerExampleGradients], vectors: Callable[[PerExampleGradients], dict[str, BlockVectors]]
    ) -> Scores:
        """The scores of all examples."""
        parts = [self.of(vectors(gradients), gradients) for gradients in batches]
        return tree_map(lambda *found: beside(found), *parts)


def check_positions(found: dict[str, Tensor]) -> None:
    """Refuses to add up over positions that do not correspond.

    Raises:
        ShapeError: blocks have different numbers of positions; names them.
    """
    first = next(iter(found))
    for name, part in found.items():
        if part.shape != found[first].shape:
            raise ShapeError(
                f"per_token: block {first!r} has {found[first].shape[2]} positions and block {name!r} has "
                f"{part.shape[2]}, which cannot be added: use by_block=True, or close over one of them in model_fn"
            )


def beside(parts: Sequence[Tensor]) -> Tensor:
    """The scores of several batches as one tensor.

    Raises:
        ShapeError: they have different numbers of positions.
    """
    positions = {part.shape[2:] for part in parts}
    if len(positions) > 1:
        numbers = ", ".join(str(*shape) for shape in sorted(positions))
        raise ShapeError(
            f"per_token: batches of the training data have {numbers} positions; pad them to the same number, "
            "or ask for the scores of one batch at a time"
        )
    return torch.cat(list(parts), 1)


def bar(source: Source, progress: bool) -> Iterable[PerExampleGradients]:
    """The batches of a source, with a progress bar on a terminal if asked for."""
    batches: Iterable[PerExampleGradients] = tqdm(source, "scores", unit="batch", disable=None if progress else True)
    return batches


def check_options(query_batch: int | None, query_rank: int | None, per_token: bool, aggregate: str | None) -> None:
    """Refuses values that are not documented, and what does not go together.

    Raises:
        ArgumentError: see `scores`.
    """
    for name, value in (("query_batch", query_batch), ("query_rank", query_rank)):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}")
    if aggregate is None:
        return
    if aggregate not in AGGREGATES:
        raise ArgumentError(f"aggregate must be 'queries', 'train' or None, got {aggregate!r}")
    if query_batch is not None or query_rank is not None:
        raise ArgumentError("query_batch and query_rank have no meaning with aggregate, which takes one vector only")
    if per_token and aggregate == "train":
        raise ArgumentError("per_token needs the training examples apart, which aggregate='train' adds up")


def scores(
    curv_inverse: Inverse,
    model_fn: ModelFn,
    params: Tree,
    queries: Batch | DataSet,
    train: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    measurement: Loss | None = None,
    query_batch: int | None = None,
    query_rank: int | None = None,
    by_block: bool = False,
    per_token: bool = False,
    aggregate: str | None = None,
    progress: bool = False,
    engine: str | None = None,
    plan: Plan | Plans | None = None,
) -> Scores:
    """Influence scores s_qt = g_q^T curv^-1 g_t of every training example t on every query q.

    g_t is the gradient of the example's own, unreduced loss term, and g_q that of what is measured on the query. To
    leave t out of the N examples of a mean loss raises what is measured by s_qt / N to first order: of a loss, positive
    scores belong to examples that help. The inverse is applied to the queries' gradients once. Training gradients are
    taken batch by batch and never stored; where it takes fewer multiplications, they are not formed.

    Args:
        curv_inverse: the inverse of a curvature on ``params``, such as ``cv.ekfac(...).inverse(damping)``, or
            ``cv.ggn(...).inverse(damping, solver=cv.CG(...))``, which solves for many queries at a time; or a function
            of one vector, a pytree like params.
        model_fn: pure function (params, inputs) -> outputs.
        params: pytree of floating-point tensors.
        queries: (inputs, targets), or a data set `over` a loader, which is read once. Rows are in its order.
        train: (inputs, targets), or a data set, which is read once for every ``query_batch`` queries. Columns are in
            its order.
        loss: the loss that the model was trained with.
        measurement: what is measured on queries in place of the loss, such as ``cv.CustomLoss(margin)``; it need not be
            convex.
        query_batch: how many queries' gradients are held in memory at a time; None: as many as have 2^28 elements.
        query_rank: k: contract with the best approximation of rank k of each block's preconditioned query gradient
            [m, n], where k (m + n) < m n; other blocks are exact.
        by_block: what each block contributes, by its name: curv^-1 g_q and g_t are multiplied over its parameters only
            (for ``aggregate="train"``, curv^-1 sum g_t and g_q).
        per_token: what each position of the layers' input contributes; the sum over positions is the score.
        aggregate: ``queries``: the sum over queries, or ``train``: that over training examples, either from one vector
            curv^-1 sum g.
        progress: show a progress bar if standard error is a terminal.
        engine: "functional", "autograd" or None, as for `kfac`.
        plan: the model's `plan`, if already made for inputs of these shapes; or `Plans`. One is made for all batches of
            the same shapes, queries and training data alike.

    Returns:
        Tensor [Q, N]; [Q, N, T] for ``per_token``; without its first axis for ``aggregate="queries"``, and [Q] for
        ``aggregate="train"``. A dictionary of them for ``by_block``.

    Raises:
        PytreeError: ``curv_inverse`` does not act on vectors like params.
        EmptyBatchError: there is no query, or no training example.
        ArgumentError: a value that is not documented; training data that would have to be read twice and cannot be; or
            a loader in random order, where examples are not added up.
        ShapeError: ``per_token`` where blocks or batches have different numbers of positions, or none; names the block.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> train = torch.randn(20, 3), torch.randint(2, (20,))
        >>> queries = torch.randn(4, 3), torch.randint(2, (4,))
        >>> inverse = cv.ekfac(model_fn, params, train).inverse(0.1)
        >>> found = scores(inverse, model_fn, params, queries, train)
        >>> found.shape
        torch.Size([4, 20])
        >>> total = scores(inverse, model_fn, params, queries, train, aggregate="queries")
        >>> torch.allclose(total, found.sum(0), atol=1e-5)
        True
    """
    check_model(model_fn, params)
    check_loss(loss)
    check_loss(measurement or loss, "measurement")
    check_options(query_batch, query_rank, per_token, aggregate)
    check_inverse(curv_inverse, Domain.of(params))
    if aggregate != "queries":
        check_order(queries, "scores have one row a query, in the order of the data")
    if aggregate != "train":
        check_order(train, "scores have one column a training example, in the order of the data")
    plans = Plans.of(plan)
    asked = Source(model_fn, params, queries, measurement or loss, engine, plans)
    known = Source(model_fn, params, train, loss, engine, plans)
    wanted = Wanted(by_block, per_token)
    if aggregate is not None:
        summed_up, other = (asked, known) if aggregate == "queries" else (known, asked)
        vector = apply(curv_inverse, summed_up.total(), Domain.of(params))
        found = wanted.over(bar(other, progress), lambda batch: in_blocks(vector, batch))
        return tree_map(lambda part: part[0], found)
    parts = [
        wanted.over(bar(known, progress), held.fitting)
        for held in stacks(curv_inverse, asked, train, query_batch, query_rank)
    ]
    return tree_map(lambda *stack: torch.cat(stack), *parts)


def self_influence(
    curv_inverse: Inverse,
    model_fn: ModelFn,
    params: Tree,
    train: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    by_block: bool = False,
    progress: bool = False,
    engine: str | None = None,
    plan: Plan | Plans | None = None,
) -> Scores:
    """The influence g_t^T curv^-1 g_t of every training example on itself: large for outliers and wrong labels.

    Args:
        curv_inverse: as for `scores`, as are the arguments not named here.
        model_fn: pure function (params, inputs) -> outputs.
        params: pytree of floating-point tensors.
        train: (inputs, targets), or a data set, which is read once.
        loss: the loss that the model was trained with.
        by_block: what each block contributes, by its name.
        progress: show a progress bar if standard error is a terminal.
        engine: "functional", "autograd" or None.
        plan: as for `scores`.

    Returns:
        Tensor [N], or a dictionary of them for ``by_block``.

    Raises:
        PytreeError: ``curv_inverse`` does not act on vectors like params.
        EmptyBatchError: there is no training example.
        ArgumentError: the loader is in random order.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> train = torch.randn(20, 3), torch.randint(2, (20,))
        >>> inverse = cv.ekfac(model_fn, params, train).inverse(0.1)
        >>> found = self_influence(inverse, model_fn, params, train)
        >>> torch.allclose(found, scores(inverse, model_fn, params, train, train).diagonal(), atol=1e-5)
        True
    """
    check_model(model_fn, params)
    check_loss(loss)
    check_inverse(curv_inverse, Domain.of(params))
    check_order(train, "self-influence has one number a training example, in the order of the data")
    source = Source(model_fn, params, train, loss, engine, Plans.of(plan))
    parts = []
    for batch in bar(source, progress):
        found = quadratic_forms(curv_inverse, batch)
        parts.append(found if by_block else summed(list(found.values())))
    return tree_map(lambda *stack: torch.cat(stack), *parts)
