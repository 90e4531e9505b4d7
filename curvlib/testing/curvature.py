"""`check_curvature`: an estimator of curvature against brute force."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from curvlib.errors import ArgumentError
from curvlib.losses import CrossEntropy, Loss
from curvlib.operators import Operator
from curvlib.pytree import Domain, Tree, flatten, ravel
from curvlib.testing.report import Property, Report, assert_close, check_all, same

Exact = Literal["matrix", "blocks", "diagonal", "trace"]
Truth = Literal["ggn", "empirical"]


def check_curvature(
    estimator: Callable[..., Operator],
    model_fn: Callable[[Any, Any], Tensor],
    params: Tree,
    batch: tuple[Any, Any],
    *,
    loss: Loss = CrossEntropy(),  # noqa: B008 (immutable)
    exact: Exact | None = None,
    of: Truth = "ggn",
    tolerance: float = 1e-8,
) -> Report:
    """Checks an estimator ``estimator(model_fn, params, batch, loss=loss)`` of curvature.

    Any estimator must act on params, be symmetric and positive semidefinite, change nothing it is given, draw nothing
    from torch's global generator, and give the same result twice. What it claims to have exactly must not depend on the
    order of the examples, and is compared with

        ggn: sum_n J_n^T H_n J_n / c,    empirical: sum_n g_n g_n^T / c,

    where c is what the loss divides by, and the Jacobian J_n, the Hessian H_n of the loss term and its gradient g_n are
    those of the model run on example n alone, by reverse mode.

    Args:
        estimator: what is checked, such as `curvlib.ggn` or a function that calls `curvlib.kfac` with options.
        model_fn: pure function (params, inputs) -> outputs [N, ...].
        params: pytree of tensors, in float64.
        batch: (inputs, targets) with N examples.
        loss: the objective.
        exact: what must agree: the whole ``matrix``, the diagonal ``blocks``, the ``diagonal``, the ``trace``; None:
            nothing.
        of: with which matrix.
        tolerance: the relative error that counts as rounding.

    Returns:
        What holds.

    Raises:
        AssertionError: something does not; says what.
        ArgumentError: an unknown ``exact`` or ``of``.

    Example:
        >>> import torch, curvlib as cv
        >>> from curvlib.testing import check_curvature
        >>> params = {"w": torch.eye(2, dtype=torch.float64)}
        >>> batch = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0, 1, 1])
        >>> check_curvature(cv.ggn, lambda p, x: x @ p["w"], params, batch, exact="matrix")
        8 properties hold
        >>> try:
        ...     check_curvature(cv.diagonal, lambda p, x: x @ p["w"], params, batch, exact="matrix")
        ... except AssertionError as error:
        ...     print(str(error).split(":")[1])
         the matrix is that of brute force does not hold
    """
    if exact not in (None, "matrix", "blocks", "diagonal", "trace"):
        raise ArgumentError(f"exact must be matrix, blocks, diagonal, trace or None, got {exact!r}")
    if of not in ("ggn", "empirical"):
        raise ArgumentError(f"of must be ggn or empirical, got {of!r}")
    name = getattr(estimator, "__name__", type(estimator).__name__)
    estimate = EstimatorChecks(estimator, model_fn, params, batch, loss, tolerance)
    return check_all(name, estimate.properties(exact, of))


class EstimatorChecks:
    """An estimator and what it is called with."""

    def __init__(
        self,
        estimator: Callable[..., Operator],
        model_fn: Callable[[Any, Any], Tensor],
        params: Tree,
        batch: tuple[Any, Any],
        loss: Loss,
        tolerance: float,
    ) -> None:
        self.estimator, self.model_fn, self.params, self.batch = estimator, model_fn, params, batch
        self.loss, self.tolerance = loss, tolerance
        self.before = torch_pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (params, batch))
        self.random = torch.get_rng_state()
        self.curvature = estimator(model_fn, params, batch, loss=loss)
        self.after = torch.get_rng_state()
        self.dense = self.curvature.to_dense()

    def properties(self, exact: Exact | None, of: Truth) -> Iterator[Property]:
        """What is to be checked."""
        yield Property("params and batch are not changed", self.pure)
        yield Property("torch's global generator is not used", self.own_randomness)
        yield Property("it acts on pytrees like params", self.domain)
        yield Property("a second call gives the same", self.repeatable)
        yield Property("it is symmetric", self.symmetric)
        yield Property("it is positive semidefinite", self.positive)
        if exact is not None:
            yield Property("the order of the examples does not matter", self.unordered)
            yield Property(f"the {exact} is that of brute force", lambda: self.agrees(exact, of))

    def pure(self) -> None:
        for now, before in zip(
            torch_pytree.tree_leaves((self.params, self.batch)), torch_pytree.tree_leaves(self.before), strict=True
        ):
            assert not isinstance(now, Tensor) or torch.equal(now, before), "a tensor was changed in place"

    def own_randomness(self) -> None:
        assert torch.equal(self.random, self.after), "its state is another one after the call"

    def domain(self) -> None:
        assert self.curvature.domain == Domain.of(self.params), f"it acts on {self.curvature.domain}"

    def repeatable(self) -> None:
        again = self.estimator(self.model_fn, self.params, self.batch, loss=self.loss)
        assert same(flatten(again.to_dense())[0], [self.dense]), "it differs"

    def symmetric(self) -> None:
        assert_close(self.dense, self.dense.mT, self.tolerance)

    def positive(self) -> None:
        values = torch.linalg.eigvalsh(self.dense)
        assert float(values[0]) >= -self.tolerance * float(values.abs().amax()), f"an eigenvalue is {float(values[0])}"

    def unordered(self) -> None:
        backwards = torch_pytree.tree_map(
            lambda x: x.flip(0) if isinstance(x, Tensor) and x.ndim else x, self.batch
        )
        assert_close(
            self.estimator(self.model_fn, self.params, backwards, loss=self.loss).to_dense(), self.dense, self.tolerance
        )

    def agrees(self, exact: Exact, of: Truth) -> None:
        truth = brute_force(self.model_fn, self.params, self.batch, self.loss, of)
        if exact == "matrix":
            assert_close(self.dense, truth, self.tolerance)
        elif exact == "blocks":
            within = self.same_block()
            assert_close(self.dense, torch.where(within, truth, 0), self.tolerance)
        elif exact == "diagonal":
            assert_close(ravel(self.curvature.diag()), truth.diagonal(), self.tolerance)
        else:
            assert_close(self.curvature.trace(), truth.trace(), self.tolerance)

    def same_block(self) -> Tensor:
        """[D, D]: whether two entries belong to one block."""
        size = len(self.dense)
        domain, labels = self.curvature.domain, torch.zeros(size)
        numbers = domain.leaves(domain.stacked(torch.arange(size, dtype=torch.float64).unsqueeze(0), front=()))
        for label, (_, layout) in enumerate(getattr(self.curvature, "layouts", ())):
            labels[layout.gather(numbers).flatten().long()] = float(label)
        return labels.unsqueeze(0) == labels.unsqueeze(1)


def brute_force(
    model_fn: Callable[[Any, Any], Tensor], params: Tree, batch: tuple[Any, Any], loss: Loss, of: Truth
) -> Tensor:
    """The matrix [D, D], by the model on one example at a time and reverse mode alone."""
    inputs, targets = batch
    examples = len(torch_pytree.tree_leaves(inputs)[0])
    domain = Domain.of(params)
    total = torch.zeros(domain.size, domain.size, dtype=flatten(params)[0][0].dtype)
    for n in range(examples):
        x, y = torch_pytree.tree_map(lambda z, n=n: z[n : n + 1] if isinstance(z, Tensor) and z.ndim else z, batch)
        jacobian = domain.rows(torch.func.jacrev(lambda p, x=x: model_fn(p, x).flatten())(params))
        outputs = model_fn(params, x)

        def term(f: Tensor, outputs: Tensor = outputs, y: Any = y) -> Tensor:
            return loss.terms(f.reshape(outputs.shape), y).sum()

        if of == "ggn":
            hessian = torch.func.jacrev(torch.func.jacrev(term))(outputs.flatten())
            total = total + jacobian.mT @ hessian @ jacobian
        else:
            gradient = torch.func.jacrev(term)(outputs.flatten()) @ jacobian
            total = total + torch.outer(gradient, gradient)
    return total / loss.normalizer(model_fn(params, inputs), targets)
