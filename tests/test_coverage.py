"""Uses that are easy to miss: loops, adapters, autocast, compiled parts, batches as dictionaries, routed experts.

The table of what is covered in the documentation lists what these tests, the zoo of layers and the families of models
run; the last test here keeps it complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from exactness_problems import Problem, normal, problem
from layer_zoo import ZOO, Params
from torch import Tensor, nn

import curvlib as cv

DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"


def recurrent(p: Params, x: Tensor) -> Tensor:
    """A loop over time steps that share all weights."""
    hidden = x.new_zeros(len(x), 4)
    for t in range(x.shape[1]):
        hidden = torch.tanh(x[:, t] @ p["0.w"] + hidden @ p["1.u"] + p["2.b"])
    return hidden @ p["3.o"]


BASE = normal(9, 3, 4)


def adapted(p: Params, x: Tensor) -> Tensor:
    """A frozen weight, closed over, with a low-rank adapter."""
    return torch.tanh(x @ BASE + (x @ p["0.a"]) @ p["1.b"]) @ normal(8, 4, 2)


def mixture(p: Params, x: Tensor) -> Tensor:
    """Experts that all see every example, weighted by a router."""
    gates = (x @ p["0.router"]).softmax(-1)
    return torch.einsum("ne,neo->no", gates, torch.einsum("nd,edo->neo", x, p["1.experts"]))


def routed(p: Params, x: Tensor) -> Tensor:
    """Experts that see only the examples routed to them."""
    router = x @ p["0.router"]
    chosen, gate, out = router.argmax(-1), router.softmax(-1).amax(-1), x.new_zeros(len(x), 2)
    for expert in range(2):
        mine = (chosen == expert).nonzero()[:, 0]
        out = out.index_add(0, mine, gate[mine].unsqueeze(1) * torch.tanh(x[mine] @ p["1.experts"][expert]))
    return out


def masked(p: Params, batch: dict[str, Tensor]) -> Tensor:
    """A batch as a dictionary, with a mask over positions."""
    hidden = torch.tanh(batch["x"] @ p["0.w"]) * batch["mask"].unsqueeze(-1)
    return hidden.sum(1) @ p["1.o"]


def stacked(p: Params, x: Tensor) -> Tensor:
    """Slices of one stacked weight, used one after the other."""
    for layer in range(2):
        x = torch.tanh(x @ p["0.w"][layer])
    return x @ p["1.o"]


MASK = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.float64)
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], Any]] = {
    "recurrent loop": (recurrent, {"0.w": (3, 4), "1.u": (4, 4), "2.b": (4,), "3.o": (4, 2)}, normal(1, 4, 3, 3)),
    "adapters on a frozen base": (adapted, {"0.a": (3, 2), "1.b": (2, 4)}, normal(1, 4, 3)),
    "mixture of experts, dense": (mixture, {"0.router": (3, 2), "1.experts": (2, 3, 2)}, normal(1, 4, 3)),
    "mixture of experts, routed": (routed, {"0.router": (3, 2), "1.experts": (2, 3, 2)}, normal(1, 4, 3)),
    "dictionary with a mask": (masked, {"0.w": (3, 4), "1.o": (4, 2)}, {"x": normal(1, 4, 3, 3), "mask": MASK}),
    "slices of a stacked weight": (stacked, {"0.w": (2, 3, 3), "1.o": (3, 2)}, normal(1, 4, 3)),
}
every_case = pytest.mark.parametrize("case", CASES)


def load(case: str) -> Problem:
    model_fn, shapes, inputs = CASES[case]
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return problem(model_fn, inputs, "cross-entropy", "mean", params=zeros)


@every_case
@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_the_trace_of_corrected_curvature_is_that_of_the_exact_ggn(case: str, engine: str) -> None:
    found = load(case)
    exact = found.ggn()
    loss = cv.CrossEntropy()
    curv = cv.ekfac(found.model_fn, found.params, found.batch, loss=loss, fisher="type-2", engine=engine)
    for name, blocks in curv.parameters.items():
        trace = reference.block(exact, found.params, name).trace()
        measured = torch.stack([curv.blocks[block].trace() for block in blocks]).sum()
        torch.testing.assert_close(measured, trace, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("engine", ["functional", "autograd"])
def test_autocast_gives_factors_in_float32_close_to_those_without(engine: str) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    model_fn, params = cv.functional(net)
    batch = (torch.randn(16, 3), torch.randint(2, (16,)))

    def cast(p: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model_fn(p, x)

    curv = cv.kfac(cast, params, batch, fisher="empirical", engine=engine)
    plain = cv.kfac(model_fn, params, batch, fisher="empirical")
    for name, block in curv.blocks.items():
        dense, expected = block.to_dense(), plain.blocks[name].to_dense()
        assert dense.dtype == torch.float32
        assert (dense - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_modules_are_seen_through(whole: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = torch.compile(net, backend="eager") if whole else nn.Sequential(
        torch.compile(net[0], backend="eager"), net[1], net[2]
    )  # fmt: skip
    assert isinstance(compiled, nn.Module)
    batch = (torch.randn(6, 3), torch.randint(2, (6,)))
    one, other = (cv.kfac(*cv.functional(m), batch, fisher="type-2") for m in (compiled, net))
    for a, b in zip(one.blocks.values(), other.blocks.values(), strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=1e-5, atol=1e-7)


def documented(heading: str) -> set[str]:
    """The first column of the table under a heading of the page on coverage."""
    _, _, section = DOCUMENT.read_text().partition(f"## {heading}\n")
    section = section.partition("\n## ")[0]
    return {row.split("|")[1].strip() for row in re.findall(r"^\|.*\|$", section, re.M)[2:]}


def test_the_documented_table_lists_what_is_tested() -> None:
    assert documented("Layers and ways to write them") == set(ZOO)
    assert documented("Uses that are easy to miss") == set(CASES) | {"autocast", "compiled modules"}
    source = (Path(__file__).parent / "models" / "test_transformers.py").read_text()
    families = re.findall(r'^    "(.+)": \(', source, re.M)
    assert documented("Families of models") == set(families)
