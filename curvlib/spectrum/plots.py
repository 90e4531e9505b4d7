"""Pictures of spectra. Matplotlib is imported only where axes have to be made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from curvlib.errors import ArgumentError
from curvlib.spectrum.density import Density
from curvlib.spectrum.eigenpairs import Eigenpairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1768ac", "#e07a1f", "#2a9d5c", "#c8384a", "#7b4fa3", "#6b7280")


def axes_or_new(axes: Axes | None) -> Axes:
    """The axes given, or those of a new figure.

    Raises:
        ImportError: there are none, and no matplotlib to make them.
    """
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return pyplot.subplots(layout="constrained")[1]


def resolution(density: Density) -> float:
    """How far from 0 eigenvalues must be to be told apart from it, and from each other near it.

    Polynomials of degree s separate points at the edge of an interval that are its length / s^2 apart. In D steps all
    eigenvalues are found, up to rounding.
    """
    steps, eps = density.nodes.shape[1], torch.finfo(density.nodes.dtype).eps
    return float(density.nodes.abs().max()) * max(10 * eps, 0.0 if steps == density.size else steps**-2)


def plot_density(
    density: Density,
    axes: Axes | None = None,
    *,
    scale: Literal["linear", "log"] = "linear",
    label: str = "",
    color: str = COLORS[0],
    outliers: int = 10,
    width: float | None = None,
) -> Axes:
    """The number of eigenvalues per unit (or per decade), on a logarithmic axis, so that single eigenvalues show.

    Args:
        density: what to draw.
        axes: where; by default in a new figure.
        scale: of the eigenvalues. "log" is for positive spectra: what lies below the resolution of s steps, the
            largest eigenvalue / s^2, is counted in the legend and not drawn.
        label: name in the legend.
        color: of the curve.
        outliers: how many of the largest eigenvalues are marked by dots.
        width: standard deviation of the smoothing, in decades if the scale is "log"; by default 0.1 decades, or a
            hundredth of the range.

    Returns:
        The axes.

    Raises:
        ArgumentError: a logarithmic scale for a spectrum without positive eigenvalues.

    Example:
        >>> from curvlib import spectrum
        >>> from curvlib.operators import Diagonal
        >>> axes = spectrum.plot_density(spectrum.density(Diagonal(torch.rand(100))))
        >>> axes.get_yscale()
        'log'
    """
    axes = axes_or_new(axes)
    nodes, weights = density.pooled()
    drawn, unit = density, "unit"
    if scale == "log":
        unit = "decade"
        if float(nodes[-1]) <= 0:
            raise ArgumentError("a logarithmic scale needs positive eigenvalues, and there are none")
        floor = resolution(density)
        hidden = density.size * float(weights[nodes < floor].sum())
        if hidden >= 0.5:
            label = f"{label} ({hidden:.0f} of {density.size} near 0)".strip()
        drawn = density.map(lambda x: x.clamp_min(1e-2 * floor).log10())  # out of sight
    positions, top = drawn.pooled()[0], nodes[density.size * weights.flip(0).cumsum(0).flip(0) <= outliers + 0.5]
    low, high = float(positions[0]), float(positions[-1])
    if width is None:
        width = 0.1 if scale == "log" else 0.01 * ((high - low) or 1.0)
    start = math.log10(floor) if scale == "log" else low - 4 * width
    grid = torch.linspace(start, high + 4 * width, 2000, dtype=nodes.dtype, device=nodes.device)
    marks = positions[len(positions) - len(top) :]
    heights, tips = (density.size * drawn.smoothed(x, width) for x in (grid, marks))
    if scale == "log":
        grid = 10**grid
    bottom = 0.1 / (width * math.sqrt(2 * math.pi))  # a tenth of the height of a single eigenvalue's bump
    seen = heights >= bottom
    x, y = grid.cpu().numpy(), heights.where(seen, float("nan")).cpu().numpy()
    axes.fill_between(x, bottom, y, color=color, alpha=0.15, linewidth=0)
    axes.plot(x, y, color=color, linewidth=1.8, label=label or None)
    axes.plot(top.cpu().numpy(), tips.cpu().numpy(), "o", color=color, markersize=4, markeredgecolor="white")
    axes.set(yscale="log", xscale=scale, xlabel="eigenvalue", ylabel=f"eigenvalues per {unit}")
    axes.set_ylim(bottom=bottom)
    if label:
        axes.legend(frameon=False)
    return axes


def plot_top_eigenvalues(pairs: Mapping[str, Eigenpairs], axes: Axes | None = None, *, color: str = COLORS[0]) -> Axes:
    """The absolute values of the leading eigenvalues of several operators (layers, say) as bars, leading ones darkest.

    Args:
        pairs: eigenpairs by name, as from ``top_eigenvalues(curv, k, per_block=True)``.
        axes: where; by default in a new figure.
        color: of the leading eigenvalue.

    Returns:
        The axes.

    Example:
        >>> from curvlib import spectrum
        >>> from curvlib.operators import Diagonal
        >>> layers = {"first": Diagonal(torch.rand(9)), "second": Diagonal(torch.rand(9))}
        >>> axes = plot_top_eigenvalues({name: spectrum.top_eigenvalues(layers[name], 3) for name in layers})
        >>> len(axes.patches)
        6
    """
    axes = axes_or_new(axes)
    most = max(len(p.values) for p in pairs.values())
    step = 0.8 / most
    for place, p in enumerate(pairs.values()):
        for rank, value in enumerate(p.values.abs().tolist()):
            axes.bar(
                place - 0.4 + (rank + 0.5) * step,
                value,
                0.9 * step,
                color=color,
                alpha=1 - 0.75 * rank / max(most - 1, 1),
            )
    axes.set_xticks(range(len(pairs)), list(pairs))
    axes.set(yscale="log", ylabel=f"{most} leading eigenvalues")
    return axes


def plot_comparison(densities: Mapping[str, Density], axes: Axes | None = None) -> Axes:
    """Eigenvalues by rank, one staircase an operator: KFAC's spectrum over that of the GGN, say.

    The rank of a node is the estimated number of eigenvalues at or above it. Nodes below
    the resolution of s steps, the largest eigenvalue / s^2, are not drawn.

    Args:
        densities: spectral densities by name.
        axes: where; by default in a new figure.

    Returns:
        The axes.

    Example:
        >>> from curvlib import spectrum
        >>> from curvlib.operators import Diagonal
        >>> axes = plot_comparison({"A": spectrum.density(Diagonal(torch.rand(100)))})
        >>> axes.get_xlabel()
        'rank'
    """
    axes = axes_or_new(axes)
    for index, (name, density) in enumerate(densities.items()):
        nodes, weights = (x.flip(0) for x in density.pooled())
        ranks = density.size * weights.cumsum(0)
        shown = nodes >= resolution(density)
        axes.plot(
            ranks[shown].cpu().numpy(),
            nodes[shown].cpu().numpy(),
            color=COLORS[index % len(COLORS)],
            linewidth=1.8,
            drawstyle="steps-pre",
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue")
    axes.set_xlim(left=0.8)
    axes.legend(frameon=False)
    return axes
