"""What EKFAC and products with the exact GGN cost, in units of one gradient, beside other libraries in the same run.

EKFAC is measured beside curvlinops, products beside curvlinops and hessian-eigenthings, whose operators multiply one
vector at a time.

Timing is as in `kfac_cost`: interleaved repetitions in random order, each on a fresh batch, and medians of the ratio to
the seed's median gradient. EKFAC is factors, eigenbases and corrected eigenvalues. A product with the GGN is
timed without what is prepared once; for several vectors at once the time is per vector. Where an eigendecomposition
fails to converge, that repetition of that contender is left out, and said so.

    python bench/exact_cost.py [--quick] [--json FILE] [--only MLP]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from curvlinops import EKFACLinearOperator, GGNLinearOperator
from hessian_eigenthings import GGNOperator, supervised_forward, supervised_loss_of_output
from kfac_cost import ClassesSecond, gradient, supported_by_curvlinops
from models import Batch, Workload, workloads
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlib as cv

VECTORS = 16


class Flat(nn.Module):
    """Logits [N, T, C] as [N T, C]: curvlinops' EKFAC takes no others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).flatten(0, -2)


def ekfac_contenders(workload: Workload, module: nn.Module, seed: int) -> dict[str, Any]:
    """EKFAC by either library; curvlinops takes the parameters of linear and convolution layers only."""
    model_fn, params = cv.functional(module)
    supported = supported_by_curvlinops(module)
    wrapped = Flat(module)
    chosen = [parameter for name, parameter in module.named_parameters() if name in supported]

    def ours(batch: Batch) -> object:
        return cv.ekfac(model_fn, params, batch, loss=cv.CrossEntropy(), generator=torch.Generator().manual_seed(seed))

    def theirs(batch: Batch) -> object:
        inputs, targets = batch
        operator = EKFACLinearOperator(
            wrapped,
            nn.CrossEntropyLoss(),
            chosen,
            [(inputs, targets.flatten())],
            fisher_type="mc",
            check_deterministic=False,
            separate_weight_and_bias=False,
            num_data=len(inputs),
            num_per_example_loss_terms=workload.positions,
            seed=seed,
        )
        operator.compute_kronecker_factors()
        operator.compute_eigenvalue_correction()
        return operator

    return {"ekfac mc | curvlib": ours, "ekfac mc | curvlinops": theirs}


def ggn_contenders(workload: Workload, module: nn.Module, batch: Batch) -> dict[str, Any]:
    """Products with the exact GGN of one batch, for one vector and for several."""
    model_fn, params = cv.functional(module)
    ours = cv.ggn(model_fn, params, batch)
    wrapped = ClassesSecond(module) if workload.positions > 1 else module
    theirs = GGNLinearOperator(
        wrapped,
        nn.CrossEntropyLoss(),
        list(module.parameters()),
        [batch],
        check_deterministic=False,
        num_data=len(batch[0]),
    )
    others = GGNOperator(wrapped, [batch], supervised_forward, supervised_loss_of_output(nn.functional.cross_entropy))
    one = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    many = {name: torch.randn(VECTORS, *leaf.shape) for name, leaf in params.items()}
    flat = torch.cat([leaf.flatten() for leaf in one.values()])
    stack = torch.randn(len(flat), VECTORS)

    def product(vectors: Tensor) -> object:
        with sdpa_kernel(SDPBackend.MATH):  # the fast attention has no forward mode, which both need
            return theirs @ vectors

    def one_by_one(rows: Tensor) -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return [others @ row for row in rows]

    rows = stack.mT.contiguous()
    return {
        "GGN, 1 vector | curvlib": lambda _: ours @ one,
        "GGN, 1 vector | curvlinops": lambda _: product(flat),
        "GGN, 1 vector | hessian-eigenthings": lambda _: one_by_one(flat.unsqueeze(0)),
        f"GGN, {VECTORS} vectors, each | curvlib": lambda _: ours.matmat(many),
        f"GGN, {VECTORS} vectors, each | curvlinops": lambda _: product(stack),
        f"GGN, {VECTORS} vectors, each | hessian-eigenthings": lambda _: one_by_one(rows),
    }


def measure(workload: Workload, repetitions: int, seed: int) -> dict[str, list[float]]:
    """Seconds of every contender, and of the gradient."""
    torch.manual_seed(seed)
    module, generator = workload.module(), torch.Generator().manual_seed(seed)
    batch = workload.batch(generator)
    runs = {"gradient": gradient(module), **ekfac_contenders(workload, module, seed)}
    runs |= ggn_contenders(workload, module, batch)
    order, times = random.Random(seed), {name: [] for name in runs}
    for repetition in range(repetitions + 1):  # the first one is not counted
        batch = workload.batch(generator)
        for name in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            try:
                result = runs[name](batch)
            except torch.linalg.LinAlgError as error:  # an eigendecomposition that did not converge
                print(f"{name} failed: {error}")
                continue
            seconds = (time.perf_counter() - start) / (VECTORS if "vectors" in name else 1)
            del result
            if repetition:
                times[name].append(seconds)
    return times


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="one workload: MLP, GPT or CNN")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads, "workloads": {}}
    for workload in workloads(quick=options.quick):
        if options.only not in (None, workload.name):
            continue
        found = [measure(workload, options.repetitions, seed) for seed in range(options.seeds)]
        print(f"{workload.name}: {workload.description}\n")
        print("| what | time / gradient (quartiles) | median time |\n| --- | --- | --- |")
        rows = {}
        for name in found[0]:
            seconds = [t for times in found for t in times[name]]
            ratios = [t / statistics.median(times["gradient"]) for times in found for t in times[name]]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows[name] = {"gradients": middle, "quartiles": [low, high], "seconds": statistics.median(seconds)}
            print(f"| {name} | {middle:.2f} ({low:.2f} - {high:.2f}) | {1e3 * statistics.median(seconds):.1f} ms |")
        report["workloads"][workload.name] = rows
        print(flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
    main()
