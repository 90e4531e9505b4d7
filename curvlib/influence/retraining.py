"""Training on many subsets, each result kept as it comes.

A folder has one file a run. A file says by a checksum which examples its run was trained on, so that a folder needs no
table of contents: what is there and fits is used, whatever order it came in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from curvlib.checksums import damage, is_whole
from curvlib.errors import ArgumentError, DtypeError, FormatError, NonFiniteError, ShapeError
from curvlib.io import replace

Train = Callable[[Tensor, int], Tensor]

FORMAT = "curvlib.retraining"
VERSION = 2  # files of version 1 have no checksums of what they hold
PATTERN = "subset-*-seed-*.safetensors"


def retrain(
    train: Train,
    subsets: Tensor,
    *,
    seeds: Sequence[int] = (0,),
    path: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Tensor:
    """Trains on every subset, and measures queries.

    With a ``path``, every result is on disk as soon as it is there, complete or not at all, and results found there are
    not computed again: a run that was killed goes on where it stopped, and more subsets or seeds can be added later.
    Files know which examples they were trained on, but nothing of ``train``: another model or another measurement
    needs another path, or ``overwrite``.

    Args:
        train: trains from scratch: (positions of the examples to train on [k], seed) -> outputs of the queries [Q],
            a loss of each, or whatever else is measured.
        subsets: bool [S, N], whether a subset holds an example.
        seeds: every subset is trained on once a seed, and the outputs are averaged.
        path: a folder, made if it is missing.
        overwrite: delete the results found at ``path`` and begin anew.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        Tensor [S, Q], on the CPU.

    Raises:
        ArgumentError: the path holds a result of other subsets; or there is no subset or no seed, or a seed twice.
        DtypeError: subsets are not bool; or outputs are not of a floating dtype.
        ShapeError: subsets are not [S, N]; or outputs are not [Q], or differ in length.
        NonFiniteError: outputs are not finite.
        FormatError: a file at ``path`` cannot be read.

    Example:
        >>> examples = torch.tensor([1.0, 2.0, 4.0, 9.0])
        >>> def train(chosen, seed):
        ...     mean = examples[chosen].mean()
        ...     return (mean - torch.tensor([0.0, 10.0])).abs()
        >>> retrain(train, torch.tensor([[True, True, False, False], [False, False, True, True]]))
        tensor([[1.5000, 8.5000],
                [6.5000, 3.5000]])
    """
    if subsets.dtype != torch.bool:
        raise DtypeError(f"subsets must be bool, got {subsets.dtype}")
    if subsets.ndim != 2 or not len(subsets):
        raise ShapeError(f"subsets should have shape [S, N] with S at least 1, got {tuple(subsets.shape)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ArgumentError(f"seeds must be at least one and distinct, got {list(seeds)}")
    folder = None if path is None else Path(path).resolve()
    runs = [(number, seed) for number in range(len(subsets)) for seed in seeds]
    found = {} if folder is None else prepared(folder, subsets, runs, overwrite=overwrite)
    outputs: list[Tensor] = []
    hidden = None if progress else True  # None: on anything but a terminal
    with tqdm(total=len(runs), initial=len(found), desc="retraining", unit="run", disable=hidden) as bar:
        for number, seed in runs:
            if (number, seed) not in found:
                result = train(subsets[number].nonzero().squeeze(1), seed)
                found[number, seed] = checked(result, number, seed)
                if folder is not None:
                    store(folder, subsets[number], number, seed, found[number, seed])
                bar.update()
            outputs.append(found[number, seed])
            if outputs[-1].shape != outputs[0].shape:
                raise ShapeError(
                    f"every run must measure the same queries, but subset 0 gave {len(outputs[0])} outputs and subset "
                    f"{number} with seed {seed} gave {len(outputs[-1])}; results of another `train` at the path are "
                    "deleted by overwrite=True"
                )
    return torch.stack(outputs).unflatten(0, (len(subsets), len(seeds))).mean(1)


def checked(outputs: Tensor, number: int, seed: int) -> Tensor:
    """The outputs of a run, on the CPU, if they can be worked with."""
    run = f"training on subset {number} with seed {seed}"
    if not isinstance(outputs, Tensor) or outputs.ndim != 1 or not len(outputs):
        what = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ShapeError(f"{run} should give a tensor of shape [Q], one output a query, got {what}")
    if not outputs.dtype.is_floating_point:
        raise DtypeError(f"{run} should give outputs of a floating dtype, got {outputs.dtype}")
    outputs = outputs.detach().cpu()
    if not outputs.isfinite().all():
        raise NonFiniteError(f"{run} gave outputs that are not finite: it diverged, or the measurement did")
    return outputs


def prepared(
    folder: Path, subsets: Tensor, runs: Sequence[tuple[int, int]], *, overwrite: bool
) -> dict[tuple[int, int], Tensor]:
    """Makes the folder, or deletes or reads its results; refuses those of other subsets before anything is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for file in folder.glob(PATTERN):
            file.unlink()
    checksums = [checksum(subset) for subset in subsets]
    return {
        (number, seed): stored(file, checksums[number])
        for number, seed in runs
        if (file := place(folder, number, seed)).exists()
    }


def place(folder: Path, number: int, seed: int) -> Path:
    """The file of a run."""
    return folder / f"subset-{number:05d}-seed-{seed}.safetensors"


def checksum(subset: Tensor) -> str:
    """Tells subsets apart."""
    return hashlib.sha256(bytes(subset.to(torch.uint8).tolist())).hexdigest()


def store(folder: Path, subset: Tensor, number: int, seed: int, outputs: Tensor) -> None:
    """Writes the file of a run."""
    content = {"format": FORMAT, "version": VERSION, "subset": checksum(subset)}
    replace(place(folder, number, seed), {"outputs": outputs.contiguous()}, FORMAT, content)


def stored(file: Path, expected: str) -> Tensor:
    """The outputs of a run, if it was trained on the subset with this checksum."""
    try:
        with safe_open(file, framework="pt") as opened:
            content = json.loads((opened.metadata() or {}).get(FORMAT, "{}"))
            outputs: Tensor = opened.get_tensor("outputs").clone()
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"cannot read {file}: it is no result of retraining ({error}); delete it") from error
    match content:
        case {"version": 1, "subset": subset}:
            fault = None
        case {"version": 2, "subset": subset, "tensors": dict(descriptions)} if is_whole(content):
            fault = damage({"outputs": outputs}, descriptions)
        case _:
            raise FormatError(f"cannot read {file}: its header is damaged or of another version; delete it")
    if fault is not None:
        raise FormatError(f"cannot read {file}: {fault}; delete it")
    if subset != expected:
        raise ArgumentError(
            f"{file} is the result of another subset than the one given: give the same subsets, another path, or "
            "overwrite=True, which deletes what is there"
        )
    return outputs
