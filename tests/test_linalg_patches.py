"""Gram matrices of convolution patches against the patches themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.linalg.patch_gram import patch_gram
from tests.operators.operator_cases import assert_close, generator

Ints = Sequence[int]
often = settings(deadline=None, max_examples=20)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def unfolded(x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    """Patches [N, positions, C * prod(kernel)], one kernel offset after the other."""
    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    lengths = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    columns = []
    for offset in itertools.product(*map(range, kernel)):
        steps = zip(offset, lengths, stride, dilation, strict=True)
        window = tuple(slice(i * d, i * d + (n - 1) * s + 1, s) for i, n, s, d in steps)
        columns.append(x[(slice(None), slice(None), *window)].flatten(2))
    return torch.stack(columns, 2).flatten(1, 2).mT


def check(x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> None:
    rows = unfolded(x, kernel, stride, padding, dilation)
    flat = rows.reshape(-1, rows.shape[-1])
    inner, count = patch_gram(x, kernel, stride, padding, dilation)
    assert int(count) == len(flat)
    assert_close(inner, flat.mT @ flat, 1e-12)
    ones = torch.cat([flat, torch.ones(len(flat), 1, dtype=torch.float64)], 1)
    bordered, count = patch_gram(x, kernel, stride, padding, dilation, augmented=True)
    assert int(count) == len(flat)
    assert_close(bordered, ones.mT @ ones, 1e-12)
    counted = torch.arange(len(x)) % 2 == 0
    kept = ones.reshape(len(x), -1, ones.shape[-1])[::2].flatten(0, 1)
    masked, count = patch_gram(x, kernel, stride, padding, dilation, counted=counted, augmented=True)
    assert int(count) == len(kept)
    assert_close(masked, kept.mT @ kept, 1e-12)


@st.composite
def geometries(draw: object, axes: int, largest: int, *, unit: bool) -> tuple[Tensor, Ints, Ints, Ints, Ints]:
    """An input, and kernel, stride, padding and dilation that leave at least one position."""

    def each(low: int, high: int) -> Ints:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    spatial, kernel = each(1, largest), each(1, 4)
    padding = each(0, 3)
    stride, dilation = ((1,) * axes, (1,) * axes) if unit else (each(1, 3), each(1, 2))
    sizes = zip(spatial, padding, dilation, kernel, strict=True)
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in sizes))
    x = normal(draw(st.integers(1, 3)), draw(st.integers(1, 3)), *spatial, seed=draw(st.integers(0, 99)))
    return x, kernel, stride, padding, dilation


@often
@given(geometry=geometries(2, 7, unit=False))
def test_the_twin_unfolds_as_torch_does(geometry: tuple) -> None:
    x, kernel, stride, padding, dilation = geometry
    expected = F.unfold(x, kernel, dilation, padding, stride).mT
    assert torch.equal(unfolded(*geometry), expected)


@pytest.mark.parametrize("unit", [True, False], ids=["unit steps", "strides and dilations"])
@pytest.mark.parametrize(("axes", "largest"), [(1, 12), (2, 11), (3, 5)])
@often
@given(data=st.data())
def test_patch_gram_is_the_product_of_the_patches(axes: int, largest: int, unit: bool, data: st.DataObject) -> None:
    check(*data.draw(geometries(axes, largest, unit=unit)))


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (1, 3), (4, 1), (2, 3), (3, 2), (5, 4), (5, 5)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0), (0, 3), (4, 4)])
def test_every_kernel_and_padding_of_a_large_image(kernel: Ints, padding: Ints) -> None:
    check(normal(3, 2, 11, 13), kernel, (1, 1), padding, (1, 1))


@pytest.mark.parametrize("size", range(3, 11))
def test_every_image_around_the_size_from_which_differences_are_shared(size: int) -> None:
    for padding in ((0, 0), (1, 1), (0, 2)):
        check(normal(2, 2, size, 9), (3, 3), (1, 1), padding, (1, 1))
        check(normal(2, 2, 9, size), (3, 2), (1, 1), padding, (1, 1))


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (2, 3)])
def test_strides_and_dilations(stride: Ints, dilation: Ints) -> None:
    check(normal(2, 3, 9, 10), (3, 2), stride, (1, 2), dilation)


def test_nobody_counted_is_zero() -> None:
    counted = torch.zeros(2, dtype=torch.bool)
    found, count = patch_gram(normal(2, 2, 8, 8), (3, 3), (1, 1), (1, 1), (1, 1), counted=counted, augmented=True)
    assert int(count) == 0
    assert torch.equal(found, torch.zeros(19, 19, dtype=torch.float64))


def test_what_does_not_count_may_be_undefined() -> None:
    x, counted = normal(2, 1, 8, 8), torch.tensor([True, False])
    x[1] = torch.nan
    found, _ = patch_gram(x, (2, 2), (1, 1), (0, 0), (1, 1), counted=counted, augmented=True)
    expected, _ = patch_gram(x[:1], (2, 2), (1, 1), (0, 0), (1, 1), augmented=True)
    assert_close(found, expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_is_accumulated_in_single(dtype: torch.dtype, stride: int) -> None:
    x = normal(40, 3, 16, 16).to(dtype)
    geometry = (3, 3), (stride, stride), (1, 1), (1, 1)
    rows = unfolded(x.double(), *geometry).flatten(0, 1)
    found, _ = patch_gram(x, *geometry)
    assert found.dtype == torch.float32
    assert_close(found.double(), rows.mT @ rows, 1e-5)


@pytest.mark.parametrize(
    "geometry",
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (0, 1), (1, 2)),
        ((3,), (1,), (1,), (1,)),
        ((2, 1, 2), *[(1, 1, 1)] * 3),
    ],
    ids=["unit steps", "strided", "one axis", "three axes"],
)
def test_gradients_vmap_and_traces_agree_with_the_patches(geometry: tuple) -> None:
    kernel = geometry[0]
    x = normal(2, 2, *(8, 9, 4)[: len(kernel)])
    width = 2 * math.prod(kernel)
    probe = normal(width, width, seed=1)

    def product(y: Tensor) -> Tensor:
        return patch_gram(y, *geometry)[0]

    def plain(y: Tensor) -> Tensor:
        rows = unfolded(y, *geometry).flatten(0, 1)
        return rows.mT @ rows

    expected = torch.func.grad(lambda y: (plain(y) * probe).sum())(x)
    assert_close(torch.func.grad(lambda y: (product(y) * probe).sum())(x), expected, 1e-12)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((product(leaf) * probe).sum(), leaf)
    assert_close(found, expected, 1e-12)
    stacked = torch.stack([x, 2 * x])
    assert_close(torch.func.vmap(product)(stacked), torch.stack([plain(x), 4 * plain(x)]), 1e-12)
    assert_close(make_fx(product)(x)(2 * x), 4 * plain(x), 1e-12)


def test_inputs_may_be_channels_last() -> None:
    x = normal(2, 3, 9, 10).to(memory_format=torch.channels_last)
    check(x, (3, 3), (1, 1), (1, 1), (1, 1))
