"""A first look at curvlib: what the curvature of a small network is good for, in one figure and one table.

A tanh network learns the 8 x 8 digits of scikit-learn. It is small enough to form its exact generalized Gauss-Newton
matrix (GGN), against which KFAC is held in four ways: as a matrix, as a preconditioner, as an operator with a spectrum
and a damped inverse, and as the metric of influence functions.

    python examples/quickstart.py --output demo.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import curvlib as cv

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
ModelFn = Callable[[Params, Tensor], Tensor]
LossFn = Callable[[Params], Tensor]
Rows = list[tuple[str, str, str]]

EPOCHS = 40
STEPS = 10
STEP_SIZES = torch.logspace(-2.5, 2.5, 101)
DAMPING = 1e-2

KFAC, EXACT, SGD, INK, FAINT = "#1768ac", "#111827", "#e07a1f", "#374151", "#9ca3af"
HELPFUL, HARMFUL = "#2a9d5c", "#c8384a"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.color": "#eceef1",
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markeredgecolor": "white",
    "lines.markersize": 5,
    "mathtext.fontset": "dejavusans",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


# --- the network ------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A model with its parameters at two times, and its data."""

    model_fn: ModelFn
    early: Params
    trained: Params
    training: Batch
    test: Batch


def digits(test: int = 297) -> tuple[Batch, Batch]:
    """The digits in random order, as a training and a test set."""
    data = load_digits()
    order = torch.randperm(len(data.target))
    inputs = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    targets = torch.tensor(data.target)[order]
    return (inputs[test:], targets[test:]), (inputs[:test], targets[:test])


def learn() -> Problem:
    """A network and its parameters after one epoch of Adam and after all of them."""
    training, test = digits()
    module = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    model_fn, params = cv.functional(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3, weight_decay=1e-4)
    snapshots = []
    for _ in tqdm(range(EPOCHS), desc="training", unit="epoch", disable=None, leave=False):
        for index in torch.randperm(len(training[0])).split(100):
            optimizer.zero_grad()
            F.cross_entropy(module(training[0][index]), training[1][index]).backward()
            optimizer.step()
        snapshots.append({name: value.clone() for name, value in params.items()})
    return Problem(model_fn, snapshots[0], snapshots[-1], training, test)


def objective(model_fn: ModelFn, batch: Batch) -> LossFn:
    """The mean cross-entropy on a batch as a function of the parameters."""
    inputs, targets = batch
    return lambda params: F.cross_entropy(model_fn(params, inputs), targets)


def accuracy(problem: Problem, params: Params) -> float:
    """The share of test images that are classified correctly."""
    inputs, targets = problem.test
    return float((problem.model_fn(params, inputs).argmax(-1) == targets).double().mean())


# --- its curvature ----------------------------------------------------------------------------------------------------


def kfac(problem: Problem, params: Params) -> cv.BlockDiagonal:
    """KFAC on the training set, from the exact square root of the loss's Hessian (no sampling)."""
    return cv.kfac(problem.model_fn, params, problem.training, loss=cv.CrossEntropy(), fisher="type-2")


def exact_ggn(problem: Problem, params: Params) -> Tensor:
    """The exact GGN on the training set, [P, P] in the order of `cv.ravel`, from every example's Jacobian."""
    inputs, _ = problem.training
    jacobians = torch.func.vmap(torch.func.jacrev(problem.model_fn), in_dims=(None, 0))(params, inputs)
    jacobians = torch.func.vmap(torch.func.vmap(cv.ravel))(jacobians)
    p = problem.model_fn(params, inputs).softmax(-1)
    root = p.sqrt().diag_embed() - p[:, :, None] * p.sqrt()[:, None, :]  # root root^T = diag(p) - p p^T
    rows = torch.einsum("nck,ncp->nkp", root, jacobians).flatten(0, 1)
    return rows.T @ rows / len(inputs)


def solve(ggn: Tensor, v: Params) -> Params:
    """(GGN + damping)^-1 v with the dense matrix."""
    return cv.unravel(torch.linalg.solve(ggn + DAMPING * torch.eye(len(ggn)), cv.ravel(v)), v)


def relative_errors(curv: cv.BlockDiagonal, ggn: Tensor) -> tuple[float, float]:
    """Relative Frobenius errors of KFAC against the diagonal blocks of the GGN, and against all of it."""
    # the parameters of a layer are neighbours in the order of cv.ravel
    mask = torch.block_diag(*(torch.ones(block.domain.size, block.domain.size) for block in curv.blocks.values()))
    dense, blocks = curv.to_dense(), ggn * mask
    return float((dense - blocks).norm() / blocks.norm()), float((dense - ggn).norm() / ggn.norm())


