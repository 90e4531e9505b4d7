"""What the projected first moment is divided by: Adam's second moment, one of rank one, or the factors' eigenvalues."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvlib.factors.axes import along, mode_product, outer
from curvlib.factors.rule import Factors, Modes
from curvlib.linalg.gram import writes_in_place
from curvlib.linalg.rank_one import rank_one_moment
from curvlib.optim.turns import Turn

Transport = Literal["hadamard", "permute", "none"]
Moment = tuple[Tensor, ...]


class SecondMoment(ABC):
    """A model of the second moment of projected gradients, and how it follows a change of basis."""

    @abstractmethod
    def start(self, stack: Tensor) -> Moment:
        """The moment before the first gradient, for a stack of members of this shape."""

    @abstractmethod
    def update(self, moment: Moment, squares: Tensor, decay: float) -> Moment:
        """The moving average with the squares of one more gradient."""

    @abstractmethod
    def root(self, moment: Moment, factors: Factors, modes: Modes, like: Tensor, into: Tensor | None) -> Tensor:
        """The root of the moment: a new tensor that broadcasts with the stack ``like``, or the buffer ``into``."""

    @abstractmethod
    def correction(self, decay: float, step: Tensor) -> Tensor:
        """What the root is divided by because the average started from zero."""

    @property
    @abstractmethod
    def limit(self) -> float | None:
        """The largest quotient of first moment and root that is believed; None: any."""

    @abstractmethod
    def transported(self, moment: Moment, turn: Turn, rotation: Tensor | None, mode: int, how: Transport) -> Moment:
        """The moment after a change of the basis of one mode; ``rotation``: Q_old^T Q_new of the chosen members.

        The rotation is no longer needed and may be written over.
        """


@dataclass(frozen=True)
class FullMoment(SecondMoment):
    """Adam's: v <- b v + (1 - b) d^2, entry by entry.

    Example:
        >>> FullMoment().update((torch.zeros(1, 2),), torch.tensor([[1.0, 4.0]]), 0.5)
        (tensor([[0.5000, 2.0000]]),)
    """

    def start(self, stack: Tensor) -> Moment:
        return (torch.zeros_like(stack),)

    def update(self, moment: Moment, squares: Tensor, decay: float) -> Moment:
        return (torch.lerp(moment[0], squares, 1 - decay),)

    def root(self, moment: Moment, factors: Factors, modes: Modes, like: Tensor, into: Tensor | None) -> Tensor:
        return torch.sqrt(moment[0], out=into)

    def correction(self, decay: float, step: Tensor) -> Tensor:
        return (1 - decay**step).sqrt()

    @property
    def limit(self) -> float | None:
        return None

    def transported(self, moment: Moment, turn: Turn, rotation: Tensor | None, mode: int, how: Transport) -> Moment:
        return (carried(moment[0], turn, rotation, mode, how),)


@dataclass(frozen=True)
class RankOneMoment(SecondMoment):
    """A moving average a l r^T: two vectors a member in place of a matrix. Tensors are read as [n_1, rest].

    The leading pair knows nothing of entries outside of its support, where a division by it would blow up. Quotients
    are therefore limited to 1: for equal betas, the first moment over the root of Adam's own V never is larger.

    Example:
        >>> moment = RankOneMoment()
        >>> state = moment.update(moment.start(torch.zeros(1, 1, 2)), torch.tensor([[[9.0, 16.0]]]), 0.0)
        >>> moment.root(state, Factors(()), (0, 1), torch.zeros(1, 1, 2), None).round(decimals=3)
        tensor([[[3., 4.]]])
    """

    def start(self, stack: Tensor) -> Moment:
        first, rest = stack.shape[1], stack.shape[2:]
        left = stack.new_full((len(stack), first), first**-0.5)
        return stack.new_zeros(len(stack)), left, stack.new_full((len(stack), *rest), rest.numel() ** -0.5)

    def update(self, moment: Moment, squares: Tensor, decay: float) -> Moment:
        scale, left, right = moment
        rows = (*left.shape, -1)
        scale, left, flat = rank_one_moment(scale, left, right.flatten(1), squares.reshape(rows), decay)
        return scale, left, flat.reshape(right.shape)

    def root(self, moment: Moment, factors: Factors, modes: Modes, like: Tensor, into: Tensor | None) -> Tensor:
        scale, left, right = moment
        row = (scale.unsqueeze(1) * left).sqrt()
        return torch.mul(row.reshape(*row.shape, *(1,) * (right.ndim - 1)), right.sqrt().unsqueeze(1), out=into)

    def correction(self, decay: float, step: Tensor) -> Tensor:
        return (1 - decay**step).sqrt()

    @property
    def limit(self) -> float | None:
        return 1.0

    def transported(self, moment: Moment, turn: Turn, rotation: Tensor | None, mode: int, how: Transport) -> Moment:
        scale, left, right = moment
        if mode == 0:
            left, size = normalised(carried(left, turn, rotation, 0, how))
        else:
            right, size = normalised(carried(right, turn, rotation, mode - 1, how))
        return scale * size, left, right


@dataclass(frozen=True)
class FactorMoment(SecondMoment):
    """Eigenvalues of the factors: l_i r_j, as Kronecker-factored second moments have. Nothing of its own.

    Example:
        >>> factors = Factors((), (torch.tensor([[1.0, 4.0]]), torch.tensor([[9.0]])))
        >>> FactorMoment().root((), factors, (0, 1), torch.zeros(1, 2, 1), None)
        tensor([[[3.],
                 [6.]]])
    """

    def start(self, stack: Tensor) -> Moment:
        return ()

    def update(self, moment: Moment, squares: Tensor, decay: float) -> Moment:
        return ()

    def root(self, moment: Moment, factors: Factors, modes: Modes, like: Tensor, into: Tensor | None) -> Tensor:
        assert factors.eigenvalues is not None
        return outer([values.clamp(min=0).sqrt() for values in factors.eigenvalues], modes, like.ndim - 1)

    def correction(self, decay: float, step: Tensor) -> Tensor:
        return torch.ones_like(step)

    @property
    def limit(self) -> float | None:
        return None

    def transported(self, moment: Moment, turn: Turn, rotation: Tensor | None, mode: int, how: Transport) -> Moment:
        return ()


def carried(stack: Tensor, turn: Turn, rotation: Tensor | None, mode: int, how: Transport) -> Tensor:
    """Squares in old coordinates of a mode, in the new ones.

    "hadamard": sum_i v_i (Q_old^T Q_new)_ij^2, what they are if different coordinates are uncorrelated, with the same
    sum; "permute": only in the order of the new columns; "none": as they are.
    """
    if how == "none":
        return stack
    if how == "permute":
        return turn.apply(lambda squares: along(turn.order, squares, mode), stack)
    assert rotation is not None
    weights = torch.mul(rotation, rotation, out=rotation if writes_in_place(rotation) else None)
    return turn.apply(lambda squares: mode_product(squares, weights, mode), stack)


def normalised(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Members of unit norm, and their norms [k]; zero stays zero."""
    size = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    divisor = torch.where(size > 0, size, 1).reshape(-1, *(1,) * (stack.ndim - 1))
    return stack / divisor, size
