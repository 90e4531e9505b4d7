"""Which example a row belongs to, where a model chooses rows by values: the tokens that are routed to an expert.

Each row's gradient comes from the loss term of its own example alone. The gradients of the terms are pulled back once
more for every binary digit of an example's number, with the terms left out whose number has a zero there: a row keeps
its gradient if its example has a one. That says it in any precision, for log2 N vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.capture import Plan
from curvlib.capture.engines import Consume, Pullback
from curvlib.estimators.correction import Use
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
        """Rows [R, (groups,) T, d] of a site as those of the examples, [N, (groups,) S T, d].

        S is the largest number of entries that an example has; others are filled up with zeros.
        """
        if site not in self.numbers:
            return rows
        owner = self.numbers[site]
        counts = owner.bincount(minlength=self.examples)
        order = owner.argsort(stable=True)
        example = owner[order]
        place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[example]
        empty = rows.new_zeros(self.examples, int(counts.amax()), *rows.shape[1:])
        return empty.index_put((example, place), rows[order]).movedim(1, -3).flatten(-3, -2)

    def use(self, site: int, use: Use) -> Use:
        """A use of a weight at a site, with the rows of the examples."""
        if site not in self.numbers:
            return use
        rows = use.rows.rows if isinstance(use.rows, LooseRows) else use.rows
        assert isinstance(rows, DenseRows)
        g = self.rows(site, use.g[0]).unsqueeze(0)
        return Use(DenseRows(self.rows(site, rows.values)), g, use.transposed)


def pull_with_owners(plan: Plan, run: Pullback, gradient: Tensor, consume: Consume) -> Owners:
    """Pulls the gradients of all loss terms [N, ...] back to every site, and finds out whose the chosen rows are."""
    examples = len(gradient)
    chosen = {number for number, site in enumerate(plan.sites) if site.chosen is not None}
    digits = max(examples - 1, 0).bit_length() if chosen else 0
    sizes: dict[int, list[Tensor]] = {number: [] for number in chosen}
    seen: set[int] = set()

    def vectors() -> Iterator[Tensor]:
        yield gradient.unsqueeze(0)
        index = torch.arange(examples, device=gradient.device)
        for digit in range(digits):
            keeps = (index >> digit & 1).to(gradient.dtype)
            yield (gradient * keeps.reshape(-1, *(1,) * (gradient.ndim - 1))).unsqueeze(0)

    def take(number: int, kept: Any, g: Tensor) -> None:
        if number in chosen:
            layer = plan.sites[number].layers[0]
            assert isinstance(layer, (Contraction, Elementwise))
            axes = layer.axes if isinstance(layer, Elementwise) else layer.output_axes
            sizes[number].append(axes.rows(g, examples, leading=1)[0].abs().flatten(1).amax(1))
        if number not in seen:
            seen.add(number)
            consume(number, kept, g)

    run.pull(vectors(), take)
    return Owners({number: numbered(found) for number, found in sizes.items() if found}, examples)


def numbered(sizes: list[Tensor]) -> Tensor:
    """The examples' numbers [R], from the sizes of the rows' gradients: all of them, then one digit after the other."""
    whole, *digits = sizes
    number = torch.zeros(whole.shape, dtype=torch.long, device=whole.device)
    for digit, size in enumerate(digits):
        number = number | (size > whole / 2).long() << digit
    return number
