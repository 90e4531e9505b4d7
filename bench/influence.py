"""How well influence scores predict training again: the linear datamodeling score (LDS) of every method.

For each seed a network is trained, and many more from other initial weights on random halves of its data, all at
once. LDS is Spearman's correlation, over the halves, of minus the sum of a half's scores and the loss of a query after
training on it, averaged over queries. The third column is Spearman's correlation over training examples with the scores
that a sketch, or another library, stands for. TRAK's margin is a decreasing function of the loss: ranks tell the same.
With --text, the network is a small GPT, and examples are passages of Shakespeare.

Everything is run on one thread, and seconds are those of the processor: for curvature and scores together.

    python bench/influence.py [--data ROOT | --text] [--seeds 3] [--subsets 100] [--queries 200] [--no-peers]
                               [--json FILE]

ROOT is where the Debian package dataset-fashion-mnist was unpacked ("/" if it is installed); without it: digits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import influence_peers as peers
import torch
from influence_data import Data, Training, accuracy, load, passages, query_losses
from models import Batch
from torch import Tensor, nn

import curvlib as cv
from curvlib.influence import evaluate
from curvlib.influence.ranks import spearman

DAMPING = 0.1
RANKS = {"images": (16, 32, 64), "text": (16, 32, 64, 128)}
TRAINING = {"images": Training(), "text": Training(30, 32, 3e-3, 0.1, adam=True)}


class Problem(NamedTuple):
    """A trained network, its data and questions."""

    module: nn.Module
    train: Batch
    queries: Batch

    @property
    def model(self) -> tuple[Any, Any]:
        """The network as a function, and its parameters."""
        return cv.functional(self.module)

    def scores(self, inverse: Any) -> Tensor:
        """Exact scores [Q, N]."""
        return cv.influence.scores(inverse, *self.model, self.queries, self.train)


Estimate = Callable[..., Any]
Method = Callable[[Problem], Tensor]


def of_model(estimator: Estimate) -> Estimate:
    """An estimator with the exact Fisher matrix of a batch of images; for text, with four draws an example."""

    def estimate(model_fn: Any, params: Any, batch: Batch) -> Any:
        options: dict[str, Any] = {"fisher": "type-2"} if batch[1].ndim == 1 else {"fisher": "mc", "mc_samples": 4}
        return estimator(model_fn, params, batch, **options)

    return estimate


kfac, ekfac, diagonal = of_model(cv.kfac), of_model(cv.ekfac), of_model(cv.diagonal)
shampoo: Estimate = partial(cv.shampoo, per_example=True, squared=True)
RELATIVE, FACTORED = cv.RelativeTikhonov(DAMPING), cv.FactoredTikhonov(DAMPING, relative=True)


def corrected_shampoo(model_fn: Any, params: Any, batch: Batch) -> Any:
    """Shampoo's eigenbasis with the eigenvalues of per-example gradients."""
    curv = shampoo(model_fn, params, batch)
    return cv.eigenvalue_correct(curv, model_fn, params, batch, fisher="empirical")


def flat(model_fn: Any, params: Any, batch: Batch) -> Any:
    """No curvature: the identity, as a Kronecker product."""
    return kfac(model_fn, params, batch).power(0.0)


def exact(problem: Problem, estimate: Estimate, damping: Any) -> Tensor:
    """Scores of a damped inverse."""
    return problem.scores(estimate(*problem.model, problem.train).inverse(damping))


def of_linear_layers(problem: Problem) -> Tensor:
    """EKFAC of what other libraries attribute."""
    model_fn, params = peers.linear_layers(problem.module)
    inverse = cv.ekfac(model_fn, params, problem.train, fisher="empirical").inverse(RELATIVE)
    return cv.influence.scores(inverse, model_fn, params, problem.queries, problem.train)


def without_curvature(problem: Problem) -> Tensor:
    """Dot products of gradients."""
    return problem.scores(flat(*problem.model, problem.train))


def mean_damping(problem: Problem, relative: float = DAMPING) -> float:
    """A multiple of the GGN's mean eigenvalue, from its diagonal."""
    model_fn, params = problem.model
    return relative * float(diagonal(model_fn, params, problem.train).trace()) / cv.ravel(params).numel()


def dense_ggn(problem: Problem, relative: float = DAMPING) -> Tensor:
    """The whole GGN as a matrix, by its Cholesky factor."""
    model_fn, params = problem.model
    blocks = {"all": tuple(sorted(params))}
    whole = cv.block_diagonal(cv.ggn(model_fn, params, problem.train), blocks, max_rows=1 << 14).to_dense()
    whole.diagonal().add_(mean_damping(problem, relative))
    factor = torch.linalg.cholesky(whole)
    return problem.scores(lambda v: cv.unravel(torch.cholesky_solve(cv.ravel(v).unsqueeze(1), factor).squeeze(1), v))


