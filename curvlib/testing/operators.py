"""`check_operator`: every identity of the algebra of curvature, for one operator."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from curvlib.errors import ArgumentError
from curvlib.operators import Operator, RelativeTikhonov, Tikhonov
from curvlib.pytree import Tree, flatten, inner, ravel, tree_map, unflatten
from curvlib.testing.report import Example, Property, Report, assert_close, check_all, same

MAX_ROWS = 2048
EXPONENTS = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
DRAWS = 20_000


def check_operator(operator: Operator, dense: Tensor | None = None, *, tolerance: float | None = None) -> Report:
    """Checks every identity of the algebra on an operator, against its dense matrix.

    Products with vectors and stacks of them, symmetry and linearity, `quadratic`, `diag`, `trace`, `frobenius_norm`,
    `eigenvalues`, `logdet`, scaling and sums, inverses with every kind of damping, powers and their additivity,
    `map_eigenvalues`, the covariance of `sample`, the dtype of results, round trips through pytrees, copies and pickle,
    `torch.func.vmap`, `make_fx`, and that nothing is changed. What the operator refuses with an error of curvlib's is
    listed in the report.

    Args:
        operator: with at most 2,048 rows; identities hold best in float64.
        dense: the matrix [D, D] that it should be, made in another way; None: what `to_dense` says, so that only the
            operator's agreement with itself is checked.
        tolerance: the relative error that counts as rounding; None: 1e-8 in float64, 1e-3 in other dtypes.

    Returns:
        What holds and what was refused.

    Raises:
        AssertionError: an identity does not hold; names it and shows the smallest vectors found for which it fails.
        ArgumentError: the operator has too many rows.

    Example:
        >>> import torch, curvlib as cv
        >>> from curvlib.testing import check_operator
        >>> G, A = torch.eye(2, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64)
        >>> report = check_operator(cv.Kronecker(cv.Dense(G), cv.Dense(A)), torch.kron(G, A))
        >>> try:
        ...     check_operator(cv.Diagonal(torch.tensor([1.0, 2.0])), torch.eye(2))
        ... except AssertionError as error:
        ...     print(str(error).split(",")[0])
        Diagonal: to_dense is the dense matrix does not hold: an error of 1.0e+00 where 1.4e+00 is expected
    """
    size = operator.domain.size
    if size > MAX_ROWS:
        raise ArgumentError(f"check_operator takes operators with at most {MAX_ROWS} rows, this one has {size}")
    precise = operator.dtype == torch.float64
    tolerance = (1e-8 if precise else 1e-3) if tolerance is None else tolerance
    matrix = (operator.to_dense() if dense is None else dense).detach().to(torch.float64)
    identities = Identities(operator, matrix, tolerance)
    return check_all(type(operator).__name__, identities.all())


@dataclasses.dataclass(frozen=True)
class Identities:
    """The identities of an operator that should be the matrix ``dense`` [D, D], in float64."""

    operator: Operator
    dense: Tensor
    tolerance: float

    @functools.cached_property
    def vectors(self) -> list[Tree]:
        """A few unit vectors, and a random one."""
        size = len(self.dense)
        places = sorted({0, size // 2, size - 1})
        units = torch.eye(size, dtype=torch.float64)[places]
        random = torch.randn(1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return [self.vector(row) for row in torch.cat([units, random])]

    def vector(self, row: Tensor) -> Tree:
        """A vector of the domain with these entries."""
        row = row.to(self.dense.device, self.operator.dtype)
        return self.operator.domain.stacked(row.unsqueeze(0), front=())

    def simpler(self, example: Example) -> Iterator[Example]:
        """The example with one of its vectors replaced by one that has fewer entries, all 1 or -1."""
        for place, part in enumerate(example):
            if isinstance(part, float):
                continue
            row = flat(part)
            entries = row.nonzero().flatten()
            middle = (len(entries) + 1) // 2
            fewer = [entries] if not torch.equal(row, row.sign()) else []
            if len(entries) > 1:
                fewer += [entries[:middle], entries[middle:]]
            if 2 < len(entries) <= 16:
                fewer += [torch.cat([entries[:i], entries[i + 1 :]]) for i in range(len(entries))]
            for kept in fewer:
                new = torch.zeros_like(row)
                new[kept] = row[kept].sign()
                yield (*example[:place], self.vector(new), *example[place + 1 :])

    @functools.cached_property
    def spectrum(self) -> Tensor:
        return torch.linalg.eigvalsh((self.dense + self.dense.mT) / 2)

    @property
    def is_definite(self) -> bool:
        """Whether the operator is positive definite, and well-conditioned."""
        return float(self.spectrum[0]) > 1e-4 * float(self.spectrum[-1])

    @property
    def shift(self) -> float:
        """A damping with which the operator is positive definite, with a condition number below 30."""
        return 1.5 * max(0.0, -float(self.spectrum[0])) + max(0.1 * float(self.spectrum.abs().amax()), 1e-3)

    def all(self) -> Iterator[Property]:
        """Every identity, the simplest first."""
        yield self.of_two("the operator is linear", self.linear)
        yield self.of_two("the operator is symmetric", self.symmetric)
        yield Property("to_dense is the dense matrix", self.to_dense)
        yield self.of_one("a product is that with the dense matrix", self.product)
        yield self.of_two("matmat is matvec of every vector along the leading axis", self.stacked)
        yield self.of_one("quadratic is the inner product with the image", self.quadratic)
        yield self.of_one("results have the dtype of the vector", self.dtypes)
        yield self.of_one("a product changes nothing it is given", self.pure)
        yield Property("diag is the diagonal", self.diagonal)
        yield Property("trace is the sum of the diagonal", self.trace)
        yield Property("frobenius_norm is the norm of the dense matrix", self.norm)
        yield Property("eigenvalues are those of the dense matrix, ascending", self.eigenvalues)
        yield Property("logdet is that of the dense matrix", self.logdet)
        yield self.of_one("a multiple multiplies from both sides", self.multiple)
        yield self.of_one("a sum adds products", self.sum)
        yield self.of_one("a number as damping adds that multiple of the identity", self.damped)
        for name, damping in self.dampings():
            yield self.of_one(f"the inverse with {name} undoes the damped operator", self.undoes(damping))
        yield self.of_one("the inverse without damping solves", self.solves)
        powers = [(self.vectors[-1], p, q) for p in EXPONENTS for q in EXPONENTS[:2]]
        yield Property("power is additive", self.additive, powers, self.simpler)
        yield self.of_one("power one is the operator", self.first_power)
        yield self.of_one("power zero is the identity", self.zeroth_power)
        yield Property("a power is that of the dense matrix", self.power, [x[:2] for x in powers[::2]], self.simpler)
        yield self.of_one("map_eigenvalues keeps the eigenvectors", self.mapped)
        yield Property("samples have the operator as covariance", self.covariance)
        yield self.of_one("optree flattens and unflattens it", self.optree_round_trip)
        yield self.of_one("torch's pytrees flatten and unflatten it", self.torch_round_trip)
        yield self.of_one("copies give the same products", self.copies)
        yield self.of_two("torch.func.vmap maps over vectors", self.vmap)
        yield self.of_one("make_fx traces a product", self.traced)

    def of_one(self, name: str, check: Callable[[Tree], None]) -> Property:
        """A property of single vectors."""
        return Property(name, check, [(v,) for v in self.vectors], self.simpler)

    def of_two(self, name: str, check: Callable[[Tree, Tree], None]) -> Property:
        """A property of pairs of vectors."""
        first, *_, last = self.vectors
        return Property(name, check, [(first, last), (last, first), (last, last)], self.simpler)

    # --- products -----------------------------------------------------------------------------------------------

    def image(self, v: Tree) -> Tensor:
        """The dense matrix times a vector."""
        return self.dense @ flat(v)

    def close(self, actual: Tensor, expected: Tensor, scale: float = 0.0) -> None:
        assert_close(actual.detach().to(torch.float64), expected, self.tolerance, scale)

    def size(self, v: Tree) -> float:
        """What errors of a product with a vector are measured by."""
        return float(self.dense.norm()) * float(flat(v).norm())

    def to_dense(self) -> None:
        self.close(self.operator.to_dense(), self.dense)

    def product(self, v: Tree) -> None:
        self.close(flat(self.operator @ v), self.image(v), self.size(v))
        self.close(flat(self.operator.matvec(v)), self.image(v), self.size(v))

    def stacked(self, v: Tree, w: Tree) -> None:
        images = self.operator.domain.rows(self.operator.matmat(stack(v, w)))
        self.close(images, torch.stack([self.image(v), self.image(w)]), self.size(v) + self.size(w))

    def symmetric(self, v: Tree, w: Tree) -> None:
        left, right = inner(w, self.operator @ v), inner(self.operator @ w, v)
        self.close(left, right.to(torch.float64), self.size(v) * float(flat(w).norm()))

    def linear(self, v: Tree, w: Tree) -> None:
        together = self.operator @ tree_map(lambda x, y: 2 * x - y, v, w)
        apart = tree_map(lambda x, y: 2 * x - y, self.operator @ v, self.operator @ w)
        self.close(flat(together), flat(apart), self.size(v) + self.size(w))

    def quadratic(self, v: Tree) -> None:
        value = self.operator.quadratic(v)
        assert value.shape == (), f"it has the shape {tuple(value.shape)}"
        self.close(value, flat(v) @ self.image(v), self.size(v) * float(flat(v).norm()))

    def dtypes(self, v: Tree) -> None:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            cast = tree_map(lambda x, dtype=dtype: x.to(dtype), v)
            found = {leaf.dtype for leaf in flatten(self.operator @ cast)[0]}
            assert found == {dtype}, f"a product with a vector of {dtype} is of {found}"

    def pure(self, v: Tree) -> None:
        before, vector = [x.clone() for x in leaves_of(self.operator)], tree_map(torch.clone, v)
        random = torch.get_rng_state()
        first, second = self.operator @ v, self.operator @ v
        assert same(first, second), "the second product differs from the first"
        assert same(leaves_of(self.operator), before), "the operator's tensors were changed"
        assert same(v, vector), "the vector was changed"
        assert torch.equal(random, torch.get_rng_state()), "torch's global generator was used"

    # --- what is read off ------------------------------------------------------------------------------------------

    def diagonal(self) -> None:
        self.close(flat(self.operator.diag()), self.dense.diagonal(), float(self.dense.norm()))

    def trace(self) -> None:
        self.close(self.operator.trace(), self.dense.trace(), float(self.dense.norm()))

    def norm(self) -> None:
        self.close(self.operator.frobenius_norm(), self.dense.norm())

    def eigenvalues(self) -> None:
        self.close(self.operator.eigenvalues(), torch.linalg.eigvalsh(self.dense))

    def logdet(self) -> None:
        for shift in (self.shift, *([0.0] if self.is_definite else [])):
            operator = self.operator.damp(shift) if shift else self.operator
            expected = torch.linalg.slogdet(self.dense + shift * self.identity)[1]
            self.close(operator.logdet(), expected, float(len(self.dense)))

    # --- arithmetic ------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Tensor:
        return torch.eye(len(self.dense), dtype=torch.float64, device=self.dense.device)

    def multiple(self, v: Tree) -> None:
        for scaled in (2.5 * self.operator, self.operator * 2.5):
            self.close(flat(scaled @ v), 2.5 * self.image(v), self.size(v))

    def sum(self, v: Tree) -> None:
        total = self.operator + 2.0 * self.operator
        self.close(flat(total @ v), 3 * self.image(v), self.size(v))
        self.close(total.trace(), 3 * self.dense.trace(), float(self.dense.norm()))

    # --- inverses and powers ---------------------------------------------------------------------------------------

    def dampings(self) -> list[tuple[str, Any]]:
        relative = self.shift / max(abs(float(self.dense.trace())) / len(self.dense), 1e-12)
        positive = float(self.dense.trace()) > 0
        numbers = [("a number", self.shift), ("Tikhonov damping", Tikhonov(self.shift))]
        return numbers + ([("relative damping", RelativeTikhonov(relative))] if positive else [])

    def damped(self, v: Tree) -> None:
        self.close(flat(self.operator.damp(self.shift) @ v), self.image(v) + self.shift * flat(v), self.size(v))

    def undoes(self, damping: Any) -> Callable[[Tree], None]:
        def check(v: Tree) -> None:
            image = self.operator.damp(damping) @ v
            self.close(flat(self.operator.inverse(damping) @ image), flat(v))

        return check

    def solves(self, v: Tree) -> None:
        if self.is_definite:
            self.close(self.dense @ flat(self.operator.inverse() @ v), flat(v), 1e4 * float(flat(v).norm()))

    def additive(self, v: Tree, p: float, q: float) -> None:
        twice = self.operator.power(p, self.shift) @ (self.operator.power(q, self.shift) @ v)
        once = self.operator.power(p + q, self.shift) @ v
        self.close(flat(twice), flat(once), float(flat(twice).norm()))

    def first_power(self, v: Tree) -> None:
        self.close(flat(self.operator.power(1) @ v), self.image(v), self.size(v))

    def zeroth_power(self, v: Tree) -> None:
        self.close(flat(self.operator.power(0, self.shift) @ v), flat(v))

    def power(self, v: Tree, p: float) -> None:
        expected = function(self.dense + self.shift * self.identity, lambda x: x**p) @ flat(v)
        self.close(flat(self.operator.power(p, self.shift) @ v), expected)

    def mapped(self, v: Tree) -> None:
        mapped = self.operator.map_eigenvalues(lambda x: x / (x.abs() + self.shift))
        expected = function(self.dense, lambda x: x / (x.abs() + self.shift)) @ flat(v)
        self.close(flat(mapped @ v), expected, float(flat(v).norm()))

    def covariance(self) -> None:
        # E ||S - M||^2 = (tr(M)^2 + ||M||^2) / n for n normal draws; six times its root is out of reach
        damped = self.dense + self.shift * self.identity
        generator = torch.Generator(self.dense.device).manual_seed(0)
        draws = self.operator.domain.rows(self.operator.damp(self.shift).sample(generator, DRAWS)).to(torch.float64)
        spread = math.sqrt(float(damped.trace() ** 2 + damped.norm() ** 2) / DRAWS)
        error = float((draws.mT @ draws / DRAWS - damped).norm())
        assert error <= 6 * spread, f"{DRAWS} draws have a covariance that is off by {error / spread:.1f} deviations"

    # --- pytrees and transforms ------------------------------------------------------------------------------------

    def equal(self, other: Operator, v: Tree) -> None:
        assert type(other) is type(self.operator), f"it is a {type(other).__name__} then"
        assert same(other @ v, self.operator @ v), "its products differ"

    def optree_round_trip(self, v: Tree) -> None:
        leaves, structure = flatten(self.operator)
        assert all(isinstance(leaf, Tensor) for leaf in leaves), "a leaf is no tensor"
        self.equal(unflatten(structure, leaves), v)

    def torch_round_trip(self, v: Tree) -> None:
        leaves, structure = torch_pytree.tree_flatten(self.operator)
        self.equal(torch_pytree.tree_unflatten(leaves, structure), v)

    def copies(self, v: Tree) -> None:
        self.equal(copy.deepcopy(self.operator), v)
        try:
            pickled = pickle.dumps(self.operator)
        except (pickle.PicklingError, AttributeError):  # a model that is a function within a function
            return
        self.equal(pickle.loads(pickled), v)

    def vmap(self, v: Tree, w: Tree) -> None:
        images = self.operator.domain.rows(torch.func.vmap(lambda x: self.operator @ x)(stack(v, w)))
        self.close(images, torch.stack([self.image(v), self.image(w)]), self.size(v) + self.size(w))

    def traced(self, v: Tree) -> None:
        traced = make_fx(lambda x: self.operator @ x)(v)
        again = tree_map(lambda x: 2 * x, v)
        self.close(flat(traced(again)), 2 * self.image(v), self.size(v))


def flat(v: Tree) -> Tensor:
    """A vector as one tensor, in float64."""
    return ravel(v).detach().to(torch.float64)


def stack(v: Tree, w: Tree) -> Tree:
    """Two vectors along a leading axis of every leaf."""
    return tree_map(lambda x, y: torch.stack([x, y]), v, w)


def leaves_of(operator: Operator) -> list[Tensor]:
    """The tensors that an operator holds."""
    return [x for x in torch_pytree.tree_leaves(operator) if isinstance(x, Tensor)]


def function(matrix: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The function of a symmetric matrix by its eigenvalues."""
    values, basis = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return basis * fn(values) @ basis.mT
