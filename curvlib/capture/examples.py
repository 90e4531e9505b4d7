"""Which axis of a tensor counts the examples of a batch, in a run that finds out about a model."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from curvlib.capture.plan import Size


@dataclasses.dataclass(frozen=True)
class Examples:
    """How many examples the tensors of a run stand for, and which axis of a tensor counts them.

    Attributes:
        number: how many.
        marked: the number is a prime that divides no other size. Otherwise an axis is taken to count examples if it is
            the first and has as many entries.
        chosen: another such prime, the number of rows that are chosen by values; None: such choices are not followed.
    """

    number: int
    marked: bool
    chosen: int | None = None

    def axis(self, tensor: Tensor) -> int | None:
        """The axis that counts examples."""
        if self.marked:
            return multiple_of(self.number, tensor)
        return 0 if tensor.ndim and tensor.shape[0] == self.number else None

    def chosen_axis(self, tensor: Tensor) -> int | None:
        """The axis that counts chosen rows."""
        return None if self.chosen is None else multiple_of(self.chosen, tensor)

    def sizes(self, tensor: Tensor) -> tuple[Size, ...]:
        """The shape, with the number of examples left open; of a tensor without examples, that of chosen rows."""
        axis, number = self.axis(tensor), self.number
        if axis is None and self.chosen is not None:
            axis, number = self.chosen_axis(tensor), self.chosen
        return tuple((n // number, True) if i == axis else (n, False) for i, n in enumerate(tensor.shape))


def multiple_of(prime: int, tensor: Tensor) -> int | None:
    """The first axis whose size a prime divides."""
    for axis, size in enumerate(tensor.shape):
        if size and size % prime == 0:
            return axis
    return None


def expand_examples(output: Tensor, examples: int) -> Tensor:
    """Gives the output of a site without examples an axis of examples, in front or in place of one of size 1."""
    if output.ndim and output.shape[0] == 1:
        return output.expand(examples, *output.shape[1:])
    return output.expand(examples, *output.shape)
