"""Every test and every doctest: one thread, torch's global generator seeded, hypothesis' examples always the same.

A change is judged by what it changes; `make test-random` looks for other examples.
"""

from __future__ import annotations

import gc
import types

import pytest
import torch
from hypothesis import settings
from torch._subclasses import fake_tensor

settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")
torch.set_num_threads(1)

# Each fake mode formats the stack that made it, for torch's own messages: under pytest that takes longer than a plan.
fake_tensor.traceback = types.SimpleNamespace(extract_stack=list, format_list=list)
gc.disable()  # what is collected stays; to look for garbage among it again and again is a tenth of the time


def pytest_collection_finish() -> None:
    """From here on there is garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
