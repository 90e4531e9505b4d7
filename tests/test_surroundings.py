"""Matrix-free operators in any surroundings: inference mode, random numbers, fused attention, compiled code, copies."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import plain
import pytest
import reference
import torch
import torch.nn.functional as F
from exactness_problems import generator, normal, randomized
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlib as cv
from curvlib.errors import ArgumentError, CaptureError, EmptyBatchError, NonFiniteError, UnusedParameterError
from curvlib.estimators import fisher, ggn, gramian, hessian, jacobian
from curvlib.linalg.eager import ordinary
from curvlib.pytree import flatten, tree_map

EXACT = 1e-10
MAKERS: dict[str, Callable[..., Any]] = {
    "ggn": ggn,
    "hessian": hessian,
    "empirical": lambda *a, **o: fisher(*a, kind="empirical", **o),
    "mc": lambda *a, **o: fisher(*a, kind="mc", **o),
    "gramian": gramian,
    "jacobian": lambda f, p, batch, **o: jacobian(f, p, batch[0], **o),
}
every_operator = pytest.mark.parametrize("name", MAKERS)
every_mode = pytest.mark.parametrize("mode", ["forward", "reverse", None])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_close(estimate: Tensor, truth: Tensor, tolerance: float = EXACT) -> None:
    assert reference.relative_error(estimate, truth) <= tolerance


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def of_module(module: nn.Module, inputs: Any) -> tuple[Any, Any, Any]:
    model_fn, params = cv.functional(module.double())
    number = reference.number_of_examples(inputs)
    return model_fn, randomized(params, 3), (inputs, torch.randint(2, (number,), generator=generator(5)))


def mlp() -> tuple[Any, Any, Any]:
    return of_module(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), normal(0, 5, 3)
    )


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
        truth = plain.hessian(model_fn, params, batch, cross_entropy)
    assert_close((jacobian(model_fn, params, batch[0], mode=mode) @ v).flatten(), J @ cv.ravel(v))
    assert_close(cv.ravel(gramian(model_fn, params, batch, mode=mode) @ v), J.mT @ (J @ cv.ravel(v)))
    assert_close(cv.ravel(hessian(model_fn, params, batch, mode=mode) @ v), truth @ cv.ravel(v), 1e-9)


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


# --- the checks that layerwise estimators make ------------------------------------------------------------------------


def poisoned(place: str) -> tuple[Any, Any, Any]:
    model_fn, params, (inputs, targets) = mlp()
    if place == "params":
        params["0.bias"][0] = torch.nan
    if place == "inputs":
        inputs = inputs.clone()
        inputs[2, 1] = torch.inf
    if place == "outputs":
        finite = model_fn
        model_fn = lambda p, x: finite(p, x) / 0.0  # noqa: E731
    if place == "derivative":
        finite = model_fn
        model_fn = lambda p, x: (0 * finite(p, x)).abs().sqrt() + finite(p, x)  # noqa: E731
    return model_fn, params, (inputs, targets)


@pytest.mark.parametrize("name", ["ggn", "hessian", "empirical", "mc", "gramian", "jacobian"])
@pytest.mark.parametrize("place", ["params", "inputs", "outputs", "derivative"])
def test_what_is_not_finite_is_refused(name: str, place: str) -> None:
    model_fn, params, batch = poisoned(place)
    with pytest.raises(NonFiniteError, match=r"0\.bias|0\.weight"):
        MAKERS[name](model_fn, params, batch)
    if place == "inputs" and name != "jacobian":
        clean = (torch.zeros_like(batch[0]), batch[1])
        with pytest.raises((NonFiniteError, ArgumentError), match=r"finite|order"):
            MAKERS[name](model_fn, params, cv.over([clean, batch])) @ params


@pytest.mark.parametrize("name", ["ggn", "hessian", "empirical", "mc"])
def test_data_of_which_no_target_counts_are_refused_and_parts_of_data_are_not(name: str) -> None:
    model_fn, params, (inputs, targets) = mlp()
    ignored = torch.full_like(targets, -100)
    with pytest.raises(NonFiniteError, match="no target counts"):
        MAKERS[name](model_fn, params, (inputs, ignored))
    with pytest.raises(NonFiniteError, match="no target counts"):
        MAKERS[name](model_fn, params, cv.over([(inputs, ignored)])) @ params
    some = MAKERS[name](model_fn, params, cv.over([(inputs, ignored), (inputs, targets)]))
    if name != "mc":
        assert_close(some.to_dense(), MAKERS[name](model_fn, params, (inputs, targets)).to_dense())
    outputs_matter_only_where_targets_count = lambda p, x: model_fn(p, x) + x[:, :1] * 0  # noqa: E731
    half, nan = targets.clone(), inputs.clone()
    half[0], nan[0] = -100, 0.0
    curv = MAKERS[name](outputs_matter_only_where_targets_count, params, (nan, half))
    assert torch.isfinite(curv.to_dense()).all()


def test_logits_of_minus_infinity_are_classes_that_cannot_be() -> None:
    model_fn, params, (inputs, targets) = mlp()
    impossible = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    masked = lambda p, x: torch.cat([model_fn(p, x), x[:, :1]], 1) + impossible  # noqa: E731
    assert_close(ggn(masked, params, (inputs, targets)).to_dense(), ggn(model_fn, params, (inputs, targets)).to_dense())


@every_operator
def test_parameters_that_the_outputs_do_not_depend_on_are_refused(name: str) -> None:
    model_fn, params, batch = mlp()
    extended = {**params, "unused": normal(0, 2)}
    with pytest.raises(UnusedParameterError, match="unused"):
        MAKERS[name](lambda p, x: model_fn({k: p[k] for k in params}, x), extended, batch)
    with pytest.raises(UnusedParameterError):  # capture does not understand this model
        MAKERS[name](lambda p, x: x @ p["w"].sin(), {"w": normal(0, 3, 2), "unused": normal(0, 2)}, batch)
    with pytest.raises(UnusedParameterError):
        MAKERS[name](lambda p, x: x, {"unused": normal(0, 2)}, (normal(0, 5, 2), batch[1]))


class Experts(nn.Module):
    """Two experts, of which one may have no row."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        outputs = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero((x[:, 0] > 0).long() == number).flatten()
            outputs = outputs.index_add(0, rows, expert(x[rows]))
        return outputs


