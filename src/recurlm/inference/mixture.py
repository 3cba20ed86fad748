"""Several models as one: linear interpolation, with weights from held-out text, and a cache of the newest words.

Any models over the same ids mix: n-gram models of several domains, n-gram and neural ones, each of them with a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from recurlm.errors import RequestError
from recurlm.protocol import State, StatefulModel
from recurlm.text.batches import Batches


@final
class UnigramCache(StatefulModel):
    """p(w) = the share of w among the last `window` ids of the row (Kuhn & De Mori 1990); uniform before the first.

    A state is these ids, oldest first, -1 for none. Alone it is no model of text, for what is not in the window is
    impossible; it is a part of a Mixture.
    """

    def __init__(self, vocab_size: int, window: int, device: torch.device | None = None):
        if not 1 <= window <= 1_000_000:
            raise RequestError(f"cache = {window}: expected a window of 1 to 1,000,000 tokens.")
        self.vocab_size, self.window = vocab_size, window
        self._device = device or torch.device("cpu")

    @property
    def device(self) -> torch.device:
        return self._device

    def initial_state(self, batch: int) -> State:
        return torch.full((batch, self.window), -1, device=self._device)

    def _windows(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        """(seen_TBW, the ids in the window after each input; state)."""
        history_BS = torch.cat((state, ids_TB.T), dim=1)
        return history_BS.unfold(1, self.window, 1)[:, 1:].transpose(0, 1), history_BS[:, -self.window :]

    def advance(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        seen_TBW, state = self._windows(ids_TB, state)
        there_TBW = seen_TBW >= 0
        counts_TBV = torch.zeros(*ids_TB.shape, self.vocab_size, device=self._device)
        counts_TBV.scatter_add_(-1, seen_TBW.clamp(min=0), there_TBW.float())
        size_TB1 = there_TBW.sum(-1, keepdim=True)
        return (counts_TBV / size_TB1.clamp(min=1)).where(size_TB1 > 0, 1 / self.vocab_size).log_(), state

    def score(self, ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        seen_TBW, state = self._windows(ids_TB, state)
        hits_TB = (seen_TBW == targets_TB[..., None]).sum(-1).double()
        size_TB = (seen_TBW >= 0).sum(-1)
        return -(hits_TB / size_TB.clamp(min=1)).where(size_TB > 0, 1 / self.vocab_size).log(), state


@final
class Mixture(StatefulModel):
    """p(w | h) = sum_k weights[k] p_k(w | h), the weights summing to one. Its state is the tuple of its parts' states."""

    def __init__(self, models: Sequence[StatefulModel], weights: Sequence[float]):
        if len(models) != len(weights) or not models:
            raise RequestError(f"Found {len(weights)} weights for {len(models)} models; expected one for each.")
        if not (all(0 <= w <= 1 for w in weights) and abs(math.fsum(weights) - 1) < 1e-6):
            raise RequestError(f"weights = {list(weights)}: expected shares of 0 to 1 that sum to 1.")
        check_alike(models)
        self.models, self.weights = tuple(models), tuple(weights)
        self.vocab_size, self.backward = models[0].vocab_size, models[0].backward

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    def initial_state(self, batch: int) -> State:
        return tuple(model.initial_state(batch) for model in self.models)

    def advance(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        total_TBV, states = None, []
        for model, weight, part in zip(self.models, self.weights, state, strict=True):
            log_probs_TBV, new = model.advance(ids_TB.to(model.device), part)
            log_probs_TBV = log_probs_TBV.to(self.device).float() + _log(weight)
            total_TBV = log_probs_TBV if total_TBV is None else torch.logaddexp(total_TBV, log_probs_TBV)
            states.append(new)
        return total_TBV, tuple(states)  # type: ignore[return-value]

    def score(self, ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        nll_KTB, states = _score_all(self.models, ids_TB, targets_TB, state)
        log_weights_K = torch.tensor([_log(w) for w in self.weights], dtype=torch.double, device=nll_KTB.device)
        return -(log_weights_K[:, None, None] - nll_KTB).logsumexp(0), states


def _log(weight: float) -> float:
    return math.log(weight) if weight else -math.inf


def _score_all(
    models: Sequence[StatefulModel], ids_TB: Tensor, targets_TB: Tensor, state: State
) -> tuple[Tensor, State]:
    """(nll_KTB of each model in fp64 on the first one's device, their states)."""
    parts = [
        model.score(ids_TB.to(model.device), targets_TB.to(model.device), part)
        for model, part in zip(models, state, strict=True)
    ]
    return torch.stack([nll.to(models[0].device).double() for nll, _ in parts]), tuple(new for _, new in parts)


def check_alike(models: Sequence[StatefulModel]) -> None:
    """None; RequestError unless the models read the same ids in the same direction."""
    for model in models[1:]:
        if model.vocab_size != models[0].vocab_size:
            raise RequestError(
                f"The models have {models[0].vocab_size:,} and {model.vocab_size:,} ids; only models of one tokenizer mix."
            )
        if model.backward != models[0].backward:
            raise RequestError("One of the models reads forward and one backward; they predict different things.")


def losses(models: Sequence[StatefulModel], batches: Batches, steps: int) -> np.ndarray:
    """nll_KN in nats of every counted target under each model, in windows of `steps`."""

    def score(ids_TB: Tensor, targets_TB: Tensor, states: State) -> tuple[Tensor, State]:
        return _score_all(models, ids_TB, targets_TB, states)

    return stored(score, lambda batch: tuple(model.initial_state(batch) for model in models), batches, steps)


@torch.inference_mode()
def stored(
    score: Callable[[Tensor, Tensor, State], tuple[Tensor, State]], initial_state: Callable[[int], State],
    batches: Batches, steps: int,
) -> np.ndarray:  # fmt: skip
    """nll_KN of every counted target, `score` giving (nll_KTB, state) for (ids_TB, targets_TB, state)."""
    parts, state = [], ()
    for window in batches.windows(steps):
        inputs_TB, targets_TB = torch.from_numpy(window.inputs_TB), torch.from_numpy(window.targets_TB)
        if window.fresh:
            state = initial_state(inputs_TB.shape[1])
        nll_KTB, state = score(inputs_TB, targets_TB, state)
        counted_TB = ... if window.counted_TB is None else torch.from_numpy(window.counted_TB).to(nll_KTB.device)
        parts.append(nll_KTB[:, counted_TB].flatten(1).double().cpu().numpy())
    return np.concatenate(parts, axis=1)


def fit_weights(nll_KN: np.ndarray, most: int = 1000) -> tuple[list[float], float]:
    """(the weights under which the mixture's mean loss is least, that loss in nats), by EM.

    w_k <- mean over targets of w_k p_k / sum_j w_j p_j, from equal weights, until no weight moves by 1e-6 or after `most` rounds.
    The loss is convex in the weights, so what is found is the one minimum. RequestError where all p_k are 0.
    """
    least_N = nll_KN.min(0)
    if not np.isfinite(least_N).all():
        raise RequestError("The held-out text holds a token that every one of the models takes for impossible.")
    p_KN = np.exp(least_N - nll_KN)  # up to a factor for each target, which EM does not see
    weights_K = np.full(len(nll_KN), 1 / len(nll_KN))
    for _ in range(most):
        share_KN = weights_K[:, None] * p_KN
        new_K = (share_KN / share_KN.sum(0)).mean(1)
        moved, weights_K = float(np.abs(new_K - weights_K).max()), new_K
        if moved < 1e-6:
            break
    weights_K /= weights_K.sum()
    return weights_K.tolist(), float((least_N - np.log(weights_K @ p_KN)).mean())
