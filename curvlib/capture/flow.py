"""What happens to the axis of examples, and to the storages a model must not write to, operation by operation.

In the run that finds out about a model the number of examples is a prime that divides no other size. An operation
that takes the axis away, normalizes along it or moves entries along it makes examples depend on each other, unless
what it makes never reaches the output. Rows that are chosen by values, whose number is another prime, count as
examples too: each belongs to one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from curvlib import containers
from curvlib.capture.aliases import storage, tensors_in
from curvlib.capture.choices import MASKS
from curvlib.capture.examples import Examples
from curvlib.capture.operations import (
    CUTTING,
    INDEXING,
    REARRANGING,
    RESHAPING,
    SOLUTIONS,
    along,
    bound,
    dimensions,
    is_range,
    operation,
    strided_within,
)
from curvlib.errors import CaptureError

MANY_PIECES = 64
WRONGLY_MAPPED = ("_cdist_forward", "_euclidean_dist", "_pdist_forward")  # by torch.func.vmap of their vjp, torch 2.13
FILLING = ("masked_scatter", "masked_scatter_")


@dataclasses.dataclass(frozen=True)
class Content:
    """What a tensor that depends on the inputs holds.

    Attributes:
        mixed: what made its entries depend on several examples at once; None: each belongs to one example.
        behind: entries an example has behind each other on the axis of examples. It is all of them if they lie
            together (example-major), and 1 for batches in a row.
        scattered: the operation after which those of an example do not lie together any more.
        given: it depends on no input: the axis of examples was given to it.
    """

    mixed: str | None
    behind: int
    scattered: str | None = None
    given: bool = False


class ExpansionError(Exception):
    """A site's output cannot be given an axis of examples."""


