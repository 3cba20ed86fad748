"""Interpolated modified Kneser-Ney smoothing (Chen & Goodman 1999, section 3; Heafield et al. 2013 for what is counted)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from recurlm.errors import DataError
from recurlm.ngram.counts import Counts
from recurlm.ngram.trie import LOG10_ZERO, Allocate, Table, Trie, compiled

FALLBACK = (0.5, 1.0, 1.5)
Discounts = tuple[float, float, float]


@compiled
def _add_one(links, base, totals):
    for node in links:
        totals[node - base] += 1


def adjusted_counts(counts: Counts, allocate: Allocate = np.empty) -> np.ndarray:
    """a_K: the number of distinct words before an n-gram.

    Of the highest order, and of n-grams that begin a line, the number of occurrences.
    """
    trie = counts.trie
    a_K = allocate(trie.levels[-1], np.uint32)
    a_K[trie.level(trie.order)] = counts.raw_K[trie.level(trie.order)]
    low, high = counts.boundary, counts.boundary + 1  # the n-grams of this order that begin a line
    for order in range(1, trie.order):
        a_K[trie.level(order)] = 0
        _add_one(trie.links_K[trie.level(order + 1)], trie.levels[order - 1], a_K[trie.level(order)])
        if order > 1:  # the unigram of the boundary is the word that ends a line
            a_K[low:high] = counts.raw_K[low:high]
        low, high = int(trie.first_I[low]), int(trie.first_I[high])
    return a_K


def last_suffixes(ids: np.ndarray, counts: Counts) -> list[int]:
    """For each order below the highest the node that is last when n-grams are sorted by their last word, then the one before, ...

    Words are ordered by their first occurrence, after the boundary. ROOT (-1) where the n-gram would begin before its line.
    """
    trie, boundary = counts.trie, counts.boundary
    when_V = np.full(trie.vocab_size, len(ids))
    for start in range(0, len(ids), 1 << 22):
        seen, at = np.unique(ids[start : start + (1 << 22)], return_index=True)
        when_V[seen] = np.minimum(when_V[seen], at + start)
    when_V[boundary] = -1
    when_V[when_V == len(ids)] = -2  # never
    newest = int(when_V.argmax())
    ends = [
        p for s in range(0, len(ids), 1 << 22) for p in (np.flatnonzero(ids[s : s + (1 << 22)] == newest) + s).tolist()
    ]
    suffix, out = [newest], [newest]
    for back in range(1, trie.order - 1):
        if suffix[0] == boundary:
            out.append(-1)
            continue
        before = [int(ids[p - back]) if p >= back else boundary for p in ends]
        latest = max(before, key=lambda w: when_V[w])
        ends = [p for p, w in zip(ends, before, strict=True) if w == latest]
        suffix = [latest, *suffix]
        out.append(trie.node(suffix))
    return out


@compiled
def _count_counts(a_K, n_J):
    for a in a_K:
        if a < n_J.size:
            n_J[a] += 1


def discounts(
    a_K: np.ndarray, order: int, fallback: Discounts | None, corrected: tuple[int, int] | None = None
) -> Discounts:
    """(D1, D2, D3+) of an order's adjusted counts: D_j = j - (j + 1) Y n_(j+1) / n_j, Y = n1 / (n1 + 2 n2).

    `corrected` is (a count that enters, the one instead of which it does). Where some n_j is 0 or a D_j is not in
    [0, j]: `fallback`, or DataError without.
    """
    n = np.zeros(5, np.int64)
    _count_counts(a_K, n)
    if corrected is not None:
        enters, leaves = (min(c, 5) for c in corrected)
        n = np.append(n, 0)
        n[enters] += 1
        n[leaves] -= 1
    if n[1] and n[2] and n[3]:
        y = n[1] / (n[1] + 2 * n[2])
        d = [float(j - (j + 1) * y * n[j + 1] / n[j]) for j in (1, 2, 3)]
        if all(0 <= d[j - 1] <= j for j in (1, 2, 3)):
            return d[0], d[1], d[2]
    if fallback is not None:
        return fallback
    raise DataError(
        f"Kneser-Ney cannot estimate its discounts for order {order}: {n[1]:,}, {n[2]:,}, {n[3]:,} and {n[4]:,} n-grams have the "
        "counts 1, 2, 3 and 4, and all are needed in natural proportions. Take more text, a lower --order, or fixed "
        "discounts with --discount-fallback."
    )


@compiled
def _smooth(first_I, links_K, a_K, raw_K, cutoff, d_J, low, high, p_K, backoff_I):
    for context in range(low, high):
        begin, end = first_I[context], first_I[context + 1]
        total, left = 0.0, 0.0
        for child in range(begin, end):
            total += a_K[child]
            left += d_J[min(a_K[child], 3)] if raw_K[child] > cutoff else a_K[child]
        gamma = left / total if begin < end else 1.0
        backoff_I[context] = gamma
        for child in range(begin, end):
            p_K[child] = (a_K[child] - d_J[min(a_K[child], 3)]) / total + gamma * p_K[links_K[child]]


def kneser_ney(
    counts: Counts,
    ids: np.ndarray,
    *,
    cutoffs: Sequence[int] = (),
    fallback: Discounts | None = None,
    interpolate_unigrams: bool = True,
    allocate: Allocate = np.empty,
) -> tuple[Table, list[Discounts]]:
    """(model, discounts of each order) of a text's counts; `ids` are the text's own.

    p(w | h) = (a(h w) - D(a)) / sum_w a(h w) + gamma(h) p(w | h'), h' = h without its first word. n-grams that occur no more
    than `cutoffs[order - 1]` times (none given: 0) go into gamma; the model that comes back still holds them. The unigrams are
    interpolated with a uniform distribution over the words and <unk>, or else <unk> gets all that discounting leaves.
    """
    trie, cut = counts.trie, cutoffs or [0] * counts.trie.order
    a_K = adjusted_counts(counts, allocate)
    found: list[Discounts] = []
    odd = last_suffixes(ids, counts)
    for order in range(1, trie.order + 1):
        node = odd[order - 1] if order < trie.order else -1
        corrected = None if node < 0 else (int(counts.raw_K[node]), int(a_K[node]))
        found.append(discounts(a_K[trie.level(order)], order, fallback, corrected))
    p_K, backoff_I = allocate(trie.levels[-1], np.float32), allocate(trie.inner, np.float32)
    known_V, unk = _unigrams(counts, a_K[: trie.vocab_size], cut[0], found[0], interpolate_unigrams, p_K)
    for order in range(2, trie.order + 1):
        d_J = np.array([0, *found[order - 1]])
        span = trie.levels[order - 2 : order]
        _smooth(trie.first_I, trie.links_K, a_K, counts.raw_K, cut[order - 1], d_J, *span, p_K, backoff_I)
    return in_logs(trie, p_K, backoff_I, known_V, unk), found


def _unigrams(
    counts: Counts, a_V: np.ndarray, cutoff: int, d: Discounts, interpolate: bool, p_K: np.ndarray
) -> tuple[np.ndarray, float]:
    """Writes p of the unigrams; (known_V, p(<unk>))."""
    a_V = a_V.astype(np.float64)
    known_V = (a_V > 0) & (counts.raw_K[: len(a_V)] > cutoff)
    known_V[counts.boundary] = True
    off_V = np.array([0, *d])[np.minimum(a_V, 3).astype(int)]
    gamma = float((off_V[known_V].sum() + a_V[~known_V].sum()) / a_V.sum())
    unk = gamma / (int(known_V.sum()) + 1) if interpolate else gamma
    p_K[: len(a_V)] = (a_V - off_V) / a_V.sum() + (unk if interpolate else 0.0)
    return known_V, unk


def in_logs(trie: Trie, p_K: np.ndarray, backoff_I: np.ndarray, known_V: np.ndarray, unk: float) -> Table:
    """The Table of these probabilities and weights, which are turned into logarithms in place; unknown words share `unk`."""
    p_K[: len(known_V)][~known_V] = unk / max(1, np.count_nonzero(~known_V))
    for start in range(0, len(p_K), 1 << 22):  # in parts, for the temporaries
        for values in (p_K[start : start + (1 << 22)], backoff_I[start : start + (1 << 22)]):
            with np.errstate(divide="ignore"):
                np.log10(values, out=values)
            np.maximum(values, LOG10_ZERO, out=values)
    np.minimum(p_K, 0, out=p_K)
    return Table(trie, p_K, backoff_I, known_V, math.log10(unk) if unk > 0 else LOG10_ZERO)
