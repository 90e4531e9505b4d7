"""What one step of an optimizer costs, beside other implementations of SOAP in the same run.

Two GPTs: 4 layers of width 192, and 8 layers of width 512. A measurement is ten steps on fresh random gradients, with
one refresh of the eigenbases among them; contenders take turns in a random order. Times are per step, as medians and
quartiles, and in units of `torch.optim.AdamW` (foreach). State memory is that of all tensors an optimizer holds besides
parameters and gradients, in units of Adam's two moments.

The reference implementation (github.com/nikhilvyas/SOAP) is no package: give the path of its soap.py to include it.

    python bench/optimizer_step.py [--reference soap.py] [--quick] [--json FILE] [--threads 2]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
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
from models import GPT
from torch import Tensor, nn

import curvlib as cv

STEPS = 10  # a measurement; bases are refreshed once in so many
SIZES = {"GPT 4 x 192": (4, 192, 6, 65, 128), "GPT 8 x 512": (8, 512, 8, 65, 256)}
QUICK = {"GPT 1 x 32": (1, 32, 2, 65, 16)}

Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def makers(reference: Path | None) -> dict[str, Maker]:
    """Every contender, by name."""
    import heavyball
    import pytorch_optimizer

    heavyball.utils.compile_mode = "default"  # its own default tries out kernels for many minutes
    found: dict[str, Maker] = {
        "AdamW (torch, foreach)": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        "SOAP (curvlib)": lambda p: cv.optim.torch.SOAP(p, lr=1e-3),
        "SOAP, hadamard (curvlib)": lambda p: cv.optim.torch.SOAP(p, lr=1e-3, transport="hadamard"),
        "DyKAF (curvlib)": lambda p: cv.optim.torch.DyKAF(p, lr=1e-3),
        "DyKAF, rank-1 moment (curvlib)": lambda p: cv.optim.torch.DyKAF(p, lr=1e-3, second_moment="rank-1"),
        "KL-Shampoo (curvlib)": lambda p: cv.optim.torch.KLShampoo(p, lr=1e-3),
        "Shampoo (curvlib)": lambda p: cv.optim.torch.Shampoo(p, lr=1e-3),
        "SOAP (pytorch-optimizer 4.1.0)": lambda p: pytorch_optimizer.SOAP(p, lr=1e-3, precondition_frequency=STEPS),
        "SOAP (heavyball 3.2.1)": lambda p: heavyball.SOAP(
            p,
            lr=1e-3,
            precondition_frequency=STEPS,
            use_precond_schedule=False,
            max_precond_dim=10_000,
            merge_dims=False,
        ),
    }
    if reference is not None:
        spec = importlib.util.spec_from_file_location("soap_reference", reference)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found["SOAP (reference)"] = lambda p: module.SOAP(p, lr=1e-3, precondition_frequency=STEPS)
    return found


class Contender:
    """An optimizer and the parameters it moves."""

    def __init__(self, maker: Maker, model: nn.Module, seed: int) -> None:
        self.params = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        self.optimizer = maker(self.params)
        self.source = torch.Generator().manual_seed(seed)

    def measure(self) -> float:
        """Seconds a step, over one period of refreshes."""
        total = 0.0
        for _ in range(STEPS):
            for p in self.params:
                p.grad = 1e-2 * torch.randn(p.shape, generator=self.source)
            start = time.perf_counter()
            self.optimizer.step()
            total += time.perf_counter() - start
        return total / STEPS

    def state_bytes(self) -> int:
        """Bytes of all tensors that the optimizer holds, each storage once."""
        known = {p.untyped_storage().data_ptr() for p in self.params}
        known |= {p.grad.untyped_storage().data_ptr() for p in self.params if p.grad is not None}
        storages: dict[int, int] = {}
        pending: list[Any] = [dict(self.optimizer.state)]
        seen: set[int] = set()
        while pending:
            item = pending.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                storage = item.untyped_storage()
                if storage.data_ptr() not in known:
                    storages[storage.data_ptr()] = storage.nbytes()
            elif isinstance(item, dict):
                pending += item.values()
            elif isinstance(item, (list, tuple, set)):
                pending += item
            elif hasattr(item, "__dict__"):
                pending += vars(item).values()
        return sum(storages.values())


def run(size: tuple[int, ...], contenders: dict[str, Maker], repetitions: int, seeds: int) -> list[dict[str, Any]]:
    """One row a contender."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, float] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = GPT(*size)
        adam = 8 * sum(p.numel() for p in model.parameters())
        ready = {name: Contender(maker, model, seed) for name, maker in contenders.items()}
        for name, contender in ready.items():
            for _ in range(2):
                contender.measure()
            memory[name] = contender.state_bytes() / adam
        order = random.Random(seed)
        for _ in range(repetitions):
            for name in order.sample(list(ready), len(ready)):
                gc.collect()
                seconds[name].append(ready[name].measure())
    unit = statistics.median(seconds["AdamW (torch, foreach)"])
    rows = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        rows.append(
            {
                "optimizer": name,
                "milliseconds": 1e3 * middle,
                "quartiles": [1e3 * low, 1e3 * high],
                "adamw_steps": middle / unit,
                "state_memory": memory[name],
            }
        )
    return rows


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{name}",
        "",
        "| optimizer | ms a step (quartiles) | in steps of AdamW | state / Adam's |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['optimizer']} | {row['milliseconds']:.1f} ({low:.1f} - {high:.1f}) "
            f"| {row['adamw_steps']:.1f} | {row['state_memory']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="path of the reference's soap.py")
    parser.add_argument("--quick", action="store_true", help="a toy size and two repetitions, to see that it runs")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--repetitions", type=int, default=5, help="measurements a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="one size, by its name")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": options.threads,
        "sizes": {},
    }
    repetitions, seeds = (2, 1) if options.quick else (options.repetitions, options.seeds)
    for name, size in (QUICK if options.quick else SIZES).items():
        if options.only in (None, name):
            rows = run(size, makers(options.reference), repetitions, seeds)
            report["sizes"][name] = rows
            print(table(name, rows), end="\n\n", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
