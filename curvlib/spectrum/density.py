"""The density of a spectrum, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, naming
from curvlib.linalg.lanczos import lanczos, quadrature
from curvlib.operators import Operator
from curvlib.operators.base import check_operator
from curvlib.pytree import Tree, register, static
from curvlib.spectrum.flat import at_least, chosen, flattened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@register
class Density:
    """A spectral density: for each of p probes, point masses at nodes. Every probe is an estimate of all of it.

    Args:
        nodes: eigenvalues [p, s], ascending in each row.
        weights: their shares of the D eigenvalues [p, s]; each row sums to 1.
        size: D.

    Example:
        >>> d = Density(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.75, 0.25]]), size=8)
        >>> d.moment(2)
        tensor(1.)
        >>> d.quantile(0.9)
        tensor(2.)
        >>> d.histogram(torch.tensor([-1.0, 1.0, 3.0]))
        tensor([0.7500, 0.2500])
    """

    nodes: Tensor
    weights: Tensor
    size: int = static()

    def expectation(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of fn(l) over all eigenvalues l, a 0-d tensor: tr fn(A) / D for an elementwise ``fn``."""
        return (self.weights * fn(self.nodes)).sum(1).mean()

    def standard_error(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """The standard error of `expectation`, from the spread over the probes; not a number for a single probe."""
        return (self.weights * fn(self.nodes)).sum(1).std() / math.sqrt(len(self.nodes))

    def moment(self, exponent: float) -> Tensor:
        """tr(A^p) / D, a 0-d tensor. For whole p < 2 s, each probe's quadrature is exact."""
        return self.expectation(lambda nodes: nodes**exponent)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Density:
        """The density of fn(A), for an elementwise ``fn`` that does not decrease."""
        return Density(fn(self.nodes), self.weights, self.size)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Nodes [p s] of all probes, ascending, and their weights, which sum to 1."""
        nodes, order = self.nodes.reshape(-1).sort()
        return nodes, self.weights.reshape(-1)[order] / len(self.nodes)

    def quantile(self, q: float | Tensor) -> Tensor:
        """The smallest node with at least a share q of the eigenvalues at or below it, shaped like q.

        Raises:
            ArgumentError: a share outside of [0, 1].
        """
        nodes, weights = self.pooled()
        shares = torch.as_tensor(q, dtype=nodes.dtype, device=nodes.device)
        if bool(((shares < 0) | (shares > 1)).any()):
            raise ArgumentError(f"quantiles are taken at shares from 0 to 1, got {q}")
        total = weights.cumsum(0)
        # sums of weights are rounded: the share asked for may be the exact sum
        slack = 10 * torch.finfo(nodes.dtype).eps
        return nodes[torch.searchsorted(total, shares - slack).clamp_max(len(nodes) - 1)]

    def grid(self, points: int = 512, *, margin: float = 0.05) -> Tensor:
        """Equally spaced numbers [points] over all nodes, and a margin relative to their range."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        room = margin * ((high - low) or 1.0)
        return torch.linspace(low - room, high + room, points, dtype=self.nodes.dtype, device=self.nodes.device)

    def smoothed(self, grid: Tensor, width: float) -> Tensor:
        """The density convolved with a normal density of this standard deviation, at the points of a grid [g].

        It is nonnegative and integrates to 1.

        Raises:
            ArgumentError: the width is not positive.
        """
        if not width > 0:
            raise ArgumentError(f"the width of the smoothing must be positive, got {width}")
        nodes, weights = self.pooled()
        bumps = (-0.5 * ((grid.unsqueeze(1) - nodes) / width).square()).exp()
        return bumps @ weights / (width * math.sqrt(2 * math.pi))

    def histogram(self, edges: Tensor) -> Tensor:
        """The share of the eigenvalues in each bin [edges_i, edges_i+1), the last one closed: [g - 1] for edges [g]."""
        nodes, weights = self.pooled()
        total = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
        below = torch.searchsorted(nodes, edges)
        below[-1] = torch.searchsorted(nodes, edges[-1], right=True)
        return total[below].diff()

    def plot(self, axes: Axes | None = None, *, scale: Literal["linear", "log"] = "linear", label: str = "") -> Axes:
        """Draws itself; see `plot_density`."""
        from curvlib.spectrum.plots import plot_density  # a plot is made of densities

        return plot_density(self, axes, scale=scale, label=label)


@overload
def density(
    operator: Operator,
    *,
    steps: int = ...,
    probes: int = ...,
    generator: torch.Generator | None = ...,
    batch_size: int | None = ...,
    like: Tree | None = ...,
    per_block: Literal[False] = ...,
    progress: bool = ...,
) -> Density: ...
@overload
def density(
    operator: Operator,
    *,
    steps: int = ...,
    probes: int = ...,
    generator: torch.Generator | None = ...,
    batch_size: int | None = ...,
    per_block: Literal[True],
    progress: bool = ...,
) -> dict[str, Density]: ...
def density(
    operator: Operator,
    *,
    steps: int = 64,
    probes: int = 8,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    like: Tree | None = None,
    per_block: bool = False,
    progress: bool = False,
) -> Density | dict[str, Density]:
    """The spectral density of a symmetric operator, by stochastic Lanczos quadrature.

    A probe v with random signs has E[v^T f(A) v] = tr f(A), and s Lanczos steps from v give the nodes and weights of
    the Gauss quadrature of v^T f(A) v / D, which is exact for polynomials f up to degree 2 s - 1. The extreme
    eigenvalues are found first, and closely (Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38, 2017; Ghorbani,
    Krishnan and Xiao, ICML 2019).

    Args:
        operator: any operator; only its products are used.
        steps: s, at most D are taken.
        probes: how many.
        generator: of the probes; by default a fresh one with seed 0.
        batch_size: how many probes go through ``operator.matmat`` at once; by default all of them. Each keeps a
            basis of s D numbers.
        like: a pytree of params, for an operator that does not know its own.
        per_block: estimate the density of every diagonal block in place of that of the whole operator.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        The density, or one by block name.

    Raises:
        ArgumentError: steps, probes or batch_size below 1.
        NonFiniteError: a product is not finite; names the block.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> d = density(Diagonal(torch.tensor([0.0, 1.0, 1.0, 4.0])), steps=3, probes=1)
        >>> d.nodes.round(decimals=3).abs(), d.weights.round(decimals=3)
        (tensor([[0., 1., 4.]]), tensor([[0.2500, 0.5000, 0.2500]]))
    """
    check_operator(operator)
    batch_size = probes if batch_size is None else batch_size
    at_least(1, steps=steps, probes=probes, batch_size=batch_size)
    generator = chosen(generator)
    if not per_block:
        return estimate(operator, steps, probes, generator, batch_size, like, progress)
    densities = {}
    for name, block in operator.blocks.items():
        with naming(name):
            densities[name] = estimate(block, steps, probes, generator, batch_size, None, progress)
    return densities


def estimate(
    operator: Operator,
    steps: int,
    probes: int,
    generator: torch.Generator,
    batch_size: int,
    like: Tree | None,
    progress: bool,
) -> Density:
    """The density of one operator."""
    steps = min(steps, operator.domain.size)
    rules = []
    with flattened(operator, like, products=steps * probes, label="spectral density", progress=progress) as flat:
        for first in range(0, probes, batch_size):
            start = flat.signs(min(batch_size, probes - first), generator)
            diagonal, off, _ = lanczos(flat.matmat, start, steps=steps, generator=generator)
            rules.append(quadrature(diagonal, off))
    nodes, weights = (torch.cat(parts) for parts in zip(*rules, strict=True))
    return Density(nodes, weights, operator.domain.size)
