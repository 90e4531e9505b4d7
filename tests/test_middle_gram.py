"""D X D^T against plain products, in every form of X, and float32 that the global precision does not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from curvlib.errors import ShapeError
from curvlib.linalg.middle_gram import middle_gram, summed_middle_gram
from curvlib.linalg.polar import polar
from curvlib.linalg.precision import highest_matmul, in_pieces, pieces
from curvlib.linalg.projector_splitting import ksl, rearranged
from curvlib.linalg.rank_one import leading_pair
from curvlib.linalg.roots import inverse_root
from curvlib.linalg.tensor_splitting import hopm
from tests.operators.operator_cases import assert_close, generator

FORMS = ("identity", "diagonal", "symmetric")
every_form = pytest.mark.parametrize("form", FORMS)
few = settings(deadline=None, max_examples=6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def middle_of(form: str, *front: int, size: int) -> tuple[Tensor | None, Tensor]:
    """A middle and the same as a matrix."""
    if form == "identity":
        return None, torch.eye(size, dtype=torch.float64)
    if form == "diagonal":
        diagonal = normal(*front, size, seed=1)
        return diagonal, torch.diag_embed(diagonal)
    matrix = normal(*front, size, size, seed=1)
    return matrix + matrix.mT, matrix + matrix.mT


class Rounding(TorchFunctionMode):
    """A device whose float32 products round their operands to bfloat16, as the setting "medium" allows."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            args = tuple(x.bfloat16().float() if x.dtype == torch.float32 else x for x in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def precision(name: str) -> Iterator[None]:
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@every_form
@few
@given(
    front=st.lists(st.integers(1, 3), max_size=2),
    rows=st.sampled_from([1, 3, 127, 128, 301]),  # around the width from which products are split in panels
    columns=st.integers(1, 6),
)
def test_it_is_the_plain_product(form: str, front: list[int], rows: int, columns: int) -> None:
    gradient = normal(*front, rows, columns)
    middle, matrix = middle_of(form, *front, size=columns)
    found = middle_gram(gradient, middle)
    assert found.shape == (*front, rows, rows)
    assert_close(found, gradient @ matrix @ gradient.mT, 1e-13)
    assert_close(found, found.mT, 1e-13)


@every_form
@few
@given(front=st.lists(st.integers(1, 3), max_size=1), count=st.integers(1, 4), rows=st.sampled_from([1, 5, 130]))
def test_summing_over_observations_is_the_sum_of_the_products(
    form: str, front: list[int], count: int, rows: int
) -> None:
    gradients = normal(*front, count, rows, 3)
    middle, matrix = middle_of(form, *front, size=3)
    expected = (gradients @ matrix.unsqueeze(-3) @ gradients.mT).sum(-3)
    assert_close(summed_middle_gram(gradients, middle), expected, 1e-13)


@every_form
def test_strided_gradients_are_as_good_as_contiguous_ones(form: str) -> None:
    middle, matrix = middle_of(form, size=4)
    gradient = normal(4, 150).mT
    assert not gradient.is_contiguous()
    assert_close(middle_gram(gradient, middle), gradient @ matrix @ gradient.mT, 1e-13)


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_single(form: str, dtype: torch.dtype) -> None:
    gradient = normal(5, 2000).to(dtype)
    middle, matrix = middle_of(form, size=2000)
    middle, matrix = None if middle is None else middle.to(dtype), matrix.to(dtype).double()
    found = middle_gram(gradient, middle)
    assert found.dtype == torch.float32
    assert_close(found.double(), gradient.double() @ matrix @ gradient.double().mT, 1e-5)


@every_form
@pytest.mark.parametrize("rows", [3, 130])
def test_derivatives_vmap_and_traces_are_those_of_the_plain_product(form: str, rows: int) -> None:
    gradient, probe = normal(2, rows, 4), normal(2, rows, rows, seed=2)
    middle, matrix = middle_of(form, 2, size=4)
    expected = torch.func.grad(lambda d: (d @ matrix @ d.mT * probe).sum())(gradient)
    assert_close(torch.func.grad(lambda d: (middle_gram(d, middle) * probe).sum())(gradient), expected, 1e-12)
    leaf = gradient.clone().requires_grad_()
    assert_close(torch.autograd.grad((middle_gram(leaf, middle) * probe).sum(), leaf)[0], expected, 1e-12)
    over = torch.func.vmap(middle_gram, in_dims=(0, None if middle is None else 0))
    assert_close(over(gradient, middle), middle_gram(gradient, middle), 1e-13)
    traced = make_fx(lambda d: middle_gram(d, middle))(gradient)
    assert_close(traced(2 * gradient), 4 * middle_gram(gradient, middle), 1e-13)


