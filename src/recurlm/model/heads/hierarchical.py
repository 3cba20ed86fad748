"""The hierarchical softmax: a binary tree over the vocabulary, a decision at each inner node (Morin & Bengio 2005).

log p(w) = sum over the nodes n on the way to w of log sigmoid(+-(v_n h + b_n)), so one word costs as many products as its
code has bits: on average about the entropy of the words in a Huffman tree (Mikolov et al. 2013), log2 V in a balanced one.

The tree is canonical: codes in order of length, then of id; among the nodes of a depth the leaves come first. So the
number of codes of each length says all, and slot s of a depth is child s % 2 of inner node s // 2 of the depth before.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import embedding, logsigmoid

from recurlm.config import ModelConfig
from recurlm.errors import ConfigError
from recurlm.kernels.reference import logits
from recurlm.model.heads.base import Head, HeadDropout, Use
from recurlm.model.heads.cuts import MOST_RANKED, zipf
from recurlm.model.layers.base import uniform

ELEMENTS = {"cpu": 1 << 24}  # of gathered node vectors at once
MOST_ELEMENTS = 1 << 27  # on other devices, where each part's gradient is a whole matrix
SEARCHED = 1 << 10  # words for each of the k best, from which on searching the tree beats computing it all

Lengths = tuple[int, ...]
"""How many words have codes of 0, 1, 2, ... bits."""


def balanced(vocab_size: int) -> Lengths:
    """Codes of two neighbouring lengths at most."""
    depth = (vocab_size - 1).bit_length()
    short = 2**depth - vocab_size
    return (*(0,) * (depth - 1), short, vocab_size - short) if depth else (1,)


def huffman(counts_V: np.ndarray) -> Lengths:
    """The code lengths of a Huffman tree for these counts, by two queues: sorted leaves, and sums, which only grow."""
    leaves = np.sort(counts_V).astype(np.float64)
    V = len(leaves)
    weights, parents = np.concatenate((leaves, np.zeros(V - 1))), np.zeros(2 * V - 1, np.int64)
    leaf, inner = 0, V
    for made in range(V, 2 * V - 1):
        for _ in range(2):
            if leaf < V and (inner >= made or weights[leaf] <= weights[inner]):
                taken, leaf = leaf, leaf + 1
            else:
                taken, inner = inner, inner + 1
            weights[made] += weights[taken]
            parents[taken] = made
    depths = np.zeros(2 * V - 1, np.int64)
    for node in range(2 * V - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return tuple(np.bincount(depths[:V]).tolist())


def mean_bits(lengths: Lengths, counts_V: np.ndarray) -> float:
    """Bits of a word's code on average over a text with these counts, the first ids having the shortest codes."""
    return float(np.repeat(np.arange(len(lengths)), lengths) @ counts_V / counts_V.sum())


@functools.lru_cache(maxsize=64)
def _default(tree: str, vocab_size: int) -> Lengths:
    """Code lengths where none were given nor settled: by Zipf's law, or balanced above MOST_RANKED words."""
    return balanced(vocab_size) if tree == "balanced" or vocab_size > MOST_RANKED else huffman(zipf(vocab_size))


class Level(NamedTuple):
    """One depth of the tree: its leaves, the first of them as an id, its inner nodes, the first of them as a node."""

    leaves: int
    first_id: int
    nodes: int
    first_node: int


@functools.lru_cache(maxsize=64)
def levels(lengths: Lengths) -> tuple[Level, ...]:
    """The tree from its root on; ConfigError when these are not the code lengths of a full binary tree."""
    out, slots, ids, nodes = [], 1, 0, 0
    for leaves in lengths:
        out.append(Level(leaves, ids, slots - leaves, nodes))
        ids, nodes, slots = ids + leaves, nodes + slots - leaves, 2 * (slots - leaves)
        if slots < 0 or nodes >= 2**31:
            break
    if slots != 0:
        raise ConfigError(
            f"model.code_lengths = {list(lengths)}: not those of a full binary tree; expected n_0, n_1, ... words with "
            "codes of 0, 1, ... bits and sum n_i / 2^i = 1."
        )
    return tuple(out)


class Paths(NamedTuple):
    """For each word the nodes on its way, from the leaf up, the sign of each decision (0 beyond the root), and its bits."""

    nodes_VL: Tensor
    signs_VL: Tensor
    bits_V: Tensor


