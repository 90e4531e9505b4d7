"""How well sketches recall exact influence scores: Spearman's correlation over training examples, query by query.

A perceptron on images and a small GPT on Shakespeare are trained; p is the rank of the sketch of a side, at most the
side's width. Random sketches are folded into the inverse square root of KFAC with factored damping, and are compared
with exact scores of the same operator; eigen-coordinates are those of KFAC, and of EKFAC with its own exact scores.
Sizes are numbers kept for an example, in units of the number of parameters.

    python bench/influence_sketch.py [--data ROOT] [--seeds 3] [--json FILE]

ROOT is where the Debian package dataset-fashion-mnist was unpacked; without it: digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from influence import FACTORED, RELATIVE, Problem, ekfac, exact, kfac, sketches
from influence_data import Data, Training, load, passages
from torch import Tensor

import curvlib as cv
from curvlib.influence.ranks import spearman

RANKS = (16, 32, 64, 128)


class Kind(NamedTuple):
    """A column of the table."""

    estimate: Callable[..., Any]
    damping: Any
    compressor: Callable[[Any, int], Any]


def random(params: Any, rank: int, kind: str) -> Any:
    """A random sketch of every side."""
    return cv.sketch(params, rank=rank, kind=kind)


def eigen(params: Any, rank: int) -> Any:
    """Leading eigen-coordinates."""
    return cv.EigenSketch(rank=rank)


KINDS = {
    "Rademacher, KFAC": Kind(kfac, FACTORED, partial(random, kind="rademacher")),
    "orthogonal, KFAC": Kind(kfac, FACTORED, partial(random, kind="orthogonal")),
    "eigen, KFAC": Kind(kfac, RELATIVE, eigen),
    "eigen, EKFAC": Kind(ekfac, RELATIVE, eigen),
}


def measure(data: Data, training: Training, seed: int) -> dict[str, Any]:
    """Correlations by kind and rank, and sizes by rank, for one trained network."""
    everything = torch.ones(1, len(data.train[0]), dtype=torch.bool)
    module = data.module()
    module.load_state_dict({name: leaf[0] for name, leaf in training.fit(data, everything, seed).items()})
    problem = Problem(module, data.train, data.queries)
    params = problem.model[1]
    found: dict[str, Any] = {"size": {}}
    for name, kind in KINDS.items():
        truth = exact(problem, kind.estimate, kind.damping)
        root = kind.estimate(*problem.model, problem.train).power(-0.5, kind.damping)
        found[name] = {}
        for rank in RANKS:
            asked, known = sketches(problem, root.project(kind.compressor(params, rank)))
            found[name][rank] = float(spearman(asked @ known.mT, truth).mean())
            found["size"][rank] = known.shape[1] / cv.ravel(params).numel()
            print(f"{data.name}, seed {seed}: {name}, p = {rank}: {found[name][rank]:.3f}", flush=True)
    return found


def table(seeds: list[dict[str, Any]]) -> str:
    """Markdown: medians over seeds."""

    def median(values: Tensor) -> str:
        return f"{statistics.median(values.tolist()):.3f}"

    lines = [f"| p a side | size | {' | '.join(KINDS)} |", f"|{'---|' * (2 + len(KINDS))}"]
    for rank in RANKS:
        cells = [median(torch.tensor([seed[name][rank] for seed in seeds])) for name in ("size", *KINDS)]
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints tables, and writes figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="ROOT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    text = passages(options.examples, options.queries, length=64, width=128)
    problems = (
        (load(options.data, options.examples, options.queries), Training()),
        (text, Training(10, 32, 3e-3, 0.1, adam=True)),
    )
    report = {}
    for data, training in problems:
        report[data.name] = [measure(data, training, seed) for seed in range(options.seeds)]
        print(f"\n{data.name}, medians over {options.seeds} seeds\n\n{table(report[data.name])}\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
