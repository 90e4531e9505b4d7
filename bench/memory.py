"""Peak memory of a function, from the allocator's own record."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that torch held at once on the CPU during a call, above what it held before.

    Every allocation and release of torch's CPU allocator is counted, temporaries within kernels and the results
    included.

    Args:
        run: the function; call it once before, so that lazy initialization is not counted.

    Returns:
        Bytes.
    """
    with torch.autograd.profiler.profile(use_kineto=True, use_cpu=True, profile_memory=True) as recorded:
        result = run()
    del result  # held until here, so that it counts
    changes = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
