"""The adaptive softmax (Grave et al. 2016): a shortlist of frequent words, and clusters of rarer ones behind one logit each.

log p(w) = log softmax of the shortlist at w, or at w's cluster plus log softmax of the cluster at w. Ids in order of
frequency make it fast, as tokenizers of words and characters number them; with any other order it is as exact.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from recurlm import kernels
from recurlm.config import ModelConfig
from recurlm.kernels.reference import linear_log_softmax
from recurlm.model.embedding import AdaptiveEmbedding
from recurlm.model.heads import cuts
from recurlm.model.heads.base import Head, HeadDropout, Use, check_tied
from recurlm.model.layers.base import uniform

MULTIPLE = 8  # of features: 16 bytes in bf16
SHORTLIST = 0.8  # of the text that keeps all features; cost alone would make it a few dozen words


class Cluster(NamedTuple):
    """A softmax over some words: features of hidden rows, and the weights that multiply them."""

    features: Callable[[Tensor], Tensor]
    weight_VF: Tensor
    bias_V: Tensor


class Clusters(NamedTuple):
    """The shortlist, with a logit for each tail cluster behind its words, and the tails; bounds 0, ..., V of their ids."""

    bounds: tuple[int, ...]
    short: Cluster
    tails: list[Cluster]


def _log_softmax(cluster: Cluster, hidden_NH: Tensor) -> Tensor:
    return linear_log_softmax(cluster.features(hidden_NH), cluster.weight_VF, cluster.bias_V)


def _cluster_of(ids_N: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """0 for words of the shortlist, k for those of tail k; without a table that would have to reach the device."""
    out_N = torch.zeros_like(ids_N)
    for cut in bounds[1:-1]:
        out_N += ids_N >= cut
    return out_N


def clusters_nll(parts: Clusters, hidden_NH: Tensor, targets_N: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
    """nll_N: that in the shortlist, and for words of a tail that within the tail; `features` of the tails if they are known."""
    bounds, short, tails = parts.bounds, parts.short, parts.tails
    short_N = torch.where(targets_N < bounds[1], targets_N, bounds[1] - 1 + _cluster_of(targets_N, bounds))
    nll_N = kernels.linear_cross_entropy(short.features(hidden_NH), short.weight_VF, short.bias_V, short_N)
    if not tails:
        return nll_N
    features = features or [tail.features(hidden_NH) for tail in tails]
    weights, biases = [tail.weight_VF for tail in tails], [tail.bias_V for tail in tails]
    return nll_N + kernels.cluster_cross_entropies(features, weights, biases, targets_N, bounds[1:-1])


def clusters_log_probs(parts: Clusters, hidden_NH: Tensor) -> Tensor:
    """log_probs_NV."""
    short_NS, first = _log_softmax(parts.short, hidden_NH), parts.bounds[1]
    tails = [_log_softmax(tail, hidden_NH) + short_NS[:, first + k, None] for k, tail in enumerate(parts.tails)]
    return torch.cat((short_NS[:, :first], *tails), dim=1)


def clusters_topk(parts: Clusters, hidden_NH: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(log_probs_NK, ids_NK): a tail is looked into only for rows where all of it could be better than the k-th so far."""
    short_NS, first = _log_softmax(parts.short, hidden_NH), parts.bounds[1]
    values_NK, ids_NK = short_NS[:, :first].topk(min(k, first))
    missing = k - values_NK.shape[1]
    values_NK = torch.nn.functional.pad(values_NK, (0, missing), value=-math.inf)
    ids_NK = torch.nn.functional.pad(ids_NK, (0, missing))
    for n, tail in enumerate(parts.tails):
        rows = (short_NS[:, first + n] > values_NK[:, -1]).nonzero().squeeze(1)
        inside_RV = _log_softmax(tail, hidden_NH[rows]) + short_NS[rows, first + n, None]
        best_RK, at_RK = inside_RV.topk(min(k, inside_RV.shape[1]))
        both, ids = torch.cat((values_NK[rows], best_RK), 1), torch.cat((ids_NK[rows], at_RK + parts.bounds[n + 1]), 1)
        best_RK, at_RK = both.topk(k)
        values_NK[rows], ids_NK[rows] = best_RK, ids.gather(1, at_RK)
    return values_NK, ids_NK


