"""From counts to probabilities: interpolated modified Kneser-Ney, and three older ways to compare it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from recurlm.errors import DataError, RequestError, lookup
from recurlm.ngram.counts import Counts
from recurlm.ngram.kneser_ney import Discounts, in_logs, kneser_ney
from recurlm.ngram.trie import Allocate, Table, compiled, find, keep, renormalise, step

KATZ_LIMIT = 5  # counts above are taken as they are (Katz 1987, section IV)
STUPID_WEIGHT = 0.4  # Brants et al. 2007, section 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is estimated."""

    smoothing: str = "kneser-ney"
    cutoffs: tuple[int, ...] = ()
    """n-grams of order m that occur cutoffs[m - 1] times or fewer are left out; the last one holds for higher orders."""
    fallback: Discounts | None = None
    """Kneser-Ney: discounts of an order whose counts give none."""
    interpolate_unigrams: bool = True
    """Kneser-Ney: whether what is left of the unigrams is shared by all words, or goes to <unk>."""

    def cutoff(self, order: int) -> int:
        return self.cutoffs[min(order, len(self.cutoffs)) - 1] if self.cutoffs else 0


Estimate = tuple[Table, dict[str, Any]]


def estimate(
    counts: Counts, ids: np.ndarray, valid: np.ndarray | None, settings: Settings, allocate: Allocate = np.empty
) -> Estimate:
    """(model, facts about its estimation) of a text's counts. `ids` are the text's, `valid` held-out ids.

    ConfigError for a smoothing that is not known, RequestError for cut-offs that fall from order to order, DataError
    where the text does not suffice.
    """
    smooth = lookup(SMOOTHINGS, settings.smoothing, "smoothing")
    if any(c < 0 for c in settings.cutoffs) or list(settings.cutoffs) != sorted(settings.cutoffs):
        raise RequestError(
            f"cutoffs = {settings.cutoffs}: expected counts that do not fall from order to order, as 0,1,2."
        )
    table, facts = smooth(counts, ids, valid, settings, allocate)
    if any(settings.cutoffs):
        keep_K = np.ones(table.trie.levels[-1], np.bool_)
        for order in range(2, table.trie.order + 1):
            level = table.trie.level(order)
            keep_K[level] = counts.raw_K[level] > settings.cutoff(order)
        table = keep(table, keep_K)
        if settings.smoothing in ("katz", "jelinek-mercer"):
            renormalise(table)
    return table, facts


def _kneser_ney(
    counts: Counts, ids: np.ndarray, valid: np.ndarray | None, settings: Settings, allocate: Allocate
) -> Estimate:
    table, discounts = kneser_ney(
        counts,
        ids,
        cutoffs=[settings.cutoff(order) for order in range(1, counts.trie.order + 1)],
        fallback=settings.fallback,
        interpolate_unigrams=settings.interpolate_unigrams,
        allocate=allocate,
    )
    return table, {"discounts": [list(d) for d in discounts]}


def _known(counts: Counts, settings: Settings) -> tuple[np.ndarray, np.ndarray, float]:
    """(known_V, occurrences of words_V, their sum)."""
    n_V = counts.raw_K[: counts.trie.vocab_size].astype(np.float64)
    known_V = n_V > settings.cutoff(1)
    known_V[counts.boundary] = True
    return known_V, n_V, float(n_V.sum())


@compiled
def _discounted(first_I, raw_K, d_J, low, high, p_K):
    """Writes d(c) c(h w) / c(h); where nothing is discounted, one more is put under the line."""
    for context in range(low, high):
        begin, end = first_I[context], first_I[context + 1]
        total, left = 0.0, 0.0
        for child in range(begin, end):
            c = raw_K[child]
            total += c
            left += (1 - d_J[c]) * c if c < d_J.size else 0.0
        total += 1 if left < 1e-9 else 0
        for child in range(begin, end):
            c = raw_K[child]
            p_K[child] = (d_J[c] * c if c < d_J.size else c) / total


