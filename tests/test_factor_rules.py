"""The factors of estimators and of optimizers are the same: one rule, one convention a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_cases import normal, relative_error
from torch import Tensor

import curvlib as cv
import curvlib.optim as optim
from curvlib.estimators import dykaf, kl_shampoo, shampoo
from curvlib.estimators.gradients import modes_of, parts_of
from curvlib.factors import KLFactors, Observation
from curvlib.factors.axes import mode_product
from curvlib.operators import Kronecker, ScaledPower
from tests.optim.optimizers_cases import stack_of

SHAPES = [(3, 4), (4, 4), (2, 3, 2)]
DECAYS = [0.9, 0.3]


def after(transformation: optim.GradientTransformation, gradients: list[Tensor]) -> Any:
    state = transformation.init({"w": gradients[0]})
    for gradient in gradients:
        _, state = transformation.update({"w": gradient}, state)
    return stack_of(state).factors


def curvature(how: Any, gradients: list[Tensor], decay: float, **options: Any) -> cv.BlockDiagonal:
    curv: cv.BlockDiagonal = how.init({"w": gradients[0]}, decay, **options)
    for gradient in gradients[1:]:
        curv = how.update(curv, {"w": gradient}, decay)
    return curv


def bases(curv: cv.BlockDiagonal) -> list[Tensor]:
    """The factors of the only block, without scales and exponents."""
    block = curv.blocks["w"]
    assert isinstance(block, Kronecker)
    return [parts_of(mode)[0].matrices() for mode in modes_of(block)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_shampoos_factors_are_the_optimizers(shape: tuple[int, ...], decay: float) -> None:
    gradients = [normal(i, *shape) for i in range(6)]
    found = bases(curvature(shampoo, gradients, decay))
    for transformation in (optim.scale_by_soap(factor_beta=decay), optim.scale_by_shampoo(factor_beta=decay)):
        for one, two in zip(found, after(transformation, gradients).matrices, strict=True):
            assert relative_error(one, two[0]) <= 1e-12


STARTS = [(shape, start) for shape in SHAPES for start in ("identity", "svd") if len(shape) == 2 or start == "identity"]


@pytest.mark.parametrize(("shape", "start"), STARTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_dykafs_factors_are_the_optimizers(shape: tuple[int, ...], decay: float, start: Any) -> None:
    gradients = [normal(i, *shape) for i in range(6)]
    curv = curvature(dykaf, gradients, decay, start=start)
    expected = after(optim.scale_by_dykaf(factor_beta=decay, start=start), gradients)
    block = curv.blocks["w"]
    assert isinstance(block, Kronecker)
    assert isinstance(block.left, ScaledPower)
    assert relative_error(block.left.scale, expected.scale[0]) <= 1e-12
    pairs = zip(bases(curv), expected.matrices, expected.norms, strict=True)
    for one, two, norm in pairs:
        assert relative_error(one, two[0] / norm[0]) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_kl_shampoos_factors_are_the_optimizers_in_exact_eigenbases(shape: tuple[int, ...], decay: float) -> None:
    gradients, rule, modes = [normal(i, *shape) for i in range(6)], KLFactors(0.0), tuple(range(len(shape)))
    expected: Any = None
    for gradient in gradients:
        stack = gradient.unsqueeze(0)
        if expected is None:
            expected = rule.first(Observation(stack, stack, stack.square()), modes, decay)
            continue
        exact = [torch.linalg.eigh(matrix)[1] for matrix in expected.matrices]
        partial = projected = stack
        for mode in modes[::-1]:
            partial, projected = projected, mode_product(projected, exact[mode], mode)
        seen = Observation(stack, partial, projected.square())
        expected = rule.update(rule.rebased(expected, exact), seen, modes, exact, decay)
    for one, two in zip(bases(curvature(kl_shampoo, gradients, decay)), expected.matrices, strict=True):
        assert relative_error(one, two[0]) <= 1e-12


def test_kl_shampoos_factors_are_those_of_the_whole_optimizer_where_they_stay_diagonal() -> None:
    gradients = [torch.diag(normal(i, 4)) for i in range(6)]
    expected = after(optim.scale_by_kl_shampoo(betas=(0.9, 0.8), damping=0.0), gradients)
    for one, two in zip(bases(curvature(kl_shampoo, gradients, 0.8)), expected.matrices, strict=True):
        assert relative_error(one, two[0]) <= 1e-12


@pytest.mark.parametrize("how", [shampoo, kl_shampoo, dykaf])
def test_a_first_gradient_without_a_decay_counts_alone(how: Any) -> None:
    gradients = {"w": normal(0, 3, 2), "b": normal(1, 3)}
    diag = how.init(gradients).diag()
    assert relative_error(diag["b"], gradients["b"].square()) <= 1e-12
    if how is kl_shampoo:
        assert relative_error(diag["w"], gradients["w"].square().mean().expand(3, 2)) <= 1e-12
    assert relative_error(how.init(gradients, 0.9).diag()["b"], 0.1 * gradients["b"].square()) <= 1e-12
