"""The loss of a model over a text, and what follows from it, with the counting rule in words."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recurlm.config import DataConfig
from recurlm.errors import DataError, RequestError, nearest
from recurlm.evaluation.metrics import TOP, ranks
from recurlm.protocol import StatefulModel
from recurlm.text.batches import BATCHING, Batches, measured_batches

RULES = {
    "exact": "nats summed over every token of the text, the first predicted from a boundary token, divided by their number",
    "published": "as awd-lstm-lm: the remainder and each stream's first token left out, divided by tokens, not targets",
}
_RANKED = 1 << 25  # log-probabilities held at once when ranks are asked for


@dataclass
class Totals:
    """Sums over predicted targets."""

    nats: float = 0.0
    targets: int = 0
    hits: tuple[float, ...] = (0.0,) * len(TOP)
    reciprocal_rank: float = 0.0


@torch.inference_mode()
def totals_of(model: StatefulModel, batches: Batches, steps: int, with_ranks: bool = False) -> Totals:
    """Totals over all counted targets, in windows of `steps`; the state is carried where a window goes on with one."""
    totals, state = Totals(), None
    nats = torch.zeros((), dtype=torch.float64, device=model.device)  # read at the end: no window waits for another
    for window in batches.windows(steps):
        inputs_TB, targets_TB = (torch.from_numpy(a).to(model.device) for a in (window.inputs_TB, window.targets_TB))
        if window.fresh:
            state = model.initial_state(inputs_TB.shape[1])
        mask = window.counted_TB
        counted_TB = None if mask is None else torch.from_numpy(mask).to(model.device)
        if with_ranks:
            log_probs_TBV, state = model.advance(inputs_TB, state)
            nll_TB = -log_probs_TBV.gather(-1, targets_TB[..., None]).squeeze(-1)
            rank_TB = ranks(log_probs_TBV, targets_TB)
            rank_N = rank_TB.flatten() if counted_TB is None else rank_TB[counted_TB]
            found = [float((rank_N <= k).sum()) for k in TOP]
            totals.hits = tuple(a + b for a, b in zip(totals.hits, found, strict=True))
            totals.reciprocal_rank += float(rank_N.double().reciprocal().sum())
        else:
            nll_TB, state = model.score(inputs_TB, targets_TB, state)
        nll_N = nll_TB.flatten() if counted_TB is None else nll_TB[counted_TB]
        nats += nll_N.double().sum()
        totals.targets += nll_N.numel()
    totals.nats = float(nats)
    return totals


def mean_loss(
    model: StatefulModel, ids: np.ndarray, boundary_id: int, batch_size: int, counting: str, batching: str = "stream"
) -> float:
    """Nats per token over `ids`, as training's validation needs it."""
    steps = max(1, 2048 // batch_size)
    batches = _batches(ids, boundary_id, batch_size, counting, batching, steps)
    return totals_of(model, batches, steps).nats / batches.divisor


def check_measurable(ids: np.ndarray, boundary_id: int, config: DataConfig) -> None:
    """None when `mean_loss` can measure the ids as the configuration says; RequestError or DataError otherwise."""
    _batches(ids, boundary_id, config.eval_batch_size, config.counting, config.batching, 1)


def _batches(ids: np.ndarray, boundary_id: int, batch_size: int, counting: str, batching: str, steps: int) -> Batches:
    """The batches to measure; RequestError or DataError when nothing could be measured."""
    if not 1 <= batch_size <= 65536:
        raise RequestError(f"batch_size = {batch_size}: expected 1 to 65536.")
    if counting not in RULES:
        raise RequestError(f"counting = {counting!r} is not known.{nearest(counting, RULES)}")
    if batching not in BATCHING:
        raise RequestError(f"batching = {batching!r} is not known.{nearest(batching, BATCHING)}")
    if batching != "stream" and counting != "exact":
        raise RequestError(f"counting = {counting!r} is a rule for one stream; take batching = 'stream' with it.")
    batches = measured_batches(ids, batching, batch_size, boundary_id, counting, steps)
    if batches.length < 1:
        raise DataError(
            f"A text of {len(ids):,} tokens is too short to measure in {batch_size} streams; take a smaller batch size."
        )
    return batches


def evaluate_ids(
    model: StatefulModel,
    ids: np.ndarray,
    boundary_id: int,
    counts: dict[str, int],
    batch_size: int,
    counting: str,
    with_ranks: bool,
    batching: str = "stream",
) -> dict[str, Any]:
    """Metrics of the model on one text: loss_nats, ppl, ppl_word, bpc, bpb, tokens_per_s, with ranks top-k and mrr.

    `counts` are the text's own numbers of words (line ends counted), characters and bytes.
    """
    start = time.perf_counter()
    rows = max(1, batch_size)
    steps = 1024 // rows + 1
    if with_ranks:
        steps = max(1, min(steps, _RANKED // (rows * model.vocab_size)))
    batches = _batches(ids, boundary_id, batch_size, counting, batching, steps)
    totals = totals_of(model, batches, steps, with_ranks)
    loss = totals.nats / batches.divisor
    text_nats = loss * len(ids)  # the whole text's, also under the published rule
    out: dict[str, Any] = {
        "loss_nats": loss,
        "ppl": math.exp(min(loss, 700)),
        "ppl_word": math.exp(min(text_nats / max(1, counts["words"]), 700)),
        "bpc": text_nats / math.log(2) / max(1, counts["characters"]),
        "bpb": text_nats / math.log(2) / max(1, counts["bytes"]),
    }
    if with_ranks:
        targets = max(1, totals.targets)
        out |= {f"top{k}": hit / targets for k, hit in zip(TOP, totals.hits, strict=True)}
        out["mrr"] = totals.reciprocal_rank / targets
    out |= {
        "targets": totals.targets,
        "batch_size": batch_size,
        "batching": batching,
        "counting": counting,
        "rule": RULES[counting],
    }
    out["tokens_per_s"] = totals.targets / max(1e-9, time.perf_counter() - start)
    return out
