"""N-grams in flat arrays: a trie that is walked as an automaton.

A node is an n-gram; the root, the empty one, is -1. Nodes lie order by order, inside an order by their words, so the
children of a node (the n-grams that are one word longer) are neighbours. Node w < V is the unigram w. The link of a
node is its longest proper suffix that is a node too (Aho & Corasick 1975): what is left of a context when it is forgotten
from its far end. The boundary id ends a line as a word, and begins one as a context.

Shapes: K nodes, I inner nodes (all but those of the highest order), V words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numba
import numpy as np

ROOT = -1
MOST_NODES = 2**31 - 1
LOG10_ZERO = -100.0  # of what cannot be: a probability that a file does not give

Allocate = Callable[[int, Any], np.ndarray]
"""An uninitialised array of (size, dtype): np.empty, or one that lies in a file."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at first use, and kept on disk where that is possible."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for it can be written
        return numba.njit(**options)(function)


@final
@dataclass(frozen=True)
class Trie:
    """Which n-grams there are. The nodes of order m are levels[m - 1] to levels[m]."""

    levels: tuple[int, ...]
    words_K: np.ndarray
    """Last words, uint16 or uint32."""
    first_I: np.ndarray
    """First children, int32; one entry more than inner nodes, so that [c] and [c + 1] enclose the children of c."""
    links_K: np.ndarray
    """Links, int32."""

    @property
    def order(self) -> int:
        return len(self.levels) - 1

    @property
    def inner(self) -> int:
        return self.levels[-2]

    @property
    def vocab_size(self) -> int:
        return self.levels[1]

    def level(self, order: int) -> slice:
        """The nodes of that order."""
        return slice(self.levels[order - 1], self.levels[order])

    def node(self, ids: list[int]) -> int:
        """The node of exactly these ids; ROOT when there is none."""
        at = ids[0]
        for w in ids[1:]:
            at = int(find(self.words_K, self.first_I[at], self.first_I[at + 1], w)) if 0 <= at < self.inner else ROOT
        return at


@final
@dataclass(frozen=True)
class Table:
    """A back-off model: log10 p of every n-gram given its context, log10 back-off weights of every context.

    p(w | h) is that of the longest suffix of h w that is a node, times the weights of the longer contexts that are.
    """

    trie: Trie
    log10_K: np.ndarray
    """float32; of a word that the model does not know its share of p(<unk>)."""
    backoff_I: np.ndarray
    """float32."""
    known_V: np.ndarray
    """Whether the model has the word (as a word, not only as a context)."""
    unk_log10: float
    """log10 p(<unk>), which all unknown words share."""

    @property
    def walk(self) -> tuple[np.ndarray, ...]:
        """What compiled functions take to walk it: read-only, so that one compilation serves arrays in memory and in files."""
        t = self.trie
        arrays = [a.view() for a in (t.words_K, t.first_I, t.links_K, self.log10_K, self.backoff_I)]
        for array in arrays:
            array.flags.writeable = False
        return tuple(arrays)


def word_dtype(vocab_size: int) -> Any:
    """The type of a word in a trie, one value more than words."""
    return np.uint16 if vocab_size < 1 << 16 else np.uint32


@compiled
def find(words_K, low, high, w):
    """The place of w among the sorted words[low:high]; -1 when it is not there."""
    end = high
    while low < high:
        middle = (low + high) >> 1
        if words_K[middle] < w:
            low = middle + 1
        else:
            high = middle
    return low if low < end and words_K[low] == w else -1


@compiled
def step(words_K, first_I, links_K, log10_K, backoff_I, context, w):
    """(log10 p(w | context), the node that w was found at). The next context: `after` that node."""
    weight = 0.0
    while context >= 0:
        node = find(words_K, first_I[context], first_I[context + 1], w)
        if node >= 0:
            return weight + log10_K[node], node
        weight += backoff_I[context]
        context = links_K[context]
    return weight + log10_K[w], np.int64(w)


