"""Discovery: run the model once on fake tensors and find every use of every parameter.

A parameter is known by its storage, which all its views share; a copy to another dtype or memory format is
followed too. The number of examples is replaced by a prime that divides no other size: an axis counts examples
exactly if the prime divides it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlib.capture.plan import Site, Size
from curvlib.errors import CaptureError
from curvlib.layers import REWRITES, TABLE
from curvlib.layers.contraction import Contraction
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.table import Entry, Inspection
from curvlib.operators.layout import Region
from curvlib.pytree import Domain

COPIES = {
    torch.clone, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half,
    Tensor.bfloat16, Tensor.type_as, Tensor.cpu, Tensor.cuda,
}  # fmt: skip
RESHAPES = {
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.flatten,
    torch.flatten,
    Tensor.view_as,
    Tensor.reshape_as,
}
LIKE = {
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like,
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Examples:
    """How many examples the tensors of a run stand for, and which axis of a tensor counts them.

    ``marked``: the number is a prime that divides no other size. Otherwise an axis is taken to count examples if
    it is the first and has as many entries.
    """

    number: int
    marked: bool

    def axis(self, tensor: Tensor) -> int | None:
        """The axis that counts examples."""
        if self.marked:
            return next((i for i, n in enumerate(tensor.shape) if n and n % self.number == 0), None)
        return 0 if tensor.ndim and tensor.shape[0] == self.number else None

    def sizes(self, tensor: Tensor) -> tuple[Size, ...]:
        """The shape, with the number of examples left open."""
        axis = self.axis(tensor)
        return tuple((n // self.number, True) if i == axis else (n, False) for i, n in enumerate(tensor.shape))


@dataclasses.dataclass(frozen=True)
class Alias:
    """A storage that holds elements of a leaf, and where in the leaf its elements lie.

    Attributes:
        leaf: number of the leaf.
        root: the tensor that was made with the storage, and keeps it alive so that its address stays unique.
        offset: the place in the leaf of the root's first element.
        strides: the leaf's steps along the root's axes; None if they are the root's own.
    """

    leaf: int
    root: Tensor
    offset: int
    strides: tuple[int, ...] | None = None

    def place(self, view: Tensor) -> tuple[int, tuple[int, ...]] | None:
        """Offset and strides in the leaf of a view of the storage, or None if its axes mix those of the root."""
        start = int(view.storage_offset()) - int(self.root.storage_offset())
        if self.strides is None:
            return self.offset + start, tuple(map(int, view.stride()))
        axes = [axis for axis in zip(self.root.stride(), self.root.shape, self.strides, strict=True) if axis[1] > 1]
        position = {step: start // step % size for step, size, _ in axes}
        strides = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            fitting = [
                leaf_step * (stride // step)
                for step, length, leaf_step in axes
                if stride % step == 0 and position[step] + (size - 1) * (stride // step) < length
            ]
            if size > 1 and not fitting:
                return None
            strides.append(fitting[0] if size > 1 else 0)
        return self.offset + sum(position[step] * leaf_step for step, _, leaf_step in axes), tuple(strides)


@dataclasses.dataclass
class Product:
    """The output z of a linear layer without bias, and the sums z + b that may turn out to be its bias."""

    output: Tensor
    site: int
    readers: int = 0
    shift: int | None = None


class ExpansionError(Exception):
    """A site's output cannot be given an axis of examples."""


