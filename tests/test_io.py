"""Curvature objects on disk: they come back bit for bit, or an error says why not."""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import curvlib as cv
from curvlib.io import load, save
from curvlib.operators import OrthogonalBasis, sketch
from curvlib.pytree import Domain, flatten, register, registered, static, stored_name
from tests.operators.domain_cases import DomainCase, Pair, domains
from tests.operators.operator_cases import cases, every_kind, generator, moderately

torch.set_num_threads(1)
some = settings(deadline=None, max_examples=20)


@register
class Node:
    """An operator-like node that somebody else registered."""

    value: Any
    label: Any = static(default=None)


@optree.dataclasses.dataclass(namespace="curvlib")
class Box:
    """A container of parameters that is registered with optree."""

    first: Any
    second: Any
    name: str = optree.dataclasses.field(default="", pytree_node=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("io")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return folder / "curv.safetensors"


def again(value: Any, file: Path, **options: Any) -> Any:
    save(value, file)
    return load(file, **options)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    one, two = (x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for x in (a, b))
    assert torch.equal(one, two)


def assert_same(a: Any, b: Any) -> None:
    (leaves, structure), (others, other) = flatten(a), flatten(b)
    assert structure == other
    for one, two in zip(leaves, others, strict=True):
        assert_same_bits(one, two)
        assert one.stride() == two.stride() or not (one.is_contiguous() or one.mT.is_contiguous())


def network() -> tuple[Callable[..., Any], Any, cv.BlockDiagonal]:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
    )
    model_fn, params = cv.functional(module)
    return model_fn, params, cv.kfac(model_fn, params, (torch.randn(8, 2, 4, 4), torch.arange(8) % 3))


# --- what goes in comes out ---------------------------------------------------------------------------------------


@every_kind
@moderately
@given(data=st.data())
def test_operators_come_back_bit_for_bit(kind: str, data: st.DataObject, file: Path) -> None:
    operator = data.draw(cases(kind)).operator
    loaded = again(operator, file)
    assert_same(loaded, operator)
    assert type(loaded) is type(operator)
    assert_same_bits(loaded.to_dense(), operator.to_dense())


def test_kfac_comes_back_with_the_same_dense_matrix_and_inverse(file: Path) -> None:
    _, params, curv = network()
    loaded = again(curv, file)
    assert_same(loaded, curv)
    assert loaded.domain == curv.domain
    assert loaded.parameters == curv.parameters
    assert_same_bits(loaded.to_dense(), curv.to_dense())
    assert_same_bits(loaded.inverse(0.1).to_dense(), curv.inverse(0.1).to_dense())
    damping = cv.FactoredTikhonov(0.1)
    assert_same_bits(cv.ravel(loaded.power(-0.5, damping) @ params), cv.ravel(curv.power(-0.5, damping) @ params))


def test_what_is_derived_from_a_curvature_comes_back_too(file: Path) -> None:
    _, params, curv = network()
    projection = curv.inverse(cv.FactoredTikhonov(0.1)).project(sketch(params, rank=2))
    for value in (curv.inverse(0.1), curv + 2.0 * curv, curv.power(-0.5, 0.1), projection):
        assert_same(again(value, file), value)
    description = sketch(params, rank=3, kind="normal", seed=2**70)
    assert again(description, file) == description
    state = {"step": 3, "curv": curv, "moments": [params, None], "rate": math.pi}
    loaded = again(state, file)
    assert (loaded["step"], loaded["rate"], loaded["moments"][1]) == (3, math.pi, None)
    assert_same(loaded["curv"], curv)
    assert_same(loaded["moments"][0], params)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@some
@given(seed=st.integers(0, 2**31), length=st.integers(0, 5))
def test_every_bit_pattern_of_every_dtype_is_kept(dtype: torch.dtype, seed: int, length: int, file: Path) -> None:
    bits = torch.randint(256, (length * dtype.itemsize,), generator=generator(seed), dtype=torch.uint8)
    value = bits.view(dtype)  # infinities and payloads of NaN among them
    assert_same_bits(again(value, file), value)
    for scalar in value:
        assert_same_bits(again(cv.ScaledIdentity(scalar, (3,)), file).scale, scalar)


@some
@given(data=st.data())
def test_tensors_come_back_however_they_lie_in_memory(data: st.DataObject, file: Path) -> None:
    shape = data.draw(st.lists(st.integers(0, 3), max_size=4))
    base = torch.randn([n + 1 for n in shape], generator=generator(0))
    value = base[tuple(slice(1, None) if data.draw(st.booleans()) else slice(0, n) for n in shape)]
    value = value.permute(data.draw(st.permutations(range(len(shape)))))
    value = value.expand((*data.draw(st.lists(st.integers(1, 3), max_size=2)), *value.shape))
    loaded = again(value, file)
    assert_same_bits(loaded, value)
    windows = torch.arange(5.0).as_strided((3, 3), (1, 1))
    assert_same_bits(again(windows, file), windows)


