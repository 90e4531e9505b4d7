"""Bad input is refused at the door, by an error that names the parameter or block and the remedy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness_problems import normal
from torch import Tensor

import curvlib as cv
from curvlib import errors

X, Y = normal(0, 4, 3), torch.tensor([0, 1, 1, 0])
PARAMS = {"w": normal(1, 2, 3), "b": normal(2, 2)}


def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, p["w"], p["b"])


def curvature(**options: Any) -> cv.BlockDiagonal:
    return cv.kfac(model_fn, PARAMS, (X, Y), **{"fisher": "type-2", **options})


def kfac(params: Any = None, batch: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: cv.kfac(
        model_fn, PARAMS if params is None else params, (X, Y) if batch is None else batch, **options
    )


def changed(tensor: Tensor, value: float) -> Tensor:
    return tensor.clone().index_fill(0, torch.tensor([0]), value)


ROWS: dict[str, tuple[Callable[[], Any], type[errors.CurvlibError], type[Exception], list[str]]] = {
    # pytree mismatch
    "a leaf is missing": (
        lambda: curvature() @ {"w": PARAMS["w"]}, errors.PytreeError, ValueError, ["'b'"],
    ),
    "a leaf too many": (
        lambda: curvature() @ {**PARAMS, "c": X}, errors.PytreeError, ValueError, ["'c'"],
    ),
    "another structure": (
        lambda: curvature() @ [PARAMS["w"], PARAMS["b"]], errors.PytreeError, ValueError, ["list"],
    ),
    "no tensor": (
        kfac({"w": PARAMS["w"], "b": 3.0}), errors.PytreeError, ValueError, ["'b'", "float"],
    ),
    "no parameters": (kfac({}), errors.PytreeError, ValueError, ["no"]),
    "curvatures of other models": (
        lambda: curvature() + cv.kfac(lambda p, x: x @ p["w"], {"w": X[:3]}, (X, Y)),
        errors.PytreeError, ValueError, ["w"],
    ),
    # shapes
    "a leaf of another shape": (
        lambda: curvature() @ {**PARAMS, "b": X}, errors.ShapeError, ValueError, ["'b'", "(2,)", "(4, 3)"],
    ),
    "a stack with different lengths": (
        lambda: curvature().matmat({"w": PARAMS["w"][None], "b": PARAMS["b"].expand(2, 2)}),
        errors.ShapeError, ValueError, ["'w'"],
    ),
    "a vector too long": (
        lambda: cv.unravel(torch.zeros(9), PARAMS), errors.ShapeError, ValueError, ["8", "9"],
    ),
    # dtypes and devices
    "integer parameters": (
        kfac({"w": PARAMS["w"], "b": torch.tensor([1, 2])}), errors.DtypeError, TypeError,
        ["'b'", "int64", "close over"],
    ),
    "mixed devices": (
        kfac({"w": PARAMS["w"], "b": PARAMS["b"].to("meta")}), errors.DeviceError, ValueError, ["'b': 'meta'", "cpu"],
    ),
    # non-finite factors
    "inputs that are not a number": (
        kfac(batch=(changed(X, torch.nan), Y)), errors.NonFiniteError, ValueError, ["block 'w'"],
    ),
    "infinite parameters": (
        kfac({**PARAMS, "b": changed(PARAMS["b"], torch.inf)}), errors.NonFiniteError, ValueError, ["block 'w'"],
    ),
    "no target that counts": (
        kfac(batch=(X, torch.full((4,), -100))), errors.NonFiniteError, ValueError, ["no target counts"],
    ),
    # empty batches
    "no example": (kfac(batch=(X[:0], Y[:0])), errors.EmptyBatchError, ValueError, ["empty"]),
    "no batch": (kfac(batch=cv.over([])), errors.EmptyBatchError, ValueError, ["loader", "no batch"]),
    "no pair": (kfac(batch=X), errors.ArgumentError, ValueError, ["(inputs, targets)", "Tensor", "cv.over"]),
    # targets
    "targets of another length": (kfac(batch=(X, Y[:3])), errors.TargetError, ValueError, ["(4,)", "(3,)"]),
    "floating-point classes": (kfac(batch=(X, Y.double())), errors.TargetError, ValueError, [".long()"]),
    "a class out of range": (kfac(batch=(X, Y + 1)), errors.TargetError, ValueError, ["2"]),
    "integer regression targets": (
        kfac(batch=(X, torch.zeros(4, 2).long()), loss=cv.MSE()), errors.TargetError, ValueError, [".float()"],
    ),
    # damping
    "negative Tikhonov": (
        lambda: curvature().inverse(-1.0), errors.DampingError, ValueError, ["-1.0"],
    ),
    "negative factored": (
        lambda: curvature().inverse(cv.FactoredTikhonov(-1.0)), errors.DampingError, ValueError, ["-1.0"],
    ),
    "negative relative": (
        lambda: curvature().power(-0.5, cv.RelativeTikhonov(-1.0)), errors.DampingError, ValueError, ["-1.0"],
    ),
    # singular operators
    "inverse of a singular operator": (
        lambda: curvature().inverse(0.0), errors.SingularError, ValueError, ["block 'w'", "-1", "damping"],
    ),
    "negative power of a singular operator": (
        lambda: curvature().power(-0.5), errors.SingularError, ValueError, ["block 'w'", "-0.5", "damping"],
    ),
    "root of an indefinite operator": (
        lambda: cv.Diagonal(torch.tensor([-1.0, 1.0])).power(0.5), errors.SingularError, ValueError, ["0.5", "-1"],
    ),
    # projections
    "projection of an eigenvalue-corrected operator": (
        lambda: curvature().inverse(0.1).project(cv.sketch(PARAMS, rank=1)),
        errors.NotKroneckerError, TypeError, ["block 'w'", "R @ curv"],
    ),
    # options
    "an unknown Fisher": (kfac(fisher="exact"), errors.ArgumentError, ValueError, ["type-2, mc, empirical", "'exact'"]),
    "an unknown sharing": (kfac(sharing="both"), errors.ArgumentError, ValueError, ["expand, reduce", "'both'"]),
    "an unknown engine": (kfac(engine="jit"), errors.ArgumentError, ValueError, ["functional", "'jit'"]),
    "no draws": (kfac(mc_samples=0), errors.ArgumentError, ValueError, ["mc_samples", "0"]),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_refused_with_the_words_that_help(row: str) -> None:
    call, error, built_in, words = ROWS[row]
    with pytest.raises(error) as refusal:
        call()
    assert isinstance(refusal.value, built_in)
    assert isinstance(refusal.value, errors.CurvlibError)
    for word in words:
        assert word in str(refusal.value)


def test_every_error_is_a_curvlib_error_and_a_built_in_one() -> None:
    found = [x for _, x in inspect.getmembers(errors, inspect.isclass) if issubclass(x, errors.CurvlibError)]
    assert len(found) > 10
    for error in found:
        if error is not errors.CurvlibError:
            assert issubclass(error, (ValueError, TypeError, RuntimeError, KeyError))


def test_a_refused_batch_of_a_data_set_leaves_the_loader_at_that_batch() -> None:
    loader = iter([(X, Y), (X, Y[:3]), (X, Y)])
    with pytest.raises(errors.TargetError):
        cv.kfac(model_fn, PARAMS, cv.over(loader))
    assert len(list(loader)) == 1
