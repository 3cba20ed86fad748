"""Small texts as ids, and n-gram models in plain Python to compare with."""

from collections import Counter
from pathlib import Path

import numpy as np

from recurlm.ngram.counts import count
from recurlm.ngram.model import NgramModel
from recurlm.ngram.smoothing import Settings, estimate
from recurlm.ngram.trie import Table

GOLDEN = Path(__file__).parents[1] / "golden" / "kenlm"
BOUNDARY = 0
FALLBACK = (0.5, 1.0, 1.5)


def random_ids(seed: int, tokens: int, vocab_size: int) -> np.ndarray:
    """A text of frequent and rare words, and of lines of any length, empty ones too."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.geometric(0.2, tokens) - 1, vocab_size - 1)


def lines_of(ids: np.ndarray) -> list[list[int]]:
    """The lines with their ends."""
    out, line = [], []
    for id in [*ids.tolist(), *([] if len(ids) and ids[-1] == BOUNDARY else [BOUNDARY])]:
        line.append(id)
        if id == BOUNDARY:
            out.append(line)
            line = []
    return out


def occurrences(ids: np.ndarray, order: int) -> Counter[tuple[int, ...]]:
    """How often each n-gram of up to `order` words occurs; a line begins with the boundary."""
    found: Counter[tuple[int, ...]] = Counter()
    for line in lines_of(ids):
        padded = [BOUNDARY, *line]
        for n in range(1, order + 1):
            found.update(tuple(padded[i : i + n]) for i in range(len(padded) - n + 1) if n > 1 or i)
    return found


def model_of(
    ids: np.ndarray, vocab_size: int, order: int, settings: Settings = Settings(fallback=FALLBACK)
) -> NgramModel:
    table, _ = estimate(count(ids, vocab_size, BOUNDARY, order), ids, ids, settings)
    return NgramModel(table)


def nodes(table: Table) -> dict[tuple[int, ...], int]:
    """Every n-gram of a model and its node."""
    trie, out = table.trie, {(w,): w for w in range(table.trie.vocab_size)}
    for order in range(1, trie.order):
        for ngram in [g for g in out if len(g) == order]:
            c = out[ngram]
            for child in range(trie.first_I[c], trie.first_I[c + 1]):
                out[*ngram, int(trie.words_K[child])] = child
    return out


def log10_p(table: Table, ngrams: dict[tuple[int, ...], int], history: list[int], word: int) -> float:
    """log10 p(word | history) by the definition of back-off, the longest context first."""
    context = tuple(history[-(table.trie.order - 1) :]) if table.trie.order > 1 else ()
    for at in range(len(context)):  # no n-gram reaches over a line's begin
        if BOUNDARY in context[at + 1 :]:
            continue
        h = context[at:]
        if (*h, word) in ngrams:
            return float(table.log10_K[ngrams[*h, word]]) + weights(table, ngrams, context[:at], h)
    return float(table.log10_K[word]) + weights(table, ngrams, context, ())


def weights(table: Table, ngrams: dict[tuple[int, ...], int], lost: tuple[int, ...], h: tuple[int, ...]) -> float:
    """The sum of the back-off weights of the contexts that are longer than h."""
    total, whole = 0.0, (*lost, *h)
    for at in range(len(lost)):
        context = whole[at:]
        if context in ngrams and ngrams[context] < table.trie.inner and BOUNDARY not in context[1:]:
            total += float(table.backoff_I[ngrams[context]])
    return total
