"""Mixtures, neural caches and dynamic evaluation whose settings come from held-out text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from recurlm.config import CacheConfig, DataConfig, DynamicConfig, settings_of
from recurlm.errors import RunError
from recurlm.evaluation.perplexity import check_measurable, mean_loss
from recurlm.inference.dynamic import DynamicEvaluation
from recurlm.inference.mixture import Mixture, UnigramCache, check_alike, fit_weights, losses, stored
from recurlm.inference.neural_cache import NeuralCache
from recurlm.protocol import State, StatefulModel
from recurlm.text.batches import measured_batches

STEPS = 1024
THETAS = tuple(10 ** (k / 10) for k in range(-15, 21))  # 0.03 to 100
ROUNDS = 30  # of EM, to tell candidates apart
FACTOR, LEAST = 1.5, 1e-4  # of the search for lr and decay: its steps, and the nats for which it goes on


def tuned_mixture(
    models: Mapping[str, StatefulModel],
    caches: Sequence[int],
    ids: np.ndarray,
    boundary_id: int,
    batch_size: int,
    batching: str,
    cache: CacheConfig | None = None,
    free: Collection[str] = (),
) -> tuple[StatefulModel, dict[str, float], float]:
    """(model, {part: weight}, its loss in nats a token on the held-out `ids`), the weights fitted to the ids by EM.

    `caches` are windows of a unigram cache to try; the one with the least loss is part of the mixture. With `cache` the
    first model has this neural cache; of its settings theta (the best of THETAS) and lambda (by EM, with the other weights)
    are fitted too if `free` names them. The models read the ids once. What would be one part alone is no mixture.
    """
    first, *others = models.values()
    check_alike([first, *others])
    check_measurable(ids, boundary_id, DataConfig(eval_batch_size=batch_size, batching=batching))
    steps = max(1, STEPS // batch_size)
    batches = measured_batches(ids, batching, batch_size, boundary_id, "exact", steps)
    cached = NeuralCache(first, cache) if cache else None
    thetas = () if cache is None else THETAS if "theta" in free else (cache.theta,)
    own_KN = losses([first], batches, steps) if cached is None else _cache_losses(cached, thetas, batches, steps)
    others_KN = losses(others, batches, steps) if others else own_KN[:0]
    unigrams = [UnigramCache(first.vocab_size, window, first.device) for window in caches]
    unigrams_KN = losses(unigrams, batches, steps) if unigrams else own_KN[:0]

    def rows(which: int, theta: int) -> np.ndarray:
        own = own_KN[[0]]
        if cached is not None:
            own = own_KN[[0, theta + 1]] if "lambda" in free else _mixed(cached, own_KN, theta)
        return np.concatenate((own, others_KN, unigrams_KN[which : which + 1]))

    candidates = list(itertools.product(range(max(1, len(caches))), range(max(1, len(thetas)))))
    which, theta = min(candidates, key=lambda c: fit_weights(rows(*c), ROUNDS)[1])
    weights, loss = fit_weights(rows(which, theta))
    if cached is not None:
        new = {"theta": thetas[theta]}
        if "lambda" in free:
            both = weights[0] + weights[1]
            new["lambda_"], weights = weights[1] / both if both else 0.0, [both, *weights[2:]]
        first = NeuralCache(first, dataclasses.replace(cached.config, **new))
    parts, names = (
        [first, *others, *unigrams[which : which + 1]],
        [*models, *(f"cache {n}" for n in caches[which:][:1])],
    )
    model = Mixture(parts, weights) if len(parts) > 1 else first
    return model, dict(zip(names, weights, strict=True)), loss


def _cache_losses(cached: NeuralCache, thetas: Sequence[float], batches, steps: int) -> np.ndarray:
    """nll_KN by the model, then by the cache alone under each theta."""

    def score(ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        device = cached.device
        nll_TB, cached_KTB, state = cached.parts(ids_TB.to(device), targets_TB.to(device), state, thetas)
        return torch.cat((nll_TB[None].double(), cached_KTB.double())), state

    return stored(score, cached.initial_state, batches, steps)


def _mixed(cached: NeuralCache, own_KN: np.ndarray, theta: int) -> np.ndarray:
    """nll_1N of the model with its cache, lambda as it is configured."""
    return -cached.mixed(-torch.from_numpy(own_KN[0]), -torch.from_numpy(own_KN[theta + 1])).numpy()[None]


def tuned_dynamic(
    model: StatefulModel, config: DynamicConfig, free: Collection[str], rms: Sequence[Tensor] | None, ids: np.ndarray,
    boundary_id: int,
) -> tuple[DynamicConfig, float]:  # fmt: skip
    """(the configuration with the settings that `free` names, lr and decay, searched on the held-out `ids`, its loss in nats).

    `rms` are the statistics of the model, the same for every trial.
    """
    ids = ids[: config.tune_tokens or None]
    check_measurable(ids, boundary_id, DataConfig(eval_batch_size=1))

    def loss(values: dict[str, float]) -> float:
        try:
            adapted = DynamicEvaluation(model, dataclasses.replace(config, **values), rms)
            return mean_loss(adapted, ids, boundary_id, 1, "exact")
        except RunError:  # too large a step
            return math.inf

    start = {name: settings_of(config)[name] for name in sorted(free, reverse=True)}  # lr first
    values, least = descend(loss, start, {"decay": 1.0})
    return dataclasses.replace(config, **values), least


def descend(
    loss: Callable[[dict[str, float]], float], start: Mapping[str, float], most: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """(values, loss): each value in turn multiplied or divided by FACTOR while the loss falls by LEAST, until none moves."""
    values, least, moved = dict(start), loss(dict(start)), True
    while moved:
        moved = False
        for name, step in itertools.product(start, (FACTOR, 1 / FACTOR)):
            while 0 < (new := values[name] * step) <= most.get(name, math.inf):
                found = loss(values | {name: new})
                if not found < least - LEAST:
                    break
                values[name], least, moved = new, found, True
    return values, least
