"""A cache of the model's own contexts: what followed when it was in a like state (Grave, Joulin & Usunier 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from recurlm.config import CacheConfig
from recurlm.errors import RequestError
from recurlm.protocol import State, StatefulModel

QUERIES = 256  # positions whose scores are computed at once: a band as wide as the window and this
SCORES = 1 << 24  # of them held at most


class Reader(Protocol):
    """A StatefulModel that shows its hidden states, as NeuralModel and DynamicEvaluation do."""

    def read(self, ids_TB: Tensor, state: State, targets_TB: Tensor | None = None) -> tuple[Tensor, Tensor, State]:
        """(hidden_TBH, nll_TB of the targets or, without them, log_probs_TBV, state)."""
        ...


@final
class NeuralCache(StatefulModel):
    """p(w | t) = lambda p_cache(w | t) + (1 - lambda) p_model(w | t), with p_cache(w | t) = sum_j a_tj [x_{j+1} = w].

    a_t = softmax_j(theta h_t . h_j) over the last `window` positions j < t; h is the last layer's output (Grave et al.
    2017, equations 2 and 3). Where the cache is not in use, as at the first position, the model answers alone.
    rule 'published' (awd-lstm-lm): in use only when more than `window` positions lie behind, counted from the start of the
    text or from `window` positions before a chunk: never for the first one of a later chunk.
    Its state: the model's, the newest hidden states, their inputs, and the number of ids read.
    """

    def __init__(self, model: StatefulModel, config: CacheConfig):
        if not hasattr(model, "read"):
            raise RequestError("A neural cache needs the hidden states of a neural model; an n-gram model has none.")
        self.model, self.config = model, config
        self.vocab_size, self.backward = model.vocab_size, model.backward

    @property
    def device(self) -> torch.device:
        return self.model.device

    def initial_state(self, batch: int) -> State:
        nothing = torch.zeros(batch, 0, 0, device=self.device)
        ids = torch.zeros(batch, 0, dtype=torch.long, device=self.device)
        return self.model.initial_state(batch), nothing, ids, torch.zeros_like(ids.sum(1))

    def advance(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        log_probs_TBV, cached_1TBV, state = self.parts(ids_TB, None, state, [self.config.theta])
        return self.mixed(log_probs_TBV, cached_1TBV[0]), state

    def score(self, ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        nll_TB, cached_1TB, state = self.parts(ids_TB, targets_TB, state, [self.config.theta])
        return -self.mixed(-nll_TB, -cached_1TB[0]), state

    def mixed(self, model: Tensor, cached: Tensor) -> Tensor:
        """Log-probabilities of the mixture from those of the model and of the cache."""
        share = self.config.lambda_
        if share in (0, 1):
            return cached if share else model
        return torch.logaddexp(model + math.log1p(-share), cached + math.log(share))

    def parts(
        self, ids_TB: Tensor, targets_TB: Tensor | None, state: State, thetas: Sequence[float]
    ) -> tuple[Tensor, Tensor, State]:
        """(nll_TB of the targets by the model, nll_KTB by the cache alone under each theta, state).

        Without targets log_probs_TBV and log_probs_KTBV. Where the cache is not in use its part is the model's.
        """
        inner, keys_BWH, inputs_BW, count_B = state
        hidden_TBH, by_model, inner = self.model.read(ids_TB, inner, targets_TB)  # type: ignore[attr-defined]
        queries_BTH = hidden_TBH.transpose(0, 1)
        keys_BKH = torch.cat((keys_BWH, queries_BTH), 1) if keys_BWH.shape[1] else queries_BTH
        inputs_BK = torch.cat((inputs_BW, ids_TB.T), 1)
        T, W = len(ids_TB), self.config.window
        position_TB = count_B + torch.arange(T, device=count_B.device)[:, None]
        used_TB = position_TB > 0
        if self.config.rule == "published":
            within_TB = position_TB % self.config.chunk
            used_TB = within_TB + (position_TB - within_TB).clamp(max=W) > W
        cached, start = [], 0
        while start < T:
            seen = min(W, inputs_BW.shape[1] + start) + QUERIES
            end = min(T, start + max(1, min(QUERIES, SCORES // (seen * ids_TB.shape[1]))))
            targets_B = None if targets_TB is None else targets_TB[start:end].T
            cached.append(self._band(queries_BTH, keys_BKH, inputs_BK, start, end, targets_B, thetas))
            start = end
        used = used_TB if targets_TB is not None else used_TB[..., None]
        by_cache = torch.cat(cached, 1).where(used, by_model)
        return by_model, by_cache, (inner, keys_BKH[:, -W:], inputs_BK[:, -W:], count_B + T)

    def _band(
        self, queries_BTH: Tensor, keys_BKH: Tensor, inputs_BK: Tensor, start: int, end: int, targets_BC: Tensor | None,
        thetas: Sequence[float],
    ) -> Tensor:  # fmt: skip
        """The cache's part for positions `start` to `end`; NaN or anything where nothing lies behind."""
        wide = torch.promote_types(keys_BKH.dtype, torch.float32)
        behind = keys_BKH.shape[1] - queries_BTH.shape[1]  # keys before the first query
        low, high = max(0, behind + start - self.config.window), behind + end - 1
        at_C1 = torch.arange(behind + start, behind + end, device=self.device)[:, None]
        key_K = torch.arange(low, high, device=self.device)
        allowed_CK = (key_K < at_C1) & (key_K >= at_C1 - self.config.window)
        scores_BCK = queries_BTH[:, start:end].to(wide) @ keys_BKH[:, low:high].to(wide).transpose(1, 2)
        values_BK = inputs_BK[:, low + 1 : high + 1]  # what followed each key
        out = []
        for theta in thetas:
            log_a_BCK = (scores_BCK * theta).masked_fill(~allowed_CK, -math.inf).log_softmax(-1)
            if targets_BC is None:
                probs_BCV = log_a_BCK.new_zeros(*log_a_BCK.shape[:2], self.vocab_size)
                probs_BCV.scatter_add_(-1, values_BK[:, None].expand(log_a_BCK.shape), log_a_BCK.exp())
                out.append(probs_BCV.log().transpose(0, 1))
            else:
                other_BCK = values_BK[:, None] != targets_BC[..., None]
                out.append(-log_a_BCK.masked_fill(other_BCK, -math.inf).logsumexp(-1).T)
        return torch.stack(out)
