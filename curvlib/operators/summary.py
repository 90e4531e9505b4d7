"""Operators in a few lines of text: kinds, blocks, shapes, dtypes and bytes, never numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvlib.operators.base import Operator
from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.sums import Sum
from curvlib.pytree import Domain, flatten
from curvlib.tables import amount, table


def summary(operator: Operator) -> str:
    """One line for an operator on one tensor, or a table of blocks.

    Example:
        >>> import torch
        >>> from curvlib.operators import Dense
        >>> Kronecker(Dense(torch.eye(2)), Dense(torch.eye(3)))
        Kronecker(Dense, Dense) on (2, 3), float32, 52 B
    """
    tensors = flatten(operator)[0]
    if not all(isinstance(x, Tensor) for x in tensors):  # a pytree of something else than tensors
        return f"{kind(operator)} of {len(tensors)} leaves"
    if not isinstance(operator, BlockDiagonal):
        return f"{kind(operator)} on {place(operator.domain)}, {described(operator)}"
    rows = [
        (name, kind(block), str(layout.shape), dtypes(block), amount(size(block)))
        for name, layout, block in operator.items()
    ]
    title = f"BlockDiagonal on {place(operator.domain)}, {described(operator)}"
    return table(title, ("block", "operator", "shape", "dtype", "bytes"), rows)


def tensors_by_block(title: str, domain: Domain, blocks: Mapping[str, tuple[Tensor, ...]]) -> str:
    """A table of the tensors that there are for every block."""
    rows = []
    for name, tensors in blocks.items():
        shapes = " ".join(str(tuple(x.shape)) for x in tensors)
        rows.append((name, shapes, names_of({x.dtype for x in tensors}), amount(size(tensors))))
    title = f"{title} on {place(domain)}, {amount(size(dict(blocks)))}"
    return table(title, ("block", "shapes", "dtype", "bytes"), rows)


def kind(operator: Operator) -> str:
    """The class of an operator, with those of its parts."""
    match operator:
        case Kronecker(left=left, right=right) | EigenKronecker(left=left, right=right):
            parts = [type(left).__name__, type(right).__name__]
        case Sum(terms=terms):
            parts = [kind(term) for term in terms[:3]] + (["..."] if len(terms) > 3 else [])
        case _:
            inside = (value for value in vars(operator).values() if isinstance(value, Operator))
            parts = [] if isinstance(operator, BlockDiagonal) else [kind(part) for part in inside]
    return type(operator).__name__ + (f"({', '.join(parts)})" if parts else "")


def place(domain: Domain) -> str:
    """Where the vectors of an operator live."""
    if len(domain.shapes) == 1:
        return str(domain.shapes[0])
    return f"{domain.size:,} parameters in {len(domain.shapes)} tensors"


def described(operator: Operator) -> str:
    """Dtypes and bytes."""
    return f"{dtypes(operator)}, {amount(size(operator))}"


def dtypes(operator: Operator) -> str:
    """The dtypes of an operator."""
    return names_of(operator.dtypes)


def names_of(found: Any) -> str:
    """Dtypes without the name of the library."""
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def size(tree: Any) -> int:
    """The bytes of the tensors in a pytree."""
    return sum(x.nbytes for x in flatten(tree)[0] if isinstance(x, Tensor))
