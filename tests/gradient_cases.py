"""Random streams of gradients, and what curvature from them should be, made with explicit matrices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import optree
import torch
from exactness_problems import generator
from hypothesis import strategies as st
from torch import Tensor

import curvlib as cv
from curvlib.operators import Kronecker, KroneckerSide

shapes = st.lists(st.integers(1, 3), min_size=0, max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32])


@st.composite
def streams(draw: Any, leaf_shapes: Any = shapes, *, most: int = 3) -> list[Any]:
    """Gradients for one random pytree of parameters."""
    found = draw(st.lists(leaf_shapes, min_size=1, max_size=3))
    dtype, source = draw(dtypes), generator(draw(st.integers(0, 2**31)))
    nested = draw(st.booleans())

    def gradient() -> Any:
        leaves = [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in found]
        named = {f"p{i}": leaf for i, leaf in enumerate(leaves)}
        return {"a": [named, None], "b": ()} if nested else named

    return [gradient() for _ in range(draw(st.integers(1, most)))]


def leaves(tree: Any) -> list[Tensor]:
    return optree.tree_leaves(tree)


def tolerance(tree: Any) -> float:
    return 1e-10 if leaves(tree)[0].dtype == torch.float64 else 2e-4


def weights_of(count: int, decay: float | None) -> list[float]:
    """How much each gradient counts after the updates."""
    if decay is None:
        return [1.0] * count
    return [decay ** (count - 1 - t) * (1 if t == 0 else 1 - decay) for t in range(count)]


def unfolding(gradient: Tensor, axis: int) -> Tensor:
    return gradient.double().movedim(axis, 0).reshape(gradient.shape[axis], -1)


def moments(gradients: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """The weighted sum of D_(i) D_(i)^T for every axis."""
    return [
        sum(w * unfolding(d, axis) @ unfolding(d, axis).mT for w, d in zip(weights, gradients, strict=True))
        for axis in range(gradients[0].ndim)
    ]


def second_moment(gradients: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of g g^T."""
    rows = torch.stack([d.double().reshape(-1) for d in gradients])
    return rows.mT @ (torch.tensor(weights, dtype=torch.float64)[:, None] * rows)


def kron(matrices: Sequence[Tensor]) -> Tensor:
    return functools.reduce(lambda a, b: torch.kron(a.contiguous(), b.contiguous()), matrices)


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0) ** exponent) @ vectors.mT


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def factors(curv: Any, name: str) -> list[Tensor]:
    """The dense factors of a block, one an axis, of which their product is the block."""
    block = curv.blocks[name]
    assert isinstance(block, Kronecker)
    right = block.right.factors if isinstance(block.right, KroneckerSide) else (block.right,)
    return [side.matrices().double() for side in (block.left, *right)]


def run(estimator: Any, gradients: Sequence[Any], decay: float | None, **options: Any) -> cv.BlockDiagonal:
    """init, then one update for each further gradient."""
    curv = estimator.init(gradients[0], **options)
    for gradient in gradients[1:]:
        curv = estimator.update(curv, gradient, decay)
    assert isinstance(curv, cv.BlockDiagonal)
    return curv


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def gradient_blocks(case: Any, curv: cv.BlockDiagonal, name: str) -> Tensor:
    """Per-example gradients of a block [N, *groups, m, n], one example at a time."""
    inputs, targets = case.batch()

    def one(k: int) -> Tensor:
        def objective(params: Any) -> Tensor:
            return torch.nn.functional.cross_entropy(
                case.model_fn(params, inputs[k : k + 1]).movedim(-1, 1), targets[k : k + 1], reduction="sum"
            )

        return curv.gather(torch.func.grad(objective)(case.params), 0)[name]

    return torch.stack([one(k) for k in range(len(targets))])
