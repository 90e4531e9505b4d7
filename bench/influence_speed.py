"""What EKFAC influence costs, beside kronfluence in the same run: fitting factors, then scores of all pairs.

Contenders take turns on the same data, network and batch sizes; a figure is the median of the repetitions, in seconds
of the processor on one thread. Both use the empirical Fisher matrix and a damping of a tenth of a layer's mean
eigenvalue, and their scores are compared. kronfluence writes its factors to files, as it always does.

The floors: for fitting, one forward and one backward pass over the data (torch.autograd.grad), without any factor; for
scores, the same pass, and Q x N x P multiplications as one matrix product [Q, P] [P, N].

The index is read by `Index.scores`, for as many bytes as it has, beside the sum of a tensor of as many bytes in memory,
and its product with as many vectors as there are queries.

    python bench/influence_speed.py [--only mlp gpt index] [--examples N] [--queries Q] [--repetitions 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from influence_peers import Kronfluence, linear_layers
from torch import Tensor, nn

import curvlib as cv

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from language_model import GPT

Batch = tuple[Tensor, Tensor]
DAMPING = cv.RelativeTikhonov(0.1)


def mlp(examples: int, queries: int) -> tuple[nn.Module, Batch, Batch]:
    """784-256-128-10, ReLU, on noise."""
    module = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def batch(n: int) -> Batch:
        return torch.randn(n, 784), torch.randint(10, (n,))

    return module, batch(examples), batch(queries)


def gpt(examples: int, queries: int) -> tuple[nn.Module, Batch, Batch]:
    """Two layers of width 64, sequences of 64 of 90 characters, on noise."""
    module = GPT(layers=2, width=64, heads=4, vocabulary=90, length=64)

    def batch(n: int) -> Batch:
        tokens = torch.randint(90, (n, 65))
        return tokens[:, :-1], tokens[:, 1:]

    return module, batch(examples), batch(queries)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Of the processor, and what was computed."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def over(batch: Batch, size: int) -> Any:
    """The examples in batches of a size."""
    return cv.over(list(zip(batch[0].split(size), batch[1].split(size), strict=True)))


def gradient_pass(module: nn.Module, batch: Batch, size: int) -> None:
    """One forward and one backward pass over the data."""
    parameters = list(module.parameters())
    for inputs, targets in zip(batch[0].split(size), batch[1].split(size), strict=True):
        loss = F.cross_entropy(module(inputs).flatten(0, -2), targets.flatten(), reduction="sum")
        torch.autograd.grad(loss, parameters)


def side_by_side(
    module: nn.Module, train: Batch, queries: Batch, size: int, query_size: int, repetitions: int
) -> dict[str, Any]:
    """Seconds of either library and of the floors."""
    model_fn, params = linear_layers(module)
    loss = cv.CrossEntropy("sum")
    known, asked = over(train, size), over(queries, query_size)
    width = sum(leaf.numel() for leaf in params.values())
    wide, long = torch.randn(len(queries[0]), width), torch.randn(width, min(len(train[0]), 1000))
    times: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        spent, found = seconds(lambda: run(*arguments, **options))
        times.setdefault(name, []).append(spent)
        return found

    for _ in range(repetitions + 1):
        timed("fit, floor", gradient_pass, module, train, size)
        curv = timed("fit, curvlib", cv.ekfac, model_fn, params, known, loss=loss, fisher="empirical")
        peer = Kronfluence(module, train, empirical=True, batch_size=size)
        timed("fit, kronfluence", peer.fit)
        inverse = curv.inverse(DAMPING)
        ours = timed("scores, curvlib", cv.influence.scores, inverse, model_fn, params, asked, known, loss=loss)
        theirs = timed("scores, kronfluence", peer.scores, queries, query_batch=query_size)
        timed("scores, floor: training pass", gradient_pass, module, train, size)
        timed("scores, floor: products", torch.matmul, wide, long)
        times["scores, floor: products"][-1] *= len(train[0]) / long.shape[1]
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first is for warming up
    return {
        "examples": len(train[0]),
        "queries": len(queries[0]),
        "batch": size,
        "query_batch": query_size,
        "parameters": width,
        "seconds": medians,
        "ratio_fit": medians["fit, kronfluence"] / medians["fit, curvlib"],
        "ratio_scores": medians["scores, kronfluence"] / medians["scores, curvlib"],
        "relative_difference_of_scores": float((len(train[0]) * ours - theirs).norm() / theirs.norm()),
    }


def index_bandwidth(examples: int, repetitions: int) -> dict[str, Any]:
    """Bytes of an index that `Index.scores` goes through in a second, beside a plain sum of as many."""
    module, train, asked = mlp(examples, 8)
    model_fn, params = cv.functional(module)
    part = train[0][:5000], train[1][:5000]
    curv = cv.kfac(model_fn, params, part, fisher="empirical")
    projection = curv.power(-0.5, cv.FactoredTikhonov(0.1, relative=True)).project(cv.sketch(params, rank=32))
    sketches = projection(cv.per_example_gradients(model_fn, params, asked))
    size = cv.influence.estimate_size(projection, examples)
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        spent, index = seconds(lambda: cv.influence.build(f"{folder}/index", projection, model_fn, params, train))
        plain = torch.randn(examples, size // 4 // examples)
        for _ in range(repetitions + 1):
            speeds.setdefault("sum", []).append(size / seconds(plain.sum)[0])
            for count in (1, 8):
                vectors = torch.randn(count, plain.shape[1])
                speed = size / seconds(lambda vectors=vectors: vectors @ plain.mT)[0]
                speeds.setdefault(f"product of {count} vectors and a matrix in memory", []).append(speed)
                some = {name: found[:count] for name, found in sketches.items()}
                speed = size / seconds(lambda some=some: index.scores(some))[0]
                speeds.setdefault(f"scores of {count} queries", []).append(speed)
    medians = {f"{name}, GB a second": statistics.median(found[1:]) / 1e9 for name, found in speeds.items()}
    return {"examples": examples, "bytes": size, "build_seconds": spent, **medians}


def main() -> None:
    """Measures, prints and writes figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("mlp", "gpt", "index"), default=("mlp", "gpt", "index"))
    parser.add_argument("--examples", type=int, help="default: 10000 (mlp), 1000 (gpt), 40000 (index)")
    parser.add_argument("--queries", type=int, help="default: 500 (mlp), 50 (gpt)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    if "mlp" in options.only:
        problem = mlp(options.examples or 10000, options.queries or 500)
        results["mlp"] = side_by_side(*problem, 500, 100, options.repetitions)
    if "gpt" in options.only:
        problem = gpt(options.examples or 1000, options.queries or 50)
        results["gpt"] = side_by_side(*problem, 50, 10, options.repetitions)
    if "index" in options.only:
        results["index"] = index_bandwidth(options.examples or 40000, options.repetitions)
    for name, found in results.items():
        print(f"\n{name}")
        for key, value in found.items():
            if isinstance(value, dict):
                for line, spent in value.items():
                    print(f"  {line}: {spent:.3f} s")
            else:
                print(f"  {key}: {value:.4g}")
    if options.json:
        about = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1, "dtype": "float32"}
        options.json.write_text(json.dumps({**about, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