class Discover(TorchFunctionMode):
    """Records what every known call does with the parameters; a use by any other call is an error.

    Args:
        domain: the parameters' names and shapes.
        originals: the parameters, in the order of the domain.
        examples: the number of examples.
        expand: give the outputs of sites that have no axis of examples one.
    """

    def __init__(self, domain: Domain, originals: list[Tensor], examples: Examples, *, expand: bool) -> None:
        super().__init__()
        self.domain = domain
        self.examples = examples
        self.expand = expand
        self.expanded: dict[int, Tensor] = {}  # by storage
        self.originals = originals
        self.aliases: dict[int, Alias] = {}
        self.calls = 0
        self.interleaved: str | None = None
        self.sites: list[Site] = []
        self.products: dict[int, Product] = {}

    def follow(self, stand_ins: list[Tensor]) -> None:
        """Makes the contiguous tensors known that stand for the parameters in this run."""
        self.aliases = {storage(leaf): Alias(i, leaf, 0) for i, leaf in enumerate(stand_ins)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REWRITES:
            with self:
                return REWRITES[func](*args, **kwargs)
        entry = TABLE.get(func)
        self.calls += entry is not None
        result = func(*args, **kwargs)
        operands = tensors_in((args, kwargs))
        outputs = tensors_in(result)
        if self.examples.marked and func in RESHAPES:
            self.note_interleaving(func, operands[0], outputs[0])
        if outputs:
            for operand in operands:
                if id(operand) in self.products:
                    self.products[id(operand)].readers += 1
        if self.expanded and outputs:
            self.check_expanded(func, operands, outputs)
        used = {alias.leaf for alias in map(self.alias, operands) if alias is not None}
        if not used or not outputs:
            return result
        names = parameters(self.domain, sorted(used))
        name = getattr(func, "__name__", str(func))
        over_examples = entry is not None and self.examples.axis(outputs[0]) is not None
        if all(self.alias(output) is not None for output in outputs) and not over_examples:
            if name.endswith("_") and not name.endswith("__"):
                raise CaptureError(f"{name!r} changes {names} in place; model_fn must be pure")
            return result
        if func in COPIES and (self.alias(operands[0]) is None or self.follow_copy(operands[0], outputs[0])):
            return result
        if func in LIKE:
            return result
        if entry is None:
            raise CaptureError(
                f"{name!r} (after {self.calls} known calls) uses {names}, which curvlib does not understand: rewrite "
                "the call with a known one (linear, matmul, einsum, addmm, convolution, embedding, a norm, add, sub, "
                "mul), add an entry to the layer table (curvlib.layers), or leave the parameter out of params by "
                "closing over it in model_fn"
            )
        try:
            return self.match(entry, result, args, kwargs, used)
        except CaptureError as error:
            raise CaptureError(f"{names} in call {self.calls - 1}, {entry.name}: {error}") from error

    def alias(self, value: Any) -> Alias | None:
        """The leaf that a tensor shares its storage with."""
        return self.aliases.get(storage(value)) if isinstance(value, Tensor) else None

    def region(self, value: Any) -> Region | None:
        """The elements of a leaf that a tensor is a view of."""
        alias = self.alias(value)
        if alias is None:
            return None
        place = alias.place(value)
        if place is None:
            raise CaptureError(f"a copy of {parameters(self.domain, [alias.leaf])} is reshaped; reshape before copying")
        return Region.strided(alias.leaf, self.domain.shapes[alias.leaf], place[0], value.shape, place[1])

    def follow_copy(self, source: Tensor, copy: Tensor) -> bool:
        """A copy holds the same elements as its source, and may have them in another order."""
        alias = self.alias(source)
        place = None if alias is None else alias.place(source)
        if alias is None or place is None:
            return False
        strides = None if place[1] == tuple(map(int, copy.stride())) else place[1]
        self.aliases[storage(copy)] = Alias(alias.leaf, copy, place[0], strides)
        return True

    def match(self, entry: Entry, result: Tensor, args: Any, kwargs: Any, used: set[int]) -> Tensor:
        """Records the call as a site; returns its output, with an axis of examples if it is to have one."""
        ordinal = self.calls - 1
        batch = self.examples.axis(result)
        output = result if batch is not None else result.unsqueeze(0).expand(self.examples.number, *result.shape)
        use = entry.match(Inspection(self.region, output, batch or 0), *args, **kwargs)
        claimed = set() if use is None else {region.leaf for region in use.layer.regions}
        if use is None or claimed != used:
            missed = parameters(self.domain, sorted(used - claimed))
            raise CaptureError(f"the call uses {missed} in a way that is not understood")
        if self.alias(result) is not None:
            result = result.clone()  # it stands for one copy of the parameter an example now
        if batch is None and self.expand:
            result = expand_examples(result, self.examples.number)
            self.expanded[storage(result)] = result
        sizes = self.examples.sizes(output)
        if self.interleaved is not None and any(k > 1 and counts for k, counts in sizes):
            raise CaptureError(
                f"{self.interleaved!r} flattened the axis of examples behind another axis, so that the rows of an "
                "example do not lie together; bring the examples to the front before flattening"
            )
        self.sites.append(
            Site(ordinal, entry.name, (use.layer,), use.operand, result.dtype, sizes, expanded=batch is None)
        )
        for operand in tensors_in((args, kwargs)):
            product = self.products.get(id(operand))
            if product is not None and self.is_bias_of(product, self.sites[-1]):
                product.shift = len(self.sites) - 1
        if batch is not None and isinstance(use.layer, Contraction) and use.layer.bias is None:
            self.products[id(result)] = Product(result, len(self.sites) - 1)
        return result

    def note_interleaving(self, func: Any, operand: Tensor, output: Tensor) -> None:
        """Notices where an axis of examples is merged behind another one: [T, N, d] -> [T N, d]."""
        before, after = self.examples.axis(operand), self.examples.axis(output)
        if before is None or after is None:
            return
        if math.prod(operand.shape[:before]) > math.prod(output.shape[:after]):
            self.interleaved = getattr(func, "__name__", str(func))

    def check_expanded(self, func: Any, operands: list[Tensor], outputs: list[Tensor]) -> None:
        """An axis of examples that a site was given must stay one axis: not be summed away, nor meet another one."""
        if not any(storage(operand) in self.expanded for operand in operands):
            return
        name = getattr(func, "__name__", str(func))
        if all(self.examples.axis(output) is None for output in outputs):
            raise ExpansionError(f"{name!r} takes the axis of examples away again")
        if self.examples.marked and any(
            sum(n > 0 and n % self.examples.number == 0 for n in output.shape) > 1 for output in outputs
        ):
            raise ExpansionError(f"{name!r} combines it with another axis of examples")

    def is_bias_of(self, product: Product, site: Site) -> bool:
        """Whether a site adds one number an output feature to a linear layer's output."""
        linear, shift = self.sites[product.site], site.layers[0]
        axes = linear.layers[0].output_axes  # type: ignore[attr-defined]
        return (
            isinstance(shift, Elementwise)
            and (shift.scale, shift.sign, site.shape) == (None, 1, linear.shape)
            and shift.axes.features == (*axes.groups, *axes.features)
        )

    def settled(self, outputs: Any) -> list[Site]:
        """All sites, where x @ W + b is one linear layer with bias if nothing else reads x @ W."""
        sites: list[Site | None] = list(self.sites)
        returned = {id(tensor) for tensor in tensors_in(outputs)}
        for key, product in self.products.items():
            if product.shift is None or product.readers != 1 or key in returned:
                continue
            site, added = self.sites[product.site], self.sites[product.shift].layers[0]
            layer = site.layers[0]
            assert isinstance(layer, Contraction)
            assert isinstance(added, Elementwise)
            assert added.shift is not None
            bias = added.shift.reshape(*layer.weight.shape[:-1], 1)
            sites[product.site] = dataclasses.replace(site, layers=(dataclasses.replace(layer, bias=bias),))
            sites[product.shift] = None
        return [site for site in sites if site is not None]


def parameters(domain: Domain, leaves: Iterable[int]) -> str:
    """Names of leaves, for messages."""
    quoted = [repr(domain.names[leaf]) for leaf in leaves]
    return f"parameter {quoted[0]}" if len(quoted) == 1 else f"parameters {', '.join(quoted[:-1])} and {quoted[-1]}"


def storage(tensor: Tensor) -> int:
    """The identity of a tensor's storage, which all views share."""
    return tensor.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among a call's arguments or results."""
    return [leaf for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def expand_examples(output: Tensor, examples: int) -> Tensor:
    """Gives the output of a site without examples an axis of examples, in front or in place of one of size 1."""
    if output.ndim and output.shape[0] == 1:
        return output.expand(examples, *output.shape[1:])
    return output.expand(examples, *output.shape)