class ChosenExperts(Experts):
    """The same, calling only experts that have rows."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = torch.nonzero((x[:, 0] > 0).long() == number).flatten()
            if len(rows):
                outputs = outputs.index_add(0, rows, expert(x[rows]))
        return outputs


def test_experts_without_rows_have_no_curvature() -> None:
    for kind in (Experts, ChosenExperts):
        inputs = normal(0, 5, 3)
        inputs[:, 0] = inputs[:, 0].abs()
        model_fn, params, batch = of_module(kind(), inputs)
        data = cv.over([batch, (-batch[0], batch[1])])
        both = ggn(model_fn, params, data).to_dense()
        assert (both.diagonal() > 0).all()
    model_fn, params, batch = of_module(Experts(), inputs)
    assert (ggn(model_fn, params, batch).to_dense().diagonal() == 0).sum() == 8


@every_operator
def test_empty_batches_are_refused(name: str) -> None:
    model_fn, params, _ = mlp()
    with pytest.raises(EmptyBatchError):
        MAKERS[name](model_fn, params, (torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.long)))


@every_operator
@every_mode
def test_empty_leaves_take_part(name: str, mode: str | None) -> None:
    model_fn, params, batch = mlp()
    extended = {**params, "empty": normal(0, 0, 3)}

    def with_empty(p: Any, x: Tensor) -> Tensor:
        return model_fn({k: p[k] for k in params}, x) + F.linear(x, p["empty"]).sum(1, keepdim=True)

    curv = MAKERS[name](with_empty, extended, batch, mode=mode)
    assert_close(curv.to_dense(), MAKERS[name](model_fn, params, batch).to_dense())
    image = (curv.T @ normal(1, 5, 2)) if name == "jacobian" else curv @ extended
    assert image["empty"].shape == (0, 3)
    if name == "ggn":
        dense = curv.to_dense()
        assert_close(
            cv.ravel(curv.inverse(0.1) @ extended),
            torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)).to(dense), cv.ravel(extended)),
            1e-6,
        )
        blocks = cv.estimators.block_diagonal(curv)
        assert_close(blocks.trace(), curv.trace())
        assert_close(cv.spectrum.top_eigenvalues(curv, 1).values, torch.linalg.eigvalsh(dense)[-1:], 1e-7)


class Exhausting(torch.autograd.Function):
    """Runs out of memory in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory is left")


@every_operator
def test_an_out_of_memory_error_is_not_taken_for_a_missing_rule(name: str) -> None:
    model_fn, params, batch = mlp()
    exhausting = lambda p, x: Exhausting.apply(model_fn(p, x))  # noqa: E731
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        MAKERS[name](exhausting, params, batch)
    MAKERS[name](exhausting, params, batch, mode="reverse")
