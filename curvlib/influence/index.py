"""An index of sketched gradients, read from disk by mapping files into memory."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from curvlib.arguments import check_model
from curvlib.capture.engines import ModelFn
from curvlib.errors import ArgumentError, DtypeError, FormatError, NonFiniteError, ShapeError
from curvlib.gradients.data import Batch, DataSet
from curvlib.influence import fingerprints, shards
from curvlib.influence.folder import stored_projection
from curvlib.influence.manifest import BlockRow, Manifest
from curvlib.losses import CrossEntropy, Loss, check_loss
from curvlib.operators import Projection
from curvlib.pytree import Tree, flatten, tree_map

AT_ONCE = 1 << 20  # numbers that are multiplied together: few enough to stay in the cache where rows are converted

Queries = Mapping[str, Tensor] | Batch | DataSet


@dataclasses.dataclass(frozen=True)
class Index:
    """The sketches of N examples on disk, of which inner products with those of queries are influence scores.

    Queries are sketches {block: [Q, *shape]}, from ``index.projection.per_example(...)``, or those of one vector,
    ``index.projection(v)``; or a batch or a data set `over` a loader, together with model_fn and params. Sketches and
    results live on the same device.

    ``print(index)`` shows blocks and sizes. Scores of several checkpoints are averaged by
    ``sum(index.scores(queries, model_fn, p) for index, p in zip(indexes, checkpoints)) / len(indexes)``. Two indexes of
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
        >>> values, examples = index.top(3, train, model_fn, params)
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

    def scores(
        self,
        queries: Queries,
        model_fn: ModelFn | None = None,
        params: Tree = None,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
        by_block: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Inner products of all rows with the sketches of queries: estimates of g_q^T (curv + damping)^-1 g_n.

        Rows are mapped into memory and read once. The first call also compares their checksums.

        Args:
            queries: sketches or data; see the class.
            model_fn: of the queries, if they are data.
            params: pytree of tensors, those that the index was made for.
            loss: what is measured on queries, if they are data.
            by_block: what each block contributes, by its name.

        Returns:
            Tensor [Q, N] in float32 (float64 for rows in float64), or a dictionary of them for ``by_block``.

        Raises:
            ArgumentError: queries are data and model_fn or params are missing, or params are those of another
                checkpoint, or the loader is in random order; or a block's sketches are missing.
            ShapeError: sketches of another shape; names the block.
            DtypeError: sketches that are not floating-point tensors; names the block.
            NonFiniteError: a query's sketch is not finite; names block and query.
            PytreeError: params are no pytree of tensors.
            FormatError: a file is damaged; names it.
        """
        rows = self.query_rows(queries, model_fn, params, loss)
        if not by_block:
            return torch.cat([rows @ part.mT for _, part in self.parts(rows)], 1)
        found: dict[str, list[Tensor]] = {block.name: [] for block in self.blocks}
        for _, part in self.parts(rows):
            for block in self.blocks:
                found[block.name].append(rows[:, block.part] @ part[:, block.part].mT)
        return {name: torch.cat(parts, 1) for name, parts in found.items()}

    def top(
        self,
        k: int,
        queries: Queries,
        model_fn: ModelFn | None = None,
        params: Tree = None,
        *,
        loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    ) -> tuple[Tensor, Tensor]:
        """The k examples with the greatest scores for every query; scores of all are never held together.

        Args:
            k: how many.
            queries: as for `scores`, as are the other arguments. Those with the smallest scores are found by sketches
                with the opposite sign.
            model_fn: of the queries, if they are data.
            params: pytree of tensors, those that the index was made for.
            loss: what is measured on queries, if they are data.

        Returns:
            (scores [Q, k], descending; numbers of the examples [Q, k]).

        Raises:
            ArgumentError: not 1 <= k <= N; or as for `scores`, as are the other errors.
        """
        if not 1 <= k <= len(self):
            raise ArgumentError(f"k must lie between 1 and the {len(self)} examples of the index, got {k}")
        rows = self.query_rows(queries, model_fn, params, loss)
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

    def query_rows(self, queries: Queries, model_fn: ModelFn | None, params: Tree, loss: Loss) -> Tensor:
        """The rows [Q, width] of queries, in float32 or float64."""
        if not isinstance(queries, Mapping):
            queries = self.sketches(queries, model_fn, params, loss)
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
        self, queries: Batch | DataSet, model_fn: ModelFn | None, params: Tree, loss: Loss
    ) -> dict[str, Tensor]:
        """The sketches of data."""
        if model_fn is None or params is None:
            raise ArgumentError("queries that are data need model_fn and params; sketches are {block: [Q, ...]}")
        check_model(model_fn, params)
        check_loss(loss)
        if fingerprints.of_params(params) != self.manifest.recipe.params:
            raise ArgumentError(
                f"params are not those that the index in {self.folder} was made for: take them from the same "
                "checkpoint, in the same dtype"
            )
        device = flatten(params)[0][0].device
        projection = tree_map(lambda x: x.to(device), self.projection)
        found: dict[str, Tensor] = projection.per_example(model_fn, params, queries, loss=loss)
        return found


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
        ...     load(folder).scores(train, model_fn, params).shape
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