@functools.lru_cache(maxsize=4)
def paths(lengths: Lengths, device: torch.device) -> Paths:
    """The tables of a tree on a device; they are a function of the code lengths and not part of a model."""
    tree = levels(lengths)
    shape = sum(lengths), max(1, len(lengths) - 1)
    nodes_VL, signs_VL = np.zeros(shape, np.int32), np.zeros(shape, np.int8)
    for depth, level in enumerate(tree):
        slots = np.arange(level.leaves)
        words = slice(level.first_id, level.first_id + level.leaves)
        for step in range(depth):
            above = tree[depth - 1 - step]
            nodes_VL[words, step] = above.first_node + slots // 2
            signs_VL[words, step] = 1 - 2 * (slots % 2)
            slots = above.leaves + slots // 2
    bits_V = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Paths(*(torch.from_numpy(table).to(device) for table in (nodes_VL, signs_VL, bits_V)))


class HierarchicalHead(Head):
    """A logistic regression at each of the V - 1 inner nodes of a tree."""

    tied = False

    def __init__(self, vocab_size: int, hidden_size: int, lengths: Lengths, bound: float, generator: Generator):
        super().__init__()
        self.vocab_size, self.lengths = vocab_size, lengths
        self.weight = uniform((max(1, vocab_size - 1), hidden_size), bound, generator)
        self.bias = nn.Parameter(torch.zeros(max(1, vocab_size - 1)))

    @classmethod
    def build(cls, vocab_size: int, hidden_size: int, config: ModelConfig, generator: Generator) -> HierarchicalHead:
        lengths = config.code_lengths
        if lengths and sum(lengths) != vocab_size:
            raise ConfigError(
                f"model.code_lengths are for {sum(lengths):,} words, but the vocabulary has {vocab_size:,}."
            )
        if lengths:
            levels(lengths)
        return cls(vocab_size, hidden_size, lengths or _default(config.tree, vocab_size), config.init_range, generator)

    @classmethod
    def settle(cls, config: ModelConfig, hidden_size: int, use: Use) -> tuple[ModelConfig, str]:
        if config.code_lengths:
            return config, ""
        counts_V = use.counts_V()
        even = balanced(len(counts_V))
        lengths = even if config.tree == "balanced" else huffman(counts_V)
        kind = config.tree
        if mean_bits(even, counts_V) < mean_bits(lengths, counts_V):  # ids in another order than that of frequency
            lengths, kind = even, "balanced, for ids are not in order of frequency"
        note = f"tree: {kind}; {mean_bits(lengths, counts_V):.1f} bits a word, {len(lengths) - 1} at most"
        return dataclasses.replace(config, code_lengths=lengths), note

    def nll(
        self, hidden_NH: Tensor, targets_N: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None
    ) -> Tensor:
        device = hidden_NH.device
        most = ELEMENTS.get(device.type, MOST_ELEMENTS)
        tables, rows = paths(self.lengths, device), max(1, most // (len(self.lengths) * hidden_NH.shape[1]))
        along = self._along if device.type == "cpu" else self._along_padded
        given = zip(hidden_NH.split(rows), targets_N.split(rows), strict=True)
        return torch.cat([along(tables, h_RH, y_R) for h_RH, y_R in given])

    def _along(self, tables: Paths, hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
        """nll_R with every node of every way as a row: no work beyond a word's own bits."""
        signs_RL = tables.signs_VL[targets_R]
        used_RL = signs_RL != 0
        nodes_T, signs_T = tables.nodes_VL[targets_R][used_RL], signs_RL[used_RL]
        rows_T = torch.arange(len(targets_R)).repeat_interleave(tables.bits_V[targets_R])
        dtype = hidden_RH.dtype
        v_TH = embedding(nodes_T, self.weight).to(dtype)
        x_T = torch.linalg.vecdot(v_TH, hidden_RH[rows_T]) + self.bias[nodes_T].to(dtype)
        nll_T = -logsigmoid(_wide(x_T) * signs_T)
        return nll_T.new_zeros(len(targets_R)).index_add(0, rows_T, nll_T)

    def _along_padded(self, tables: Paths, hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
        """nll_R with ways of one length, the longest: shapes do not depend on the targets."""
        nodes_RL, signs_RL = tables.nodes_VL[targets_R], tables.signs_VL[targets_R]
        dtype = hidden_RH.dtype
        v_RLH = embedding(nodes_RL, self.weight).to(dtype)
        x_RL = torch.bmm(v_RLH, hidden_RH[:, :, None]).squeeze(2) + embedding(nodes_RL, self.bias[:, None]).squeeze(2)
        nll_RL = -logsigmoid(_wide(x_RL) * signs_RL)
        return torch.where(signs_RL == 0, 0, nll_RL).sum(1)

    def log_probs(self, hidden_NH: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        x_NM = logits(hidden_NH, self.weight, self.bias)
        slots_NS, out = x_NM.new_zeros(len(hidden_NH), 1), []
        for level in levels(self.lengths):
            out.append(slots_NS[:, : level.leaves])
            x_ND = x_NM[:, level.first_node : level.first_node + level.nodes]
            children = torch.stack((logsigmoid(x_ND), logsigmoid(-x_ND)), dim=2)
            slots_NS = (slots_NS[:, level.leaves :, None] + children).flatten(1)
        return torch.cat(out, dim=1)

    def topk(self, hidden_NH: Tensor, k: int, embedding_VE: Tensor) -> tuple[Tensor, Tensor]:
        """Best first from the root: a node is opened when nothing else that is left can be more probable.

        Where the words are so alike that a row would need to open many nodes, all of them are computed at once.
        """
        if hidden_NH.device.type != "cpu" or k * SEARCHED > self.vocab_size:
            return super().topk(hidden_NH, k, embedding_VE)
        found = []
        for hidden_H in hidden_NH:
            row = self._best(hidden_H, k, most=self.vocab_size // 64)
            if row is None:
                return super().topk(hidden_NH, k, embedding_VE)
            found.append(row)
        nll_NK = torch.tensor([[nll for nll, _ in row] for row in found], dtype=torch.float64).view(-1, k)
        ids_NK = torch.tensor([[word for _, word in row] for row in found], dtype=torch.long).view(-1, k)
        return -nll_NK.to(torch.promote_types(hidden_NH.dtype, torch.float32)), ids_NK

    def _best(self, hidden_H: Tensor, k: int, most: int) -> list[tuple[float, int]] | None:
        """(nll, id) of the k most probable words, best first; None when `most` nodes do not suffice."""
        tree, found = levels(self.lengths), []
        waiting = [(0.0, 0, 0)]  # nll, depth, slot
        while len(found) < k:
            nll, depth, slot = heapq.heappop(waiting)
            level = tree[depth]
            if slot < level.leaves:
                found.append((nll, level.first_id + slot))
                continue
            if not most:
                return None
            most -= 1
            at = slot - level.leaves
            node = level.first_node + at
            x = _wide(self.weight[node].to(hidden_H.dtype) @ hidden_H + self.bias[node].to(hidden_H.dtype))
            for bit, log_prob in enumerate(logsigmoid(torch.stack((x, -x))).tolist()):
                heapq.heappush(waiting, (nll - log_prob, depth + 1, 2 * at + bit))
        return found

    def sample(self, hidden_NH: Tensor, embedding_VE: Tensor, generator: Generator) -> Tensor:
        """Down from the root, a decision at each node."""
        ids_N = torch.zeros(len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
        slots_N = ids_N
        for level in levels(self.lengths):
            arrived_N = (slots_N >= 0) & (slots_N < level.leaves)
            ids_N = torch.where(arrived_N, level.first_id + slots_N, ids_N)
            at_N = slots_N - level.leaves  # below 0 for who has arrived, here or before
            node_N = (level.first_node + at_N).clamp(0, len(self.weight) - 1)
            v_NH = self.weight[node_N].to(hidden_NH.dtype)
            x_N = _wide((v_NH * hidden_NH).sum(1) + self.bias[node_N].to(hidden_NH.dtype))
            draw_N = torch.rand(len(x_N), generator=generator, device=x_N.device, dtype=x_N.dtype)
            slots_N = torch.where((slots_N >= 0) & (at_N >= 0), 2 * at_N + (draw_N >= x_N.sigmoid()), -1)
        return ids_N


def _wide(x: Tensor) -> Tensor:
    """x in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
