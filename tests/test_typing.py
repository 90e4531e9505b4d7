"""A user's script passes strict type checkers, and trees keep their types."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """\
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import curvlib as cv

model_fn, params = cv.functional(nn.Linear(3, 2))
batch = (torch.randn(5, 3), torch.randint(2, (5,)))
curv = cv.kfac(model_fn, params, batch)
inverse = curv.inverse(cv.FactoredTikhonov(0.1), solver=cv.Cholesky())
assert_type(params, dict[str, Tensor])
assert_type(inverse @ params, dict[str, Tensor])
assert_type(inverse.matvec(params)["weight"], Tensor)
assert_type(cv.solve(curv.damp(0.1), params, preconditioner=inverse), dict[str, Tensor])


@dataclass
class Weights:
    left: Tensor
    right: Tensor


exact = cv.ggn(model_fn, params, batch, mode="forward")
weights = Weights(torch.ones(2), torch.ones(3))
assert_type(exact.inverse(0.1, solver=cv.CG(inverse, tolerance=1e-6)) @ weights, Weights)
assert_type(exact.quadratic(params), Tensor)
difference: cv.Operator = (exact + curv - 0.5 * curv) / 2.0
total: cv.Operator = sum([-difference, curv], start=curv)
block: cv.Operator = curv["weight"]
fisher = cv.fisher(model_fn, params, batch, fisher="empirical")
sketch = cv.sketch(params, rank=2, kind="normal")
"""
WRONG = """\
import torch
from torch import nn

import curvlib as cv

model_fn, params = cv.functional(nn.Linear(3, 2))
batch = (torch.randn(5, 3), torch.randint(2, (5,)))
cv.fisher(model_fn, params, batch, fisher="emprical")
cv.ggn(model_fn, params, batch, mode="backward")
cv.sketch(params, kind="gaussian")
cv.kfac(model_fn, params, batch) - 1.0
number: float = cv.kfac(model_fn, params, batch) @ params
"""


def check(command: list[str], script: str, folder: Path) -> str:
    """What a type checker says of a script, outside of the library."""
    path = folder / "script.py"
    path.write_text(script)
    command, env = [*command, str(path)], {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.stdout


@pytest.mark.slow
def test_a_script_passes_strict_mypy_and_mistakes_are_found(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "--config-file", ""]
    command.append("--follow-imports=silent")  # as for an installed package
    assert "Success" in (said := check(command, SCRIPT, tmp_path)), said
    found = check(command, WRONG, tmp_path)
    for number in range(8, 13):
        assert f"script.py:{number}: error" in found, (number, found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_a_script_passes_strict_pyright(tmp_path: Path) -> None:
    (tmp_path / "pyrightconfig.json").write_text(f'{{"typeCheckingMode": "standard", "extraPaths": ["{ROOT}"]}}')
    assert "0 errors" in check(["pyright"], SCRIPT, tmp_path)
