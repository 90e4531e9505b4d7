"""Training again on subsets: what is averaged, and what is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlib.errors import ArgumentError, DtypeError, FormatError, NonFiniteError, ShapeError
from curvlib.influence import evaluate

EXAMPLES = torch.arange(1.0, 9.0, dtype=torch.float64).sqrt()
SUBSETS = evaluate.subsets(8, number=4)


class Trainer:
    """Counts its runs, and is killed before one of them."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.runs: list[tuple[tuple[int, ...], int]] = []
        self.killed_at = killed_at

    def __call__(self, chosen: Tensor, seed: int) -> Tensor:
        if len(self.runs) == self.killed_at:
            raise KeyboardInterrupt
        self.runs.append((tuple(chosen.tolist()), seed))
        return expected(chosen, seed)


def expected(chosen: Tensor, seed: int) -> Tensor:
    return torch.stack([EXAMPLES[chosen].sum() + 0.1 * seed, EXAMPLES[chosen].prod()])


def positions(subset: Tensor) -> Tensor:
    return torch.arange(8)[subset]


def test_every_subset_is_trained_on_and_seeds_are_averaged() -> None:
    train = Trainer()
    outputs = evaluate.retrain(train, SUBSETS, seeds=(3, 5))
    average = [(expected(positions(row), 3) + expected(positions(row), 5)) / 2 for row in SUBSETS]
    torch.testing.assert_close(outputs, torch.stack(average), rtol=0, atol=1e-14)
    assert train.runs == [(tuple(positions(row).tolist()), seed) for row in SUBSETS for seed in (3, 5)]


@pytest.mark.parametrize("runs", [0, 1, 5])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, runs: int) -> None:
    killed, second = Trainer(killed_at=runs), Trainer()
    with pytest.raises(KeyboardInterrupt):
        evaluate.retrain(killed, SUBSETS, seeds=(0, 1), path=tmp_path / "results")
    outputs = evaluate.retrain(second, SUBSETS, seeds=(0, 1), path=tmp_path / "results")
    assert torch.equal(outputs, evaluate.retrain(Trainer(), SUBSETS, seeds=(0, 1)))
    assert killed.runs + second.runs == [(tuple(positions(row).tolist()), seed) for row in SUBSETS for seed in (0, 1)]


def test_results_are_kept_bit_for_bit_and_leave_nothing_else_behind(tmp_path: Path) -> None:
    first = evaluate.retrain(Trainer(), SUBSETS, path=tmp_path)
    untrained = Trainer(killed_at=0)
    assert torch.equal(evaluate.retrain(untrained, SUBSETS, path=tmp_path), first)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"subset-0000{i}-seed-0.safetensors" for i in range(4)]


def test_subsets_and_seeds_can_be_added(tmp_path: Path) -> None:
    evaluate.retrain(Trainer(), SUBSETS[:2], path=tmp_path)
    more = Trainer()
    outputs = evaluate.retrain(more, SUBSETS, seeds=(0, 1), path=tmp_path)
    assert torch.equal(outputs, evaluate.retrain(Trainer(), SUBSETS, seeds=(0, 1)))
    assert len(more.runs) == 6


def test_other_subsets_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    first = evaluate.retrain(Trainer(), SUBSETS, path=tmp_path)
    other = SUBSETS.clone()
    other[3] = ~other[3]
    with pytest.raises(ArgumentError, match=r"subset-00003.*overwrite=True"):
        evaluate.retrain(Trainer(killed_at=0), other, seeds=(9, 0), path=tmp_path)
    assert torch.equal(evaluate.retrain(Trainer(killed_at=0), SUBSETS, path=tmp_path), first)


def test_overwriting_begins_anew(tmp_path: Path) -> None:
    evaluate.retrain(Trainer(), SUBSETS, path=tmp_path)
    (tmp_path / "notes.txt").write_text("not ours")
    again = Trainer()
    outputs = evaluate.retrain(again, ~SUBSETS[:2], path=tmp_path, overwrite=True)
    assert torch.equal(outputs, evaluate.retrain(Trainer(), ~SUBSETS[:2]))
    assert len(again.runs) == 2
    assert len(list(tmp_path.iterdir())) == 3  # two results and the notes


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_damaged_result_is_named(tmp_path: Path, content: bytes) -> None:
    evaluate.retrain(Trainer(), SUBSETS, path=tmp_path)
    (tmp_path / "subset-00001-seed-0.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"subset-00001-seed-0.*delete it"):
        evaluate.retrain(Trainer(), SUBSETS, path=tmp_path)


def gives(outputs: Any) -> Callable[[Tensor, int], Tensor]:
    return lambda chosen, seed: outputs


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (torch.ones(()), ShapeError, r"\[Q\], one output a query, got shape \(\)"),
        (0.5, ShapeError, "got a float"),
        (torch.ones(2, dtype=torch.int64), DtypeError, "floating"),
        (torch.tensor([1.0, torch.nan]), NonFiniteError, "subset 0 with seed 4 gave outputs that are not finite"),
    ],
)
def test_outputs_that_cannot_be_used_are_not_kept(
    tmp_path: Path, outputs: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate.retrain(gives(outputs), SUBSETS, seeds=(4,), path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_errors_say_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="subset 0 gave 4 outputs and subset 1 with seed 0 gave 3"):
        evaluate.retrain(lambda chosen, seed: chosen.double(), evaluate.subsets(8) & (torch.arange(8) > 0))
    with pytest.raises(DtypeError, match="subsets must be bool"):
        evaluate.retrain(Trainer(), SUBSETS.int())
    with pytest.raises(ShapeError, match=r"\(8,\)"):
        evaluate.retrain(Trainer(), SUBSETS[0])
    with pytest.raises(ArgumentError, match="distinct"):
        evaluate.retrain(Trainer(), SUBSETS, seeds=(1, 1))
