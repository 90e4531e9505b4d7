"""Stochastic estimates of the trace and the diagonal of a symmetric matrix from a few products with it.

Products are of stacked vectors: ``matmat`` maps rows [k, D] to rows [k, D]. Every estimate is unbiased and comes with
an estimate of its standard error. There are three kinds:

* Hutchinson's, the mean over random vectors. Best where all eigenvalues are alike, or the matrix nearly diagonal.
* Hutch++, which spends a third of the products on finding the dominant range of the matrix, a third on treating it
  exactly, and a third on a plain estimate of what is left. Its standard error can be trusted.
* Leave-one-out estimates, XTrace and XDiag, after Epperly, Tropp & Webber, "XTrace: making the most of every sample in
  stochastic trace estimation", SIAM J. Matrix Anal. Appl. 45 (2024, arXiv 2301.07825). With m random vectors w_i and
  the projector P_i onto the span of the images A w_j of all others, what lies within P_i is treated exactly and w_i
  estimates the rest; every vector serves for both, so the m estimates are averaged. 2 m products, one half with the
  w_i and one with an orthonormal basis of their images. Best where eigenvalues fall off, exact for ranks below m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from curvlib.linalg.lanczos import normal

Matmat = Callable[[Tensor], Tensor]


def random_signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Independent random signs with the dtype and device of a tensor, from the generator wherever it lives.

    Example:
        >>> random_signs((4,), torch.Generator().manual_seed(0), torch.zeros(())).abs()
        tensor([1., 1., 1., 1.])
    """
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return torch.where(uniform < 0.5, -1.0, 1.0).to(like)


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of samples [m, *] over the first axis, and its standard error (nan for one sample).

    Example:
        >>> mean, error = mean_and_error(torch.tensor([1.0, 3.0]))
        >>> mean, error.round(decimals=3)
        (tensor(2.), tensor(1.))
    """
    return samples.mean(0), samples.std(0) / len(samples) ** 0.5 if len(samples) > 1 else samples[0] * torch.nan


def hutchinson_trace(
    matmat: Matmat, size: int, samples: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean of z^T M z over random signs z (Hutchinson 1989), and its standard error.

    Args:
        matmat: rows [k, D] -> rows [k, D].
        size: D.
        samples: the number of products.
        generator: source of randomness.
        like: a tensor with the dtype and device of vectors.

    Example:
        >>> hutchinson_trace(lambda z: 2 * z, 3, 4, torch.Generator().manual_seed(0), torch.zeros(()))
        (tensor(6.), tensor(0.))
    """
    z = random_signs((samples, size), generator, like)
    return mean_and_error((z * matmat(z)).sum(1))


