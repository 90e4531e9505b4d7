"""An index of sketched gradients, read from disk by mapping files into memory."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from curvlib.arguments import check_model
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.errors import ArgumentError, DtypeError, FormatError, NonFiniteError, ShapeError
from curvlib.gradients.data import Batch, DataSet, check_order
from curvlib.gradients.plans import Plans
from curvlib.influence import fingerprints, shards
from curvlib.influence.folder import stored_projection
from curvlib.influence.manifest import BlockRow, Manifest
from curvlib.influence.source import Source
from curvlib.losses import CrossEntropy, Loss, check_loss
from curvlib.operators import Projection
from curvlib.pytree import Tree, flatten, tree_map

AT_ONCE = 1 << 20  # numbers that are multiplied together: few enough to stay in the cache where rows are converted

Sketches = Mapping[str, Tensor]
Scores = Tensor | dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Index:
    """The sketches of N examples on disk, of which inner products with those of queries are influence scores.

    Queries are a batch or a data set `over` a loader, as in ``index.scores(model_fn, params, queries)``; or sketches
    {block: [Q, *shape]}, as in ``index.scores(sketches)``: those of a vector, ``index.projection(v)``, or of a batch,
    ``index.projection(cv.per_example_gradients(...))``. Sketches and results live on the same device.

    ``print(index)`` shows blocks and sizes. Scores of several checkpoints are averaged by
    ``sum(index.scores(model_fn, p, queries) for index, p in zip(indexes, checkpoints)) / len(indexes)``. Two indexes of
    one projection are one by ``torch.cat([a.scores(sketches), b.scores(sketches)], 1)``.

    Every file has checksums. Those of the rows are compared when an index reads a file for the first time, and again
    only if the file has been changed since; `check` compares all.

    Args:
        folder: where it is.
        manifest: what it holds.
        verified: the states of files whose rows have been compared with their checksums, by name; filled on the way.

    Example:
        >>> import tempfile
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(30, 20))
        >>> train = torch.randn(10, 30), torch.randint(20, (10,))
        >>> root = cv.kfac(model_fn, params, train).power(-0.5, cv.FactoredTikhonov(0.1))
        >>> folder = tempfile.TemporaryDirectory()
        >>> index = cv.influence.build(folder.name, root.project(cv.sketch(params, rank=8)), model_fn, params, train)
        >>> print(index)
        block   parameters  sketch  bytes a row  share
        weight  620         8 x 8   256          100.0%
        all     620                 256          100.0%
        10 examples in float32, 2560 bytes of rows in 1 files; scores are attributed to these parameters only, not to
        what model_fn closes over
        >>> values, examples = index.top(model_fn, params, train, k=3)
        >>> examples.shape
        torch.Size([10, 3])
        >>> folder.cleanup()
    """

    folder: Path
    manifest: Manifest
    verified: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.manifest.examples

    def __str__(self) -> str:
        return str(self.manifest)

    @property
    def blocks(self) -> tuple[BlockRow, ...]:
        """The blocks of a row."""
        return self.manifest.recipe.blocks

    @functools.cached_property
    def projection(self) -> Projection:
        """What the rows were made with, read from disk.

        Raises:
            FormatError: the file is missing or damaged, or another projection.
        """
        return stored_projection(self.folder, self.manifest.recipe)

    def check(self) -> None:
        """Reads all files and compares their checksums.

        Raises:
            FormatError: a file is damaged or missing; names it.
        """
        stored_projection(self.folder, self.manifest.recipe)
        for shard in self.manifest.shards:
            state = shards.state(self.folder, shard, self.manifest.recipe)
            shards.check(self.folder, shard, self.manifest.recipe)
            self.verified[shard.file] = state

    @overload
    def scores(self, sketches: Sketches, /, *, by_block: bool = ...) -> Scores: ...

    @overload
    def scores(
        self,
        model_fn: ModelFn,
        params: Tree,
        queries: Batch | DataSet,
        /,
        *,
        loss: Loss = ...,
        by_block: bool = ...,
        plan: Plan | Plans | None = ...,
    ) -> Scores: ...

    def scores(
        self,
        *queries: Any,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        by_block: bool = False,
        plan: Plan | Plans | None = None,
    ) -> Scores:
        """Inner products of all rows with the sketches of queries: estimates of g_q^T (curv + damping)^-1 g_n.

        Rows are mapped into memory and read once. The first call also compares their checksums.

        Args:
            *queries: ``model_fn, params, queries`` with the params that the index was made for; or ``sketches``,
                see the class.
            loss: what is measured on queries, if they are data.
            by_block: what each block contributes, by its name.
            plan: the model's `plan`, if already made for inputs of these shapes; or `Plans`.

        Returns:
            Tensor [Q, N] in float32 (float64 for rows in float64), or a dictionary of them for ``by_block``.

        Raises:
            ArgumentError: model_fn, params or queries are missing, or params are those of another checkpoint, or the
                loader is in random order; or a block's sketches are missing.
            ShapeError: sketches of another shape; names the block.
            DtypeError: sketches that are not floating-point tensors; names the block.
            NonFiniteError: a query's sketch is not finite; names block and query.
            PytreeError: params are no pytree of tensors.
            FormatError: a file is damaged; names it.
        """
        rows = self.query_rows(queries, loss, plan)
        if not by_block:
            return torch.cat([rows @ part.mT for _, part in self.parts(rows)], 1)
        found: dict[str, list[Tensor]] = {block.name: [] for block in self.blocks}
        for _, part in self.parts(rows):
            for block in self.blocks:
                found[block.name].append(rows[:, block.part] @ part[:, block.part].mT)
        return {name: torch.cat(parts, 1) for name, parts in found.items()}

    @overload
    def top(self, sketches: Sketches, /, *, k: int) -> tuple[Tensor, Tensor]: ...

    @overload
    def top(
        self,
        model_fn: ModelFn,
        params: Tree,
        queries: Batch | DataSet,
        /,
        *,
        k: int,
        loss: Loss = ...,
        plan: Plan | Plans | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def top(
        self,
        *queries: Any,
        k: int,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        plan: Plan | Plans | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k examples with the greatest scores for every query; scores of all are never held together.

        Args:
            *queries: as for `scores`, as are the other arguments. Those with the smallest scores are found by sketches
                with the opposite sign.
            k: how many.
            loss: what is measured on queries, if they are data.
            plan: the model's plan, or `Plans`.

        Returns:
            (scores [Q, k], descending; numbers of the examples [Q, k]).

        Raises:
            ArgumentError: not 1 <= k <= N; or as for `scores`, as are the other errors.
        """
        if not 1 <= k <= len(self):
            raise ArgumentError(f"k must lie between 1 and the {len(self)} examples of the index, got {k}")
        rows = self.query_rows(queries, loss, plan)
        values = rows.new_empty(len(rows), 0)
        examples = torch.empty(len(rows), 0, dtype=torch.long, device=rows.device)
        for start, part in self.parts(rows):
            scores = rows @ part.mT
            numbers = torch.arange(start, start + len(part), device=rows.device).expand_as(scores)
            values, examples = torch.cat([values, scores], 1), torch.cat([examples, numbers], 1)
            values, places = values.topk(min(k, values.shape[1]), dim=1)
            examples = examples.gather(1, places)
        return values, examples

    def parts(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number of the first example, rows [n, width]) of all rows in order, with device and dtype of a tensor.

        They are to be used before the next ones are asked for, and to be trusted when there are no more: a file's
        checksum is compared after its last part.
        """
        recipe, start = self.manifest.recipe, 0
        step = max(1, AT_ONCE // recipe.width)
        converted = recipe.torch_dtype != like.dtype or like.device.type != "cpu"
        buffer = like.new_empty(step if converted else 0, recipe.width)
        for shard in self.manifest.shards:
            state = shards.state(self.folder, shard, recipe)
            known = self.verified.get(shard.file) == state
            for part in shards.parts(self.folder, shard, recipe, step, verify=not known):
                yield start, buffer[: len(part)].copy_(part) if converted else part
                start += len(part)
            self.verified[shard.file] = state

    def query_rows(self, given: tuple[Any, ...], loss: Loss, plan: Plan | Plans | None) -> Tensor:
        """The rows [Q, width] of queries, in float32 or float64."""
        match given:
            case (Mapping() as queries,):
                pass
            case (model_fn, params, data):
                queries = self.sketches(model_fn, params, data, loss, plan)
            case _:
                raise ArgumentError(
                    "queries that are data need model_fn and params: give index.scores(model_fn, params, queries); "
                    "sketches {block: [Q, ...]} are given alone"
                )
        dtype = torch.promote_types(self.manifest.recipe.torch_dtype, torch.float32)
        known = [block.name for block in self.blocks]
        if sorted(queries) != sorted(known):
            raise ArgumentError(
                f"sketches of queries must be those of the blocks {', '.join(known)}, got {', '.join(queries)}"
            )
        rows = []
        for block in self.blocks:
            sketch = queries[block.name]
            if not isinstance(sketch, Tensor) or not sketch.is_floating_point():
                kind = sketch.dtype if isinstance(sketch, Tensor) else f"a {type(sketch).__name__}"
                raise DtypeError(f"block {block.name!r}: sketches of queries should be floating tensors, got {kind}")
            sketch = sketch.detach()
            if tuple(sketch.shape) == block.shape:
                sketch = sketch.unsqueeze(0)
            if tuple(sketch.shape[1:]) != block.shape:
                raise ShapeError(
                    f"block {block.name!r}: sketches of queries should have shape [Q, "
                    f"{', '.join(map(str, block.shape))}], got {tuple(queries[block.name].shape)}"
                )
            rows.append(sketch.flatten(1).to(dtype))
            if not rows[-1].isfinite().all():
                query = int((~rows[-1].isfinite()).any(1).nonzero()[0])
                raise NonFiniteError(
                    f"block {block.name!r}: the sketch of query {query} is not finite in {dtype}; look at the query"
                )
        if len({len(part) for part in rows}) > 1:
            raise ShapeError("the blocks hold sketches of different numbers of queries")
        return torch.cat(rows, 1)

    def sketches(
        self, model_fn: ModelFn, params: Tree, queries: Batch | DataSet, loss: Loss, plan: Plan | Plans | None
    ) -> dict[str, Tensor]:
        """The sketches of data."""
        check_model(model_fn, params)
        check_loss(loss)
        if fingerprints.of_params(params) != self.manifest.recipe.params:
            raise ArgumentError(
                f"params are not those that the index in {self.folder} was made for: take them from the same "
                "checkpoint, in the same dtype"
            )
        device = flatten(params)[0][0].device
        projection = tree_map(lambda x: x.to(device), self.projection)
        check_order(queries, "scores have one row a query, in the order of the data")
        parts = [projection(found) for found in Source(model_fn, params, queries, loss, None, Plans.of(plan))]
        return {block.name: torch.cat([part[block.name] for part in parts]) for block in self.blocks}


def load(path: str | os.PathLike[str], *, verify: bool = False) -> Index:
    """Opens an index that `build` has finished.

    The sizes of all files of rows are compared with the manifest, which has a checksum. Other checksums are compared
    when a file is read for the first time. Sketches can be queried without the file of the projection.

    Args:
        path: the folder.
        verify: read all files now, and compare their checksums.

    Raises:
        FormatError: there is no index, or it is not finished, damaged or of a newer version; names the file.
        OSError: there is no such folder, or it cannot be read.

    Example:
        >>> import tempfile
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> train = torch.randn(10, 3), torch.randint(2, (10,))
        >>> projection = cv.ekfac(model_fn, params, train).power(-0.5, 0.1).project(cv.EigenSketch(rank=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cv.influence.build(folder, projection, model_fn, params, train)
        ...     load(folder).scores(model_fn, params, train).shape
        torch.Size([10, 10])
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; cv.influence.build makes one")
    manifest = Manifest.read(folder)
    if manifest is None:
        raise FormatError(f"{folder} holds no index: it has no manifest.json; give the folder that build was given")
    if not manifest.finished:
        raise FormatError(f"the index in {folder} is not finished; call build again with the same arguments")
    for shard in manifest.shards:
        shards.state(folder, shard, manifest.recipe)
    index = Index(folder, manifest)
    if verify:
        index.check()
    return index