def iterated_ggn(problem: Problem) -> Tensor:
    """The whole GGN by conjugate gradients, all queries at once, with EKFAC's inverse as preconditioner."""
    model_fn, params = problem.model
    strength = mean_damping(problem)
    rough = ekfac(model_fn, params, problem.train).inverse(strength)
    curv = cv.ggn(model_fn, params, problem.train)
    return problem.scores(curv.inverse(strength, solver=cv.CG(rough, tolerance=0.1)))


def sketched(problem: Problem, estimate: Estimate, damping: Any, compressor: Callable[[Any], Any]) -> Tensor:
    """Inner products of sketches of the root of a damped inverse."""
    model_fn, params = problem.model
    root = estimate(model_fn, params, problem.train).power(-0.5, damping)
    asked, known = sketches(problem, root.project(compressor(params)))
    return asked @ known.mT


def projected_gram(problem: Problem, compressor: Callable[[Any], Any]) -> Tensor:
    """TRAK without its weights: gradients are projected first, and the curvature is the Gram matrix of projections."""
    model_fn, params = problem.model
    asked, known = sketches(problem, flat(model_fn, params, problem.train).project(compressor(params)))
    inner = known @ known.mT / len(known)  # (F^T F + d)^-1 F^T = F^T (F F^T + d)^-1, and examples are fewer
    inner.diagonal().add_(DAMPING * inner.trace() / known.shape[1])
    return torch.linalg.solve(inner, asked @ known.mT, left=False)


def sketches(problem: Problem, projection: cv.Projection) -> tuple[Tensor, Tensor]:
    """Sketches of queries [Q, p] and of training examples [N, p], blocks side by side."""

    def rows(batch: Batch) -> Tensor:
        found = projection(cv.per_example_gradients(*problem.model, batch))
        return torch.cat([found[name].flatten(1) for name in sorted(found)], 1)

    return rows(problem.queries), rows(problem.train)


def kronfluence(problem: Problem, *, empirical: bool) -> Tensor:
    """EKFAC by kronfluence, with its relative damping of 0.1."""
    torch.manual_seed(0)
    fitted = peers.Kronfluence(problem.module, problem.train, empirical=empirical)
    fitted.fit()
    return fitted.scores(problem.queries)


def random_sketch(params: Any, rank: int) -> Any:
    """Orthonormal rows, scaled; a side that is not wider than the rank is kept."""
    return cv.sketch(params, rank=rank, kind="orthogonal")


def eigen_sketch(params: Any, rank: int) -> Any:
    """Leading eigenvectors of the curvature's sides."""
    return cv.EigenSketch(rank=rank)


class Row(NamedTuple):
    """A line of the table; `of` is the method that a sketch stands for."""

    method: Method
    of: str | None = None


def methods(kind: str, with_peers: bool) -> dict[str, Row]:
    """Every method by its name, for images or text."""
    rows = {
        "KFAC": Row(partial(exact, estimate=kfac, damping=RELATIVE)),
        "KFAC, factored damping": Row(partial(exact, estimate=kfac, damping=FACTORED)),
        "EKFAC": Row(partial(exact, estimate=ekfac, damping=RELATIVE)),
        "EKFAC, empirical": Row(partial(exact, estimate=partial(cv.ekfac, fisher="empirical"), damping=RELATIVE)),
        "EKFAC, empirical, linear layers": Row(of_linear_layers),
        "TKFAC": Row(partial(exact, estimate=of_model(cv.tkfac), damping=RELATIVE)),
        "Shampoo squared, empirical": Row(partial(exact, estimate=shampoo, damping=RELATIVE)),
        "Shampoo, eigenvalues corrected, empirical": Row(partial(exact, estimate=corrected_shampoo, damping=RELATIVE)),
        "DyKAF, empirical": Row(partial(exact, estimate=partial(cv.dykaf, per_example=True), damping=RELATIVE)),
        "diagonal": Row(partial(exact, estimate=diagonal, damping=RELATIVE)),
        "GGN": Row(dense_ggn if kind == "images" else iterated_ggn),
        "identity": Row(without_curvature),
    }
    for strength in (0.01, 1.0):
        relative = cv.RelativeTikhonov(strength)
        rows[f"KFAC, damping {strength:g}"] = Row(partial(exact, estimate=kfac, damping=relative))
        rows[f"EKFAC, damping {strength:g}"] = Row(partial(exact, estimate=ekfac, damping=relative))
    for p in RANKS[kind]:
        random, eigen = partial(random_sketch, rank=p), partial(eigen_sketch, rank=p)
        rows |= {
            f"eigen sketch of EKFAC, p = {p}": Row(
                partial(sketched, estimate=ekfac, damping=RELATIVE, compressor=eigen), "EKFAC"
            ),
            f"eigen sketch of KFAC, p = {p}": Row(
                partial(sketched, estimate=kfac, damping=RELATIVE, compressor=eigen), "KFAC"
            ),
            f"random sketch of KFAC, p = {p}": Row(
                partial(sketched, estimate=kfac, damping=FACTORED, compressor=random), "KFAC, factored damping"
            ),
            f"random sketch of gradients, p = {p}": Row(
                partial(sketched, estimate=flat, damping=cv.FactoredTikhonov(0.0), compressor=random), "identity"
            ),
            f"projected Gram matrix, p = {p}": Row(partial(projected_gram, compressor=random)),
        }
    if kind == "images":
        rows["GGN, conjugate gradients"] = Row(iterated_ggn, "GGN")
        for strength in (1.0, 10.0):
            rows[f"GGN, damping {strength:g}"] = Row(partial(dense_ggn, relative=strength))
    if with_peers:
        rows |= {
            "kronfluence EKFAC": Row(partial(kronfluence, empirical=False)),
            "kronfluence EKFAC, empirical": Row(
                partial(kronfluence, empirical=True), "EKFAC, empirical, linear layers"
            ),
            "dattri TRAK, 64 dimensions": Row(lambda p: peers.dattri_trak(*p, 64)),
            "dattri TRAK, 512 dimensions": Row(lambda p: peers.dattri_trak(*p, 512)),
        }
    if with_peers and kind == "images":  # dattri's EKFAC is for sequences of linear layers
        rows["dattri EKFAC, empirical"] = Row(lambda p: peers.dattri_ekfac(*p, DAMPING), "EKFAC, empirical")
    return rows


