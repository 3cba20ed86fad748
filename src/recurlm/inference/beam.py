"""Beam search over ids: the most probable continuations, without chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from recurlm.inference.engine import advance_prompt
from recurlm.inference.generate import MOST_TOKENS, check_range
from recurlm.protocol import StatefulModel

MOST_BEAMS = 1024


@dataclass(frozen=True)
class Path:
    """A continuation: its ids, their log-probability in nats, the score it is ranked by, and whether it was ended."""

    ids: tuple[int, ...]
    log_prob: float
    score: float
    ended: bool


def normalised(log_prob: float, length: int, length_penalty: float) -> float:
    """log P / ((5 + length) / 6)^length_penalty (Wu et al. 2016, equation 14): 0 ranks by probability alone."""
    return log_prob / ((5 + length) / 6) ** length_penalty


@torch.inference_mode()
def beam_search(
    model: StatefulModel,
    prompt_ids: Sequence[int],
    count: int,
    *,
    beams: int,
    best: int = 1,
    length_penalty: float = 0.0,
    forbidden: Sequence[int] = (),
    ends: Callable[[tuple[int, ...]], bool] = lambda ids: False,
) -> list[Path]:
    """The `best` continuations of up to `count` ids after `prompt_ids` (one id at least), highest score first.

    At each step the `beams` most probable open paths go on as the rows of one batch. A path for which `ends` is
    true is set aside, its last id counted. The search is over when no open path can still reach the `best` found.
    With beams >= V^(count - 1) nothing is cut and the result is exact; beams = 1 without a length
    penalty is greedy. `forbidden` ids are in
    no path. Fewer paths come back where fewer exist or are left open. RequestError for arguments out of range.
    """
    check_range("beams", beams, 1, MOST_BEAMS)
    check_range("num_return", best, 1, beams, ", the number of beams")
    check_range("length_penalty", length_penalty, 0.0, 10.0)
    check_range("tokens", count, 0, MOST_TOKENS)
    log_probs_V, state = advance_prompt(model, prompt_ids, model.initial_state(1))
    log_probs_BV, paths, sums = log_probs_V[None], [()], [0.0]
    done: list[Path] = []
    for length in range(1, count + 1):
        if forbidden:
            log_probs_BV = log_probs_BV.index_fill(1, torch.tensor(forbidden, device=log_probs_BV.device), -math.inf)
        # An end takes one candidate of a row, so twice the beams leave enough open ones where a single id ends paths.
        top_BK = log_probs_BV.topk(min(2 * beams, log_probs_BV.shape[-1]))
        total_N = (top_BK.values.double().cpu() + torch.tensor(sums).double()[:, None]).flatten()
        ranked = total_N.sort(descending=True, stable=True).indices[: 2 * beams].tolist()
        ids, width = top_BK.indices.flatten().tolist(), top_BK.indices.shape[-1]
        parents, opened, opened_sums = [], [], []
        for place in ranked:
            total = float(total_N[place])
            if len(opened) == beams or total == -math.inf:
                break
            path = (*paths[place // width], ids[place])
            if ends(path):
                done.append(Path(path, total, normalised(total, length, length_penalty), True))
            else:
                parents.append(place // width)
                opened.append(path)
                opened_sums.append(total)
        paths, sums = opened, opened_sums
        done = sorted(done, key=lambda path: -path.score)[:best]
        # A path's probability only falls, and no length divides it by more than the greatest does.
        if not paths or (len(done) == best and normalised(sums[0], count, length_penalty) <= done[-1].score):
            return done
        if length < count:
            last_1B = torch.tensor([[path[-1] for path in paths]], device=model.device)
            log_probs_TBV, state = model.advance(last_1B, model.select(state, torch.tensor(parents)))
            log_probs_BV = log_probs_TBV[0]
    done += [Path(p, s, normalised(s, count, length_penalty), False) for p, s in zip(paths, sums, strict=True)]
    return sorted(done, key=lambda path: -path.score)[:best]
