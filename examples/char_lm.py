"""A character-level GPT learns Shakespeare with the optimizer of your choice.

Optimizers are pairs of pure functions on the pytree of parameters: matrices go to a Kronecker preconditioner, vectors
to Adam, and a warmup-cosine schedule gives the learning rate. It draws the loss curves and writes lines of its own.

    python examples/char_lm.py --optimizer soap adamw --steps 500 --output char_lm.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from language_model import GPT, Text, shakespeare, windows
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import curvlib as cv

Params = dict[str, Tensor]

LEARNING_RATES = {"adamw": 3e-3, "soap": 3e-3, "kl_shampoo": 3e-3, "dykaf": 3e-3, "shampoo": 3e-3, "muon": 1e-2}
LAYERS, WIDTH, HEADS, LENGTH, BATCH = 4, 128, 4, 64, 12


class Curve(NamedTuple):
    """Losses of one run."""

    name: str
    train: list[float]
    validation: list[tuple[int, float]]


def optimizer(name: str, steps: int) -> cv.optim.GradientTransformation:
    """The transformation by this name, with weight decay and a schedule."""
    schedule = cv.optim.warmup_cosine(LEARNING_RATES[name], warmup=max(1, steps // 20), total=steps)
    if name == "muon":  # is for hidden matrices
        parts = {"matrix": cv.optim.muon(schedule), "rest": cv.optim.adamw(schedule, betas=(0.9, 0.95))}
        return cv.optim.partition(parts, cv.optim.matrices_or_rest)
    if name == "adamw":
        return cv.optim.adamw(schedule, betas=(0.9, 0.95), weight_decay=0.1)
    make = {
        "soap": cv.optim.soap,
        "kl_shampoo": cv.optim.kl_shampoo,
        "dykaf": cv.optim.dykaf,
        "shampoo": cv.optim.shampoo,
    }[name]
    return make(schedule, weight_decay=0.1)


def validation_loss(model: GPT, text: Text) -> float:
    """The mean loss on a fixed sample of the validation text."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        inputs, targets = windows(text.validation, 128, LENGTH, source)
        return float(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()))


def learn(name: str, text: Text, steps: int, seed: int = 0) -> tuple[GPT, Curve]:
    """Trains a GPT, and returns it with its losses."""
    torch.manual_seed(seed)
    model = GPT(LAYERS, WIDTH, HEADS, len(text.characters), LENGTH)
    params: Params = dict(model.named_parameters())
    transformation = optimizer(name, steps)
    state = transformation.init(params)
    source = torch.Generator().manual_seed(seed)
    curve = Curve(name, [], [])
    with tqdm(range(1, steps + 1), desc=name, disable=None) as progress:
        for step in progress:
            inputs, targets = windows(text.train, BATCH, LENGTH, source)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
            with torch.no_grad():
                updates, state = transformation.update(gradients, state, params)
                for parameter, moved in zip(
                    params.values(), cv.optim.apply_updates(params, updates).values(), strict=True
                ):
                    parameter.copy_(moved)
            curve.train.append(float(loss.detach()))
            if step % max(1, steps // 20) == 0:
                curve.validation.append((step, validation_loss(model, text)))
                progress.set_postfix(validation=f"{curve.validation[-1][1]:.3f}")
    return model, curve


def write(model: GPT, text: Text, length: int, prompt: str = "\nKING") -> str:
    """Text of the model's own."""
    source = torch.Generator().manual_seed(0)
    tokens = text.encode(prompt)
    with torch.no_grad():
        for _ in range(length):
            logits = model(tokens[None, -LENGTH:])[0, -1]
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(0), 1, generator=source)])
    return text.decode(tokens)


def draw(curves: list[Curve], path: Path) -> None:
    """Training losses, smoothed, and validation losses."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="cross-entropy of a character, nats")
    for number, curve in enumerate(curves):
        color = mpl.color_sequences["tab10"][number]
        width = min(20, len(curve.train))
        smooth = torch.tensor(curve.train).unfold(0, width, 1).mean(1)
        axes.plot(range(width, len(curve.train) + 1), smooth, color=color, alpha=0.35)
        axes.plot(*zip(*curve.validation, strict=True), "o-", ms=3, color=color, label=curve.name)
    axes.set_title("A character-level GPT learns Shakespeare (dots: validation)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains once with each optimizer asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", nargs="+", choices=list(LEARNING_RATES), default=["soap", "adamw"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("char_lm.png"))
    arguments = parser.parse_args()
    text = shakespeare()
    curves = []
    for name in arguments.optimizer:
        model, curve = learn(name, text, arguments.steps, arguments.seed)
        curves.append(curve)
        print(f"{name}: validation loss {curve.validation[-1][1]:.4f} after {arguments.steps} steps")
        print(write(model, text, 200))
    draw(curves, arguments.output)
    print(f"curves in {arguments.output}")


if __name__ == "__main__":
    main()
