"""EKFAC and TKFAC: Kronecker curvature that is corrected by per-example gradients.

EKFAC (George et al. 2018, arXiv 1806.03884) keeps the Kronecker eigenbasis of KFAC's factors and replaces the products
of their eigenvalues by the exact second moments of per-example gradients in that basis,

    Lambda_ij = E[(Q_G^T D_n Q_A)_ij^2],

which is the best choice in Frobenius norm for that basis, and makes the trace exact. TKFAC (Gao et al. 2020, arXiv
2011.10741) stays a Kronecker product and makes its trace exact.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from curvlib.arguments import check_model
from curvlib.capture import Plan
from curvlib.capture.engines import ModelFn
from curvlib.capture.plan import Block
from curvlib.errors import ArgumentError, NotKroneckerError, PytreeError, ShapeError, naming
from curvlib.estimators.correction import (
    Bases,
    EigenSquares,
    FactorsAndUses,
    FewRows,
    HoldingCollector,
    MomentCollector,
    Totals,
    TraceMoments,
)
from curvlib.estimators.elementwise import LayerwiseOptions
from curvlib.estimators.factors import FactorCollector, UseSums, added, kronecker_block
from curvlib.estimators.kfac import KFACOptions
from curvlib.estimators.passes import default_generator, measure_all
from curvlib.estimators.statistics import Pass, Statistics, check_finite, then_assemble
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
from curvlib.pytree import Domain, Tree

CORRECTIONS = ("example", "position")


@dataclasses.dataclass(frozen=True)
class GradientOptions(LayerwiseOptions):
    """Of estimators that need gradients of single examples."""

    correction: str = "example"

    def __post_init__(self) -> None:
        if self.fisher == "forward-only":
            raise ArgumentError("fisher='forward-only' has no gradients to correct eigenvalues with; use mc or type-2")
        if self.correction not in CORRECTIONS:
            raise ArgumentError(f"correction must be one of {', '.join(CORRECTIONS)}, got {self.correction!r}")
        super().__post_init__()

    @property
    def positionwise(self) -> bool:
        """Whether each position is taken for an example."""
        return self.correction == "position"


@dataclasses.dataclass(frozen=True)
class EKFACOptions(GradientOptions):
    """The options of `ekfac` in given eigenbases."""

    estimator: ClassVar[str] = "cv.ekfac"

    def collector(self, now: Pass) -> MomentCollector:
        check_bases(now, others=False)
        return MomentCollector(now, EigenSquares(now.basis or {}, self.positionwise))

    def product(self, block: Block, sums: Totals, statistics: Statistics, *, reuse: bool) -> EigenKronecker:
        left, right = (statistics.basis or {})[block.name]
        return EigenKronecker(left, right, sums.tensors[0] / statistics.divisor())


@dataclasses.dataclass(frozen=True)
class CorrectionOptions(EKFACOptions):
    """The options of `eigenvalue_correct`: elementwise blocks are given."""

    estimator: ClassVar[str] = "cv.eigenvalue_correct"

    def collectors(self, now: Pass) -> tuple[MomentCollector, None]:
        check_bases(now, others=True)
        return self.collector(now), None

    def block(self, block: Block, statistics: Statistics, *, reuse: bool) -> Operator:
        if block.kronecker:
            return super().block(block, statistics, reuse=reuse)
        given: Operator = (statistics.basis or {})[block.name]
        return given


@dataclasses.dataclass(frozen=True)
class OnePassOptions(GradientOptions):
    """The options of `ekfac` where rows and gradients of all layers are few enough to be held."""

    estimator: ClassVar[str] = "cv.ekfac in one pass"

    def collector(self, now: Pass) -> HoldingCollector:
        return HoldingCollector(now)

    def product(self, block: Block, sums: FactorsAndUses, statistics: Statistics, *, reuse: bool) -> EigenKronecker:
        factors = kronecker_block(block, sums.factors, statistics, reuse=reuse)
        check_finite(factors)
        bases = eigenbases(factors)
        spanned = spanned_sides(sums.factors)  # there, all moments outside of the low-rank basis are zero
        left, right = (
            OrthogonalBasis(x.vectors) if few and isinstance(x, LowRankBasis) else x
            for x, few in zip(bases, spanned, strict=True)
        )
        moment = EigenSquares({block.name: (left, right)}, self.positionwise)
        found = [moment.of(block, uses)[0] for uses in sums.stacks]
        values = summed(found) if found else moment.zero(block, statistics.normalizer)[0]
        values = torch.nn.functional.pad(values, (0, int(spanned[1]), 0, int(spanned[0])))
        return EigenKronecker(*bases, values / statistics.divisor())


@dataclasses.dataclass(frozen=True)
class TKFACOptions(GradientOptions):
    """The options of `tkfac`."""

    estimator: ClassVar[str] = "cv.tkfac"

    def collector(self, now: Pass) -> MomentCollector:
        return MomentCollector(now, TraceMoments(self.wide))

    def product(self, block: Block, sums: Totals, statistics: Statistics, *, reuse: bool) -> Kronecker:
        groups = len(block.layout.shape) - 2
        left, right = (moment / statistics.divisor() for moment in sums.tensors)
        trace = as_side(left, groups).traces()
        trace = torch.where(trace > 0, trace, torch.ones_like(trace))
        right = right / (entrywise(trace, right) if isinstance(right, torch.Tensor) else trace)
        return Kronecker(as_side(left, groups), as_side(right, groups))


@dataclasses.dataclass(frozen=True)
class EKFACEstimator:
    """Eigenvalue-corrected KFAC: the eigenbases of `kfac`, and eigenvalues from the same data with the same draws.

    One batch and one vector an example take one pass, which holds inputs and output gradients of all layers; so do its
    statistics, which grow where they are added up, and have the eigenbases of the factors of all of them. All else is
    gone through twice, unless a ``basis`` is given; statistics are of the second pass, and add up in the same basis.

    Args:
        model_fn: as for `kfac`, as are the arguments not named here.
        fisher: ``type-2``, ``mc`` or ``empirical``.
        sharing: how the factors, and so the eigenbases, are made; it says nothing where a ``basis`` is given.
        generator: randomness for ``mc``; advanced once.
        correction: eigenvalues from the gradient of each ``example``, or of each ``position`` as if it were one.
        wide: what is kept of wide factors; a diagonal one has the canonical basis.
        basis: a curvature whose Kronecker blocks have the eigenbases to be used; None: `kfac` on the same data.

    Returns:
        `EigenKronecker` blocks. A tied weight has the eigenbasis of its uses' merged factors.

    Raises:
        ArgumentError: ``forward-only``, which has no gradients; a data set that can be read only once.
        NotKroneckerError: a weight has no eigenbasis a side in ``basis``; names it.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> batch = (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> cv.ekfac(model_fn, params, batch).blocks["weight"].values.shape
        torch.Size([2, 4])
    """

    def measure(
        self,
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
        basis: BlockDiagonal | None = None,
        engine: str | None = None,
        plan: Plan | Plans | None = None,
    ) -> Statistics:
        """What the curvature is made of; the arguments are those of the class."""
        check_model(model_fn, params)
        asked: dict[str, Any] = {"loss": loss, "fisher": fisher, "mc_samples": mc_samples, "engine": engine}
        asked |= {"elementwise": elementwise, "wide": wide}
        options = EKFACOptions(**asked, correction=correction)
        if basis is not None:
            given = bases_of(basis, params)
            return measure_all(model_fn, params, batch, options, generator, plan, basis=given)
        repeatable(batch)
        if not isinstance(batch, DataSet) and fisher != "type-2" and mc_samples == 1:
            held = OnePassOptions(**asked, sharing=sharing, correction=correction)
            return measure_all(model_fn, params, batch, held, generator, plan)
        plan = Plans.of(plan)
        require_examples(plan.fitting(model_fn, params, next(batches(batch))[0]))  # before the data is gone through
        if fisher == "mc" and generator is None:
            generator = default_generator(params)
        again = None if generator is None else generator.clone_state()
        factors = KFACOptions(**asked, sharing=sharing)
        given = bases_of_factors(
            measure_all(model_fn, params, batch, factors, generator, plan, lambda now: (FactorCollector(now), None))
        )
        return measure_all(model_fn, params, batch, options, again, plan, basis=given)

    __call__ = then_assemble(measure)


@dataclasses.dataclass(frozen=True)
class EigenvalueCorrection:
    """The EKFAC step for any Kronecker basis: eigenvalues from per-example gradients, eigenvectors from ``curv``.

    Statistics add up over batches that are measured with the same ``curv``.

    Args:
        curv: Kronecker blocks on ``params`` (from `kfac`, `tkfac`, Shampoo, DyKAF, ...); those of scales, shifts and
            lone biases stay as they are.
        model_fn: as for `ekfac`, as are all others.

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

    def measure(
        self,
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
    ) -> Statistics:
        """What the curvature is made of; the arguments are those of the class."""
        check_model(model_fn, params)
        options = CorrectionOptions(loss, fisher, mc_samples=mc_samples, correction=correction, engine=engine)
        given = bases_of(curv, params, others=True)
        return measure_all(model_fn, params, batch, options, generator, plan, basis=given)

    __call__ = then_assemble(measure)


@dataclasses.dataclass(frozen=True)
class TKFACEstimator:
    """Trace-restricted KFAC: L (x) R / tr L with L = E[D D^T], R = E[D^T D] for per-example gradients D.

    The trace of each block is that of the Fisher's block, exactly, however often a weight is used. Without sharing,
    D = g a^T and L = E[|a|^2 g g^T], R = E[|g|^2 a a^T] (Gao et al. 2020, eq. 12).

    Args:
        model_fn: as for `kfac`, as are the arguments not named here.
        fisher: ``type-2``, ``mc`` or ``empirical``.
        sharing: ``expand``: D is the example's gradient, sum_t g_t a_t^T; ``reduce``: (sum_t g_t)(mean_t a_t)^T, the
            mean being over positions whose targets count.
        wide: what is kept of wide factors; every choice keeps the trace.

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

    def measure(
        self,
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
    ) -> Statistics:
        """What the curvature is made of; the arguments are those of the class."""
        options = TKFACOptions(loss, fisher, sharing, mc_samples, elementwise, wide=wide, engine=engine)
        return measure_all(model_fn, params, batch, options, generator, plan)

    __call__ = then_assemble(measure)


ekfac = EKFACEstimator()
eigenvalue_correct = EigenvalueCorrection()
tkfac = TKFACEstimator()


def bases_of(curv: BlockDiagonal, params: Tree, *, others: bool = False) -> dict[str, Any]:
    """The eigenbases of the Kronecker blocks of a curvature, by name; and its ``others``, as they are.

    Raises:
        ArgumentError: it is no curvature with blocks.
        PytreeError: it is a curvature of other parameters.
    """
    if not isinstance(curv, BlockDiagonal):
        raise ArgumentError(
            f"the basis must be a curvature with blocks, such as cv.kfac(...), got a {type(curv).__name__}"
        )
    if curv.domain != Domain.of(params):
        raise PytreeError("the curvature whose basis is to be used acts on other parameters than those of the model")
    bases: dict[str, Any] = {}
    for name, block in curv.widened(curvature_dtype(params)).blocks.items():
        if isinstance(block, (Kronecker, EigenKronecker, Sum)):
            with naming(name):
                bases[name] = eigenbases(block)
        elif others:
            bases[name] = block
    return bases


def bases_of_factors(factors: Statistics) -> dict[str, Any]:
    """The eigenbases of the blocks of weights, from the sums for their factors."""
    bases: dict[str, Any] = {}
    for name, block in ((block.name, block) for block in factors.blocks if block.kronecker):
        with naming(name):
            product = kronecker_block(block, factors.sums[name], factors, reuse=True)
            check_finite(product)
            bases[name] = eigenbases(product)
    return bases


def check_bases(now: Pass, *, others: bool) -> None:
    """Refuses what is given by block, if it does not fit the blocks of the plan.

    Args:
        now: the pass.
        others: whether elementwise blocks are given too.

    Raises:
        NotKroneckerError: the block of a weight is missing, or has no eigenbasis a side; names it.
        ShapeError: a block is of another shape.
    """
    for block in now.plan.blocks:
        given = (now.basis or {}).get(block.name)
        if not block.kronecker and not others:
            continue
        with naming(block.name):
            if given is None or isinstance(given, tuple) != block.kronecker:
                found = "is missing" if given is None else f"is a {type(given).__name__}"
                raise NotKroneckerError(f"eigenvalue correction needs the blocks that cv.kfac has; this one {found}")
            shape = tuple(basis.width for basis in given) if block.kronecker else tuple(given.diag().shape)
            if shape != block.layout.shape[-len(shape) :]:
                raise ShapeError(
                    f"eigenvalue correction needs the blocks that cv.kfac has: {block.layout.shape}, got {shape}"
                )


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