def good_turing(raw_N: np.ndarray) -> np.ndarray:
    """d_r for r = 0 .. k, by which a count r is multiplied (Katz 1987, equation 17).

    k is at most 5, and the largest with which all are in (0, 1].

    d_r = (r* / r - a) / (1 - a), r* = (r + 1) n_(r+1) / n_r, a = (k + 1) n_(k+1) / n_1.
    """
    n = np.bincount(raw_N[raw_N <= KATZ_LIMIT + 1].astype(np.int64), minlength=KATZ_LIMIT + 2)
    for k in range(KATZ_LIMIT, 0, -1):
        if (n[1 : k + 1] > 0).all():
            r = np.arange(1, k + 1)
            a = (k + 1) * n[k + 1] / n[1]
            with np.errstate(divide="ignore", invalid="ignore"):
                d = ((r + 1) * n[2 : k + 2] / n[1 : k + 1] / r - a) / (1 - a)
            if ((d > 0) & (d <= 1)).all():
                return np.concatenate(([1.0], d))
    return np.ones(1)


def _katz(
    counts: Counts, ids: np.ndarray, valid: np.ndarray | None, settings: Settings, allocate: Allocate
) -> Estimate:
    """Katz 1987: Good-Turing discounts, what they leave shared as the lower order says."""
    trie = counts.trie
    known_V, n_V, total = _known(counts, settings)
    p_K, backoff_I = allocate(trie.levels[-1], np.float32), allocate(trie.inner, np.float32)
    ratios = [good_turing(counts.raw_K[trie.level(order)]) for order in range(1, trie.order + 1)]
    counts_V = n_V * np.append(ratios[0], 1.0)[np.minimum(n_V, len(ratios[0])).astype(int)]
    unk = 1 - float(counts_V[known_V].sum()) / total
    if unk < 1e-9:
        total, unk = total + 1, 1 / (total + 1)
    p_K[: len(n_V)] = counts_V / total
    for order in range(2, trie.order + 1):
        _discounted(trie.first_I, counts.raw_K, ratios[order - 1], *trie.levels[order - 2 : order], p_K)
    backoff_I[:] = 1
    table = in_logs(trie, p_K, backoff_I, known_V, unk)
    renormalise(table)
    return table, {"good_turing": [d[1:].tolist() for d in ratios]}


def _stupid_backoff(
    counts: Counts, ids: np.ndarray, valid: np.ndarray | None, settings: Settings, allocate: Allocate
) -> Estimate:
    """Brants et al. 2007: relative frequencies, 0.4 for each context that was seen without the word. They do not sum to one."""
    trie = counts.trie
    known_V, n_V, total = _known(counts, settings)
    p_K, backoff_I = allocate(trie.levels[-1], np.float32), allocate(trie.inner, np.float32)
    p_K[: len(n_V)] = n_V / total
    for order in range(2, trie.order + 1):
        low, high = trie.levels[order - 2 : order]
        families = np.diff(trie.first_I[low : high + 1])
        totals = np.bincount(np.repeat(np.arange(high - low), families), counts.raw_K[trie.level(order)])
        p_K[trie.level(order)] = counts.raw_K[trie.level(order)] / np.repeat(totals, families[: len(totals)])
    backoff_I[:] = np.where(np.diff(trie.first_I) > 0, STUPID_WEIGHT, 1)
    return in_logs(trie, p_K, backoff_I, known_V, STUPID_WEIGHT / total), {"normalised": False}


BUCKETS = 32


@compiled
def _observe(walk, raw_K, low, high, boundary, ids, bucket_N, ml_N, lower_N):
    """For each id whose context of one order is known: the context's size class, c(h w) / c(h) and p(w | h'); their number."""
    words_K, first_I, links_K, log10_K, backoff_I = walk
    inner, seen = first_I.size - 1, 0
    state = np.int64(boundary)
    for w in ids:
        context = state
        while context >= high:
            context = np.int64(links_K[context])
        if context >= low:
            total = 0.0
            for child in range(first_I[context], first_I[context + 1]):
                total += raw_K[child]
            if total > 0:
                child = find(words_K, first_I[context], first_I[context + 1], w)
                bucket_N[seen] = int(np.log2(total))
                ml_N[seen] = raw_K[child] / total if child >= 0 else 0.0
                lower_N[seen] = 10.0 ** step(words_K, first_I, links_K, log10_K, backoff_I, links_K[context], w)[0]
                seen += 1
        node = step(words_K, first_I, links_K, log10_K, backoff_I, state, w)[1]
        state = np.int64(node) if node < inner else np.int64(links_K[node])
    return seen


