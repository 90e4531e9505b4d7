"""The leading eigenvalues of an operator, with eigenvectors and residuals, and the operator that these make up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, naming
from curvlib.linalg.lanczos import block_lanczos, normal
from curvlib.operators import BlockDiagonal, EigenMatrix, LowRank, Operator, OrthogonalBasis
from curvlib.operators.base import check_operator
from curvlib.operators.whole import whole
from curvlib.pytree import Domain, Tree, register, tree_map
from curvlib.spectrum.flat import at_least, chosen, flattened

Which = Literal["largest", "smallest", "magnitude"]
ORDERS: dict[Which, Callable[[Tensor], Tensor]] = {
    "largest": lambda values: values,
    "smallest": lambda values: -values,
    "magnitude": lambda values: values.abs(),
}


@register
class Eigenpairs:
    """Eigenpairs A x = l x, the leading ones first.

    Args:
        values: l [k].
        residuals: ||A x - l x|| for unit vectors x, [k]: an eigenvalue lies within this distance of l.
        vectors: unit eigenvectors, stacked along a leading axis of every leaf of a vector; None if not asked for.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tree | None = None

    def operator(self, trace: float | Tensor | None = None) -> BlockDiagonal:
        """The operator sum_i l_i x_i x_i^T that these pairs make up; see `low_rank`, which finds the pairs too.

        Args:
            trace: tr A, if it is known: the mean of all other eigenvalues then stands for the rest.

        Raises:
            ArgumentError: the pairs are without vectors.

        Example:
            >>> from curvlib.operators import Diagonal
            >>> pairs = top_eigenvalues(Diagonal(torch.arange(50.0)), 2, vectors=True)
            >>> pairs.operator().trace().round(decimals=3), pairs.operator(trace=1225.0).trace().round(decimals=3)
            (tensor(97.), tensor(1225.))
        """
        if self.vectors is None:
            raise ArgumentError("an operator is made of eigenvectors; call top_eigenvalues with vectors=True")
        domain = Domain.of(tree_map(lambda x: x[0], self.vectors))
        leaves = domain.leaves(self.vectors, 1)
        columns = torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1).mT
        size, rank = columns.shape
        if rank == size:
            return whole(EigenMatrix(OrthogonalBasis(columns), self.values), domain)
        remainder = torch.zeros_like(self.values[0]) if trace is None else (trace - self.values.sum()) / (size - rank)
        return whole(LowRank(columns, self.values, remainder), domain)


