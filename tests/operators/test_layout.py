"""Regions and layouts read and write what plain indexing does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.operators import BlockDiagonal, Diagonal, Layout, Region
from curvlib.pytree import Domain
from tests.operators.domain_cases import Piece, cuts, domains, flat, layouts, piece
from tests.operators.operator_cases import generator, moderately

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@st.composite
def views(draw: Callable, shape: tuple[int, ...]) -> Piece:
    """A chain of slices, permutations, splits and selections of a leaf of element numbers."""
    leaf = torch.arange(math.prod(shape)).reshape(shape)
    seen = leaf
    for _ in range(draw(st.integers(0, 3))):
        axis = draw(st.integers(0, seen.ndim - 1)) if seen.ndim else 0
        match draw(st.sampled_from(["slice", "permute", "select", "split"])) if seen.ndim else "none":
            case "slice":
                start = draw(st.integers(0, seen.shape[axis] - 1))
                seen = seen.narrow(axis, start, draw(st.integers(1, seen.shape[axis] - start)))
            case "permute":
                seen = seen.permute(draw(st.permutations(range(seen.ndim))))
            case "select" if seen.ndim > 1:
                seen = seen.select(axis, draw(st.integers(0, seen.shape[axis] - 1)))
            case "split":
                parts = draw(st.sampled_from([k for k in (1, 2, 3, 4) if seen.shape[axis] % k == 0]))
                seen = seen.unflatten(axis, (parts, -1))
    return piece(0, leaf, lambda _: seen)


@moderately
@given(shape=shapes, data=st.data())
def test_reading_a_region_is_taking_the_view(shape: tuple[int, ...], data: st.DataObject) -> None:
    view = data.draw(views(shape))
    leaf = torch.randn(shape, generator=generator(0))
    assert torch.equal(view.region.read(leaf), leaf.reshape(-1)[view.numbers])
    assert view.region.shape == tuple(view.numbers.shape)
    assert view.region.numel == view.numbers.numel()
    assert view.region.is_whole == (view.numbers.numel() == leaf.numel())
    assert view.region.offset == int(view.numbers.min())


@moderately
@given(shape=shapes, data=st.data())
def test_scattering_a_region_sets_the_elements_it_reads_and_no_others(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    view = data.draw(views(shape))
    values = torch.randn(view.region.shape, generator=generator(0))
    expected = torch.zeros(math.prod(shape))
    expected[view.numbers.reshape(-1)] = values.reshape(-1)
    assert torch.equal(view.region.scatter(values), expected.reshape(shape))


@moderately
@given(shape=shapes, front=st.lists(st.integers(1, 3), max_size=2), data=st.data())
def test_regions_act_on_every_one_of_stacked_leaves(
    shape: tuple[int, ...], front: list[int], data: st.DataObject
) -> None:
    region = data.draw(views(shape)).region
    stack = torch.randn(*front, *shape, generator=generator(0))
    read = region.read(stack)
    written = region.scatter(read)
    assert read.shape == (*front, *region.shape)
    assert written.shape == stack.shape
    for at in itertools.product(*map(range, front)):
        assert torch.equal(read[at], region.read(stack[at]))
        assert torch.equal(written[at], region.scatter(read[at]))


@moderately
@given(shape=shapes, data=st.data())
def test_reading_and_scattering_are_transposes_under_transforms_too(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    region = data.draw(views(shape)).region
    leaf, values = (torch.randn(s, generator=generator(0)) for s in (shape, region.shape))
    _, pull = torch.func.vjp(region.read, leaf)
    assert torch.equal(pull(values)[0], region.scatter(values))
    stack = torch.stack([leaf, 2 * leaf])
    assert torch.equal(torch.func.vmap(region.read)(stack), region.read(stack))


@moderately
@given(shape=st.lists(st.integers(1, 3), min_size=2, max_size=4).map(tuple), data=st.data())
def test_transposed_and_permuted_regions_read_transposed_and_permuted_tensors(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    region, leaf = Region.whole(0, shape), numbered(shape)
    axes = data.draw(st.permutations(range(len(shape))))
    assert torch.equal(region.transposed().read(leaf), leaf.mT)
    assert torch.equal(region.permute(*axes).read(leaf), leaf.permute(axes))
    assert torch.equal(region.transposed().transposed().read(leaf), leaf)
    rows = region.reshape(shape[0], region.numel // shape[0])
    assert torch.equal(rows.read(leaf), leaf.reshape(shape[0], -1))
    assert torch.equal(rows.transposed().read(leaf), leaf.reshape(shape[0], -1).mT)
    assert torch.equal(rows.transposed().scatter(rows.transposed().read(leaf)), leaf)


@moderately
@given(shape=shapes, data=st.data())
def test_equal_selections_are_recognised(shape: tuple[int, ...], data: st.DataObject) -> None:
    first, second = data.draw(views(shape)), data.draw(views(shape))
    same = torch.equal(first.numbers.reshape(-1).sort()[0], second.numbers.reshape(-1).sort()[0])
    assert (first.region.elements == second.region.elements) == same
    equal = first.numbers.shape == second.numbers.shape and torch.equal(first.numbers, second.numbers)
    assert (first.region.sequence == second.region.sequence) == equal


def test_a_scalar_leaf_is_read_and_scattered() -> None:
    leaf = torch.tensor(2.0, dtype=torch.float64)
    for region in (Region.whole(0, ()), Region.strided(0, (), 0, (), ())):
        assert torch.equal(region.read(leaf), leaf)
        assert torch.equal(region.scatter(leaf), leaf)
        assert torch.equal(region.reshape(1).read(leaf), leaf.reshape(1))
    curv = BlockDiagonal(
        {"scale": Diagonal(torch.tensor([3.0], dtype=torch.float64))},
        (("scale", Layout((Region.whole(0, ()).reshape(1),))),),
        Domain.of({"scale": leaf}),
    )
    product = curv @ {"scale": leaf}
    assert torch.equal(product["scale"], torch.tensor(6.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "view",
    [lambda x: x.diagonal(), lambda x: x.unfold(1, 2, 1), lambda x: x.reshape(-1).as_strided((2, 3), (5, 1), 2)],
    ids=["diagonal", "overlapping windows", "rows that wrap"],
)
def test_views_that_are_no_rectangular_selection_are_refused(view: Callable[[Tensor], Tensor]) -> None:
    seen = view(torch.arange(16).reshape(4, 4))
    with pytest.raises(CaptureError, match=r"shape \(4, 4\) is not a rectangular selection .*; use slices, chunks"):
        Region.strided(0, (4, 4), seen.storage_offset(), seen.size(), seen.stride())


def test_impossible_reshapes_are_refused() -> None:
    region = Region.whole(0, (2, 6))
    with pytest.raises(ValueError, match="a region of 12 elements cannot take the shape"):
        region.reshape(5, 2)
    with pytest.raises(ValueError, match="only before it is reshaped"):
        region.reshape(3, 4).permute(1, 0)
    with pytest.raises(CaptureError, match="cannot be transposed"):
        region.reshape(3, 4).transposed()


@moderately
@given(domain=domains(), data=st.data())
def test_cuts_of_a_leaf_hold_every_element_once(domain: object, data: st.DataObject) -> None:
    leaf = domain.numbers[0]
    found = torch.cat([cut.numbers.reshape(-1) for cut in data.draw(cuts(0, leaf))])
    assert torch.equal(found.sort()[0], torch.arange(leaf.numel()))


@moderately
@given(domain=domains(), data=st.data())
def test_gathering_a_layout_is_plain_indexing_and_scattering_puts_it_back(domain: object, data: st.DataObject) -> None:
    vector = torch.randn(2, domain.size, generator=generator(1))
    sizes = [n.numel() for n in domain.numbers]
    parts = zip(vector.split(sizes, 1), domain.numbers, strict=True)
    leaves = [part.reshape(2, *n.shape) for part, n in parts]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for layout, numbers in data.draw(layouts(domain)).values():
        gathered = layout.gather(leaves)
        assert torch.equal(gathered, vector[:, numbers])
        assert layout.shape == tuple(numbers.shape)
        assert layout.numel == numbers.numel()
        assert torch.equal(layout.gather(dict(enumerate(leaves))), gathered)
        contributions = layout.scatter(gathered)
        assert set(contributions) == {region.leaf for region in layout.pieces}
        for i, contribution in contributions.items():
            total[i] = total[i] + contribution
    assert torch.equal(flat(total, stacked=True), vector)  # every element in exactly one block


def test_a_bias_is_the_last_column_of_its_block() -> None:
    bias, weight = torch.tensor([7.0, 8.0]), numbered((2, 3)).float()
    layout = Layout((Region.whole(1, (2, 3)), Region.whole(0, (2,)).reshape(2, 1)))
    assert torch.equal(layout.gather([bias, weight]), torch.cat([weight, bias[:, None]], 1))
    assert layout.shape == (2, 4)
