"""Exact curvature operators, matrix-free: GGN, Hessian, Fisher and Gramian of the reduced objective.

With outputs f_n, terms l(f_n, y_n) and the loss's normalizer c (see `curvlib.losses.Loss`),

    GGN      1/c sum_n J_n^T H_n J_n,  H_n the Hessian of term n in f_n;
    Fisher   1/c sum_n J_n^T E[s s^T] J_n,  s gradients of term n at drawn (mc), all (type-2) or given targets;
    Hessian  1/c sum_n of the Hessians of l(f_n(params), y_n) in params;
    Gramian  sum_n J_n^T J_n,

after Schraudolph (2002) and Martens (2020, arXiv 1412.1193). A product walks through the data once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from curvlib.arguments import check_model
from curvlib.capture.engines import ModelFn
from curvlib.errors import ArgumentError, NonFiniteError
from curvlib.estimators.kinds import Draws, How, Kind, LossHessian, SampledFisher, SecondDerivative, Unweighted
from curvlib.estimators.linearization import Mode
from curvlib.estimators.passes import default_generator
from curvlib.estimators.running import LeafFn, Leaves, Running, twice_differentiable
from curvlib.estimators.source import CachedBatch, PytreeTemplate, Source, Streamed, Traversal, cut, detached
from curvlib.estimators.trial import Case, settle
from curvlib.gradients.data import Batch, DataSet, batches, check_order
from curvlib.linalg.eager import differentiable, is_eager, may_look_at, ordinary
from curvlib.linalg.gram import full_precision
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators.implicit import Implicit
from curvlib.operators.interfaces import QuadraticForm
from curvlib.operators.vectors import at_least_single, widest
from curvlib.pytree import Domain, Tree, flatten, register, static

FisherKind = Literal["mc", "empirical", "type-2"]
Product = Callable[[LeafFn, Leaves, Any, Draws, Leaves, How], tuple[Leaves, Tensor]]


@register
class MatrixFree(Implicit, QuadraticForm):
    """A curvature whose products are taken by automatic differentiation, batch by batch.

    Made by `ggn`, `hessian`, `fisher` and `gramian`.

    Args:
        params: where the curvature is taken.
        source: the data.
        scale: 0-d tensor, a factor.
        model_fn: pure function (params, inputs) -> outputs.
        kind: which curvature.
        mode: how products are differentiated, "forward" or "reverse".
        width: how many stacked vectors are multiplied at a time.
        running: how the model is run.
    """

    params: Tree
    source: Source
    scale: Tensor
    model_fn: ModelFn = static()
    kind: Kind = static()
    mode: Mode = static()
    width: int = static()
    running: Running = static(default=Running())

    @property
    def domain(self) -> Domain:
        return Domain.of(self.params)

    @property
    def model_dtype(self) -> torch.dtype:
        return at_least_single(widest(x.dtype for x in flatten(self.params)[0]))

    def _recast(self, dtype: torch.dtype) -> MatrixFree:
        return self

    def _apply(self, vectors: Tree, leading: int) -> Tree:
        domain = self.domain
        leaves = domain.leaves(vectors, leading)
        number = math.prod(leaves[0].shape[:leading])
        if not number:
            return domain.tree([torch.zeros_like(v) for v in leaves])
        total = self._summed(self.kind.multiply, leaves, number)
        return domain.tree([x.to(v.dtype).reshape(v.shape) for x, v in zip(total, leaves, strict=True)])

    def _quadratic(self, v: Tree) -> Tensor:
        leaves = self.domain.leaves(v)
        return self._summed(self.kind.form, leaves, 1)[0].to(leaves[0].dtype)

    def _summed(self, product: Product, leaves: Leaves, number: int) -> Leaves:
        """The sum of a `Kind`'s products with the vectors over the data, reduced and scaled."""
        params = flatten(self.params)[0]
        total: Leaves = []
        normalizer = torch.zeros_like(self.scale)
        replay = self.running.replay(params, self.source.loader)
        with differentiable(), replay.isolated():
            pairs = zip(leaves, params, strict=True)
            stack = [ordinary(v).reshape(number, *x.shape).to(x.dtype) for v, x in pairs]
            for inputs, targets, draws in self.source.batches():
                replay.begin()
                fn = self.running.on_leaves(self.model_fn, self.domain, inputs, replay)
                with twice_differentiable():
                    part, count = product(fn, params, targets, draws, stack, (self.mode, self.width))
                part = [full_precision(x) for x in part]
                total = [a + b for a, b in zip(total, part, strict=True)] if total else part
                normalizer = normalizer + count
                replay.end()
            total = cut(total, leaves)
            if isinstance(self.source, Streamed):
                check_total(self.domain, total, normalizer, leaves)
            scale = self.scale if self.kind.reduction == "sum" else self.scale / normalizer
            return [scale * x for x in total]

    def _scale(self, factor: float | Tensor) -> MatrixFree:
        return dataclasses.replace(self, scale=factor * self.scale)


