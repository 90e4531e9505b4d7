"""The quickstart of the README runs."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_quickstart_runs_and_is_short() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    assert "linear 20 + 1 -> 32" in printed.getvalue()
    assert namespace["step"].keys() == namespace["params"].keys()
    assert all(torch.isfinite(leaf).all() for leaf in namespace["exact"].values())
