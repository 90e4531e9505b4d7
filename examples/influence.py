"""Which training images a prediction is due to, and which labels are wrong: influence functions of a small network.

First part. The influence of a training image t on a test image q is g_q^T (C + d)^-1 g_t: g are gradients of single
losses, C is EKFAC on the training set. Where it is positive, training on t has lowered the loss of q; shown is the
score over the number of training images: to first order, what the loss of q rises by if t is left out. An index keeps a
short sketch of every training gradient on disk; it proposes images, and exact scores rank them.

Second part. A tenth of the labels is changed and the network trained on them. Self-influence g_t^T (C + d)^-1 g_t is
large for examples that the others do not explain: checked in its order, wrong labels come first. The order
of the losses is drawn beside it, and is about as good here.

    python examples/influence.py --output influence.png
    python examples/influence.py --data /usr/share/datasets/fashion-mnist

The digits of scikit-learn are the default; a folder with the files of Fashion-MNIST (in Debian's package
dataset-fashion-mnist) or of MNIST may be given.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import curvlib as cv

Batch = tuple[Tensor, Tensor]
Ranking = tuple[Tensor, Tensor]  # scores [Q, k] and numbers of training images [Q, k]

WIDTH, RANK, DAMPING = 64, 32, cv.RelativeTikhonov(0.1)
QUERIES, SHOWN, CHECKED = 4, 6, 12
FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

INFLUENCE, LOSS, EXACT, INK, FAINT = "#1768ac", "#e07a1f", "#111827", "#374151", "#9ca3af"
HELPFUL, HARMFUL = "#2a9d5c", "#c8384a"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 10,
    "grid.color": "#eceef1",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


# --- images -----------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Flat images [N, pixels] between 0 and 1 with labels [N], and what classes are called."""

    training: Batch
    test: Batch
    names: tuple[str, ...]


