"""Leading eigen-directions in place of random ones: nothing is drawn, and nothing mixes coordinates.

In the eigenbasis of an operator with eigenvalues w_ij, an inner product of images is a weighted sum over coordinates,
sum_ij w_ij^2 g_ij h_ij. Keeping the terms of some coordinates is a projection that folds into every operator with an
eigenbasis a side, also into one whose eigenvalues do not factor.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, NotKroneckerError
from curvlib.operators.base import Operator
from curvlib.operators.bases import Basis
from curvlib.operators.kronecker import EigenKronecker, Kronecker
from curvlib.operators.matrices import Matrix
from curvlib.operators.sketch import Compressor, Ranks, Sides, check_ranks, rank_of
from curvlib.pytree import Domain

Which = Literal["smallest", "largest"]


@dataclasses.dataclass(frozen=True)
class EigenSketch(Compressor):
    """The leading eigen-directions of the curvature itself, p a side: to be given to ``curv.power(-0.5, d).project``.

    What is projected is a function of the curvature, and only its own eigenvalues say where the curvature is large.
    An inverse root is smallest there, so that by default the directions with the smallest eigenvalues are taken:

    - of a `Kronecker` product, on each side by the side's own eigenvalues;
    - of an `EigenKronecker` operator with eigenvalues w_ij (Tikhonov damping, or an eigenvalue-corrected curvature),
      rows i by sum_j 1 / w_ij^2 and columns j by sum_i 1 / w_ij^2. For w = (l + d)^(-1/2) these are the sums of the
      curvature's damped eigenvalues along the other side;
    - of a block without sides (diagonal, dense), p directions by its eigenvalues.

    Of equal eigenvalues the first counts, so that the p directions of a smaller rank are the first of a larger one. A
    side of width <= p is kept whole, and inner products of projections are exact if all are. A low-rank side has only
    its k vectors to be chosen from, its rest is left out unless it is kept whole.

    Args:
        rank: p, directions a side, for all blocks or {block: p}.
        which: ``smallest`` eigenvalues of what is projected, an inverse root; ``largest`` for the curvature or a root
            of it, with sums of w_ij^2.

    Raises:
        ArgumentError: a rank below 1, or another ``which``.

    Example:
        >>> import curvlib as cv
        >>> curv = cv.Kronecker(cv.Diagonal(torch.tensor([1.0, 9.0])), cv.Diagonal(torch.tensor([4.0, 1.0, 16.0])))
        >>> projection = curv.power(-0.5).project(EigenSketch(rank=1))
        >>> projection(torch.arange(6.0).reshape(2, 3))["params"]  # of eigenvalue 9 * 16: 5 / 12
        tensor([[0.4167]])
    """

    rank: Ranks = 64
    which: Which = "smallest"

    def __post_init__(self) -> None:
        check_ranks(self.rank)
        if self.which not in get_args(Which):
            raise ArgumentError(f"which must be one of {', '.join(get_args(Which))}, got {self.which!r}")

    def check(self, domain: Domain) -> None:
        """It fits operators on any parameters."""

    def fold(self, block: Operator, name: str) -> Sides:
        rank = rank_of(self.rank, name)
        match block:
            case Kronecker():
                return self.side(block.left, rank), self.side(block.right, rank)
            case EigenKronecker():
                return self.eigen_kronecker(block, rank)
            case Matrix():
                return (self.matrix(block, rank),)
        raise NotKroneckerError(
            f"a {type(block).__name__} has no eigenbasis a side to take the leading directions of: project Kronecker "
            "products, also damped or eigenvalue-corrected ones; of a tied weight, that of tied='merge'"
        )

    def order(self, values: Tensor) -> Tensor:
        """The places of eigenvalues [*, r], the leading ones first."""
        return values.argsort(dim=-1, descending=self.which == "largest", stable=True)

    def chosen(self, basis: Basis, values: Tensor, rank: int) -> Tensor:
        """The numbers [*, p] of coordinates to keep, of r eigenvalues [*, r] or what ranks them."""
        coordinates = basis.spread(values).shape[-1]
        if coordinates == basis.width:
            return self.order(values)[..., :rank]
        if rank < basis.width:  # the last value is that of the rest, which has no vectors
            return self.order(values[..., :-1])[..., :rank]
        return torch.arange(coordinates, device=values.device).expand(*values.shape[:-1], coordinates)

    def side(self, side: Matrix, rank: int) -> Tensor:
        """One side of a Kronecker product: eigenvectors times their eigenvalues, [*, p, d]."""
        eigen = side.eigen()
        index = self.chosen(eigen.basis, eigen.values, rank)
        spread = eigen.basis.spread(eigen.values)
        return spread.gather(-1, index).unsqueeze(-1) * vectors(eigen.basis, index, spread)

    def eigen_kronecker(self, block: EigenKronecker, rank: int) -> Sides:
        """(left [*, p, m], right [*, q, n], weights [*, p, q]) of a block whose eigenvalues need not factor."""
        squares = block.values.square()
        shares = squares if self.which == "largest" else -squares.reciprocal()
        left = self.chosen(block.left, block.right.total(shares), rank)
        right = self.chosen(block.right, block.left.total(shares.mT), rank)
        spread = block.spread(block.values)
        weights = spread.take_along_dim(left.unsqueeze(-1), -2).take_along_dim(right.unsqueeze(-2), -1)
        return vectors(block.left, left, spread.mT), vectors(block.right, right, spread), weights

    def matrix(self, block: Matrix, rank: int) -> Tensor:
        """A block without sides: eigenvectors times their eigenvalues, [p, *shape]."""
        eigen = block.eigen()
        basis, values = eigen.basis, eigen.values
        spread = basis.spread(values)
        if rank >= block.domain.size:
            index = torch.arange(spread.numel(), device=values.device)
        else:
            named = values if spread.shape[-1] == basis.width else values[..., :-1]
            index = self.order(named.flatten())[:rank]
            index = index // named.shape[-1] * spread.shape[-1] + index % named.shape[-1]
        weights = torch.zeros(len(index), spread.numel(), dtype=values.dtype, device=values.device)
        weights = weights.scatter(-1, index.unsqueeze(-1), spread.flatten()[index].unsqueeze(-1))
        return basis.synthesise_right(weights.reshape(len(index), *spread.shape).unsqueeze(-2)).squeeze(-2)


def vectors(basis: Basis, index: Tensor, spread: Tensor) -> Tensor:
    """The basis vectors of coordinates [*, p] as rows [*, p, d]; ``spread`` [*, c] has one number a coordinate."""
    unit = torch.zeros(*index.shape, spread.shape[-1], dtype=spread.dtype, device=spread.device)
    return basis.synthesise_right(unit.scatter(-1, index.unsqueeze(-1), 1.0))
