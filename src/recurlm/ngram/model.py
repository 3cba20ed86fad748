"""An n-gram model as a language model: the protocol of `recurlm.protocol` over a Table."""

from __future__ import annotations

import math
from typing import final

import numpy as np
import torch
from torch import Tensor

from recurlm.errors import RequestError
from recurlm.ngram.trie import ROOT, Table, after, compiled, step
from recurlm.protocol import State, StatefulModel

LN10 = math.log(10)


@compiled
def _score(walk, states_B, ids_TB, targets_TB, nll_TB):
    words_K, first_I, links_K, log10_K, backoff_I = walk
    inner, steps = first_I.size - 1, ids_TB.shape[0]
    for b in range(ids_TB.shape[1]):
        state, known = states_B[b], False
        for t in range(steps):
            if not known:
                node = step(words_K, first_I, links_K, log10_K, backoff_I, state, ids_TB[t, b])[1]
                state = after(links_K, inner, node)
            log10, node = step(words_K, first_I, links_K, log10_K, backoff_I, state, targets_TB[t, b])
            nll_TB[t, b] = -log10 * LN10
            known = t + 1 < steps and ids_TB[t + 1, b] == targets_TB[t, b]
            if known:  # as in any text: what was predicted is read next
                state = after(links_K, inner, node)
        states_B[b] = state


@compiled
def _distribution(walk, state, out_V):
    """Writes ln p of every word after a context: shorter contexts first, longer ones over them."""
    words_K, first_I, links_K, log10_K, backoff_I = walk
    contexts, weights, size = np.empty(64, np.int64), np.empty(64), 0
    weight = 0.0
    while state >= 0:
        contexts[size], weights[size] = state, weight
        weight += backoff_I[state]
        state = np.int64(links_K[state])
        size += 1
    for w in range(out_V.size):
        out_V[w] = (log10_K[w] + weight) * LN10
    for place in range(size - 1, -1, -1):
        context = contexts[place]
        for child in range(first_I[context], first_I[context + 1]):
            out_V[words_K[child]] = (log10_K[child] + weights[place]) * LN10


@compiled
def _advance(walk, states_B, ids_TB, out_TBV):
    words_K, first_I, links_K, log10_K, backoff_I = walk
    inner = first_I.size - 1
    for b in range(ids_TB.shape[1]):
        for t in range(ids_TB.shape[0]):
            node = step(words_K, first_I, links_K, log10_K, backoff_I, states_B[b], ids_TB[t, b])[1]
            states_B[b] = after(links_K, inner, node)
            if out_TBV.shape[2]:
                _distribution(walk, states_B[b], out_TBV[t, b])


@compiled
def _trace(walk, state, ids_T, log10_T, nodes_T):
    words_K, first_I, links_K, log10_K, backoff_I = walk
    inner, total = first_I.size - 1, 0.0
    for t in range(ids_T.size):
        log10_T[t], nodes_T[t] = step(words_K, first_I, links_K, log10_K, backoff_I, state, ids_T[t])
        total += log10_T[t]
        state = after(links_K, inner, nodes_T[t])
    return total


@final
class NgramModel(StatefulModel):
    """A back-off model. A state is the node of the longest context that the model knows, one int64 a row; -1 is none.

    A line's end is read as the begin of the next, so no n-gram reaches over it.
    """

    def __init__(self, table: Table):
        self.table, self.vocab_size = table, table.trie.vocab_size
        self._walk = table.walk

    @property
    def order(self) -> int:
        return self.table.trie.order

    def initial_state(self, batch: int) -> State:
        return torch.full((batch,), ROOT)

    def advance(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        ids, states_B = self._checked(ids_TB), state.numpy().copy()
        out_TBV = np.empty((*ids.shape, self.vocab_size), np.float32)
        _advance(self._walk, states_B, ids, out_TBV)
        return torch.from_numpy(out_TBV), torch.from_numpy(states_B)

    def score(self, ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        ids, targets, states_B = self._checked(ids_TB), self._checked(targets_TB), state.numpy().copy()
        nll_TB = np.empty(ids.shape)
        _score(self._walk, states_B, ids, targets, nll_TB)
        return torch.from_numpy(nll_TB), torch.from_numpy(states_B)

    def trace(self, ids: np.ndarray, context: int) -> tuple[float, np.ndarray, np.ndarray]:
        """(log10 p of the ids, log10 p of each, the node at which each was found) after a word that is a context."""
        ids_T = self._checked(torch.from_numpy(np.asarray(ids, np.int64)))
        log10_T, nodes_T = np.empty(len(ids_T)), np.empty(len(ids_T), np.int64)
        state = context if self.order > 1 else ROOT
        return _trace(self._walk, state, ids_T, log10_T, nodes_T), log10_T, nodes_T

    def matched(self, nodes: np.ndarray) -> np.ndarray:
        """The length of the n-gram of each node; 0 for a word that the model does not know."""
        lengths = np.searchsorted(self.table.trie.levels, nodes, side="right")
        lengths[(lengths == 1) & ~self.table.known_V[np.minimum(nodes, self.vocab_size - 1)]] = 0
        return lengths

    def _checked(self, ids: Tensor) -> np.ndarray:
        """The ids as an array; RequestError for one that is no word, which compiled code would not notice."""
        out = ids.numpy()
        if out.size and not (out.min() >= 0 and out.max() < self.vocab_size):
            raise RequestError(f"A token id is outside this model's vocabulary, 0 to {self.vocab_size - 1}.")
        return np.ascontiguousarray(out)
