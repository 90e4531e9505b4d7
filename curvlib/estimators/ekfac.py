"""EKFAC and TKFAC: Kronecker curvature that is corrected by per-example gradients.

EKFAC (George et al. 2018, arXiv 1806.03884) keeps the Kronecker eigenbasis of KFAC's factors and replaces the products
of their eigenvalues by the exact second moments of per-example gradients in that basis,

    Lambda_ij = E[(Q_G^T D_n Q_A)_ij^2],

which is the best choice in Frobenius norm for that basis, and makes the trace exact. TKFAC (Gao et al. 2020, arXiv
2011.10741) stays a Kronecker product and makes its trace exact.
"""

from __future__ import annotations

from typing import Any

import torch

from curvlib.arguments import check_model
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.capture.plan import Block
from curvlib.errors import ArgumentError, NotKroneckerError, naming
from curvlib.estimators.correction import (
    Bases,
    EigenSquares,
    FewRows,
    HoldingCollector,
    MomentCollector,
    Totals,
    TraceMoments,
)
from curvlib.estimators.elementwise import ElementwiseCollector, elementwise_block
from curvlib.estimators.factors import UseSums, added, assemble, check_finite, kronecker_block
from curvlib.estimators.kfac import kfac
from curvlib.estimators.options import Options
from curvlib.estimators.statistics import measure_all
from curvlib.factors.axes import entrywise
from curvlib.gradients.data import Batch, DataSet, batches, repeatable
from curvlib.gradients.plans import Plans, require_examples
from curvlib.gradients.uses import curvature_dtype
from curvlib.layers.rows import summed
from curvlib.layers.wide import Wide, WideDiagonal, as_side
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators import (
    BlockDiagonal,
    EigenKronecker,
    Kronecker,
    LowRankBasis,
    Operator,
    OrthogonalBasis,
    Sum,
)
from curvlib.pytree import Domain, Tree, flatten

CORRECTIONS = ("example", "position")


def ekfac(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    fisher: str = "mc",
    sharing: str = "expand",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    correction: str = "example",
    elementwise: str = "diagonal",
    wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
    engine: str | None = None,
    plan: Plan | Plans | None = None,
) -> BlockDiagonal:
    """Eigenvalue-corrected KFAC: `kfac`, then `eigenvalue_correct` on the same data with the same draws.

    One batch and one vector an example take one pass, which holds inputs and output gradients of all layers.

    Args:
        model_fn: as for `kfac`, as are the arguments not named here.
        params: pytree of floating-point tensors.
        batch: (inputs, targets), or a whole data set `over` a loader, which is gone through twice.
        loss: the objective.
        fisher: ``type-2``, ``mc`` or ``empirical``.
        sharing: how the factors, and so the eigenbasis, are made.
        mc_samples: draws an example for ``mc``.
        generator: randomness for ``mc``; advanced once.
        correction: eigenvalues from the gradient of each ``example``, or of each ``position`` as if it were one.
        elementwise: ``diagonal`` or ``dense``.
        wide: what is kept of wide factors; a diagonal one has the canonical basis.
        engine: "functional", "autograd" or None.
        plan: the model's plan.

    Returns:
        `EigenKronecker` blocks. A tied weight has the eigenbasis of its uses' merged factors.

    Raises:
        ArgumentError: ``forward-only``, which has no gradients; a data set that can be read only once.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> cv.ekfac(model_fn, params, batch).blocks["weight"].values.shape
        torch.Size([2, 4])
    """
    check_model(model_fn, params)
    check_gradients(fisher, correction)
    repeatable(batch)
    if fisher == "mc" and generator is None:
        generator = torch.Generator(flatten(params)[0][0].device).manual_seed(0)
    if not isinstance(batch, DataSet) and fisher != "type-2" and mc_samples == 1:
        options = Options(loss, fisher, sharing, mc_samples, elementwise, "sum", wide, engine)
        return corrected_in_one_pass(model_fn, params, batch, options, generator, plan, correction)
    plan = Plans.of(plan)
    require_examples(plan.fitting(model_fn, params, next(batches(batch))[0]))  # before the data is gone through
    again = None if generator is None else generator.clone_state()
    shared: dict[str, Any] = {"loss": loss, "fisher": fisher, "mc_samples": mc_samples, "engine": engine, "plan": plan}
    factors = kfac(
        model_fn, params, batch, sharing=sharing, generator=generator, elementwise=elementwise, wide=wide, **shared
    )
    return eigenvalue_correct(factors, model_fn, params, batch, generator=again, correction=correction, **shared)


