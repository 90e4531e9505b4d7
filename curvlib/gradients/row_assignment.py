"""Which example a row belongs to, where a model chooses rows by values: the tokens that are routed to an expert.

Each row's gradient comes from the outputs of its own example alone. All vectors are pulled back once more for every
binary digit of an example's number, with zeros for the examples whose number has a zero there: a row keeps its gradient
if its example has a one. That says it in any precision, for log2 N times as many vectors.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.capture import Plan
from curvlib.capture.engines import Consume, Pullback
from curvlib.gradients.uses import WeightUse
from curvlib.layers.contraction import Contraction
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.loose_rows import LooseRows
from curvlib.layers.rows import DenseRows


@dataclasses.dataclass(frozen=True)
class Owners:
    """The numbers of the examples [R] that rows belong to, by site; a site that is not named has N examples' rows."""

    numbers: dict[int, Tensor]
    examples: int

    def rows(self, site: int, rows: Tensor) -> Tensor:
        """Rows [K, R, (groups,) T, d] of a site as those of the examples, [K, N, (groups,) S T, d].

        S is the largest number of entries that an example has; others are filled up with zeros.
        """
        if site not in self.numbers:
            return rows
        owner = self.numbers[site]
        counts = owner.bincount(minlength=self.examples)
        order = owner.argsort(stable=True)
        example = owner[order]
        place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[example]
        empty = rows.new_zeros(self.examples, int(counts.amax()), *rows.shape[2:])
        filled = [empty.index_put((example, place), part[order]).movedim(1, -3).flatten(-3, -2) for part in rows]
        return torch.stack(filled)

    def use(self, site: int, use: WeightUse) -> WeightUse:
        """A use of a weight at a site, with the rows of the examples."""
        if site not in self.numbers:
            return use
        rows = use.rows.rows if isinstance(use.rows, LooseRows) else use.rows
        assert isinstance(rows, DenseRows)
        values = self.rows(site, rows.values.unsqueeze(0))[0]
        return WeightUse(DenseRows(values), self.rows(site, use.g), use.transposed)


@dataclasses.dataclass(frozen=True)
class OutputVectors:
    """K vectors for the outputs of N examples, made a stack at a time.

    Attributes:
        of: ``of(start, stop)`` makes the vectors of these numbers, [k, N, *].
        count: K.
        width: how many there are in a stack.
    """

    of: Callable[[int, int], Tensor]
    count: int
    width: int

    def __len__(self) -> int:
        return -(-self.count // self.width)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the stacks."""
        for start in range(0, self.count, self.width):
            yield self.of(start, min(start + self.width, self.count))


def pull_with_owners(plan: Plan, run: Pullback, vectors: OutputVectors, examples: int, consume: Consume) -> Owners:
    """Pulls vectors back to every site, and finds out whose the chosen rows are."""
    chosen = {number for number, site in enumerate(plan.sites) if site.chosen is not None}
    digits = max(examples - 1, 0).bit_length() if chosen else 0
    sizes: dict[int, list[Tensor]] = {number: [] for number in chosen}
    stacks_seen: collections.Counter[int] = collections.Counter()

    def parts() -> Iterator[Tensor]:
        yield from vectors
        index = torch.arange(examples, device=run.outputs.device)
        for digit in range(digits):
            for stack in vectors:
                keeps = (index >> digit & 1).to(stack.dtype)
                yield stack * keeps.reshape(-1, *(1,) * (stack.ndim - 2))

    def take(number: int, kept: Any, g: Tensor) -> None:
        if number in chosen:
            layer = plan.sites[number].layers[0]
            assert isinstance(layer, (Contraction, Elementwise))
            axes = layer.axes if isinstance(layer, Elementwise) else layer.output_axes
            sizes[number].append(axes.rows(g, examples, leading=1).abs().flatten(2).amax(2).amax(0))
        if stacks_seen[number] < len(vectors):
            stacks_seen[number] += 1
            consume(number, kept, g)

    run.pull(parts(), take)
    return Owners({number: numbered(found, len(vectors)) for number, found in sizes.items() if found}, examples)


def numbered(sizes: list[Tensor], stacks: int) -> Tensor:
    """The examples' numbers [R], from the sizes of the rows' gradients: all of them, then one digit after the other."""
    whole, *digits = (torch.stack(sizes[i : i + stacks]).amax(0) for i in range(0, len(sizes), stacks))
    number = torch.zeros(whole.shape, dtype=torch.long, device=whole.device)
    for digit, size in enumerate(digits):
        number = number | (size > whole / 2).long() << digit
    return number
