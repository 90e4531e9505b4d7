"""Which passages taught a small GPT a line that it wrote.

A character-level GPT learns some thousand passages of Shakespeare and writes a line. The influence of a passage on
the line is g_q^T (C + d)^-1 g_t: g_t is the gradient of the passage's loss, summed over its characters, and g_q that of
the line's own characters, without the prompt's; C is EKFAC on all passages. Where it is positive, learning the passage
has made the line more likely. Shown is the score over the number of characters learned: to first order, what the line's
loss rises by, in nats, if the passage is left out.

An index of sketched gradients on disk proposes passages, and exact scores rank them. Scores are then split over the
characters of a passage: each character's share is what enters the layers at its position, on its way to predicting what
follows. The curvature takes most of the time, then the index.

As a control, passages are asked for what taught the network themselves: it should be themselves.

    python examples/influence_lm.py --output influence_lm.png
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from language_model import GPT, Text, shakespeare
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from tqdm import tqdm

import curvlib as cv

Batch = tuple[Tensor, Tensor]
RGBA = tuple[float, float, float, float]

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 2, 96, 4, 64, 32
LEARNING_RATE, RANK, DAMPING = 3e-3, 24, cv.RelativeTikhonov(0.1)
SHOWN, CONTROLS, IGNORED = 6, 20, -100

EXACT, INK, WRITTEN = "#111827", "#374151", "#1768ac"
HELPFUL, HARMFUL = "#2a9d5c", "#c8384a"


class Found(NamedTuple):
    """Passages that help or harm a line: the score of each, and the share of each of its characters."""

    numbers: Tensor  # [k]
    scores: Tensor  # [k]
    shares: Tensor  # [k, T]


# --- passages and the network -----------------------------------------------------------------------------------------


def passages(text: Text, count: int) -> Batch:
    """Passages [N, T] from all over the text, and the character after each of theirs.

    Each starts with a line, and none overlaps another. There may be fewer than asked for.
    """
    newline = text.characters.index("\n")
    starts, end = [], 0
    for start in ((text.train[:-1] == newline) & (text.train[1:] != newline)).nonzero()[:, 0].add(1).tolist():
        if start > end:
            starts.append(start)
            end = start + LENGTH
    apart = torch.tensor(starts[:-1])
    chosen = apart[torch.randperm(len(apart), generator=torch.Generator().manual_seed(0))[:count]].sort().values
    windows = text.train[chosen[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def learn(known: Batch, characters: int, steps: int) -> GPT:
    """A GPT after some hundred steps of AdamW on the passages."""
    torch.manual_seed(0)
    model = GPT(LAYERS, WIDTH, HEADS, characters, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    with tqdm(range(steps), desc="training", unit="step", disable=None, leave=False) as progress:
        for _ in progress:
            index = torch.randint(len(known[0]), (BATCH,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(known[0][index]).flatten(0, 1), known[1][index].flatten())
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def mean_loss(model: GPT, known: Batch) -> float:
    """The loss of a character, over some passages."""
    with torch.no_grad():
        return float(F.cross_entropy(model(known[0][:256]).flatten(0, 1), known[1][:256].flatten()))


def write(model: GPT, text: Text, prompt: str) -> Batch:
    """What the network writes after a prompt, as one query [1, T]: the prompt's own characters do not count."""
    source = torch.Generator().manual_seed(0)
    tokens, given = text.encode(prompt), len(prompt)
    with torch.no_grad():
        while len(tokens) <= LENGTH:
            logits = model(tokens[None])[0, -1] / 0.5
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(0), 1, generator=source)])
    targets = tokens[1:].clone()
    targets[: given - 1] = IGNORED
    return tokens[None, :-1], targets[None]


# --- influence --------------------------------------------------------------------------------------------------------


def batches(known: Batch) -> list[Batch]:
    """Passages in batches."""
    return list(zip(*(part.split(BATCH) for part in known), strict=True))


def log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    """Minus the loss, [N]: what helps it most harms the line least, and the other way around."""
    return -F.cross_entropy(outputs.mT, targets, reduction="none", ignore_index=IGNORED).sum(1)


def attribute(model: GPT, known: Batch, query: Batch, folder: Path) -> tuple[Found, Found]:
    """The most helpful and the most harmful passages; prints the index and the control."""
    model_fn, params = cv.functional(model)
    train = cv.over(batches(known), progress=True)
    curv = cv.ekfac(model_fn, params, train)
    inverse = curv.inverse(DAMPING)
    projection = curv.power(-0.5, DAMPING).project(cv.EigenSketch(rank=RANK))
    index = cv.influence.build(folder, projection, model_fn, params, known, overwrite=True, progress=True)
    print(index)

    controls = torch.linspace(0, len(known[0]) - 1, min(CONTROLS, len(known[0]))).long()
    best = index.top(model_fn, params, (known[0][controls], known[1][controls]), k=1)[1][:, 0]
    print(f"\ncontrol: {int((best == controls).sum())} of {len(controls)} passages are most helpful to themselves")

    def fetch(numbers: Tensor) -> Batch:
        return known[0][numbers], known[1][numbers]

    found = []
    for sign, measured in ((1, cv.CrossEntropy()), (-1, cv.CustomLoss(log_likelihood))):
        scores, numbers = cv.influence.rerank(
            index, inverse, model_fn, params, query, k=SHOWN, fetch=fetch, recall=0.02, measurement=measured
        )
        shares = cv.influence.scores(inverse, model_fn, params, query, fetch(numbers[0]), per_token=True)
        assert isinstance(shares, Tensor)
        found.append(Found(numbers[0], sign * scores[0] / known[1].numel(), shares[0] / known[1].numel()))
    return found[0], found[1]


