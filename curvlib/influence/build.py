"""An index of sketched gradients on disk: built once, example by example, and resumed where it was stopped."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from curvlib.arguments import check_model
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.errors import ArgumentError, PytreeError
from curvlib.gradients.data import Batch, DataSet, check_order, repeatable
from curvlib.gradients.plans import Plans
from curvlib.influence import fingerprints, shards
from curvlib.influence.examples import Group, Record, groups
from curvlib.influence.folder import (
    LEFT,
    REPLACE,
    check_space,
    forget,
    number_of,
    prepare,
    shards_present,
    stored_projection,
)
from curvlib.influence.index import Index
from curvlib.influence.manifest import PROJECTION, Manifest, Recipe, Shard, block_rows, dtype_name
from curvlib.influence.rows import IndexRows
from curvlib.influence.sizes import estimate_size
from curvlib.io import save
from curvlib.linalg.eager import is_eager
from curvlib.losses import CrossEntropy, Loss, check_loss
from curvlib.operators import Projection
from curvlib.pytree import Domain, Tree


class OtherDataError(ArgumentError):
    """The rows on disk belong to other examples."""


@dataclasses.dataclass(frozen=True)
class Build:
    """One pass over the data.

    Args:
        folder: of the index.
        recipe: what rows depend on but the data.
        rows: makes them.
        present: shards that are there already, by number.
        listed: shards of a finished index, by number; none: there is none.
        append: whether the data may go on after them.
    """

    folder: Path
    recipe: Recipe
    rows: IndexRows
    present: dict[int, Shard]
    listed: dict[int, Shard]
    append: bool

    def run(self, data: Batch | DataSet, progress: bool) -> tuple[Shard, ...]:
        """All shards; those that are not there are written.

        Raises:
            OtherDataError: shards that are there belong to other data.
        """
        size = self.recipe.shard_size
        found = []
        with tqdm(desc="index", unit="example", disable=None if progress else True) as bar:
            stream = counted(groups(data, self.recipe.batch_size, size), bar)
            for number, members in itertools.groupby(stream, lambda group: group.start // size):
                found.append(self.shard(number, until(members, size)))
        count, before = (sum(shard.examples for shard in part) for part in (found, self.listed.values()))
        if count < before:
            raise OtherDataError(f"the data end after {count} examples, and the index there has {before}; {REPLACE}")
        return tuple(found)

    def shard(self, number: int, members: Iterable[Group]) -> Shard:
        """The shard of these examples, from disk or computed."""
        kept, listed = self.present.get(number), self.listed.get(number)
        if self.listed and listed is None and not self.append:
            raise self.longer()
        if kept is None or (self.append and kept.examples < self.recipe.shard_size):
            return self.computed(number, members, listed)
        record = Record(kept.examples)
        for group in members:
            record.add(group.examples)
        self.compare(number, record, kept)
        shards.check(self.folder, kept, self.recipe)
        return kept

    def computed(self, number: int, members: Iterable[Group], listed: Shard | None) -> Shard:
        """A shard that is written now; its data begin with those of the one that is listed."""
        record = Record(None if listed is None else listed.examples)
        with shards.writer(self.folder, self.recipe) as file:
            for group in members:
                record.add(group.examples)
                file.append(self.rows.of(group.examples, group.start))
            if listed is not None:
                self.compare(number, record, listed)
            return file.finish(number, record.count, record.fingerprint())

    def compare(self, number: int, record: Record, shard: Shard) -> None:
        """Refuses examples that are not those of a shard."""
        first = number * self.recipe.shard_size
        if record.noted != shard.data:
            raise OtherDataError(
                f"{self.folder} holds an index of other data, or of the same in another order or form: examples "
                f"{first} to {first + shard.examples - 1} are not those of {shard.file}; {REPLACE}"
            )
        if record.count > shard.examples and not self.append:
            raise self.longer()

    def longer(self) -> OtherDataError:
        """The error for more data than the index has."""
        count = sum(shard.examples for shard in self.listed.values())
        return OtherDataError(
            f"the data go on after the {count} examples of the index in {self.folder}: give append=True to add "
            f"them; or {REPLACE}"
        )


def until(members: Iterable[Group], size: int) -> Iterator[Group]:
    """The groups of a shard; once it is full, no further example is waited for."""
    count = 0
    for group in members:
        yield group
        count += group.examples.count
        if count == size:
            return


def counted(stream: Iterable[Group], bar: tqdm[Any]) -> Iterator[Group]:
    """The groups, each counted when it is done with."""
    for group in stream:
        yield group
        bar.update(group.examples.count)


def build(
    path: str | os.PathLike[str],
    projection: Projection,
    model_fn: ModelFn,
    params: Tree,
    data: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    dtype: torch.dtype = torch.float32,
    shard_size: int = 4096,
    batch_size: int = 32,
    append: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    plan: Plan | Plans | None = None,
) -> Index:
    """Writes the sketches M_left g_n M_right^T of all examples to a folder: one row an example, blocks side by side.

    With ``projection = curv.power(-0.5, damping).project(R)`` inner products of rows estimate influence scores
    g_q^T (curv + damping)^-1 g_n; they are exact for R = I. The gradient is that of an example's own, unreduced loss
    term.

    Memory is that of ``batch_size`` examples, however many there are. Examples are regrouped, so that rows depend
    neither on the loader's batches nor on interruptions: a build that was killed goes on when it is called again with
    equal arguments, and ends with the same bytes. The data are then read again from the start, but only to be compared
    with a fingerprint; a gradient is not computed twice but for the file that was being written. A finished index is
    compared with the data in the same way and not changed. `load` opens it without reading data.

    The folder holds ``manifest.json`` (blocks, sizes, fingerprints of parameters, projection and data), the projection
    as `save` writes it, and files of ``shard_size`` rows, each a safetensors file with one tensor. A file gets its name
    when it is complete. ``model_fn`` has no fingerprint: give the index another path when you change it.

    Args:
        path: a folder, made if it is not there.
        projection: from ``curv.power(-0.5, damping).project(R)``, R a `sketch` or an `EigenSketch`.
        model_fn: pure function (params, inputs) -> outputs [N, ...], each example's from its own inputs.
        params: pytree of tensors that the curvature was made for.
        data: (inputs, targets) with N examples, or a data set `over` a loader that gives them in the same order each
            time. Tensors have one row an example; one of the inputs that has not is shared by the batch.
        loss: the loss that the model was trained with.
        dtype: of the rows: float32, bfloat16, float16 or float64.
        shard_size: examples in a file.
        batch_size: examples whose gradients are taken together; it bounds memory, and is part of what rounding depends
            on. Examples of other shapes (sequences of another length) are taken apart.
        append: the data may begin with those of a finished index and go on; complete files stay as they are, and the
            index there can be used until the new one is complete. The result is that of building it at once.
        overwrite: an index of other arguments or data is replaced: it is deleted when that is found out.
        progress: show a progress bar if standard error is a terminal.
        plan: the model's `plan`, if already made for inputs of these shapes; or `Plans`.

    Returns:
        The finished index.

    Raises:
        ArgumentError: the folder holds the index of other parameters, of another projection, loss or form, or of other
            data, and ``overwrite`` is not given; the loader is in random order; or a number is out of range.
        FormatError: a file there is damaged, foreign or of a newer version; names it.
        PytreeError: the projection was made for other parameters.
        DtypeError: rows cannot have this dtype.
        NonFiniteError: a sketch is not finite; names block and example.
        EmptyBatchError: there is no example.
        OSError: the disk has less space than the index takes (looked at if the number of examples is known before they
            are read), or cannot be written.

    Example:
        >>> import tempfile
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> train = torch.randn(20, 3), torch.randint(2, (20,))
        >>> curv = cv.kfac(model_fn, params, train)
        >>> projection = curv.power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(params, rank=64))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = build(f"{folder}/index", projection, model_fn, params, train)
        ...     found = index.scores(model_fn, params, train)
        >>> len(index), found.shape
        (20, torch.Size([20, 20]))
        >>> inverse = curv.inverse(cv.FactoredTikhonov(0.1))
        >>> torch.allclose(found, cv.influence.scores(inverse, model_fn, params, train, train), atol=1e-4)
        True
    """
    check_model(model_fn, params)
    check_loss(loss)
    if not isinstance(projection, Projection):
        raise ArgumentError(
            "projection must be a Projection, such as curv.power(-0.5, damping).project(cv.sketch(params, rank=64)), "
            f"got a {type(projection).__name__}"
        )
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size)):
        if not isinstance(value, Integral) or value < 1:
            raise ArgumentError(f"{name} must be at least 1 and an integer, got {value!r}")
    if not is_eager():
        raise ArgumentError("build writes files and cannot be called inside a transform or a trace; call it outside")
    check_order(data, "an index numbers its examples in the order of the data")
    if Domain.of(params) != projection.domain:
        raise PytreeError("the projection was made for params of another structure or other shapes")
    recipe = Recipe(
        block_rows(projection),
        dtype_name(dtype),
        shard_size,
        batch_size,
        fingerprints.of_loss(loss),
        fingerprints.of_params(params),
        fingerprints.of_projection(projection),
    )
    folder = Path(path)
    former = prepare(folder, recipe, overwrite)
    for file in folder.glob(LEFT):
        file.unlink()
    present = shards_present(folder, former, append)
    count = number_of(data)
    if count is not None:
        there = sum(shard.examples for shard in present.values())
        check_space(folder, estimate_size(projection, max(0, count - there), dtype, shard_size=shard_size))
    if former.finished and (folder / PROJECTION).exists():
        stored_projection(folder, recipe)
    else:
        save(projection, folder / PROJECTION)
    rows = IndexRows(projection, model_fn, params, loss, dtype, Plans.of(plan))
    listed = dict(enumerate(former.shards))
    try:
        found = Build(folder, recipe, rows, present, listed, append).run(data, progress)
    except OtherDataError:
        if not overwrite:
            raise
        repeatable(data)
        Manifest(recipe, (), finished=False).write(folder)
        forget(folder, ())
        found = Build(folder, recipe, rows, {}, {}, append).run(data, progress)
    manifest = Manifest(recipe, found, finished=True)
    if manifest != former:
        manifest.write(folder)
    forget(folder, found)
    return Index(folder, manifest)
