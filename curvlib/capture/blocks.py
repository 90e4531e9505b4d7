"""Blocks: which parameters share a block of the curvature, from the sites of a plan.

A weight and the bias that always goes with it share a block. So do the parameters of a norm layer. Every element
of every parameter must belong to exactly one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from curvlib.capture.plan import Block, Placement, Site
from curvlib.errors import CaptureError
from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.elementwise import Elementwise
from curvlib.layers.remedies import EXACT
from curvlib.operators.layout import Layout, Region
from curvlib.pytree import Domain


def split_lone_biases(sites: Iterable[Site]) -> list[Site]:
    """Accounts for weight and bias apart where they do not always go together."""
    partners: dict[object, set[object]] = {}
    for layer in (layer for site in sites for layer in site.layers):
        if isinstance(layer, KroneckerLayer):
            bias = None if layer.bias is None else layer.bias.elements
            partners.setdefault(("weight", layer.weight.elements), set()).add(bias)
            if bias is not None:
                partners.setdefault(("bias", bias), set()).add(layer.weight.elements)
        else:
            for region in layer.regions:
                partners.setdefault(("bias", region.elements), set()).add("elementwise")

    def split(layer: Layer) -> tuple[Layer, ...]:
        if not isinstance(layer, KroneckerLayer) or layer.bias is None:
            return (layer,)
        together = partners["weight", layer.weight.elements], partners["bias", layer.bias.elements]
        return (layer,) if all(len(others) == 1 for others in together) else layer.split()

    return [
        dataclasses.replace(site, layers=tuple(part for layer in site.layers for part in split(layer)))
        for site in sites
    ]


def assign(domain: Domain, sites: list[Site]) -> tuple[Block, ...]:
    """The blocks of a curvature, in the order in which the model first uses their parameters.

    Raises:
        CaptureError: a parameter is used both as a matrix and elementwise, only in part, or in overlapping parts.
    """
    matrices: dict[object, list[tuple[KroneckerLayer, Placement]]] = {}
    groups: list[tuple[set[int], list[Placement]]] = []
    for i, site in enumerate(sites):
        for j, layer in enumerate(site.layers):
            if isinstance(layer, KroneckerLayer):
                matrices.setdefault(layer.weight.elements, []).append(
                    (layer, Placement(i, j, chosen=site.chosen is not None))
                )
            else:
                leaves, placements = (
                    {region.leaf for region in layer.regions},
                    [Placement(i, j, chosen=site.chosen is not None)],
                )
                for group in [group for group in groups if group[0] & leaves]:
                    leaves, placements = leaves | group[0], group[1] + placements
                    groups.remove(group)
                groups.append((leaves, placements))

    blocks = [matrix_block(domain, uses) for uses in matrices.values()]
    elementwise = {leaf for leaves, _ in groups for leaf in leaves}
    for region in (region for block in blocks for region in block.layout.pieces):
        if region.leaf in elementwise:
            raise CaptureError(
                f"parameter {domain.names[region.leaf]!r} is used both as a weight and elementwise: split it in two. "
                f"{EXACT}"
            )
    check_coverage(domain, [region for block in blocks for region in block.layout.pieces])
    for leaves, placements in groups:
        blocks.append(elementwise_block(domain, sites, leaves, placements))
    return tuple(sorted(unique_names(blocks), key=lambda block: block.placements[0].site))


def matrix_block(domain: Domain, uses: list[tuple[KroneckerLayer, Placement]]) -> Block:
    """The block of one weight, with all its uses brought into the layout of the first."""
    first = uses[0][0]
    placements = []
    for layer, placement in uses:
        if [r.sequence for r in layer.regions] == [r.sequence for r in first.regions]:
            placements.append(placement)
        elif layer.bias is None and layer.weight.transposed().sequence == first.weight.sequence:
            placements.append(dataclasses.replace(placement, transposed=True))
        else:
            raise CaptureError(
                f"parameter {domain.names[first.weight.leaf]!r} is used as two different matrices, "
                f"{first.weight.shape} and {layer.weight.shape}: use it in one shape. {EXACT}"
            )
    name = domain.names[first.weight.leaf]
    return Block(name, first.layout, True, tuple(placements))


def elementwise_block(domain: Domain, sites: list[Site], leaves: set[int], placements: list[Placement]) -> Block:
    """The block of parameters that scale or shift, each as a whole; scales come first."""
    order: list[int] = []
    for placement in placements:
        layer = sites[placement.site].layers[placement.layer]
        assert isinstance(layer, Elementwise)
        order += [region.leaf for region in layer.regions if region.leaf not in order]
    wholes = [Region.whole(leaf, domain.shapes[leaf]) for leaf in order]
    layout = Layout(tuple(region.reshape(region.numel) for region in wholes))
    return Block(domain.names[order[0]], layout, False, tuple(placements))


def check_coverage(domain: Domain, regions: list[Region]) -> None:
    """Every element of a parameter that is used as a matrix must be in exactly one block."""
    by_leaf: dict[int, list[Region]] = {}
    for region in regions:
        by_leaf.setdefault(region.leaf, []).append(region)
    for leaf, parts in by_leaf.items():
        if len(parts) == 1 and parts[0].is_whole:
            continue
        count = torch.zeros(domain.shapes[leaf], dtype=torch.int8)
        for part in parts:
            count += part.scatter(torch.ones(part.shape, dtype=torch.int8))
        if (count > 1).any():
            raise CaptureError(
                f"parameter {domain.names[leaf]!r} is used through views that overlap: use disjoint slices of it. "
                f"{EXACT}"
            )
        if (count == 0).any():
            raise CaptureError(
                f"only {int(count.sum())} of {count.numel()} elements of parameter {domain.names[leaf]!r} are used: "
                f"slice it outside of model_fn. {EXACT}"
            )


def unique_names(blocks: list[Block]) -> list[Block]:
    """Blocks that are parts of one parameter are numbered: 'in_proj_weight[0]', 'in_proj_weight[1]', ..."""
    names = [block.name for block in blocks]
    seen: dict[str, int] = {}
    result = []
    for block in blocks:
        if names.count(block.name) > 1:
            number = seen.setdefault(block.name, 0)
            seen[block.name] += 1
            block = dataclasses.replace(block, name=f"{block.name}[{number}]")
        result.append(block)
    return result
