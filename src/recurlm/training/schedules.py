"""Learning-rate schedules by name: pure functions of progress, so that nothing needs saving."""

from __future__ import annotations

import math
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
    """factor ** (milestones passed): numbers of finished epochs, and shares of the whole training ("50-75")."""
    passed = sum(progress.epoch >= epoch for epoch in config.milestones)
    return config.factor ** (passed + sum(progress.share >= share for share in config.milestone_shares))


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


def _falling(config: ScheduleConfig, progress: Progress) -> float:
    """The share done of what comes after `hold`."""
    return max(0.0, progress.share - config.hold) / (1.0 - config.hold)


def linear(config: ScheduleConfig, progress: Progress) -> float:
    """1 up to the share `hold` of the training, then down to `floor` in a straight line."""
    return 1.0 - (1.0 - config.floor) * _falling(config, progress)


def cosine(config: ScheduleConfig, progress: Progress) -> float:
    """After `hold` from 1 to `floor` along half a cosine, `cycles` times over (SGDR, Loshchilov & Hutter 2017, eq. 5)."""
    place = 1.0 if progress.share >= 1 else _falling(config, progress) * config.cycles % 1
    return config.floor + (1.0 - config.floor) * (1 + math.cos(math.pi * place)) / 2


def cyclic(config: ScheduleConfig, progress: Progress) -> float:
    """From `floor` to 1 and back in straight lines, `cycles` times (the triangular policy, Smith 2017)."""
    place = progress.share * config.cycles % 1
    return config.floor + (1.0 - config.floor) * (1 - abs(2 * place - 1))


def slanted_triangular(config: ScheduleConfig, progress: Progress) -> float:
    """From `floor` up to 1 at the share `peak`, then down to `floor` (Howard & Ruder 2018, section 3.2)."""
    share, peak = progress.share, config.peak
    up = share / peak if share < peak else (1 - share) / (1 - peak)
    return config.floor + (1.0 - config.floor) * up


SCHEDULES: dict[str, Callable[[ScheduleConfig, Progress], float]] = {
    "constant": constant,
    "milestones": milestones,
    "plateau": plateau,
    "linear": linear,
    "cosine": cosine,
    "cyclic": cyclic,
    "slanted-triangular": slanted_triangular,
}


def warm_up(config: ScheduleConfig, progress: Progress) -> float:
    """The factor of linear warm-up, which any schedule may have: from 1 / (warmup_steps + 1) to 1 (Goyal et al. 2017)."""
    return min(1.0, (progress.step + 1) / (config.warmup_steps + 1))
