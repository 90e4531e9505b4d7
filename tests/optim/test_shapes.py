"""Leaves in stacks and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvlib.optim as optim
from curvlib.errors import ArgumentError, ShapeError
from curvlib.factors.axes import along, mode_product, outer, unfolded
from curvlib.optim.shapes import Shapes, StackLayout
from curvlib.pytree import flatten, tree_map

shapes_of_leaves = st.lists(st.lists(st.integers(1, 7), max_size=4).map(tuple), min_size=1, max_size=5)
options = st.builds(
    Shapes,
    max_dimension=st.integers(1, 8),
    one_sided=st.booleans(),
    merge_dimensions=st.one_of(st.just(False), st.integers(1, 40)),
    block_size=st.one_of(st.none(), st.integers(1, 5)),
)


@settings(deadline=None, max_examples=20)
@given(leaves=shapes_of_leaves, how=options)
def test_stacks_hold_every_element_once_and_give_the_leaves_back(leaves: list[tuple[int, ...]], how: Shapes) -> None:
    params = [torch.randn(shape, dtype=torch.float64) for shape in leaves]
    layout = StackLayout.of(params, how)
    stacks = list(layout.stacks(params))
    assert sum(stack.numel() for stack in stacks) == sum(math.prod(shape) for shape in leaves)
    for bucket, stack in zip(layout.buckets, stacks, strict=True):
        assert stack.shape[1:] == bucket.shape
        assert all(bucket.shape[mode] <= how.max_dimension for mode in bucket.modes)
    for leaf, back in zip(params, layout.leaves(stacks), strict=True):
        assert torch.equal(leaf, back)


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((128, 64, 3, 3), 10_000, (128, 576)),
        ((128, 64, 3, 3), 575, (128, 64, 9)),
        ((4, 8, 64, 3, 3), 1000, (32, 576)),
        ((4, 3), 12, (12,)),
        ((5,), 1, (5,)),
    ],
)
def test_small_dimensions_are_merged_from_the_last_one_on(
    shape: tuple[int, ...], limit: int, merged: tuple[int, ...]
) -> None:
    assert Shapes(merge_dimensions=limit).merged(shape) == merged


def test_leaves_of_one_shape_share_a_stack_and_others_are_concatenated() -> None:
    params = [torch.zeros(shape) for shape in ((4, 3), (2,), (4, 3), (), (9, 9))]
    layout = StackLayout.of(params, Shapes(max_dimension=8))
    assert [(bucket.shape, bucket.modes) for bucket in layout.buckets] == [((4, 3), (0, 1)), ((84,), ())]
    assert [[block.leaf for block in bucket.blocks] for bucket in layout.buckets] == [[0, 2], [1, 3, 4]]


def test_dtypes_do_not_share_a_stack_and_half_precision_becomes_float32() -> None:
    params = [torch.ones(2, 2, dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.float32)]
    stacks = list(StackLayout.of(params, Shapes()).stacks(params))
    assert [(stack.dtype, len(stack)) for stack in stacks] == [(torch.float64, 1), (torch.float32, 2)]


def test_a_large_leaf_is_cut_into_blocks_with_a_ragged_tail() -> None:
    layout = StackLayout.of([torch.zeros(1024, 256), torch.zeros(1100, 256)], Shapes(block_size=512))
    assert [(bucket.shape, len(bucket.blocks)) for bucket in layout.buckets] == [((512, 256), 4), ((76, 256), 1)]


@pytest.mark.parametrize(
    ("shape", "modes"), [((3, 5), (0,)), ((5, 3), (1,)), ((4, 4), (0,)), ((4, 2, 4), (0, 1)), ((4,), (0,))]
)
def test_one_sided_leaves_out_the_widest_side(shape: tuple[int, ...], modes: tuple[int, ...]) -> None:
    assert Shapes(one_sided=True).modes(shape) == modes


@pytest.mark.parametrize(
    "wrong", [{"max_dimension": 0}, {"block_size": 0}, {"merge_dimensions": 0}, {"merge_dimensions": True}]
)
def test_widths_that_are_not_positive_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Shapes(**wrong)


@settings(deadline=None, max_examples=20)
@given(leaves=shapes_of_leaves, how=options, apart=st.booleans())
def test_entries_a_leaf_are_stacked_and_taken_apart_again(
    leaves: list[tuple[int, ...]], how: Shapes, apart: bool
) -> None:
    params = [torch.randn(shape, dtype=torch.float64) for shape in leaves]
    layout = StackLayout.of(params, how)
    stacks = [(stack, (2 * stack, {"no more": ()})) for stack in layout.stacks(params)]
    columns = layout.scattered(stacks)
    assert all(len(column.entries) == len(params) for column in columns)
    if apart:  # in memory
        columns = tree_map(torch.clone, columns)
    found = layout.gathered(columns)
    for (stack, (double, _)), other in zip(stacks, found, strict=True):
        assert torch.equal(other.values[0], stack)
        assert torch.equal(other.values[1][0], double)
        assert all(x.data_ptr() == y.data_ptr() for x, y in zip(other.tensors, (stack, double), strict=True)) or apart
    again = layout.scattered([stack.values for stack in found], found)
    for x, y in zip(flatten(again)[0], flatten(columns)[0], strict=True):
        assert torch.equal(x, y)


def test_a_gradient_of_another_shape_is_refused_by_name() -> None:
    for transformation in (optim.scale_by_soap(), optim.scale_by_adam()):
        with pytest.raises(ShapeError, match="'w'"):
            transformation.update({"w": torch.zeros(4, 2)}, transformation.init({"w": torch.zeros(2, 3)}))


@settings(deadline=None, max_examples=20)
@given(widths=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_products_along_a_mode_are_einsums(widths: list[int], data: st.DataObject) -> None:
    mode = data.draw(st.integers(0, len(widths) - 1))
    stack = torch.randn(2, *widths, dtype=torch.float64)
    matrix = torch.randn(2, widths[mode], 3, dtype=torch.float64)
    letters = "abcd"[: len(widths)]
    found = mode_product(stack, matrix, mode)
    einsum = f"k{letters},k{letters[mode]}z->k{letters.replace(letters[mode], 'z')}"
    torch.testing.assert_close(found, torch.einsum(einsum, stack, matrix))
    rows = unfolded(stack, mode, stack.ndim - 1)
    rest = letters.replace(letters[mode], "")
    gram = torch.einsum(f"k{letters},kz{rest}->k{letters[mode]}z", stack, stack.movedim(mode + 1, 1))
    torch.testing.assert_close(rows @ rows.mT, gram)
    order = torch.stack([torch.randperm(widths[mode]) for _ in range(2)])
    permuted = torch.stack([member.index_select(mode, o) for member, o in zip(stack, order, strict=True)])
    assert torch.equal(along(order, stack, mode), permuted)


def test_outer_spreads_vectors_along_their_modes() -> None:
    first, last = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(outer([first, last], (0, 2), 3), torch.einsum("ka,kc->kac", first, last).unsqueeze(2))
