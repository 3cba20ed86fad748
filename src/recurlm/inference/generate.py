"""Sampling from a language model, over ids."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from recurlm.errors import RequestError
from recurlm.inference.engine import advance_prompt
from recurlm.protocol import StatefulModel

MOST_TOKENS = 10**7


def check_range(name: str, value: float, low: float, high: float, meaning: str = "") -> None:
    """None; RequestError unless low <= value <= high, and a whole number where `low` is one (an int)."""
    kind = numbers.Integral if isinstance(low, int) else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        what = "a whole number" if isinstance(low, int) else "a value"
        raise RequestError(f"{name} = {value!r}: expected {what} from {low:,} to {high:,}{meaning}.")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The steps act in the order of the fields, each on what the one before left.

    repetition_penalty r: p becomes p^r, unnormalised, for every token that is in the last `repetition_window`
    tokens (0: the whole text, prompt included). That is Keskar et al. 2019, section 4.1, on normalised logits:
    log p <= 0 knows no offset, so multiplying by r always lowers it; 1 does nothing.
    temperature T: p^(1/T), normalised; 0 takes the most probable token and draws nothing.
    top_k: only the k most probable; 0 cuts nothing.
    min_p: only p >= min_p * max p (Nguyen et al. 2024); 0 cuts nothing, 1 keeps the most probable.
    top_p: only the smallest set of most probable tokens that holds top_p of what is left (Holtzman et al. 2020).
    Every cut keeps at least the most probable token.
    """

    repetition_penalty: float = 1.0
    repetition_window: int = 0
    temperature: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_range("repetition_penalty", self.repetition_penalty, 1.0, 100.0, " (1: none)")
        check_range("repetition_window", self.repetition_window, 0, MOST_TOKENS, " (0: the whole text)")
        check_range("temperature", self.temperature, 0.0, 100.0, " (0: greedy)")
        check_range("top_k", self.top_k, 0, 2**31 - 1, " (0: no limit)")
        check_range("min_p", self.min_p, 0.0, 1.0, " (0: no limit)")
        check_range("top_p", self.top_p, 0.0, 1.0, " (1: no limit)")
        if self.top_p == 0:
            raise RequestError("top_p = 0: expected a value above 0, for something must be left to draw.")


def sharpen(log_probs_V: Tensor, sampling: Sampling, seen_V: Tensor | None = None) -> Tensor:
    """probs_V to draw from, as `Sampling` says, in float64; they sum to one.

    `log_probs_V` may hold -inf, not everywhere; `seen_V` is true for the tokens that the penalty lowers.
    """
    if seen_V is not None:
        log_probs_V = torch.where(seen_V, log_probs_V * sampling.repetition_penalty, log_probs_V)
    if sampling.temperature == 0:
        return torch.zeros_like(log_probs_V, dtype=torch.double).index_fill_(0, log_probs_V.argmax(), 1.0)
    weights_V = log_probs_V.double().sub_(log_probs_V.max()).div_(sampling.temperature).exp_()  # the best weighs 1
    if 0 < sampling.top_k < weights_V.shape[-1]:
        kept_K = weights_V.topk(sampling.top_k)
        weights_V = torch.zeros_like(weights_V).index_copy_(0, kept_K.indices, kept_K.values)
    if sampling.min_p > 0:
        weights_V.masked_fill_(weights_V < sampling.min_p, 0)
    if sampling.top_p < 1:
        weights_V = _nucleus(weights_V, sampling.top_p)
    return weights_V.div_(weights_V.sum())


def _nucleus(weights_V: Tensor, top_p: float) -> Tensor:
    """The weights, all but the smallest set of the largest that holds top_p of the sum set to zero.

    Tokens below (1 - top_p) / V of the sum hold less than 1 - top_p together, so the set needs none of them:
    only the others are sorted.
    """
    total = weights_V.sum()
    floor = total * ((1 - top_p) / weights_V.shape[-1])
    likely_K = (weights_V >= floor).nonzero().squeeze(-1)
    sorted_K, order_K = weights_V[likely_K].sort(descending=True, stable=True)
    needed_K = sorted_K.cumsum(-1) - sorted_K < top_p * total
    return torch.zeros_like(weights_V).index_copy_(0, likely_K[order_K], sorted_K * needed_K)


def sample_ids(
    model: StatefulModel,
    prompt_ids: Sequence[int],
    count: int,
    sampling: Sampling,
    generator: Generator,
    forbidden: Sequence[int] = (),
    fresh_after: int | None = None,
) -> Iterator[int]:
    """Up to `count` ids drawn one by one after `prompt_ids`; `forbidden` ids are never drawn.

    After the id `fresh_after` the state begins anew: a model of single sentences knows nothing of the one before.

    The first of `prompt_ids` is the id that a text starts after: it is no part of the text that is penalised.
    `generator` lives on the CPU, so a seed gives the same draws for the same probabilities on every device.
    """
    text, window = list(prompt_ids[1:]), sampling.repetition_window
    recent = text[-window:]  # all of it for 0
    counts_V = torch.bincount(torch.tensor(recent, dtype=torch.long), minlength=model.vocab_size)
    penalised = sampling.repetition_penalty != 1
    log_probs_V, state = advance_prompt(model, prompt_ids, model.initial_state(1))
    for _ in range(count):
        log_probs_V = log_probs_V.cpu().clone()
        if forbidden:
            log_probs_V[list(forbidden)] = -math.inf
        probs_V = sharpen(log_probs_V, sampling, counts_V > 0 if penalised else None)
        drawn = int(torch.multinomial(probs_V, 1, generator=generator))
        yield drawn
        text.append(drawn)
        counts_V[drawn] += 1
        if 0 < window < len(text):
            counts_V[text[-window - 1]] -= 1
        state = model.initial_state(1) if drawn == fresh_after else state
        log_probs_V, state = advance_prompt(model, [drawn], state)
