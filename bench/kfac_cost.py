"""What KFAC costs, in units of one gradient of the same batch, beside curvlinops in the same run.

Every repetition draws a fresh batch and times each contender once, in a random order; the gradient
(`torch.autograd.grad` of the loss with respect to all parameters) is one of them. A contender's cost is the median of
its time divided by the gradient's in the same repetition. Memory is the peak that torch's allocator held during the
call, above what it held before, divided by the gradient's.

curvlinops supports linear and convolution layers only. On the GPT it is therefore given the parameters of linear
layers; curvlib is measured on all parameters and on the same subset.

    python bench/kfac_cost.py [--quick] [--json FILE] [--profile WORKLOAD:FISHER]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from curvlinops import KFACLinearOperator
from memory import peak_bytes
from models import Batch, Workload, workloads
from torch import Tensor, nn

import curvlib as cv

Run = Callable[[Batch], object]
SUPPORTED_BY_CURVLINOPS = (nn.Linear, nn.Conv2d)


class ClassesSecond(nn.Module):
    """Logits [N, T, C] as [N, C, T], as `torch.nn.CrossEntropyLoss` and curvlinops expect them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).movedim(-1, 1)


def gradient(module: nn.Module) -> Run:
    """One gradient of the loss with respect to all parameters."""
    parameters = list(module.parameters())

    def run(batch: Batch) -> object:
        outputs, targets = module(batch[0]), batch[1]
        return torch.autograd.grad(F.cross_entropy(outputs.flatten(0, -2), targets.flatten()), parameters)

    return run


def curvlib_kfac(
    module: nn.Module, names: set[str] | None, fisher: str, plan: cv.Plan | None, seed: int
) -> Callable[[Batch], cv.BlockDiagonal]:
    """KFAC by curvlib of the named parameters (None: all), with a plan made at each call or made before."""
    model_fn, params = cv.functional(module)
    if names is not None:
        everything, whole_fn = params, model_fn
        params = {name: everything[name] for name in names}
        frozen = {name: leaf for name, leaf in everything.items() if name not in names}

        def model_fn(params: Any, inputs: Any) -> Any:
            return whole_fn({**frozen, **params}, inputs)

    generator = torch.Generator().manual_seed(seed)
    return lambda batch: cv.kfac(
        model_fn, params, batch, loss=cv.CrossEntropy(), fisher=fisher, generator=generator, plan=plan
    )


def curvlinops_kfac(module: nn.Module, names: set[str], fisher: str, positions: int, seed: int) -> Run:
    """KFAC by curvlinops of the named parameters, told everything that it would otherwise pass over the data for."""
    wrapped = ClassesSecond(module) if positions > 1 else module
    parameters = [parameter for name, parameter in module.named_parameters() if name in names]

    def run(batch: Batch) -> object:
        operator = KFACLinearOperator(
            wrapped,
            nn.CrossEntropyLoss(),
            parameters,
            [batch],
            fisher_type=fisher,
            check_deterministic=False,
            separate_weight_and_bias=False,
            num_data=len(batch[0]),
            num_per_example_loss_terms=positions,
            seed=seed,
        )
        operator.compute_kronecker_factors()
        return operator

    return run


def supported_by_curvlinops(module: nn.Module) -> set[str]:
    """The names of the parameters that curvlinops takes."""
    return {
        f"{layer_name}.{name}"
        for layer_name, layer in module.named_modules()
        if isinstance(layer, SUPPORTED_BY_CURVLINOPS)
        for name, _ in layer.named_parameters()
    }


def contenders(workload: Workload, module: nn.Module, batch: Batch, seed: int) -> dict[str, Run]:
    """The gradient, and KFAC by either library and Fisher type."""
    model_fn, params = cv.functional(module)
    plan = cv.plan(model_fn, params, batch[0])
    supported = supported_by_curvlinops(module)
    partial = supported != set(params)
    runs: dict[str, Run] = {"gradient": gradient(module)}
    for fisher in workload.fishers:
        runs[f"{fisher} | curvlib"] = curvlib_kfac(module, None, fisher, None, seed)
        runs[f"{fisher} | curvlib, plan made before"] = curvlib_kfac(module, None, fisher, plan, seed)
        if partial:
            runs[f"{fisher} | curvlib, linear layers only"] = curvlib_kfac(module, supported, fisher, None, seed)
        label = "curvlinops, linear layers only" if partial else "curvlinops"
        runs[f"{fisher} | {label}"] = curvlinops_kfac(module, supported, fisher, workload.positions, seed)
    return runs


