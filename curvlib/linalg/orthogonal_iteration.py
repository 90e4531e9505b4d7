"""One step of orthogonal iteration: an eigenbasis that follows a slowly changing symmetric matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlib.linalg.eager import may_look_at
from curvlib.linalg.gram import writes_in_place


def orthogonal_iteration(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One QR power iteration of an eigenbasis, its columns sorted by their Rayleigh quotients first.

    With l = diag(Q^T M Q) and ``order`` the permutation that sorts l descending, the new basis is the Q of the QR
    decomposition of M Q[:, order]. One matrix product and one QR decomposition: l is read off the same product.
    Columns keep no sign: a new column may point the other way. A zero matrix gives the identity.

    Args:
        matrix: M [*, n, n], symmetric and positive semidefinite.
        basis: Q [*, n, n], orthogonal.

    Returns:
        The new basis [*, n, n], and the order [*, n] (int64): its column i descends from column ``order[i]`` of Q.

    Source:
        Vyas et al. 2024, SOAP, arXiv 2409.11321, algorithm 4.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> basis, order = orthogonal_iteration(matrix, torch.eye(2))
        >>> basis.abs().round(decimals=4), order
        (tensor([[0., 1.],
                [1., 0.]]), tensor([1, 0]))
    """
    if matrix.ndim == 3 and len(matrix) > 1 and may_look_at(matrix):
        # LAPACK takes them one by one anyway, and the temporary results of one stay in the cache
        pairs = [orthogonal_iteration(*pair) for pair in zip(matrix, basis, strict=True)]
        return torch.stack([new.mT for new, _ in pairs]).mT, torch.stack([order for _, order in pairs])
    image, quotients = rayleigh(matrix, basis)
    order = quotients.argsort(dim=-1, descending=True, stable=True)
    columns = image.gather(-2, order.unsqueeze(-1).expand(image.shape)).mT
    return orthonormalized(columns), order


def orthonormalized(columns: Tensor) -> Tensor:
    """The Q of a QR decomposition [*, n, n]; where nobody needs R, LAPACK is not asked to copy it.

    Example:
        >>> orthonormalized(torch.tensor([[0.0, 3.0], [2.0, 0.0]])).abs().round(decimals=4)
        tensor([[0., 1.],
                [1., 0.]])
    """
    if columns.device.type == "cpu" and writes_in_place(columns):
        return torch.linalg.householder_product(*torch.geqrf(columns))
    return torch.linalg.qr(columns)[0]


def off_diagonality(matrix: Tensor, basis: Tensor) -> Tensor:
    """How far a basis is from diagonalising a matrix: ||offdiag(Q^T M Q)||_F / ||M||_F, between 0 and 1.

    Computed as ||M Q - Q diag(l)||_F / ||M Q||_F with l = diag(Q^T M Q): the same for orthogonal Q, by one matrix
    product and without cancellation. A zero matrix is diagonal in every basis: 0.

    Args:
        matrix: M [*, n, n], symmetric.
        basis: Q [*, n, n], orthogonal.

    Returns:
        [*].

    Example:
        >>> matrix = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> off_diagonality(matrix, torch.eye(2)), off_diagonality(matrix, torch.linalg.eigh(matrix)[1]) < 1e-6
        (tensor(1.), tensor(True))
    """
    image, quotients = rayleigh(matrix, basis)
    residual = torch.linalg.matrix_norm(image - basis.mT * quotients.unsqueeze(-1))
    return residual / torch.linalg.matrix_norm(image).clamp(min=torch.finfo(image.dtype).tiny)


def rayleigh(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The image (M Q)^T [*, n, n], a row a column, and the Rayleigh quotients diag(Q^T M Q) [*, n].

    Example:
        >>> rayleigh(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.eye(2))[1]
        tensor([2., 3.])
    """
    image = basis.mT @ matrix
    return image, torch.linalg.vecdot(image, basis.mT)
