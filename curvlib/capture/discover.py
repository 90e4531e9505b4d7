"""Discovery: run the model once on fake tensors and find every use of every parameter.

The number of examples is replaced by a prime that divides no other size: an axis counts examples exactly if the
prime divides it. Where a model chooses rows by values (the tokens routed to an expert, say), their number is another
such prime: see `curvlib.capture.choices`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlib.capture.aliases import COPIES, LIKE, Aliases, graph_of, parameters, storage, tensors_in
from curvlib.capture.choices import Choices
from curvlib.capture.examples import Examples, expand_examples
from curvlib.capture.flow import Content, ExpansionError, Flow
from curvlib.capture.operations import RESHAPING
from curvlib.capture.plan import Chosen, Route, Site, Size
from curvlib.capture.routing import counted
from curvlib.errors import CaptureError
from curvlib.layers import REWRITES, TABLE
from curvlib.layers.contraction import Contraction
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.remedies import EXACT, remedy
from curvlib.layers.table import Entry, Inspection
from curvlib.operators.layout import Region
from curvlib.pytree import Domain


@dataclasses.dataclass
class Product:
    """The output z of a linear layer without bias, and the sums z + b that may turn out to be its bias."""

    output: Tensor
    site: int
    readers: int = 0
    shift: int | None = None


WRITES_TO_LEAF = "a leaf Variable that requires grad"  # in torch's message


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
        self.aliases = Aliases(domain)
        self.choices = None if examples.chosen is None else Choices(examples.number, examples.chosen)
        self.calls = 0
        self.hooked: str | None = None
        self.flow = Flow(examples, {})
        self.sites: list[Site] = []
        self.regions: list[tuple[Region, ...]] = []  # by site
        self.nodes: list[Any] = []  # of the graph, by site
        self.products: dict[int, Product] = {}

    def follow(self, stand_ins: list[Tensor], inputs: Any) -> None:
        """Makes the tensors known that a run starts with."""
        self.aliases.follow(stand_ins)
        names = zip(map(storage, stand_ins), self.domain.names, strict=True)
        self.flow.parameters.update(names)
        self.flow.start(inputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REWRITES:
            with self:
                return REWRITES[func](*args, **kwargs)
        entry = TABLE.get(func)
        self.calls += entry is not None
        operands = tensors_in((args, tuple(kwargs.values())))
        try:
            result = func(*args, **kwargs) if self.choices is None else self.choices.call(func, args, kwargs)
        except RuntimeError as error:
            if WRITES_TO_LEAF in str(error):
                raise self.flow.writes(getattr(func, "__name__", str(func)), operands[0]) from error
            raise
        outputs = tensors_in(result)
        if outputs:
            for operand in operands:
                if id(operand) in self.products:
                    self.products[id(operand)].readers += 1
        if self.expanded and outputs:
            self.check_expanded(func, operands, outputs)
        used = {alias.leaf for alias in map(self.aliases.of, operands) if alias is not None}
        if getattr(func, "__name__", "") == "register_hook":
            if used:
                raise self.unknown("register_hook", used)
            if not getattr(args[1], "__module__", "").startswith("torch."):  # not of a profiler
                self.hooked = "'register_hook' may change gradients of all examples at once"
        if not used or not outputs:
            return result
        if torch.is_grad_enabled() and not any(output.requires_grad for output in outputs):
            return result  # detached, compared, rounded: nothing is trained through it
        names = parameters(self.domain, sorted(used))
        name = getattr(func, "__name__", str(func))
        over_examples = entry is not None and self.over_rows(outputs[0])
        if all(self.aliases.of(output) is not None for output in outputs) and not over_examples:
            return result
        if func in COPIES and (
            self.aliases.of(operands[0]) is None or self.aliases.follow_copy(operands[0], outputs[0])
        ):
            return result
        if func in LIKE:
            return result
        if entry is None:
            raise self.unknown(name, used)
        try:
            return self.match(entry, result, args, kwargs, used)
        except CaptureError as error:
            raise CaptureError(f"{names} in call {self.calls - 1}, {entry.name}: {error}. {EXACT}") from error

    def unknown(self, name: str, used: set[int]) -> CaptureError:
        """The error for parameters in a call that the layer table lacks."""
        names = parameters(self.domain, sorted(used))
        return CaptureError(
            f"{name!r} (after {self.calls} known calls) uses {names}, which curvlib does not understand: "
            f"{remedy(name)}. {EXACT}"
        )

    def match(self, entry: Entry, result: Tensor, args: Any, kwargs: Any, used: set[int]) -> Tensor:
        """Records the call as a site; returns its output, with an axis of examples if it is to have one."""
        if not torch.is_grad_enabled():
            raise CaptureError(
                "it is used where gradients are disabled (torch.no_grad, the forward pass of a custom autograd "
                "function, or reentrant activation checkpointing, for which use_reentrant=False is the remedy): "
                "detach a parameter that is to carry no gradient there, or close over it in model_fn"
            )
        if torch._C._functorch.is_functorch_wrapped_tensor(result):
            raise CaptureError(
                "it is used inside of a transform (torch.vmap, torch.func.grad), which hides the axis of examples: use "
                "the parameter outside of it"
            )
        ordinal = self.calls - 1
        batch = self.examples.axis(result)
        chosen = self.examples.chosen_axis(result)
        if batch is not None and chosen is not None:
            raise CaptureError(
                "the output has an axis of examples and one of rows that are chosen by values: use the parameter "
                "before rows are chosen, or close over it in model_fn"
            )
        rows = batch if chosen is None else chosen
        content = self.flow.content(result)
        if rows is None and content is not None:
            raise CaptureError(
                f"it is applied to what all examples share ({content.mixed}), so that it has no gradient of each "
                "example: write loops for all examples at once; if the first axis of the inputs does not count the "
                "examples (time first, say), give model_fn inputs with the examples in front and transpose inside; or "
                "close over the parameter"
            )
        output = result if rows is not None else result.unsqueeze(0).expand(self.examples.number, *result.shape)
        use = entry.match(Inspection(self.aliases.region, output, rows or 0), *args, **kwargs)
        claimed = set() if use is None else {region.leaf for region in use.layer.regions}
        if use is None or claimed != used:
            missed = parameters(self.domain, sorted(used - claimed))
            raise CaptureError(f"the call uses {missed} in a way that is not understood: {remedy(entry.name)}")
        if self.aliases.of(result) is not None:
            result = result.clone()  # it stands for one copy of the parameter an example now
        if rows is None and self.expand:
            result = expand_examples(result, self.examples.number)
            self.expanded[storage(result)] = result
            if self.examples.marked:
                self.flow.hold(result, Content(None, 1, given=True))
        sizes = self.examples.sizes(output)
        scattered = self.flow.scattered(result)
        if scattered in RESHAPING:
            raise CaptureError(
                "'reshape' flattened the axis of examples behind another axis, so that the rows of an example do not "
                "lie together; bring the examples to the front before flattening"
            )
        found = None if chosen is None else self.describe(use.read(entry.arguments(args, kwargs)), sizes)
        layer = use.layer if found is None else counted(use.layer, loose=found.loose)
        site = Site(
            ordinal,
            entry.name,
            (layer,),
            use.operand,
            result.dtype,
            sizes,
            expanded=rows is None,
            scattered=scattered is not None,
            chosen=found,
        )
        self.sites.append(site)
        self.nodes.append(result.grad_fn)
        operands = tensors_in((args, tuple(kwargs.values())))
        self.regions.append(self.aliases.regions(operands))
        for operand in operands:
            product = self.products.get(id(operand))
            if product is not None and self.is_bias_of(product, site):
                product.shift = len(self.sites) - 1
        if rows is not None and isinstance(use.layer, Contraction) and use.layer.bias is None:
            self.products[id(result)] = Product(result, len(self.sites) - 1)
        return result

    @property
    def follows_branches(self) -> bool:
        """Whether values were guessed, but no parameter is used on chosen rows."""
        return self.choices is not None and self.choices.guessed and not any(site.chosen for site in self.sites)

    def over_rows(self, tensor: Tensor) -> bool:
        """Whether a tensor has an axis of examples or of chosen rows."""
        return self.examples.axis(tensor) is not None or self.examples.chosen_axis(tensor) is not None

    def describe(self, operand: Tensor | None, sizes: tuple[Size, ...]) -> Chosen:
        """What is known of a call on chosen rows with an output of these sizes."""
        assert self.choices is not None
        loose = self.choices.repeated or any(k > 1 and counts for k, counts in sizes)
        if operand is None:
            return Chosen((), torch.float32, loose)
        if self.examples.axis(operand) is not None:
            raise CaptureError(
                "rows that are chosen by values meet an axis of examples: use the parameter before rows are chosen, or "
                "close over it in model_fn"
            )
        return Chosen(self.examples.sizes(operand), operand.dtype, loose)

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

    def settled(self, outputs: Any) -> tuple[list[Site], tuple[Route, ...]]:
        """All sites, and the routes to them; x @ W + b is one linear layer with bias if nothing else reads x @ W."""
        reached = graph_of(outputs)
        self.sites = [
            dataclasses.replace(site, reaches=node in reached)
            for site, node in zip(self.sites, self.nodes, strict=True)
        ]
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
        numbers = itertools.accumulate((site is not None for site in sites), initial=0)
        routes = tuple(
            Route(regions, self.sites[i], None if site is None else number)
            for i, (regions, site, number) in enumerate(zip(self.regions, sites, numbers, strict=False))
        )
        return [site for site in sites if site is not None], routes if self.choices is not None else ()

