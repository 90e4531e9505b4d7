"""Modules as pure functions: keyword inputs, one of several outputs, and modules that are refused."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvlib as cv
from curvlib import errors
from curvlib.pytree import ravel
from tests.test_containers import Encoding, ModelOutput

WORDS, CLASSES, EXAMPLES, LENGTH = 11, 3, 5, 4


class Language(nn.Module):
    """As transformers' models: keywords in, several things out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, CLASSES)
        self.double()

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden = self.embedding(input_ids).tanh()
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        logits: Tensor = self.head(hidden.mean(1))
        return logits

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        assert isinstance(input_ids, Tensor)
        logits = self.logits(input_ids, attention_mask)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return ModelOutput(**loss, logits=logits, hidden_states=(logits, logits))


def encoding() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (EXAMPLES, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < torch.tensor([[4], [2], [3], [4], [1]])).long()}


LABELS = torch.tensor([0, 1, 2, 0, 1])


def truth(module: Language, inputs: dict[str, Tensor], params: dict[str, Tensor]) -> Tensor:
    """The empirical Fisher, from gradients of one example at a time."""

    def gradient(n: int) -> Tensor:
        def term(p: dict[str, Tensor]) -> Tensor:
            one = {key: x[n : n + 1] for key, x in inputs.items()}
            outputs = torch.func.functional_call(module, p, (), one)
            return F.cross_entropy(outputs["logits"], LABELS[n : n + 1])

        return ravel(torch.func.grad(term)(params))

    gradients = torch.stack([gradient(n) for n in range(EXAMPLES)])
    return gradients.T @ gradients / EXAMPLES


CONTAINERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": dict,
    "BatchEncoding": lambda items: Encoding(items, ["not a tensor"]),
    "UserDict": collections.UserDict,
    "OrderedDict": collections.OrderedDict,
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("more", [{}, {"labels": LABELS}, {"token_type_ids": LABELS[:, None]}], ids=str)
def test_a_model_of_keywords_and_several_outputs(container: str, more: dict[str, Tensor]) -> None:
    module = Language()
    model_fn, params = cv.functional(module, output="logits")
    inputs = CONTAINERS[container]({**encoding(), **more})
    batch = inputs, LABELS
    expected = truth(module, encoding(), params)
    torch.testing.assert_close(cv.fisher(model_fn, params, batch, fisher="empirical").to_dense(), expected)
    torch.testing.assert_close(cv.ekfac(model_fn, params, batch, fisher="empirical").trace(), expected.trace())
    diagonal = cv.diagonal(model_fn, params, batch, fisher="empirical").diag()
    torch.testing.assert_close(cv.ravel(diagonal), expected.diagonal())

    def rows(start: int, stop: int) -> Any:
        return CONTAINERS[container]({key: x[start:stop] for key, x in {**encoding(), **more}.items()})

    parts = [(rows(0, 2), LABELS[0:2]), (rows(2, 5), LABELS[2:5])]
    over = cv.fisher(model_fn, params, cv.over(parts), fisher="empirical").to_dense()
    torch.testing.assert_close(over, expected)
    scores = cv.influence.self_influence(lambda v: v, model_fn, params, batch)
    torch.testing.assert_close(scores.sum() / EXAMPLES, expected.trace())
    assert sum("embedding" in line for line in str(cv.plan(model_fn, params, inputs)).splitlines())


# --- which mappings are keywords ------------------------------------------------------------------------------------


