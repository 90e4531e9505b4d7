"""Families of models from the transformers library, random weights and toy sizes, every parameter in one curvature.

EKFAC's trace is that of the exact Fisher, so brute-force gradients decide whether anything was missed or counted twice.
"""

from __future__ import annotations

import importlib.util
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
GPT2 = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
Model = tuple[Callable[[Any, Any], Tensor], dict[str, Tensor]]


def pure(module: torch.nn.Module) -> Model:
    """A module of the library as a function of its parameters and a dictionary of inputs, in float64."""
    module = module.eval().double()
    params = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda p, inputs: torch.func.functional_call(module, p, (), inputs).logits, params


def words(*, padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(WORDS, (EXAMPLES, LENGTH), generator=generator)}
    if padded:
        inputs["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[6], [4], [5]])).long()
    return inputs


def pictures(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(EXAMPLES, 3, size, size, generator=generator, dtype=torch.float64)}


def gpt2(**options: Any) -> Model:
    return pure(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=WORDS, **GPT2, **options)))


def llama() -> Model:
    config = transformers.LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, max_position_embeddings=16, **SMALL)
    return pure(transformers.LlamaForCausalLM(config))


def bert() -> Model:
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=16, num_labels=3, **SMALL)
    return pure(transformers.BertForSequenceClassification(config))


def vit() -> Model:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    return pure(transformers.ViTForImageClassification(config))


def resnet(layer_type: str) -> Model:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 16], depths=[1, 2], layer_type=layer_type, num_labels=3
    )
    return pure(transformers.ResNetForImageClassification(config))


FAMILIES: dict[str, tuple[Callable[[], Model], Callable[[], dict[str, Tensor]]]] = {
    "GPT-2, tied": (gpt2, words),
    "GPT-2, untied": (lambda: gpt2(tie_word_embeddings=False), words),
    "GPT-2, padded": (gpt2, lambda: words(padded=True)),
    "Llama": (llama, words),
    "BERT, padded": (bert, lambda: words(padded=True)),
    "ViT": (vit, lambda: pictures(8)),
    "ResNet, basic": (lambda: resnet("basic"), lambda: pictures(16)),
    "ResNet, bottleneck": (lambda: resnet("bottleneck"), lambda: pictures(16)),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def load(family: str) -> tuple[Callable[[Any, Any], Tensor], dict[str, Tensor], tuple[Any, Tensor]]:
    torch.manual_seed(0)
    build, data = FAMILIES[family]
    model_fn, params = build()
    inputs = data()
    outputs = model_fn(params, inputs)
    targets = torch.randint(outputs.shape[-1], outputs.shape[:-1])
    if "attention_mask" in inputs and targets.ndim == 2:
        targets = targets.masked_fill(inputs["attention_mask"] == 0, -100)
    return model_fn, params, (inputs, targets)


def gradients(model_fn: Any, params: dict[str, Tensor], batch: Any) -> list[dict[str, Tensor]]:
    """The gradient of each example's summed loss."""
    inputs, targets = batch

    def loss(p: dict[str, Tensor], n: int) -> Tensor:
        one = {name: value[n : n + 1] for name, value in inputs.items()}
        return F.cross_entropy(model_fn(p, one).flatten(0, -2), targets[n : n + 1].flatten(), reduction="sum")

    return [torch.func.grad(loss)(params, n) for n in range(EXAMPLES)]


@every_family
def test_every_parameter_is_counted_once(family: str) -> None:
    model_fn, params, batch = load(family)
    curv = cv.ekfac(model_fn, params, batch, fisher="empirical")
    found = gradients(model_fn, params, batch)
    count = (batch[1] != -100).sum()
    assert set(curv.parameters) == set(params)
    together: dict[frozenset[str], float] = {}
    for name, blocks in curv.parameters.items():
        assert blocks
        owner = frozenset(blocks)
        together[owner] = together.get(owner, 0.0) + float(sum(g[name].square().sum() for g in found) / count)
    for blocks, trace in together.items():
        measured = float(sum(curv.blocks[block].trace() for block in blocks))
        assert abs(measured - trace) <= 1e-10 * max(trace, 1e-10), sorted(blocks)


@every_family
def test_engines_agree(family: str) -> None:
    model_fn, params, batch = load(family)
    one, other = (cv.kfac(model_fn, params, batch, fisher="empirical", engine=e) for e in ("functional", "autograd"))
    for name, block in one.blocks.items():
        torch.testing.assert_close(block.trace(), other.blocks[name].trace(), rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(block.frobenius_norm(), other.blocks[name].frobenius_norm(), rtol=1e-11, atol=1e-15)


@every_family
def test_the_natural_gradient_descends(family: str) -> None:
    model_fn, params, batch = load(family)
    inputs, targets = batch

    def objective(p: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model_fn(p, inputs).flatten(0, -2), targets.flatten())

    curv = cv.kfac(model_fn, params, batch, fisher="type-2", tied="sum", sharing="reduce")
    gradient = torch.func.grad(objective)(params)
    step = curv.inverse(1e-2) @ gradient
    assert cv.pytree.inner(step, gradient) > 0
    moved = cv.pytree.subtract(params, cv.pytree.scale(1e-3, step))
    assert objective(moved) < objective(params)


def test_padded_tokens_count_nowhere() -> None:
    model_fn, params, (inputs, targets) = load("GPT-2, padded")
    changed = torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"])
    batches = [({**inputs, "input_ids": ids}, targets) for ids in (inputs["input_ids"], changed)]
    for estimate in (cv.kfac, cv.ekfac, cv.tkfac):
        one, other = (estimate(model_fn, params, batch, fisher="empirical") for batch in batches)
        for name, block in one.blocks.items():
            torch.testing.assert_close(block.trace(), other.blocks[name].trace(), rtol=1e-10, atol=1e-14)


@every_family
def test_influence_is_that_of_every_parameter(family: str) -> None:
    model_fn, params, batch = load(family)
    inverse = cv.ekfac(model_fn, params, batch, fisher="empirical").inverse(cv.RelativeTikhonov(0.1))
    rows = torch.stack([cv.ravel(gradient) for gradient in gradients(model_fn, params, batch)])
    solved = torch.stack([cv.ravel(inverse @ cv.unravel(row, params)) for row in rows])
    found = cv.influence.scores(inverse, model_fn, params, batch, batch)
    torch.testing.assert_close(found, solved @ rows.mT, rtol=1e-6, atol=1e-7 * float(found.abs().max()))
