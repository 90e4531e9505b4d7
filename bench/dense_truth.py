"""How far approximations are from the exact GGN of a small trained network, where that can be formed.

A network of 1,775 parameters learns scikit-learn's digits. For each approximation the relative Frobenius error to
the whole GGN is reported, and the rank correlation of predictive variances tr(J (C + d I)^-1 J^T) on test images with
those of the exact GGN.

    python bench/dense_truth.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

import curvlib as cv

DAMPING = 1e-3


def trained(seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """A network after 60 epochs of Adam, its training set, and test inputs."""
    torch.manual_seed(seed)
    data = load_digits()
    order = torch.randperm(len(data.target))
    inputs, targets = torch.tensor(data.data, dtype=torch.float64)[order] / 16, torch.tensor(data.target)[order]
    module = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 10)).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(60):
        for index in torch.randperm(1500).split(100):
            optimizer.zero_grad()
            F.cross_entropy(module(inputs[index]), targets[index]).backward()
            optimizer.step()
    return module, (inputs[:1500], targets[:1500]), inputs[1500:]


def approximations(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The exact GGN as a matrix, and matrices that approximate it."""
    model_fn, params = cv.functional(module)
    exact = cv.ggn(model_fn, params, batch).to_dense()
    kfac = cv.kfac(model_fn, params, batch, fisher="type-2")
    layer = cv.ravel({name: torch.full(leaf.shape, float(name[0])) for name, leaf in params.items()})
    return exact, {
        "block-diagonal": torch.where(layer.unsqueeze(0) == layer.unsqueeze(1), exact, 0),
        "EKFAC": cv.ekfac(model_fn, params, batch, fisher="type-2").to_dense(),
        "TKFAC": cv.tkfac(model_fn, params, batch, fisher="type-2").to_dense(),
        "KFAC": kfac.to_dense(),
        "diagonal": cv.diagonal(model_fn, params, batch, fisher="type-2").to_dense(),
    }


def variances(jacobians: Tensor, matrix: Tensor) -> Tensor:
    """tr(J (C + d I)^-1 J^T) for Jacobians [N, K, D]."""
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    return (jacobians * torch.linalg.solve(damped, jacobians.mT).mT).sum((1, 2))


def main() -> None:
    """Runs the comparison over three seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    errors: dict[str, list[float]] = {}
    ranks: dict[str, list[float]] = {}
    for seed in range(3):
        module, batch, test = trained(seed)
        model_fn, params = cv.functional(module)
        jacobian = torch.func.jacrev(lambda p, f=model_fn, x=test: f(p, x))(params)
        jacobians = torch.cat([jacobian[name].flatten(2) for name in sorted(jacobian)], 2)
        exact, found = approximations(module, batch)
        truth = variances(jacobians, exact)
        for name, matrix in found.items():
            errors.setdefault(name, []).append(float((matrix - exact).norm() / exact.norm()))
            ranks.setdefault(name, []).append(float(spearmanr(truth, variances(jacobians, matrix)).statistic))
    print("| | relative error | Spearman of predictive variance |\n| --- | --- | --- |")
    for name, values in errors.items():
        spread = f"{min(ranks[name]):.3f} - {max(ranks[name]):.3f}"
        print(
            f"| {name} | {statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f}) "
            f"| {statistics.median(ranks[name]):.3f} ({spread}) |"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"errors": errors, "spearman": ranks}, indent=1))


if __name__ == "__main__":
    main()
