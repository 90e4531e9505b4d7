"""The likeliest first mistakes: each is refused, at every door, with the words that say what to write instead."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import curvlib as cv
from curvlib import errors
from curvlib.pytree import flatten


def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 0, 1])
BATCH = (X, Y)

ESTIMATORS: dict[str, Callable[..., Any]] = {
    "kfac": cv.kfac,
    "ekfac": cv.ekfac,
    "ekfac, type-2": lambda *a, **k: cv.ekfac(*a, fisher="type-2", **k),
    "tkfac": cv.tkfac,
    "eigenvalue_correct": lambda f, p, b, **k: cv.eigenvalue_correct(correctable(), f, p, b, **k),
    "diagonal": cv.diagonal,
    "shampoo": cv.shampoo,
    "shampoo of examples": lambda *a, **k: cv.shampoo(*a, per_example=True, **k),
    "kl_shampoo": cv.kl_shampoo,
    "kl_shampoo of examples": lambda *a, **k: cv.kl_shampoo(*a, per_example=True, **k),
    "dykaf": cv.dykaf,
    "dykaf of examples": lambda *a, **k: cv.dykaf(*a, per_example=True, **k),
    "ggn": cv.ggn,
    "hessian": cv.hessian,
    "fisher": cv.fisher,
    "scores": lambda f, p, b, **k: cv.influence.scores(lambda v: v, f, p, b, b, **k),
    "self_influence": lambda f, p, b, **k: cv.influence.self_influence(lambda v: v, f, p, b, **k),
}
WITHOUT_LOSS: dict[str, Callable[..., Any]] = {
    "gramian": cv.gramian,
    "jacobian": lambda f, p, b: cv.jacobian(f, p, b[0]),
    "plan": lambda f, p, b: cv.plan(f, p, b[0]),
}
ALL = {**ESTIMATORS, **WITHOUT_LOSS}


def correctable() -> cv.BlockDiagonal:
    model_fn, params = cv.functional(module())
    return cv.kfac(model_fn, params, BATCH)


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(errors.CurvlibError) as refusal:
        call()
    for word in words:
        assert word in str(refusal.value)


# --- the loss -------------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[Any, list[str]]] = {
    "torch's cross-entropy": (nn.CrossEntropyLoss(), ["cv.CrossEntropy()"]),
    "with options": (
        nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.1, reduction="sum"),
        ["cv.CrossEntropy(reduction='sum', ignore_index=0, label_smoothing=0.1)", "class_dim=1"],
    ),
    "with weights": (nn.CrossEntropyLoss(weight=torch.ones(2)), ["cv.CustomLoss(fn)", "weight="]),
    "torch's squared error": (nn.MSELoss(), ["cv.MSE()"]),
    "its sum": (nn.MSELoss(reduction="sum"), ["cv.MSE(reduction='sum')"]),
    "not reduced": (nn.MSELoss(reduction="none"), ["cv.MSE()", "reduction='none'"]),
    "torch's binary cross-entropy": (nn.BCEWithLogitsLoss(), ["cv.BernoulliLogits()"]),
    "with positive weights": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)), ["cv.CustomLoss(fn)", "pos_weight="]),
    "of probabilities": (nn.BCELoss(), ["cv.BernoulliLogits()", "sigmoid"]),
    "of log-probabilities": (nn.NLLLoss(), ["cv.CrossEntropy()", "log_softmax"]),
    "another module": (nn.HuberLoss(), ["cv.CustomLoss(fn)", "HuberLoss"]),
    "a class of torch's": (nn.CrossEntropyLoss, ["the class CrossEntropyLoss", "cv.CrossEntropy()"]),
    "a function of torch's": (F.cross_entropy, ["the function cross_entropy", "cv.CrossEntropy()"]),
    "another function of torch's": (F.mse_loss, ["cv.MSE()"]),
    "a function": (lambda f, y: (f - y).square(), ["cv.CustomLoss(fn)", "one value an example"]),
    "a word": ("cross_entropy", ["'cross_entropy'", "cv.CrossEntropy()"]),
    "another word": ("MSELoss", ["'MSELoss'", "cv.MSE()"]),
    "a word for a likelihood": ("classification", ["cv.CrossEntropy()"]),
    "an unknown word": ("best", ["'best'", "cv.CrossEntropy()", "cv.MSE()", "cv.CustomLoss(fn)"]),
    "a class of curvlib's": (cv.CrossEntropy, ["the class CrossEntropy", "cv.CrossEntropy()"]),
    "a class that needs a function": (cv.CustomLoss, ["an instance", "cv.CustomLoss(fn)"]),
    "nothing": (None, ["None", "cv.CrossEntropy()", "cv.Identity()"]),
    "a number": (3, ["int", "cv.CrossEntropy()"]),
    "a tensor": (torch.ones(()), ["Tensor", "cv.CrossEntropy()"]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_no_loss_is_told_which_one_to_write(loss: str, tmp_path: Path) -> None:
    given, words = LOSSES[loss]
    model_fn, params = cv.functional(module())
    for estimator in ESTIMATORS.values():
        refused(lambda e=estimator: e(model_fn, params, BATCH, loss=given), "loss must be", *words)  # type: ignore[misc]
    projection = correctable().power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(params, rank=2))
    refused(lambda: cv.influence.build(tmp_path, projection, model_fn, params, BATCH, loss=given), *words)
    index = cv.influence.build(tmp_path / "index", projection, model_fn, params, BATCH)
    refused(lambda: index.scores(model_fn, params, BATCH, loss=given), *words)
    if given is None:  # it means the default, here
        return
    refused(lambda: projection(cv.per_example_gradients(model_fn, params, BATCH, loss=given)), *words)
    scores = cv.influence.scores
    measured = lambda: scores(lambda v: v, model_fn, params, BATCH, BATCH, measurement=given)  # noqa: E731
    refused(measured, "measurement must be", *words)


@pytest.mark.parametrize(
    ("given", "written", "targets"),
    [
        (nn.CrossEntropyLoss(), cv.CrossEntropy(), Y),
        (
            nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.1, reduction="sum"),
            cv.CrossEntropy(reduction="sum", ignore_index=0, label_smoothing=0.1),
            Y,
        ),
        (nn.MSELoss(), cv.MSE(), X[:, :2]),
        (nn.MSELoss(reduction="sum"), cv.MSE(reduction="sum"), X[:, :2]),
        (nn.BCEWithLogitsLoss(), cv.BernoulliLogits(), X[:, :2].sigmoid()),
    ],
    ids=str,
)
def test_what_is_to_be_written_is_the_same_objective(given: nn.Module, written: cv.Loss, targets: Tensor) -> None:
    outputs = module()(X).detach()
    torch.testing.assert_close(written.value(outputs, targets), given(outputs, targets))


def test_a_custom_loss_takes_a_function() -> None:
    refused(lambda: cv.CustomLoss(nn.MSELoss), "the class MSELoss")  # type: ignore[arg-type]
    refused(lambda: cv.CustomLoss(cv.MSE()), "MSE")  # type: ignore[arg-type]
    model_fn, params = cv.functional(module())
    for reduced in (F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="mean")):
        refused(lambda fn=reduced: cv.kfac(model_fn, params, BATCH, loss=cv.CustomLoss(fn)), "one value an example")  # type: ignore[misc]
    each = cv.CustomLoss(nn.CrossEntropyLoss(reduction="none"))
    truth = cv.ggn(model_fn, params, BATCH).to_dense()
    torch.testing.assert_close(cv.ggn(model_fn, params, BATCH, loss=each).to_dense(), truth)


# --- the model and its parameters -----------------------------------------------------------------------------------

ONE = module()
MODEL_FN, PARAMS = cv.functional(ONE)


def own_fn(params: Any, inputs: Tensor) -> Tensor:
    return MODEL_FN(dict(zip(PARAMS, params.values() if isinstance(params, dict) else params, strict=True)), inputs)


MODELS: dict[str, tuple[Callable[[], tuple[Any, Any]], list[str]]] = {
    "a module": (lambda: (ONE, PARAMS), ["model_fn is a module, Sequential", "cv.functional(module)"]),
    "a class": (lambda: (nn.Linear, PARAMS), ["Linear", "cv.functional(module)"]),
    "a module twice": (lambda: (ONE, ONE), ["cv.functional(module)"]),
    "swapped": (lambda: (PARAMS, MODEL_FN), ["the first two arguments are swapped"]),
    "swapped, of my own": (lambda: (PARAMS, own_fn), ["the first two arguments are swapped"]),
    "what functional returns": (lambda: (cv.functional(ONE), PARAMS), ["tuple", "model_fn, params = cv.functional"]),
    "nothing": (lambda: (None, PARAMS), ["NoneType"]),
    "module for params": (lambda: (MODEL_FN, ONE), ["Sequential", "cv.functional(module)"]),
    "parameters()": (lambda: (MODEL_FN, ONE.parameters()), ["generator", "cv.functional(module)"]),
    "named_parameters()": (lambda: (MODEL_FN, ONE.named_parameters()), ["generator", "cv.functional(module)"]),
    "a list": (lambda: (MODEL_FN, list(ONE.parameters())), ["dictionary", "list", "cv.functional(module)"]),
    "a list of pairs": (lambda: (MODEL_FN, list(ONE.named_parameters())), ["dictionary", "list"]),
    "other names": (lambda: (MODEL_FN, {"w": X}), ["'w'", "none of the module's parameters"]),
    "module, function of my own": (lambda: (own_fn, ONE), ["Sequential", "cv.functional(module)"]),
    "parameters(), own": (lambda: (own_fn, ONE.parameters()), ["generator", "dict(module.named_parameters())"]),
    "on meta": (lambda: cv.functional(nn.Linear(3, 2, device="meta")), ["'bias'", "meta", "to_empty"]),
    "on two devices": (
        lambda: (own_fn, {**PARAMS, "0.bias": PARAMS["0.bias"].to("meta")}), ["'0.bias': 'meta'", "cpu"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_what_is_no_model_and_params_is_told_what_to_write(model: str, tmp_path: Path) -> None:
    make, words = MODELS[model]
    projection = correctable().power(-0.5, cv.FactoredTikhonov(0.1)).project(cv.sketch(PARAMS, rank=2))
    index = cv.influence.build(tmp_path / "index", projection, MODEL_FN, PARAMS, BATCH)
    doors = {
        **ALL,
        "build": lambda f, p, b: cv.influence.build(tmp_path / "other", projection, f, p, b),
        "index": lambda f, p, b: index.scores(f, p, b),
    }
    if model == "on meta":
        del doors["plan"]  # needs no values
    if model == "nothing":
        del doors["index"]  # there, it means sketches
    for door in doors.values():
        refused(lambda d=door: d(*make(), BATCH), *words)  # type: ignore[misc]
    assert not (tmp_path / "other").exists()


def test_buffers_and_tied_names_among_the_parameters_are_refused() -> None:
    normalized = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    model_fn, params = cv.functional(normalized)
    refused(lambda: cv.kfac(model_fn, normalized.state_dict(), BATCH), "is a buffer", "cv.functional(module)")
    refused(lambda: cv.ggn(model_fn, {**params, "1.running_mean": X[0, :2]}, BATCH), "is a buffer")
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    tied[1].weight = tied[0].weight
    model_fn, params = cv.functional(tied)
    refused(lambda: cv.kfac(model_fn, tied.state_dict(), BATCH), "'1.weight'", "tied")
    with pytest.raises(errors.PytreeError, match="tied"):
        model_fn({**params, "1.weight": tied[1].weight.detach()}, X)


def test_other_ways_to_write_the_parameters_are_the_same() -> None:
    truth = cv.kfac(MODEL_FN, PARAMS, BATCH).to_dense()
    ways: dict[str, tuple[Any, Any]] = {
        "state_dict": (MODEL_FN, ONE.state_dict()),
        "named parameters": (MODEL_FN, dict(ONE.named_parameters())),
        "without gradients": (MODEL_FN, {k: p.detach().requires_grad_(False) for k, p in PARAMS.items()}),
        "a list, to a function of my own": (own_fn, list(PARAMS.values())),
        "a tuple of parameters": (own_fn, tuple(ONE.parameters())),
    }
    for model_fn, params in ways.values():
        found = cv.kfac(model_fn, params, BATCH)
        torch.testing.assert_close(found.trace(), truth.trace())
        torch.testing.assert_close(found.eigenvalues(), cv.kfac(MODEL_FN, PARAMS, BATCH).eigenvalues())
    some = {name: PARAMS[name] for name in ("2.weight", "2.bias")}
    part, whole = cv.kfac(MODEL_FN, some, BATCH), cv.kfac(MODEL_FN, PARAMS, BATCH)  # the rest is the module's
    torch.testing.assert_close(part.blocks["2.weight"].to_dense(), whole.blocks["2.weight"].to_dense())


@pytest.mark.parametrize("estimator", [cv.shampoo, cv.kl_shampoo, cv.dykaf], ids=["shampoo", "kl_shampoo", "dykaf"])
def test_gradients_are_a_pytree(estimator: Any) -> None:
    for grads in (ONE, ONE.parameters(), (p.grad for p in ONE.parameters())):
        refused(lambda g=grads: estimator.init(g), "p.grad")  # type: ignore[misc]
    refused(lambda: estimator.update(estimator.init(PARAMS), ONE, 0.9), "Sequential")
    refused(lambda: estimator.init({"w": 3.0}), "'w'", "float")


def test_correction_takes_a_curvature_first() -> None:
    refused(lambda: cv.eigenvalue_correct(MODEL_FN, MODEL_FN, PARAMS, BATCH), "curvature", "Functional")  # type: ignore[arg-type]
    refused(lambda: cv.eigenvalue_correct(cv.ggn(MODEL_FN, PARAMS, BATCH), MODEL_FN, PARAMS, BATCH), "MatrixFree")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [torch.eye(3), 3, MODEL_FN, PARAMS], ids=lambda x: type(x).__name__)
def test_what_is_no_operator_is_told_how_to_make_one(given: Any) -> None:
    doors: list[Callable[[Any], Any]] = [
        cv.spectrum.trace,
        cv.spectrum.diagonal,
        cv.spectrum.density,
        lambda x: cv.spectrum.density(x, per_block=True),
        lambda x: cv.spectrum.top_eigenvalues(x, 1),
        lambda x: cv.low_rank(x, 1),
        lambda x: cv.solve(x, PARAMS),
        cv.block_diagonal,
    ]
    for door in doors:
        refused(lambda d=door: d(given), "cv.ggn(", "cv.Dense(matrix)")  # type: ignore[misc]


# --- the batch ----------------------------------------------------------------------------------------------------


class Numbers(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield X[:2], Y[:2]
        yield X[2:], Y[2:]


LOADER = DataLoader(TensorDataset(X, Y), batch_size=2)
DICTS = [{"x": X[:2], "labels": Y[:2]}, {"x": X[2:], "labels": Y[2:]}]

BATCHES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "inputs alone": (lambda: X, ["(inputs, targets)", "Tensor", "cv.over(loader)"]),
    "three things": (lambda: (X, Y, Y), ["tuple of 3", "((a, b), targets)"]),
    "a list of batches": (lambda: [(X, Y)] * 3, ["list of 3", "cv.over(loader)"]),
    "a loader": (lambda: LOADER, ["DataLoader", "cv.over(loader)"]),
    "a generator": (lambda: iter(LOADER), ["cv.over(loader)"]),
    "a dictionary": (lambda: DICTS[0], ["dict of 'x', 'labels'", "(batch, batch['labels'])"]),
    "a dictionary of inputs": (lambda: {"x": X}, ["dict of 'x'", "(inputs, targets)"]),
    "nothing": (lambda: None, ["NoneType", "(inputs, targets)"]),
}
LOADERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "of inputs": (lambda: [X[:2], X[2:]], ["Tensor", "(inputs, None)", "collate_fn"]),
    "of one tensor": (lambda: DataLoader(TensorDataset(X), batch_size=2), ["list of 1", "(inputs, None)"]),
    "of three": (lambda: DataLoader(TensorDataset(X, Y, Y), batch_size=2), ["list of 3", "((a, b), targets)"]),
    "of dictionaries": (lambda: DICTS, ["dict of 'x', 'labels'", "(batch, batch['labels'])", "collate_fn"]),
    "of names": (lambda: ["a", "b"], ["str"]),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_what_is_no_batch_is_told_what_to_give(batch: str) -> None:
    make, words = BATCHES[batch]
    for door in {**ESTIMATORS, "gramian": cv.gramian}.values():
        refused(lambda d=door: d(MODEL_FN, PARAMS, make()), *words)  # type: ignore[misc]


@pytest.mark.parametrize("loader", LOADERS)
def test_inside_of_over_the_advice_is_about_the_loader(loader: str) -> None:
    make, words = LOADERS[loader]
    for door in {**ESTIMATORS, "gramian": cv.gramian}.values():
        with pytest.raises(errors.ArgumentError) as refusal:
            door(MODEL_FN, PARAMS, cv.over(make()))
        assert "cv.over(loader)" not in str(refusal.value)
        for word in (*words, "the loader given to cv.over"):
            assert word in str(refusal.value)


def test_over_takes_what_gives_batches() -> None:
    refused(lambda: cv.over(BATCH), "without cv.over")  # type: ignore[arg-type]
    refused(lambda: cv.over(X), "without cv.over")  # type: ignore[arg-type]
    refused(lambda: cv.over(DICTS[0]), "without cv.over")  # type: ignore[arg-type]
    refused(lambda: cv.over(TensorDataset(X, Y)), "TensorDataset", "DataLoader")  # type: ignore[arg-type]
    refused(lambda: cv.over(ONE), "Sequential")  # type: ignore[arg-type]
    refused(lambda: cv.over(3), "int")  # type: ignore[arg-type]
    truth = cv.kfac(MODEL_FN, PARAMS, BATCH, fisher="type-2").to_dense()
    pairs = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    for loader in (LOADER, pairs, tuple(pairs), Numbers(), cv.over(pairs), iter(pairs), [list(pair) for pair in pairs]):
        torch.testing.assert_close(cv.kfac(MODEL_FN, PARAMS, cv.over(loader), fisher="type-2").to_dense(), truth)
    refused(lambda: cv.ekfac(MODEL_FN, PARAMS, cv.over(cv.over(iter(pairs)))), "iterator")


# --- targets --------------------------------------------------------------------------------------------------------


def of_one_output(p: Any, x: Tensor) -> Tensor:
    return MODEL_FN(p, x)[:, 0]


TARGETS: dict[str, tuple[Any, Tensor | Any, cv.Loss, list[str]]] = {
    "a list": (MODEL_FN, [0, 1, 1, 0, 1], cv.CrossEntropy(), ["list", "torch.tensor(targets)"]),
    "none": (MODEL_FN, None, cv.CrossEntropy(), ["NoneType"]),
    "bool classes": (MODEL_FN, Y.bool(), cv.CrossEntropy(), [".long()"]),
    "float classes": (MODEL_FN, Y.double(), cv.CrossEntropy(), [".long()"]),
    "classes in a column": (MODEL_FN, Y[:, None], cv.CrossEntropy(), ["squeeze(-1)"]),
    "one-hot integers": (MODEL_FN, F.one_hot(Y), cv.CrossEntropy(), [".float()"]),
    "a column for a vector": (of_one_output, X[:, :1], cv.MSE(), ["(5,)", "(5, 1)", "reshape(5,)"]),
    "a vector for a column": (lambda p, x: MODEL_FN(p, x)[:, :1], X[:, 0], cv.MSE(), ["reshape(5, 1)"]),
    "one for all": (MODEL_FN, X[:1, :2], cv.MSE(), ["(5, 2)", "(1, 2)"]),
    "a number": (MODEL_FN, 0.0, cv.MSE(), ["float"]),
    "integers": (MODEL_FN, torch.zeros(5, 2).long(), cv.MSE(), [".float()"]),
    "a column of logits": (of_one_output, X[:, :1], cv.BernoulliLogits(), ["reshape(5,)"]),
    "a column for Identity": (of_one_output, X[:, :1], cv.Identity(), ["reshape(5,)"]),
    "classes elsewhere": (MODEL_FN, Y.to("meta"), cv.CrossEntropy(), ["meta", "targets.to('cpu')"]),
    "numbers elsewhere": (MODEL_FN, X[:, :2].to("meta"), cv.MSE(), ["meta", "targets.to('cpu')"]),
    "a mapping elsewhere": (
        MODEL_FN, {"y": X.to("meta")}, cv.CustomLoss(lambda f, y: f.square().sum(1)), ["targets.to('cpu')"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_that_do_not_fit_are_told_what_to_do(targets: str) -> None:
    model_fn, given, loss, words = TARGETS[targets]
    for name, estimator in ESTIMATORS.items():
        if name != "eigenvalue_correct" or model_fn is MODEL_FN:
            refused(lambda e=estimator: e(model_fn, PARAMS, (X, given), loss=loss), *words)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_class_indices_of_any_integer_dtype_are_the_same(dtype: torch.dtype) -> None:
    for name in ("kfac", "ekfac", "diagonal", "ggn", "hessian", "shampoo"):
        truth = ESTIMATORS[name](MODEL_FN, PARAMS, BATCH).to_dense()
        torch.testing.assert_close(ESTIMATORS[name](MODEL_FN, PARAMS, (X, Y.to(dtype))).to_dense(), truth)


def test_one_hot_probabilities_are_class_indices() -> None:
    hot = F.one_hot(Y).double()
    for fisher in ("type-2", "empirical", "mc"):
        truth = cv.kfac(MODEL_FN, PARAMS, BATCH, fisher=fisher).to_dense()
        torch.testing.assert_close(cv.kfac(MODEL_FN, PARAMS, (X, hot), fisher=fisher).to_dense(), truth)
        torch.testing.assert_close(cv.kfac(MODEL_FN, PARAMS, (X, hot.float()), fisher=fisher).to_dense(), truth)


def test_targets_with_a_graph_leave_no_graph() -> None:
    soft = (X[:, :2].clone().requires_grad_() * 2).softmax(-1)
    for name, estimator in ESTIMATORS.items():
        for leaf in flatten(estimator(MODEL_FN, PARAMS, (X, soft)))[0]:
            assert not (isinstance(leaf, Tensor) and leaf.requires_grad), name


# --- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SOAP", "DyKAF", "KLShampoo", "Shampoo", "Muon", "AdamW"])
def test_optimizers_take_parameters_and_closures(name: str) -> None:
    make = getattr(cv.optim.torch, name)
    model = module()
    refused(lambda: make(model, lr=0.1), "Sequential", "module.parameters()")
    refused(lambda: make(dict(model.named_parameters()), lr=0.1), "dict", "module.parameters()")
    for params in (model.parameters(), model.named_parameters(), [{"params": list(model.parameters())}]):
        optimizer = make(params, lr=0.1)
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        refused(lambda o=optimizer, x=loss: o.step(x), "Tensor", "loss.backward()")  # type: ignore[misc]
        refused(lambda o=optimizer, x=loss: o.step(x.item()), "float", "loss.backward()")  # type: ignore[misc]
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        optimizer.step()
        assert optimizer.step(lambda x=loss: x) is loss
        optimizer.zero_grad()


# --- copies of what functional returns ------------------------------------------------------------------------------


def test_model_fn_pickles_and_copies_and_is_equal_for_one_module() -> None:
    for other in (pickle.loads(pickle.dumps(MODEL_FN)), copy.deepcopy(MODEL_FN)):
        assert torch.equal(other(PARAMS, X), MODEL_FN(PARAMS, X))
    assert cv.functional(ONE)[0] == MODEL_FN
    assert hash(cv.functional(ONE)[0]) == hash(MODEL_FN)
    assert cv.functional(module())[0] != MODEL_FN
    assert MODEL_FN.module is ONE  # type: ignore[attr-defined]
