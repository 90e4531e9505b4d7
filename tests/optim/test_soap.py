"""SOAP against a plain re-derivation of the authors' step, and what must hold of Adam in an eigenbasis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import curvlib.optim as optim
from curvlib.errors import ArgumentError
from curvlib.optim import Adaptive, Every
from curvlib.pytree import flatten, tree_map
from tests.optim.optimizers_cases import assert_close, stack_of


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed: int, width: int) -> Tensor:
    return torch.linalg.qr(random(seed, width, width))[0]


def contracted(x: Tensor, bases: list[Tensor | None], side: int) -> Tensor:
    """x in the coordinates of the bases (side 0), or back (side 1): every contraction moves an axis to the end."""
    for basis in bases:
        x = x.movedim(0, -1) if basis is None else torch.tensordot(x, basis, dims=[[0], [side]])
    return x


class PlainSOAP:
    """One parameter of SOAP as its authors step it, in float64."""

    def __init__(self, betas: tuple[float, float], beta: float, eps: float, every: int, widest: int, corrected: bool):
        self.betas, self.beta, self.eps, self.every, self.widest, self.corrected = (
            betas,
            beta,
            eps,
            every,
            widest,
            corrected,
        )
        self.t = 0

    def start(self, g: Tensor) -> Tensor:
        self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)
        self.L: list[Tensor | None] = [
            None if g.ndim < 2 or n > self.widest else torch.zeros(n, n, dtype=g.dtype) for n in g.shape
        ]
        self.average(g)
        self.Q = [None if f is None else torch.linalg.eigh(f)[1].flip(1) for f in self.L]
        return torch.zeros_like(g)

    def average(self, g: Tensor) -> None:
        for i, factor in enumerate(self.L):
            if factor is not None:
                rows = g.movedim(i, 0).flatten(1)
                self.L[i] = self.beta * factor + (1 - self.beta) * rows @ rows.T

    def step(self, g: Tensor) -> Tensor:
        self.t += 1
        p = contracted(g, self.Q, 0)
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * p
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * p**2
        update = contracted(self.m / (self.v.sqrt() + self.eps), self.Q, 1)
        if self.corrected:
            update = update * (1 - self.betas[1] ** self.t) ** 0.5 / (1 - self.betas[0] ** self.t)
        m = contracted(self.m, self.Q, 1)
        self.average(g)
        if self.t % self.every == 0:
            for i, (factor, q) in enumerate(zip(self.L, self.Q, strict=True)):
                if factor is not None and q is not None:
                    order = (q.T @ factor @ q).diagonal().argsort(descending=True)
                    self.v = self.v.index_select(i, order)
                    self.Q[i] = torch.linalg.qr(factor @ q[:, order])[0]
        self.m = contracted(m, self.Q, 0)
        return update


WIDEST = 36
LEAVES = {  # and from which step on all factors have full rank, before which a new basis is arbitrary, too
    "square": ([(6, 6), (6, 6), (5,), (), (40, 5)], 1),
    "any": ([(7, 4), (3, 8), (5,), (), (40, 5), (4, 3, 3, 2)], 4),
    "merged": ([(10, 4, 3, 3), (40, 5), (5,)], 5),  # [10, 36] by both rules of merging
}


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    leaves=st.sampled_from(sorted(LEAVES)),
    later=st.integers(0, 3),
    factor_beta=st.sampled_from([None, 0.8]),
    corrected=st.booleans(),
)
def test_twenty_steps_are_the_authors(
    seed: int, leaves: str, later: int, factor_beta: float | None, corrected: bool
) -> None:
    shapes, every = LEAVES[leaves][0], LEAVES[leaves][1] + later
    betas = (0.9, 0.95)
    soap = optim.scale_by_soap(
        betas=betas,
        factor_beta=factor_beta,
        bias_correction=corrected,
        max_dimension=WIDEST,
        merge_dimensions=WIDEST if leaves == "merged" else False,
        refresh=Every(every),
        transport="permute",
    )
    params = {f"{i}": random(seed, *shape) for i, shape in enumerate(shapes)}
    state = soap.init(params)
    plain = {name: PlainSOAP(betas, factor_beta or betas[1], 1e-8, every, WIDEST, corrected) for name in params}
    for step in range(21):
        grads = {name: random(seed + 100 * step + int(name), *leaf.shape) for name, leaf in params.items()}
        updates, state = soap.update(grads, state)
        for name, g in grads.items():
            method = plain[name].step if step else plain[name].start
            expected = method(g.flatten(1) if leaves == "merged" and g.ndim == 4 else g).reshape(g.shape)
            torch.testing.assert_close(updates[name], expected, rtol=0, atol=1e-10)
        if step == 0:  # the eigenbasis of a singular factor is arbitrary where it is zero: both go on from the same
            start_from_the_same_bases(plain, state)


def start_from_the_same_bases(plain: dict[str, PlainSOAP], state: optim.RotatedState) -> None:
    for name, bases in zip(sorted(plain), state.bases.entries, strict=True):
        modes = [mode for mode, factor in enumerate(plain[name].L) if factor is not None]
        for basis, mode in zip(bases, modes, strict=True):
            factor, other = plain[name].L[mode], plain[name].Q[mode]
            assert factor is not None
            assert other is not None
            inside, eigenvalues = basis.T @ factor @ basis, (other.T @ factor @ other).diagonal()
            torch.testing.assert_close(inside, eigenvalues.diag(), rtol=0, atol=1e-12)
            plain[name].Q[mode] = basis


def after(transformation: optim.GradientTransformation, grads: list[Any]) -> tuple[list[Any], Any]:
    """The updates for these gradients one after the other, and the last state."""
    state, updates = transformation.init(grads[0]), []
    for g in grads:
        update, state = transformation.update(g, state)
        updates.append(update)
    return updates, state


def test_without_a_rotation_it_is_adam() -> None:
    grads = [{"w": random(i, 4, 3), "b": random(i + 50, 3), "s": random(i + 90)} for i in range(6)]
    adam, _ = after(optim.scale_by_adam(betas=(0.9, 0.95), eps=0.0), grads)
    still, _ = after(optim.scale_by_soap(betas=(0.9, 0.95), eps=0.0, start_step=10), grads)
    assert_close(still, adam)
    wide, _ = after(optim.scale_by_soap(betas=(0.9, 0.95), eps=0.0, max_dimension=2), [grads[0], *grads])
    assert_close(wide[1:], adam)
    assert all(float(leaf.abs().max()) == 0 for leaf in wide[0].values())


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 1000),
    refresh=st.sampled_from([Every(1), Every(2), Adaptive(0.05)]),
)
def test_rotating_the_parameters_rotates_the_updates(seed: int, refresh: optim.Refresh) -> None:
    left, right = orthogonal(seed, 4), orthogonal(seed + 1, 4)
    grads = [random(seed + i, 4, 4) for i in range(5)]
    soap = optim.scale_by_soap(refresh=refresh)
    updates, _ = after(soap, grads)
    rotated, _ = after(soap, [left @ g @ right.T for g in grads])
    for update, image in zip(updates, rotated, strict=True):
        torch.testing.assert_close(left @ update @ right.T, image, rtol=0, atol=1e-6)


def test_blocks_are_treated_like_parameters_of_their_own() -> None:
    whole = [{"w": random(i, 7, 5)} for i in range(8)]
    parts = [{f"{a}{b}": g["w"][a : a + 4, b : b + 4] for a in (0, 4) for b in (0, 4)} for g in whole]
    for make in (optim.scale_by_soap, optim.scale_by_dykaf, optim.scale_by_kl_shampoo, optim.scale_by_shampoo):
        cut, _ = after(make(block_size=4, refresh=Every(3)), whole)
        expected, _ = after(make(refresh=Every(3)), parts)
        for update, blocks in zip(cut, expected, strict=True):
            rows = [torch.cat([blocks[f"{a}{b}"] for b in (0, 4)], 1) for a in (0, 4)]
            torch.testing.assert_close(update["w"], torch.cat(rows), rtol=0, atol=1e-9)


@pytest.mark.parametrize("transport", ["hadamard", "permute", "none"])
def test_moments_follow_the_basis(transport: Any) -> None:
    grads = [{"a": random(i, 5, 3), "b": random(i + 50, 5, 3)} for i in range(4)]
    soap = optim.scale_by_soap(transport=transport, refresh=Every(3))
    _, before = after(soap, grads[:3])
    _, moved = soap.update(grads[3], before)  # the third step, which has a refresh
    _, still = soap.update(grads[3], dataclasses.replace(before, count=torch.tensor(4)))
    old, new = stack_of(still, 0, 1), stack_of(moved, 0, 1)
    (left, right), (new_left, new_right) = old.bases, new.bases
    assert not torch.equal(left, new_left)
    torch.testing.assert_close(left @ old.first @ right.mT, new_left @ new.first @ new_right.mT, rtol=0, atol=1e-12)
    squares, carried = old.second[0], new.second[0]
    if transport == "hadamard":
        turns = (left.mT @ new_left) ** 2, (right.mT @ new_right) ** 2
        torch.testing.assert_close(carried, turns[0].mT @ squares @ turns[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(carried.sum((1, 2)), squares.sum((1, 2)))
    elif transport == "permute":
        assert not torch.equal(carried, squares)
        torch.testing.assert_close(carried.flatten(1).sort()[0], squares.flatten(1).sort()[0])
    else:
        torch.testing.assert_close(carried, squares)


def test_an_adaptive_refresh_leaves_moments_of_good_bases_bit_for_bit() -> None:
    calm = [random(0, 4, 4)] * 6
    grads = [{"a": g, "b": random(i, 4, 4)} for i, g in enumerate(calm)]
    soap, never = (optim.scale_by_soap(refresh=Adaptive(limit, every=2)) for limit in (0.05, 1.0))
    (_, state), (_, untouched) = after(soap, grads), after(never, grads)
    for basis, other in zip(stack_of(state, 0, 1).bases, stack_of(untouched, 0, 1).bases, strict=True):
        assert torch.equal(basis[0], other[0])
        assert not torch.equal(basis[1], other[1])
    assert torch.equal(stack_of(state).first[0], stack_of(untouched).first[0])


def test_normalised_updates_have_a_root_mean_square_of_the_bias_correction() -> None:
    grads = [{"w": random(i, 4, 3), "b": random(i + 50, 3)} for i in range(5)]
    updates, _ = after(optim.scale_by_soap(normalize=True, betas=(0.9, 0.9)), grads)
    for t, update in enumerate(updates[1:], 1):
        for leaf in update.values():
            torch.testing.assert_close(leaf.square().mean().sqrt().item(), (1 - 0.9**t) ** -0.5)


METHODS: dict[str, Callable[..., optim.GradientTransformation]] = {
    "soap": optim.scale_by_soap,
    "kl-soap": lambda **options: optim.scale_by_soap(factors=optim.KLFactors(), **options),
    "dykaf": lambda **options: optim.scale_by_dykaf(second_moment="rank-1", **options),
    "kl-shampoo": optim.scale_by_kl_shampoo,
    "shampoo": lambda **options: optim.scale_by_shampoo(method="coupled-newton", eps=1e-3, **options),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seen", [0, 1, 2, 3])
def test_no_value_is_looked_at(method: str, seen: int) -> None:
    transformation = METHODS[method](refresh=Every(3))
    grads = {"a": random(0, 6, 4).float(), "b": random(1, 5).float(), "c": random(2, 2, 3, 2).float()}
    state = transformation.init(grads)
    for _ in range(seen):
        _, state = transformation.update(grads, state)
    numbers = iter([int(leaf) for leaf in flatten(state)[0] if leaf.dtype == torch.int64])
    # torch without CUDA cannot index what pretends to be on a GPU
    device = "cpu" if method in ("dykaf", "shampoo") else "cuda"
    with FakeTensorMode():  # where looking at a value is an error; step counts are known
        pretended = tree_map(
            lambda x: (
                torch.tensor(next(numbers))
                if x.dtype == torch.int64
                else torch.empty(x.shape, dtype=x.dtype, device=device)
            ),
            (grads, state),
        )
        updates, new = transformation.update(*pretended)
    assert all(leaf.device.type == device for leaf in updates.values())
    assert [leaf.shape for leaf in flatten(new)[0]] == [leaf.shape for leaf in flatten(state)[0]]
    valueless = tree_map(lambda x: x if x.dtype == torch.int64 else x.to("meta"), (grads, state))
    updates, new = transformation.update(*valueless)  # eagerly, where buffers are written over
    assert int(new.count) == seen + 1
    assert all(leaf.device.type == "meta" for leaf in updates.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("betas", (1.0, 0.9)), ("factor_beta", 1.0), ("eps", -1.0), ("start_step", -1), ("transport", "rotate")],
)
def test_arguments_out_of_range_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=argument):
        optim.scale_by_soap(**{argument: value})