def descend(
    loss: LossFn, params: Params, precondition: Callable[[Params, Params], Params], label: str
) -> tuple[Tensor, Tensor]:
    """Steps along preconditioned gradients, each of the best size on a grid: (loss by first step's size, by step)."""

    def move(size: Tensor) -> Params:
        return {name: value - size * direction[name] for name, value in params.items()}

    lines, losses = [], [loss(params)]
    for _ in tqdm(range(STEPS), desc=label, unit="step", disable=None, leave=False):
        direction = precondition(params, torch.func.grad(loss)(params))
        lines.append(torch.stack([loss(move(size)) for size in STEP_SIZES]))
        params = move(STEP_SIZES[lines[-1].argmin()])
        losses.append(lines[-1].min())
    return lines[0], torch.stack(losses)


def residual(curv: cv.Operator, inverse: cv.Operator, damping: float, v: Params) -> float:
    """Relative norm of (curv + d I) inverse v - v."""
    expected = cv.ravel(v)
    return float((cv.ravel(curv.damp(damping) @ (inverse @ v)) - expected).norm() / expected.norm())


def example_gradients(problem: Problem, params: Params, batch: Batch) -> Tensor:
    """The gradient of every example's loss, [N, P]."""

    def loss(params: Params, inputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(problem.model_fn(params, inputs), target)

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, *batch)
    return torch.func.vmap(cv.ravel)(per_example)


def hardest_right(logits: Tensor, targets: Tensor) -> int:
    """The least certain of the examples that are classified correctly."""
    certainty = logits.softmax(-1).gather(1, targets[:, None]).squeeze(1)
    return int(torch.where(logits.argmax(-1) == targets, certainty, torch.inf).argmin())


# --- the four parts: each measures, draws and returns its rows of the table -------------------------------------------


def matrices(figure: SubFigure, problem: Problem, curv: cv.BlockDiagonal, ggn: Tensor) -> Rows:
    """Part 1: KFAC against the exact GGN as matrices."""
    early = relative_errors(kfac(problem, problem.early), exact_ggn(problem, problem.early))
    late = relative_errors(curv, ggn)
    draw_matrices(figure, curv, ggn, late[0])
    names = ("KFAC error, diagonal blocks of the GGN", "KFAC error, whole GGN")
    return [(name, f"{a:.1%}", f"{b:.1%}") for name, a, b in zip(names, early, late, strict=True)]


def steps(figure: SubFigure, problem: Problem) -> Rows:
    """Part 2: natural-gradient steps against gradient steps, after one epoch."""
    loss = objective(problem.model_fn, problem.training)
    directions: dict[str, Callable[[Params, Params], Params]] = {
        "SGD": lambda _, gradient: gradient,
        "KFAC": lambda params, gradient: kfac(problem, params).inverse(DAMPING) @ gradient,
        "exact GGN": lambda params, gradient: solve(exact_ggn(problem, params), gradient),
    }
    paths = {name: descend(loss, problem.early, direction, name) for name, direction in directions.items()}
    draw_steps(figure, paths)
    return [(name, f"{losses[1]:.3f}", f"{losses[-1]:.3f}") for name, (_, losses) in paths.items()]


def inverses(figure: SubFigure, problem: Problem, curv: cv.BlockDiagonal, ggn: Tensor) -> Rows:
    """Part 3: the spectrum, and the exactness of the damped inverse."""
    dampings = torch.logspace(-6, 0, 13).tolist()
    v = cv.unravel(torch.randn(curv.domain.size), problem.trained)
    curv64, v64 = curv.to(dtype=torch.float64), {name: value.double() for name, value in v.items()}
    residuals = {
        "factored Tikhonov": [residual(curv, curv.inverse(cv.FactoredTikhonov(d)), d, v) for d in dampings],
        "exact, float32": [residual(curv, curv.inverse(d), d, v) for d in dampings],
        "exact, float64": [residual(curv64, curv64.inverse(d), d, v64) for d in dampings],
    }
    draw_inverses(figure, curv, ggn, dampings, residuals)
    return [(name, f"{values[0]:.1e}", f"{values[-1]:.1e}") for name, values in residuals.items()]


