"""Parameters that are spread over processes, `torch.distributed.tensor.DTensor`, as ``fully_shard`` makes them.

A preconditioner mixes all rows and columns of a matrix, so it is given whole gradients: every process gathers them and
computes the same update, of which it applies its part. The state lies whole on every process.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`; while nobody has imported its module, none is.

    Example:
        >>> import torch
        >>> is_sharded(torch.ones(2))
        False
    """
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """The tensor that is spread over processes, gathered by each of them; an ordinary one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_part(parameter: Any) -> Tensor:
    """The part of a parameter that this process holds, which may be written to; all of an ordinary one."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def part_like(update: Tensor, parameter: Any) -> Tensor:
    """The part of a whole update that belongs to `own_part` of a parameter; no communication."""
    if not is_sharded(parameter):
        return update
    module: Any = sys.modules["torch.distributed.tensor"]
    mesh = parameter.device_mesh
    everywhere = [module.Replicate()] * mesh.ndim
    spread = module.DTensor.from_local(update, mesh, everywhere, run_check=False)
    return spread.redistribute(mesh, parameter.placements).to_local()
