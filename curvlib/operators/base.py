"""The algebra of curvature objects: what every operator can do, derived once from a few primitives."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from curvlib.errors import ArgumentError, BlockNameError, PytreeError, SingularError
from curvlib.linalg.eager import is_eager
from curvlib.linalg.eigh import tolerance
from curvlib.operators.damping import Damping, as_damping
from curvlib.operators.interfaces import Determinant, MatrixFreePart, QuadraticForm, Recast
from curvlib.operators.vectors import LinearMap, Params, at_least_single, vector_leaves, widest
from curvlib.pytree import Domain, Tree, inner, tree_map

if TYPE_CHECKING:
    from curvlib.operators.inverse import Solver
    from curvlib.operators.projection import Projection
    from curvlib.operators.sketch import Compressor


class Operator(LinearMap):
    """A symmetric linear operator on pytrees, immutable.

    A block acts on one tensor of its ``shape``; a curvature made by an estimator acts on pytrees like params. Every
    operation returns a new object. Subclasses are final; they implement the abstract methods and override nothing.

    Products are computed in the widest of the dtypes of the operator and of the vector, and come back in the vector's,
    leaf by leaf. Eigenvalues, powers and inverses are computed, and kept, in float32 at least.

    Example:
        >>> import torch, curvlib as cv
        >>> curv = cv.Diagonal(torch.tensor([1.0, 4.0]))
        >>> isinstance(curv, cv.Operator), curv @ torch.ones(2), curv.power(-0.5).trace(), (curv + curv).logdet()
        (True, tensor([1., 4.]), tensor(1.5000), tensor(2.7726))
    """

    # --- primitives ------------------------------------------------------------------------------------------

    @abstractmethod
    def _apply(self, vectors: Tree, leading: int) -> Tree:
        """The operator applied to vectors of its dtype that are stacked along ``leading`` axes."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix [D, D], in the order of `ravel` of its vectors. For small problems and tests."""

    @abstractmethod
    def diag(self) -> Tree:
        """The diagonal, as a vector of the operator's domain."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The trace, a 0-d tensor."""

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm, a 0-d tensor."""

    @abstractmethod
    def _eigenvalues(self) -> Tensor:
        """All D eigenvalues as a vector, in no particular order."""

    @abstractmethod
    def map_eigenvalues(self, fn: Callable[[Tensor], Tensor]) -> Operator:
        """The operator with the same eigenvectors and eigenvalues fn(l); ``fn`` acts elementwise on a tensor."""

    @abstractmethod
    def damp(self, damping: Damping | float | Tensor) -> Operator:
        """The operator plus damping: a number d adds d I exactly; see `Tikhonov` and its kin."""

    @abstractmethod
    def _power(self, exponent: float, *, damped: bool) -> Operator:
        """The power of the operator as it is. ``damped``: eigenvalues need only be positive, however small."""

    @abstractmethod
    def _scale(self, factor: float | Tensor) -> Operator:
        """Factor times the operator."""

    @abstractmethod
    def _add(self, other: Operator) -> Operator | None:
        """The sum in closed form, or None if there is none."""

    @abstractmethod
    def _sample(self, generator: torch.Generator, n: int | None) -> Tree:
        """`sample`, in float32 at least."""

    @property
    @abstractmethod
    def domain(self) -> Domain:
        """Structure, names and shapes of its vectors; a field of some operators, a property of others."""

    @property
    @abstractmethod
    def blocks(self) -> Mapping[str, Operator]:
        """The diagonal blocks by name."""

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the parameters it acts on, each with the names of the blocks that hold it."""

    # --- derived ---------------------------------------------------------------------------------------------

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The floating dtypes of its tensors, and those of the models of matrix-free parts."""
        known: frozenset[torch.dtype] | None = self.__dict__.get("_dtypes")
        if known is None:
            known = self.__dict__["_dtypes"] = self._find_dtypes()
        return known

    def _find_dtypes(self) -> frozenset[torch.dtype]:
        """`dtypes`, which never change."""
        leaves = torch_pytree.tree_leaves(self, is_leaf=is_matrix_free)
        found = {x.model_dtype if isinstance(x, MatrixFreePart) else x.dtype for x in leaves}
        return frozenset(dtype for dtype in found if dtype.is_floating_point)

    @property
    def _matrix_free(self) -> bool:
        """Whether some part of it is known by its products alone."""
        return any(map(is_matrix_free, torch_pytree.tree_leaves(self, is_leaf=is_matrix_free)))

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the widest dtype of its tensors; of a matrix-free operator, that of its model."""
        return widest(self.dtypes)

    def widened(self, dtype: torch.dtype) -> Self:
        """The same operator in another dtype but for its matrix-free parts, which compute in that of their model."""
        if self.dtypes == {dtype}:
            return self
        found: dict[int, Operator] = {}

        def cast_as_a_whole(node: object) -> bool:
            whole = node._recast(dtype) if isinstance(node, Recast) else None
            if whole is not None:
                found[id(node)] = whole
            return whole is not None

        leaves, structure = torch_pytree.tree_flatten(self, is_leaf=cast_as_a_whole)
        cast = [found[id(x)] if isinstance(x, Operator) else x.to(dtype) for x in leaves]
        operator: Self = torch_pytree.tree_unflatten(cast, structure)
        return operator

    def _in_one_dtype(self, vectors: Tree) -> tuple[Self, Tree]:
        """The operator and vectors in the widest of their dtypes.

        Raises:
            PytreeError, DtypeError: these are not vectors.
        """
        dtypes = self.dtypes.union(x.dtype for x in vector_leaves(vectors) if isinstance(x, Tensor))
        if len(dtypes) == 1:
            return self, vectors
        dtype = widest(dtypes)
        return self.widened(dtype), tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, vectors)

    def _product(self, vectors: Tree, leading: int) -> Tree:
        """The operator applied to vectors of any floating dtypes that are stacked along ``leading`` axes."""
        operator, wide = self._in_one_dtype(vectors)
        images = operator._apply(wide, leading)
        return images if wide is vectors else tree_map(lambda image, x: image.to(x.dtype), images, vectors)

    def matvec(self, v: Params) -> Params:
        """Curv v for a vector of the domain, each leaf in the dtype of the vector's.

        Raises:
            PytreeError, ShapeError: v is not a vector of the domain; the message names the leaf.
            DtypeError: a leaf is not of a floating dtype; the message names it.
        """
        image: Params = self._product(v, 0)
        return image

    def __matmul__(self, v: Params) -> Params:
        return self.matvec(v)

    def matmat(self, vectors: Params) -> Params:
        """Curv v for k vectors stacked along a leading axis of every leaf."""
        images: Params = self._product(vectors, 1)
        return images

    def quadratic(self, v: Tree) -> Tensor:
        """v^T curv v, a 0-d tensor in the widest of the dtypes of the operator and the vector."""
        operator, wide = self._in_one_dtype(v)
        if isinstance(operator, QuadraticForm):
            return operator._quadratic(wide)
        return inner(wide, operator._apply(wide, 0))

    def _precise(self) -> Self:
        """The operator in float32 at least, as eigenvalues and powers are computed."""
        return self.widened(at_least_single(self.dtype))

    def sample(self, generator: torch.Generator, n: int | None = None) -> Tree:
        """Draws from N(0, curv): curv^(1/2) eps, with a leading axis of n draws if n is given; in the operator's dtype.

        Raises:
            ArgumentError: no generator is given.
            SingularError: an eigenvalue is negative.
        """
        if not isinstance(generator, torch.Generator):
            raise ArgumentError(
                f"sample draws from a torch.Generator, its first argument, but got {generator!r}: write "
                "sample(torch.Generator().manual_seed(0)), and sample(generator, n=3) for three draws"
            )
        return tree_map(lambda x: x.to(self.dtype), self._precise()._sample(generator, n))

    def power(self, exponent: float, damping: Damping | float | Tensor = 0.0) -> Operator:
        """(curv + damping)^exponent.

        Raises:
            DampingError: the damping is negative.
            SingularError: the exponent needs positive eigenvalues and there are others (looked at in eager mode only).
        """
        if is_zero(damping):
            return self._precise()._power(exponent, damped=False)
        return self._precise().damp(damping)._power(exponent, damped=True)

    def inverse(self, damping: Damping | float | Tensor = 0.0, *, solver: Solver | None = None) -> Operator:
        """(curv + damping)^-1.

        Args:
            damping: what is added.
            solver: `CG`, `Cholesky` or `Eigen`; None chooses: in closed form where there is one, through the
                dense matrix where a sum is small, and by conjugate gradients elsewhere.

        Raises:
            DampingError: the damping is negative.
            SingularError: there is no damping and the operator is singular.
        """
        return self.power(-1, damping) if solver is None else solver.inverse(self._precise(), damping)

    def project(self, sketch: Compressor) -> Projection:
        """The composition R o curv with a `sketch` R or an `EigenSketch`, folded into one small matrix a side.

        Raises:
            NotKroneckerError: a block is neither a matrix of its own nor a Kronecker product; for an `EigenSketch`, it
                has no eigenbasis a side. Names it.
            PytreeError: the sketch was made for other parameters.
        """
        from curvlib.operators.projection import project  # a projection is made of operators

        return project(self._precise(), sketch)

    def truncate(self, rank: int | None = None, energy: float | None = None) -> Operator:
        """The k leading eigenpairs a side, and the mean of the other eigenvalues for all that is orthogonal to them.

        The trace is kept. A side of width d takes O(d k) memory from then on; diagonal sides stay as they are, and so
        do sides of width d <= k, in eigen-form. See `LowRank`.

        Args:
            rank: k.
            energy: or the share of a side's trace, 0 < energy <= 1, that k is the smallest to reach.

        Raises:
            ArgumentError: not exactly one of the two is given, or it is out of range; the operator has no eigenpairs
                to keep; or ``energy`` is given where values cannot be looked at, under a transform or a trace.
        """
        from curvlib.operators.truncation import truncate  # a truncation is made of operators

        return truncate(self._precise(), rank, energy)

    def eigenvalues(self) -> Tensor:
        """All D eigenvalues, ascending."""
        return self._precise()._eigenvalues().sort().values

    def logdet(self) -> Tensor:
        """Log det curv, a 0-d tensor: -inf if singular."""
        operator = self._precise()
        if isinstance(operator, Determinant):
            return operator._logdet()
        return operator.map_eigenvalues(torch.log).trace()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same operator on another device or with another dtype; integers, which data may hold, keep theirs."""
        moved: Self = tree_map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None), self)
        return moved

    def __getitem__(self, name: str) -> Operator:
        blocks = self.blocks
        if name not in blocks:
            near = difflib.get_close_matches(str(name), blocks, n=3, cutoff=0) or list(blocks)[:3]
            raise BlockNameError(
                f"there is no block {name!r} among {len(blocks)}; the nearest are {', '.join(map(repr, near))}"
            )
        return blocks[name]

    __iter__ = None  # blocks have names, and no numbers

    def __repr__(self) -> str:
        from curvlib.operators.summary import summary  # a summary knows all operators

        return summary(self)

    def _met(self, other: Operator) -> tuple[Operator, Operator]:
        """Two operators in the wider of their dtypes.

        Raises:
            PytreeError: they act on different vectors.
        """
        if self.domain.shapes != other.domain.shapes:
            mine, others = (dict(zip(x.domain.names, x.domain.shapes, strict=True)) for x in (self, other))
            unequal = [
                f"{name!r} ({mine.get(name)} and {others.get(name)})"
                for name in sorted(mine.keys() | others.keys())
                if mine.get(name) != others.get(name)
            ]
            raise PytreeError(f"the operators to be added act on different vectors: {', '.join(unequal)}")
        dtype = widest(self.dtypes | other.dtypes)
        return self.widened(dtype), other.widened(dtype)

    def __add__(self, other: Operator) -> Operator:
        if not isinstance(other, Operator):
            return NotImplemented
        one, two = self._met(other)
        total = one._add(two)
        total = total if total is not None else two._add(one)
        if total is not None:
            return total
        from curvlib.operators.sums import lazy_sum  # a sum is an operator too

        return lazy_sum(one, two)

    def __radd__(self, other: Literal[0]) -> Self:  # sum(operators) starts with 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Operator) -> Operator:
        if not isinstance(other, Operator):
            return NotImplemented
        from curvlib.operators.differences import difference  # a difference is an operator too

        return difference(*self._met(other))

    def __neg__(self) -> Operator:
        return self._scale(-1.0)

    def __truediv__(self, divisor: float | Tensor) -> Operator:
        if isinstance(divisor, Operator):
            raise ArgumentError("an operator can be divided by a number or a 0-d tensor only; see inverse")
        return self * (1 / divisor)

    def __mul__(self, factor: float | Tensor) -> Operator:
        if isinstance(factor, Operator) or (isinstance(factor, Tensor) and factor.ndim):
            raise ArgumentError("an operator can be multiplied by a number or a 0-d tensor only; use @ for vectors")
        return self._scale(factor.to(self.dtype) if isinstance(factor, Tensor) else factor)

    def __rmul__(self, factor: float | Tensor) -> Operator:
        return self * factor


def is_matrix_free(node: object) -> bool:
    """Whether a part of an operator is known by its products alone."""
    return isinstance(node, MatrixFreePart)


def is_zero(damping: Damping | float | Tensor) -> bool:
    """Whether nothing is added: a number 0; a tensor is not looked at."""
    strength = as_damping(damping).strength
    return not isinstance(strength, Tensor) and strength == 0


def check_operator(operator: Any) -> None:
    """Refuses what is no operator.

    Raises:
        ArgumentError: says how to make one.
    """
    if not isinstance(operator, Operator):
        raise ArgumentError(
            f"operator must be a curvature, such as cv.ggn(model_fn, params, batch, loss=loss), got a "
            f"{type(operator).__name__}; for a matrix write cv.Dense(matrix)"
        )


def powers(eigenvalues: Tensor, exponent: float, *, damped: bool) -> Tensor:
    """Eigenvalues [*, d] to a power, if that is defined for them.

    Raises:
        SingularError: exponent < 0 and an eigenvalue is not above d * eps * max |eigenvalue| (not above 0 if damped);
            or the exponent is not an integer and an eigenvalue is negative. Looked at in eager mode only.
    """
    if is_eager() and eigenvalues.numel() and (exponent < 0 or exponent != int(exponent)):
        smallest = eigenvalues.amin()
        if exponent < 0:
            floor = eigenvalues.new_zeros(()) if damped else tolerance(eigenvalues)
            bad = bool((eigenvalues.abs() if exponent == int(exponent) else eigenvalues).le(floor).any())
        else:
            bad = bool(smallest < 0)
        if bad:
            raise SingularError(
                f"the exponent {exponent} needs {'positive' if exponent < 0 else 'nonnegative'} eigenvalues, but the "
                f"smallest is {float(smallest):.3e} (the largest is {float(eigenvalues.amax()):.3e}); pass damping > 0"
            )
    return eigenvalues**exponent


def remembered(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A result that belongs to an immutable object and is computed once for it.

    It is not a field: a copy of the object starts without it. It is forgotten if somebody writes to the object's
    tensors in place, and never kept under a transform, a trace or for tensors that require gradients.
    """
    key = f"_{method.__name__}"

    def recall(self: Any) -> Any:
        from curvlib.pytree import flatten

        tensors = flatten(self)[0]
        if not is_eager() or any(x.requires_grad for x in tensors):
            return method(self)
        versions = tuple(-1 if x.is_inference() else x._version for x in tensors)
        if key not in self.__dict__ or self.__dict__[key][0] != versions:
            self.__dict__[key] = versions, method(self)
        return self.__dict__[key][1]

    recall.__doc__ = method.__doc__
    return recall