def corrected_in_one_pass(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch,
    options: Options,
    generator: torch.Generator | None,
    plan: Plan | Plans | None,
    correction: str,
) -> BlockDiagonal:
    """EKFAC of one batch and one vector an example: rows and gradients of all layers are few enough to be held."""
    statistics = measure_all(
        model_fn,
        params,
        batch,
        options,
        generator,
        plan,
        lambda now: (HoldingCollector(now), ElementwiseCollector(now)),
    )

    def make(block: Block, sums: Any) -> Operator:
        if not block.kronecker:
            return elementwise_block(block, sums, statistics, options)
        factors = kronecker_block(block, sums.factors, statistics, options)
        check_finite(factors)
        bases = eigenbases(factors)
        spanned = spanned_sides(sums.factors)  # there, all moments outside of the low-rank basis are zero
        left, right = (
            OrthogonalBasis(x.vectors) if few and isinstance(x, LowRankBasis) else x
            for x, few in zip(bases, spanned, strict=True)
        )
        moment = EigenSquares({block.name: (left, right)}, positionwise=correction == "position")
        found = [moment.of(block, uses)[0] for uses in sums.stacks]
        values = summed(found) if found else moment.zero(block, statistics.normalizer)[0]
        values = torch.nn.functional.pad(values, (0, int(spanned[1]), 0, int(spanned[0])))
        return EigenKronecker(*bases, values / statistics.divisor(options))

    return assemble(statistics, Domain.of(params), make)


def eigenvalue_correct(
    curv: BlockDiagonal,
    model_fn: ModelFn,
    params: Tree,
    batch: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    fisher: str = "mc",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    correction: str = "example",
    engine: str | None = None,
    plan: Plan | Plans | None = None,
) -> BlockDiagonal:
    """The EKFAC step for any Kronecker basis: eigenvalues from per-example gradients, eigenvectors from ``curv``.

    Args:
        curv: Kronecker blocks on ``params`` (from `kfac`, `tkfac`, Shampoo, DyKAF, ...); others stay as they are.
        model_fn: as for `ekfac`, as are all others.
        params: pytree of floating-point tensors.
        batch: (inputs, targets) or a data set.
        loss: the objective.
        fisher: ``type-2``, ``mc`` or ``empirical``.
        mc_samples: draws an example for ``mc``.
        generator: randomness for ``mc``.
        correction: ``example`` or ``position``.
        engine: "functional", "autograd" or None.
        plan: the model's plan.

    Returns:
        The curvature with `EigenKronecker` blocks.

    Raises:
        NotKroneckerError: the block of a weight has no eigenbasis a side; names it.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> curv = cv.kfac(model_fn, params, batch, fisher="empirical")
        >>> exact = cv.eigenvalue_correct(curv, model_fn, params, batch, fisher="empirical")
        >>> type(exact.blocks["weight"]).__name__
        'EigenKronecker'
    """
    check_model(model_fn, params)
    check_gradients(fisher, correction)
    options = Options(loss, fisher, "expand", mc_samples, "diagonal", "sum", WideDiagonal(), engine)
    if not isinstance(curv, BlockDiagonal):
        raise ArgumentError(
            f"the first argument must be a curvature with blocks, such as cv.kfac(...), got a {type(curv).__name__}"
        )
    curv = curv.widened(curvature_dtype(params))
    bases: dict[str, Bases] = {}
    for name, block in curv.blocks.items():
        if isinstance(block, (Kronecker, EigenKronecker, Sum)):
            with naming(name):
                bases[name] = eigenbases(block)
    moment = EigenSquares(bases, positionwise=correction == "position")
    statistics = measure_all(
        model_fn, params, batch, options, generator, plan, lambda now: (MomentCollector(now, moment), None)
    )

    def make(block: Block, sums: Totals | None) -> Operator:
        if sums is None:
            return curv.blocks[block.name]
        return EigenKronecker(*bases[block.name], sums.tensors[0] / statistics.divisor(options))

    return assemble(statistics, Domain.of(params), make)


