"""Different transformations for different parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlib.optim as optim
from curvlib.errors import ArgumentError, PytreeError
from curvlib.pytree import Tree, names
from tests.optim.optimizers_cases import Layer, assert_close, assert_same, minimised, quadratic


def tree() -> Tree:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {"layer": [leaf(3), Layer([leaf(3, 2), leaf(2)], leaf(2, 2, 2))], "bias": leaf()}


def scales(**factors: float) -> dict[str, optim.GradientTransformation]:
    return {label: optim.scale(factor) for label, factor in factors.items()}


def test_each_leaf_is_treated_by_its_own() -> None:
    transformation = optim.partition(scales(matrix=2.0, rest=3.0), optim.matrices_or_rest)
    updates, _ = transformation.update(tree(), transformation.init(tree()))
    first, layer = tree()["layer"]
    expected = {
        "layer": [3 * first, Layer([2 * layer.weights[0], 3 * layer.weights[1]], 2 * layer.other)],
        "bias": 3 * tree()["bias"],
    }
    assert_same(updates, expected)


def test_a_pytree_of_labels_is_a_function_of_them() -> None:
    labels = {"layer": ["rest", Layer(["matrix", "rest"], "matrix")], "bias": "rest"}
    by_tree = optim.partition(scales(matrix=2.0, rest=3.0), labels)
    by_rule = optim.partition(scales(matrix=2.0, rest=3.0), optim.matrices_or_rest)
    assert_same(by_tree.update(tree(), by_tree.init(tree()))[0], by_rule.update(tree(), by_rule.init(tree()))[0])


def test_a_part_is_a_dictionary_of_its_leaves_by_name() -> None:
    seen: list[Any] = []

    def init(params: Tree) -> optim.Stateless:
        seen.append(params)
        return optim.Stateless()

    def update(grads: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        seen.extend((grads, params))
        return grads, state

    spy = optim.GradientTransformation(init, update)
    transformation = optim.partition(scales(rest=1.0) | {"matrix": spy}, optim.matrices_or_rest)
    params, grads = tree(), torch.utils._pytree.tree_map(torch.neg, tree())
    state = transformation.init(params)
    transformation.update(grads, state, params)
    transformation.update(grads, state)
    assert [part and tuple(part) for part in seen] == [
        ("layer.1.weights.0", "layer.1.other"),
        ("layer.1.weights.0", "layer.1.other"),
        ("layer.1.weights.0", "layer.1.other"),
        ("layer.1.weights.0", "layer.1.other"),
        None,
    ]
    assert seen[0]["layer.1.other"] is params["layer"][1].other
    assert seen[1]["layer.1.other"] is grads["layer"][1].other
    assert seen[2]["layer.1.other"] is params["layer"][1].other


@settings(deadline=None, max_examples=20)
@given(labels=st.lists(st.sampled_from("abc"), min_size=5, max_size=5))
def test_parts_with_the_same_elementwise_optimizer_are_the_whole(labels: list[str]) -> None:
    by_name = dict(zip(names(tree()), labels, strict=True))
    parts = {label: optim.adamw(0.1) for label in "abc"}
    transformation = optim.partition(parts, lambda name, leaf: by_name[name])
    found, state = minimised(transformation, quadratic, tree(), 3)
    expected, _ = minimised(optim.adamw(0.1), quadratic, tree(), 3)
    assert_close(found, expected, 1e-14)
    assert set(state.states) == set(labels)


def test_a_label_without_leaves_is_not_called() -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError

    unused = optim.GradientTransformation(refuse, refuse)
    transformation = optim.partition({"rest": optim.identity(), "matrix": unused}, optim.matrices_or_rest)
    params = {"bias": torch.ones(2)}
    assert_same(transformation.update(params, transformation.init(params))[0], params)


def test_the_labels_are_settled_by_init() -> None:
    calls: list[str] = []

    def labels(name: str, leaf: Tensor) -> str:
        calls.append(name)
        return "rest"

    transformation = optim.partition(scales(rest=1.0), labels)
    state = transformation.init(tree())
    transformation.update(tree(), state)
    assert calls == list(names(tree()))


def test_partitions_nest() -> None:
    inner = optim.partition(scales(long=5.0, short=7.0), lambda name, leaf: "long" if leaf.numel() > 2 else "short")
    transformation = optim.partition(scales(matrix=2.0) | {"rest": inner}, optim.matrices_or_rest)
    grads = {"w": torch.ones(2, 2), "a": torch.ones(3), "b": torch.ones(1)}
    expected = {"w": torch.full((2, 2), 2.0), "a": torch.full((3,), 5.0), "b": torch.full((1,), 7.0)}
    assert_same(transformation.update(grads, transformation.init(grads))[0], expected)


def test_a_label_without_a_transformation_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"'layer.1.weights.0' has the label 'matrix'.*'rest'"):
        optim.partition(scales(rest=1.0), optim.matrices_or_rest).init(tree())


def test_labels_of_another_structure_are_refused() -> None:
    with pytest.raises(PytreeError, match="labels"):
        optim.partition(scales(rest=1.0), {"layer": "rest"}).init(tree())


def test_gradients_of_another_structure_are_refused_by_name() -> None:
    transformation = optim.partition(scales(matrix=2.0, rest=3.0), optim.matrices_or_rest)
    state = transformation.init(tree())
    with pytest.raises(PytreeError, match=r"'bias' is missing, 'offset' is unexpected"):
        transformation.update({"layer": tree()["layer"], "offset": tree()["bias"]}, state)
