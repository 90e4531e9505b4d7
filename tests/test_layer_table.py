"""The layer table is open: the example of the documentation, run and held against brute force."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import normal, problem
from reference import block, relative_error
from torch import nn

import curvlib as cv
from curvlib.layers import TABLE

DOCUMENT = Path(__file__).parents[1] / "docs" / "design.md"


def documented_example() -> str:
    """The code block that enters prelu."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S) if "@entry(" in code)
    return code


@pytest.mark.parametrize("engine", ["functional", "autograd"])
@pytest.mark.parametrize("slopes", [1, 4])
def test_the_documented_entry_gives_an_exact_block(slopes: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(slopes), nn.Linear(4, 2))
    case = problem(net, normal(1, 5, 3), "cross-entropy", "mean")
    with pytest.raises(cv.errors.CaptureError, match=r"'prelu'.*parameter '1\.weight'"):
        case.kfac()
    monkeypatch.setitem(TABLE, F.prelu, None)  # so that the entry is gone after the test
    namespace: dict[str, Any] = {}
    exec(documented_example(), namespace)
    exact = block(case.ggn(), case.params, "1.weight")
    curv = case.kfac(engine=engine, elementwise="dense").blocks["1.weight"]
    assert relative_error(curv.to_dense(), exact) <= 1e-10
    diagonal = case.kfac(engine=engine).blocks["1.weight"]
    assert isinstance(diagonal, cv.Diagonal)
    torch.testing.assert_close(diagonal.values, exact.diagonal(), rtol=1e-10, atol=1e-14)
