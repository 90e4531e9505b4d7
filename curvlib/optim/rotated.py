"""Adam in the eigenbasis of Kronecker factors: what SOAP, DyKAF and KL-Shampoo have in common.

One step for a stack of gradients D [k, m, n] with bases Q_L, Q_R (tensors: one basis a mode) is

    P = Q_L^T D Q_R                        projected gradient
    M <- b1 M + (1 - b1) P                 first moment, which lives in the basis
    V <- b2 V + (1 - b2) P * P             second moment, likewise
    U = Q_L (c M / (sqrt(V) + eps)) Q_R^T  update, c = sqrt(1 - b2^t) / (1 - b1^t)
    factors <- rule(factors, D)            and, now and then, new bases Q', to which M and V are carried

The first moment is M <- T_L^T M T_R with T = Q^T Q' when bases change, and is left alone when they do not.

The floor of a step is 2 m n (m + n) multiplications for the four products with bases and, at half of that again, two
symmetric products for Shampoo's factors; besides, M, V and the factors are read and written once. A refresh adds
w^3 multiplications and a QR decomposition (4/3 w^3) for every side of width w, and what it takes to carry M and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlib.errors import naming
from curvlib.factors.axes import mode_product
from curvlib.factors.rule import FactorRule, Factors, Observation
from curvlib.linalg.gram import writes_in_place
from curvlib.optim.refresh import Refresh
from curvlib.optim.second_moments import FullMoment, Moment, SecondMoment, Transport
from curvlib.optim.shapes import Bucket, Shapes, StackLayout
from curvlib.optim.transformation import PerLeaf, first_step, gradients_like, number_of, own_state
from curvlib.optim.turns import Turn, check, chosen, refreshed, started
from curvlib.pytree import Domain, Tree, flatten, names, register, unflatten


class RotatedStack(NamedTuple):
    """The state of one stack of k blocks; a leaf's entries in a `RotatedState` are these without the first axis.

    Args:
        first: first moment in the basis [k, ...].
        second: tensors of the second moment.
        factors: the Kronecker factors.
        bases: for each mode with a factor, [k, n, n].
        failures: for each of them, how often in a row its refresh failed [k].
    """

    first: Tensor
    second: Moment
    factors: Factors
    bases: tuple[Tensor, ...]
    failures: tuple[Tensor, ...]


@register
class RotatedState:
    """The state of `RotatedAdam`.

    Args:
        count: gradients seen, 0-d int64 on the CPU.
        refreshes: of the bases so far, likewise.
        first, second, factors, bases, failures: of each leaf, as in `RotatedStack`; of a leaf that is cut into blocks,
            a tuple with one entry a block.
    """

    count: Tensor
    refreshes: Tensor
    first: PerLeaf
    second: PerLeaf
    factors: PerLeaf
    bases: PerLeaf
    failures: PerLeaf

    @property
    def columns(self) -> tuple[PerLeaf, ...]:
        """What there is of every leaf, in the order of `RotatedStack`."""
        return self.first, self.second, self.factors, self.bases, self.failures


@dataclass(frozen=True)
class RotatedAdam:
    """``init`` and ``update`` of Adam in a changing eigenbasis; see `scale_by_soap` for the arguments.

    ``name`` is that of the transformation.
    """

    name: str
    betas: tuple[float, float]
    factor_beta: float
    eps: float
    bias_correction: bool
    normalize: bool
    shapes: Shapes
    start_step: int
    refresh: Refresh
    transport: Transport
    factors: FactorRule
    second_moment: SecondMoment

    def init(self, params: Tree) -> RotatedState:
        """The state before the first gradient.

        Raises:
            PytreeError, DtypeError, ArgumentError: parameters that this is not defined for; the message names one.
        """
        domain = Domain.of(params)
        leaves = flatten(params)[0]
        layout = StackLayout.of(leaves, self.shapes)
        pairs = zip(layout.buckets, layout.stacks(leaves), strict=True)
        stacks = [self.fresh(bucket, domain.names[bucket.blocks[0].leaf], stack) for bucket, stack in pairs]
        return RotatedState(first_step(), first_step(), *layout.scattered(stacks))

    def fresh(self, bucket: Bucket, name: str, stack: Tensor) -> RotatedStack:
        """The state of a stack before the first gradient; ``name`` is of a member."""
        second = self.moment(bucket).start(stack)
        if not bucket.modes:
            return RotatedStack(torch.zeros_like(stack), second, Factors(()), (), ())
        with naming(name):
            self.factors.check(bucket.shape, bucket.modes)
        factors = self.factors.empty(stack, bucket.modes)
        bases = tuple(
            torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).repeat(len(m), 1, 1) for m in factors.matrices
        )
        failures = tuple(torch.zeros(len(m), dtype=torch.int32, device=m.device) for m in factors.matrices)
        return RotatedStack(torch.zeros_like(stack), second, factors, bases, failures)

    def moment(self, bucket: Bucket) -> SecondMoment:
        """The second moment of a stack; without factors it is Adam's."""
        return self.second_moment if bucket.modes else FullMoment()

    def update(
        self, grads: Tree, state: RotatedState, params: Tree | None = None, *, step: int | None = None, **extra: Any
    ) -> tuple[Tree, RotatedState]:
        """Updates for these gradients, and the next state.

        The host decides by the number of the step what is to be done; everything else is a function of tensors.

        Raises:
            PytreeError, ShapeError: gradients that are not like params.
            ArgumentError: the state is of another transformation, or its count cannot be read and is not given.
            NonFiniteError: a basis could not be refreshed three times in a row.
        """
        leaves, structure = gradients_like(grads, own_state(state, RotatedState, self.name).first, params)
        layout = StackLayout.of(leaves, self.shapes, state.first)
        count, seen = number_of(state.count, step), state.count + 1
        updates, stacks, gathered = [], [], layout.gathered(state.columns)
        for bucket, old, gradient in zip(layout.buckets, gathered, layout.stacks(leaves), strict=True):
            direction, new = self.advanced(bucket, RotatedStack(*old.values), gradient, count, seen)
            updates.append(direction)
            stacks.append(new)
        refreshes = state.refreshes
        if self.due(count):
            refreshes = refreshes + 1
            stacks = self.refreshed(layout, stacks, count, names(grads), refreshes)
        leaves = layout.leaves(updates)
        if self.normalize:
            size = self.step_size(FullMoment(), count, seen)
            leaves = [leaf * (size / (1e-30 + leaf.square().mean().sqrt())).to(leaf.dtype) for leaf in leaves]
        return unflatten(structure, leaves), RotatedState(seen, refreshes, *layout.scattered(stacks, gathered))

    @property
    def first_turn(self) -> int:
        """The gradient after which the first bases are made."""
        return max(self.start_step, 1)

    def step(self, count: int) -> int:
        """The number of a step of Adam; 0 for a gradient that only starts the factors."""
        return count - (self.start_step == 0)

    def due(self, count: int) -> bool:
        """Whether bases are made or refreshed after this gradient."""
        return count >= self.first_turn and (count == self.first_turn or self.refresh.due(self.step(count)))

    def step_size(self, moment: SecondMoment, count: int, seen: Tensor) -> Tensor:
        """The bias correction c, 0-d float64: of the tensor ``seen``, which is ``count`` on a device."""
        step = seen.double() - int(self.start_step == 0)
        if not self.bias_correction or self.step(count) == 0:
            return torch.ones_like(step)
        return moment.correction(self.betas[1], step) / (1 - self.betas[0] ** step)

    def advanced(
        self, bucket: Bucket, old: RotatedStack, gradient: Tensor, count: int, seen: Tensor
    ) -> tuple[Tensor, RotatedStack]:
        """One step of a stack, in the bases it has: the update and the new state."""
        modes, bases = bucket.modes, old.bases if count > self.first_turn else ()
        half = projected = gradient
        for basis, mode in list(zip(bases, modes, strict=bool(bases)))[::-1]:
            half, projected = projected, mode_product(projected, basis, mode)
        silent = self.step(count) == 0
        first = old.first if silent else torch.lerp(old.first, projected, 1 - self.betas[0])
        # what nobody else holds is written over: passes over fresh memory cost more than the arithmetic
        owned = projected is not gradient and writes_in_place(projected)
        squares = torch.mul(projected, projected, out=projected if owned else None)
        factors = old.factors
        if modes:
            observed = Observation(gradient, half, squares)
            if count == 1:
                factors = self.factors.first(observed, modes, self.factor_beta)
            else:
                factors = self.factors.update(factors, observed, modes, bases, self.factor_beta)
        if silent:
            return torch.zeros_like(gradient), RotatedStack(first, old.second, factors, old.bases, old.failures)
        moment = self.moment(bucket)
        second = moment.update(old.second, squares, self.betas[1])
        root = moment.root(second, factors, modes, first, squares if writes_in_place(squares) else None)
        into = root if writes_in_place(first, root) else None
        size = self.step_size(moment, count, seen)
        inverse = torch.ones_like(size) if self.normalize else 1 / size
        divisor = torch.add(
            torch.mul(root, inverse.to(root.dtype), out=into), (self.eps * inverse).to(root.dtype), out=into
        )
        into = into if divisor.shape == first.shape else None
        direction = torch.div(first, divisor, out=into)
        if moment.limit is not None:
            limit = (moment.limit / (size * inverse)).to(direction)
            direction = torch.clamp(direction, -limit, limit, out=into)
        for basis, mode in zip(bases, modes, strict=bool(bases)):
            direction = mode_product(direction, basis.mT, mode)
        return direction, RotatedStack(first, second, factors, old.bases, old.failures)

    def refreshed(
        self, layout: StackLayout, stacks: list[RotatedStack], count: int, leaves: Sequence[str], refreshes: Tensor
    ) -> list[RotatedStack]:
        """The stacks in new bases; ``leaves``: names, ``refreshes``: how many there were, with this one."""
        first = count == self.first_turn
        matrices = [matrix for stack in stacks for matrix in stack.factors.matrices]
        bases = [basis for stack in stacks for basis in stack.bases]
        limit = None if first else self.refresh.limit(self.step(count))
        choices = iter(chosen(matrices, bases, limit))
        result = []
        for bucket, stack in zip(layout.buckets, stacks, strict=True):
            turns, failures = [], []
            for matrix, basis, failed in zip(stack.factors.matrices, stack.bases, stack.failures, strict=True):
                choice = next(choices)
                turn, failed = started(matrix, basis, failed) if first else refreshed(matrix, basis, failed, choice)
                check([leaves[block.leaf] for block in bucket.blocks], failed, refreshes)
                turns.append(turn)
                failures.append(failed)
            result.append(self.carried(bucket, stack, turns, failures) if turns else stack)
        return result

    def carried(
        self, bucket: Bucket, stack: RotatedStack, turns: Sequence[Turn], failures: Sequence[Tensor]
    ) -> RotatedStack:
        """The stack in its new bases."""
        first, second, bases = stack.first, stack.second, []
        for mode, basis, turn in zip(bucket.modes, stack.bases, turns, strict=True):
            bases.append(turn.placed(basis))
            if turn.members is not None and len(turn.members) == 0:
                continue
            rest = first.shape[1:].numel() // basis.shape[-1]
            rotation = None
            if self.transport == "hadamard" or basis.shape[-1] <= rest:  # else two thin products are cheaper
                rotation = turn.old.mT @ turn.new
            first = turn.apply(partial(rotated, turn=turn, rotation=rotation, mode=mode), first)
            second = self.second_moment.transported(second, turn, rotation, mode, self.transport)
        factors = self.factors.rebased(stack.factors, bases)
        return RotatedStack(first, second, factors, tuple(bases), tuple(failures))


def rotated(stack: Tensor, turn: Turn, rotation: Tensor | None, mode: int) -> Tensor:
    """Coordinates in the old basis of a mode, in the new one."""
    if rotation is not None:
        return mode_product(stack, rotation, mode)
    return mode_product(mode_product(stack, turn.old.mT, mode), turn.new, mode)
