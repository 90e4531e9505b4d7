"""The optimizers that every test of `test_optimizers` runs through, and the problems they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlib.optim as optim
from curvlib.optim.rotated import RotatedStack
from curvlib.optim.shampoo import ShampooStack
from curvlib.pytree import Tree, flatten, ravel, register, tree_map, unflatten, unravel


@dataclass(frozen=True)
class Case:
    """One optimizer.

    Args:
        name: for test ids.
        make: learning rate -> the transformation whose updates are added to params.
        rate: a learning rate that suits it on `quadratic` and `rosenbrock`.
        orders: of the leaves it takes.
        float32: how far, relatively, a few steps in float32 may be from those in float64.
        traceable: whether update runs under vmap, torch.compile and fake tensors, given the number of the step.
    """

    name: str
    make: Callable[[Any], optim.GradientTransformation]
    rate: float
    orders: tuple[int, ...] = (0, 1, 2, 3, 4)
    float32: float = 1e-5
    traceable: bool = True


def preconditioned(*transformations: optim.GradientTransformation) -> Callable[[Any], optim.GradientTransformation]:
    """A chain that ends with the learning rate."""
    return lambda rate: optim.chain(*transformations, optim.scale_by_learning_rate(rate))


def muon_and_adamw(rate: Any) -> optim.GradientTransformation:
    parts = {"matrix": optim.muon(rate, weight_decay=0.0), "rest": optim.adamw(rate, weight_decay=0.0)}
    return optim.partition(parts, optim.matrices_or_rest)


MATRICES = (2, 3, 4)

CASES = [
    Case("sgd", preconditioned(optim.identity()), 0.02),
    Case("clipped sgd", preconditioned(optim.clip_by_global_norm(1.0)), 0.1),
    Case("leafwise clipped sgd", preconditioned(optim.clip_by_norm(1.0)), 0.1),
    Case("heavy ball", preconditioned(optim.heavy_ball(0.8, dampening=0.5)), 0.02),
    Case("nesterov", preconditioned(optim.nesterov(0.8)), 0.01),
    Case("adam", preconditioned(optim.scale_by_adam()), 0.1),
    Case("adam without bias correction", preconditioned(optim.scale_by_adam(bias_correction=False)), 0.02),
    Case("adamw", lambda rate: optim.adamw(rate, weight_decay=1e-3), 0.1),
    Case("muon", lambda rate: optim.muon(rate, weight_decay=0.0), 0.1, MATRICES, float32=1e-3),
    Case(
        "muon as published",
        preconditioned(optim.scale_by_muon(method="quintic", scaling="rms")),
        0.3,
        MATRICES,
        float32=1e-3,
    ),
    Case("muon and adamw", muon_and_adamw, 0.1, float32=1e-3),
    Case("graft", preconditioned(optim.graft(optim.identity(), optim.scale_by_adam())), 0.05),
    Case(
        "grafted muon",
        preconditioned(optim.graft(optim.scale_by_muon(), optim.identity())),
        0.02,
        MATRICES,
        float32=1e-3,
    ),
    # the first eigenbases of a singular factor are arbitrary where it is zero: another precision finds others
    Case("soap", preconditioned(optim.scale_by_soap()), 0.1, float32=2.0),
    Case(
        "soap as published",
        preconditioned(optim.scale_by_soap(transport="permute", refresh=optim.Every(1))),
        0.1,
        float32=2.0,
    ),
    Case(
        "soap from the third step, adaptive",
        preconditioned(optim.scale_by_soap(start_step=3, refresh=optim.Adaptive(0.1, every=2), one_sided=True)),
        0.1,
    ),
    Case("kl-soap", preconditioned(optim.scale_by_soap(factors=optim.KLFactors())), 0.1, float32=2.0),
    Case("dykaf", preconditioned(optim.scale_by_dykaf()), 0.1, float32=2.0),
    Case(
        "dykaf, rank-1 moment",
        preconditioned(optim.scale_by_dykaf(second_moment="rank-1", merge_dimensions=4)),
        0.1,
        float32=2.0,
    ),
    Case("kl-shampoo", preconditioned(optim.scale_by_kl_shampoo()), 0.1, float32=2.0),
    Case(
        "grafted shampoo",
        preconditioned(optim.graft(optim.scale_by_shampoo(refresh=optim.Every(2)), optim.scale_by_adam())),
        0.05,
        float32=0.1,
    ),
]

every_optimizer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_traceable_optimizer = pytest.mark.parametrize(
    "case", [case for case in CASES if case.traceable], ids=lambda case: case.name
)
compiled_by_default = ("adamw", "muon and adamw", "soap", "grafted shampoo")
every_compiled_optimizer = pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=() if x.name in compiled_by_default else pytest.mark.slow) for x in CASES if x.traceable],
    ids=lambda case: case.name,
)


# --- parameters -------------------------------------------------------------------------------------------------

SHAPES = {0: (), 1: (3,), 2: (4, 3), 3: (2, 3, 2), 4: (2, 3, 2, 1)}


@register
class Layer:
    weights: list[Tensor]
    other: Tensor | None


def random_leaves(case: Case, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """One normal leaf of each order that the optimizer takes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPES[order], generator=generator, dtype=torch.float64).to(dtype) for order in case.orders]


