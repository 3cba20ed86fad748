"""What comes next after a context, and how far apart the answers for two contexts lie."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recurlm.inference.engine import advance_prompt
from recurlm.protocol import StatefulModel


def next_token(model: StatefulModel, ids: Sequence[int]) -> Tensor:
    """log_probs_V (fp64, CPU) of the token after the ids, of which there is one at least."""
    return advance_prompt(model, ids, model.initial_state(1))[0].double().cpu()


def jensen_shannon(log_p_V: Tensor, log_q_V: Tensor) -> float:
    """The divergence of two distributions in bits: 0 for equal ones, 1 for those that share nothing (Lin 1991, equation 4.1).

    KL(p | m) / 2 + KL(q | m) / 2 with m = (p + q) / 2. Distributions that do not quite sum to one are made to.
    """
    logs = [log - log.logsumexp(-1) for log in (log_p_V.double(), log_q_V.double())]
    mean_V = torch.logaddexp(*logs) - math.log(2)
    terms = [torch.where(log > -math.inf, log.exp() * (log - mean_V), 0.0).sum() for log in logs]
    return max(0.0, float(sum(terms)) / 2 / math.log(2))
