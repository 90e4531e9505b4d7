"""Matrix-free operators of models and data that draw random numbers: the same ones in every product."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import plain
import pytest
import reference
import torch
import torch.nn.functional as F
from exact_cases import MAKERS, assert_close, cross_entropy, every_mode, mlp, of_module
from exactness_problems import generator, normal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlib as cv
from curvlib.errors import ArgumentError
from curvlib.estimators import ggn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- random numbers ---------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Layers with something random between them."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.noise = nn.Linear(3, 6), nn.Linear(6, 2), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.noise(torch.tanh(self.first(x))))


def attention_dropout(x: Tensor) -> Tensor:
    q = x.reshape(len(x), 1, 3, 2)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).reshape(x.shape)


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": nn.Dropout(0.5),
    "functional dropout": lambda x: F.dropout(x, 0.3, training=True),
    "channel dropout": lambda x: F.dropout1d(x.unsqueeze(-1), 0.5, training=True).squeeze(-1),
    "alpha dropout": nn.AlphaDropout(0.4),
    "rand": lambda x: x * torch.rand(x.shape[-1], dtype=x.dtype),
    "rand_like": lambda x: x + torch.rand_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "rrelu": nn.RReLU(),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=-1),
    "permutation": lambda x: x[:, torch.randperm(x.shape[1])],
    "attention": attention_dropout,
}


def drawn_now(model_fn: Any) -> Any:
    """The model with the draws that it would make now, whenever it is called."""
    state = torch.get_rng_state()

    def replayed(params: Any, inputs: Any) -> Tensor:
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            result: Tensor = model_fn(params, inputs)
        return result

    return replayed


@every_mode
@pytest.mark.parametrize("noise", NOISE)
def test_every_product_sees_the_draws_that_the_model_would_make_when_the_operator_was_made(
    noise: str, mode: str | None
) -> None:
    if mode == "forward" and noise == "rrelu":
        mode = None
    model_fn, params, batch = of_module(Noisy(NOISE[noise]), normal(0, 5, 3))
    v = {key: normal(7, *leaf.shape) for key, leaf in params.items()}
    torch.manual_seed(11)
    frozen = drawn_now(model_fn)
    before = torch.get_rng_state()
    operators = {
        name: MAKERS[name](model_fn, params, batch, mode=mode) for name in ("ggn", "hessian", "gramian", "jacobian")
    }
    assert torch.equal(before, torch.get_rng_state())
    J = plain.jacobian(frozen, params, batch[0], whole=True)
    truths = {
        "ggn": plain.ggn(frozen, params, batch, cross_entropy, whole=True),
        "hessian": plain.hessian(frozen, params, batch, cross_entropy),
        "gramian": J.mT @ J,
        "jacobian": J,
    }
    torch.rand(3)
    before = torch.get_rng_state()
    for name, curv in operators.items():
        assert_close(curv.to_dense(), truths[name])
        assert_close(cv.ravel(curv @ v), truths[name] @ cv.ravel(v))
        copied = pickle.loads(pickle.dumps(with_model(curv, None)))
        assert_close(cv.ravel(with_model(copied, model_fn) @ v), truths[name] @ cv.ravel(v))
    assert torch.equal(before, torch.get_rng_state())


def with_model(curv: Any, model_fn: Any) -> Any:
    return dataclasses.replace(curv, model_fn=model_fn)


@pytest.mark.parametrize("name", ["ggn", "hessian"])
def test_the_number_of_vectors_at_a_time_makes_no_difference_to_the_draws(name: str) -> None:
    model_fn, params, batch = of_module(Noisy(nn.Dropout(0.5)), normal(0, 5, 3))
    curv = MAKERS[name](model_fn, params, batch)
    assert curv.width > 3
    for width in (1, 3):
        assert_close(dataclasses.replace(curv, width=width).to_dense(), curv.to_dense())


@pytest.mark.parametrize("name", ["ggn", "hessian", "gramian"])
def test_every_walk_through_a_data_set_draws_the_same_and_every_batch_its_own(name: str) -> None:
    model_fn, params, (inputs, targets) = of_module(Noisy(nn.Dropout(0.5)), normal(0, 6, 3))
    batches = [(inputs[:3], targets[:3]), (inputs[:3], targets[:3])]  # the same examples twice
    torch.manual_seed(2)
    curv = MAKERS[name](model_fn, params, cv.over(batches))
    dense = curv.to_dense()
    assert torch.equal(dense, curv.to_dense())
    assert_close(dense, dense.mT)
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        twice = MAKERS[name](model_fn, params, batches[0]).to_dense()
        torch.manual_seed(2)
        model_fn(params, batches[0][0])
        second = MAKERS[name](model_fn, params, batches[0]).to_dense()
    assert reference.relative_error(twice, second) > 0.05
    assert_close(dense, twice + second if name == "gramian" else (twice + second) / 2)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "generator": 3}])
def test_products_over_a_loader_leave_every_generator_alone(options: dict[str, Any]) -> None:
    model_fn, params, batch = mlp()
    own = generator(options.pop("generator", 0))
    loader = DataLoader(TensorDataset(*batch), 2, **options, generator=own if options else None)
    states = torch.get_rng_state(), own.get_state()
    curv = ggn(model_fn, params, cv.over(loader))
    assert_close(curv.to_dense(), ggn(model_fn, params, batch).to_dense())
    assert all(torch.equal(a, b) for a, b in zip(states, (torch.get_rng_state(), own.get_state()), strict=True))


class Jittered(torch.utils.data.Dataset[Any]):
    """Examples that are changed a little at random each time they are read."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch[1])

    def __getitem__(self, n: int) -> Any:
        return self.batch[0][n] + torch.randn(3, dtype=torch.float64), self.batch[1][n]


def test_random_augmentations_are_the_same_in_every_walk() -> None:
    model_fn, params, batch = mlp()
    curv = ggn(model_fn, params, cv.over(DataLoader(Jittered(batch), 2)))
    assert torch.equal(curv.to_dense(), curv.to_dense())
    assert reference.relative_error(curv.to_dense(), ggn(model_fn, params, batch).to_dense()) > 0.1


def test_models_that_draw_are_refused_over_shuffled_loaders_and_data_that_change_are_refused() -> None:
    model_fn, params, batch = of_module(Noisy(nn.Dropout(0.5)), normal(0, 5, 3))
    shuffled = cv.over(DataLoader(TensorDataset(*batch), 2, shuffle=True))
    dropping = cv.over(DataLoader(TensorDataset(*batch), 2, shuffle=True, drop_last=True))
    with pytest.raises(ArgumentError, match=r"draws random numbers.*random order"):
        ggn(model_fn, params, shuffled)
    calm, *_ = of_module(Noisy(nn.Dropout(0.5)).eval(), normal(0, 5, 3))
    ggn(calm, params, shuffled)
    with pytest.raises(ArgumentError, match="drops the last"):
        ggn(calm, params, dropping)