@compiled
def after(links_K, inner, node):
    """The context that a node is for the word after it."""
    return np.int64(node) if node < inner else np.int64(links_K[node])


@compiled
def _link(words_K, first_I, links_K, low, high):
    for parent in range(low, high):
        begin, end = first_I[parent], first_I[parent + 1]
        if begin == end:
            continue
        above = links_K[parent]
        start = first_I[above] if above >= 0 else 0
        for child in range(begin, end):
            w = np.int64(words_K[child])
            context, found = above, w
            while context >= 0:
                # Both families are sorted, so what the last child was beyond, the next one is too.
                node = find(words_K, start if context == above else first_I[context], first_I[context + 1], w)
                if node >= 0:
                    found = np.int64(node)
                    if context == above:
                        start = node + 1
                    break
                context = links_K[context]
            links_K[child] = found


def link(levels: tuple[int, ...], words_K: np.ndarray, first_I: np.ndarray, allocate: Allocate = np.empty) -> Trie:
    """The Trie of these nodes, its links found order by order."""
    links_K = allocate(levels[-1], np.int32)
    links_K[: levels[1]] = ROOT
    for order in range(1, len(levels) - 1):
        _link(words_K, first_I, links_K, levels[order - 1], levels[order])
    return Trie(levels, words_K, first_I, links_K)


def keep(table: Table, keep_K: np.ndarray) -> Table:
    """The model with these nodes alone. Unigrams stay, and no node may lose the one that it is a child of."""
    trie = table.trie
    keep_K = keep_K.copy()
    keep_K[: trie.vocab_size] = True
    place_K = np.cumsum(keep_K, dtype=np.int64)  # nodes kept up to and with each
    total = np.concatenate(([0], place_K))
    levels = [int(total[level]) for level in trie.levels]
    while len(levels) > 2 and levels[-1] == levels[-2]:  # an order of which nothing is left
        levels.pop()
    inner = levels[-2]
    inner_K = keep_K[: trie.inner].copy()
    inner_K[np.flatnonzero(inner_K)[inner:]] = False
    first_I = np.append(total[trie.first_I[:-1][inner_K]], levels[-1]).astype(np.int32)
    words_K = trie.words_K[keep_K]
    return Table(
        link(tuple(levels), words_K, first_I),
        table.log10_K[keep_K],
        table.backoff_I[inner_K],
        table.known_V,
        table.unk_log10,
    )


@compiled
def _sums(words_K, first_I, links_K, log10_K, backoff_I, low, high, own, below):
    for context in range(low, high):
        mine, lower = 0.0, 0.0
        for child in range(first_I[context], first_I[context + 1]):
            w = np.int64(words_K[child])
            mine += 10.0 ** np.float64(log10_K[child])
            lower += 10.0 ** step(words_K, first_I, links_K, log10_K, backoff_I, links_K[context], w)[0]
        own[context - low], below[context - low] = mine, lower


def sums(table: Table, order: int) -> tuple[np.ndarray, np.ndarray]:
    """For each context of that order the sum of its children's p, and of what p would be without this context."""
    low, high = table.trie.levels[order - 1 : order + 1]
    own, below = np.zeros(high - low), np.zeros(high - low)
    _sums(*table.walk, low, high, own, below)
    return own, below


LEAST_MASS = 1e-7  # what float32 probabilities leave of a sum that is one


def renormalise(table: Table) -> None:
    """None; sets the back-off weights so that all probabilities of each context sum to one, as far as anything is left to share."""
    with np.errstate(divide="ignore", invalid="ignore"):
        for order in range(1, table.trie.order):
            own, below = sums(table, order)
            left, share = 1 - own, 1 - below
            weight = np.where((left > LEAST_MASS) & (share > LEAST_MASS), np.log10(left / share), LOG10_ZERO)
            has_children = np.diff(table.trie.first_I)[table.trie.level(order)] > 0
            table.backoff_I[table.trie.level(order)] = np.where(has_children, weight, 0)
