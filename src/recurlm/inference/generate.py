"""Sampling from a language model, over ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from recurlm.errors import RequestError
from recurlm.inference.engine import advance_prompt
from recurlm.protocol import StatefulModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the most probable one; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise RequestError(f"temperature = {self.temperature}: expected a value from 0 to 100.")
        if self.top_k < 0:
            raise RequestError(f"top_k = {self.top_k}: expected 0 (no limit) or more.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p = {self.top_p}: expected a value above 0 and at most 1.")


def sharpen(log_probs_V: Tensor, sampling: Sampling) -> Tensor:
    """probs_V to draw from: p^(1/T) over the top k, then over the smallest set that holds top_p, normalised.

    Nucleus sampling: Holtzman et al. 2020. The cut keeps at least the most probable token.
    """
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(log_probs_V.argmax(), log_probs_V.shape[-1]).to(log_probs_V.dtype)
    scaled_V = (log_probs_V.double() - log_probs_V.max()) / sampling.temperature
    if sampling.top_k:
        kept = scaled_V.topk(min(sampling.top_k, scaled_V.shape[-1])).indices
        scaled_V = torch.full_like(scaled_V, -math.inf).index_copy(0, kept, scaled_V[kept])
    probs_V = scaled_V.softmax(-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        kept_V = sorted_V.cumsum(-1) - sorted_V < sampling.top_p
        probs_V = torch.zeros_like(probs_V).index_copy(0, order_V, sorted_V * kept_V)
        probs_V = probs_V / probs_V.sum()
    return probs_V


def sample_ids(
    model: StatefulModel,
    prompt_ids: Sequence[int],
    count: int,
    sampling: Sampling,
    generator: Generator,
    forbidden: Sequence[int] = (),
) -> Iterator[int]:
    """Up to `count` ids drawn one by one after `prompt_ids` (at least one id). `forbidden` ids are never drawn.

    `generator` lives on the CPU, so a seed gives the same draws for the same probabilities on every device.
    """
    log_probs_V, state = advance_prompt(model, prompt_ids, model.initial_state(1))
    for _ in range(count):
        log_probs_V = log_probs_V.cpu().clone()
        if forbidden:
            log_probs_V[list(forbidden)] = -math.inf
        drawn = int(torch.multinomial(sharpen(log_probs_V, sampling), 1, generator=generator))
        yield drawn
        log_probs_V, state = advance_prompt(model, [drawn], state)
