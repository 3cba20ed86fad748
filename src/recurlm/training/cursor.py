"""Where a run stands, and the randomness that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Cursor:
    """Where a run stands: with the tensors of the checkpoint, all that decides how it goes on.

    Steps and epochs are counted through all stages.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    epoch_nats: float = 0.0
    epoch_targets: int = 0
    losses: list[float] = field(default_factory=list)  # of the stage's validations
    best: float = math.inf
    seconds: float = 0.0
    due: bool = False  # a validation of this step is due, and a signal came before or during it
    stage: int = 0
    stage_step: int = 0  # updates before the stage
    stage_epoch: int = 0  # epochs begun before the stage


@dataclass(frozen=True)
class Result:
    """How a run ended: `signal` is not 0 when SIGINT or SIGTERM stopped it; the best loss is that of `split`."""

    step: int
    epoch: int
    best_loss: float
    seconds: float
    signal: int
    finished: bool
    stage: int = 1
    stages: int = 1
    split: str = "valid"


def seed_for_step(seed: int, step: int) -> int:
    """A seed below 2^63 as a pure function of (seed, step), so that no random state needs saving (splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
