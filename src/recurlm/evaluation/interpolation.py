"""Mixtures whose weights come from held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recurlm.config import DataConfig
from recurlm.evaluation.perplexity import check_measurable
from recurlm.inference.mixture import Mixture, UnigramCache, check_alike, fit_weights, losses
from recurlm.protocol import StatefulModel
from recurlm.text.batches import measured_batches

STEPS = 1024


def tuned_mixture(
    models: Mapping[str, StatefulModel],
    caches: Sequence[int],
    ids: np.ndarray,
    boundary_id: int,
    batch_size: int,
    batching: str,
) -> tuple[Mixture, dict[str, float], float]:
    """(mixture, {model: weight}, its loss in nats a token on the held-out `ids`), the weights fitted to the ids by EM.

    `caches` are windows of a unigram cache to try; the one with the least loss is part of the mixture.
    """
    parts = list(models.values())
    check_alike(parts)
    check_measurable(ids, boundary_id, DataConfig(eval_batch_size=batch_size, batching=batching))
    steps = max(1, STEPS // batch_size)
    batches = measured_batches(ids, batching, batch_size, boundary_id, "exact", steps)
    nll_KN, best = losses(parts, batches, steps), None
    for window in caches or (0,):
        cache = [UnigramCache(parts[0].vocab_size, window, parts[0].device)] if window else []
        rows_KN = np.concatenate((nll_KN, losses(cache, batches, steps))) if cache else nll_KN
        weights, loss = fit_weights(rows_KN)
        if best is None or loss < best[2]:
            names = [*models, *([f"cache {window}"] if cache else [])]
            best = Mixture([*parts, *cache], weights), dict(zip(names, weights, strict=True)), loss
    return best  # type: ignore[return-value]