def check_total(domain: Domain, total: Leaves, normalizer: Tensor, vectors: Leaves) -> None:
    """Refuses what a walk through a data set has summed up to, where that may be looked at and vectors are finite.

    Raises:
        NonFiniteError: an infinite or undefined entry, or no target counts.
    """
    if not may_look_at(normalizer):
        return
    check_counts(normalizer)
    if all(torch.isfinite(v.sum()) for v in vectors):
        names = domain.names if len(total) == len(domain.names) else ("v^T curv v",)
        for name, x in zip(names, total, strict=True):
            if not torch.isfinite(x.sum()):
                raise NonFiniteError(
                    f"the product with a finite vector is inf or nan at parameter {name!r}: inputs, outputs or the "
                    "model's derivative contain inf or nan on some batch"
                )


def check_counts(normalizer: Tensor) -> None:
    """Refuses data of which nothing counts.

    Raises:
        NonFiniteError: the normalizer is zero.
    """
    if normalizer == 0:
        raise NonFiniteError("no target counts: all of them are ignored, and their mean is undefined")


def matrix_free(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch | DataSet,
    kind: Kind,
    mode: Mode | None,
    generator: torch.Generator | None = None,
) -> MatrixFree:
    """The operator of a kind, once trials on the (first) batch have shown how to differentiate the model."""
    check_model(model_fn, params)
    Domain.of(params)
    params = detached(params)
    leaves = flatten(params)[0]
    streamed = None
    if isinstance(batch, DataSet):
        streamed = Streamed(Traversal.of(batch, generator))
        generator = streamed.walk.restarted()
    loader = None if streamed is None else streamed.loader
    running = Running.now(leaves, loader) if is_eager() else Running()
    replay = running.replay(leaves, loader)
    with differentiable(), replay.isolated():
        first = next(batches(batch))
        replay.begin()
        tensors, frame = PytreeTemplate.split(first)
        inputs, targets = frame.fill(tensors)
        case = Case(kind, model_fn, params, inputs, targets, generator, running, replay)
        case, found, chosen, width = settle(case, mode, all_data=streamed is None)
        if streamed is not None:
            if found is not None and found.draws:
                check_order(batch, "the model draws random numbers, which belong to the order of the examples")
        elif found is not None and kind.reduction == "mean":
            check_counts(kind.normalizer(found.outputs, case.targets))
        drawn = case.draws if isinstance(case.draws, Tensor) else None
        source: Source = CachedBatch(tensors, drawn, frame) if streamed is None else streamed
        one = full_precision(leaves[0]).new_ones(())
    return MatrixFree(params, source, one, model_fn, kind, chosen, width, case.running)


