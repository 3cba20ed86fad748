"""Evaluation with dropout: the mean prediction of several thinned networks."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Generator, Tensor

from recurlm.config import DropoutConfig
from recurlm.errors import RequestError
from recurlm.model.neural import Activations, NeuralModel
from recurlm.model.precision import applied
from recurlm.protocol import State, StatefulModel

MOST_SAMPLES = 10_000


@final
class MonteCarloDropout(StatefulModel):
    """p(w) = 1/K sum_k p(w | masks k), K = `samples` (Gal & Ghahramani 2016, eq. 6).

    Each sample keeps its masks for the whole text, so it is one thinned network, and how the text is cut into windows
    makes no difference; they depend on `seed`, the sample's number and the number of rows. The state is the tuple of the
    samples' states. It takes `samples` times as long.
    """

    def __init__(self, model: NeuralModel, dropout: DropoutConfig, samples: int, seed: int = 1):
        if not 1 <= samples <= MOST_SAMPLES:
            raise RequestError(f"mc_dropout = {samples}: expected 1 to {MOST_SAMPLES:,} samples.")
        if (
            model.config.zoneout or model.config.zoneout_hidden
        ):  # it draws for each step: no one network for a whole text
            raise RequestError(
                "mc_dropout keeps the masks of each sample for the whole text, but this model's zoneout draws anew at each "
                "time step; leave out mc_dropout."
            )
        self.model, self.dropout, self.samples, self.seed = model, dropout, samples, seed
        self.vocab_size, self.backward = model.vocab_size, model.backward
        self.generator = Generator(model.device)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def initial_state(self, batch: int) -> State:
        return tuple(self.model.initial_state(batch) for _ in range(self.samples))

    def _thinned(self, ids_TB: Tensor, state: State, sample: int) -> Activations:
        return self.model(ids_TB, state, self.dropout, self.generator.manual_seed(self.seed * MOST_SAMPLES + sample))

    def advance(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        total_TBV, states = None, []
        for sample, part in enumerate(state):
            with applied(self.model.precision):
                out = self._thinned(ids_TB, part, sample)
                given = out.dropped_TBH.flatten(0, 1), self.model.embedding, out.head_dropout
                log_probs_NV = self.model.head.log_probs(*given)  # type: ignore[operator]
            log_probs_TBV = log_probs_NV.float().view(*ids_TB.shape, self.vocab_size)
            total_TBV = log_probs_TBV if total_TBV is None else torch.logaddexp(total_TBV, log_probs_TBV)
            states.append(out.state)
        return total_TBV - math.log(self.samples), tuple(states)  # type: ignore[operator]

    def score(self, ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        parts, states = [], []
        for sample, part in enumerate(state):
            with applied(self.model.precision):
                out = self._thinned(ids_TB, part, sample)
                parts.append(self.model.nll(out.dropped_TBH, targets_TB, out.head_dropout).double())
            states.append(out.state)
        return math.log(self.samples) - torch.stack(parts).neg().logsumexp(0), tuple(states)
