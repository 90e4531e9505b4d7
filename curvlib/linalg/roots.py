"""Inverse p-th roots of symmetric matrices: by eigendecomposition, or by products only.

Sources: Guo and Higham 2006, A Schur-Newton method for the matrix pth root and its inverse (the coupled iteration);
Higham 2008, Functions of Matrices, chapters 6 and 7; Anil et al. 2020, arXiv 2002.09018, and Shi et al. 2023,
arXiv 2309.06497 (its use in distributed Shampoo).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, DampingError, SingularError
from curvlib.linalg.eager import may_look_at
from curvlib.linalg.eigh import eigh
from curvlib.linalg.gram import full_precision
from curvlib.linalg.precision import highest_matmul
from curvlib.linalg.quintics import margin, quintics


def inverse_root(matrix: Tensor, order: int | float, *, damping: float | Tensor = 0.0, method: str = "eigh") -> Tensor:
    """The inverse root (M + d I)^(-1 / order) of positive semidefinite matrices.

    * ``"eigh"``: any order, by eigendecomposition; the only one that notices a singular matrix.
    * ``"coupled-newton"``: whole orders. X <- X T and A <- T^p A with T = (1 + 1/p) I - A / p keep A = X^p (M + d I),
      and A goes to I.
    * ``"newton-schulz"``: orders 2, 4, 8, ...: the pair Y <- Y P(Z Y), Z <- P(Z Y) Z goes to the root and the inverse
      root, with the polynomials P of `polar`; again on Y for order 4.

    The last two take matrix products only, a fixed number on a GPU, and wait for no device. They need eigenvalues of
    M + d I above rounding: at least size * eps * the largest. Float32 products keep their accuracy whatever the global
    matmul precision. All three are as accurate as the matrix determines its root, the iterations a little more so than
    the eigendecomposition: relative errors for p = 4 at conditions of 1e2 and 1e4 are about 1e-6 and 3e-5 in float32,
    3e-15 and 4e-14 in float64.

    Args:
        matrix: M [*, d, d], symmetric, positive semidefinite.
        order: p > 0.
        damping: d, nonnegative, a number or [*].
        method: "eigh", "coupled-newton" or "newton-schulz".

    Returns:
        [*, d, d], symmetric, in full precision.

    Raises:
        ArgumentError: the method is unknown, or does not have the order.
        DampingError: the damping is negative.
        SingularError: M + d I has an eigenvalue that is not positive, in ``"eigh"`` where values can be looked at.
            Elsewhere the result is not finite.

    Example:
        >>> root = inverse_root(torch.diag(torch.tensor([16.0, 1.0])), 4)
        >>> torch.allclose(root, torch.tensor([[0.5, 0.0], [0.0, 1.0]]), atol=1e-6)
        True
    """
    if order <= 0:
        raise ArgumentError(f"the order of a root must be positive, got {order}")
    if not isinstance(damping, Tensor) and damping < 0:
        raise DampingError(f"damping must not be negative, got {damping}")
    matrix = full_precision(matrix)
    if method == "eigh":
        return root_by_eigh(matrix, order, damping)
    if isinstance(damping, Tensor):
        damping = damping[..., None, None]
    damped = matrix + damping * identity_like(matrix)
    if method == "coupled-newton":
        if order != int(order):
            raise ArgumentError(f'"coupled-newton" needs a whole order, got {order}: use method="eigh"')
        return coupled_newton(damped, int(order))
    if method == "newton-schulz":
        halvings = round(math.log2(order))
        if halvings < 1 or order != 2**halvings:
            raise ArgumentError(f'"newton-schulz" has the orders 2, 4, 8, ..., got {order}: use "coupled-newton"')
        return newton_schulz(damped, halvings)
    raise ArgumentError(f'method must be "eigh", "coupled-newton" or "newton-schulz", got {method!r}')


def resolution(matrix: Tensor) -> Tensor:
    """The least damping [*] with which the iterations find the root of a singular matrix [*, d, d].

    It is 10 d eps times (a bound of) the largest eigenvalue, where eps is the precision of the dtype.

    Example:
        >>> resolution(torch.eye(2, dtype=torch.float64)) < 1e-14
        tensor(True)
    """
    return 10 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps * norm_bound(matrix)[..., 0, 0]


def root_residual(root: Tensor, matrix: Tensor, order: int, damping: Tensor) -> Tensor:
    """How far X = (M + d I)^(-1 / order) is from being that root: ||A X^order A - A||_F / ||A||_F with A = M + d I.

    Eigenvalues count by their size, as rounding leaves no digit of X^order in the smallest ones.

    Args:
        root: X [*, n, n].
        matrix: M [*, n, n].
        order: a whole number.
        damping: d [*].

    Returns:
        [*]; not finite where X is not.

    Example:
        >>> matrix = torch.diag(torch.tensor([16.0, 1.0]))
        >>> root_residual(torch.diag(torch.tensor([0.5, 1.0])), matrix, 4, torch.tensor(0.0))
        tensor(0.)
    """
    damped = matrix + damping[..., None, None] * identity_like(matrix)
    back = highest_matmul(damped, highest_matmul(power(root, order), damped))
    return torch.linalg.matrix_norm(back - damped) / torch.linalg.matrix_norm(damped)


def root_by_eigh(matrix: Tensor, order: float, damping: float | Tensor) -> Tensor:
    """(M + d I)^(-1 / order) = Q diag((l + d)^(-1 / order)) Q^T."""
    eigenvalues, vectors = eigh(matrix)
    if isinstance(damping, Tensor):
        damping = damping.unsqueeze(-1)
    eigenvalues = eigenvalues + damping
    if may_look_at(eigenvalues) and not (eigenvalues > 0).all():
        raise SingularError(
            f"an inverse root needs positive eigenvalues, the smallest is {eigenvalues.min():.3g}: add damping"
        )
    half = vectors * eigenvalues.pow(-0.5 / order).unsqueeze(-2)
    return highest_matmul(half, half.mT)


def coupled_newton(matrix: Tensor, order: int) -> Tensor:
    """The inverse root of a positive definite matrix by the coupled Newton iteration.

    The residual follows a recursion of its own, which is stable at I: iterations beyond convergence do no harm, so that
    their number is that of the worst condition that a dtype holds. Where values can be looked at, it ends earlier.
    """
    identity, eps = identity_like(matrix), torch.finfo(matrix.dtype).eps
    factor = (1 + order) / (2 * norm_bound(matrix))
    residual = factor * matrix
    root = factor ** (1 / order) * identity
    # The smallest eigenvalue above rounding grows by (1 + 1/p)^p at first; ten more for the quadratic end and a loose
    # norm bound.
    for _ in range(math.ceil(-math.log(eps) / (order * math.log1p(1 / order))) + 10):
        step = ((1 + order) * identity - residual) / order
        root = symmetrized(highest_matmul(root, step))
        residual = symmetrized(highest_matmul(power(step, order), residual))
        if may_look_at(residual) and (residual - identity).abs().max() <= 4 * eps:
            break
    return root


def newton_schulz(matrix: Tensor, halvings: int) -> Tensor:
    """The inverse root of order 2^halvings of a positive definite matrix by coupled Newton-Schulz iterations.

    The square roots of the eigenvalues of Z Y are what the polynomials x P(x^2) send to 1.
    """
    identity = identity_like(matrix)
    eps = torch.finfo(matrix.dtype).eps
    inverse = root = matrix
    for halving in range(halvings):
        bound = norm_bound(root)
        lower = eps ** (0.5 ** (halving + 1))  # taking a root takes that of the condition, too
        root, inverse = root / bound, identity
        for a, b, c in quintics(lower, margin(eps), None):
            product = symmetrized(highest_matmul(inverse, root))
            step = a * identity + b * product + c * highest_matmul(product, product)
            root, inverse = highest_matmul(root, step), highest_matmul(step, inverse)
        root, inverse = symmetrized(root) * bound.sqrt(), symmetrized(inverse) / bound.sqrt()
    return inverse


def identity_like(matrix: Tensor) -> Tensor:
    """The identity [d, d]."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def norm_bound(matrix: Tensor) -> Tensor:
    """A bound [*, 1, 1] of the largest eigenvalue: the smaller of the Frobenius norm and the largest row sum."""
    rows = matrix.abs().sum(-1).amax(-1)[..., None, None]
    return torch.minimum(rows, torch.linalg.matrix_norm(matrix, keepdim=True))


def symmetrized(matrix: Tensor) -> Tensor:
    """(M + M^T) / 2: rounding must not take an iteration out of the symmetric matrices, where it is stable."""
    return (matrix + matrix.mT) / 2


def power(matrix: Tensor, exponent: int) -> Tensor:
    """A whole power, by squaring."""
    if exponent == 1:
        return matrix
    half = power(matrix, exponent // 2)
    square = highest_matmul(half, half)
    return highest_matmul(square, matrix) if exponent % 2 else square
