"""The examples run at toy size, and what they measure is what they say."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlib as cv

FISHER = Path(__file__).parents[1] / "examples" / "dykaf_fisher.py"


@pytest.fixture(scope="module")
def fisher() -> dict[str, Any]:
    return runpy.run_path(str(FISHER))


def second_moment(m: int, n: int, rank: int) -> Tensor:
    rows = torch.randn(rank, m * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows.mT @ rows


def test_the_fisher_example_prints_a_table_a_case_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["dykaf_fisher", "--output", str(figure), "--steps", "8", "--seeds", "2"])
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cases = runpy.run_path(str(FISHER), run_name="__main__")["CASES"]
    torch.set_num_threads(threads)
    table = printed.getvalue()
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert all(f"\n{case}\n" in table for case in cases)
    figures = [float(x) for x in re.findall(r"\b[01]\.\d{3}\b", table)]
    assert len(figures) > 60 * len(cases)
    assert "nan" not in table


def test_diagonality_is_that_of_the_rotated_matrix_and_one_in_the_own_eigenbasis(fisher: dict[str, Any]) -> None:
    m, n = 3, 4
    matrix = second_moment(m, n, 5)
    left, right = (torch.linalg.qr(second_moment(d, 1, d))[0] for d in (m, n))
    basis = torch.kron(left, right)
    expected = (basis.mT @ matrix @ basis).diagonal().norm() / matrix.norm()
    torch.testing.assert_close(fisher["diagonality"](matrix, left, right), expected, rtol=1e-12, atol=0)
    product = cv.Kronecker(cv.Dense(second_moment(m, 1, m)), cv.Dense(second_moment(n, 1, n)))
    own = fisher["diagonality"](product.to_dense(), *fisher["eigenbases"](product))
    torch.testing.assert_close(own, torch.ones_like(own), rtol=1e-12, atol=0)


def test_the_best_scale_is_better_than_those_around_it(fisher: dict[str, Any]) -> None:
    matrix, product = second_moment(2, 3, 4), second_moment(2, 3, 6)
    scaled = fisher["scaled"](matrix, product)
    least = fisher["error"](matrix, scaled)
    assert all(least < fisher["error"](matrix, factor * scaled) for factor in (0.99, 1.01))


def test_a_corrected_decay_weighs_gradients_by_their_age_from_the_start(fisher: dict[str, Any]) -> None:
    case, gradients = fisher["Case"](decay=0.9), torch.arange(1.0, 8.0, dtype=torch.float64)
    mean = gradients[0]
    for step, gradient in enumerate(gradients[1:], 1):
        mean = case.decay_at(step) * mean + (1 - case.decay_at(step)) * gradient
    weights = 0.9 ** torch.arange(6.0, -1.0, -1.0, dtype=torch.float64)
    torch.testing.assert_close(mean, (weights * gradients).sum() / weights.sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("trains", [True, False])
def test_no_product_beats_the_nearest_and_the_bound_between_both_measures_holds(
    fisher: dict[str, Any], trains: bool
) -> None:
    case = fisher["Case"](weight=fisher["LAST"], trains=trains)
    errors, diagonalities = fisher["track"](case, 0, 40, lambda: None)
    best = errors[fisher["BEST"]]
    assert best.shape == (10,)
    assert all((values >= best - 1e-7).all() for values in errors.values())
    assert (errors[fisher["DYKAF"]][-1] - best[-1]) < 0.02
    for name, product in (("BEST", "BEST"), ("DYKAF", "DYKAF"), ("SOAP", "SCALED"), ("KFAC", "KFAC_SCALED")):
        diagonality, error = diagonalities[fisher[name]], errors[fisher[product]]
        assert (diagonality.square() >= 1 - error.square() - 1e-10).all()
        assert (diagonality <= 1).all()
