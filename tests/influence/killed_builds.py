"""Builds an index in processes that are killed at random times: ``python -m tests.influence.killed_builds N SEED``.

Processes are forked, so that torch is imported once. What the killed builds end with is compared with the bytes of one
that nobody disturbed; the process fails if they differ.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.influence.index_cases import build, contents, examples, projection_of, ragged, small

COUNT = 150


def forked(folder: Path, seconds: float | None) -> bool:
    """Whether a build that is killed after some time was finished before."""
    child = os.fork()
    if child == 0:
        try:
            build(folder, CASE, ragged(DATA, [7, 1, 4]), PROJECTION)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return not os.WIFSIGNALED(status)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    kills, draw = int(sys.argv[1]), random.Random(int(sys.argv[2]))
    CASE, DATA = small(), examples(COUNT)
    PROJECTION = projection_of(CASE)
    with tempfile.TemporaryDirectory() as folder:
        reference, target = Path(folder) / "reference", Path(folder) / "target"
        start = time.perf_counter()
        forked(reference, None)
        duration = time.perf_counter() - start
        done = 0
        while done < kills:
            if forked(target, draw.uniform(0, duration / 2)):
                assert contents(target) == contents(reference)
                shutil.rmtree(target)
                continue
            done += 1
        assert forked(target, None)
        assert contents(target) == contents(reference)
