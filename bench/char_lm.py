"""How fast optimizers learn: a character-level GPT on Shakespeare, each with its own best learning rate.

Every optimizer is tried with the same learning rates, on one seed; its best is run on the other seeds. The schedule
(linear warmup over a twentieth, cosine to a tenth), weight decay, data order and initial weights are the same for all.
Reported are the final validation loss (median and range over seeds), the first step at which the validation loss is at
or below AdamW's final one (median), and the time to it with the optimizer's own seconds a step, the model's included.

Each run is stored when it ends, so that an interrupted benchmark goes on where it stopped.

    python bench/char_lm.py --runs outputs/char_lm.jsonl [--workers 2] [--steps 500] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import curvlib as cv

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from language_model import GPT, shakespeare, windows

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 4, 128, 4, 64, 12  # nanoGPT's size for a CPU
RATES = (1e-3, 1.8e-3, 3e-3, 5.6e-3, 1e-2, 1.8e-2, 3e-2)
DECAY = 0.1
CHECKS = 50  # validation losses in a run

Make = Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.95), weight_decay=DECAY),
    "SOAP": lambda p, lr: cv.optim.torch.SOAP(p, lr=lr, weight_decay=DECAY),
    "KL-Shampoo": lambda p, lr: cv.optim.torch.KLShampoo(p, lr=lr, weight_decay=DECAY),
    "DyKAF": lambda p, lr: cv.optim.torch.DyKAF(p, lr=lr, weight_decay=DECAY),
    "DyKAF, rank-1 moment": lambda p, lr: cv.optim.torch.DyKAF(p, lr=lr, weight_decay=DECAY, second_moment="rank-1"),
    "Shampoo, grafted": lambda p, lr: cv.optim.torch.Shampoo(p, lr=lr, weight_decay=DECAY),
}


class Job(NamedTuple):
    """One run."""

    optimizer: str
    rate: float
    seed: int
    steps: int


def learn(job: Job) -> dict[str, Any]:
    """Trains once; the validation losses are of one fixed sample."""
    torch.set_num_threads(1)
    text = shakespeare()
    torch.manual_seed(job.seed)
    model = GPT(LAYERS, WIDTH, HEADS, len(text.characters), LENGTH)
    optimizer = OPTIMIZERS[job.optimizer](list(model.parameters()), job.rate)
    schedule = cv.optim.warmup_cosine(job.rate, warmup=job.steps // 20, total=job.steps, final=job.rate / 10)
    source = torch.Generator().manual_seed(job.seed)
    checked = windows(text.validation, 256, LENGTH, torch.Generator().manual_seed(0))
    validation: list[tuple[int, float]] = []
    seconds = 0.0
    for step in range(1, job.steps + 1):
        inputs, targets = windows(text.train, BATCH, LENGTH, source)
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        if step % max(1, job.steps // CHECKS) == 0:
            with torch.no_grad():
                loss = F.cross_entropy(model(checked[0]).flatten(0, 1), checked[1].flatten())
            validation.append((step, float(loss)))
    return {**job._asdict(), "validation": validation, "seconds_a_step": seconds / job.steps}


def run_all(jobs: list[Job], done: dict[Job, dict[str, Any]], file: Path, workers: int) -> None:
    """Runs the jobs that are not done, and appends each result to the file."""
    pending = [job for job in jobs if job not in done]
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        ProcessPoolExecutor(workers) as pool,
        tqdm(pool.map(learn, pending), total=len(pending), disable=None) as found,
    ):
        for job, result in zip(pending, found, strict=True):
            done[job] = result
            with file.open("a") as stream:
                stream.write(json.dumps(result) + "\n")


def stored(file: Path) -> dict[Job, dict[str, Any]]:
    """The runs in a file; a last line that was cut off is left out."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.endswith("}"):
            result = json.loads(line)
            found[Job(*(result[name] for name in Job._fields))] = result
    return found


def final(result: dict[str, Any]) -> float:
    """The last validation loss."""
    return float(result["validation"][-1][1])


def first_at(result: dict[str, Any], goal: float) -> int | None:
    """The first step at which the validation loss is at the goal or below."""
    return next((step for step, loss in result["validation"] if loss <= goal), None)


def summarize(done: dict[Job, dict[str, Any]], best: dict[str, float], seeds: int, steps: int) -> list[dict[str, Any]]:
    """One row an optimizer."""
    runs = {name: [done[Job(name, best[name], seed, steps)] for seed in range(seeds)] for name in best}
    goals = [final(run) for run in runs["AdamW"]]
    unit = statistics.median(run["seconds_a_step"] for run in runs["AdamW"])
    rows = []
    for name, results in runs.items():
        losses = sorted(map(final, results))
        reached = [first_at(run, goal) for run, goal in zip(results, goals, strict=True)]
        count = statistics.median(steps + 1 if step is None else step for step in reached)
        cost = statistics.median(run["seconds_a_step"] for run in results) / unit
        rows.append(
            {
                "optimizer": name,
                "learning_rate": best[name],
                "by_learning_rate": {str(rate): final(done[Job(name, rate, 0, steps)]) for rate in RATES},
                "final_loss": statistics.median(losses),
                "range": [losses[0], losses[-1]],
                "steps_to_adamw": None if count > steps else count / steps,
                "time_to_adamw": None if count > steps else cost * count / steps,
                "time_a_step": cost,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| optimizer | learning rate | final validation loss (range) | steps to AdamW's | time to it | step time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        reached = [f"{100 * row[key]:.0f} %" if row[key] else "never" for key in ("steps_to_adamw", "time_to_adamw")]
        low, high = row["range"]
        lines.append(
            f"| {row['optimizer']} | {row['learning_rate']:g} | {row['final_loss']:.4f} ({low:.4f} - {high:.4f}) "
            f"| {reached[0]} | {reached[1]} | {row['time_a_step']:.2f} |"
        )
    return "\n".join(lines)


def draw(done: dict[Job, dict[str, Any]], best: dict[str, float], steps: int, path: Path) -> None:
    """Validation losses over steps, for the best learning rates."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="validation loss, nats a character", ylim=(None, 3.0))
    for name, rate in best.items():
        axes.plot(*zip(*done[Job(name, rate, 0, steps)]["validation"], strict=True), label=f"{name}, {rate:g}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/char_lm.jsonl"), help="where runs are stored")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="file for the curves")
    options = parser.parse_args()
    names = list(dict.fromkeys(["AdamW", *options.optimizers]))
    done = stored(options.runs)
    run_all(
        [Job(n, r, 0, options.steps) for n, r in itertools.product(names, RATES)], done, options.runs, options.workers
    )
    best = {n: min(RATES, key=lambda rate, n=n: final(done[Job(n, rate, 0, options.steps)])) for n in names}
    again = [Job(n, best[n], seed, options.steps) for seed in range(1, options.seeds) for n in names]
    run_all(again, done, options.runs, options.workers)
    rows = summarize(done, best, options.seeds, options.steps)
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "steps": options.steps, "rows": rows}, indent=1)
        )
    if options.plot:
        draw(done, best, options.steps, options.plot)


if __name__ == "__main__":
    main()
