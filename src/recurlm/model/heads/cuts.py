"""Where an adaptive softmax cuts the vocabulary: the argument of Grave et al. 2016 (section 4) with costs measured here.

A product of R rows with a cluster of w words and d features, its softmax and both gradients take about
    fixed + R w (d + exponential) per_mac
seconds. The shortlist meets every row, a tail cluster only the rows whose target is in it. Cut points are those of a
grid that make the sum least, found by dynamic programming from the rarest word on.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from recurlm.errors import ConfigError

MOST_TAILS = 4
MOST_RANKED = 1 << 20  # words for which Zipf's law is written out: a file's settings may claim any vocabulary
GRID = 64  # possible cut points, evenly spaced in the logarithm


class Costs(NamedTuple):
    """Of one cluster, forward and backward, in seconds; `exponential` in features that cost as much as a logit's softmax."""

    fixed: float
    per_mac: float
    exponential: float


# CPU: linear cross-entropy on one core of an AMD EPYC (200 to 1,000 rows, 8 to 400 features, 2,000 words); the fixed part
# is four times that of the smallest product, for rows are sorted, gathered and scattered too. GPU: docs/results.md, the
# rows of the linear cross-entropy on an H200 (1,400 x 400 x 10,000 and larger), likewise; one exponential, forward and
# backward, takes two of the 16 that a multiprocessor makes in a clock.
COSTS = {"cpu": Costs(1.6e-4, 5.8e-11, 36), "cuda": Costs(8e-5, 1.6e-14, 32)}


def zipf(vocab_size: int) -> np.ndarray:
    """Counts for a vocabulary in order of frequency whose text is not known: 1 / (rank + 2.7), steeper for rare words.

    Zipf's law with Mandelbrot's offset to the 5,000th word, the power 1.6 beyond (two regimes: Ferrer i Cancho & Sole 2001),
    which lets the last of WikiText-103's 267,735 words occur 3 times in 103 million, as the last ones there do.
    """
    ranks = np.arange(1, vocab_size + 1)
    return 1 / (ranks + 2.7) / np.maximum(1, ranks / 5000) ** 0.6


def expected_cost(counts_V: np.ndarray, cuts: tuple[int, ...], size_of: Callable[[int], int], rows: int, costs: Costs):
    """Seconds of a training step's output layer with clusters that begin at `cuts`; `size_of(k)`: features of cluster k."""
    mass, bounds = np.concatenate(([0.0], np.cumsum(counts_V))), (0, *cuts, len(counts_V))
    mass /= mass[-1]
    total = _seconds(costs, rows, bounds[1] + len(cuts), size_of(0))
    for k, (first, last) in enumerate(pairwise(bounds[1:]), 1):
        total += _seconds(costs, rows * (mass[last] - mass[first]), last - first, size_of(k))
    return total


def _seconds(costs: Costs, rows: float, words: float, features: float) -> float:
    return costs.fixed + rows * words * (features + costs.exponential) * costs.per_mac


def best_cuts(
    counts_V: np.ndarray, size_of: Callable[[int], int], rows: int, device: str, least: float = 0.0
) -> tuple[int, ...]:
    """The cut points of least expected cost, () where one softmax over all words is as cheap; at most MOST_TAILS.

    The shortlist is made to hold at least a share `least` of the text.
    """
    V, costs = len(counts_V), COSTS[device]
    grid = sorted({int(n) for n in np.geomspace(16, V, GRID)} - {V}) if V > 16 else []
    mass = np.concatenate(([0.0], np.cumsum(counts_V)))
    mass /= mass[-1]
    best: tuple[float, tuple[int, ...]] = (expected_cost(counts_V, (), size_of, rows, costs), ())
    for tails in range(1, MOST_TAILS + 1):
        # cheapest[i]: the clusters from the k-th tail on when it begins at grid[i], k from the last to the first
        cheapest: list[tuple[float, tuple[int, ...]]] = []
        for k in range(tails, 0, -1):
            following, cheapest = cheapest, []
            for i, first in enumerate(grid):
                later_ones = ((grid[j], *following[j]) for j in range(i + 1, len(grid)))
                ends = [(V, 0.0, ())] if k == tails else later_ones
                options = [
                    (
                        _seconds(costs, rows * (mass[last] - mass[first]), last - first, size_of(k)) + later,
                        (first, *cuts),
                    )
                    for last, later, cuts in ends
                ]
                cheapest.append(min(options, default=(np.inf, ())))
        for cost, cuts in cheapest:
            if cuts and mass[cuts[0]] >= least:
                best = min(best, (cost + _seconds(costs, rows, cuts[0] + tails, size_of(0)), cuts))
    return best[1]


def bounds(cutoffs: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """(0, first cut, ..., V): those of the cut points that are inside of the vocabulary, which must rise; ConfigError."""
    if list(cutoffs) != sorted(set(cutoffs)):
        raise ConfigError(f"model.cutoffs = {list(cutoffs)}: expected ids that rise, such as [2800, 20000].")
    return (0, *(cut for cut in cutoffs if cut < vocab_size), vocab_size)
