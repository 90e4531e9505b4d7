"""Shampoo: gradients times inverse roots of their Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, CurvlibError
from curvlib.factors.axes import entrywise, mode_product
from curvlib.factors.rule import Factors, Observation
from curvlib.factors.shampoo import ShampooFactors
from curvlib.linalg.roots import inverse_root, resolution, root_residual
from curvlib.optim.arguments import above_zero, at_least_zero, below_one
from curvlib.optim.refresh import Every, Refresh
from curvlib.optim.shapes import Bucket, Shapes, StackLayout
from curvlib.optim.transformation import (
    GradientTransformation,
    PerLeaf,
    first_step,
    gradients_like,
    number_of,
    own_state,
)
from curvlib.optim.turns import check, finite
from curvlib.pytree import Domain, Tree, flatten, names, register, unflatten

RULE = ShampooFactors()
TOLERANCE = 0.01  # of the residual of a root found by iteration


class ShampooStack(NamedTuple):
    """The state of one stack of k blocks; a leaf's entries in a `ShampooState` are these without the first axis.

    Args:
        factors: sums or moving averages of D D^T and D^T D; none for elements on their own.
        squares: the same of the squared gradient, for elements on their own [1, N]; empty where there are factors.
        roots: for each factor, its inverse root as of the last refresh [k, n, n].
        failures: for each factor, how often in a row its refresh failed [k].
    """

    factors: Factors
    squares: Tensor
    roots: tuple[Tensor, ...]
    failures: tuple[Tensor, ...]


@register
class ShampooState:
    """The state of `scale_by_shampoo`.

    Args:
        count: gradients seen, 0-d int64 on the CPU.
        refreshes: of the roots so far, likewise.
        factors, squares, roots, failures: of each leaf, as in `ShampooStack`; of a leaf that is cut into blocks, a
            tuple with one entry a block.
    """

    count: Tensor
    refreshes: Tensor
    factors: PerLeaf
    squares: PerLeaf
    roots: PerLeaf
    failures: PerLeaf

    @property
    def columns(self) -> tuple[PerLeaf, ...]:
        """What there is of every leaf, in the order of `ShampooStack`."""
        return self.factors, self.squares, self.roots, self.failures


def scale_by_shampoo(
    *,
    factor_beta: float | None = 0.95,
    eps: float = 1e-12,
    bias_correction: bool = True,
    exponent: float | None = None,
    method: Literal["eigh", "coupled-newton", "newton-schulz"] = "eigh",
    max_dimension: int = 10_000,
    one_sided: bool = False,
    merge_dimensions: int | Literal[False] = False,
    block_size: int | None = None,
    start_step: int = 0,
    refresh: Refresh = Every(10),  # noqa: B008
) -> GradientTransformation:
    """Updates L^(-1/4) D R^(-1/4) of matrices; of tensors of order d, L_i^(-1/2d) along every mode i.

        L <- b L + (1 - b) D D^T,   R <- b R + (1 - b) D^T D   (a sum if b is None)

    Factors contain the current gradient. Roots are of L / (1 - b^t) + eps I at the last refresh, where bias is
    corrected. d counts the modes that have a factor, so that a one-sided Shampoo is L^(-1/2) D. Vectors, scalars and
    leaves whose sides are all too wide are divided by the root of the mean (or sum) of their squares.

    Steps of other methods are grafted on from outside: ``graft(scale_by_shampoo(), scale_by_adam())``.

    Args:
        factor_beta: b, in [0, 1), or None.
        eps: added to factors before the root, and to the root of squares. The iterative methods add what they can
            resolve, too: 10 n times the precision of the dtype times (a bound of) the largest eigenvalue.
        bias_correction: False: factors are taken as they are.
        exponent: p > 0, in place of 1/(2d): L^(-p) D R^(-p).
        method: of the roots; see `curvlib.linalg.roots.inverse_root`. The iterative ones have certain orders 1/p only,
            and do not make the host wait for a GPU; eigendecompositions do, at every refresh. A root whose residual
            is not small counts as a failed refresh.
        max_dimension: sides wider than this have no factor.
        one_sided: only the narrower side of a matrix has a factor.
        merge_dimensions: see `Shapes`.
        block_size: sides are cut into pieces of this width.
        start_step: so many gradients pass through unchanged while they collect in the factors.
        refresh: `Every`, or `Warmup` into it; steps are counted like t, and the first step after ``start_step`` always
            has a refresh. `Adaptive` needs eigenbases, which are not kept here.

    Returns:
        A transformation whose state is a `ShampooState`.

    Raises:
        ArgumentError: a number or a name is not one of those above.
        NonFiniteError: by ``update``, after three failed refreshes of a root in a row; names the parameter.

    Source:
        Gupta, Koren and Singer 2018, Shampoo, arXiv 1802.09568; Anil et al. 2020, arXiv 2002.09018.

    Example:
        >>> grads = {"w": torch.tensor([[4.0, 0.0], [0.0, 9.0]])}
        >>> shampoo = scale_by_shampoo(refresh=Every(1))
        >>> updates, _ = shampoo.update(grads, shampoo.init(grads))
        >>> torch.allclose(updates["w"], torch.eye(2), atol=1e-3)
        True
    """
    if factor_beta is not None:
        below_one("factor_beta", factor_beta)
    at_least_zero("eps", eps)
    at_least_zero("start_step", start_step)
    if exponent is not None:
        above_zero("exponent", exponent)
    if method not in ("eigh", "coupled-newton", "newton-schulz"):
        raise ArgumentError(f"method must be 'eigh', 'coupled-newton' or 'newton-schulz', got {method!r}")
    if refresh.looks:
        raise ArgumentError(
            f"Shampoo keeps no eigenbases that {refresh} could look at: use Every, scale_by_soap or scale_by_kl_shampoo"
        )
    shapes = Shapes(max_dimension, one_sided, merge_dimensions, block_size)
    preconditioner = Preconditioner(factor_beta, eps, bias_correction, exponent, method, shapes, start_step, refresh)
    return GradientTransformation(preconditioner.init, preconditioner.update)


@dataclass(frozen=True)
class Preconditioner:
    """``init`` and ``update`` of Shampoo; see `scale_by_shampoo` for the arguments."""

    factor_beta: float | None
    eps: float
    bias_correction: bool
    exponent: float | None
    method: str
    shapes: Shapes
    start_step: int
    refresh: Refresh

    def init(self, params: Tree) -> ShampooState:
        """The state before the first gradient."""
        Domain.of(params)  # refuses what is no parameter
        leaves, stacks = flatten(params)[0], []
        layout = StackLayout.of(leaves, self.shapes)
        for bucket, stack in zip(layout.buckets, layout.stacks(leaves), strict=True):
            factors = RULE.empty(stack, bucket.modes)
            squares = stack.new_zeros(len(stack), 0) if bucket.modes else torch.zeros_like(stack)
            eyes = (
                torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).repeat(len(m), 1, 1) for m in factors.matrices
            )
            counters = (torch.zeros(len(m), dtype=torch.int32, device=m.device) for m in factors.matrices)
            stacks.append(ShampooStack(factors, squares, tuple(eyes), tuple(counters)))
        return ShampooState(first_step(), first_step(), *layout.scattered(stacks))

    def update(
        self, grads: Tree, state: ShampooState, params: Tree | None = None, *, step: int | None = None, **extra: Any
    ) -> tuple[Tree, ShampooState]:
        """Updates for these gradients, and the next state; what is to be done, the host decides by the step's number.

        Raises:
            PytreeError, ShapeError: gradients that are not like params.
            ArgumentError: the state is of another transformation, or its count cannot be read and is not given.
            NonFiniteError: a root could not be refreshed three times in a row.
        """
        known = own_state(state, ShampooState, "scale_by_shampoo").failures
        leaves, structure = gradients_like(grads, known, params)
        layout = StackLayout.of(leaves, self.shapes, state.squares)
        count, seen = number_of(state.count, step), state.count + 1
        active = count > self.start_step
        due = active and (count == self.start_step + 1 or self.refresh.due(count))
        refreshes = state.refreshes + 1 if due else state.refreshes
        bias = self.bias(seen)
        updates, stacks, gathered = [], [], layout.gathered(state.columns)
        for bucket, old, gradient in zip(layout.buckets, gathered, layout.stacks(leaves), strict=True):
            new = self.collected(bucket, ShampooStack(*old.values), gradient)
            if due and bucket.modes:
                members = [names(grads)[block.leaf] for block in bucket.blocks]
                new = self.rooted(new, members, bias, refreshes)
            updates.append(self.preconditioned(bucket, new, gradient, bias) if active else gradient)
            stacks.append(new)
        new_leaves = layout.leaves(updates)
        return unflatten(structure, new_leaves), ShampooState(seen, refreshes, *layout.scattered(stacks, gathered))

    def collected(self, bucket: Bucket, old: ShampooStack, gradient: Tensor) -> ShampooStack:
        """The stack with one more gradient in its factors."""
        if bucket.modes:
            seen = Observation(gradient, gradient, gradient)
            factors = RULE.update(old.factors, seen, bucket.modes, (), self.factor_beta)
            return ShampooStack(factors, old.squares, old.roots, old.failures)
        kept, weight = (1.0, 1.0) if self.factor_beta is None else (self.factor_beta, 1 - self.factor_beta)
        squares = torch.addcmul(kept * old.squares, gradient, gradient, value=weight)
        return ShampooStack(old.factors, squares, old.roots, old.failures)

    def bias(self, seen: Tensor) -> Tensor:
        """The sum of the weights of all gradients, if averages are to be divided by it: 0-d float64."""
        count = seen.double()
        return 1 - self.factor_beta**count if self.bias_correction and self.factor_beta else torch.ones_like(count)

    def rooted(self, stack: ShampooStack, names: Sequence[str], bias: Tensor, refreshes: Tensor) -> ShampooStack:
        """The stack with new roots; where they are not finite, with the old ones."""
        order = 2 * len(stack.roots) if self.exponent is None else 1 / self.exponent
        order = round(order) if abs(order - round(order)) < 1e-9 else order
        roots, failures = [], []
        for matrix, old, failed in zip(stack.factors.matrices, stack.roots, stack.failures, strict=True):
            usable = finite(matrix)
            safe = torch.where(entrywise(usable, old), matrix / bias.to(matrix.dtype), old)
            damping = torch.full_like(bias, self.eps).to(safe).expand(len(safe))
            if self.method != "eigh":
                damping = damping + resolution(safe)
            try:
                new = inverse_root(safe, order, damping=damping, method=self.method)
            except CurvlibError:  # of the whole stack: a decomposition that failed says nothing of its members
                new, usable = old, torch.zeros_like(usable)
            usable = usable.logical_and(finite(new))
            if self.method != "eigh":
                usable = usable.logical_and(root_residual(new, safe, int(order), damping) < TOLERANCE)
            failures.append(torch.where(usable, 0, failed + 1))
            roots.append(torch.where(entrywise(usable, old), new, old))
            check(names, failures[-1], refreshes)
        return ShampooStack(stack.factors, stack.squares, tuple(roots), tuple(failures))

    def preconditioned(self, bucket: Bucket, stack: ShampooStack, gradient: Tensor, bias: Tensor) -> Tensor:
        """The update."""
        if not bucket.modes:
            return gradient / ((stack.squares / bias.to(gradient.dtype)).sqrt() + self.eps)
        for root, mode in zip(stack.roots, bucket.modes, strict=True):
            gradient = mode_product(gradient, root, mode)
        return gradient