def hutchinson_diagonal(
    matmat: Matmat, size: int, samples: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean of z o M z over random signs z (Bekas, Kokiopoulou & Saad 2007), [D], and its standard error.

    Arguments are those of `hutchinson_trace`.

    Example:
        >>> hutchinson_diagonal(lambda z: 2 * z, 2, 4, torch.Generator().manual_seed(0), torch.zeros(()))
        (tensor([2., 2.]), tensor([0., 0.]))
    """
    z = random_signs((samples, size), generator, like)
    return mean_and_error(z * matmat(z))


def deflated_trace(
    matmat: Matmat, size: int, samples: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Hutch++: tr(Q A Q^T) + the mean of z^T P A P z over random signs z, P = I - Q^T Q, and its standard error.

    Q are orthonormal rows that span A S^T for a third of the samples as random signs S, so that it is exact for ranks
    up to that, if S has full rank. Meyer, Musco, Musco & Woodruff (2021, arXiv 2010.09649). Arguments are those of
    `hutchinson_trace`.

    Example:
        >>> ones = lambda z: z.sum(1, keepdim=True).expand(z.shape)  # the matrix of ones, of rank one
        >>> deflated_trace(ones, 5, 6, torch.Generator().manual_seed(0), torch.zeros(()))[0].round()
        tensor(5.)
    """
    rank = samples // 3
    image = matmat(random_signs((min(rank, size), size), generator, like))
    basis = torch.linalg.qr(image.mT).Q.mT
    exact = (basis * matmat(basis)).sum()
    z = random_signs((samples - 2 * rank, size), generator, like)
    z = z - z @ basis.mT @ basis
    mean, error = mean_and_error((z * matmat(z)).sum(1))
    return exact + mean, error


class LeaveOneOut(NamedTuple):
    """The projectors P_i = Q^T (I - s_i s_i^T) Q onto the images of all random vectors w_j but the i-th.

    Removing one vector takes one direction away from the basis of all of them: the unit vector s_i that is orthogonal
    to all columns of R but the i-th, which is the i-th column of R^-T.
    """

    basis: Tensor  # Q [m, D], orthonormal rows
    images: Tensor  # A Q [m, D]
    triangle: Tensor  # R [m, m], A w_i = Q^T r_i
    directions: Tensor  # S [m, m], columns s_i
    restricted: Tensor  # H = Q A Q^T [m, m]
    coordinates: Tensor  # Q w_i [m, m], one a column
    kept: Tensor  # U [m, m], columns (I - s_i s_i^T) Q w_i: P_i w_i = Q^T u_i

    @classmethod
    def of(cls, matmat: Matmat, vectors: Tensor) -> LeaveOneOut:
        """The projectors for random vectors [m, D], m <= D, from 2 m products, which must be finite."""
        columns, triangle = torch.linalg.qr(matmat(vectors).mT)
        basis = columns.mT.contiguous()
        images = matmat(basis)
        # R^-T is U diag(1 / s) V^T. Where R is singular, so that the other vectors have the same span, the directions
        # lie in its left null space: a floor for s finds them
        left, values, right = torch.linalg.svd(triangle)
        floor = (torch.finfo(values.dtype).eps * values[:1]).clamp_min(torch.finfo(values.dtype).tiny)
        directions = (left * (floor / torch.maximum(values, floor))) @ right
        directions = directions / directions.norm(dim=0)
        restricted, coordinates = basis @ images.mT, basis @ vectors.mT
        kept = coordinates - directions * (directions * coordinates).sum(0)
        return cls(basis, images, triangle, directions, (restricted + restricted.mT) / 2, coordinates, kept)


def leave_one_out_trace(
    matmat: Matmat, size: int, samples: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """XTrace: the mean over i of tr(P_i A) + (D - m + 1) v_i^T A v_i / v_i^T v_i, v_i = (I - P_i) w_i.

    With w_i normal, v_i has a uniform direction in the D - m + 1 dimensions that P_i leaves. Exact for ranks below
    m = samples // 2, and for m = D. The standard error is that of the m estimates, as if they were independent: it is
    up to 40 % too small. Arguments are those of `hutchinson_trace`.

    Example:
        >>> ones = lambda z: z.sum(1, keepdim=True).expand(z.shape)  # the matrix of ones, of rank one
        >>> leave_one_out_trace(ones, 5, 4, torch.Generator().manual_seed(0), torch.zeros(()))[0].round()
        tensor(5.)
    """
    count = min(samples // 2, size)
    vectors = normal(generator, count, size, like=like)
    parts = LeaveOneOut.of(matmat, vectors)
    removed = (parts.directions * parts.coordinates).sum(0)  # s_i^T Q w_i
    lengths = vectors.square().sum(1) - parts.coordinates.square().sum(0) + removed.square()
    # v^T A v, from Q A w_i = r_i: every product is of m numbers
    inside = (parts.coordinates - 2 * parts.kept) * parts.triangle + parts.kept * (parts.restricted @ parts.kept)
    lost = (parts.directions * (parts.restricted @ parts.directions)).sum(0)
    return mean_and_error(parts.restricted.trace() - lost + (size - count + 1) * inside.sum(0) / lengths)


def leave_one_out_diagonal(
    matmat: Matmat, size: int, samples: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """XDiag for symmetric A: the mean over i of diag(A - B_i) + w_i o B_i w_i with B_i = (I - P_i) A (I - P_i), [D].

    The w_i are random signs. The paper's estimate, for any A, has B_i = (I - P_i) A, which is larger; with A symmetric,
    projecting from both sides takes no further product. Exact for ranks below m = samples // 2. Arguments are those of
    `hutchinson_trace`.

    Example:
        >>> ones = lambda z: z.sum(1, keepdim=True).expand(z.shape)  # the matrix of ones, of rank one
        >>> leave_one_out_diagonal(ones, 3, 4, torch.Generator().manual_seed(0), torch.zeros(()))[0].round()
        tensor([1., 1., 1.])
    """
    vectors = random_signs((min(samples // 2, size), size), generator, like)
    parts = LeaveOneOut.of(matmat, vectors)
    basis, directions, restricted, kept = parts.basis, parts.directions, parts.restricted, parts.kept
    within = restricted @ basis
    outside = parts.images - within  # (I - Q^T Q) A Q^T
    lost = directions.mT @ basis  # Q^T s_i
    # diag(A - B_i) = diag(P_i A + A P_i - P_i A P_i), with P_i = Q^T Q - Q^T s_i s_i^T Q
    curved = (directions * (restricted @ directions)).sum(0).unsqueeze(1)
    exact = (basis * (2 * outside + within)).sum(0) - lost * (2 * directions.mT @ outside + curved * lost)
    rest = (directions * (parts.triangle - restricted @ kept)).sum(0).unsqueeze(1)
    return mean_and_error(exact + vectors * (rest * lost - kept.mT @ outside))
