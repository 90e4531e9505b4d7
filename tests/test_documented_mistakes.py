"""The documentation lists what is refused at the door, with what the message says to write instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import test_containers
import test_first_mistakes
import test_functional

DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
KINDS: dict[str, Mapping[str, Any]] = {
    "As a loss": test_first_mistakes.LOSSES,
    "As a model and its parameters": test_first_mistakes.MODELS,
    "As a module": test_functional.REFUSED,
    "As a batch": test_first_mistakes.BATCHES,
    "As a loader": test_first_mistakes.LOADERS,
    "As targets": test_first_mistakes.TARGETS,
    "As a container of tensors": test_containers.REFUSED,
}


def table(cases: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each case, and what its message contains."""
    said = ((name, case[-1]) for name, case in cases.items())
    return [(name, words.replace("\\", "") if isinstance(words, str) else "; ".join(words)) for name, words in said]


@pytest.mark.parametrize("kind", KINDS)
def test_the_documented_tables_list_every_mistake_with_what_to_write(kind: str) -> None:
    _, _, section = DOCUMENT.read_text().partition(f"### {kind}\n")
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", re.split(r"\n##+ ", section)[0], re.M)[2:]
    assert [(name, words.replace("\\|", "|")) for name, words in rows] == table(KINDS[kind])
