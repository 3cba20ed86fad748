"""Word-prediction metrics over log-probabilities."""

from __future__ import annotations

from torch import Tensor

TOP = (1, 5, 10)


def ranks(log_probs_TBV: Tensor, targets_TB: Tensor) -> Tensor:
    """rank_TB of each target, from 1. Equal probabilities count half against it, so a uniform model gains nothing."""
    own_TB1 = log_probs_TBV.gather(-1, targets_TB[..., None])
    better_TB = (log_probs_TBV > own_TB1).sum(-1)
    equal_TB = (log_probs_TBV == own_TB1).sum(-1)
    return better_TB + (equal_TB - 1) / 2 + 1