# --- what is shown ----------------------------------------------------------------------------------------------------


def visible(text: Text, tokens: Tensor) -> str:
    """A passage on one line."""
    return text.decode(tokens).replace("\n", "¶")


def show(text: Text, known: Batch, query: Batch, found: tuple[Found, Found], prompt: str) -> None:
    """Prints the line and the passages, and marks in each the tenth of the characters that matters most."""
    print(f"\nafter {visible(text, text.encode(prompt))!r} it wrote\n\n{'':>10}{visible(text, query[0][0])}\n")
    for name, part in zip(("most helpful", "most harmful"), found, strict=True):
        print(name)
        for number, score, shares in zip(part.numbers, part.scores, part.shares, strict=True):
            top = shares.abs().topk(math.ceil(LENGTH / 10))[1].tolist()
            print(f"{float(score):>+9.2f} {visible(text, known[0][number])}")
            print(f"{'':>10}{''.join('^' if place in top else ' ' for place in range(LENGTH))}".rstrip())


def draw_passage(axes: Axes, y: float, label: str, line: str, colors: Sequence[RGBA | None]) -> None:
    """Characters side by side, each on its colour."""
    axes.text(-1, y, label, ha="right", va="center", color=INK)
    for x, (character, color) in enumerate(zip(line, colors, strict=True)):
        if color is not None:
            axes.add_patch(Rectangle((x, y - 0.45), 1, 0.9, color=color, lw=0))
        axes.text(x + 0.5, y, character, ha="center", va="center", family="monospace", color=EXACT)


def draw(figure: Figure, text: Text, known: Batch, query: Batch, found: tuple[Found, Found]) -> None:
    """The line that was written, and passages with the share of each character."""
    axes = figure.add_subplot()
    axes.set(xlim=(-9, LENGTH), ylim=(2 * SHOWN + 4.4, -0.9))
    axes.axis("off")
    heading = {"fontsize": 12, "fontweight": "bold", "va": "center"}
    axes.text(0, 0, "What the network wrote (blue), after its prompt", color=WRITTEN, **heading)
    written: list[RGBA | None] = [None] * LENGTH
    for x, target in enumerate(query[1][0, :-1].tolist(), 1):
        written[x] = None if target == IGNORED else to_rgba(WRITTEN, 0.2)
    draw_passage(axes, 1, "", visible(text, query[0][0]), written)
    y = 2.3
    top = max(float(part.shares.abs().max()) for part in found)
    for title, color, part in zip(("Taught it most", "Taught the opposite"), (HELPFUL, HARMFUL), found, strict=True):
        axes.text(0, y, title, color=color, **heading)
        for number, score, shares in zip(part.numbers, part.scores, part.shares, strict=True):
            y += 1
            # the square root shows small shares, too
            strengths = [(HELPFUL if share > 0 else HARMFUL, (abs(share) / top) ** 0.5) for share in shares.tolist()]
            colors = [to_rgba(hue, 0.9 * strength) for hue, strength in strengths]
            draw_passage(axes, y, f"{float(score):+.2f}", visible(text, known[0][number]), colors)
        y += 1.3


def main() -> None:
    """Trains, writes, asks, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("influence_lm.png"), help="where the figure goes")
    parser.add_argument("--index", type=Path, help="a folder to keep the index in (default: it is not kept)")
    parser.add_argument("--passages", type=int, default=4000, help="that are learned (default: 4000)")
    parser.add_argument("--steps", type=int, default=1200, help="of the optimizer (default: 1200)")
    parser.add_argument("--prompt", default="\nMy lord, ", help="what the line begins with (default: My lord)")
    arguments = parser.parse_args()

    text = shakespeare()
    known = passages(text, arguments.passages)
    model = learn(known, len(text.characters), arguments.steps)
    query = write(model, text, arguments.prompt)
    print(f"{len(known[0])} passages of {LENGTH} characters, {mean_loss(model, known):.2f} nats a character\n")
    with ExitStack() as stack:
        folder = arguments.index or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = attribute(model, known, query, folder)
    show(text, known, query, found, arguments.prompt)

    figure = Figure(figsize=(12, 6), layout="constrained")
    draw(figure, text, known, query, found)
    figure.savefig(arguments.output, dpi=130)
    print(f"\nfigure: {arguments.output}")


if __name__ == "__main__":
    main()
