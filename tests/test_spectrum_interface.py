"""Spectra from the user's side: curvatures of models, randomness, errors, precision, plots."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import curvlib as cv
from curvlib import spectrum
from curvlib.errors import ArgumentError, ConvergenceError, NonFiniteError
from curvlib.operators import Dense, Diagonal, Kronecker, Operator
from curvlib.pytree import flatten
from tests.operators.operator_cases import Random, generator


def small_kfac() -> cv.BlockDiagonal:
    torch.manual_seed(0)
    model_fn, params = cv.functional(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double())
    batch = (torch.randn(32, 5, dtype=torch.float64), torch.randint(3, (32,)))
    return cv.kfac(model_fn, params, batch, loss=cv.CrossEntropy(), fisher="type-2")


def everything(operator: Operator, source: Callable[[], torch.Generator | None]) -> list[Tensor]:
    """All that the room can find out, as tensors."""
    results = (
        spectrum.density(operator, steps=5, probes=2, generator=source()),
        spectrum.density(operator, steps=5, probes=2, generator=source(), per_block=True),
        spectrum.top_eigenvalues(operator, 3, generator=source(), vectors=True),
        spectrum.top_eigenvalues(operator, 3, generator=source(), per_block=True),
        spectrum.trace(operator, 4, source()),
    )
    return [leaf for result in results for leaf in flatten(result)[0]]


def test_kfac_of_a_model_has_the_spectrum_of_its_dense_matrix_whole_and_by_block() -> None:
    curv = small_kfac()
    values = torch.linalg.eigvalsh(curv.to_dense())
    pairs = spectrum.top_eigenvalues(curv, 4, vectors=True)
    torch.testing.assert_close(pairs.values, values.flip(0)[:4], rtol=0, atol=1e-12)
    assert {name: x.shape for name, x in pairs.vectors.items()} == {
        "0.weight": (4, 4, 5), "0.bias": (4, 4), "2.weight": (4, 3, 4), "2.bias": (4, 3),
    }  # fmt: skip
    blocks = spectrum.top_eigenvalues(curv, 4, per_block=True)
    densities = spectrum.density(curv, steps=30, probes=2, per_block=True)
    assert list(blocks) == list(densities) == list(curv.blocks)
    for name, block in curv.blocks.items():
        expected = block.eigenvalues().flip(0)
        torch.testing.assert_close(blocks[name].values, expected[:4], rtol=0, atol=1e-12)
        assert densities[name].size == block.domain.size
        for density in densities[name].nodes:
            torch.testing.assert_close(density.max(), expected[0], rtol=1e-10, atol=0)


def test_a_block_with_fewer_rows_than_asked_for_has_all_of_its_eigenvalues() -> None:
    blocks = spectrum.top_eigenvalues(small_kfac(), 20, per_block=True)
    assert [len(pairs.values) for pairs in blocks.values()] == [20, 15]


def test_the_same_generator_gives_the_same_numbers() -> None:
    curv = small_kfac()
    first, again, other, default, zero = (
        everything(curv, source)
        for source in (
            lambda: generator(3),
            lambda: generator(3),
            lambda: generator(4),
            lambda: None,
            lambda: generator(0),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(default, zero, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_generator_that_is_passed_on_gives_fresh_probes() -> None:
    curv, source = small_kfac(), generator(0)
    assert not torch.equal(spectrum.trace(curv, 4, source).value, spectrum.trace(curv, 4, source).value)


def test_the_global_generator_and_the_operator_are_untouched() -> None:
    curv = small_kfac()
    before = [x.clone() for x in flatten(curv)[0]]
    state = torch.get_rng_state()
    everything(curv, lambda: None)
    everything(Diagonal(torch.zeros(6)), lambda: None)  # every step breaks down
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, flatten(curv)[0], strict=True))


@pytest.mark.parametrize(("dtype", "working"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_arithmetic_is_at_least_in_single_precision(dtype: torch.dtype, working: torch.dtype) -> None:
    operator = Diagonal(torch.arange(1, 9).to(dtype))
    density = spectrum.density(operator, steps=8, probes=2)
    assert density.nodes.dtype == density.weights.dtype == working
    torch.testing.assert_close(density.moment(1), torch.tensor(4.5), rtol=1e-2, atol=0)
    pairs = spectrum.top_eigenvalues(operator, 2, tolerance=1e-2 if dtype == torch.bfloat16 else None)
    torch.testing.assert_close(pairs.values, torch.tensor([8.0, 7.0]), rtol=1e-2, atol=0)


def test_results_are_pytrees() -> None:
    density = spectrum.density(Diagonal(torch.rand(8)), steps=3, probes=2)
    doubled = cv.pytree.tree_map(lambda x: 2 * x, density)
    assert isinstance(doubled, spectrum.Density)
    assert torch.equal(doubled.nodes, 2 * density.nodes)
    assert doubled.size == 8


# --- errors -------------------------------------------------------------------------------------------------------


def error(kind: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_numbers_that_make_no_sense_are_refused_by_name() -> None:
    operator = Diagonal(torch.rand(4))
    for name in ("steps", "probes", "batch_size"):
        options: dict[str, Any] = {name: 0}
        message = error(ArgumentError, lambda options=options: spectrum.density(operator, **options))
        assert message == f"{name} must be at least 1, got 0"
    assert error(ArgumentError, lambda: spectrum.trace(operator, 1)) == "samples must be at least 4, got 1"
    assert error(ArgumentError, lambda: spectrum.top_eigenvalues(operator, 0)) == "k must be at least 1, got 0"
    assert "4 rows, which is less than k=5" in error(ArgumentError, lambda: spectrum.top_eigenvalues(operator, 5))
    for name in ("block_size", "basis_size", "max_iterations"):
        options = {name: 0}
        message = error(ArgumentError, lambda options=options: spectrum.top_eigenvalues(operator, 1, **options))
        assert f"{name} must be at least" in message
    unknown: Any = "upper"
    assert "largest, smallest, magnitude" in error(
        ArgumentError, lambda: spectrum.top_eigenvalues(operator, 1, which=unknown)
    )


def test_what_a_density_cannot_tell_is_refused() -> None:
    density = spectrum.density(Diagonal(-torch.rand(4)), steps=2, probes=1)
    assert "shares from 0 to 1, got 1.5" in error(ArgumentError, lambda: density.quantile(1.5))
    assert "must be positive, got 0" in error(ArgumentError, lambda: density.smoothed(density.grid(), 0))
    axes = Figure().subplots()
    assert "positive eigenvalues" in error(ArgumentError, lambda: density.plot(axes, scale="log"))


def test_a_tolerance_that_is_not_reached_is_an_error_that_says_what_was() -> None:
    operator = Diagonal(torch.linspace(0, 1, 200, dtype=torch.float64))
    message = error(ConvergenceError, lambda: spectrum.top_eigenvalues(operator, 3, max_iterations=2))
    assert "leading 3 eigenvalues of 200 have a relative residual of" in message
    assert "after 2 iterations with blocks of 3, not 1.5e-08; raise max_iterations" in message


def test_an_operator_that_is_not_symmetric_does_not_pass_for_one() -> None:
    rotation = Dense(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    message = error(ConvergenceError, lambda: spectrum.top_eigenvalues(rotation, 1))
    assert "not symmetric" in message


def test_errors_inside_of_a_block_name_it() -> None:
    curv = small_kfac()
    block = curv.blocks["2.weight"]
    assert isinstance(block, Kronecker)
    broken = cv.BlockDiagonal(
        {**curv.operators, "2.weight": Kronecker(float("nan") * block.left, block.right)},
        curv.layouts,
        curv.domain,
    )
    for call in (
        lambda: spectrum.density(broken, steps=2, probes=1, per_block=True),
        lambda: spectrum.top_eigenvalues(broken, 1, per_block=True),
    ):
        message = error(NonFiniteError, call)
        assert message.startswith("block '2.weight': ")
        assert "inf or nan" in message
    assert "inf or nan" in error(NonFiniteError, lambda: spectrum.density(broken, steps=2, probes=1))


def test_like_must_fit_the_operator() -> None:
    curv = small_kfac()
    assert "leaves of shapes ((2,),)" in error(
        ArgumentError, lambda: spectrum.density(curv, like={"other": torch.zeros(2)})
    )
    same = spectrum.density(curv, like=curv.diag()), spectrum.density(curv)
    assert torch.equal(same[0].nodes, same[1].nodes)


# --- progress and plots -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_shows_on_a_terminal_only_and_only_if_asked_for(
    progress: bool, stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = stream()
    monkeypatch.setattr(sys, "stderr", screen)
    spectrum.density(Diagonal(torch.rand(6)), steps=3, probes=2, progress=progress)
    assert ("spectral density" in screen.getvalue()) == (progress and stream is Terminal)


@pytest.mark.parametrize("find", [spectrum.density, spectrum.trace, spectrum.diagonal])
def test_no_progress_shows_if_it_was_not_asked_for(find: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    find(Diagonal(torch.rand(6)))
    assert screen.getvalue() == ""


def test_plots_draw_on_the_axes_given() -> None:
    values = Random(generator(0)).positive(60) * 10.0 ** -torch.arange(60).double().remainder(12)
    density = spectrum.density(Diagonal(values), steps=40, probes=2)
    top = {name: spectrum.top_eigenvalues(Diagonal(values), 3) for name in ("first", "second")}
    linear, log, bars, ranks = Figure().subplots(1, 4)
    assert density.plot(linear) is linear
    assert density.plot(log, scale="log", label="all") is log
    assert "near 0" in log.get_legend_handles_labels()[1][0]
    assert spectrum.plot_top_eigenvalues(top, bars) is bars
    torch.testing.assert_close([bar.get_height() for bar in bars.patches], 2 * top["first"].values.tolist())
    assert spectrum.plot_comparison({"one": density, "other": density}, ranks) is ranks
    for axes in (linear, log):
        x, y = axes.lines[0].get_data()
        assert len(x) == len(y) == 2000
        assert (y[y == y] > 0).all()


def test_a_linear_plot_shows_every_eigenvalue_and_marks_the_largest() -> None:
    nodes = torch.arange(1.0, 21.0, dtype=torch.float64)
    density = spectrum.Density(nodes.unsqueeze(0), torch.full((1, 20), 1 / 20, dtype=torch.float64), 20)
    axes = spectrum.plot_density(density, Figure().subplots(), outliers=3, width=0.5)
    curve, marks = axes.lines
    torch.testing.assert_close((curve.get_xdata()[0], curve.get_xdata()[-1]), (1.0 - 4 * 0.5, 20.0 + 4 * 0.5))
    torch.testing.assert_close(marks.get_xdata().tolist(), [18.0, 19.0, 20.0])


def test_a_logarithmic_plot_starts_where_eigenvalues_can_be_told_from_zero() -> None:
    density = spectrum.density(Diagonal(Random(generator(0)).positive(60)), steps=10, probes=2)
    (start, *_) = density.plot(Figure().subplots(), scale="log").lines[0].get_xdata()
    torch.testing.assert_close(start, float(density.nodes.max()) / 10**2)


def test_spectra_need_no_matplotlib() -> None:
    without = "import sys; sys.modules['matplotlib'] = None; import curvlib.spectrum"
    subprocess.run([sys.executable, "-c", without], check=True, timeout=300)
