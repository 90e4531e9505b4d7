"""`check_transformation`: what every gradient transformation must do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.optim import GradientTransformation, apply_updates
from curvlib.pytree import Tree, flatten, ravel, tree_map, unflatten
from curvlib.testing.report import Property, Report, assert_close, check_all, same

STEPS = 4


def check_transformation(
    optimizer: GradientTransformation, params: Tree | None = None, *, descends: bool = True, tolerance: float = 1e-8
) -> Report:
    """Checks a gradient transformation, or a whole optimizer whose updates are added to params.

    It must change nothing it is given and draw nothing from torch's global generator, give the same twice, keep the
    structure, shapes and dtypes of gradients, have a state that is a pytree from which it goes on, not care which
    containers params are in, and give finite updates for gradients that are zero.

    Args:
        optimizer: what is checked.
        params: pytree of tensors in float64 that it is defined for; None: a matrix, a vector and a scalar.
        descends: it is a whole optimizer: after some steps a quadratic objective is smaller.
        tolerance: the relative error that counts as rounding.

    Returns:
        What holds.

    Raises:
        AssertionError: something does not; says what.

    Example:
        >>> import curvlib as cv
        >>> from curvlib.testing import check_transformation
        >>> check_transformation(cv.optim.adamw(0.01))
        8 properties hold
        >>> ascent = cv.optim.chain(cv.optim.scale_by_adam(), cv.optim.scale(0.01))
        >>> try:
        ...     check_transformation(ascent)
        ... except AssertionError as error:
        ...     print(str(error).split(":")[1])
         a quadratic becomes smaller does not hold
    """
    if params is None:
        generator = torch.Generator().manual_seed(0)
        shapes: dict[str, tuple[int, ...]] = {"matrix": (4, 3), "vector": (3,), "scalar": ()}
        params = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    runs = Runs(optimizer, params, tolerance)
    return check_all(type(optimizer).__name__, runs.properties(descends=descends))


class Runs:
    """A few steps of an optimizer on a quadratic objective."""

    def __init__(self, optimizer: GradientTransformation, params: Tree, tolerance: float) -> None:
        self.optimizer, self.params, self.tolerance = optimizer, params, tolerance

    def properties(self, *, descends: bool) -> Iterator[Property]:
        """What is to be checked."""
        yield Property("an update changes nothing it is given", self.pure)
        yield Property("two updates from one state are the same", self.repeatable)
        yield Property("updates have the structure, shapes and dtypes of gradients", self.shapes)
        yield Property("the state is a pytree from which it goes on", self.resumes)
        yield Property("containers make no difference", self.containers)
        yield Property("zero gradients give finite updates", self.zeros)
        yield Property("parameters keep their dtype", self.dtypes)
        if descends:
            yield Property("a quadratic becomes smaller", self.descends)

    def objective(self, params: Tree) -> Tensor:
        """1/2 sum_i c_i (x_i - 1)^2 with c_i between 1 and 2."""
        x = ravel(params)
        return 0.5 * ((1 + torch.linspace(0, 1, len(x), dtype=x.dtype)) * (x - 1).square()).sum()

    def gradients(self, params: Tree) -> Tree:
        gradients: Tree = torch.func.grad(self.objective)(params)
        return gradients

    def after(self, params: Tree, steps: int) -> tuple[Tree, Any]:
        """Params and state after some steps."""
        state = self.optimizer.init(params)
        for _ in range(steps):
            updates, state = self.optimizer.update(self.gradients(params), state, params)
            params = apply_updates(params, updates)
        return params, state

    def pure(self) -> None:
        params, state = self.after(self.params, STEPS)
        gradients = self.gradients(params)
        before = copied([gradients, params, state])
        random = torch.get_rng_state()
        self.optimizer.update(gradients, state, params)
        names = ("gradients", "params", "the state")
        for name, now, then in zip(names, (gradients, params, state), before, strict=True):
            assert same(now, then), f"{name} changed"
        assert torch.equal(random, torch.get_rng_state()), "torch's global generator was used"

    def repeatable(self) -> None:
        params, state = self.after(self.params, STEPS)
        gradients = self.gradients(params)
        first, second = (self.optimizer.update(gradients, state, params) for _ in range(2))
        assert same(first, second), "the second differs from the first"

    def shapes(self) -> None:
        gradients = self.gradients(self.params)
        updates, _ = self.optimizer.update(gradients, self.optimizer.init(self.params), self.params)
        (found, one), (expected, two) = flatten(updates), flatten(gradients)
        assert one == two, f"the structure is {one}, not {two}"
        for x, y in zip(found, expected, strict=True):
            assert x.shape == y.shape, f"a shape is {tuple(x.shape)}, not {tuple(y.shape)}"
            assert x.dtype == y.dtype, f"a dtype is {x.dtype}, not {y.dtype}"

    def resumes(self) -> None:
        params, state = self.after(self.params, STEPS)
        leaves, structure = flatten(state)
        assert all(isinstance(leaf, Tensor) for leaf in leaves), "a leaf of the state is no tensor"
        again = unflatten(structure, [leaf.clone() for leaf in leaves])
        gradients = self.gradients(params)
        left, right = (self.optimizer.update(gradients, x, params) for x in (state, again))
        assert same(left, right), "a copy of the state goes on in another way"

    def containers(self) -> None:
        leaves = flatten(self.params)[0]
        inside = {"a": {f"{number:03d}": leaf for number, leaf in enumerate(leaves)}}
        listed, nested = (ravel(self.after(params, STEPS)[0]) for params in (leaves, inside))
        assert_close(nested, listed, self.tolerance)

    def zeros(self) -> None:
        zeros = tree_map(torch.zeros_like, self.params)
        for params, state in ((self.params, self.optimizer.init(self.params)), self.after(self.params, STEPS)):
            updates, _ = self.optimizer.update(zeros, state, params)
            assert bool(ravel(updates).isfinite().all()), "they are not"

    def dtypes(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            params = tree_map(lambda x, dtype=dtype: x.to(dtype), self.params)
            found = {leaf.dtype for leaf in flatten(self.after(params, 2)[0])[0]}
            assert found == {dtype}, f"those of {dtype} become {found}"

    def descends(self) -> None:
        before, after = (float(self.objective(x)) for x in (self.params, self.after(self.params, 4 * STEPS)[0]))
        assert after < before, f"it is {after:.4g} after {4 * STEPS} steps, and was {before:.4g}"


def copied(tree: Tree) -> Tree:
    """A copy of every tensor of a pytree."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)
