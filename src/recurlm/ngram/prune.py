"""Entropy pruning (Stolcke 1998): a model without the n-grams that change it least."""

from __future__ import annotations

import numpy as np

from recurlm.errors import RequestError
from recurlm.ngram.trie import LEAST_MASS, Table, compiled, keep, renormalise, step


@compiled
def _history(first_I, log10_K, low, high, out_K):
    for context in range(low, high):
        for child in range(first_I[context], first_I[context + 1]):
            out_K[child] = out_K[context] + log10_K[child]


@compiled
def _mark(walk, history_K, threshold, low, high, keep_K):
    """Clears keep_K of the children, themselves without children, whose loss raises perplexity by less than the threshold."""
    words_K, first_I, links_K, log10_K, backoff_I = walk
    ln10 = np.log(10.0)
    for context in range(low, high):
        begin, end = first_I[context], first_I[context + 1]
        own, below = 1.0, 1.0
        for child in range(begin, end):
            own -= 10.0 ** np.float64(log10_K[child])
            w = np.int64(words_K[child])
            below -= 10.0 ** step(words_K, first_I, links_K, log10_K, backoff_I, links_K[context], w)[0]
        if own <= LEAST_MASS or below <= LEAST_MASS:  # nothing is left to share, so nothing can be found by sharing
            continue
        for child in range(begin, end):
            bare = True
            if child < first_I.size - 1:
                for grandchild in range(first_I[child], first_I[child + 1]):
                    bare = bare and not keep_K[grandchild]
            if not bare:
                continue
            w = np.int64(words_K[child])
            log_p = log10_K[child] * ln10
            log_lower = step(words_K, first_I, links_K, log10_K, backoff_I, links_K[context], w)[0] * ln10
            p = np.exp(log_p)
            weight, new = backoff_I[context] * ln10, np.log((own + p) / (below + np.exp(log_lower)))
            change = p * (log_lower + new - log_p) + own * (new - weight)
            if np.expm1(-(10.0 ** history_K[context]) * change) < threshold:
                keep_K[child] = False


def entropy_prune(table: Table, threshold: float) -> Table:
    """The model without the n-grams that raise its perplexity by less than the share `threshold` each (1e-8: few, 1e-6: most).

    D = -p(h) {p(w|h) [log p(w|h') + log b'(h) - log p(w|h)] + [log b'(h) - log b(h)] sum over backed-off w of p(w|h)}, where b' is
    the weight of h without the n-gram, and e^D - 1 the change of perplexity (Stolcke 1998, equation 3).
    """
    if not 0 <= threshold < 1:
        raise RequestError(f"threshold = {threshold}: expected a share from 0 to 1, such as 1e-7.")
    trie = table.trie
    history_K = np.zeros(trie.levels[-1])
    history_K[: trie.vocab_size] = table.log10_K[: trie.vocab_size]
    for order in range(1, trie.order):
        _history(trie.first_I, table.log10_K, *trie.levels[order - 1 : order + 1], history_K)
    keep_K = np.ones(trie.levels[-1], np.bool_)
    for order in range(trie.order - 1, 0, -1):
        _mark(table.walk, history_K, threshold, *trie.levels[order - 1 : order + 1], keep_K)
    pruned = keep(table, keep_K)
    renormalise(pruned)
    return pruned
