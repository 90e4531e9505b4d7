"""Every test and every doctest: one thread, torch's global generator seeded, hypothesis' examples always the same.

A change is judged by what it changes; `make test-random` looks for other examples.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
