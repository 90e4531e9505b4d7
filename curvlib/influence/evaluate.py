r"""Are influence scores right? What they predict, against training again.

One convention for all: the score of query q and training example t is

    s(q, t) = grad f_q^T (H + d)^{-1} grad l_t,

l_t the loss of the example, f_q what is measured on the query: its loss, or a margin, or whatever the scores were
computed for. Training without t changes f_q by about s(q, t) / N, so training on a subset S gives

    f_q(S) ~ constant - sum_{t in S} s(q, t) / N.

Where f_q is a loss, examples of positive scores help. ``outputs`` are always values of the same f_q.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, DtypeError, ShapeError
from curvlib.influence.mislabels import MislabelDetection, mislabel_detection
from curvlib.influence.ranks import finite, pearson, spearman
from curvlib.influence.retraining import Train, retrain
from curvlib.influence.subsets import of_size, subsets, without_each, without_top
from curvlib.pytree import register

__all__ = [
    "Brittleness",
    "Correlations",
    "MislabelDetection",
    "brittleness",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_detection",
    "retrain",
    "subsets",
    "without_each",
]


@register
class Correlations:
    """One correlation a query.

    Args:
        per_query: float64 [Q]; nan for a query whose predictions or outputs are all the same.
    """

    per_query: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over queries; nan if one of them is."""
        return self.per_query.mean()

    @property
    def standard_error(self) -> Tensor:
        """Of the mean, over queries: what other queries would change, not other runs. nan for a single query."""
        return self.per_query.std() / len(self.per_query) ** 0.5


def linear_datamodeling_score(scores: Tensor, subsets: Tensor, outputs: Tensor) -> Correlations:
    """How well scores rank subsets by what training on them gives: the linear datamodeling score (LDS).

    For every query, Spearman's correlation over subsets S between the prediction - sum_{t in S} s(q, t) and the output
    measured after training on S. Source: Park et al. 2023 (TRAK, arXiv 2303.14186), section 2.

    Args:
        scores: s [Q, N].
        subsets: bool [S, N], as `subsets` makes them: of equal sizes.
        outputs: [S, Q], as `retrain` gives them: values of what the scores are the influence on.

    Raises:
        ShapeError: shapes do not fit each other, or there are fewer than two subsets.
        DtypeError: subsets are not bool.
        NonFiniteError: scores or outputs are not finite.

    Example:
        >>> import torch
        >>> from curvlib.influence import evaluate
        >>> help_of = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
        >>> chosen = evaluate.subsets(6, number=20)
        >>> outputs = evaluate.retrain(lambda examples, seed: -help_of[examples].sum().reshape(1), chosen)
        >>> evaluate.linear_datamodeling_score(help_of.reshape(1, 6), chosen, outputs).mean > 0.999
        tensor(True)
    """
    scores, subsets, outputs = fitting(scores, subsets, outputs)
    return Correlations(spearman(-scores @ subsets.to(scores).mT, outputs.mT))


def leave_one_out(scores: Tensor, subsets: Tensor, outputs: Tensor) -> Correlations:
    """How well scores predict what leaving out single examples does.

    For every query, Pearson's correlation over the examples t left out between s(q, t) / N and the output without t
    minus the output with all examples. Networks trained by stochastic gradients differ more by chance than by one
    example: there it is about zero for every method, and `linear_datamodeling_score` is what can be measured.

    Args:
        scores: s [Q, N].
        subsets: bool [1 + K, N], as `without_each` makes them.
        outputs: [1 + K, Q], as `retrain` gives them.

    Raises:
        ArgumentError: the first subset does not hold every example, or another one does not lack exactly one.
        ShapeError: shapes do not fit each other, or fewer than two examples are left out.
        DtypeError: subsets are not bool.
        NonFiniteError: scores or outputs are not finite.

    Example:
        >>> import torch
        >>> from curvlib.influence import evaluate
        >>> values, queries = torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor([0.0, 10.0])
        >>> chosen = evaluate.without_each(4, torch.arange(4))
        >>> outputs = evaluate.retrain(lambda examples, seed: (values[examples].mean() - queries) ** 2 / 2, chosen)
        >>> scores = torch.outer(values.mean() - queries, values.mean() - values)  # of a mean: the Hessian is 1
        >>> evaluate.leave_one_out(scores, chosen, outputs).per_query > 0.99
        tensor([True, True])
    """
    scores, subsets, outputs = fitting(scores, subsets, outputs, fewest=3)
    left_out = ~subsets
    if left_out[0].any() or (left_out[1:].sum(1) != 1).any():
        raise ArgumentError(
            "leave_one_out needs a first subset of every example and others that lack exactly one: make them by "
            "evaluate.without_each"
        )
    which = left_out[1:].int().argmax(1)
    return Correlations(pearson(scores[:, which] / scores.shape[1], (outputs[1:] - outputs[0]).mT))