def influence(figure: SubFigure, problem: Problem, curv: cv.BlockDiagonal, ggn: Tensor) -> Rows:
    """Part 4: g_q^T (curv + damping)^-1 g_t, positive if training on image t lowers the loss of the test image q."""
    inputs, targets = problem.test
    logits = problem.model_fn(problem.trained, inputs)
    query = hardest_right(logits, targets)
    gradient = torch.func.grad(objective(problem.model_fn, (inputs[query, None], targets[query, None])))(
        problem.trained
    )
    gradients = example_gradients(problem, problem.trained, problem.training)
    scores = gradients @ cv.ravel(curv.inverse(DAMPING) @ gradient)
    exact = gradients @ cv.ravel(solve(ggn, gradient))
    title = f"test image: “{int(targets[query])}”, predicted with p = {float(logits[query].softmax(-1).max()):.2f}"
    draw_influence(figure, inputs[query], title, problem.training, scores)
    return [
        (
            "influence: correlation with exact GGN",
            "",
            f"{float(torch.corrcoef(torch.stack([scores, exact]))[0, 1]):.3f}",
        )
    ]


# --- drawing ----------------------------------------------------------------------------------------------------------


def heading(figure: SubFigure, title: str) -> None:
    """The title of a part."""
    figure.suptitle(title, x=18 / figure.bbox.width, ha="left", fontsize=14, fontweight="bold", color=EXACT)


def draw_matrices(figure: SubFigure, curv: cv.BlockDiagonal, ggn: Tensor, error: float) -> None:
    """Magnitudes of the GGN, of KFAC and of their difference, on one logarithmic scale."""
    heading(figure, "1   KFAC against the exact Gauss-Newton matrix")
    top, size = float(ggn.abs().max()), len(ggn)
    first, second = (block.domain.size for block in curv.blocks.values())
    pictures = {
        rf"exact GGN, ${size} \times {size}$": ggn,
        "KFAC: one Kronecker product a layer": curv.to_dense(),
        rf"$|$KFAC $-$ GGN$|$: error {error:.0%} in the diagonal blocks": curv.to_dense() - ggn,
    }
    axes = figure.subplots(1, 3)
    for ax, (title, matrix) in zip(axes, pictures.items(), strict=True):
        pooled = F.avg_pool2d(matrix.abs()[None], 2)[0].clamp(1e-4 * top, top)  # about one value a pixel
        norm = LogNorm(1e-4 * top, top)
        image = ax.imshow(pooled, norm=norm, cmap="magma", extent=(0, size, size, 0), interpolation="bilinear")
        ax.set_title(title)
        ax.set_xticks([first / 2, first + second / 2], ["layer 1", "layer 2"])
        ax.set_yticks([first / 2, first + second / 2], ["layer 1", "layer 2"], rotation=90, va="center")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.grid(False)
        ax.axhline(first, color="white", lw=1)
        ax.axvline(first, color="white", lw=1)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.012, aspect=30, extend="min")
    bar.outline.set_visible(False)
    bar.set_label("magnitude of an entry")