def digits(examples: int | None) -> Images:
    """The 8 x 8 digits of scikit-learn in random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs, labels = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    chosen = slice(297, None if examples is None else 297 + examples)
    return Images((inputs[chosen], labels[chosen]), (inputs[:297], labels[:297]), tuple(map(str, range(10))))


def read(file: Path) -> Tensor:
    """The bytes of an idx file, in the shape that it states: zeros, type and number of axes, sizes, elements."""
    content = gzip.decompress(file.read_bytes())
    axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    return torch.frombuffer(bytearray(content[4 + 4 * axes :]), dtype=torch.uint8).view(shape)


def from_files(folder: Path, examples: int | None) -> Images:
    """The first images of Fashion-MNIST, or of another data set in its format."""
    inputs, labels, test_inputs, test_labels = (
        read(folder / f"{part}-{kind}-ubyte.gz")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )
    names = FASHION if "fashion" in str(folder) else tuple(map(str, range(10)))
    count = min(5000 if examples is None else examples, len(labels))
    training = inputs[:count].flatten(1) / 255, labels[:count].long()
    return Images(training, (test_inputs[:1000].flatten(1) / 255, test_labels[:1000].long()), names)


# --- the network ------------------------------------------------------------------------------------------------------


def learn(training: Batch, epochs: int) -> nn.Module:
    """A network with one hidden layer."""
    inputs, labels = training
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(inputs.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=None, leave=False):
        for index in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(module(inputs[index]), labels[index]).backward()
            optimizer.step()
    return module


def batches(data: Batch) -> list[Batch]:
    """A data set in batches."""
    return list(zip(*(part.split(256) for part in data), strict=True))


def accuracy(module: nn.Module, data: Batch) -> float:
    """The share of images that are classified correctly."""
    return float((module(data[0]).argmax(1) == data[1]).double().mean())


# --- first part: what a prediction is due to --------------------------------------------------------------------------


class Due(NamedTuple):
    """Test images, how sure the network is of their labels, and the training images that help and harm them most."""

    queries: Batch
    probabilities: Tensor
    predictions: Tensor
    helpful: Ranking
    harmful: Ranking


def borderline(module: nn.Module, test: Batch) -> tuple[Batch, Tensor, Tensor]:
    """Test images that were decided by little: half of them are classified correctly, half are not."""
    inputs, labels = test
    with torch.no_grad():
        probabilities = module(inputs).softmax(1)
    predictions, own = probabilities.argmax(1), probabilities.gather(1, labels[:, None])[:, 0]
    margins = (own - probabilities.scatter(1, labels[:, None], 0).amax(1)).abs()
    right = torch.where(predictions == labels, margins, 1 + margins).argsort()[: QUERIES // 2]
    errors = torch.where(predictions != labels, margins, 1 + margins).argsort()[: QUERIES - QUERIES // 2]
    chosen = torch.cat([right, errors])
    return (inputs[chosen], labels[chosen]), own[chosen], predictions[chosen]


def explain(images: Images, epochs: int, folder: Path) -> Due:
    """Trains, builds the index or finds it there, and asks it; prints what it did."""
    module = learn(images.training, epochs)
    model_fn, params = cv.functional(module)
    curv = cv.ekfac(model_fn, params, cv.over(batches(images.training), progress=True))
    inverse = curv.inverse(DAMPING)
    projection = curv.power(-0.5, DAMPING).project(cv.EigenSketch(rank=RANK))
    index = cv.influence.build(folder, projection, model_fn, params, images.training, overwrite=True, progress=True)

    queries, probabilities, predictions = borderline(module, images.test)
    rankings = [
        cv.influence.rerank(
            index, inverse, model_fn, params, queries, k=SHOWN, recall=0.05, measurement=measured,
            fetch=lambda n: (images.training[0][n], images.training[1][n]),
        )
        for measured in (cv.CrossEntropy(), cv.CustomLoss(log_likelihood))
    ]  # fmt: skip
    show_index(index, images, module, index.scores(model_fn, params, queries), inverse, queries, rankings)
    helpful, harmful = (
        (sign * scores / len(index), numbers) for sign, (scores, numbers) in zip((1, -1), rankings, strict=True)
    )
    return Due(queries, probabilities, predictions, helpful, harmful)


def log_likelihood(outputs: Tensor, labels: Tensor) -> Tensor:
    """Minus the loss: what helps it most harms the loss least, and the other way around."""
    return -F.cross_entropy(outputs, labels, reduction="none")


def show_index(
    index: cv.influence.Index,
    images: Images,
    module: nn.Module,
    sketched: Tensor,
    inverse: cv.Operator,
    queries: Batch,
    rankings: list[Ranking],
) -> None:
    """Prints the index, and how well it proposes: all exact scores are affordable here."""
    model_fn, params = cv.functional(module)
    exact = cv.influence.scores(inverse, model_fn, params, queries, cv.over(batches(images.training)))
    best = [(sign * exact).topk(SHOWN)[1] for sign in (1, -1)]
    recalled = [(want[:, :, None] == got[:, None]).any(2) for want, (_, got) in zip(best, rankings, strict=True)]
    correlations = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(sketched, exact, strict=True)])
    print(f"test accuracy                                        {accuracy(module, images.test):>8.1%}\n")
    print(index)
    print()
    print(f"correlation of sketched with exact scores            {float(correlations.mean()):>8.3f}")
    share = float(torch.stack(recalled).double().mean())
    print(f"the {SHOWN} most helpful and harmful that are proposed     {share:>8.0%}")


# --- second part: which labels are wrong ------------------------------------------------------------------------------


class Wrong(NamedTuple):
    """Training images with some wrong labels, self-influence, and what it finds beside the loss."""

    labels: Tensor
    flipped: Tensor
    self_influence: Tensor
    found: dict[str, cv.influence.evaluate.MislabelDetection]


def suspect(images: Images, epochs: int, share: float) -> Wrong:
    """Changes a share of the labels, trains on them and looks for them."""
    inputs, right = images.training
    source = torch.Generator().manual_seed(0)
    flipped = torch.zeros(len(right), dtype=torch.bool)
    flipped[torch.randperm(len(right), generator=source)[: round(share * len(right))]] = True
    shift = torch.randint(1, 10, right.shape, generator=source)
    labels = torch.where(flipped, (right + shift) % 10, right)
    training = inputs, labels
    module = learn(training, epochs)
    model_fn, params = cv.functional(module)
    inverse = cv.ekfac(model_fn, params, cv.over(batches(training), progress=True)).inverse(DAMPING)
    values = cv.influence.self_influence(inverse, model_fn, params, cv.over(batches(training)))
    with torch.no_grad():
        losses = F.cross_entropy(module(inputs), labels, reduction="none")
    suspicions = {"self-influence": values, "loss": losses}
    found = {name: cv.influence.evaluate.mislabel_detection(x, flipped) for name, x in suspicions.items()}
    print(
        f"\n{int(flipped.sum())} of {len(labels)} labels are changed; test accuracy {accuracy(module, images.test):.1%}"
    )
    print(f"{'':<28}{'area under ROC':>16}{'found in 10 %':>16}{'in 20 %':>10}")
    for name, result in found.items():
        shares = [float(result.found[round(checked * len(labels))]) for checked in (0.1, 0.2)]
        print(f"{name:<28}{float(result.area):>16.3f}{shares[0]:>16.0%}{shares[1]:>10.0%}")
    return Wrong(labels, flipped, values, found)


# --- drawing ----------------------------------------------------------------------------------------------------------


def heading(figure: SubFigure, title: str) -> None:
    """The title of a part."""
    title += "\n"  # leaves space for the names of groups
    figure.suptitle(title, x=18 / figure.bbox.width, ha="left", fontsize=14, fontweight="bold", color=EXACT)


def draw_image(ax: Axes, image: Tensor, title: str, color: str) -> None:
    """One image in a coloured frame."""
    side = round(len(image) ** 0.5)
    ax.imshow(image.view(side, side), cmap="gray_r", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set(visible=True, color=color, linewidth=2)
    ax.set_title(title, color=color, fontsize=9)


def name_group(ax: Axes, name: str, color: str) -> None:
    """A name above the first image of a group; it takes no space, being wider than the image."""
    text = ax.annotate(
        name, (0, 1), (-2, 34), xycoords="axes fraction", textcoords="offset points", color=color, fontsize=12
    )
    text.set(fontweight="bold", in_layout=False)


def draw_due(figure: SubFigure, images: Images, due: Due) -> None:
    """One row a test image."""
    heading(figure, "1   Training images that a prediction is due to")
    inputs, labels = images.training
    sides = ((1, "most helpful", HELPFUL, due.helpful), (2 + SHOWN, "most harmful", HARMFUL, due.harmful))
    widths = (1.15, *[1] * SHOWN, 0.25, *[1] * SHOWN)
    grid = figure.add_gridspec(QUERIES, len(widths), width_ratios=widths)
    for row in range(QUERIES):
        label, prediction = (images.names[int(x[row])] for x in (due.queries[1], due.predictions))
        verdict = "right" if label == prediction else f"taken for {prediction}"
        title = f"“{label}”, p = {float(due.probabilities[row]):.2f}\n{verdict}"
        draw_image(figure.add_subplot(grid[row, 0]), due.queries[0][row], title, EXACT)
        for first, name, color, (scores, numbers) in sides:
            for column in range(SHOWN):
                ax = figure.add_subplot(grid[row, first + column])
                number = int(numbers[row, column])
                title = f"{images.names[int(labels[number])]}\n{float(scores[row, column]):+.2f}"
                draw_image(ax, inputs[number], title, color)
                if column == row == 0:
                    name_group(ax, name, color)


def draw_wrong(figure: SubFigure, images: Images, wrong: Wrong) -> None:
    """Shares found, and the images of greatest self-influence."""
    heading(figure, "2   Labels that are wrong")
    widths = (3.4, 0.2, *[1] * (CHECKED // 2))
    grid = figure.add_gridspec(2, len(widths), width_ratios=widths)
    ax = figure.add_subplot(grid[:, 0])
    for (name, result), color in zip(wrong.found.items(), (INFLUENCE, LOSS), strict=True):
        ax.plot(result.checked, result.found, color=color, label=f"{name}, area under ROC {float(result.area):.3f}")
    ax.plot([0, 1], [0, 1], color=FAINT, ls=":", label="in random order")
    ax.set(xlabel="training images checked", ylabel="wrong labels found", xlim=(0, 1), ylim=(0, 1.02))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    ax.legend(loc="lower right")
    for place, number in enumerate(wrong.self_influence.topk(CHECKED)[1].tolist()):
        ax = figure.add_subplot(grid[place // (CHECKED // 2), 2 + place % (CHECKED // 2)])
        given, right = (images.names[int(x[number])] for x in (wrong.labels, images.training[1]))
        title = f"labelled {given}\n" + (f"was {right}" if wrong.flipped[number] else "not changed")
        draw_image(ax, images.training[0][number], title, HELPFUL if wrong.flipped[number] else INK)
        if place == 0:
            name_group(ax, "greatest self-influence", INK)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("influence.png"), help="where the figure goes")
    parser.add_argument("--data", type=Path, help="a folder with the files of Fashion-MNIST, in place of the digits")
    parser.add_argument("--index", type=Path, help="a folder to keep the index in (default: it is not kept)")
    parser.add_argument("--examples", type=int, help="training images (default: 1500 digits, or 5000 of --data)")
    parser.add_argument("--epochs", type=int, default=20, help="of each of the two trainings (default: 20)")
    parser.add_argument("--flipped", type=float, default=0.1, help="the share of wrong labels (default: 0.1)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # threads that wait for each other cost more than they save on matrices this small
    images = digits(arguments.examples) if arguments.data is None else from_files(arguments.data, arguments.examples)
    with ExitStack() as stack:
        folder = arguments.index or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        due = explain(images, arguments.epochs, folder)
    wrong = suspect(images, arguments.epochs, arguments.flipped)

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 12), layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.06))
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.9, 1))
        draw_due(top, images, due)
        draw_wrong(bottom, images, wrong)
        figure.savefig(arguments.output, dpi=130)
    print(f"\nfigure: {arguments.output}")


if __name__ == "__main__":
    main()