def _weights(bucket_N: np.ndarray, ml_N: np.ndarray, lower_N: np.ndarray) -> np.ndarray:
    """For each bucket the l that makes sum log(l ml + (1 - l) lower) largest, by EM; empty buckets get their neighbours'."""
    held = np.bincount(bucket_N, minlength=BUCKETS)
    l_B = np.full(BUCKETS, 0.5)
    for _ in range(100):
        mine_N = l_B[bucket_N] * ml_N
        l_B = np.bincount(bucket_N, mine_N / (mine_N + (1 - l_B[bucket_N]) * lower_N), minlength=BUCKETS) / np.maximum(
            held, 1
        )
    filled = np.flatnonzero(held)
    return np.interp(np.arange(BUCKETS), filled, np.clip(l_B[filled], 0, 0.9999)) if filled.size else np.zeros(BUCKETS)


@compiled
def _interpolate(first_I, links_K, raw_K, l_B, low, high, log10_K, backoff_I):
    for context in range(low, high):
        total = 0.0
        for child in range(first_I[context], first_I[context + 1]):
            total += raw_K[child]
        share = l_B[int(np.log2(total))] if total > 0 else 0.0
        backoff_I[context] = np.log10(1 - share)
        for child in range(first_I[context], first_I[context + 1]):
            log10_K[child] = np.log10(
                share * raw_K[child] / total + (1 - share) * 10.0 ** np.float64(log10_K[links_K[child]])
            )


def _jelinek_mercer(
    counts: Counts, ids: np.ndarray, valid: np.ndarray | None, settings: Settings, allocate: Allocate
) -> Estimate:
    """Jelinek & Mercer 1980: p(w | h) = l c(h w) / c(h) + (1 - l) p(w | h'), with an l for each order and power of two of c(h)."""
    if valid is None or not len(valid):
        raise DataError(
            "Jelinek-Mercer takes its weights from held-out text, but the data has no valid split; add a valid.txt."
        )
    trie, valid = counts.trie, np.asarray(valid, np.int64)
    known_V, n_V, total = _known(counts, settings)
    types = int(known_V.sum()) + 1
    log10_K, backoff_I = allocate(trie.levels[-1], np.float32), allocate(trie.inner, np.float32)
    ml_V = np.where(known_V, n_V, 0) / total
    share = _weights(np.zeros(len(valid), int), ml_V[valid], np.full(len(valid), 1 / types))
    p_V = np.where(known_V, share[0] * ml_V + (1 - share[0]) / types, 0)
    unk = 1 - float(p_V.sum())
    p_V[~known_V] = unk / max(1, int((~known_V).sum()))
    log10_K[: len(p_V)] = np.log10(p_V)
    table = Table(trie, log10_K, backoff_I, known_V, float(np.log10(unk)))
    used = [share[:1].tolist()]
    bucket_N, ml_N, lower_N = np.empty(len(valid), int), np.empty(len(valid)), np.empty(len(valid))
    for order in range(2, trie.order + 1):
        low, high = trie.levels[order - 2 : order]
        seen = _observe(table.walk, counts.raw_K, low, high, counts.boundary, valid, bucket_N, ml_N, lower_N)
        share = _weights(bucket_N[:seen], ml_N[:seen], lower_N[:seen])
        _interpolate(trie.first_I, trie.links_K, counts.raw_K, share, low, high, log10_K, backoff_I)
        used.append(share.tolist())
    return table, {"weights": used}


SMOOTHINGS: dict[str, Callable[[Counts, np.ndarray, np.ndarray | None, Settings, Allocate], Estimate]] = {
    "kneser-ney": _kneser_ney,
    "katz": _katz,
    "jelinek-mercer": _jelinek_mercer,
    "stupid-backoff": _stupid_backoff,
}