CONTAINERS: dict[str, Callable[[list[Tensor]], Tree]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda leaves: {f"p{i}": leaf for i, leaf in enumerate(leaves)},
    "nested": lambda leaves: {"layer": [leaves[0], {"rest.of": tuple(leaves[1:])}]},
    "dataclass": lambda leaves: {"layer": Layer(leaves[1:], None), "last": leaves[0]},
}


# --- problems ---------------------------------------------------------------------------------------------------


def quadratic(params: Tree) -> Tensor:
    """A positive quadratic form with eigenvalues from 1 to 10 that couples all elements, of the distance to 0.5."""
    x = ravel(params) - 0.5
    steps = torch.linspace(1, 10, len(x), dtype=x.dtype, device=x.device)
    mirrored = x - 2 * x.mean()  # a reflection
    return (steps * mirrored).dot(mirrored) / 2


def rosenbrock(params: Tree) -> Tensor:
    """Least squares with residuals 1 - x_i and 2 (x_{i+1} - x_i^2)."""
    x = ravel(params)
    return ((1 - x) ** 2).sum() + 4 * ((x[1:] - x[:-1] ** 2) ** 2).sum()


def grads_of(problem: Callable[[Tree], Tensor], params: Tree) -> Tree:
    return unravel(torch.func.grad(lambda x: problem(unravel(x, params)))(ravel(params)), params)


def minimised(
    transformation: optim.GradientTransformation, problem: Callable[[Tree], Tensor], params: Tree, steps: int
) -> tuple[Tree, Any]:
    """Parameters and state after these steps."""
    state = transformation.init(params)
    for _ in range(steps):
        leaf = ravel(params).requires_grad_()
        [gradient] = torch.autograd.grad(problem(unravel(leaf, params)), leaf)
        updates, state = transformation.update(unravel(gradient, params), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def stack_of(state: Any, *leaves: int) -> Any:
    """What a state knows of leaves (one, if none is named: the first) that are not cut, stacked."""
    kind = RotatedStack if isinstance(state, optim.RotatedState) else ShampooStack
    rows = [kind(*(column.entries[leaf] for column in state.columns)) for leaf in leaves or (0,)]
    return tree_map(lambda *entries: torch.stack(entries), *rows)


def copied(tree: Tree) -> Tree:
    leaves, structure = flatten(tree)
    return unflatten(structure, [leaf.clone() for leaf in leaves])


def assert_same(a: Tree, b: Tree) -> None:
    """Same structure, and the same values and dtypes bit for bit."""
    left, structure = flatten(a)
    right, other = flatten(b)
    assert structure == other
    for x, y in zip(left, right, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def assert_close(a: Tree, b: Tree, tolerance: float = 1e-12) -> None:
    left, right = flatten(a)[0], flatten(b)[0]
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
