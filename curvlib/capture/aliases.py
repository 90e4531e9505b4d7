"""Which tensors of a run hold elements of which parameters: through views, copies and casts.

A parameter is known by its storage, which all its views share; a copy to another dtype or memory format is followed.
A view or copy that carries no gradient (detach, data) is data like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.operators.layout import Region
from curvlib.pytree import Domain

COPIES = {
    torch.clone, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half,
    Tensor.bfloat16, Tensor.type_as, Tensor.cpu, Tensor.cuda,
}  # fmt: skip
SIMPLE = frozenset({int, float, bool, str, torch.dtype, torch.device, torch.layout, slice, type(None)})
LIKE = {
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like,
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Alias:
    """A storage that holds elements of a leaf, and where in the leaf its elements lie.

    Attributes:
        leaf: number of the leaf.
        root: the tensor that was made with the storage, and keeps it alive so that its address stays unique.
        offset: the place in the leaf of the root's first element.
        strides: the leaf's steps along the root's axes; None if they are the root's own.
    """

    leaf: int
    root: Tensor
    offset: int
    strides: tuple[int, ...] | None = None

    def place(self, view: Tensor) -> tuple[int, tuple[int, ...]] | None:
        """Offset and strides in the leaf of a view of the storage, or None if its axes mix those of the root."""
        start = int(view.storage_offset()) - int(self.root.storage_offset())
        if self.strides is None:
            return self.offset + start, tuple(map(int, view.stride()))
        axes = [axis for axis in zip(self.root.stride(), self.root.shape, self.strides, strict=True) if axis[1] > 1]
        position = {step: start // step % size for step, size, _ in axes}
        strides = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            fitting = [
                leaf_step * (stride // step)
                for step, length, leaf_step in axes
                if stride % step == 0 and position[step] + (size - 1) * (stride // step) < length
            ]
            if size > 1 and not fitting:
                return None
            strides.append(fitting[0] if size > 1 else 0)
        return self.offset + sum(position[step] * leaf_step for step, _, leaf_step in axes), tuple(strides)


class Aliases:
    """The storages that hold elements of parameters, in one run of a model."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.by_storage: dict[int, Alias] = {}
        self.stand_ins: list[Tensor] = []

    def follow(self, stand_ins: list[Tensor]) -> None:
        """Makes the contiguous tensors known that stand for the parameters in this run."""
        self.stand_ins = stand_ins
        self.by_storage = {storage(leaf): Alias(i, leaf, 0) for i, leaf in enumerate(stand_ins)}

    def of(self, value: Any) -> Alias | None:
        """The leaf that a tensor shares its storage with, unless it was detached from it.

        Where gradients are disabled nothing tells the two apart.
        """
        alias = self.by_storage.get(storage(value)) if isinstance(value, Tensor) else None
        if alias is None or value is alias.root or not torch.is_grad_enabled():
            return alias
        leaves = (getattr(node, "variable", None) for node in graph_of(value))
        return alias if any(leaf is self.stand_ins[alias.leaf] for leaf in leaves) else None

    def region(self, value: Any) -> Region | None:
        """The elements of a leaf that a tensor is a view of."""
        alias = self.of(value)
        if alias is None:
            return None
        place = alias.place(value)
        if place is None:
            raise CaptureError(f"a copy of {parameters(self.domain, [alias.leaf])} is reshaped: reshape before copying")
        return Region.strided(alias.leaf, self.domain.shapes[alias.leaf], place[0], value.shape, place[1])

    def regions(self, values: Iterable[Any]) -> tuple[Region, ...]:
        """The elements of leaves that these tensors are views of, one region for each that is one."""
        found = (self.region(value) for value in values)
        return tuple(region for region in found if region is not None)

    def follow_copy(self, source: Tensor, copy: Tensor) -> bool:
        """A copy holds the same elements as its source, and may have them in another order."""
        alias = self.of(source)
        place = None if alias is None else alias.place(source)
        if alias is None or place is None:
            return False
        strides = None if place[1] == tuple(map(int, copy.stride())) else place[1]
        self.by_storage[storage(copy)] = Alias(alias.leaf, copy, place[0], strides)
        return True


def parameters(domain: Domain, leaves: Iterable[int]) -> str:
    """Names of leaves, for messages."""
    quoted = [repr(domain.names[leaf]) for leaf in leaves]
    return f"parameter {quoted[0]}" if len(quoted) == 1 else f"parameters {', '.join(quoted[:-1])} and {quoted[-1]}"


def graph_of(output: Tensor) -> set[Any]:
    """The nodes of the graph that a tensor's gradient passes through."""
    found: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


def storage(tensor: Tensor) -> int:
    """The identity of a tensor's storage, which all views share; 0 where there is none that can be told.

    Sparse tensors have none, and `torch.vmap` hides it.
    """
    if tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return 0
    return tensor.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among a call's arguments or results."""
    if isinstance(tree, Tensor):
        return [tree]
    kind = type(tree)
    if kind in SIMPLE:
        return []
    if kind is tuple or kind is list:  # most of what there is, and much faster than the general case
        return [tensor for part in tree for tensor in tensors_in(part)]
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
