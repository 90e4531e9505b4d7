"""Models and batches of the transformers library, as they are: keywords in, several outputs, `BatchEncoding`."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import curvlib as cv

transformers: Any = importlib.import_module("transformers") if importlib.util.find_spec("transformers") else None
pytestmark = pytest.mark.models

WORDS, EXAMPLES, LENGTH = 50, 3, 6
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model: torch.nn.Module = transformers.GPT2LMHeadModel(config).double().eval()
    return model


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=16, num_labels=3, **SMALL)
    model: torch.nn.Module = transformers.BertForSequenceClassification(config).double().eval()
    return model


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"GPT-2": gpt2, "BERT": bert}
every_model = pytest.mark.parametrize("name", MODELS)


def batch_of(name: str) -> tuple[Any, Tensor]:
    """What a tokenizer returns, with labels in it, and the targets for the logits."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (EXAMPLES, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([[6], [4], [5]])).long()
    labels = ids.masked_fill(mask == 0, -100) if name == "GPT-2" else torch.tensor([0, 2, 1])
    encoding = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels})
    targets = F.pad(labels[:, 1:], (0, 1), value=-100) if name == "GPT-2" else labels
    return encoding, targets


def part(batch: tuple[Any, Tensor], start: int, stop: int) -> tuple[Any, Tensor]:
    inputs, targets = batch
    return transformers.BatchEncoding({k: x[start:stop] for k, x in inputs.items()}), targets[start:stop]


@every_model
def test_the_loss_of_the_model_is_that_of_its_logits(name: str) -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = MODELS[name](), batch_of(name)
    model_fn, params = cv.functional(model, output="logits")
    value = cv.CrossEntropy().value(model_fn(params, inputs), targets)
    torch.testing.assert_close(value.float(), model(**inputs).loss.float())  # the library computes some in float32


@every_model
def test_trace_and_influence_are_those_of_gradients_of_one_example_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name](), batch_of(name)
    model_fn, params = cv.functional(model, output="logits")
    rows = []
    for n in range(EXAMPLES):
        model.zero_grad()
        inputs, targets = part(batch, n, n + 1)
        F.cross_entropy(model(**inputs).logits.flatten(0, -2), targets.flatten(), reduction="sum").backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        rows.append(cv.ravel({name: torch.zeros_like(params[name]) if g is None else g for name, g in found.items()}))
    gradients = torch.stack(rows)
    count = (batch[1] != -100).sum()
    ekfac = cv.ekfac(model_fn, params, batch, fisher="empirical")
    torch.testing.assert_close(ekfac.trace(), gradients.square().sum() / count)
    diagonal = cv.diagonal(model_fn, params, batch, fisher="empirical").diag()
    torch.testing.assert_close(cv.ravel(diagonal), gradients.square().sum(0) / count)
    over = cv.diagonal(model_fn, params, cv.over([part(batch, 0, 2), part(batch, 2, 3)]), fisher="empirical").diag()
    torch.testing.assert_close(cv.ravel(over), gradients.square().sum(0) / count)
    vector = cv.unravel(torch.randn(gradients.shape[1], dtype=torch.float64), params)
    product = cv.fisher(model_fn, params, batch, fisher="empirical") @ vector
    torch.testing.assert_close(cv.ravel(product), gradients.T @ (gradients @ cv.ravel(vector)) / count)
    scores = cv.influence.scores(lambda v: v, model_fn, params, batch, batch)
    torch.testing.assert_close(scores, gradients @ gradients.T)


@every_model
def test_without_an_output_the_error_says_how(name: str) -> None:
    model_fn, params = cv.functional(MODELS[name]())
    for estimator in (cv.kfac, cv.ggn):
        with pytest.raises(cv.errors.CurvlibError, match=r"output='logits'"):
            estimator(model_fn, params, batch_of(name))
    wrong, _ = cv.functional(MODELS[name](), output="scores")
    with pytest.raises(cv.errors.ArgumentError, match=r"no output 'scores'.*'logits'"):
        cv.kfac(wrong, params, batch_of(name))


@every_model
def test_an_encoding_stays_an_encoding_for_a_function_of_my_own(name: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name](), batch_of(name)
    model_fn, params = cv.functional(model, output="logits")

    def by_attribute(p: dict[str, Tensor], inputs: Any) -> Tensor:
        assert isinstance(inputs, transformers.BatchEncoding)
        arguments = (inputs.input_ids,), {"attention_mask": inputs.attention_mask}
        return torch.func.functional_call(model, p, *arguments).logits

    one, other = (cv.kfac(f, params, batch, fisher="empirical") for f in (model_fn, by_attribute))
    torch.testing.assert_close(one.trace(), other.trace())


@every_model
def test_a_model_of_the_library_pickles_and_copies(name: str) -> None:
    torch.manual_seed(0)
    model_fn, params = cv.functional(MODELS[name](), output="logits")
    inputs, _ = batch_of(name)
    for other in (pickle.loads(pickle.dumps(model_fn)), copy.deepcopy(model_fn)):
        assert torch.equal(other(params, inputs), model_fn(params, inputs))
