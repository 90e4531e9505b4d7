"""The examples of influence run at toy size."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_images_behind_a_prediction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "influence.png"
    run("influence.py", monkeypatch, "--examples", "150", "--epochs", "3", "--output", str(figure))
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert "bytes a row" in printed


def test_the_passages_behind_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "influence_lm.png"
    run("influence_lm.py", monkeypatch, "--passages", "64", "--steps", "3", "--output", str(figure))
    assert figure.stat().st_size > 10_000
    assert "My lord" in capsys.readouterr().out