@overload
def top_eigenvalues(
    operator: Operator,
    k: int,
    *,
    which: Which = ...,
    vectors: bool = ...,
    generator: torch.Generator | None = ...,
    tolerance: float | None = ...,
    max_iterations: int = ...,
    block_size: int | None = ...,
    basis_size: int | None = ...,
    like: Tree | None = ...,
    per_block: Literal[False] = ...,
    progress: bool = ...,
) -> Eigenpairs: ...
@overload
def top_eigenvalues(
    operator: Operator,
    k: int,
    *,
    which: Which = ...,
    vectors: bool = ...,
    generator: torch.Generator | None = ...,
    tolerance: float | None = ...,
    max_iterations: int = ...,
    block_size: int | None = ...,
    basis_size: int | None = ...,
    per_block: Literal[True],
    progress: bool = ...,
) -> dict[str, Eigenpairs]: ...
def top_eigenvalues(
    operator: Operator,
    k: int,
    *,
    which: Which = "largest",
    vectors: bool = False,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
    max_iterations: int = 200,
    block_size: int | None = None,
    basis_size: int | None = None,
    like: Tree | None = None,
    per_block: bool = False,
    progress: bool = False,
) -> Eigenpairs | dict[str, Eigenpairs]:
    """The k leading eigenvalues of a symmetric operator, by block Lanczos with thick restarts.

    The error of an eigenvalue is at most its residual r, and at most r^2 / gap if the rest of the spectrum is a gap
    away (Parlett, The Symmetric Eigenvalue Problem, chapter 11).

    Args:
        operator: any operator; only its products are used.
        k: how many.
        which: "largest" (descending), "smallest" (ascending) or "magnitude" (descending in absolute value; the
            pairs of the best approximation of rank k).
        vectors: return eigenvectors too.
        generator: of the first block; by default a fresh one with seed 0.
        tolerance: stop when ||A x - l x|| <= tolerance * max |l| for all k pairs; by default the root of the dtype's
            relative precision.
        max_iterations: products with blocks after which to give up.
        block_size: vectors that go through ``operator.matmat`` at once; by default k. A smaller block takes
            fewer products, but may find an eigenvalue that is repeated more often than that too few times.
        basis_size: vectors kept in memory; by default max(40, k + 4 block_size), at most D.
        like: a pytree of params, for an operator that does not know its own.
        per_block: the leading eigenvalues of every diagonal block in place of those of the whole operator; a block
            with fewer than k rows has all of its own.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        Eigenpairs with true residuals, or those of each block by its name.

    Raises:
        ConvergenceError: the tolerance was not reached; names the block.
        NonFiniteError: a product is not finite; names the block.
        ArgumentError: k is not in 1 ... D, or another number makes no sense.

    Example:
        >>> from curvlib.operators import Diagonal
        >>> pairs = top_eigenvalues(Diagonal(torch.arange(50.0)), 2, vectors=True)
        >>> pairs.values.round(decimals=3)
        tensor([49., 48.])
        >>> pairs.vectors.shape
        torch.Size([2, 50])
    """
    check_operator(operator)
    if which not in ORDERS:
        raise ArgumentError(f"which must be one of {', '.join(ORDERS)}, got {which!r}")
    at_least(1, k=k, max_iterations=max_iterations)
    generator = chosen(generator)

    def leading(operator: Operator, count: int, like: Tree | None) -> Eigenpairs:
        width = min(count if block_size is None else block_size, operator.domain.size)
        room = min(max(40, count + 4 * width) if basis_size is None else basis_size, operator.domain.size)
        at_least(1, block_size=width)
        at_least(min(operator.domain.size, count + 2 * width), basis_size=room)
        with flattened(operator, like, products=0, label="leading eigenvalues", progress=progress) as flat:
            values, rows, residuals = block_lanczos(
                flat.matmat,
                normal(generator, width, flat.size, like=flat.like()),
                count=count,
                basis_size=room,
                tolerance=torch.finfo(flat.dtype).eps ** 0.5 if tolerance is None else tolerance,
                max_iterations=max_iterations,
                order=ORDERS[which],
                generator=generator,
            )
            return Eigenpairs(values, residuals, flat.unravel(rows) if vectors else None)

    if not per_block:
        if k > operator.domain.size:
            raise ArgumentError(f"the operator has {operator.domain.size} rows, which is less than k={k} eigenvalues")
        return leading(operator, k, like)
    found = {}
    for name, block in operator.blocks.items():
        with naming(name):
            found[name] = leading(block, min(k, block.domain.size), None)
    return found


def low_rank(
    operator: Operator,
    rank: int,
    *,
    trace: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
    max_iterations: int = 200,
    like: Tree | None = None,
    progress: bool = False,
) -> BlockDiagonal:
    """The best approximation of rank k, U diag(l) U^T with the k eigenvalues of largest magnitude, as an operator.

    Of all matrices of rank k it is the closest, in the spectral and the Frobenius norm (Eckart & Young 1936). Every
    operation has a closed form and takes O(D k) memory: inverses are Woodbury's, and so on. `top_eigenvalues` finds the
    pairs; for their residuals call it with ``vectors=True, which="magnitude"``, and then `Eigenpairs.operator`.

    Args:
        operator: any operator; only its products are used.
        rank: k, from 1 to D.
        trace: tr A, exact or an estimate (``cv.spectrum.trace(operator).value``): then tau (I - U U^T) is added, with
            tau the mean of all other eigenvalues, and the approximation has this trace.
        generator: of the first block; by default a fresh one with seed 0.
        tolerance: of the eigenpairs, see `top_eigenvalues`; eigenvectors are wrong by about tolerance |l_1| / gap.
        max_iterations: products with blocks of k after which to give up.
        like: a pytree of params, for an operator that does not know its own.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        An operator on the same pytrees: one `LowRank` block (all eigenpairs, for k = D). Without a trace it is
        singular: damp it.

    Raises:
        ConvergenceError: the tolerance was not reached.
        NonFiniteError: a product is not finite.
        ArgumentError: the rank is not in 1 ... D.

    Example:
        >>> import curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2).double())
        >>> x = torch.randn(4, 3, dtype=torch.float64)
        >>> curv = cv.gramian(model_fn, params, (x, None))  # 8 parameters, rank 8
        >>> approximation = low_rank(curv, 4)
        >>> error = (curv.to_dense() - approximation.to_dense()).norm()
        >>> torch.allclose(error, curv.eigenvalues()[:4].norm()), approximation.inverse(0.1).trace().shape
        (True, torch.Size([]))
    """
    pairs = top_eigenvalues(
        operator,
        rank,
        which="magnitude",
        vectors=True,
        generator=generator,
        tolerance=tolerance,
        max_iterations=max_iterations,
        like=like,
        progress=progress,
    )
    return pairs.operator(trace)