@register
class Brittleness:
    """What removing examples did to the output of each query.

    Args:
        counts: [K], how many examples were removed.
        everything: [Q], outputs with all examples.
        without_helpful: [K, Q], outputs without the most helpful examples of the query.
        without_random: [K, Q], mean output without as many random ones.
    """

    counts: Tensor
    everything: Tensor
    without_helpful: Tensor
    without_random: Tensor

    @property
    def change(self) -> Tensor:
        """What the most helpful examples do more than random ones: [K, Q]."""
        return self.without_helpful - self.without_random


def brittleness(
    train: Train,
    scores: Tensor,
    *,
    counts: Sequence[int],
    random: int = 10,
    random_seed: int = 0,
    seeds: Sequence[int] = (0,),
    path: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Brittleness:
    """Removes a query's most helpful examples, trains again, and compares with removing random ones.

    The most helpful examples are those of the greatest scores: without them the output, a loss, should rise most. All
    of this takes ``(1 + len(counts) * (random + Q)) * len(seeds)`` runs.

    Args:
        train: as in `retrain`.
        scores: s [Q, N], of the queries that ``train`` measures, in its order; for another measurement than a loss,
            where more is better, give minus the scores.
        counts: how many examples to remove, each below N.
        random: how many random removals of each count, shared by all queries.
        random_seed: of the random removals.
        seeds: as in `retrain`.
        path: as in `retrain`; scores of another method need another path.
        overwrite: as in `retrain`.
        progress: as in `retrain`.

    Raises:
        ArgumentError: a count is below 1 or leaves no example, or there is none; or as `retrain`.
        ShapeError: scores are not [Q, N], or ``train`` does not measure Q queries.
        NonFiniteError: scores or outputs are not finite.

    Example:
        >>> import torch
        >>> from curvlib.influence import evaluate
        >>> help_of = torch.tensor([[8.0, 1.0, 0.0, 3.0]])
        >>> result = evaluate.brittleness(lambda examples, seed: -help_of[:, examples].sum(1), help_of, counts=(1, 2))
        >>> result.without_helpful - result.everything
        tensor([[ 8.],
                [11.]])
        >>> (result.change > 0).all()
        tensor(True)
    """
    scores = finite("scores", matrix("scores", scores))
    queries, examples = scores.shape
    if not counts:
        raise ArgumentError("brittleness needs at least one count of examples to remove")
    removals = [
        torch.cat([of_size(examples, examples - k, number=random, seed=random_seed), without_top(scores, k)])
        for k in counts
    ]
    everything = torch.ones(1, examples, dtype=torch.bool)
    outputs = retrain(
        train, torch.cat([everything, *removals]), seeds=seeds, path=path, overwrite=overwrite, progress=progress
    )
    if outputs.shape[1] != queries:
        raise ShapeError(f"scores are of {queries} queries, but train measures {outputs.shape[1]}")
    after = outputs[1:].unflatten(0, (len(counts), random + queries))
    return Brittleness(
        counts=torch.tensor(tuple(counts)),
        everything=outputs[0],
        without_helpful=after[:, random:].diagonal(dim1=1, dim2=2),
        without_random=after[:, :random].mean(1),
    )


def fitting(scores: Tensor, subsets: Tensor, outputs: Tensor, *, fewest: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """All three on the CPU, scores and outputs in float64, if they fit each other."""
    for name, tensor in {"scores": scores, "subsets": subsets, "outputs": outputs}.items():
        matrix(name, tensor)
    if subsets.dtype != torch.bool:
        raise DtypeError(f"subsets must be bool, got {subsets.dtype}")
    if subsets.shape[1] != scores.shape[1] or outputs.shape != (len(subsets), len(scores)):
        raise ShapeError(
            "scores [Q, N], subsets [S, N] and outputs [S, Q] do not fit each other: got "
            f"{tuple(scores.shape)}, {tuple(subsets.shape)} and {tuple(outputs.shape)}"
        )
    if len(subsets) < fewest:
        raise ShapeError(f"a correlation needs at least {fewest} subsets here, got {len(subsets)}")
    return finite("scores", scores), subsets.cpu(), finite("outputs", outputs)


def matrix(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it has two axes and elements."""
    if tensor.ndim != 2 or not tensor.numel():
        raise ShapeError(f"{name} should be a matrix with at least one element, got shape {tuple(tensor.shape)}")
    return tensor
