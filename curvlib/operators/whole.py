"""One matrix that acts on all leaves of a pytree at once."""

from __future__ import annotations

from curvlib.operators.blocks import BlockDiagonal
from curvlib.operators.layout import Layout, Region
from curvlib.operators.matrices import Matrix
from curvlib.pytree import Domain


def whole(matrix: Matrix, domain: Domain) -> BlockDiagonal:
    """A matrix [D, D], in the order of `ravel`, as an operator on the pytrees of a domain: one block, ``params``.

    Example:
        >>> import torch, curvlib as cv
        >>> params = {"a": torch.ones(2), "b": torch.ones(1)}
        >>> whole(cv.Diagonal(torch.arange(3.0)), cv.pytree.Domain.of(params)) @ params
        {'a': tensor([0., 1.]), 'b': tensor([2.])}
    """
    leaves = [Region.whole(number, shape) for number, shape in enumerate(domain.shapes)]
    layout = Layout(tuple(leaf.reshape(leaf.numel) for leaf in leaves))
    return BlockDiagonal({"params": matrix}, (("params", layout),), domain)