def clusters_sample(parts: Clusters, hidden_NH: Tensor, generator: Generator) -> Tensor:
    """ids_N: a word of the shortlist or a tail is drawn, then a word of that tail."""

    def draw(cluster: Cluster, rows_NH: Tensor) -> Tensor:
        return _log_softmax(cluster, rows_NH).exp().multinomial(1, generator=generator).squeeze(1)

    ids_N = draw(parts.short, hidden_NH)
    tail_N = ids_N - parts.bounds[1]
    for k, tail in enumerate(parts.tails):
        rows = (tail_N == k).nonzero().squeeze(1)
        if len(rows):
            ids_N[rows] = draw(tail, hidden_NH[rows]) + parts.bounds[k + 1]
    return ids_N


def _best_cuts(counts_V: np.ndarray, sizes: tuple[int, ...], rows: int, device: str) -> tuple[int, ...]:
    """The cheapest cut points, among those that leave most of the text all features."""
    least = SHORTLIST if sizes[1] < sizes[0] else 0.0
    return cuts.best_cuts(counts_V, sizes.__getitem__, rows, device, least)


@functools.lru_cache(maxsize=64)
def _default_cuts(vocab_size: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Cut points where none were given nor settled: for Zipf's law, at most MOST_RANKED words, 1,024 rows and the CPU."""
    return _best_cuts(cuts.zipf(min(vocab_size, cuts.MOST_RANKED)), sizes, 1024, "cpu")


def _bounds(config: ModelConfig, vocab_size: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return cuts.bounds(config.cutoffs or _default_cuts(vocab_size, sizes), vocab_size)


def _settled(config: ModelConfig, sizes: tuple[int, ...], use: Use) -> tuple[ModelConfig, str]:
    """The settings with the cut points of least cost written out: (V,) where one softmax over all words is best."""
    if config.cutoffs:
        return config, ""
    counts_V = use.counts_V()
    V, costs = len(counts_V), cuts.COSTS[use.device]
    best = _best_cuts(counts_V, sizes, use.rows, use.device)
    now, full = (cuts.expected_cost(counts_V, c, sizes.__getitem__, use.rows, costs) for c in (best, ()))
    note = f"cut points {', '.join(map('{:,}'.format, best)) or 'none'}: by the frequency table and the cost model of "
    note += f"{'a GPU' if use.device == 'cuda' else 'the CPU'} the output layer takes {now / full:.0%} of a full softmax's time"
    return dataclasses.replace(config, cutoffs=best or (V,)), note


def tail_sizes(hidden_size: int, div: float) -> tuple[int, ...]:
    """Features of the shortlist and of as many tails as there may be: H / div^k, rounded up to a multiple of 8, at most H."""
    sizes = (max(1, math.ceil(hidden_size / div**k / MULTIPLE)) * MULTIPLE for k in range(1, 257))
    return (hidden_size, *(min(hidden_size, size) for size in sizes))


class AdaptiveHead(Head):
    """Tails with projections: softmax(W_k P_k h + b_k), where P_k makes the rows of rarer words smaller."""

    tied = False

    def __init__(self, bounds: tuple[int, ...], sizes: tuple[int, ...], bound: float, generator: Generator):
        super().__init__()
        self.bounds, H = bounds, sizes[0]
        shortlist = bounds[1] + len(bounds) - 2
        self.weight, self.bias = uniform((shortlist, H), bound, generator), nn.Parameter(torch.zeros(shortlist))
        tails = [(last - first, F) for first, last, F in zip(bounds[1:], bounds[2:], sizes[1:], strict=False)]
        self.projections = nn.ParameterList(uniform((F, H), 1 / math.sqrt(H), generator) for _, F in tails)
        self.weights = nn.ParameterList(uniform(shape, bound, generator) for shape in tails)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(V)) for V, _ in tails)

    @classmethod
    def build(cls, vocab_size: int, hidden_size: int, config: ModelConfig, generator: Generator) -> AdaptiveHead:
        sizes = tail_sizes(hidden_size, config.div)
        return cls(_bounds(config, vocab_size, sizes), sizes, config.init_range, generator)

    @classmethod
    def settle(cls, config: ModelConfig, hidden_size: int, use: Use) -> tuple[ModelConfig, str]:
        return _settled(config, tail_sizes(hidden_size, config.div), use)

    def parts(self) -> Clusters:
        """The clusters, all weights the head's own."""
        tails = [
            Cluster(functools.partial(_projected, projection), weight, bias)
            for projection, weight, bias in zip(self.projections, self.weights, self.biases, strict=True)
        ]
        return Clusters(self.bounds, Cluster(_itself, self.weight, self.bias), tails)

    def nll(
        self, hidden_NH: Tensor, targets_N: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None
    ) -> Tensor:
        if not len(self.projections):
            return clusters_nll(self.parts(), hidden_NH, targets_N)
        # one product, and one for each of its gradients
        every = _projected(torch.cat(list(self.projections)), hidden_NH)
        features = every.split([len(p) for p in self.projections], dim=1)
        return clusters_nll(self.parts(), hidden_NH, targets_N, features)

    def log_probs(self, hidden_NH: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        return clusters_log_probs(self.parts(), hidden_NH)

    def topk(self, hidden_NH: Tensor, k: int, embedding_VE: Tensor) -> tuple[Tensor, Tensor]:
        return clusters_topk(self.parts(), hidden_NH, k)

    def sample(self, hidden_NH: Tensor, embedding_VE: Tensor, generator: Generator) -> Tensor:
        return clusters_sample(self.parts(), hidden_NH, generator)


class TiedAdaptiveHead(Head):
    """Clusters over the rows of the embedding, and a trained vector (a tombstone) for each tail.

    With a plain embedding the tied softmax of salesforce/awd-lstm-lm (its SplitCrossEntropy), clusters in order of
    frequency; with `adaptive_inputs` vectors and projections are those of the input (Baevski & Auli 2019).
    """

    tied = True

    def __init__(self, bounds: tuple[int, ...], hidden_size: int):
        super().__init__()
        self.bounds = bounds
        tails = len(bounds) - 2
        self.bias = nn.Parameter(torch.zeros(bounds[-1]))
        self.tombstones = nn.Parameter(torch.zeros(tails, hidden_size)) if tails else None
        self.tombstone_bias = nn.Parameter(torch.zeros(tails)) if tails else None

    @classmethod
    def build(cls, vocab_size: int, hidden_size: int, config: ModelConfig, generator: Generator) -> TiedAdaptiveHead:
        check_tied("tied-adaptive", hidden_size, config)
        return cls(tied_clusters(config, vocab_size)[0], hidden_size)

    @classmethod
    def settle(cls, config: ModelConfig, hidden_size: int, use: Use) -> tuple[ModelConfig, str]:
        return _settled(config, _tied_sizes(config), use)

    def parts(self, embedding_VE: Tensor | AdaptiveEmbedding) -> Clusters:
        """The clusters as parts of the embedding; they are cut at once, so that its gradient is put together once.

        Where the embedding has smaller vectors for rarer words, W_k = e_k P_k', so W_k h = e_k (P_k' h).
        """
        features: list[Callable[[Tensor], Tensor]] = [_itself] * (len(self.bounds) - 1)
        sizes = [last - first for first, last in zip(self.bounds, self.bounds[1:], strict=False)]
        biases = list(self.bias.split(sizes))
        if isinstance(embedding_VE, Tensor):
            weights = list(embedding_VE.split(sizes))
        else:
            weights = list(embedding_VE.tables)
            features[1:] = [functools.partial(_projected, p.T) for p in embedding_VE.projections]
        if self.tombstones is not None and self.tombstone_bias is not None:
            weights[0] = torch.cat((weights[0], self.tombstones))
            biases[0] = torch.cat((biases[0], self.tombstone_bias))
        short, *tails = (Cluster(*parts) for parts in zip(features, weights, biases, strict=True))
        return Clusters(self.bounds, short, tails)

    def nll(
        self, hidden_NH: Tensor, targets_N: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None
    ) -> Tensor:
        return clusters_nll(self.parts(embedding_VE), hidden_NH, targets_N)

    def log_probs(self, hidden_NH: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        return clusters_log_probs(self.parts(embedding_VE), hidden_NH)

    def topk(self, hidden_NH: Tensor, k: int, embedding_VE: Tensor) -> tuple[Tensor, Tensor]:
        return clusters_topk(self.parts(embedding_VE), hidden_NH, k)

    def sample(self, hidden_NH: Tensor, embedding_VE: Tensor, generator: Generator) -> Tensor:
        return clusters_sample(self.parts(embedding_VE), hidden_NH, generator)


def _tied_sizes(config: ModelConfig) -> tuple[int, ...]:
    return tail_sizes(config.embedding_size, config.div if config.adaptive_inputs else 1)


def tied_clusters(config: ModelConfig, vocab_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(bounds, features) of the clusters that a tied-adaptive head shares with the embedding."""
    sizes = _tied_sizes(config)
    return _bounds(config, vocab_size, sizes), sizes


def _itself(hidden_NH: Tensor) -> Tensor:
    return hidden_NH


def _projected(projection_FH: Tensor, hidden_NH: Tensor) -> Tensor:
    return linear(hidden_NH, projection_FH.to(hidden_NH.dtype))