class Flow:
    """Follows what depends on the inputs through a run of a model.

    Attributes:
        examples: which axes count examples.
        writes_inputs: whether the model changes its inputs in place.
        unbatched: whether there are operations whose backward pass torch maps over vectors wrongly.
    """

    def __init__(self, examples: Examples, parameters: dict[int, str]) -> None:
        self.examples = examples
        self.parameters = parameters  # names by storage
        self.writes_inputs = False
        self.unbatched = False
        self.inputs: set[int] = set()  # storages
        self.contents: dict[int, tuple[Tensor, Content]] = {}  # by identity; tensors are kept alive
        self.written: dict[int, Content] = {}  # by storage
        self.ranges: dict[int, Tensor] = {}  # 0, 1, ..., N - 1, in any shape
        self.taken: dict[tuple[str, int], set[int]] = {}  # by operation and storage: where examples were taken out
        self.axes: dict[int, int | None] = {}  # by identity, of the tensors of one operation

    def start(self, inputs: Any) -> None:
        """Makes the inputs known."""
        self.axes.clear()
        for tensor in containers.tensors_in(inputs):
            self.inputs.add(storage(tensor))
            if self.axis(tensor) is not None:
                self.hold(tensor, Content(None, self.multiple(tensor)))

    def targets(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors that an operation writes to.

        Raises:
            CaptureError: one of them is a parameter; names it.
        """
        if not func._schema.is_mutable:
            return []
        found = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                found += tensors_in(args[place] if place < len(args) else kwargs.get(argument.name))
        for tensor in found:
            if storage(tensor) in self.parameters:
                raise self.writes(operation(func), tensor)
            self.writes_inputs |= storage(tensor) in self.inputs
        return found

    def writes(self, name: str, parameter: Tensor) -> CaptureError:
        """The error for a call that changes a parameter."""
        return CaptureError(
            f"{name!r} changes parameter {self.parameters[storage(parameter)]!r} in place, and model_fn must be pure: "
            "change it outside of model_fn (for an embedding: max_norm=None, and renormalize its rows before)"
        )

    # --- contents --------------------------------------------------------------------------------------------------

    def content(self, tensor: Tensor) -> Content | None:
        """What a tensor is known to hold; None: nothing that depends on the inputs."""
        written = self.written.get(storage(tensor)) if self.written else None
        if written is not None and written.mixed is not None:
            return written
        held = self.contents.get(id(tensor))
        return written if held is None else held[1]

    def hold(self, tensor: Tensor, content: Content) -> None:
        self.contents[id(tensor)] = tensor, content

    def axis(self, tensor: Tensor) -> int | None:
        """The axis that counts examples, or rows chosen by values."""
        key = id(tensor)
        if key not in self.axes:
            axis = self.examples.axis(tensor) if self.examples.marked else None
            self.axes[key] = self.examples.chosen_axis(tensor) if axis is None else axis
        return self.axes[key]

    def prime(self, tensor: Tensor, axis: int) -> int:
        """The number of examples, or of rows chosen by values, that an axis counts."""
        chosen, number = self.examples.chosen, self.examples.number
        return number if chosen is None or tensor.shape[axis] % number == 0 else chosen

    def multiple(self, tensor: Tensor) -> int:
        """How many entries the axis of examples has for each example."""
        axis = self.axis(tensor)
        if axis is None:
            return 1
        size, prime = int(tensor.shape[axis]), self.examples.number
        return size // prime if size and size % prime == 0 else 1

    def scattered(self, tensor: Tensor) -> str | None:
        """The operation after which the entries of one example do not lie together any more."""
        self.axes.clear()  # shapes may have changed in place
        content = self.content(tensor)
        return None if content is None or content.behind == self.multiple(tensor) else content.scattered

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any, targets: list[Tensor]) -> None:
        """Finds out what the results of an operation hold."""
        if not self.examples.marked:
            return
        self.axes.clear()  # shapes may have changed in place
        operands, outputs = tensors_in((args, tuple(kwargs.values()))), tensors_in(result)
        found = [(x, content) for x in operands if (content := self.content(x)) is not None]
        name = operation(func)
        self.unbatched |= name in WRONGLY_MAPPED
        if name in CUTTING:
            self.notice_loop(name, bound(func, args, kwargs), operands[0], outputs)
        if not found:
            known = any(id(x) in self.ranges or self.is_written_range(x) for x in operands)
            if is_range(name, func, args, kwargs, self.examples.number) or (known and name in REARRANGING | RESHAPING):
                self.ranges.update({id(x): x for x in outputs})
            return
        if name.endswith("_like") or name.startswith("new_"):
            return
        arguments = bound(func, args, kwargs)
        mixed = next((content.mixed for _, content in found if content.mixed is not None), None)
        if mixed is None:
            mixed = self.mixing(name, arguments, [x for x, _ in found], outputs)
        given = all(content.given for _, content in found)
        if given and mixed is not None:
            raise ExpansionError(f"{mixed} that was given to a parameter")
        for output in outputs:
            behind = self.behind(name, arguments, found, output)
            if mixed is None and behind == 0 and name in RESHAPING:
                mixed = f"{name!r} joins entries of several examples"
            scattered = None
            if behind != self.multiple(output):
                scattered = next((content.scattered for _, content in found if content.scattered is not None), name)
            self.hold(output, Content(mixed, behind, scattered, given))
        for target in targets:
            key = storage(target)
            if self.written.get(key, Content(None, 1)).mixed is None:
                self.written[key] = Content(mixed, self.multiple(target), given=given)

    def behind(
        self, name: str, arguments: dict[str, Any], found: Sequence[tuple[Tensor, Content]], output: Tensor
    ) -> int:
        """How many entries an example has behind each other on the output's axis of examples; 0: in other places."""
        whole, axis = self.multiple(output), self.axis(output)
        operand, content = found[0]
        if axis is None:
            return whole
        if name in RESHAPING:
            stride = content.behind * math.prod(operand.shape[(self.axis(operand) or 0) + 1 :])
            inner = math.prod(output.shape[axis + 1 :])
            return stride // inner if inner and stride % inner == 0 and whole * inner >= stride else 0
        if whole == 1:
            return 1
        joined = name == "cat" and axis in dimensions(arguments, output.ndim)
        if joined or (name == "repeat" and whole != self.multiple(operand)):
            return 1 if all(c.behind == 1 for _, c in found) else 0
        return next((c.behind for x, c in found if self.multiple(x) == whole and c.behind != whole), whole)

    # --- which operations mix examples -------------------------------------------------------------------------------

    def mixing(self, name: str, arguments: dict[str, Any], operands: list[Tensor], outputs: list[Tensor]) -> str | None:
        """What an operation does to the axis of examples that makes them depend on each other, in words."""
        axes = [(x, axis) for x in operands if (axis := self.axis(x)) is not None]
        for operand, axis in axes:
            if name in CUTTING:
                return self.cutting(name, arguments, operand, axis, outputs)
            if name in INDEXING and self.moves(arguments):
                return f"{name!r} moves entries from example to example"
            if name == "as_strided" and not strided_within(operand, axis, outputs[0]):
                return f"{name!r} moves entries from example to example"
            if name in FILLING and self.examples.chosen_axis(arguments["source"]) is None:
                return f"{name!r} moves entries from example to example"
            if name not in INDEXING and along(name, arguments, operand, axis, self.prime(operand, axis)):
                return f"{name!r} works along the axis of examples"
        whole = name in SOLUTIONS or name.startswith("_scaled_dot_product")  # other results are not for the model
        for output in outputs[:1] if whole else outputs:
            if self.axis(output) is None and output.numel():
                return f"{name!r} takes the axis of examples away"
            if self.pairs(output) and not any(self.pairs(x) for x in operands):
                return f"{name!r} combines each example with every other"
        return None

    def pairs(self, tensor: Tensor) -> bool:
        """Whether two axes count examples."""
        prime = self.examples.number
        return len([n for n in tensor.shape if n and n % prime == 0]) > 1

    def cutting(
        self, name: str, arguments: dict[str, Any], operand: Tensor, axis: int, outputs: list[Tensor]
    ) -> str | None:
        """`mixing` of slices, entries and pieces."""
        if axis not in dimensions(arguments, operand.ndim):
            return None
        whole_batches = self.contents_in_rows(operand) and all(
            self.axis(x) == axis and int(arguments.get("start") or 0) % self.examples.number == 0 for x in outputs
        )
        uncut = all(x.shape[axis : axis + 1] == operand.shape[axis : axis + 1] for x in outputs)
        return None if uncut or whole_batches else f"{name!r} takes some of the examples"

    def notice_loop(self, name: str, arguments: dict[str, Any], operand: Tensor, outputs: list[Tensor]) -> None:
        """Notices early where a model goes through its examples in a loop.

        Raises:
            CaptureError: it takes out a third one by its number, or cuts them in many pieces.
        """
        axis = self.axis(operand)
        if axis is None or axis not in dimensions(arguments, operand.ndim):
            return
        taken = self.taken.setdefault((name, storage(operand)), set())
        if name in ("select", "slice"):
            whole = outputs[0].ndim == operand.ndim and outputs[0].shape == operand.shape
            taken |= set() if whole else {int(arguments.get("index", arguments.get("start")) or 0)}
        if len(taken) > (2 if name == "select" else MANY_PIECES) or len(outputs) > MANY_PIECES:
            raise CaptureError(
                f"the model goes through the first axis of its inputs piece by piece ({name!r}), and that axis counts "
                "the examples: write it for all examples at once; if the first axis is another one (time, layers), "
                "give model_fn inputs with the examples in front and transpose inside"
            )

    def contents_in_rows(self, tensor: Tensor) -> bool:
        """Whether the axis of examples holds several batches in a row, so that it can be cut between them."""
        content = self.content(tensor)
        return content is not None and content.behind == 1 < self.multiple(tensor)

    def moves(self, arguments: dict[str, Any]) -> bool:
        """Whether an index chooses along the axis of examples, other than for each example its own entries."""
        indexed = arguments["self"]
        axis = self.axis(indexed)
        if "indices" in arguments:
            indices = list(arguments["indices"])
            index = indices[axis] if axis is not None and axis < len(indices) else None
            return index is not None and not self.is_own(index)
        return int(arguments["dim"]) % indexed.ndim == axis and not self.is_own(arguments["index"])

    def is_written_range(self, tensor: Tensor) -> bool:
        """Whether a tensor was made of the numbers 0, 1, ..., N - 1 by a list."""
        number = self.examples.number
        if isinstance(tensor, FakeTensor) or tensor.numel() != number or tensor.is_floating_point():
            return False
        with unset_fake_temporarily():
            return bool((tensor.flatten() == torch.arange(number, device=tensor.device)).all())

    def is_own(self, index: Tensor) -> bool:
        """Whether an index along the axis of examples is 0, 1, ..., N - 1, or finds rows chosen by values."""
        return id(index) in self.ranges or index.dtype in MASKS or self.examples.chosen_axis(index) is not None


class FakeRun(FakeTensorMode):
    """Fake tensors whose operations are followed."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most of what is asked
            return torch.device("meta") if self.in_kernel_invocation else args[0].fake_device
        kwargs = kwargs or {}
        targets = self.flow.targets(func, args, kwargs)
        result = self.dispatch(func, types, args, kwargs)
        self.flow.follow(func, args, kwargs, result, targets)
        return result


class RealRun(TorchDispatchMode):
    """Real tensors of which it is noticed what is written to."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.flow.targets(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
