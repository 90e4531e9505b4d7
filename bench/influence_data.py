"""Images and small networks for the benchmark of influence scores, and training on many subsets at once.

Fashion-MNIST is in the Debian package `dataset-fashion-mnist` (`apt-get install`, or `apt-get download` and `dpkg -x`);
its images are averaged over 2 x 2 pixels. Without it, scikit-learn's digits are used.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

Batch = tuple[Tensor, Tensor]
FOLDER = Path("usr") / "share" / "datasets" / "fashion-mnist"


@dataclass(frozen=True)
class Data:
    """Images [N, d] and labels [N] to train on and to ask about; training pixels have mean 0 and variance 1."""

    name: str
    train: Batch
    queries: Batch

    def module(self, hidden: int = 32) -> nn.Module:
        """An untrained network of one hidden layer."""
        return nn.Sequential(nn.Linear(self.train[0].shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 10))


def load(root: Path | None, examples: int, queries: int) -> Data:
    """Fashion-MNIST below a root directory, or else the digits; random examples, the same each time."""
    if root is not None and (root / FOLDER).exists():
        name, train, asked = "Fashion-MNIST 14 x 14", fashion(root, "train"), fashion(root, "t10k")
    else:
        name, train = "digits 8 x 8", digits()
        asked = train[0][examples:], train[1][examples:]
    train, asked = chosen(train, examples), chosen(asked, queries)
    mean, deviation = train[0].mean(), train[0].std()
    return Data(name, ((train[0] - mean) / deviation, train[1]), ((asked[0] - mean) / deviation, asked[1]))


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


@dataclass(frozen=True)
class Training:
    """Stochastic gradient descent with momentum 0.9, decoupled weight decay and a learning rate that falls to zero."""

    epochs: int = 40
    batch_size: int = 100
    learning_rate: float = 0.05
    weight_decay: float = 5e-3

    def fit(self, data: Data, subsets: Tensor, seed: int) -> dict[str, Tensor]:
        """Networks trained on subsets [S, N], all at once: parameters with a leading axis of size S.

        Networks have initial weights of their own, and one order of the examples; an example that is not in a network's
        subset has weight zero in its batches.
        """
        torch.manual_seed(seed)
        shape = data.module()
        params, _ = stack_module_state([data.module() for _ in subsets])
        params = {name: leaf.detach() for name, leaf in params.items()}
        momentum = {name: torch.zeros_like(leaf) for name, leaf in params.items()}

        def objective(params: Any, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            terms = F.cross_entropy(functional_call(shape, params, inputs), targets, reduction="none")
            return (weights * terms).sum() / weights.sum().clamp(min=1)

        gradient = vmap(grad_and_value(objective), (0, None, None, 0))
        examples, weights = len(data.train[0]), subsets.float()
        steps, step = self.epochs * math.ceil(examples / self.batch_size), 0
        for _ in range(self.epochs):
            for index in torch.randperm(examples).split(self.batch_size):
                rate = self.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
                grads, _ = gradient(params, data.train[0][index], data.train[1][index], weights[:, index])
                momentum = {name: 0.9 * momentum[name] + leaf for name, leaf in grads.items()}
                params = {
                    name: (1 - rate * self.weight_decay) * leaf - rate * momentum[name] for name, leaf in params.items()
                }
                step += 1
        return params


def query_losses(data: Data, params: dict[str, Tensor]) -> Tensor:
    """The losses [S, Q] of stacked networks on the queries."""
    module = data.module()

    def losses(params: Any) -> Tensor:
        return F.cross_entropy(functional_call(module, params, data.queries[0]), data.queries[1], reduction="none")

    return vmap(losses)(params)


def accuracy(data: Data, params: dict[str, Tensor]) -> float:
    """The share of queries that stacked networks answer correctly."""
    module = data.module()
    found = vmap(lambda leaves: functional_call(module, leaves, data.queries[0]))(params)
    return float((found.argmax(-1) == data.queries[1]).float().mean())
