"""Derivatives of a model at its parameters as linear maps, applied to vectors without being formed.

Two ways to differentiate: ``forward`` takes Jacobian-vector products in forward mode (`torch.func.jvp`); ``reverse``
takes them by differentiating the vector-Jacobian product, which is linear, once more: it needs no forward mode but a
differentiable backward pass. In eager mode ``reverse`` is plain autograd, so that activation checkpointing and
old-style autograd functions work, which `torch.func` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlib.estimators.running import LeafFn, Leaves
from curvlib.linalg.eager import is_eager

Mode = Literal["forward", "reverse"]


@dataclass(frozen=True)
class Linearization:
    """A function at a point: its value, J v for a tangent v, and J^T u for a cotangent u, one at a time.

    Both may be called any number of times, and under `torch.func.vmap`.
    """

    value: Tensor
    push: Callable[[Leaves], Tensor]
    pull: Callable[[Tensor], Leaves]


def linearize(fn: LeafFn, leaves: Leaves, mode: Mode) -> Linearization:
    """The Jacobian of a function of tensors with one tensor as output."""
    if mode == "reverse" and is_eager():
        return linearize_by_autograd(fn, leaves)
    linear: Any = torch.func.vjp(fn, leaves)
    value, vjp = linear

    def pull(cotangent: Tensor) -> Leaves:
        gradients: Leaves = vjp(cotangent)[0]
        return gradients

    if mode == "forward":
        return Linearization(value, lambda v: torch.func.jvp(fn, (leaves,), (v,))[1], pull)
    transposed = torch.func.vjp(pull, torch.zeros_like(value))[1]
    return Linearization(value, lambda v: transposed(v)[0], pull)


def linearize_along(fn: LeafFn, leaves: Leaves, tangents: Leaves, mode: Mode) -> tuple[Linearization, Tensor]:
    """`linearize`, and J v for stacked tangents (leaves [k, *shape]): [k, *value.shape].

    In forward mode it takes one pass: the one that carries the tangents records what pulling back needs.
    """
    if mode == "reverse":
        line = linearize(fn, leaves, mode)
        return line, together(line.push, tangents)

    def images(leaves: Leaves) -> tuple[Tensor, Tensor]:
        dual: Any
        vmap: Any = torch.func.vmap
        if len(tangents[0]) == 1:  # a model that vmap refuses can do one
            dual = torch.func.jvp(fn, (leaves,), ([v.squeeze(0) for v in tangents],))
            return dual[0], dual[1].unsqueeze(0)
        dual = vmap(lambda v: torch.func.jvp(fn, (leaves,), (v,)), out_dims=(None, 0), randomness="same")(tangents)
        return dual[0], dual[1]

    linear: Any = torch.func.vjp(images, leaves, has_aux=True)
    value, vjp, pushed = linear
    return Linearization(value, lambda v: torch.func.jvp(fn, (leaves,), (v,))[1], lambda u: vjp(u)[0]), pushed


def push_along(fn: LeafFn, leaves: Leaves, tangents: Leaves, mode: Mode) -> tuple[Tensor, Tensor]:
    """The value, and J v for one tangent, without what pulling back needs."""
    if mode == "reverse":
        line = linearize(fn, leaves, mode)
        return line.value, line.push(tangents)
    pair: Any = torch.func.jvp(fn, (leaves,), (tangents,))
    return pair[0], pair[1]


def linearize_by_autograd(fn: LeafFn, leaves: Leaves) -> Linearization:
    """`linearize` in reverse mode by plain autograd."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = fn(leaves)
    cotangent = torch.zeros_like(value, requires_grad=True)
    gradients = gradient([value], leaves, [cotangent], create_graph=True)
    return Linearization(
        value.detach(),
        lambda v: gradient(gradients, [cotangent], v)[0],
        lambda u: gradient([value], leaves, [u]),
    )


def hessian_product(fn: LeafFn, leaves: Leaves, mode: Mode) -> Callable[[Leaves], Leaves]:
    """V -> H v for a scalar function: forward over reverse, or reverse over reverse."""
    product: Callable[[Leaves], Leaves]
    if mode == "reverse" and is_eager():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        value = fn(leaves)
        gradients = gradient([value], leaves, [torch.ones_like(value)], create_graph=True)
        product = lambda v: gradient(gradients, leaves, v)  # noqa: E731
    elif mode == "reverse":
        pull = torch.func.vjp(torch.func.grad(fn), leaves)[1]
        product = lambda v: pull(v)[0]  # noqa: E731
    else:
        product = lambda v: torch.func.jvp(torch.func.grad(fn), (leaves,), (v,))[1]  # noqa: E731
    return product


def gradient(
    outputs: Sequence[Tensor], inputs: Leaves, cotangents: Sequence[Tensor], *, create_graph: bool = False
) -> Leaves:
    """`torch.autograd.grad` that keeps the graph and gives zeros where outputs do not depend on an input."""
    pairs = [(x, u) for x, u in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    results = torch.autograd.grad(
        [x for x, _ in pairs],
        inputs,
        [u for _, u in pairs],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, results, strict=True)]


# --- stacks of vectors ----------------------------------------------------------------------------------------------


def each(product: Callable[[Any], Any], stack: Any, width: int) -> Any:
    """A product of one vector applied to k stacked ones, ``width`` at a time; leading axis k in and out."""
    leaves, structure = torch_pytree.tree_flatten(stack)
    chunks = zip(*(leaf.split(width) for leaf in leaves), strict=True)
    return joined([together(product, torch_pytree.tree_unflatten(list(chunk), structure)) for chunk in chunks])


def together(product: Callable[[Any], Any], stack: Any) -> Any:
    """A product of one vector applied to k stacked ones at once; to a single one without `torch.func.vmap`."""
    if len(torch_pytree.tree_leaves(stack)[0]) > 1:
        return torch.func.vmap(product, randomness="same")(stack)
    result = product(torch_pytree.tree_map(lambda x: x.squeeze(0), stack))
    return torch_pytree.tree_map(lambda x: x.unsqueeze(0), result)


def joined(parts: Sequence[Any]) -> Any:
    """Stacks, one behind the other."""
    return torch_pytree.tree_map(lambda *xs: torch.cat(xs), *parts) if len(parts) > 1 else parts[0]


class ElementCount(TorchFunctionMode):
    """Counts the elements of the results of all calls: about what one vector's product can hold on to."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += sum(x.numel() for x in torch_pytree.tree_leaves(result) if isinstance(x, Tensor))
        return result