def measure(workload: Workload, repetitions: int, seed: int) -> dict[str, Any]:
    """Times [repetitions] and peak bytes of every contender, for one seed."""
    torch.manual_seed(seed)
    module, generator = workload.module(), torch.Generator().manual_seed(seed)
    order = random.Random(seed)
    runs = contenders(workload, module, workload.batch(generator), seed)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(workload.batch(generator))
    batch = workload.batch(generator)
    peaks = {name: peak_bytes(lambda run=run: run(batch)) for name, run in runs.items()}  # type: ignore[misc]
    for _ in range(repetitions):
        batch = workload.batch(generator)
        for name in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            result = runs[name](batch)
            times[name].append(time.perf_counter() - start)
            del result
    return {"seed": seed, "seconds": times, "peak_bytes": peaks}


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a contender, over all seeds and repetitions."""
    rows = []
    for name in results[0]["seconds"]:
        seconds = [t for result in results for t in result["seconds"][name]]
        units = [t for result in results for t in result["seconds"]["gradient"]]
        ratios = [t / unit for t, unit in zip(seconds, units, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        fisher, _, method = name.rpartition(" | ")
        rows.append(
            {
                "fisher": fisher,
                "method": method,
                "gradients": middle,
                "gradients_quartiles": [low, high],
                "gradients_by_minimum": min(seconds) / min(units),
                "seconds_median": statistics.median(seconds),
                "seconds_minimum": min(seconds),
                "memory": statistics.median(r["peak_bytes"][name] / r["peak_bytes"]["gradient"] for r in results),
                "peak_megabytes": statistics.median(r["peak_bytes"][name] for r in results) / 2**20,
            }
        )
    return rows


def table(workload: Workload, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{workload.name}: {workload.description}",
        "",
        "| Fisher | method | time / gradient (quartiles) | by minimum | median time | peak memory / gradient |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["gradients_quartiles"]
        lines.append(
            f"| {row['fisher']} | {row['method']} | {row['gradients']:.2f} ({low:.2f} - {high:.2f}) "
            f"| {row['gradients_by_minimum']:.2f} | {1e3 * row['seconds_median']:.1f} ms "
            f"| {row['memory']:.2f} ({row['peak_megabytes']:.1f} MiB) |"
        )
    return "\n".join(lines)


def profile(workload: Workload, fisher: str) -> str:
    """Where curvlib's time goes: torch's profiler over ten calls."""
    torch.manual_seed(0)
    module, generator = workload.module(), torch.Generator().manual_seed(0)
    run = curvlib_kfac(module, None, fisher, None, 0)
    run(workload.batch(generator))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(10):
            run(workload.batch(generator))
    return recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes and two repetitions, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--repetitions", type=int, default=15, help="repetitions a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="one workload: MLP, GPT or CNN")
    parser.add_argument("--profile", metavar="WORKLOAD:FISHER", help="print a profile of curvlib instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [w for w in workloads(quick=options.quick) if options.only in (None, w.name)]
    if options.profile:
        name, _, fisher = options.profile.partition(":")
        print(profile(next(w for w in chosen if w.name == name), fisher or "mc"))
        return
    seeds, repetitions = (1, 2) if options.quick else (options.seeds, options.repetitions)
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": options.threads,
        "dtype": "float32",
        "seeds": seeds,
        "repetitions": repetitions,
        "workloads": {},
    }
    for workload in chosen:
        results = [measure(workload, repetitions, seed) for seed in range(seeds)]
        rows = summarize(results)
        report["workloads"][workload.name] = {"description": workload.description, "rows": rows, "raw": results}
        print(table(workload, rows), end="\n\n", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
    main()
