"""The Jacobian of a model's output by its parameters, as a linear map that is applied without being formed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlib.arguments import check_model
from curvlib.capture.engines import ModelFn
from curvlib.errors import PytreeError, ShapeError
from curvlib.estimators.kinds import Unweighted
from curvlib.estimators.linearization import Linearization, Mode, each, linearize
from curvlib.estimators.running import Running, twice_differentiable
from curvlib.estimators.source import PytreeTemplate, cut, detached
from curvlib.estimators.trial import Case, settle
from curvlib.linalg.eager import differentiable, is_eager, ordinary
from curvlib.operators.vectors import LinearMap, vector_leaves, widest
from curvlib.pytree import Domain, Tree, flatten, register, static


def jacobian(model_fn: ModelFn, params: Tree, inputs: Any, *, mode: Mode | None = None) -> Jacobian:
    """The derivative of a model's output by its parameters, as a linear map from params to outputs.

    Nothing is formed: ``jacobian @ v`` takes one forward pass with tangents, ``jacobian.T @ u`` one backward pass.

    Args:
        model_fn: pure function (params, inputs) -> one tensor.
        params: pytree of floating-point tensors.
        inputs: pytree, passed on as it is.
        mode: "forward", "reverse" (see `ggn`), or None: forward, unless that fails in a trial or disagrees with
            reverse mode.

    Returns:
        A `Jacobian`.

    Raises:
        PytreeError, DtypeError: the parameters are not floating-point tensors.
        CaptureError: the model does not return one tensor, or is refused; see `ggn` for this and the errors that it
            raises too.
        ArgumentError: an unknown mode.

    Example:
        >>> import torch, curvlib as cv
        >>> model_fn, params = cv.functional(torch.nn.Linear(3, 2))
        >>> J = jacobian(model_fn, params, torch.randn(5, 3))
        >>> (J @ params).shape, (J.T @ torch.ones(5, 2))["weight"].shape
        (torch.Size([5, 2]), torch.Size([2, 3]))
    """
    check_model(model_fn, params)
    domain, params = Domain.of(params), detached(params)
    leaves = flatten(params)[0]
    running = Running.now(leaves) if is_eager() else Running()
    replay = running.replay(leaves)
    with differentiable(), replay.isolated():
        tensors, frame = PytreeTemplate.split(inputs)
        case = Case(Unweighted(), model_fn, params, frame.fill(tensors), None, None, running, replay)
        case, found, chosen, width = settle(case, mode, all_data=True)
        if found is None:
            with twice_differentiable():
                shape = running.on_leaves(model_fn, domain, case.inputs, replay)(leaves).shape
        else:
            shape = found.outputs.shape
    return Jacobian(params, tensors, model_fn, domain, frame, tuple(shape), chosen, width, case.running)


@register
class Jacobian(LinearMap):
    """The linear map params -> outputs that `jacobian` returns; its transpose is ``.T``."""

    params: Tree
    tensors: tuple[Tensor, ...]
    model_fn: ModelFn = static()
    domain: Domain = static()
    frame: PytreeTemplate = static()
    output_shape: tuple[int, ...] = static()
    mode: Mode = static()
    width: int = static()
    running: Running = static(default=Running())

    @contextlib.contextmanager
    def linearized(self) -> Iterator[Linearization]:
        """The model around its parameters, in surroundings in which it may be applied."""
        leaves = flatten(self.params)[0]
        replay = self.running.replay(leaves)
        with replay.isolated(), twice_differentiable():
            fn = self.running.on_leaves(self.model_fn, self.domain, self.frame.fill(self.tensors), replay)
            yield linearize(fn, leaves, self.mode)

    def matmat(self, vectors: Tree) -> Tensor:
        """J v for k vectors stacked along a leading axis of every leaf: [k, *outputs.shape].

        Raises:
            PytreeError, ShapeError: these are not vectors of params; the message names the leaf.
            DtypeError: a leaf is not of a floating dtype; the message names it.
        """
        dtype = widest(v.dtype for v in vector_leaves(vectors) if isinstance(v, Tensor))
        given = self.domain.leaves(vectors, 1)
        with self.linearized() as line:
            stack = [ordinary(v).to(x.dtype) for v, x in zip(given, flatten(self.params)[0], strict=True)]
            product: Tensor = each(line.push, stack, self.width)
            return cut([product.to(dtype)], given)[0]

    def __matmul__(self, v: Tree) -> Tensor:
        return self.matvec(v)

    def matvec(self, v: Tree) -> Tensor:
        """J v, in the shape of the outputs and the widest dtype of the vector's leaves."""
        vector_leaves(v)
        leaves = self.domain.leaves(v)
        return self.matmat(self.domain.tree([leaf.unsqueeze(0) for leaf in leaves])).squeeze(0)

    @property
    def T(self) -> TransposedJacobian:  # noqa: N802 (as tensors call it)
        """The transpose, a linear map from outputs to params."""
        return TransposedJacobian(self)

    def transpose(self) -> TransposedJacobian:
        """The transpose, a linear map from outputs to params."""
        return TransposedJacobian(self)

    def to_dense(self) -> Tensor:
        """The matrix [number of outputs, D]. For small problems and tests."""
        return self.T.to_dense().mT


@register
class TransposedJacobian(LinearMap):
    """The linear map outputs -> params."""

    jacobian: Jacobian

    def matmat(self, cotangents: Tensor) -> Tree:
        """J^T u for k cotangents [k, *outputs.shape]: a pytree like params with a leading axis k.

        Raises:
            PytreeError, ShapeError: the cotangents are not one tensor in the shape of the outputs.
            DtypeError: they are not of a floating dtype.
        """
        shape = self.jacobian.output_shape
        vector_leaves(cotangents)
        if not isinstance(cotangents, Tensor):
            raise PytreeError(f"expected cotangents of shape [k] + {shape}, got a {type(cotangents).__name__}")
        if tuple(cotangents.shape[1:]) != shape or not cotangents.ndim:
            raise ShapeError(f"expected cotangents of shape [k] + {shape}, got {tuple(cotangents.shape)}")
        with self.jacobian.linearized() as line:
            leaves = each(line.pull, ordinary(cotangents).to(line.value.dtype), self.jacobian.width)
            return self.jacobian.domain.tree(cut([leaf.to(cotangents.dtype) for leaf in leaves], [cotangents]))

    def __matmul__(self, u: Tensor) -> Tree:
        return self.matvec(u)

    def matvec(self, u: Tensor) -> Tree:
        """J^T u, a pytree like params in the dtype of u."""
        vector_leaves(u)
        if not isinstance(u, Tensor):
            raise PytreeError(f"expected a cotangent of shape {self.jacobian.output_shape}, got a {type(u).__name__}")
        stacked = flatten(self.matmat(u.unsqueeze(0)))[0]
        return self.jacobian.domain.tree([leaf.squeeze(0) for leaf in stacked])

    @property
    def T(self) -> Jacobian:  # noqa: N802
        """The transpose: the Jacobian itself."""
        return self.jacobian

    def transpose(self) -> Jacobian:
        """The transpose: the Jacobian itself."""
        return self.jacobian

    def to_dense(self) -> Tensor:
        """The matrix [D, number of outputs]. For small problems and tests."""
        shape = self.jacobian.output_shape
        size = math.prod(shape)
        leaves = flatten(self.jacobian.params)[0]
        dtype = widest(leaf.dtype for leaf in leaves)
        rows = torch.eye(size, dtype=dtype, device=leaves[0].device).reshape(size, *shape)
        return torch.cat([leaf.reshape(size, -1) for leaf in flatten(self.matmat(rows))[0]], 1).mT