def measure(data: Data, training: Training, subsets: Tensor, rows: dict[str, Row], seed: int) -> dict[str, Any]:
    """LDS, agreement with what a sketch stands for, and seconds of every method; for one seed."""
    everything = torch.ones(1, subsets.shape[1], dtype=torch.bool)
    trained = training.fit(data, everything, 2 * seed)
    again = training.fit(data, subsets, 2 * seed + 1)
    outputs = query_losses(data, again)
    module = data.module()
    module.load_state_dict({name: leaf[0] for name, leaf in trained.items()})
    problem, found = Problem(module, data.train, data.queries), {}
    result: dict[str, Any] = {"accuracy": accuracy(data, trained), "accuracy_of_halves": accuracy(data, again)}
    for name, row in rows.items():
        start = time.process_time()
        found[name] = row.method(problem)
        seconds = time.process_time() - start
        score = float(evaluate.linear_datamodeling_score(found[name], subsets, outputs).mean)
        agreement = None if row.of is None else float(spearman(found[name], found[row.of]).mean())
        result[name] = {"lds": score, "agreement": agreement, "seconds": seconds}
        print(f"seed {seed}: {name}: LDS {score:.3f}, {seconds:.2f} s", flush=True)
    return result


def summary(values: list[Any]) -> str:
    """Median and range, or nothing."""
    if None in values:
        return ""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(rows: dict[str, Row], seeds: list[dict[str, Any]]) -> str:
    """Markdown: median and range over seeds."""
    lines = ["| method | LDS | rank correlation with what it stands for | seconds |", "|---|---|---|---|"]
    for name in rows:
        lds, agreement, seconds = ([seed[name][key] for seed in seeds] for key in ("lds", "agreement", "seconds"))
        lines.append(f"| {name} | {summary(lds)} | {summary(agreement)} | {statistics.median(seconds):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, and writes figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="ROOT")
    parser.add_argument("--text", action="store_true", help="passages of Shakespeare in place of images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    kind = "text" if options.text else "images"
    data = (
        passages(options.examples, options.queries)
        if options.text
        else load(options.data, options.examples, options.queries)
    )
    training, rows = TRAINING[kind], methods(kind, not options.no_peers)
    subsets = evaluate.subsets(options.examples, number=options.subsets)
    seeds: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        seeds.append(measure(data, training, subsets, rows, seed))
        if options.json:
            versions = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1}
            settings = {"data": data.name, "training": vars(training), "damping": DAMPING, "dtype": "float32"}
            settings |= {"examples": options.examples, "queries": options.queries, "subsets": options.subsets}
            options.json.write_text(json.dumps({**versions, **settings, "seeds": seeds}, indent=1) + "\n")
    print(f"\n{data.name}, {options.examples} examples, {options.queries} queries, {options.subsets} halves,", end=" ")
    print(f"{options.seeds} seeds: median (range); accuracy {summary([seed['accuracy'] for seed in seeds])}\n")
    print(table(rows, seeds))


if __name__ == "__main__":
    main()
