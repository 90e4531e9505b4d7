"""Leading singular triples of Van Loan's rearrangement of an operator, from products with vectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvlib.errors import ConvergenceError
from curvlib.operators.base import Operator

Triples = tuple[Tensor, Tensor, Tensor]


def leading_triples(
    operator: Operator,
    shape: tuple[int, ...],
    count: int,
    generator: torch.Generator | None,
    tolerance: float,
    max_iterations: int,
) -> Triples:
    """The largest singular values of R(K) and their vectors as symmetric matrices, by block Lanczos on R(K)^T R(K).

    The Krylov space is kept and orthogonalised in full: it is small next to the m n x m n matrix that is never made.
    It starts from the identity, which no leading vector of a positive semidefinite operator is orthogonal to, and from
    random matrices. Each `sweep` adds a block of ``count + 1``.

    Args:
        operator: K, on one tensor, with one operator a group.
        shape: [*, m, n], the vectors' shape.
        count: how many triples.
        generator: for the random matrices; None: a fresh one with seed 0.
        tolerance: of the residual ||R^T R x - s^2 x||, relative to the largest s^2.
        max_iterations: sweeps after which to give up.

    Returns:
        Left vectors [*, count, m, m], values [*, count], right vectors [*, count, n, n].

    Raises:
        ConvergenceError: the tolerance was not reached.
    """
    *front, m, n = shape
    wide = n > m
    small, large = min(m, n), max(m, n)
    like = operator.diag()
    width = small * (small + 1) // 2
    if generator is None:
        generator = torch.Generator(like.device).manual_seed(0)
    random = torch.randn(
        *front, width, min(count, width - 1), generator=generator, dtype=like.dtype, device=like.device
    )
    start = packed(torch.eye(small, dtype=like.dtype, device=like.device)).expand(*front, width).unsqueeze(-1)
    block = torch.linalg.qr(torch.cat([start, random], -1))[0]
    basis, images, squares = block[..., :0], block.new_zeros(*front, large * (large + 1) // 2, 0), block[..., :0]
    tolerance = max(tolerance, 16 * torch.finfo(like.dtype).eps)
    for _ in range(max_iterations):
        image, square = sweep(operator, shape, unpacked(block.mT, small))
        basis = torch.cat([basis, block], -1)
        images, squares = torch.cat([images, packed(image).mT], -1), torch.cat([squares, packed(square).mT], -1)
        u, s, vh = torch.linalg.svd(images, full_matrices=False)
        vectors = basis @ vh.mT
        residuals = squares @ vh.mT - vectors * s.square().unsqueeze(-2)
        lengths = residuals.norm(dim=-2)
        relative = float((lengths[..., :count] / s[..., :1].square().clamp(min=torch.finfo(s.dtype).tiny)).amax())
        if relative <= tolerance or basis.shape[-1] == width:
            left, right = (unpacked(x[..., :count].mT, size) for x, size in ((u, large), (vectors, small)))
            return (right, s[..., :count], left) if wide else (left, s[..., :count], right)
        added = min(count + 1, width - basis.shape[-1])
        new = residuals[..., :added] / lengths[..., None, :added].clamp(min=torch.finfo(s.dtype).tiny)
        block = torch.linalg.qr(torch.cat([basis, new], -1))[0][..., basis.shape[-1] :]
    raise ConvergenceError(
        f"the nearest Kronecker products have a relative residual of {relative:.1e} after {max_iterations} sweeps, not "
        f"{tolerance:.1e}: singular values {s.reshape(-1, s.shape[-1])[0, : count + 1].tolist()} lie close together; "
        "raise max_iterations or tolerance"
    )


def sweep(operator: Operator, shape: tuple[int, ...], blocks: Tensor) -> tuple[Tensor, Tensor]:
    """C = R X and R^T C for symmetric X [*, p, s, s] on the smaller side, in one pass over the operator.

    With K applied to the unit vectors at (k, l), C_ik = sum_jl K[(i, j), (k, l)] X_jl needs the images of one k at a
    time, and so does sum_ik C_ik K[(i, j), (k, l)].
    """
    columns, square = [], torch.zeros_like(blocks)
    for images in unit_images(operator, shape, blocks):
        column = torch.einsum("...lij,...pjl->...pi", images, blocks)
        square = square + torch.einsum("...lij,...pi->...pjl", images, column)
        columns.append(column)
    return torch.stack(columns, -1), square


def unit_images(operator: Operator, shape: tuple[int, ...], like: Tensor) -> Iterator[Tensor]:
    """K applied to the unit vectors at (k, l), for one k of the larger side at a time: [*, l, i, j]."""
    *front, m, n = shape
    wide = n > m
    small, large = min(m, n), max(m, n)
    for k in range(large):
        units = like.new_zeros(small, *front, large, small)
        units[..., k, :] = torch.eye(small, dtype=like.dtype, device=like.device).reshape(
            small, *(1,) * len(front), small
        )
        vectors = units.mT if wide else units
        images = operator._apply(vectors.reshape(small, *operator.domain.shapes[0]), 1).reshape(small, *shape)
        yield (images.mT if wide else images).movedim(0, -3)


def packed(matrices: Tensor) -> Tensor:
    """Symmetric matrices [*, d, d] as vectors [*, d (d + 1) / 2] of the same norm."""
    rows, columns, weights = triangle(matrices)
    return weights * (matrices + matrices.mT)[..., rows, columns] / 2


def unpacked(vectors: Tensor, size: int) -> Tensor:
    """The symmetric matrices [*, d, d] of vectors [*, d (d + 1) / 2]."""
    matrices = vectors.new_zeros(*vectors.shape[:-1], size, size)
    rows, columns, weights = triangle(matrices)
    matrices[..., rows, columns] = vectors / weights
    matrices[..., columns, rows] = vectors / weights
    return matrices


def triangle(matrices: Tensor) -> Triples:
    """Rows and columns of the upper triangle, and the weights that make packing keep norms."""
    size = matrices.shape[-1]
    rows, columns = torch.triu_indices(size, size, device=matrices.device)
    weights = (2 - (rows == columns).to(matrices.dtype)).sqrt()
    return rows, columns, weights
