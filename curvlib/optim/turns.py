"""New eigenbases for stacks of factors: for which members, what if it fails, and how other tensors follow.

A refresh that is not finite keeps the basis that was there. Failures in a row are counted on the device, one counter a
basis. Counters on the CPU are read at every refresh, others at every tenth, because reading them waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curvlib.errors import NonFiniteError
from curvlib.factors.axes import entrywise
from curvlib.linalg.eager import is_eager, may_look_at
from curvlib.linalg.orthogonal_iteration import off_diagonality, orthogonal_iteration

PATIENCE = 3  # failures in a row that raise
REFRESHES_BETWEEN_LOOKS = 10  # on devices other than the CPU


class Choice(NamedTuple):
    """Which members of a stack of k bases a refresh is for.

    Args:
        members: their numbers, known to the host; None: it works on all.
        mask: [k], of a refresh that works on all, which may change; None: all.
    """

    members: Tensor | None = None
    mask: Tensor | None = None


def chosen(matrices: Sequence[Tensor], bases: Sequence[Tensor], limit: float | None) -> list[Choice]:
    """For each stack of factors and their bases, the members that are off-diagonal beyond a limit, or not a number.

    Example:
        >>> matrix = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> chosen([matrix], [torch.eye(2).expand(2, 2, 2)], 0.5)[0].members
        tensor([0])
    """
    if limit is None or not bases:
        return [Choice()] * len(bases)
    flags = [torch.logical_not(off_diagonality(*pair) <= limit) for pair in zip(matrices, bases, strict=True)]
    if not readable(flags[0]):
        return [Choice(mask=flag) for flag in flags]
    together = torch.cat([flag.to(flags[0].device) for flag in flags]).cpu()
    choices = []
    for basis, flag in zip(bases, together.split([len(flag) for flag in flags]), strict=True):
        members = flag.nonzero().squeeze(1)
        choices.append(Choice() if len(members) == len(flag) else Choice(members.to(basis.device)))
    return choices


def readable(tensor: Tensor) -> bool:
    """Whether the host may read values, if need be by waiting for a device."""
    return is_eager() and tensor.device.type != "meta"


# --- bases ----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What a refresh does to the chosen members of a stack of bases.

    Args:
        old, new: their bases [c, n, n] before and after.
        order: [c, n]: column i of the new basis descends from column ``order[i]`` of the old one.
        members: their numbers; None: all members of the stack.
    """

    old: Tensor
    new: Tensor
    order: Tensor
    members: Tensor | None

    def apply(self, change: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """The stack [k, ...] with the chosen members changed; ``change`` maps them, stacked."""
        if self.members is None:
            return change(stack)
        if len(self.members) == 0:
            return stack
        return stack.index_copy(0, self.members, change(stack.index_select(0, self.members)))

    def placed(self, bases: Tensor) -> Tensor:
        """The stack of bases [k, n, n] with the new ones in their places."""
        return self.new if self.members is None else bases.index_copy(0, self.members, self.new)


def refreshed(matrix: Tensor, basis: Tensor, failures: Tensor, choice: Choice) -> tuple[Turn, Tensor]:
    """One step of orthogonal iteration for the chosen members of a stack of bases, guarded.

    Args:
        matrix: factors [k, n, n].
        basis: [k, n, n].
        failures: [k], how often in a row a refresh failed.
        choice: of members.

    Returns:
        The turn and the new failures [k].

    Example:
        >>> basis, failures = torch.eye(2).unsqueeze(0), torch.zeros(1, dtype=torch.int32)
        >>> turn, failures = refreshed(torch.full((1, 2, 2), torch.nan), basis, failures, Choice())
        >>> turn.new, failures
        (tensor([[[1., 0.],
                 [0., 1.]]]), tensor([1], dtype=torch.int32))
    """
    members = choice.members
    if members is not None:
        matrix, basis = matrix.index_select(0, members), basis.index_select(0, members)
    new, order = orthogonal_iteration(matrix, basis)
    good = new.sum((-2, -1)).isfinite()  # no entry is above one
    may_change = good if choice.mask is None else good.logical_and(choice.mask)
    turn = kept_where_bad(Turn(basis, new, order, members), may_change)
    counted = turn.apply(lambda count: torch.where(good, 0, count + 1), failures)
    return turn, counted if choice.mask is None else torch.where(choice.mask, counted, failures)


def started(matrix: Tensor, basis: Tensor, failures: Tensor) -> tuple[Turn, Tensor]:
    """The first bases, from eigendecompositions, largest eigenvalue first; ``basis`` [k, n, n] is what they replace.

    Example:
        >>> basis, failures = torch.eye(2).unsqueeze(0), torch.zeros(1, dtype=torch.int32)
        >>> started(torch.diag(torch.tensor([1.0, 2.0])).unsqueeze(0), basis, failures)[0].new.abs().round(decimals=4)
        tensor([[[0., 1.],
                 [1., 0.]]])
    """
    usable = finite(matrix)
    new = eigenvectors(torch.where(entrywise(usable, matrix), matrix, basis))
    if new is None:
        return Turn(basis, basis, same_order(basis), None), failures + 1
    turn = kept_where_bad(Turn(basis, new.flip(-1), same_order(basis), None), usable)
    return turn, torch.where(usable, 0, failures + 1)


def eigenvectors(matrix: Tensor) -> Tensor | None:
    """Eigenvectors in working or, if that fails, in double precision; None if both do. Looks at no value itself."""
    for dtype in (matrix.dtype, torch.float64):
        try:
            return torch.linalg.eigh(matrix.to(dtype))[1].to(matrix.dtype)
        except RuntimeError:  # of LAPACK, which torch has several classes for
            continue
    return None


def kept_where_bad(turn: Turn, good: Tensor) -> Turn:
    """The turn, except that members that are not good stay as they are."""
    if may_look_at(good) and bool(good.all()):
        return turn
    new = torch.where(entrywise(good, turn.new), turn.new, turn.old)
    order = torch.where(entrywise(good, turn.order), turn.order, same_order(turn.old))
    return Turn(turn.old, new, order, turn.members)


def finite(stack: Tensor) -> Tensor:
    """Whether all entries of a member are finite: [k]."""
    return stack.isfinite().flatten(1).all(1)


def same_order(basis: Tensor) -> Tensor:
    """The order that leaves columns where they are [k, n]."""
    return torch.arange(basis.shape[-1], device=basis.device).expand(basis.shape[:-1])


def check(names: Sequence[str], failures: Tensor, refreshes: Tensor) -> None:
    """Raises where a refresh failed three times in a row, if it is time to look.

    The counters [k] of a stack belong to the parameters ``names``; ``refreshes`` counts this one, too.

    Raises:
        NonFiniteError: names the first such parameter.
    """
    if not readable(failures) or (failures.device.type != "cpu" and int(refreshes) % REFRESHES_BETWEEN_LOOKS != 0):
        return
    for name, count in zip(names, failures.tolist(), strict=True):
        if count >= PATIENCE:
            raise NonFiniteError(
                f"parameter {name!r}: the refresh of its preconditioner failed {count} times in a row, and the last "
                "good one is still in use. If gradients were inf or nan, clip or skip them; if they are finite, the "
                "factor cannot be decomposed, or its root found, in this precision: more damping helps"
            )
