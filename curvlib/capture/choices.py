"""Rows chosen by values, on fake tensors: what `nonzero` and its like return where no value is known.

A mixture of experts calls an expert on the tokens that are routed to it. On fake tensors their number is not known:
it is taken to be a prime that divides no other size, so that an axis counts chosen rows exactly if the prime divides
it. Every expert gets rows then, also one that gets none on some batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from curvlib.capture.aliases import tensors_in

NONZERO = {torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.where}
EXISTS = {torch.any, Tensor.any}
COUNT = {torch.sum, Tensor.sum, torch.count_nonzero, Tensor.count_nonzero}
SUMMARIES = EXISTS | COUNT
MASKS = (torch.bool, torch.uint8)


class Choices:
    """Calls functions whose result depends on values, by two rules.

    - a mask over examples, or over rows that are chosen already, chooses ``rows`` rows; other masks choose all;
    - some entry of such a mask is set, and their number is ``rows``.

    Attributes:
        repeated: whether a choice may hold an example more than once.
        guessed: whether values were made up that are not sizes: a branch of the model may have been taken wrongly.
    """

    def __init__(self, examples: int, rows: int) -> None:
        self.primes, self.rows = (examples, rows), rows
        self.repeated = False
        self.guessed = False
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # a fake tensor, which is kept alive, and its value

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a function of torch."""
        tensors = tensors_in((args, kwargs))
        masked = bool(tensors) and self.is_mask(tensors[0])
        if func is Tensor.__getitem__:
            masked = any(self.is_index_mask(part) for part in parts_of(args[1]))
        finds = func in NONZERO and (func is not torch.where or len(args) + len(kwargs) == 1)
        if not masked and tensors and all(id(tensor) in self.known for tensor in tensors):
            return self.evaluate(func, args, kwargs)
        if finds:
            return self.indices(func, tensors[0], args, kwargs)
        if func is Tensor.__getitem__:
            return func(args[0], self.index(args[1]))
        if masked and func in SUMMARIES and len(args) == 1 and not kwargs and not tensors[0].is_floating_point():
            return self.guess(True if func in EXISTS else self.rows)
        if tensors and all(id(tensor) in self.known for tensor in tensors):
            return self.evaluate(func, args, kwargs)
        return func(*args, **kwargs)

    def is_index_mask(self, part: object) -> bool:
        """Whether a part of an index is a mask over examples or chosen rows."""
        return isinstance(part, Tensor) and part.dtype in MASKS and self.is_mask(part)

    def is_mask(self, tensor: Tensor) -> bool:
        """Whether a tensor has an axis of examples or of chosen rows."""
        return any(n and n % prime == 0 for n in tensor.shape for prime in self.primes)

    def indices(self, func: Callable[..., Any], mask: Tensor, args: Any, kwargs: Any) -> Any:
        """What `nonzero` or a kin of it returns for a mask."""
        if self.is_mask(mask):
            found = self.choose(mask)
            return found if func is torch.where or kwargs.get("as_tuple") else torch.stack(found, 1)
        if not isinstance(mask, FakeTensor):
            return self.evaluate(func, args, kwargs)
        self.guessed = True
        with unset_fake_temporarily():
            everything = torch.ones(mask.shape, dtype=torch.bool)
        kept, structure = torch_pytree.tree_flatten((args, kwargs))
        args, kwargs = torch_pytree.tree_unflatten([everything if x is mask else x for x in kept], structure)
        return self.evaluate(func, args, kwargs)

    def choose(self, mask: Tensor) -> tuple[Tensor, ...]:
        """The indices of chosen rows, one tensor an axis of the mask."""
        self.repeated |= mask.numel() not in self.primes
        with unset_fake_temporarily():
            first = torch.zeros(self.rows, dtype=torch.long, device=mask.device)
        return tuple(self.remember(first) for _ in mask.shape)

    def index(self, index: Any) -> Any:
        """The same index without masks, and with numbers for tensors whose value is known."""
        parts: list[Any] = []
        for part in parts_of(index):
            if self.is_index_mask(part):
                parts += self.choose(part)
            elif id(part) in self.known and part.ndim == 0:
                parts.append(self.evaluate(int, (part,), {}))
            else:
                parts.append(part)
        return tuple(parts) if isinstance(index, tuple) or len(parts) != 1 else parts[0]

    def evaluate(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a function on tensors whose values are known."""

        def value(x: Tensor) -> Tensor:
            return self.known[id(x)][1] if id(x) in self.known else x

        with unset_fake_temporarily():
            args, kwargs = torch_pytree.tree_map_only(Tensor, value, (args, kwargs))
            result = func(*args, **kwargs)
        return torch_pytree.tree_map_only(Tensor, self.remember, result)

    def guess(self, value: int) -> Tensor:
        """A value that is made up."""
        self.guessed = True
        with unset_fake_temporarily():
            known = torch.tensor(value)
        return self.remember(known)

    def remember(self, value: Tensor) -> Tensor:
        """A fake tensor whose value is known."""
        fake = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        self.known[id(fake)] = fake, value
        return fake


def parts_of(index: Any) -> tuple[Any, ...]:
    """The parts of an index, one or more an axis."""
    return index if isinstance(index, tuple) else (index,)