def test_order_in_memory_is_kept_so_that_products_round_alike(file: Path) -> None:
    transposed = torch.randn(2, 3, 4, generator=generator(0)).mT
    loaded = again(OrthogonalBasis(transposed), file)
    assert loaded.vectors.stride() == transposed.stride()


def test_tensors_that_share_memory_are_stored_once_and_share_it_again(file: Path) -> None:
    matrix = torch.randn(64, 64)
    value = [
        cv.Dense(matrix),
        cv.Kronecker(cv.Dense(matrix), cv.Dense(matrix.mT)),
        cv.Diagonal(matrix[0].expand(99, 64)),
    ]
    loaded = again(value, file)
    assert_same(loaded, value)
    assert len(load_file(file)) == 2  # the matrix, and its first row
    assert loaded[0].matrix is loaded[1].left.matrix
    assert loaded[2].values.stride() == (0, 1)
    overlapping = [matrix[:40], matrix[20:], matrix.view(torch.int32)]
    assert_same(again(overlapping, file), overlapping)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
scalars |= st.sampled_from([torch.float32, torch.bfloat16, torch.Size([2, 3]), Pair(1, (2,))])
statics = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict)
        | st.builds(Pair, inner, inner)
        | st.builds(cv.Tikhonov, st.floats(0, 9))
    ),
    max_leaves=8,
)


@some
@given(label=statics)
def test_static_fields_come_back_with_their_types(label: Any, file: Path) -> None:
    loaded = again(Node(torch.ones(1), label), file)
    assert type(loaded) is Node
    assert repr(loaded.label) == repr(label)  # tells 1, 1.0 and True apart, and keeps the order of keys


def test_numbers_that_json_does_not_have(file: Path) -> None:
    loaded = again([math.inf, -math.inf, math.nan, -0.0, 10**30], file)
    assert str(loaded) == str([math.inf, -math.inf, math.nan, -0.0, 10**30])


@some
@given(case=domains())
def test_domains_come_back_equal(case: DomainCase, file: Path) -> None:
    domain = Domain.of(case.like)
    loaded = again(domain, file)
    assert loaded == domain
    assert hash(loaded) == hash(domain)


def test_structures_of_every_container_come_back(file: Path) -> None:
    one = torch.zeros(1)
    ordered = {"z": OrderedDict(b=one, a=[one, None]), "a": Pair(one, ())}
    for params in (ordered, {3: one, 1: Node(one, "label")}, Box(one, [Pair(one, one)], "b"), [None, one], one):
        structure = Domain.of(params).structure
        loaded = again(structure, file)
        assert loaded == structure
        numbers = list(range(structure.num_leaves))
        assert repr(loaded.unflatten(numbers)) == repr(structure.unflatten(numbers))  # the order of keys too


def test_equal_objects_make_equal_files(folder: Path) -> None:
    _, _, curv = network()
    for name in ("one", "two"):
        save(curv, folder / name)
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()


def test_loaded_tensors_do_not_depend_on_the_file(file: Path) -> None:
    value = cv.Dense(torch.randn(300, 300))
    loaded = again(value, file)
    os.truncate(file, 10)
    assert_same(loaded, value)
    assert not loaded.matrix.requires_grad


def test_load_goes_to_the_cpu_or_where_it_is_told(file: Path) -> None:
    assert again(cv.Dense(nn.Parameter(torch.eye(2))), file).matrix.device.type == "cpu"
    assert load(file, device="meta").matrix.device.type == "meta"
    assert load(file, device=torch.device("cpu")).matrix.device.type == "cpu"


def test_every_class_of_curvlib_has_a_name_of_its_own_in_files() -> None:
    for module in pkgutil.walk_packages(cv.__path__, "curvlib."):
        importlib.import_module(module.name)
    classes = optree.register_pytree_node.get(namespace="curvlib")
    own = [cls for cls in classes if cls.__module__.partition(".")[0] == "curvlib"]
    assert {cv.Dense, cv.BlockDiagonal, OrthogonalBasis} <= set(own)
    for cls in own:
        assert registered[stored_name(cls)] is cls
    assert stored_name(Node) == f"{__name__}:Node"
    assert registered[stored_name(Node)] is Node
