"""Self-influence as a detector of wrong labels."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, DtypeError, ShapeError
from curvlib.influence.ranks import finite, ranks
from curvlib.pytree import register


@register
class MislabelDetection:
    """How many wrong labels are found by looking at examples of great self-influence first.

    Args:
        area: under the receiver operating characteristic, 0-d: the probability that an example with a wrong label has
            the greater self-influence than one with a right label, ties counting one half.
        checked: [N + 1], the share of examples looked at, 0 to 1.
        found: [N + 1], the share of wrong labels that are among them; within ties, on average over their orders.
    """

    area: Tensor
    checked: Tensor
    found: Tensor


def mislabel_detection(self_influence: Tensor, flipped: Tensor) -> MislabelDetection:
    """How well self-influence g_t^T (H + d)^{-1} g_t tells wrong labels from right ones.

    Source: Koh & Liang 2017 (arXiv 1703.04730), section 5.4. Everything is in float64.

    Args:
        self_influence: [N].
        flipped: bool [N], whether a label is wrong.

    Raises:
        ShapeError: shapes differ, or are not [N].
        DtypeError: ``flipped`` is not bool.
        ArgumentError: all labels are wrong, or none is.
        NonFiniteError: self-influence is not finite.

    Example:
        >>> import torch
        >>> from curvlib.influence import evaluate
        >>> flipped = torch.tensor([True, False, True, False])
        >>> result = evaluate.mislabel_detection(torch.tensor([9.0, 5.0, 4.0, 0.0]), flipped)
        >>> result.area, result.found
        (tensor(0.7500, dtype=torch.float64), tensor([0.0000, 0.5000, 0.5000, 1.0000, 1.0000], dtype=torch.float64))
    """
    if self_influence.ndim != 1 or self_influence.shape != flipped.shape:
        raise ShapeError(
            "self_influence and flipped should both have shape [N], got "
            f"{tuple(self_influence.shape)} and {tuple(flipped.shape)}"
        )
    if flipped.dtype != torch.bool:
        raise DtypeError(f"flipped must be bool, got {flipped.dtype}")
    values, flipped = finite("self_influence", self_influence), flipped.cpu()
    examples, wrong = len(flipped), flipped.double().sum()
    if not 0 < wrong < examples:
        raise ArgumentError(f"some labels must be wrong and some right, but {int(wrong)} of {examples} are wrong")
    above = ranks(values)[flipped].sum() - wrong * (wrong + 1) / 2  # Mann and Whitney's statistic
    _, group, sizes = torch.unique(-values, return_inverse=True, return_counts=True)  # from the greatest on
    share = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, group, flipped.double()) / sizes
    found = share.repeat_interleave(sizes).cumsum(0) / wrong
    return MislabelDetection(
        area=above / (wrong * (examples - wrong)),
        checked=torch.arange(examples + 1).double() / examples,
        found=torch.cat([found.new_zeros(1), found]),
    )
