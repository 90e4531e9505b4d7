"""Pytrees: flatten order, names, arithmetic, domains and registered nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlib import pytree
from curvlib.errors import DtypeError, PytreeError, ShapeError
from curvlib.pytree import Domain, ravel, register, static, unravel
from tests.operators.domain_cases import DomainCase, Pair, domains, flat, tree
from tests.operators.operator_cases import generator, moderately


@register
class Node:
    """A node with a child that may be missing, and a label."""

    value: Any
    other: Any
    label: str = static(default="none")


def vector(domain: DomainCase, seed: int = 0) -> Any:
    return tree(torch.randn(domain.size, generator=generator(seed), dtype=torch.float64), domain.like)


@moderately
@given(domains())
def test_ravel_concatenates_the_leaves_in_flatten_order(domain: DomainCase) -> None:
    v = vector(domain)
    assert torch.equal(ravel(v), flat(v))
    leaves, structure = pytree.flatten(v)
    again = pytree.unflatten(structure, leaves)
    assert optree.tree_structure(again) == optree.tree_structure(v)


@moderately
@given(domains())
def test_unravel_is_the_inverse_of_ravel(domain: DomainCase) -> None:
    v = vector(domain)
    again = unravel(ravel(v), domain.like)
    assert optree.tree_structure(again) == optree.tree_structure(v)
    assert all(torch.equal(a, b) for a, b in zip(optree.tree_leaves(again), optree.tree_leaves(v), strict=True))
    numbers = torch.randn(domain.size, generator=generator(1))
    assert torch.equal(ravel(unravel(numbers, v)), numbers)
    assert {leaf.dtype for leaf in optree.tree_leaves(unravel(numbers, v))} == {torch.float32}


def test_dictionary_keys_are_sorted_and_none_is_dropped() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    assert ravel({"z": b, "a": a, "none": None}).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("numbers", [torch.zeros(4), torch.zeros(6), torch.zeros(5, 1), torch.zeros(())])
def test_unravel_refuses_another_size(numbers: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"expected a vector of shape \(5,\), got \("):
        unravel(numbers, [torch.zeros(2), torch.zeros(3)])


def test_ravel_refuses_an_empty_tree() -> None:
    with pytest.raises(PytreeError, match="at least one tensor"):
        ravel({"a": None, "b": []})


@moderately
@given(domain=domains(), factor=st.floats(-3, 3))
def test_tree_arithmetic_is_that_of_the_raveled_vectors(domain: DomainCase, factor: float) -> None:
    a, b = vector(domain, 0), vector(domain, 1)
    assert torch.equal(ravel(pytree.add(a, b)), ravel(a) + ravel(b))
    assert torch.equal(ravel(pytree.subtract(a, b)), ravel(a) - ravel(b))
    assert torch.equal(ravel(pytree.scale(factor, a)), factor * ravel(a))
    torch.testing.assert_close(pytree.inner(a, b), ravel(a) @ ravel(b), rtol=1e-12, atol=1e-13)
    assert torch.equal(ravel(pytree.tree_map(lambda x, y: x * y, a, b)), ravel(a) * ravel(b))


@moderately
@given(domains())
def test_names_are_distinct_and_one_a_leaf(domain: DomainCase) -> None:
    names = pytree.names(domain.like)
    assert len(set(names)) == len(names) == len(domain.numbers)
    assert all(names)


def test_names_are_paths_joined_by_dots() -> None:
    one = torch.zeros(1)
    assert pytree.names({"layer": [one, {"w": one}]}) == ("layer.0", "layer.1.w")
    assert pytree.names(one) == ("params",)
    assert pytree.names({"a.b": one, "c": one}) == ("a.b", "c")
    assert pytree.names(Pair(one, [one])) == ("0", "1.0")


def test_names_that_dots_would_confuse_stay_apart() -> None:
    one = torch.zeros(1)
    names = pytree.names({"a.b": one, "a": {"b": one}})
    assert len(set(names)) == 2


@moderately
@given(domains())
def test_a_domain_accepts_its_vectors_and_gives_them_back(domain: DomainCase) -> None:
    of = Domain.of(domain.like)
    v = vector(domain)
    assert of.names == pytree.names(v)
    assert of.shapes == tuple(tuple(n.shape) for n in domain.numbers)
    assert of == Domain.of(v)
    assert hash(of) == hash(Domain.of(v))
    leaves = of.leaves(v)
    assert optree.tree_structure(of.tree(leaves)) == optree.tree_structure(v)
    stacked = pytree.tree_map(lambda x: torch.stack([x, x]), v)
    assert [tuple(x.shape[1:]) for x in of.leaves(stacked, 1)] == list(of.shapes)
    with pytest.raises(ShapeError):
        of.leaves(stacked)


def test_a_domain_names_the_leaf_that_it_refuses() -> None:
    of = Domain.of({"a": torch.zeros(2), "b": [torch.zeros(3)]})
    with pytest.raises(ShapeError, match=r"leaf 'b\.0' should have shape \(3,\), got \(2,\)"):
        of.leaves({"a": torch.zeros(2), "b": [torch.zeros(2)]})
    with pytest.raises(PytreeError, match=r"'b\.0' is missing, 'c' is unexpected"):
        of.leaves({"a": torch.zeros(2), "c": torch.zeros(3)})


def test_domains_are_made_of_floating_point_tensors() -> None:
    with pytest.raises(DtypeError, match=r"parameter 'b' has dtype torch\.int64"):
        Domain.of({"a": torch.zeros(2), "b": torch.arange(3)})
    with pytest.raises(PytreeError, match="parameter 'b' is a str, not a tensor"):
        Domain.of({"a": torch.zeros(2), "b": "text"})
    with pytest.raises(PytreeError, match="no leaf"):
        Domain.of({})


# --- registered nodes ---------------------------------------------------------------------------------------------


def node() -> Node:
    return Node({"b": torch.ones(1), "a": torch.zeros(2)}, None, "x")


def test_registered_nodes_are_frozen_dataclasses() -> None:
    assert dataclasses.is_dataclass(Node)
    one = node()
    for name in ("value", "label", "new"):
        with pytest.raises(AttributeError):
            setattr(one, name, 1)
    assert one != node()  # tensors have no truth value: equality is identity
    assert one == one
    assert hash(one) == hash(one)


def test_registered_nodes_survive_both_libraries() -> None:
    one = node()
    leaves, structure = pytree.flatten(one)
    first = pytree.unflatten(structure, leaves)
    torch_leaves, torch_structure = torch_pytree.tree_flatten(one)
    second = torch_pytree.tree_unflatten(torch_leaves, torch_structure)
    for copy in (first, second):
        assert type(copy) is Node
        assert (copy.other, copy.label) == (None, "x")
        assert copy.value["b"] is one.value["b"]
    assert {id(x) for x in leaves} == {id(x) for x in torch_leaves}


def test_a_missing_child_and_a_label_are_part_of_the_structure() -> None:
    full, half = Node(torch.ones(1), torch.ones(1)), Node(torch.ones(1), None)
    for structure in (lambda n: pytree.flatten(n)[1], torch_pytree.tree_structure):
        assert structure(full) != structure(half)
        assert structure(half) == structure(Node(torch.zeros(1), None))
        assert structure(half) != structure(Node(torch.ones(1), None, "another"))


def test_paths_are_field_names() -> None:
    one = node()
    assert pytree.names(one) == ("value.a", "value.b")
    keys = [torch_pytree.keystr(path) for path, _ in torch_pytree.tree_flatten_with_path(one)[0]]
    assert sorted(keys) == [".value['a']", ".value['b']"]


def test_registered_nodes_pass_through_transforms() -> None:
    one = Node(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), "x")
    gradient = torch.func.grad(lambda n: (n.value * n.other).sum())(one)
    assert type(gradient) is Node
    assert gradient.label == "x"
    assert torch.equal(gradient.value, one.other)
    mapped = torch.func.vmap(lambda n: Node(n.value + n.other, None, n.label))(one)
    assert torch.equal(mapped.value, torch.tensor([4.0, 6.0]))


def test_rebuilding_a_node_does_not_run_its_constructor() -> None:
    @register
    class Positive:
        value: Any

        def __post_init__(self) -> None:
            if not isinstance(self.value, Tensor):
                raise TypeError("not a tensor")

    leaves, structure = pytree.flatten(Positive(torch.ones(1)))
    assert pytree.unflatten(structure, [object]).value is object
    assert len(leaves) == 1
    with pytest.raises(TypeError):
        Positive(1)
