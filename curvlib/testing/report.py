"""How a list of properties is checked, and what is said of those that fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import CurvlibError
from curvlib.pytree import Tree, flatten


@dataclasses.dataclass(frozen=True)
class Report:
    """What was checked.

    Attributes:
        holds: the names of the properties that hold.
        refused: those that the object refuses to be asked for, with the message; a refusal is no failure.

    Example:
        >>> import torch, curvlib as cv
        >>> from curvlib.testing import check_operator
        >>> report = check_operator(cv.Diagonal(torch.tensor([1.0, 2.0], dtype=torch.float64)))
        >>> "power is additive" in report.holds, report.refused
        (True, {})
    """

    holds: tuple[str, ...]
    refused: dict[str, str]

    def __repr__(self) -> str:
        lines = [f"{len(self.holds)} properties hold"]
        return "\n".join([*lines, *(f"refused: {name}: {why}" for name, why in self.refused.items())])


Example = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Property:
    """A property in words, and a function that raises an `AssertionError` where it does not hold.

    Attributes:
        name: what holds, as a sentence.
        check: called with the parts of an example.
        examples: the simplest first.
        simpler: examples that are simpler than one that fails, to be tried in this order.
    """

    name: str
    check: Callable[..., None]
    examples: Sequence[Example] = ((),)
    simpler: Callable[[Example], Iterable[Example]] = lambda example: ()


def check_all(subject: str, properties: Iterable[Property]) -> Report:
    """Checks properties one after another; the first that fails is shown with the smallest example found for it.

    Raises:
        AssertionError: a property does not hold; names it and shows the example.
    """
    holds, refused = [], {}
    for wanted in properties:
        try:
            for example in wanted.examples:
                error = failure(wanted, example)
                if error is not None:
                    raise shrunk(subject, wanted, example, error)
        except CurvlibError as refusal:
            refused[wanted.name] = str(refusal)
        else:
            holds.append(wanted.name)
    return Report(tuple(holds), refused)


def failure(wanted: Property, example: Example) -> AssertionError | None:
    """The error of a property that does not hold for an example."""
    try:
        wanted.check(*example)
    except AssertionError as error:
        return error
    return None


def shrunk(subject: str, wanted: Property, example: Example, error: AssertionError) -> AssertionError:
    """The error for the smallest example that is found from one that fails."""
    searching = True
    while searching:
        searching = False
        for smaller in wanted.simpler(example):
            found = failure(wanted, smaller)
            if found is not None:
                example, error, searching = smaller, found, True
                break
    shown = "".join(f"\n  {part!r}" for part in example)
    return AssertionError(
        f"{subject}: {wanted.name} does not hold: {error}" + (f"\nsmallest example:{shown}" if shown else "")
    )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """||actual - expected|| <= tolerance * max(||expected||, scale).

    Raises:
        AssertionError: it is not; says by how much.
    """
    assert actual.shape == expected.shape, f"the shape is {tuple(actual.shape)}, not {tuple(expected.shape)}"
    size = max(float(expected.norm()), scale)
    error = float((actual - expected).norm())
    assert error <= tolerance * size, (
        f"an error of {error:.1e} where {size:.1e} is expected, got {rounded(actual)} for {rounded(expected)}"
    )


def rounded(tensor: Tensor) -> str:
    """A few numbers of a tensor."""
    few = [float(f"{x:.4g}") for x in tensor.reshape(-1)[:6].tolist()]
    return f"[{', '.join(map(str, few))}{', ...' if tensor.numel() > 6 else ''}]"


def same(actual: Tree, expected: Tree) -> bool:
    """Whether two pytrees hold equal tensors of equal dtypes."""
    (left, one), (right, two) = flatten(actual), flatten(expected)
    return one == two and all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )
