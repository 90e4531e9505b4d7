"""Lanczos processes on flat vectors: Gauss quadrature from many single vectors, eigenpairs from one block.

Every new vector is orthogonalized against the whole basis, twice: the rounding of a Lanczos recurrence without that
makes copies of eigenvalues that have converged (Parlett, The Symmetric Eigenvalue Problem, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from curvlib.errors import ConvergenceError, NonFiniteError

MatMat = Callable[[Tensor], Tensor]  # vectors [m, D], one a row -> their images [m, D]


class Tridiagonal(NamedTuple):
    """What m Lanczos processes leave: A restricted to the span of basis[i] is tridiag(off, diagonal, off)[i].

    ``diagonal`` [m, s], ``off`` [m, s - 1], ``basis`` [m, s, D] with orthonormal rows.
    """

    diagonal: Tensor
    off: Tensor
    basis: Tensor


def normal(generator: torch.Generator, *shape: int, like: Tensor) -> Tensor:
    """Standard normal numbers from the generator, wherever it lives, with dtype and device of ``like``."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def reject(vectors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of vectors [*, m, D] orthogonal to the rows of basis [*, n, D], and the coefficients [*, m, n].

    Projects twice, which is enough for orthogonality to rounding (Giraud et al., Numerische Mathematik 101, 2005).
    """
    coefficients = vectors @ basis.mT
    vectors = vectors - coefficients @ basis
    correction = vectors @ basis.mT
    return vectors - correction @ basis, coefficients + correction


def negligible(norms: Tensor, scale: Tensor) -> Tensor:
    """Whether a residual of this norm is rounding, for an operator of about this norm."""
    return norms <= 10 * torch.finfo(norms.dtype).eps * scale


def lanczos(matmat: MatMat, start: Tensor, *, steps: int, generator: torch.Generator) -> Tridiagonal:
    """Lanczos processes from m vectors at once, with full reorthogonalization.

    A process that reaches an invariant subspace goes on from a random vector orthogonal to it; the entry of ``off``
    there is exactly 0, so that quadratures do not see what comes after. With D steps all eigenvalues are found,
    repeated ones as often as they occur.

    Args:
        matmat: a symmetric operator A on rows.
        start: the m start vectors [m, D], not 0.
        steps: s, from 1 to D.
        generator: of random vectors, used only where a process breaks down.

    Returns:
        Diagonals, off-diagonals and bases. The bases take m s D numbers.

    Raises:
        NonFiniteError: A gave an entry that is inf or nan.

    Example:
        >>> values = torch.tensor([1.0, 3.0])
        >>> t = lanczos(lambda v: values * v, torch.ones(1, 2), steps=2, generator=torch.Generator())
        >>> t.diagonal.round(decimals=4), t.off.round(decimals=4)
        (tensor([[2., 2.]]), tensor([[1.]]))
    """
    m, size = start.shape
    basis = start.new_zeros(m, steps, size)
    diagonal, off = start.new_zeros(m, steps), start.new_zeros(m, steps - 1)
    scale = start.new_zeros(m)
    vector = start / start.norm(dim=-1, keepdim=True)
    for j in range(steps):
        basis[:, j] = vector
        product = matmat(vector)
        rest, coefficients = (x.squeeze(1) for x in reject(product.unsqueeze(1), basis[:, : j + 1]))
        diagonal[:, j] = coefficients[:, j]
        if j + 1 == steps:
            break
        scale = torch.maximum(scale, product.norm(dim=-1))
        length = rest.norm(dim=-1)
        broken = negligible(length, scale)
        off[:, j] = torch.where(broken, 0.0, length)
        vector = rest / torch.where(broken, 1.0, length).unsqueeze(-1)
        if bool(broken.any()):
            fresh = orthonormal(normal(generator, m, 1, size, like=start), basis[:, : j + 1]).squeeze(1)
            vector = torch.where(broken.unsqueeze(-1), fresh, vector)
    check_finite(diagonal, off)
    return Tridiagonal(diagonal, off, basis)


def quadrature(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of tridiagonal matrices T: f(T)_11 = sum_j weights_j f(nodes_j) (Golub and Welsch, 1969).

    For T from `lanczos` with start v, and polynomials f up to degree 2 s - 1, this is v^T f(A) v / v^T v.

    Args:
        diagonal: [m, s].
        off: [m, s - 1].

    Returns:
        Nodes [m, s], ascending, and weights [m, s] that sum to 1 in each row.

    Example:
        >>> nodes, weights = quadrature(torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0]]))
        >>> nodes.round(decimals=4), weights.round(decimals=4)
        (tensor([[1., 3.]]), tensor([[0.5000, 0.5000]]))
    """
    # a few numbers: on the host, in double precision, whatever the operator's
    beside = off.cpu().double()
    matrices = diagonal.cpu().double().diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1)
    nodes, vectors = torch.linalg.eigh(matrices)
    return nodes.to(diagonal), vectors[:, 0].square().to(diagonal)


# --- eigenpairs from one block ------------------------------------------------------------------------------------


class RitzPairs(NamedTuple):
    """Approximate eigenpairs: ``values`` [k], orthonormal ``vectors`` [k, D], ``residuals`` [k] = ||A x - l x||."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def orthonormal(vectors: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows [*, m, D] that span what vectors add to the span of basis [*, n, D]; m + n <= D."""
    for _ in range(2):  # the second time, nothing is small any more
        vectors = torch.linalg.qr(reject(vectors, basis)[0].mT)[0].mT
    return vectors


def next_block(rows: Tensor, lengths: Tensor, basis: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """The next ``width`` vectors of a basis: the rows that are long enough, then random ones."""
    order = lengths.argsort(descending=True, stable=True)
    rows, found = rows[order], int((lengths > 0).sum())
    if found < width:
        rows = torch.cat([rows[:found], normal(generator, width - found, rows.shape[1], like=rows)])
    return orthonormal(rows[:width], basis)


def block_lanczos(
    matmat: MatMat,
    start: Tensor,
    *,
    count: int,
    basis_size: int,
    tolerance: float,
    max_iterations: int,
    order: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> RitzPairs:
    """The leading eigenpairs of a symmetric operator, by block Lanczos with thick restarts.

    Each iteration applies A to one block of b vectors. When the basis is full, it is replaced by its leading Ritz
    vectors, which keep the Krylov structure because all their residuals lie in the next block (Wu and Simon, SIAM J.
    Matrix Anal. Appl. 22, 2000). A block finds eigenvalues that are repeated up to b times.

    Args:
        matmat: A on rows.
        start: the first block [b, D], of full rank.
        count: how many eigenpairs, k.
        basis_size: vectors to keep in memory, D or at least k + 2 b.
        tolerance: stop when ||A x - l x|| <= tolerance * max |l| for all k pairs.
        max_iterations: blocks after which to give up.
        order: eigenvalues -> numbers that are large where an eigenvalue leads.
        generator: of random vectors, used where the basis spans an invariant subspace.

    Returns:
        Pairs in descending order, with the norms of their true residuals.

    Raises:
        ConvergenceError: the tolerance was not reached.
        NonFiniteError: A gave an entry that is inf or nan.

    Example:
        >>> values = torch.arange(10.0)
        >>> options = dict(count=2, basis_size=10, tolerance=1e-5, max_iterations=20, order=lambda l: l)
        >>> source = torch.Generator()
        >>> start = torch.randn(2, 10, generator=source)
        >>> block_lanczos(lambda v: values * v, start, **options, generator=source).values.round(decimals=3)
        tensor([9., 8.])
    """
    width, size = start.shape
    basis = start.new_zeros(basis_size, size)
    projected = torch.zeros(basis_size, basis_size, dtype=torch.float64)  # V A V^T: small, so on the host and in double
    block, used, worst = orthonormal(start, basis[:0]), 0, float("inf")
    previous: Tensor | None = None
    for _ in range(max_iterations):
        last, used = used, used + len(block)
        basis[last:used] = block
        rest, coefficients = reject(matmat(block), basis[:used])
        check_finite(coefficients)
        projected[last:used, :used] = coefficients.double().cpu()
        projected[:used, last:used] = projected[last:used, :used].mT.clone()
        values, rotation = sorted_eigh(projected[:used, :used], order)
        scale = values.abs().max()
        # A V^T - V^T (V A V^T) is rest^T on the last block, else 0: so is a Ritz vector's residual
        columns, triangle = torch.linalg.qr(rest.mT)
        norms = (triangle.double().cpu() @ rotation[last:used, :count]).norm(dim=0)
        worst = float((norms / scale.clamp_min(torch.finfo(torch.float64).tiny)).max())
        lengths = triangle.diagonal().abs()
        lengths = torch.where(negligible(lengths, scale.to(lengths)), 0.0, lengths)
        if used == size:
            return ritz_pairs(matmat, values[:count], rotation[:, :count], basis[:used], tolerance * float(scale))
        leading = values[:count] if used >= count and worst <= tolerance else None
        if leading is not None:
            # an invariant subspace may lack copies of a repeated eigenvalue: then look at one more block
            complete = bool((lengths > 0).all())
            if complete or (previous is not None and bool(((leading - previous).abs() <= tolerance * scale).all())):
                return ritz_pairs(matmat, leading, rotation[:, :count], basis[:used], tolerance * float(scale))
        previous = leading
        if used + min(width, size - used) > basis_size:
            kept = min(count + (basis_size - count) // 4, basis_size - width)
            basis[:kept] = rotation[:, :kept].mT.to(basis) @ basis[:used]
            projected.zero_()
            projected[:kept, :kept] = values[:kept].diag()
            used = kept
        block = next_block(columns.mT, lengths, basis[:used], min(width, size - used), generator)
    raise ConvergenceError(
        f"the leading {count} eigenvalues of {size} have a relative residual of {worst:.1e} after {max_iterations} "
        f"iterations with blocks of {width}, not {tolerance:.1e}; raise max_iterations, basis_size or tolerance"
    )


def sorted_eigh(matrix: Tensor, order: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (columns) of a small matrix on the host, the leading ones first."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    first = order(values).argsort(descending=True, stable=True)
    return values[first], vectors[:, first]


def ritz_pairs(matmat: MatMat, values: Tensor, rotation: Tensor, basis: Tensor, target: float) -> RitzPairs:
    """Ritz vectors and their true residuals, which cost one more product.

    Raises:
        ConvergenceError: a true residual is above the target, which the recurrence had reached.
    """
    vectors = rotation.mT.to(basis) @ basis
    values = values.to(basis)
    residuals = (matmat(vectors) - values.unsqueeze(1) * vectors).norm(dim=1)
    floor = 100 * torch.finfo(basis.dtype).eps * float(values.abs().max())
    if float(residuals.max()) > target + floor:
        raise ConvergenceError(
            f"the residual {float(residuals.max()):.1e} of an eigenpair is above {target:.1e}, although the Lanczos "
            "recurrence has converged: the operator is not symmetric, or its products have larger errors than "
            f"those of {basis.dtype}"
        )
    return RitzPairs(values, vectors, residuals)


def check_finite(*tensors: Tensor) -> None:
    """Refuses infinite and undefined entries."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NonFiniteError("the operator's product with a finite vector has an entry that is inf or nan")
