"""Matrix-free operators in any surroundings: inference mode, fused attention, compiled code, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from exact_cases import MAKERS, assert_close, cross_entropy, every_mode, every_operator, mlp, of_module
from exactness_problems import generator, normal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlib as cv
from curvlib.errors import CaptureError
from curvlib.estimators import ggn, gramian, hessian, jacobian
from curvlib.linalg.eager import ordinary
from curvlib.pytree import flatten, tree_map


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- inference mode ---------------------------------------------------------------------------------------------------


@every_operator
@every_mode
@pytest.mark.parametrize("surroundings", [torch.inference_mode, torch.no_grad])
def test_products_do_not_depend_on_the_surroundings(name: str, mode: str | None, surroundings: Any) -> None:
    model_fn, params, batch = mlp()
    make = MAKERS[name]
    truth = make(model_fn, params, batch, mode=mode)
    v = {key: normal(7, *leaf.shape) for key, leaf in params.items()}
    with surroundings():
        made_there = make(model_fn, params, batch, mode=mode)
        dense = made_there.to_dense()
        image, other = made_there @ v, truth @ v
    assert_close(dense, truth.to_dense())
    for x in (made_there @ v, image, other):
        assert_close(cv.ravel(x), cv.ravel(truth @ v))


@every_operator
@every_mode
def test_tensors_made_in_inference_mode_are_as_good_as_others(name: str, mode: str | None) -> None:
    model_fn, params, batch = mlp()
    truth = MAKERS[name](model_fn, params, batch, mode=mode)
    v = {key: normal(7, *leaf.shape) for key, leaf in params.items()}
    with torch.inference_mode():
        params, batch, w = tree_map(torch.clone, (params, batch, v))
        assert flatten(params)[0][0].is_inference()
        early = MAKERS[name](model_fn, params, batch, mode=mode)
    late = MAKERS[name](model_fn, params, batch, mode=mode)
    for curv in (early, late):
        for vector in (v, w):
            assert_close(cv.ravel(curv @ vector), cv.ravel(truth @ v))
    if name not in ("jacobian", "mc"):
        with torch.inference_mode():
            data = cv.over(DataLoader(TensorDataset(*ordinary(batch)), 2))
            streamed = MAKERS[name](model_fn, params, data, mode=mode)
            assert_close(cv.ravel(streamed @ w), cv.ravel(truth @ v))
            listed = MAKERS[name](model_fn, params, cv.over([batch]), mode=mode)
        assert_close(cv.ravel(listed @ w), cv.ravel(truth @ v))


def test_systems_are_solved_and_traces_taken_in_inference_mode() -> None:
    model_fn, params, batch = mlp()
    curv = ggn(model_fn, params, batch)
    dense = curv.to_dense()
    with torch.inference_mode():
        x = ggn(model_fn, params, batch).inverse(0.1) @ params
        assert_close(ggn(model_fn, params, batch).trace(), dense.trace())
        assert_close(cv.ravel(curv.inverse(0.1) @ params), cv.ravel(x))
        largest = cv.spectrum.top_eigenvalues(curv, 1).values
        assert_close(largest, torch.linalg.eigvalsh(dense)[-1:], 1e-7)
    assert_close(cv.ravel(curv.damp(0.1) @ x), cv.ravel(params), 1e-7)


def test_a_tensor_of_inference_mode_that_the_model_closes_over_is_refused_if_it_is_in_the_way() -> None:
    _, params, batch = mlp()
    with torch.inference_mode():
        scale = normal(1, 2)
    with pytest.raises(CaptureError, match=r"made in torch\.inference_mode.*clone"):
        ggn(lambda p, x: x @ p["0.weight"].T[:, :2] * scale, {"0.weight": params["0.weight"]}, batch)


# --- gradients that are not wanted ------------------------------------------------------------------------------------


@every_operator
@every_mode
def test_no_product_is_attached_to_a_graph(name: str, mode: str | None) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    outside = normal(1, 3).requires_grad_()
    model_fn, _ = cv.functional(net)
    params = dict(net.named_parameters())
    batch = (normal(0, 5, 3).requires_grad_(), torch.randint(2, (5,), generator=generator(5)))
    v = tree_map(torch.detach, params)
    operators = [MAKERS[name](lambda p, x: model_fn(p, x * outside), params, batch, mode=mode)]
    if name != "jacobian":
        operators.append(MAKERS[name](lambda p, x: model_fn(p, x * outside), params, cv.over([batch]), mode=mode))
    for curv in operators:
        stack = tree_map(lambda x: torch.stack([x, x]), v)
        images = [curv @ v, curv.matmat(stack), curv.to_dense()]
        if name == "jacobian":
            images += [curv.T @ normal(2, 5, 2)]
        assert not any(leaf.requires_grad or leaf.grad_fn for image in images for leaf in flatten(image)[0])
        assert not any(leaf.requires_grad for leaf in flatten(curv)[0])
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


# --- attention, compiled modules --------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.head, self.options = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 2),
            options,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False, **self.options)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, *, nested: bool = True, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head, self.options = nn.Linear(4, 2), options

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x, **self.options)[:, 0])


class EncoderLayer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **options), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[:, 0])


PADDED = torch.tensor([[False, False, True], [False, False, False], [False, True, True], [False, False, False]])
CAUSAL = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "attention": SelfAttention,
    "attention, padded": lambda: SelfAttention(key_padding_mask=PADDED),
    "attention, masked": lambda: SelfAttention(attn_mask=CAUSAL),
    "encoder": Encoder,
    "encoder, padded": lambda: Encoder(src_key_padding_mask=PADDED),
    "encoder, padded, not nested": lambda: Encoder(src_key_padding_mask=PADDED, nested=False),
    "encoder, causal": lambda: Encoder(mask=CAUSAL, is_causal=True),
    "layer": EncoderLayer,
    "layer, norm first": lambda: EncoderLayer(norm_first=True, activation="gelu"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", ATTENTION)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_attention_in_evaluation_is_differentiated_by_its_formula(model: str, mode: str) -> None:
    model_fn, params, batch = of_module(ATTENTION[model]().eval(), normal(0, 4, 3, 4))
    v = {key: normal(7, *leaf.shape) for key, leaf in params.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        roots = plain.roots_of(params)
        J = torch.stack([plain.flat_gradient(x, roots) for x in model_fn(roots, batch[0]).flatten()])
        gradient = plain.flat_gradient(cross_entropy(model_fn(roots, batch[0]), batch[1]), roots, keep=True)
        product = plain.flat_gradient(gradient @ cv.ravel(v), roots)
    assert_close((jacobian(model_fn, params, batch[0], mode=mode) @ v).flatten(), J @ cv.ravel(v))
    assert_close(cv.ravel(gramian(model_fn, params, batch, mode=mode) @ v), J.mT @ (J @ cv.ravel(v)))
    assert_close(cv.ravel(hessian(model_fn, params, batch, mode=mode) @ v), product, 1e-9)


def compiled_modules(backend: str) -> dict[str, Callable[[], Any]]:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def parts() -> nn.Module:
        module = net()
        module[0] = torch.compile(module[0], backend=backend)
        module[2].compile(backend=backend)
        return module

    def inplace() -> nn.Module:
        module = net()
        module.compile(backend=backend)
        return module

    return {"plain": net, "whole": lambda: torch.compile(net(), backend=backend), "parts": parts, "in place": inplace}


@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
def test_compiled_modules_and_functions_are_run_as_they_were_written(backend: str) -> None:
    batch = (normal(0, 5, 3), torch.randint(2, (5,), generator=generator(5)))
    modules = compiled_modules(backend)
    with torch.random.fork_rng([]):
        made = {name: cv.functional(make()) for name, make in modules.items()}
    plain_fn, params = made["plain"]
    models = {name: model for name, (model, _) in made.items()}
    models["function"] = torch.compile(plain_fn, backend=backend)
    inner = torch.compile(torch.tanh, backend=backend)
    by_hand = lambda p, x: F.linear(inner(F.linear(x, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])  # noqa: E731
    models["inner function"] = by_hand
    for make in MAKERS.values():
        truth = make(plain_fn, params, batch).to_dense()
        for name, model_fn in models.items():
            given = made[name][1] if name in made else params
            assert_close(make(model_fn, given, batch).to_dense(), truth)


# --- copies -----------------------------------------------------------------------------------------------------------


def model(params: Any, data: Any) -> Tensor:
    return torch.tanh(data["x"] @ params["a"] * data["scale"]) @ params["b"]


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda c: c,
    "inverse": lambda c: c.inverse(10.0),
    "damped": lambda c: c.damp(0.5),
    "sum": lambda c: c + 2.0 * c,
}


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
@every_operator
def test_copies_give_the_same_products(name: str, copied: Callable[[Any], Any]) -> None:
    params = {"a": normal(1, 3, 4), "b": normal(2, 4, 2)}
    batch = ({"x": normal(3, 5, 3), "scale": 2, "name": "x"}, torch.randint(2, (5,), generator=generator(5)))
    data = [batch] if name == "jacobian" else [batch, cv.over([batch, batch])]
    for one in data:
        curv = MAKERS[name](model, params, one)
        for derive in list(COPIES.values()) if name != "jacobian" else [lambda c: c, lambda c: c.T.T]:
            found = derive(curv)
            again = copied(found)
            assert_close(cv.ravel(again @ params), cv.ravel(found @ params))
            if one is batch and copied is not copy.copy:
                assert flatten(again)[1] == flatten(found)[1]  # as trees they have one structure