def test_arguments_stay_as_they_are() -> None:
    gradient, middle = normal(150, 4), normal(4, 4)
    middle = middle + middle.mT
    before = gradient.clone(), middle.clone()
    middle_gram(gradient, middle)
    summed_middle_gram(gradient.unsqueeze(0), middle)
    assert torch.equal(gradient, before[0])
    assert torch.equal(middle, before[1])


@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 3, 3)])
def test_a_middle_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"\[\*, 3\] or \[\*, 3, 3\]"):
        middle_gram(normal(2, 3), normal(*shape))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def symmetric_root(gradient: Tensor) -> Tensor:
    return inverse_root(gradient @ gradient.mT, 2, damping=0.1)


MUST_BE_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "middle_gram": lambda d: middle_gram(d, torch.ones(d.shape[-1], dtype=d.dtype)),
    "middle_gram with a matrix": lambda d: middle_gram(d, middle_gram(d.mT)),
    "ksl": lambda d: ksl(*leading_pair(d), rearranged(d.roll(1, 0)), 0.9, 0.1)[1],
    "hopm": lambda d: hopm(
        torch.zeros((), dtype=d.dtype), tuple(torch.eye(n, dtype=d.dtype) / n**0.5 for n in (2, 20, 30)),
        d.reshape(2, 20, 30), 0.9, 0.1,
    )[1][1],
    "leading_pair": lambda d: leading_pair(d)[1],
    "eigh": lambda d: inverse_root(covariance(d), 2),
    "coupled-newton": lambda d: inverse_root(covariance(d), 4, method="coupled-newton"),
    "newton-schulz": lambda d: inverse_root(covariance(d), 4, method="newton-schulz"),
}  # fmt: skip


def covariance(gradient: Tensor) -> Tensor:
    """Well conditioned, and the same in both dtypes: the product is one of float64, which no setting rounds."""
    exact = gradient.double() / gradient.double().norm()
    return (exact @ exact.mT + torch.eye(len(exact), dtype=torch.float64) / 10).to(gradient.dtype)


@pytest.mark.parametrize("name", MUST_BE_EXACT)
@pytest.mark.parametrize("setting", ["high", "medium"])
def test_float32_factors_and_roots_ignore_the_global_precision(name: str, setting: str) -> None:
    gradient, function = normal(40, 30).float(), MUST_BE_EXACT[name]
    expected = function(gradient.double())
    with precision(setting), Rounding():
        found = function(gradient)
        rounded = relative(gradient @ gradient.mT, gradient.double() @ gradient.double().mT)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 5e-6 < 1e-3 < rounded
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("shape", [(40, 30), (3, 20, 200), (64, 64)])
def test_the_polar_factor_of_an_update_follows_the_global_precision_and_stays_near(shape: tuple[int, ...]) -> None:
    gradient = normal(*shape).float()
    with precision("medium"), Rounding():
        found = polar(gradient, iterations=8)
        assert relative(found, polar(gradient.double(), iterations=20)) > 1e-3  # it is not worth more products
        singular_values = torch.linalg.svdvals(found)
    assert 0.97 < singular_values.min() <= singular_values.max() < 1.03


@few
@given(seed=st.integers(0, 2**16), exponent=st.integers(-20, 20))
def test_pieces_add_up_exactly_and_survive_rounding_to_bfloat16(seed: int, exponent: int) -> None:
    tensor = normal(5, 7, seed=seed).float() * 2.0**exponent
    parts = pieces(tensor)
    assert torch.equal(parts[0] + parts[1] + parts[2], tensor)
    assert all(torch.equal(part.bfloat16().float(), part) for part in parts)


def test_products_of_pieces_are_float32_products_where_operands_are_rounded() -> None:
    left, right = normal(6, 50, 40).float(), normal(6, 40, 30, seed=1).float()
    expected = left.double() @ right.double()
    with Rounding():
        a, b = in_pieces(left, right)
        assert relative(a @ b, expected) < 5e-7 < 1e-3 < relative(left @ right, expected)


def test_products_of_pieces_have_the_derivative_of_the_product() -> None:
    left, right = normal(3, 4).float(), normal(4, 2, seed=1).float()

    def product(a: Tensor, b: Tensor) -> Tensor:
        a, b = in_pieces(a, b)
        return (a @ b).sum()

    found = torch.func.grad(product, (0, 1))(left, right)
    expected = torch.func.grad(lambda a, b: (a @ b).sum(), (0, 1))(left, right)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other.double()) < 1e-6


def test_compiled_products_follow_the_setting() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(highest_matmul, fullgraph=True, backend="eager")
    left, right = normal(30, 40).float(), normal(40, 20, seed=1).float()
    exact = (left.double() @ right.double()).float()
    assert relative(compiled(left, right), exact.double()) < 1e-6
    with precision("medium"):
        assert torch.equal(compiled(left, right), exact)
