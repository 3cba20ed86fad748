"""Metrics over log-probabilities, predictions and samples; what is made of losses is in `perplexity`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

TOP = (1, 5, 10)
SUGGESTIONS = (1, 3, 5)


def ranks(log_probs_TBV: Tensor, targets_TB: Tensor) -> Tensor:
    """rank_TB of each target, from 1. Equal probabilities count half against it, so a uniform model gains nothing."""
    own_TB1 = log_probs_TBV.gather(-1, targets_TB[..., None])
    better_TB = (log_probs_TBV > own_TB1).sum(-1)
    equal_TB = (log_probs_TBV == own_TB1).sum(-1)
    return better_TB + (equal_TB - 1) / 2 + 1


@final
@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy: the expected calibration error, and of each bin that is not empty its means and share."""

    ece: float
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    share: tuple[float, ...]


def calibration(confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = 15) -> Calibration:
    """The Calibration of top-1 predictions in bins of equal width.

    ECE = sum over bins of share * |accuracy - mean confidence| (Guo et al. 2017, equation 3).
    """
    index_N = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
    count_K = np.bincount(index_N, minlength=bins)
    kept_K = count_K > 0
    mean_K = np.bincount(index_N, confidence_N, bins)[kept_K] / count_K[kept_K]
    right_K = np.bincount(index_N, correct_N, bins)[kept_K] / count_K[kept_K]
    share_K = count_K[kept_K] / max(1, len(confidence_N))
    ece = float((share_K * np.abs(right_K - mean_K)).sum())
    return Calibration(ece, tuple(mean_K.tolist()), tuple(right_K.tolist()), tuple(share_K.tolist()))


def _grams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def distinct(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """distinct-n: different n-grams of all sequences over all their n-grams (Li et al. 2016); 0 without any."""
    grams = [gram for sequence in sequences for gram in _grams(sequence, n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """seq-rep-n: 1 - different n-grams / n-grams of a sequence, the mean over sequences (Welleck et al. 2020, section 5)."""
    shares = [1 - len(set(grams)) / len(grams) for sequence in sequences if (grams := _grams(sequence, n))]
    return sum(shares) / max(1, len(shares))


def repeats_within(sequences: Sequence[Sequence[Hashable]], window: int) -> float:
    """rep/l: the share of tokens that are among the `window` tokens before them (Welleck et al. 2020, equation 6)."""
    found = sum(token in sequence[max(0, i - window) : i] for sequence in sequences for i, token in enumerate(sequence))
    return found / max(1, sum(map(len, sequences)))


def last_occurrence(items: Sequence[Hashable]) -> np.ndarray:
    """How many items ago each was there last; 0 where it is new."""
    seen: dict[Hashable, int] = {}
    out = np.zeros(len(items), np.int64)
    for place, item in enumerate(items):
        out[place] = place - seen.get(item, place)
        seen[item] = place
    return out


@final
class Keyboard:
    """How many keys a writer presses for a word when the k most probable words that begin with what is typed are offered.

    Taking a suggestion is one key and brings the space after the word; without it the letters and the space are typed.
    Saved = 1 - keys / (letters + 1). `hidden` ids are never offered.
    """

    def __init__(self, words: Sequence[str], hidden: Sequence[int | None]):
        kept = [i for i in range(len(words)) if i not in hidden]
        self.order = np.array(sorted(kept, key=words.__getitem__), np.int64)
        self._sorted = [str(words[i]) for i in self.order]
        self._place = {int(i): place for place, i in enumerate(self.order)}
        self._ranges: dict[int, list[tuple[int, int]]] = {}

    def characters(self, target: int) -> int:
        """Letters of the word and its space; 0 for a hidden id, which nobody types."""
        return len(self._sorted[self._place[target]]) + 1 if target in self._place else 0

    def keys(self, log_probs_S: np.ndarray, target: int) -> tuple[int, ...]:
        """Keys for the target with each number of SUGGESTIONS; `log_probs_S` are those of the ids in `order`."""
        place = self._place[target]
        own, most = log_probs_S[place], self.characters(target)
        keys = [most] * len(SUGGESTIONS)
        for typed, (low, high) in enumerate(self._begin_alike(target, place)):
            better = int(np.count_nonzero(log_probs_S[low:high] >= own)) - 1
            keys = [min(had, typed + 1) if better < k else had for had, k in zip(keys, SUGGESTIONS, strict=True)]
            if better < SUGGESTIONS[0]:
                break
        return tuple(keys)

    def _begin_alike(self, target: int, place: int) -> list[tuple[int, int]]:
        """The places of the words that share the first 0, 1, 2 ... letters."""
        if target not in self._ranges:
            word = self._sorted[place]
            ends = [(word[:n], word[:n] + "\U0010ffff") for n in range(len(word))]
            self._ranges[target] = [(bisect_left(self._sorted, a), bisect_left(self._sorted, b)) for a, b in ends]
        return self._ranges[target]
