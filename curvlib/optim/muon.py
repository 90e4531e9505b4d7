"""Muon: momentum, orthogonalized matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, ShapeError
from curvlib.linalg.polar import polar
from curvlib.optim.arguments import below_one
from curvlib.optim.momentum import zeros
from curvlib.optim.transformation import GradientTransformation, PerLeaf, gradients_like, own_state
from curvlib.pytree import Tree, flatten, names, register, unflatten

Scaling = Literal["spectral", "rms"]


@register
class MuonState:
    """The moving average of gradients, a tensor a leaf (float32 for half precision)."""

    momentum: PerLeaf


def scale_by_muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    iterations: int = 5,
    method: Literal["cans", "quintic"] = "cans",
    scaling: Scaling = "spectral",
) -> GradientTransformation:
    """Updates are c U V^T, where U S V^T is the momentum of a matrix and c depends on its shape only.

    The momentum is B <- mu B + (1 - mu) G from zero on; with ``nesterov`` (1 - mu) G + mu B takes its place. A leaf of
    higher order counts as the matrix [d_1, rest]. Matrices of one shape are orthogonalized together.

    It agrees with `torch.optim.Muon` but for the orthogonalization: torch computes it in bfloat16, from M / ||M||_F on
    and with the polynomial that does not converge; here it is done in the precision of the parameters (float32 for half
    precision), by `curvlib.linalg.polar.polar`.

    Args:
        momentum: mu, in [0, 1).
        nesterov: whether the newest gradient is counted once more.
        iterations: polynomials of the orthogonalization.
        method: of the orthogonalization: "cans" converges; "quintic" is the polynomial of published runs.
        scaling: c for a matrix [m, n]: "spectral" sqrt(max(1, m / n)), "rms" 0.2 sqrt(max(m, n)), with which an update
            is as large as AdamW's.

    Raises:
        ArgumentError: a number is out of its range, or there is no such method or scaling.
        ShapeError: init finds a vector or a scalar; the message names it.

    Source: Jordan et al., Muon, 2024 (https://kellerjordan.github.io/posts/muon); "rms": Liu et al., Muon is scalable
    for LLM training, 2025 (arXiv 2502.16982).

    Example:
        >>> transformation = scale_by_muon(iterations=8)
        >>> params = torch.zeros(2, 2)
        >>> update, _ = transformation.update(torch.tensor([[3.0, 0.0], [0.0, -0.5]]), transformation.init(params))
        >>> torch.allclose(update, torch.tensor([[1.0, 0.0], [0.0, -1.0]]), atol=1e-3)
        True
    """
    below_one("momentum", momentum)
    if scaling not in ("spectral", "rms"):
        raise ArgumentError(f"scaling must be 'spectral' or 'rms', got {scaling!r}")
    polar(torch.zeros(1, 1), iterations=iterations, method=method)  # words the errors before the first step

    def init(params: Tree) -> MuonState:
        for name, leaf in zip(names(params), flatten(params)[0], strict=True):
            if leaf.ndim < 2:
                raise ShapeError(
                    f"parameter {name!r} has shape {tuple(leaf.shape)}, and Muon orthogonalizes matrices; "
                    "give others to another optimizer: "
                    "partition({'matrix': muon(...), 'rest': adamw(...)}, matrices_or_rest)"
                )
        return MuonState(zeros(params))

    def update(grads: Tree, state: MuonState, params: Tree | None = None, **extra: Any) -> tuple[Tree, MuonState]:
        old = own_state(state, MuonState, "scale_by_muon").momentum.entries
        leaves, structure = gradients_like(grads, state.momentum, params)
        gradients = [g.to(b.dtype) for g, b in zip(leaves, old, strict=True)]
        new = [torch.lerp(b, g, 1 - momentum) for b, g in zip(old, gradients, strict=True)]
        ahead = [torch.lerp(g, b, momentum) for b, g in zip(new, gradients, strict=True)] if nesterov else new
        factors = orthogonalized([as_matrix(leaf) for leaf in ahead], iterations, method, scaling)
        updates = [factor.reshape(leaf.shape) for factor, leaf in zip(factors, ahead, strict=True)]
        return unflatten(structure, updates), MuonState(PerLeaf(tuple(new)))

    return GradientTransformation(init, update)


def as_matrix(leaf: Tensor) -> Tensor:
    """The matrix [d_1, rest] of a leaf [d_1, d_2, ...].

    Example:
        >>> as_matrix(torch.zeros(8, 4, 3, 3)).shape
        torch.Size([8, 36])
    """
    return leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))


def orthogonalized(matrices: Sequence[Tensor], iterations: int, method: str, scaling: Scaling) -> list[Tensor]:
    """The polar factor of each matrix times its scaling; those of one shape, dtype and device in one call.

    Example:
        >>> updates = orthogonalized([torch.full((1, 1), -2.0), torch.full((4, 1), 2.0)], 8, "cans", "spectral")
        >>> updates[1].flatten().round(decimals=3)
        tensor([1., 1., 1., 1.])
    """
    stacks: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        stacks.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(i)
    result = list(matrices)
    for members in stacks.values():
        stack = torch.stack([matrices[i] for i in members])
        if stack.numel():
            _, rows, columns = stack.shape
            factors = polar(stack, iterations=iterations, method=method) * shape_factor(rows, columns, scaling)
            for i, factor in zip(members, factors.unbind(), strict=True):
                result[i] = factor
    return result


def shape_factor(rows: int, columns: int, scaling: Scaling) -> float:
    """What the polar factor of a [rows, columns] matrix is multiplied by.

    Example:
        >>> shape_factor(16, 4, "spectral"), shape_factor(4, 16, "spectral"), shape_factor(16, 4, "rms")
        (2.0, 1.0, 0.8)
    """
    if scaling == "spectral":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
