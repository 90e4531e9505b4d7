"""Images, text and small networks for the benchmark of influence scores, and training on many subsets at once.

Fashion-MNIST is in the Debian package `dataset-fashion-mnist` (`apt-get install`, or `apt-get download` and `dpkg -x`);
its images are averaged over 2 x 2 pixels. Without it, scikit-learn's digits are used. The text is Shakespeare's.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import GPT, Batch, mlp, shakespeare
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import curvlib as cv

FOLDER = Path("usr") / "share" / "datasets" / "fashion-mnist"


@dataclass(frozen=True)
class Data:
    """Inputs [N, ...] and targets [N] or [N, T] to train on and to ask about, and what makes an untrained network."""

    name: str
    train: Batch
    queries: Batch
    module: Callable[[], nn.Module]


def load(root: Path | None, examples: int, queries: int) -> Data:
    """Fashion-MNIST below a root directory, or else the digits; random examples, the same each time.

    Training pixels have mean 0 and variance 1; the network has one hidden layer.
    """
    if root is not None and (root / FOLDER).exists():
        name, train, asked = "Fashion-MNIST 14 x 14", fashion(root, "train"), fashion(root, "t10k")
    else:
        name, train = "digits 8 x 8", digits()
        asked = train[0][examples:], train[1][examples:]
    train, asked = chosen(train, examples), chosen(asked, queries)
    mean, deviation = train[0].mean(), train[0].std()
    train, asked = (((images - mean) / deviation, labels) for images, labels in (train, asked))
    return Data(name, train, asked, lambda: mlp((train[0].shape[1], 32, 10)))


def passages(examples: int, queries: int, length: int = 32, width: int = 64) -> Data:
    """Passages of Shakespeare [N, T], and what follows each character; queries are from what plays end with."""
    text = shakespeare()
    source = torch.Generator().manual_seed(0)
    train, asked = (
        apart(part, number, length, source) for part, number in ((text.train, examples), (text.validation, queries))
    )
    return Data("Shakespeare", train, asked, lambda: GPT(2, width, 4, len(text.characters), length))


def apart(tokens: Tensor, number: int, length: int, source: torch.Generator) -> Batch:
    """Random passages that do not overlap."""
    starts = length * torch.randperm((len(tokens) - 1) // length, generator=source)[:number].sort().values
    window = tokens[starts.unsqueeze(1) + torch.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


def chosen(batch: Batch, number: int) -> Batch:
    """Random examples."""
    if len(batch[0]) < number:
        raise ValueError(f"{number} examples are asked for, and there are {len(batch[0])}")
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(0))[:number]
    return batch[0][order], batch[1][order]


def digits() -> Batch:
    """All 1797 images, shuffled."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    return images[order].float(), labels[order].long()


def fashion(root: Path, split: str) -> Batch:
    """All images of a split, 2 x 2 pixels averaged."""

    def read(name: str, header: int) -> Tensor:
        content = gzip.decompress((root / FOLDER / f"{split}-{name}.gz").read_bytes())
        return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)

    pixels = read("images-idx3-ubyte", 16).reshape(-1, 14, 2, 14, 2)
    images = torch.cat([part.float().mean((2, 4)).flatten(1) for part in pixels.split(5000)])
    return images, read("labels-idx1-ubyte", 8).long()


def example_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each example [N], a mean over its positions."""
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.reshape(len(targets), -1).mean(1)


@dataclass(frozen=True)
class Training:
    """Stochastic gradient descent with momentum 0.9, or Adam, with decoupled weight decay; the rate falls to 0."""

    epochs: int = 40
    batch_size: int = 100
    learning_rate: float = 0.05
    weight_decay: float = 5e-3
    adam: bool = False

    def transformation(self, steps: int) -> cv.optim.GradientTransformation:
        """The optimizer, for so many steps."""
        direction = cv.optim.scale_by_adam(betas=(0.9, 0.95)) if self.adam else cv.optim.heavy_ball(0.9)
        rate = cv.optim.warmup_cosine(self.learning_rate, 0, steps)
        decay = cv.optim.add_decayed_weights(self.weight_decay)
        return cv.optim.chain(direction, decay, cv.optim.scale_by_learning_rate(rate))

    def fit(self, data: Data, subsets: Tensor, seed: int, at_once: int = 100) -> dict[str, Tensor]:
        """Networks trained on subsets [S, N], many at once: parameters with a leading axis of size S.

        Networks have initial weights of their own, and one order of the examples; an example that is not in a network's
        subset has weight zero in its batches.
        """
        torch.manual_seed(seed)
        modules = [data.module() for _ in subsets]
        order = torch.stack([torch.randperm(subsets.shape[1]) for _ in range(self.epochs)])
        parts = [
            self.together(modules[i : i + at_once], data.train, subsets[i : i + at_once].float(), order)
            for i in range(0, len(subsets), at_once)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def together(self, modules: list[nn.Module], train: Batch, weights: Tensor, order: Tensor) -> dict[str, Tensor]:
        """Trained parameters of some networks [S, ...], from weights of examples [S, N] and an order for each epoch."""
        shape = modules[0]
        params = {name: leaf.detach() for name, leaf in stack_module_state(modules)[0].items()}

        def objective(params: Any, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            terms = example_losses(functional_call(shape, params, inputs), targets)
            return (weights * terms).sum() / weights.sum().clamp(min=1)

        gradient = vmap(grad_and_value(objective), (0, None, None, 0))
        optimizer = self.transformation(self.epochs * math.ceil(weights.shape[1] / self.batch_size))
        state = optimizer.init(params)
        for examples in order:
            for index in examples.split(self.batch_size):
                grads, _ = gradient(params, train[0][index], train[1][index], weights[:, index])
                updates, state = optimizer.update(grads, state, params)
                params = cv.apply_updates(params, updates)
        return params


def query_losses(data: Data, params: dict[str, Tensor]) -> Tensor:
    """The losses [S, Q] of stacked networks on the queries."""
    module = data.module()
    return vmap(lambda leaves: example_losses(functional_call(module, leaves, data.queries[0]), data.queries[1]))(
        params
    )


def accuracy(data: Data, params: dict[str, Tensor]) -> float:
    """The share of targets of queries that stacked networks predict."""
    module = data.module()
    found = vmap(lambda leaves: functional_call(module, leaves, data.queries[0]))(params)
    return float((found.argmax(-1) == data.queries[1]).float().mean())
