"""Discovery: run the model once on fake tensors and find every use of every parameter.

A parameter is known by its storage, which all its views share; a copy to another dtype or memory format is
followed too. The number of examples is replaced by a prime that divides no other size: an axis counts examples
exactly if the prime divides it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlib.capture.plan import Site, Size
from curvlib.errors import CaptureError
from curvlib.layers import TABLE
from curvlib.layers.contraction import Contraction
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.table import Entry, Inspection
from curvlib.operators.layout import Region
from curvlib.pytree import Domain

COPIES = {
    torch.clone, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half,
    Tensor.bfloat16, Tensor.type_as, Tensor.cpu, Tensor.cuda,
}  # fmt: skip
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


@dataclasses.dataclass
class Alias:
    """A storage that holds elements of a leaf: element k of it is element k + shift of the leaf."""

    leaf: int
    shift: int
    root: Tensor  # keeps the storage alive, so that its address stays unique


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
        self.sites: list[Site] = []
        self.products: dict[int, Product] = {}

    def follow(self, stand_ins: list[Tensor]) -> None:
        """Makes the contiguous tensors known that stand for the parameters in this run."""
        self.aliases = {storage(leaf): Alias(i, 0, leaf) for i, leaf in enumerate(stand_ins)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        entry = TABLE.get(func)
        self.calls += entry is not None
        result = func(*args, **kwargs)
        operands = tensors_in((args, kwargs))
        outputs = tensors_in(result)
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
        if all(self.alias(output) is not None for output in outputs):
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
        shape = self.domain.shapes[alias.leaf]
        return Region.strided(alias.leaf, shape, value.storage_offset() + alias.shift, value.shape, value.stride())

    def follow_copy(self, source: Tensor, copy: Tensor) -> bool:
        """A copy with the strides of its source holds the same elements in the same order."""
        alias = self.alias(source)
        if alias is None or steps(source) != steps(copy):
            return False
        shift = alias.shift + int(source.storage_offset()) - int(copy.storage_offset())
        self.aliases[storage(copy)] = Alias(alias.leaf, shift, copy)
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
        if batch is None and self.expand:
            result = expand_examples(result, self.examples.number)
            self.expanded[storage(result)] = result
        sizes = self.examples.sizes(output)
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

    def check_expanded(self, func: Any, operands: list[Tensor], outputs: list[Tensor]) -> None:
        """An axis of examples that a site was given must not be summed away: the sum would be another one."""
        reads = any(storage(operand) in self.expanded for operand in operands)
        if reads and all(self.examples.axis(output) is None for output in outputs):
            raise ExpansionError(f"{getattr(func, '__name__', str(func))!r} takes the axis of examples away again")

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


def steps(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) along the axes that have more than one entry."""
    return [(n, stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def expand_examples(output: Tensor, examples: int) -> Tensor:
    """Gives the output of a site without examples an axis of examples, in front or in place of one of size 1."""
    if output.ndim and output.shape[0] == 1:
        return output.expand(examples, *output.shape[1:])
    return output.expand(examples, *output.shape)