def tkfac(
    model_fn: ModelFn,
    params: Tree,
    batch: Batch | DataSet,
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    fisher: str = "mc",
    sharing: str = "expand",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    elementwise: str = "diagonal",
    wide: Wide = WideDiagonal(),  # noqa: B008 (immutable)
    engine: str | None = None,
    plan: Plan | Plans | None = None,
) -> BlockDiagonal:
    """Trace-restricted KFAC: L (x) R / tr L with L = E[D D^T], R = E[D^T D] for per-example gradients D.

    The trace of each block is that of the Fisher's block, exactly, however often a weight is used. Without sharing,
    D = g a^T and L = E[|a|^2 g g^T], R = E[|g|^2 a a^T] (Gao et al. 2020, eq. 12).

    Args:
        model_fn: as for `kfac`, as are all others.
        params: pytree of floating-point tensors.
        batch: (inputs, targets) or a data set.
        loss: the objective.
        fisher: ``type-2``, ``mc`` or ``empirical``.
        sharing: ``expand``: D is the example's gradient, sum_t g_t a_t^T; ``reduce``: (sum_t g_t)(mean_t a_t)^T, the
            mean being over positions whose targets count.
        mc_samples: draws an example for ``mc``.
        generator: randomness for ``mc``; None: a fresh generator with seed 0.
        elementwise: ``diagonal`` or ``dense``.
        wide: what is kept of the factors of sides that are too wide for a dense one, as for `kfac`: every choice keeps
            the trace.
        engine: "functional", "autograd" or None.
        plan: the model's plan.

    Returns:
        `Kronecker` blocks. A factor is diagonal too where each example reads one entry of an embedding.

    Raises:
        ArgumentError: ``forward-only``, which has no gradients.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> curv, exact = (estimate(model_fn, params, batch, fisher="type-2") for estimate in (cv.tkfac, cv.ekfac))
        >>> torch.allclose(curv.trace(), exact.trace())
        True
    """
    check_gradients(fisher, "example")
    options = Options(loss, fisher, sharing, mc_samples, elementwise, "sum", wide, engine)
    statistics = measure_all(
        model_fn,
        params,
        batch,
        options,
        generator,
        plan,
        lambda now: (MomentCollector(now, TraceMoments(wide)), ElementwiseCollector(now)),
    )

    def make(block: Block, sums: Any) -> Operator:
        if not block.kronecker:
            return elementwise_block(block, sums, statistics, options)
        groups = len(block.layout.shape) - 2
        left, right = (moment / statistics.divisor(options) for moment in sums.tensors)
        trace = as_side(left, groups).traces()
        trace = torch.where(trace > 0, trace, torch.ones_like(trace))
        right = right / (entrywise(trace, right) if isinstance(right, torch.Tensor) else trace)
        return Kronecker(as_side(left, groups), as_side(right, groups))

    return assemble(statistics, Domain.of(params), make)


def check_gradients(fisher: str, correction: str) -> None:
    """Refuses what has no per-example gradients."""
    if fisher == "forward-only":
        raise ArgumentError("fisher='forward-only' has no gradients to correct eigenvalues with; use mc or type-2")
    if correction not in CORRECTIONS:
        raise ArgumentError(f"correction must be one of {', '.join(CORRECTIONS)}, got {correction!r}")


def eigenbases(block: Operator) -> Bases:
    """The eigenbases of a block's sides."""
    if isinstance(block, Sum):
        products = [term for term in block.terms if isinstance(term, Kronecker)]
        block = Kronecker(added([term.left for term in products]), added([term.right for term in products]))
    if isinstance(block, Kronecker):
        return block.left.eigen().basis, block.right.eigen().basis
    if isinstance(block, EigenKronecker):
        return block.left, block.right
    raise NotKroneckerError(
        f"a {type(block).__name__} has no eigenbasis a side; eigenvalue correction needs Kronecker factors"
    )


def spanned_sides(sums: UseSums) -> tuple[bool, bool]:
    """Which sides have a basis of the span of few rows: outputs, inputs."""
    outputs, inputs = [use.outputs for use in sums.uses], [use.inputs for use in sums.uses]
    return all(isinstance(x, FewRows) for x in outputs), all(isinstance(x, FewRows) for x in inputs)
