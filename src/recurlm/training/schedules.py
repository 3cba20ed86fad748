"""Learning-rate schedules by name: pure functions of progress, so that nothing needs saving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from recurlm.config import ScheduleConfig


@dataclass(frozen=True)
class Progress:
    """How far training is: updates done, whole epochs done, share of the whole done, validation losses so far."""

    step: int
    epoch: int
    share: float
    losses: tuple[float, ...]


def constant(config: ScheduleConfig, progress: Progress) -> float:
    """1."""
    return 1.0


def milestones(config: ScheduleConfig, progress: Progress) -> float:
    """factor ** (milestones passed); a milestone is a number of finished epochs."""
    return config.factor ** sum(progress.epoch >= epoch for epoch in config.milestones)


def plateau(config: ScheduleConfig, progress: Progress) -> float:
    """factor ** (times that the validation loss went more than `patience` validations without a new best)."""
    best, waited, drops = float("inf"), 0, 0
    for loss in progress.losses:
        if loss < best:
            best, waited = loss, 0
        else:
            waited += 1
        if waited > config.patience:
            drops, waited = drops + 1, 0
    return config.factor**drops


def linear(config: ScheduleConfig, progress: Progress) -> float:
    """Linear warm-up over warmup_steps, times a linear decay to zero over the whole training."""
    warm = min(1.0, (progress.step + 1) / (config.warmup_steps + 1))
    return warm * max(0.0, 1.0 - progress.share)


SCHEDULES: dict[str, Callable[[ScheduleConfig, Progress], float]] = {
    "constant": constant,
    "milestones": milestones,
    "plateau": plateau,
    "linear": linear,
}
