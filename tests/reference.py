"""Brute force: exact curvature matrices from per-example Jacobians and torch's own losses, for small problems.

Nothing here comes from curvlib but the order of `curvlib.ravel`. The model sees one example at a time; the loss
Hessian is that of the whole reduced objective, in all outputs of all examples at once, so that neither the
reduction nor the independence of examples is taken for granted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor

import curvlib as cv

ModelFn = Callable[[Any, Any], Tensor]
Objective = Callable[[Tensor, Any, str], Tensor]  # (outputs, targets, reduction) -> the reduced loss, 0-d
Params = dict[str, Tensor]

# --- torch's losses, classes last -----------------------------------------------------------------------------


def squared_error(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(outputs, targets, reduction=reduction)


def cross_entropy(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction=reduction)


def binary_cross_entropy(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)


# --- examples and Jacobians -----------------------------------------------------------------------------------


def example(batch: Any, n: int) -> Any:
    """Example n as a batch of one."""
    return torch_pytree.tree_map(lambda x: x[n : n + 1], batch)


def number_of_examples(inputs: Any) -> int:
    return len(torch_pytree.tree_leaves(inputs)[0])


def example_of(tree: Any, k: int) -> Any:
    """Entry k of every leaf."""
    return torch_pytree.tree_map(lambda leaf: leaf[k], tree)


def rows(tree: Any, number: int) -> Tensor:
    """A pytree of leaves [*, *leaf.shape] with ``number`` leading entries -> [number, D] in the order of ravel."""
    return torch.stack([cv.ravel(example_of(tree, k)) for k in range(number)])


def jacobians(model_fn: ModelFn, params: Any, inputs: Any) -> Tensor:
    """[N, K, D]: the derivative of each example's K flattened outputs by ravel(params)."""

    def one(n: int) -> Tensor:
        derivative = torch.func.jacrev(lambda p: model_fn(p, example(inputs, n)).reshape(-1))(params)
        return rows(derivative, len(torch_pytree.tree_leaves(derivative)[0]))

    return torch.stack([one(n) for n in range(number_of_examples(inputs))])


# --- curvature matrices [D, D] --------------------------------------------------------------------------------


def ggn(model_fn: ModelFn, params: Any, batch: tuple[Any, Any], objective: Objective, reduction: str) -> Tensor:
    """J^T H J with the Jacobian of all outputs and the Hessian of the reduced objective in them."""
    inputs, targets = batch
    outputs = model_fn(params, inputs)
    hessian = torch.func.hessian(lambda f: objective(f, targets, reduction))(outputs)
    jacobian = jacobians(model_fn, params, inputs).flatten(0, 1)  # [N K, D]
    return jacobian.mT @ hessian.reshape(outputs.numel(), outputs.numel()) @ jacobian


def divisor(outputs: Tensor, targets: Any, objective: Objective, reduction: str) -> Tensor:
    """What the reduction divides the sum over examples by, read off from torch's function."""
    return objective(outputs, targets, "sum") / objective(outputs, targets, reduction)


def gradients(model_fn: ModelFn, params: Any, batch: tuple[Any, Any], objective: Objective) -> Tensor:
    """[N, D]: the gradient of each example's own, unreduced loss term."""

    def one(n: int) -> Tensor:
        inputs, targets = example(batch, n)
        gradient = torch.func.grad(lambda p: objective(model_fn(p, inputs), targets, "sum"))(params)
        return cv.ravel(gradient)

    return torch.stack([one(n) for n in range(number_of_examples(batch[0]))])


def empirical_fisher(
    model_fn: ModelFn, params: Any, batch: tuple[Any, Any], objective: Objective, reduction: str
) -> Tensor:
    """Sum over examples of g_n g_n^T, with the reduction's divisor."""
    g = gradients(model_fn, params, batch, objective)
    return g.mT @ g / divisor(model_fn(params, batch[0]), batch[1], objective, reduction)


def type_2_fisher(model_fn: ModelFn, params: Any, batch: tuple[Any, Any], objective: Objective, kind: str) -> Tensor:
    """Sum over examples of E[g g^T] over targets of the model's likelihood, which are all enumerated: outputs [N, C].

    ``kind`` is "categorical", "bernoulli" or "gaussian" (variance 1/2; 2 C points have its mean and covariance, which
    is all that matters for gradients that are linear in the target).
    """
    inputs, _ = batch
    total = torch.zeros(())
    for n in range(number_of_examples(inputs)):
        one = example(inputs, n)
        for target, probability in likelihood(model_fn(params, one), kind):
            g = gradients(model_fn, params, (one, target), objective)
            total = total + probability * g.mT @ g
    return total


def likelihood(outputs: Tensor, kind: str) -> list[tuple[Tensor, Tensor]]:
    """Targets and their probabilities for outputs [1, C]."""
    classes = outputs.shape[1]
    if kind == "categorical":
        return [(torch.tensor([c]), p) for c, p in enumerate(outputs.softmax(1)[0])]
    if kind == "bernoulli":
        bits = [torch.tensor([y], dtype=outputs.dtype) for y in itertools.product((0, 1), repeat=classes)]
        return [(y, torch.where(y == 1, outputs.sigmoid(), (-outputs).sigmoid()).prod()) for y in bits]
    steps = (classes / 2) ** 0.5 * torch.eye(classes, dtype=outputs.dtype)
    weight = torch.tensor(1 / (2 * classes), dtype=outputs.dtype)
    return [(outputs + sign * step, weight) for step in steps for sign in (1, -1)]


# --- blocks ---------------------------------------------------------------------------------------------------


def layer_of(name: str) -> str:
    """What stands before the last dot."""
    return name.rpartition(".")[0]


def block_labels(params: Params, *, groups: Mapping[str, int] | None = None, diagonal: tuple[str, ...] = ()) -> Params:
    """A label for every parameter: equal within a block, and different between blocks.

    Args:
        params: tensors by name; weight and bias of one layer share what stands before the last dot.
        groups: layers whose output channels are cut into this many blocks (grouped convolutions).
        diagonal: layers whose parameters are blocks of their own, one by one.
    """
    layers = sorted({layer_of(name) for name in params})
    size = sum(leaf.numel() for leaf in params.values())
    labels: Params = {}
    for i, (name, leaf) in enumerate(params.items()):
        layer = layer_of(name)
        label = torch.full(leaf.shape, layers.index(layer) * size)
        if layer in diagonal:
            label = (i + len(layers)) * size + torch.arange(leaf.numel()).reshape(leaf.shape)
        elif groups and layer in groups:
            group = torch.arange(leaf.shape[0]) * groups[layer] // leaf.shape[0]
            label = label + group.reshape(-1, *(1,) * (leaf.ndim - 1))
        labels[name] = label
    return labels


def block_diagonal(matrix: Tensor, labels: Any) -> Tensor:
    """The entries of a matrix [D, D] whose row and column carry the same label; zeros elsewhere."""
    label = cv.ravel(labels)
    return torch.where(label.unsqueeze(0) == label.unsqueeze(1), matrix, 0)


def block(matrix: Tensor, params: Params, *names: str) -> Tensor:
    """The square block of these parameters, in the order in which they are named."""
    numbers = torch.arange(len(matrix)).split([params[name].numel() for name in sorted(params)])
    place = dict(zip(sorted(params), numbers, strict=True))
    index = torch.cat([place[name] for name in names])
    return matrix[index][:, index]


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """||estimate - truth||_F / ||truth||_F."""
    return float((estimate - truth).norm() / truth.norm())
