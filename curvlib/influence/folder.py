"""The folder of an index: whose it is, what is there already, and whether the rest fits."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch.utils.data import DataLoader, IterableDataset

from curvlib.capture.engines import examples_in
from curvlib.errors import ArgumentError, FormatError
from curvlib.gradients.data import Batch, DataSet, batches
from curvlib.influence import fingerprints, shards
from curvlib.influence.manifest import PROJECTION, Manifest, Recipe, Shard
from curvlib.io import load
from curvlib.operators import Projection

LEFT = ".*tmp*"  # what a process leaves that is killed while it writes a file
REPLACE = "give another path, or overwrite=True to replace what is there"


def prepare(folder: Path, recipe: Recipe, overwrite: bool) -> Manifest:
    """The manifest of the folder, or one of an index that has just been begun.

    Raises:
        FormatError: the folder holds something else.
        ArgumentError: it holds an index that is made in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    former = Manifest.read(folder)
    if former is None:
        foreign = sorted({x.name for x in folder.iterdir()} - {x.name for x in folder.glob(LEFT)})
        if foreign:
            raise FormatError(
                f"{folder} holds no index, but {', '.join(foreign[:3])}; give the path of a new or empty folder"
            )
    elif former.recipe == recipe:
        return former
    elif not overwrite:
        raise ArgumentError(
            f"{folder} holds an index that differs in {', '.join(former.recipe.differences(recipe))}; {REPLACE}; "
            f"its own projection can be had by cv.load({str(folder / PROJECTION)!r})"
        )
    begun = Manifest(recipe, (), finished=False)
    begun.write(folder)
    forget(folder, ())
    return begun


def stored_projection(folder: Path, recipe: Recipe) -> Projection:
    """The projection that rows were made with, from disk.

    Raises:
        FormatError: the file is missing or damaged, or holds another projection.
    """
    path = folder / PROJECTION
    again = "build the index again with the same arguments, which writes only this file"
    try:
        projection = load(path)
    except FileNotFoundError as error:
        raise FormatError(f"cannot read {path}: the projection is missing; {again}") from error
    except FormatError as error:
        raise FormatError(f"{error}; or delete it and {again}") from error
    if not isinstance(projection, Projection) or fingerprints.of_projection(projection) != recipe.projection:
        raise FormatError(f"{path} is not the projection that the index was made with; delete it and {again}")
    return projection


def shards_present(folder: Path, former: Manifest, append: bool) -> dict[int, Shard]:
    """The shards that need not be computed, by number: what a finished index lists, and others that are complete.

    Raises:
        FormatError: a file is damaged; names it.
    """
    listed = {shard.file: shard for shard in former.shards}
    found: dict[int, Shard] = {}
    for file in sorted(x.name for x in folder.iterdir()):
        place = shards.numbers(file)
        if place is None:
            continue
        shard = None
        if file in listed:
            shard = listed[file]
            shards.state(folder, shard, former.recipe)
        elif place[1] == former.recipe.shard_size and (append or not former.finished):
            shard = shards.read(folder, file, former.recipe)
        if shard is not None and (place[0] not in found or shard.examples > found[place[0]].examples):
            found[place[0]] = shard
    return found


def forget(folder: Path, kept: Iterable[Shard]) -> None:
    """Deletes the files of rows that are not among these."""
    names = {shard.file for shard in kept}
    for file in sorted(x.name for x in folder.iterdir()):
        if shards.numbers(file) is not None and file not in names:
            (folder / file).unlink()


def number_of(data: Batch | DataSet) -> int | None:
    """How many examples there are, to less than a batch; None if only reading them would tell."""
    if not isinstance(data, DataSet):
        return sum(examples_in(inputs) for inputs, _ in batches(data))
    loader = data.loader
    if isinstance(loader, (list, tuple)):
        return sum(examples_in(inputs) for inputs, _ in batches(data))
    size = getattr(loader, "batch_size", None)
    if isinstance(loader, DataLoader) and size is not None and not isinstance(loader.dataset, IterableDataset):
        with contextlib.suppress(TypeError, NotImplementedError):  # samplers need not have a length
            return len(loader) * size
    return None


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin what does not fit.

    Raises:
        OSError: the disk has less space; gives both numbers.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the index needs {needed} bytes more and the disk has {free}; take a smaller sketch (see sketch_ranks), "
            "dtype=torch.bfloat16 or another disk",
            str(folder),
        )
