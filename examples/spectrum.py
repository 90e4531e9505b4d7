"""The spectrum of a network's curvature: its density, its leading eigenvalues by layer, and KFAC over the exact GGN.

A tanh network learns the 8 x 8 digits of scikit-learn. No matrix is formed and nothing is decomposed: all is
estimated from products of the curvature with vectors.

    python examples/spectrum.py --output spectrum.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import curvlib as cv
from curvlib import spectrum

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
ModelFn = Callable[[Params, Tensor], Tensor]

EPOCHS = 30
STEPS, PROBES = 200, 16
TOP = 12
LAYERS = {"0.weight": "layer 1\n64 → 32", "2.weight": "layer 2\n32 → 32", "4.weight": "layer 3\n32 → 10"}

INK, FAINT = "#374151", "#9ca3af"
COLORS = ("#1768ac", "#e07a1f", "#2a9d5c")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#eceef1",
    "legend.fontsize": 9.5,
    "mathtext.fontset": "dejavusans",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def learn() -> tuple[ModelFn, Params, Batch]:
    """A trained network as a function and its parameters, and its data."""
    data = load_digits()
    inputs, targets = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in tqdm(range(EPOCHS), desc="training", unit="epoch", disable=None, leave=False):
        for index in torch.randperm(len(targets)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(module(inputs[index]), targets[index]).backward()
            optimizer.step()
    model_fn, params = cv.functional(module)
    return model_fn, params, (inputs, targets)


def draw_densities(axes: Axes, curv: cv.Operator) -> None:
    """The density of KFAC's spectrum, layer by layer."""
    densities = spectrum.density(curv, steps=STEPS, probes=PROBES, per_block=True, progress=True)
    for (name, density), color in zip(densities.items(), COLORS, strict=True):
        label = LAYERS[name].replace("\n", ", ")
        spectrum.plot_density(density, axes, scale="log", label=label, color=color, width=0.15)
    axes.set_title("Density of KFAC; dots: the ten largest")
    axes.legend(loc="upper right", frameon=False)
    axes.set_ylim(top=2e4)


def draw_layers(axes: Axes, curv: cv.Operator) -> dict[str, spectrum.Eigenpairs]:
    """The leading eigenvalues of every layer."""
    pairs = spectrum.top_eigenvalues(curv, TOP, per_block=True, progress=True)
    spectrum.plot_top_eigenvalues({LAYERS[name]: top for name, top in pairs.items()}, axes)
    axes.set_title("KFAC, layer by layer")
    axes.set_ylabel(f"{TOP} largest eigenvalues")
    axes.grid(visible=False, axis="x")
    return pairs


def draw_comparison(axes: Axes, curv: cv.Operator, exact: cv.Operator) -> None:
    """Eigenvalues by rank: KFAC over the exact generalized Gauss-Newton matrix."""
    densities = {
        "KFAC": spectrum.density(curv, steps=STEPS, probes=PROBES, progress=True),
        "exact GGN": spectrum.density(exact, steps=STEPS, probes=PROBES, progress=True),
    }
    spectrum.plot_comparison(densities, axes)
    axes.set_title("KFAC over the exact GGN")


def main() -> None:
    """Trains, estimates, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("spectrum.png"), help="where the figure goes")
    output: Path = parser.parse_args().output

    torch.manual_seed(0)
    model_fn, params, batch = learn()
    curv = cv.kfac(model_fn, params, batch, loss=cv.CrossEntropy(), fisher="type-2")
    exact = cv.ggn(model_fn, params, batch, loss=cv.CrossEntropy())

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(16, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        draw_densities(left, curv)
        pairs = draw_layers(middle, curv)
        draw_comparison(right, curv, exact)
        figure.savefig(output, dpi=160)

    print(f"{curv.domain.size} parameters, {len(batch[1])} digits")
    print(f"{'KFAC block':<14}{'largest':>12}{'residual':>12}")
    for name, top in pairs.items():
        print(f"{name:<14}{float(top.values[0]):>12.4f}{float(top.residuals[0]):>12.1e}")
    for name, operator in (("KFAC", curv), ("exact GGN", exact)):
        estimate = spectrum.trace(operator, 64)
        print(f"trace of {name}: {float(estimate.value):.3f} ± {float(estimate.standard_error):.3f}")
    print(f"figure: {output}")


if __name__ == "__main__":
    main()
