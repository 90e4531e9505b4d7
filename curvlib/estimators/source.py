"""Data that is walked through for every product: a batch that is held, or a loader that can be read again."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlib import containers
from curvlib.errors import ArgumentError
from curvlib.estimators.kinds import Draws
from curvlib.gradients.data import DataSet, batches, check_order, check_same_examples
from curvlib.linalg.eager import is_eager, ordinary
from curvlib.pytree import Domain, Tree, flatten, register, static


class Slot:
    """Stands, itself, where a tensor was: a class is the same object in every copy."""


class PytreeTemplate:
    """The structure of a pytree, with those of its leaves that are not tensors: static for transforms."""

    def __init__(self, tree: Any) -> None:
        self.leaves, self.structure = containers.flatten(tree)

    @classmethod
    def split(cls, tree: Any) -> tuple[tuple[Tensor, ...], PytreeTemplate]:
        """The tensors of a pytree, outside of any transform cut loose from the graph they are in, and the rest."""
        frame = cls(tree)
        tensors = tuple(leaf for leaf in frame.leaves if isinstance(leaf, Tensor))
        frame.leaves = [Slot if isinstance(leaf, Tensor) else leaf for leaf in frame.leaves]
        return tuple(ordinary(x.detach()) for x in tensors) if is_eager() else tensors, frame

    def fill(self, tensors: Sequence[Tensor]) -> Any:
        """The pytree with these tensors in their places."""
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is Slot else leaf for leaf in self.leaves]
        return containers.unflatten(leaves, self.structure)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, PytreeTemplate) and self.plain == other.plain)

    def __hash__(self) -> int:
        return hash(self.plain)

    @property
    def plain(self) -> tuple[str, tuple[Hashable, ...]]:
        """What two frames have in common if they are equal: leaves that may change are told apart by identity."""
        leaves = (leaf if isinstance(leaf, PLAIN) or leaf is Slot else id(leaf) for leaf in self.leaves)
        return str(self.structure), tuple((type(leaf), leaf) for leaf in leaves)


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def detached(params: Tree) -> Tree:
    """Parameters cut loose from the graph they are in; under a transform gradients may be wanted, and they stay."""
    leaves, _ = flatten(params)
    return Domain.of(params).tree([ordinary(leaf.detach()) if is_eager() else leaf for leaf in leaves])


def cut(results: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """Products cut loose from the graph of what model_fn closes over, if no gradient in the vectors is wanted."""
    if not is_eager() or any(v.requires_grad for v in vectors):
        return results
    return [x.detach() for x in results]


@register
class CachedBatch:
    """One batch, and the gradients [M, *outputs.shape] that were drawn for it, if any."""

    tensors: tuple[Tensor, ...]
    vectors: Tensor | None
    frame: PytreeTemplate = static()

    @property
    def loader(self) -> None:
        """None: nothing is read."""

    def batches(self) -> Iterator[tuple[Any, Any, Draws]]:
        """(inputs, targets, draws) of the one batch."""
        yield *self.frame.fill(self.tensors), self.vectors


@dataclass(frozen=True, eq=False)
class Traversal:
    """A data set that can be walked through any number of times, drawing the same numbers each time if any."""

    data: DataSet
    seed: int | None
    device: torch.device | None

    @classmethod
    def of(cls, data: DataSet, generator: torch.Generator | None) -> Traversal:
        """A walk whose draws are settled by one number from the generator.

        Raises:
            ArgumentError: the loader is a one-shot iterator, or gives other examples each time; or it gives them in
                random order, and something is drawn.
        """
        if isinstance(data.loader, Iterator):
            raise ArgumentError(
                f"every product with a matrix-free operator walks through the data, but the loader, a "
                f"{type(data.loader).__name__}, is an iterator that can be read only once: give cv.over a list of "
                "batches, a DataLoader, or any object whose __iter__ starts anew"
            )
        check_same_examples(data, "every product with a matrix-free operator walks through the same examples")
        if generator is None:
            return cls(data, None, None)
        check_order(data, "fisher='mc' ties its draws to the order of the examples (fisher='type-2' has no draws)")
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        return cls(data, int(seed), generator.device)

    def restarted(self) -> torch.Generator | None:
        """A generator as it is at the start of each walk."""
        if self.seed is None or self.device is None:
            return None
        return torch.Generator(self.device).manual_seed(self.seed)


@register
class Streamed:
    """A data set that is read anew for each product."""

    walk: Traversal = static()

    @property
    def loader(self) -> Any:
        """What the batches are read from."""
        return self.walk.data.loader

    def batches(self) -> Iterator[tuple[Any, Any, Draws]]:
        """(inputs, targets, draws) of every batch."""
        generator = self.walk.restarted()
        for inputs, targets in batches(self.walk.data):
            yield *ordinary((inputs, targets)), generator


Source = CachedBatch | Streamed
