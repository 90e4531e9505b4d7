"""Small models with queries and training data, and their influence scores by brute force, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

import curvlib as cv

Batch = tuple[Any, Tensor]
QUERIES, EXAMPLES = 4, 7


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A model in float64, queries and training data; the loss is cross-entropy."""

    model_fn: Callable[[Any, Any], Tensor]
    params: Any
    queries: Batch
    train: Batch

    def curvature(self, estimate: Callable[..., Any] = cv.kfac, **options: Any) -> Any:
        return estimate(self.model_fn, self.params, self.train, fisher="empirical", **options)

    def scores(self, inverse: Any, **options: Any) -> Any:
        return cv.influence.scores(inverse, self.model_fn, self.params, self.queries, self.train, **options)

    def gradients(self, batch: Batch, term: Callable[..., Tensor] | None = None) -> Tensor:
        """The gradient of every example's term, one example at a time: [N, D] in the order of ravel."""
        term = cross_entropy if term is None else term

        def one(n: int) -> Tensor:
            inputs, targets = examples(batch, n, n + 1)
            return cv.ravel(torch.func.grad(lambda p: term(self.model_fn(p, inputs), targets))(self.params))

        return torch.stack([one(n) for n in range(len(batch[1]))])

    def brute_force(self, matrix: Tensor, term: Callable[..., Tensor] | None = None) -> Tensor:
        """[Q, N] with a curvature matrix [D, D]; ``term`` is what is measured on queries."""
        solved = torch.linalg.solve(matrix, self.gradients(self.train).mT)
        return self.gradients(self.queries, term) @ solved


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="sum")


def examples(batch: Any, start: int, stop: int) -> Any:
    return torch_pytree.tree_map(lambda x: x[start:stop], batch)


def in_batches(batch: Batch, *sizes: int) -> list[Batch]:
    """The batch in pieces of these sizes."""
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [examples(batch, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) <= tolerance


def of_module(module: nn.Module, draw: Callable[[int, int], Any]) -> Case:
    """A module with random parameters; ``draw(n, seed)`` makes n inputs."""
    model_fn, params = cv.functional(module.double())
    params = {name: 0.6 * normal(i, *leaf.shape) for i, (name, leaf) in enumerate(params.items())}
    batches = []
    for n, seed in ((QUERIES, 50), (EXAMPLES, 51)):
        inputs = draw(n, seed)
        outputs = model_fn(params, inputs)
        batches.append((inputs, torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=generator(seed))))
    return Case(model_fn, params, *batches)


def rows(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda n, seed: normal(seed, n, *shape)


def tokens(vocabulary: int, *shape: int) -> Callable[[int, int], Tensor]:
    return lambda n, seed: torch.randint(vocabulary, (n, *shape), generator=generator(seed))


class Tied(nn.Module):
    """A table that is embedding and output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.table(x)), self.table.weight)


class Repeated(nn.Module):
    """One linear layer used twice, as if the two uses were positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: of_module(nn.Linear(4, 3), rows(4)),
    "without bias": lambda: of_module(nn.Linear(4, 3, bias=False), rows(4)),
    "two layers": lambda: of_module(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), rows(4)),
    "positions": lambda: of_module(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), rows(3, 4)),
    "convolution": lambda: of_module(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)), rows(2, 4, 4)
    ),
    "grouped convolution": lambda: of_module(
        nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), rows(4, 3, 3)
    ),
    "pointwise groups": lambda: of_module(
        nn.Sequential(nn.Conv1d(16, 16, 1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)), rows(16, 1)
    ),
    "embedding": lambda: of_module(
        nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)), tokens(6, 3)
    ),
    "norm": lambda: of_module(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), rows(4)),
    "tied": lambda: of_module(Tied(), tokens(6, 3)),
    "repeated": lambda: of_module(Repeated(), rows(3)),
    "wide": lambda: of_module(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9)), rows(12)),
    "wide on two positions": lambda: of_module(nn.Linear(24, 20), rows(2, 24)),
}  # fmt: skip
