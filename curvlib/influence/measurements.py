"""What may be measured on a query in place of its loss: functions (outputs, targets) -> one value an example.

A function becomes a measurement by `CustomLoss`, which only its gradient is asked of: it need not be convex.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def target_logit(outputs: Tensor, targets: Tensor) -> Tensor:
    """The logit of the target class, summed over the positions of an example.

    Args:
        outputs: logits [N, *positions, C].
        targets: class indices [N, *positions]; positions with the target -100 do not count.

    Returns:
        Tensor [N].

    Example:
        >>> import curvlib as cv
        >>> target_logit(torch.tensor([[1.0, 3.0]]), torch.tensor([0]))
        tensor([1.])
        >>> cv.CustomLoss(target_logit).gradient(torch.tensor([[1.0, 3.0]]), torch.tensor([0]))
        tensor([[1., 0.]])
    """
    counts = targets != IGNORED
    picked = outputs.gather(-1, torch.where(counts, targets, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counts, picked, 0).reshape(len(targets), -1).sum(1)


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """log(p / (1 - p)) = f_y - log sum_{c != y} exp f_c of the target class y, summed over positions.

    The log-odds of the target: it does not saturate where the model is sure (Park et al. 2023, arXiv 2303.14186).

    Args:
        outputs: logits [N, *positions, C].
        targets: class indices [N, *positions]; positions with the target -100 do not count.

    Returns:
        Tensor [N].

    Example:
        >>> margin(torch.tensor([[1.0, 3.0]]), torch.tensor([1]))
        tensor([2.])
    """
    counts = targets != IGNORED
    index = torch.where(counts, targets, 0).unsqueeze(-1)
    classes = torch.arange(outputs.shape[-1], device=outputs.device)
    others = torch.where(classes == index, -torch.inf, outputs).logsumexp(-1)
    odds = torch.where(counts, outputs.gather(-1, index).squeeze(-1) - others, 0)
    return odds.reshape(len(targets), -1).sum(1)
