"""Stochastic estimates of the trace and the diagonal of a symmetric matrix from a few products with it.

Products are of stacked vectors: ``matmat`` maps rows [k, D] to rows [k, D]. Every estimate is unbiased and comes with
an estimate of its standard error. "Deflated" methods spend a third of the products on finding the dominant range Q of
the matrix, a third on treating it exactly, and a third on a plain estimate of what is left: they are exact for matrices
of rank at most a third of the products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Matmat = Callable[[Tensor], Tensor]


def random_signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Independent random signs with the dtype and device of a tensor.

    Example:
        >>> random_signs((4,), torch.Generator().manual_seed(0), torch.zeros(())).abs()
        tensor([1., 1., 1., 1.])
    """
    uniform = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
    return torch.where(uniform < 0.5, -1.0, 1.0).to(like.dtype)


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of samples [m, *] over the first axis, and its standard error (nan for one sample).

    Example:
        >>> mean_and_error(torch.tensor([1.0, 3.0]))
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


def dominant_range(matmat: Matmat, size: int, samples: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Orthonormal rows Q [r, D], r = min(samples, D), that span M S^T for r random sign vectors S.

    Example:
        >>> q = dominant_range(lambda z: z * torch.tensor([1.0, 0.0]), 2, 1, torch.Generator(), torch.zeros(()))
        >>> q.abs()
        tensor([[1., 0.]])
    """
    image = matmat(random_signs((min(samples, size), size), generator, like))
    basis: Tensor = torch.linalg.qr(image.mT).Q.mT
    return basis


def shares(samples: int) -> tuple[int, int]:
    """How many products the two deflation steps get each, and how many the plain estimate."""
    rank = samples // 3
    return rank, samples - 2 * rank


def deflated_trace(
    matmat: Matmat, size: int, samples: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Hutch++: tr(Q M Q^T) + the mean of z^T P M P z over random signs z, P = I - Q^T Q, and its standard error.

    Meyer, Musco, Musco & Woodruff (2021, arXiv 2010.09649). Arguments are those of `hutchinson_trace`.

    Example:
        >>> ones = lambda z: z.sum(1, keepdim=True).expand(z.shape)  # the matrix of ones, of rank one
        >>> deflated_trace(ones, 5, 6, torch.Generator().manual_seed(0), torch.zeros(()))[0].round()
        tensor(5.)
    """
    rank, plain = shares(samples)
    basis = dominant_range(matmat, size, rank, generator, like)
    exact = (basis * matmat(basis)).sum()
    z = random_signs((plain, size), generator, like)
    z = z - z @ basis.mT @ basis
    mean, error = mean_and_error((z * matmat(z)).sum(1))
    return exact + mean, error


def deflated_diagonal(
    matmat: Matmat, size: int, samples: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Diag++: diag(Q^T Q M) + the mean of z o P M z over random signs z, P = I - Q^T Q, [D], and its standard error.

    Baston & Nakatsukasa (2022, arXiv 2201.10684). Arguments are those of `hutchinson_trace`.

    Example:
        >>> ones = lambda z: z.sum(1, keepdim=True).expand(z.shape)  # the matrix of ones, of rank one
        >>> deflated_diagonal(ones, 2, 6, torch.Generator().manual_seed(0), torch.zeros(()))[0].round()
        tensor([1., 1.])
    """
    rank, plain = shares(samples)
    basis = dominant_range(matmat, size, rank, generator, like)
    exact = (basis * matmat(basis)).sum(0)
    z = random_signs((plain, size), generator, like)
    image = matmat(z)
    mean, error = mean_and_error(z * (image - image @ basis.mT @ basis))
    return exact + mean, error