def draw_steps(figure: SubFigure, paths: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The loss along the first step, and over tuned steps."""
    heading(figure, "2   Natural-gradient steps")
    left, right = figure.subplots(1, 2)
    start = float(paths["SGD"][1][0])
    for (name, (line, losses)), color, style in zip(paths.items(), (SGD, KFAC, EXACT), ("-", "-", "--"), strict=True):
        best = line.argmin()
        left.plot(STEP_SIZES, line, color=color, ls=style)
        left.plot(STEP_SIZES[best], line[best], "o", color=color, ms=8)
        right.plot(losses, color=color, ls=style, marker="o", label=name)
    left.axhline(start, color=FAINT, lw=1, ls=":")
    left.text(STEP_SIZES[0], 1.02 * start, "start", color=FAINT, va="bottom")
    left.set(xscale="log", xlabel="step size", ylabel="training loss", title="loss along one step")
    left.set_ylim(0, 1.4 * start)
    right.set(yscale="log", xlabel="step, each of its best size", title="loss over steps")
    right.legend(loc="lower left")


def draw_inverses(
    figure: SubFigure, curv: cv.Operator, ggn: Tensor, dampings: list[float], residuals: dict[str, list[float]]
) -> None:
    """Spectra of KFAC and of the exact GGN, and residuals of damped inverses."""
    heading(figure, "3   Spectrum and damped inverse")
    left, right = figure.subplots(1, 2)
    ranks = range(1, len(ggn) + 1)
    left.plot(ranks, curv.eigenvalues().flip(0).clamp_min(1e-12), color=KFAC, label="KFAC")
    left.plot(
        ranks, torch.linalg.eigvalsh(ggn.double()).flip(0).clamp_min(1e-12), color=EXACT, ls="--", label="exact GGN"
    )
    left.axhline(DAMPING, color=FAINT, lw=1, ls=":")
    left.text(len(ggn), 1.3 * DAMPING, "damping", color=FAINT, ha="right", va="bottom")
    left.set(xscale="log", yscale="log", xlabel="rank", title="eigenvalues")
    left.set_ylim(1e-7, 10)
    left.legend(loc="lower left")
    for (name, values), color in zip(residuals.items(), (FAINT, KFAC, EXACT), strict=True):
        right.plot(dampings, values, color=color, marker="o")
        right.text(dampings[2], 3 * values[1], name, color=color, va="bottom")
    right.set(xscale="log", yscale="log", xlabel="damping $d$", title="residual of the inverse")
    right.set_ylabel(r"$\|(C + dI)\,(C + dI)^{-1}v - v\|\;/\;\|v\|$")
    right.set_ylim(1e-16, 1e2)


def draw_digit(ax: Axes, image: Tensor, title: str, color: str) -> None:
    """One digit in a coloured frame."""
    ax.imshow(image.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set(visible=True, color=color, linewidth=2)
    ax.set_title(title, color=color)


def draw_influence(figure: SubFigure, query: Tensor, title: str, training: Batch, scores: Tensor) -> None:
    """The test image, and the training images that help and harm it most."""
    heading(figure, "4   Influence of training images on a test image")
    inputs, targets = training
    order = scores.argsort(descending=True).tolist()
    grid = figure.add_gridspec(2, 8, width_ratios=(2.3, 0.3, 1, 1, 1, 1, 1, 1))
    draw_digit(figure.add_subplot(grid[:, 0]), query, title, EXACT)
    for row, (name, best, color) in enumerate(
        (("most helpful", order[:6], HELPFUL), ("most harmful", order[:-7:-1], HARMFUL))
    ):
        for column, index in enumerate(best):
            ax = figure.add_subplot(grid[row, 2 + column])
            draw_digit(ax, inputs[index], rf"“{int(targets[index])}”   ${float(scores[index]):+.0f}$", color)
            if column == 0:
                ax.set_ylabel(name, color=color, fontsize=12, fontweight="bold", labelpad=8)


# --- all of it --------------------------------------------------------------------------------------------------------


def show(rows: Rows) -> None:
    """Prints rows as an aligned table; a row without values is the heading of those that follow."""
    width = max(len(row[0]) for row in rows) + 2
    for name, first, second in rows:
        print(f"{name:<{width}}{first:>14}{second:>14}".rstrip())


def main() -> None:
    """Trains, measures, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where the figure goes")
    output: Path = parser.parse_args().output

    torch.set_num_threads(1)  # threads that wait for each other cost more than they save on matrices this small
    torch.manual_seed(0)
    problem = learn()
    curv, ggn = kfac(problem, problem.trained), exact_ggn(problem, problem.trained)
    loss = objective(problem.model_fn, problem.training)

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 14.4), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        top, middle, bottom = figure.subfigures(3, 1, height_ratios=(5.2, 4.2, 4.6))
        left, right = middle.subfigures(1, 2)
        rows = [
            (f"{curv.domain.size} parameters, {len(problem.training[0])} digits", "after 1 epoch", f"after {EPOCHS}"),
            ("training loss", f"{loss(problem.early):.3f}", f"{loss(problem.trained):.3f}"),
            ("test accuracy", f"{accuracy(problem, problem.early):.1%}", f"{accuracy(problem, problem.trained):.1%}"),
            *matrices(top, problem, curv, ggn),
            *influence(bottom, problem, curv, ggn),
            ("", "", ""),
            ("training loss after one epoch and ...", "1 step", f"{STEPS} steps"),
            *steps(left, problem),
            ("", "", ""),
            ("residual of the damped inverse", "d = 1e-6", "d = 1"),
            *inverses(right, problem, curv, ggn),
        ]
        figure.savefig(output, dpi=160)
    show(rows)
    print(f"\nfigure: {output}")


if __name__ == "__main__":
    main()
