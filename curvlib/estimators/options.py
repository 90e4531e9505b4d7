"""What an estimator was asked for."""

from __future__ import annotations

import dataclasses

from curvlib.errors import ArgumentError
from curvlib.layers.wide import Wide
from curvlib.losses import Loss, check_loss

FISHERS = ("type-2", "mc", "empirical", "forward-only")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `kfac` and its kin; their documentation says what each means."""

    loss: Loss
    fisher: str
    sharing: str
    mc_samples: int
    elementwise: str
    tied: str
    wide: Wide
    engine: str | None

    def __post_init__(self) -> None:
        check_loss(self.loss)
        allowed = {
            "fisher": FISHERS,
            "sharing": ("expand", "reduce"),
            "elementwise": ("diagonal", "dense"),
            "tied": ("sum", "merge"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ArgumentError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if (self.elementwise, self.fisher) == ("dense", "forward-only"):
            raise ArgumentError("elementwise='dense' needs backpropagated vectors; fisher='forward-only' has none")
        if self.mc_samples < 1:
            raise ArgumentError(f"mc_samples must be at least 1, got {self.mc_samples}")