class OfDict(nn.Module):
    """Takes a dictionary as its one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, batch: Any) -> Tensor:
        return self.linear(batch["x"]) * batch["scale"]


class OfDictNamedAsItsKey(OfDict):
    def forward(self, x: Any) -> Tensor:
        return self.linear(x["x"]) * x["scale"]


class OfDictAndOptions(OfDict):
    def forward(self, batch: Any, flip: bool = False, **options: Any) -> Tensor:
        assert not options
        return super().forward(batch)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.linear = inner.linear
        self.inner = [inner]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0](*args, **kwargs)


class OfKeywords(OfDict):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return self.linear(x) * scale


class OfKeywordsOnly(OfDict):
    def forward(self, *, x: Tensor, scale: Tensor = torch.ones(())) -> Tensor:  # type: ignore[override]
        return self.linear(x) * scale


class Single(OfDict):
    def forward(self, x: Any) -> Tensor:
        assert isinstance(x, Tensor)
        return self.linear(x)


class DictInDictOut(OfDict):
    def forward(self, batch: Any) -> Any:
        return {"logits": super().forward(batch), "other": batch["x"]}


INPUTS = {"x": torch.ones(4, 3), "scale": torch.full((4, 1), 2.0)}
ONE_ARGUMENT: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a dict": (OfDict, {}),
    "named as its key": (OfDictNamedAsItsKey, {}),
    "with options": (OfDictAndOptions, {}),
    "wrapped": (lambda: Wrapper(OfDict()), {}),
    "in a Sequential": (lambda: nn.Sequential(OfDict()), {}),
    "with an output": (DictInDictOut, {"output": "logits"}),
    "by choice": (OfDictNamedAsItsKey, {"keywords": False}),
    "wrapped, with an output, by choice": (lambda: Wrapper(DictInDictOut()), {"output": "logits", "keywords": False}),
}
KEYWORDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "keywords": (OfKeywords, {}),
    "keywords only": (OfKeywordsOnly, {}),
    "wrapped, by choice": (lambda: Wrapper(OfKeywords()), {"keywords": True}),
}


@pytest.mark.parametrize("case", [*ONE_ARGUMENT, *KEYWORDS])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_mapping_is_one_argument_or_keywords(case: str, container: str) -> None:
    make, options = {**ONE_ARGUMENT, **KEYWORDS}[case]
    module = make()
    model_fn, params = cv.functional(module, **options)
    linear = next(part for part in module.modules() if isinstance(part, nn.Linear))
    found = model_fn(params, CONTAINERS[container](INPUTS))
    torch.testing.assert_close(found, linear(INPUTS["x"]) * 2)
    assert cv.kfac(model_fn, params, (CONTAINERS[container](INPUTS), torch.zeros(4).long())).trace() > 0


def test_one_keyword_is_taken_where_an_output_or_the_choice_is_given() -> None:
    module = Single()
    expected = module(INPUTS["x"])
    model_fn, params = cv.functional(module, keywords=True)
    torch.testing.assert_close(model_fn(params, {"x": INPUTS["x"]}), expected)
    model_fn, params = cv.functional(module)
    torch.testing.assert_close(model_fn(params, INPUTS["x"]), expected)  # a tensor is what it was


# --- which output ---------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    logits: Any
    state: Any


@dataclasses.dataclass
class Result:
    logits: Any
    state: Any


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a tuple": lambda z: (z, 2 * z),
    "a list": lambda z: [z, 2 * z],
    "a dict": lambda z: {"logits": z, "state": 2 * z},
    "a UserDict": lambda z: collections.UserDict(logits=z, state=2 * z),
    "a ModelOutput": lambda z: ModelOutput(logits=z, state=2 * z),
    "a named tuple": lambda z: Named(z, 2 * z),
    "a dataclass": lambda z: Result(z, 2 * z),
}


class Returning(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(3, 2), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_one_of_several_outputs_is_chosen_or_the_error_says_how(kind: str) -> None:
    module = Returning(OUTPUTS[kind])
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    numbered = kind in ("a tuple", "a list")
    model_fn, params = cv.functional(module, output=0 if numbered else "logits")
    expected = cv.kfac(lambda p, x: x @ p["linear.weight"].T + p["linear.bias"], params, (x, y)).to_dense()
    torch.testing.assert_close(cv.kfac(model_fn, params, (x, y)).to_dense(), expected)
    several, _ = cv.functional(module)
    chosen = lambda p, x: next(iter(flat(several(p, x))))  # noqa: E731 (what it returned before stays possible)
    torch.testing.assert_close(cv.kfac(chosen, params, (x, y)).to_dense(), expected)
    doors: list[Callable[[], Any]] = [
        lambda: cv.plan(several, params, x),
        lambda: cv.kfac(several, params, (x, y)),
        lambda: cv.shampoo(several, params, (x, y)),
        lambda: cv.ggn(several, params, (x, y)),
        lambda: cv.hessian(several, params, (x, y)),
        lambda: cv.jacobian(several, params, x),
        lambda: cv.influence.self_influence(lambda v: v, several, params, (x, y)),
    ]
    for door in doors:
        with pytest.raises(errors.CurvlibError, match=r"one tensor .*cv\.functional\(module, output="):
            door()
    missing, _ = cv.functional(module, output=7 if numbered else "logit")
    with pytest.raises(errors.ArgumentError, match="7" if numbered else "'logit'"):
        cv.kfac(missing, params, (x, y))


def flat(outputs: Any) -> Any:
    if isinstance(outputs, collections.abc.Mapping):
        return outputs.values()
    return vars(outputs).values() if isinstance(outputs, Result) else outputs


def test_an_output_of_a_module_that_returns_one_tensor_is_refused() -> None:
    model_fn, params = cv.functional(nn.Linear(3, 2), output="logits")
    with pytest.raises(errors.ArgumentError, match="one tensor: leave out output='logits'"):
        cv.kfac(model_fn, params, (torch.ones(4, 3), torch.zeros(4).long()))


# --- modules that are refused ---------------------------------------------------------------------------------------


def quantized() -> nn.Module:
    class Quantized(nn.Module):
        """Known by the module that its class is of, as torch's are."""

    Quantized.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"
    return nn.Sequential(nn.Linear(3, 3), Quantized())


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(3, 2)), ["DataParallel", "module.module"]),
    "DataParallel inside": (lambda: nn.Sequential(nn.DataParallel(nn.Linear(3, 2))), ["module.0.module"]),
    "scripted": (lambda: torch.jit.script(nn.Linear(3, 2)), ["scripted", "that it was made of"]),
    "traced": (lambda: torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)), ["traced"]),
    "scripted inside": (lambda: nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 2))), ["module.1"]),
    "quantized": (quantized, ["module.1", "quantized", "before quantization"]),
    "lazy": (lazy, ["'1.weight'", "module(inputs)"]),
    "a lazy norm": (lambda: nn.Sequential(nn.Linear(3, 2), nn.LazyBatchNorm1d()), ["'1.weight'", "module(inputs)"]),
    "frozen": (lambda: nn.Linear(3, 2).requires_grad_(False), ["no parameter", "requires_grad_()"]),
    "without parameters": (nn.ReLU, ["no parameter"]),
    "a class": (lambda: nn.Linear, ["the class Linear", "instance"]),
    "a function": (lambda: F.relu, ["function", "model_fn"]),
    "parameters": (lambda: dict(nn.Linear(3, 2).named_parameters()), ["dict"]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", REFUSED)
def test_modules_that_cannot_be_called_with_other_parameters_are_refused(module: str) -> None:
    make, words = REFUSED[module]
    with pytest.raises(errors.CurvlibError) as refusal:
        cv.functional(make())
    for word in words:
        assert word in str(refusal.value)


def test_a_distributed_wrapper_is_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
        with pytest.raises(errors.ArgumentError, match=r"DistributedDataParallel.*module\.module"):
            cv.functional(wrapped)
        assert cv.functional(wrapped.module)[1].keys() == {"weight", "bias"}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_that_look_like_those_work() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    initialized = lazy()
    initialized(x)
    scripted = nn.Sequential(nn.Linear(3, 2), torch.jit.script(nn.Tanh()))  # no parameters in it
    partly = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2))
    for module in (initialized, scripted, partly, nn.DataParallel(nn.Linear(3, 2)).module):
        model_fn, params = cv.functional(module)
        assert cv.kfac(model_fn, params, (x, y)).trace() > 0


class Open(nn.Module):
    """Takes what it knows and lets everything else pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, features: Tensor, **others: Any) -> Tensor:
        return self.layer(features) * others.get("scale", 1.0)


def test_a_mapping_with_a_known_name_is_keywords_where_others_are_taken_too() -> None:
    module, x = Open(), torch.randn(5, 3)
    model_fn, params = cv.functional(module)
    torch.testing.assert_close(model_fn(params, {"features": x, "scale": 2.0}), 2 * module(x))
    torch.testing.assert_close(model_fn(params, x), module(x))
