"""Linear maps and the vectors they are applied to: what may stand on either side of ``@``, and in which dtype.

One rule for all operators: a product is computed in the widest of the dtypes of the operator and of the vector's
leaves, and every leaf of the result has the dtype of the vector's leaf. Numbers that a vector decides (`quadratic`) are
in the dtype of the computation, and what comes of the operator alone (`diag`, `trace`, `sample`) is in its own.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvlib.errors import DtypeError, PytreeError, ShapeError
from curvlib.pytree import Tree, flatten, names, tree_map

Params = TypeVar("Params")  # a pytree of tensors: a vector, whose image is of the same type


class LinearMap(ABC):
    """What is applied to vectors with ``@``."""

    @abstractmethod
    def matvec(self, v: Any) -> Any:
        """The image of a vector."""

    @abstractmethod
    def matmat(self, vectors: Any) -> Any:
        """The images of vectors that are stacked along a leading axis of every leaf."""

    @abstractmethod
    def __matmul__(self, v: Any) -> Any:
        """`matvec`."""


def vector_leaves(v: Tree) -> list[Any]:
    """The leaves of what is to be multiplied, if it can be a vector at all.

    Raises:
        PytreeError: a linear map, a module, or something else that is no pytree of tensors.
        DtypeError: a leaf is not of a floating dtype; names it.
    """
    if isinstance(v, Tensor):
        leaves = [v]
    else:
        refuse_other_things(v)
        leaves = flatten(v)[0]
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and not leaf.is_floating_point():
            raise DtypeError(
                f"leaf {names(v)[number]!r} of the vector has dtype {leaf.dtype}; vectors have floating-point leaves: "
                "convert it, .to(torch.float32)"
            )
    return leaves


def refuse_other_things(v: object) -> None:
    """Says what to write in place of what is often written instead of a vector.

    Raises:
        PytreeError: see above.
    """
    kind = type(v).__name__
    match v:
        case LinearMap():
            raise PytreeError(
                f"@ multiplies a vector, but a {kind} is a linear map itself, and products of two are not formed: "
                "apply one after the other, a @ (b @ v), or multiply small ones as matrices, "
                "a.to_dense() @ b.to_dense()"
            )
        case nn.Module():
            raise PytreeError(
                f"@ multiplies a vector like params, but a {kind} is a module: write curv @ params with "
                "model_fn, params = cv.functional(module), or curv @ dict(module.named_parameters())"
            )
        case KeysView() | ValuesView() | ItemsView() | Iterator():
            raise PytreeError(
                f"@ multiplies a vector, a pytree like params, but a {kind} has no structure: give the whole pytree, "
                "params in place of params.values(), dict(module.named_parameters()) in place of module.parameters()"
            )
        case int() | float():
            raise PytreeError(f"@ multiplies a vector, but {v!r} is a number: write {v!r} * curv")


def check_shape(vectors: object, leading: int, shape: tuple[int, ...]) -> None:
    """Refuses what is not a tensor of this shape, with ``leading`` more axes in front.

    Raises:
        PytreeError, ShapeError: it is not.
    """
    if not isinstance(vectors, Tensor):
        raise PytreeError(f"expected one tensor of shape {shape} as the vector, got a {type(vectors).__name__}")
    if tuple(vectors.shape[leading:]) != shape:
        raise ShapeError(f"expected a vector of shape {shape}, got {tuple(vectors.shape[leading:])}")


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the numbers of all of them.

    Example:
        >>> widest([torch.bfloat16, torch.float16]), widest([torch.bfloat16, torch.float64])
        (torch.float32, torch.float64)
    """
    return functools.reduce(torch.promote_types, dtypes)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype that eigenvalues, powers and solutions of systems are computed in: not half precision.

    Example:
        >>> at_least_single(torch.bfloat16), at_least_single(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def floating_dtype(tree: Tree) -> torch.dtype:
    """The widest floating dtype in a pytree of tensors, some of which may be integers."""
    return widest(leaf.dtype for leaf in flatten(tree)[0] if leaf.is_floating_point())


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """A pytree of tensors with its floating ones in this dtype."""
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)