def ggn(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    mode: Mode | None = None,
) -> MatrixFree:
    """The generalized Gauss-Newton matrix of the reduced objective, exact and matrix-free.

    A product takes one forward pass with tangents and one backward pass, and `quadratic` the former alone; stacked
    vectors (`matmat`) share the forward pass without tangents. Attention runs by its formula, as fused kernels cannot
    be differentiated twice.

    A derivative is that of reverse mode, on which a trial on the (first) batch checks the products; blocks without
    gradients, detached tensors and padding of embeddings have none. A model that draws random numbers (dropout in
    training) draws the same in every product: those that it would draw next when the operator is made. No generator
    moves, and no tensor is changed.

    Args:
        model_fn: pure function (params, inputs) -> outputs [N, ...].
        params: pytree of floating-point tensors.
        batch: (inputs, targets) with N examples, or a whole data set `over` a loader that can be read again: every
            product walks through it.
        loss: the objective.
        mode: how products are differentiated: "forward" uses forward mode, "reverse" differentiates the backward pass.
            None: forward, unless that fails in the trial, or disagrees with the model's gradients.

    Returns:
        An operator on ``params``. What needs its entries or eigenvalues (`diag`, `trace`, `power`, `sample`, ...) goes
        through the dense matrix, up to 2048 parameters; `inverse` solves by conjugate gradients (see `CG`).

    Raises:
        TargetError: the targets do not fit the loss.
        EmptyBatchError: there is no example.
        CaptureError: the model changes its parameters, gives other outputs each time, or changes gradients on their
            way back so that no product agrees with them.
        UnusedParameterError: the outputs do not depend on a parameter; names it.
        NonFiniteError: a product is infinite or undefined, or no target counts.
        ArgumentError: a loader that can be read only once, or gives other examples each time, or in random order where
            the model draws; an unknown mode.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> curv = ggn(model_fn, params, (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
        >>> (curv @ params)["weight"].shape, curv.to_dense().shape
        (torch.Size([2, 3]), torch.Size([8, 8]))
    """
    return matrix_free(model_fn, params, batch, LossHessian(loss), mode)


def hessian(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    mode: Mode | None = None,
) -> MatrixFree:
    """The Hessian of the reduced objective in the parameters, exact and matrix-free; it may be indefinite.

    Products differentiate the gradient, in forward mode where the model has one (see `ggn` for all arguments, and for
    all errors).

    Raises:
        CaptureError: the model is refused, or its gradients are those of no function, so that no product is symmetric.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> curv = hessian(model_fn, params, (torch.randn(5, 3), torch.randn(5, 2)), loss=cv.MSE())
        >>> bool(curv.quadratic(params) > 0)
        True
    """
    return matrix_free(model_fn, params, batch, SecondDerivative(loss), mode)


def fisher(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    fisher: FisherKind = "mc",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    mode: Mode | None = None,
) -> MatrixFree:
    """The Fisher information of the reduced objective, exact and matrix-free.

    Args:
        model_fn: pure function (params, inputs) -> outputs [N, ...].
        params: pytree of floating-point tensors.
        batch: (inputs, targets), or a whole data set `over` a loader that can be read again, in the same order if
            targets are drawn.
        loss: the objective.
        fisher: ``type-2``: the expectation over targets of the model's likelihood, which equals the GGN; ``mc``: the
            mean over ``mc_samples`` drawn targets an example, drawn once when the operator is made; ``empirical``: the
            given targets.
        mc_samples: draws an example for ``mc``.
        generator: randomness for ``mc``; None means a fresh generator with seed 0.
        mode: see `ggn`.

    Raises:
        ArgumentError: an unknown ``fisher``, no draw, a loader in random order under ``mc``; and see `ggn` for this and
            all other errors.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> curv = fisher(model_fn, params, batch, fisher="empirical")
        >>> int(torch.linalg.matrix_rank(curv.to_dense())) <= 5
        True
    """
    if fisher not in get_args(FisherKind):
        raise ArgumentError(f"fisher must be one of {', '.join(get_args(FisherKind))}, got {fisher!r}")
    if mc_samples < 1:
        raise ArgumentError(f"mc_samples must be at least 1, got {mc_samples}")
    if fisher == "type-2":
        return matrix_free(model_fn, params, batch, LossHessian(loss), mode)
    if fisher == "mc" and generator is None:
        check_model(model_fn, params)
        generator = default_generator(params)
    return matrix_free(
        model_fn, params, batch, SampledFisher(loss, mc_samples), mode, generator if fisher == "mc" else None
    )


def gramian(model_fn: ModelFn, params: Tree, batch: Batch | DataSet, *, mode: Mode | None = None) -> MatrixFree:
    """The Gramian J^T J of the model's outputs, summed over examples: the GGN with the loss Hessian I.

    The batch's targets are not looked at; see `ggn` for the arguments, and for all errors.

    Raises:
        CaptureError: the model is refused.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 1, bias=False))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(gramian(model_fn, params, (x, None)).to_dense(), x.T @ x, atol=1e-5)
        True
    """
    return matrix_free(model_fn, params, batch, Unweighted(), mode)
