"""Token ids as batches of windows: parallel streams, or sentences and documents that each start afresh.

Shapes: T time, B rows. The position in an epoch is one integer; nothing else needs saving.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from recurlm.config import DataConfig


class Places(NamedTuple):
    """Where each stream of an epoch starts in the text, and by how much it is turned: the same object for a whole epoch."""

    starts_B: np.ndarray
    turns_B: np.ndarray


class Window(NamedTuple):
    """One training step's or one measurement's ids."""

    inputs_TB: np.ndarray
    targets_TB: np.ndarray
    counted_TB: np.ndarray | None
    """False on targets that do not count (padding, repeats); None when all count."""
    fresh: bool
    """Whether its rows start anew: the state before is the initial one."""
    next: int
    """The position after it."""
    places: Places | None = None
    """Where the streams are in the epoch, if that differs from epoch to epoch."""
    weight: float = 1.0
    """What its mean loss counts for in training: its targets over the mean number of targets of a window."""


class Batches(ABC):
    """The ids of one split, in the order in which they are read."""

    length: int
    """Positions of one measurement."""
    divisor: int
    """What a sum of losses over one measurement is divided by: the targets that count, but under the published rule."""

    @abstractmethod
    def epoch_length(self, epoch: int) -> int:
        """Positions of that epoch of training."""

    @abstractmethod
    def steps_per_epoch(self, config: DataConfig) -> int:
        """Training steps of an epoch, in the mean over drawn window lengths."""

    @abstractmethod
    def window(self, position: int, steps: int, epoch: int = 0) -> Window:
        """The window at `position`, of `steps` time steps at most; the first epoch's order unless told otherwise."""

    def windows(self, steps: int) -> Iterator[Window]:
        """All windows of one measurement."""
        position = 0
        while position < self.length:
            window = self.window(position, steps)
            position = window.next
            yield window


class Streams(Batches):
    """`batch_size` contiguous streams over 1-D `ids`; the state is carried from window to window.

    exact: every token is predicted, the first from `boundary_id`. All streams have ceil(N / B) targets; when B
    does not divide N the later streams start a little early and repeat their predecessor's last targets, which
    `counted_TB` marks, so that each target counts once.
    published (awd-lstm-lm): floor(N / B) tokens a stream, the remainder dropped; a stream's first token is never
    predicted, and training stops before a last window of a single target.

    `offset`: the text is a ring, of which the first stream starts elsewhere in each epoch. `partial`: each stream is a
    ring, turned by another amount in each epoch (partial shuffle, Press 2019, arXiv 1903.04167); every target keeps its
    own predecessor as input. Both are drawn from (seed, epoch). Then exact streams have floor(N / B) targets too: what
    is left out, fewer than B tokens, is elsewhere in each epoch, or masks would be in every window.
    """

    def __init__(
        self, ids: np.ndarray, batch_size: int, boundary_id: int, counting: str = "exact", seed: int = 0,
        offset: bool = False, partial: bool = False,
    ):  # fmt: skip
        self.ids, self.boundary_id, self.exact = ids, boundary_id, counting == "exact"
        self.seed, self.offset, self.partial = seed, offset, partial
        self.placed: tuple[int, Places] | None = None
        streams = np.arange(batch_size, dtype=np.int64)
        if self.exact and (offset or partial):
            self.length = len(ids) // batch_size
            self.owned = self.starts = streams * self.length
            self.divisor = batch_size * self.length
        elif self.exact:
            self.length = -(-len(ids) // batch_size)
            self.owned = streams * self.length
            self.starts = np.minimum(self.owned, len(ids) - self.length)
            self.divisor = len(ids)
        else:
            rows = len(ids) // batch_size
            self.length = max(rows - 1, 0)
            self.owned = self.starts = streams * rows + 1
            self.divisor = batch_size * (self.length + 1)  # one more a stream than targets: behaviour kept to compare

    def epoch_length(self, epoch: int) -> int:
        return self.length if self.exact else max(self.length - 1, 0)

    def steps_per_epoch(self, config: DataConfig) -> int:
        mean = config.bptt * (config.bptt_full_share + (1 - config.bptt_full_share) / 2)
        return math.ceil(self.epoch_length(0) / min(mean, self.epoch_length(0)))

    def places(self, epoch: int) -> Places:
        """The Places of an epoch of training."""
        if self.placed is None or self.placed[0] != epoch:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, 2**62 + epoch]))  # not those of window lengths
            start = draw.integers(len(self.ids)) if self.offset else 0
            turns_B = draw.integers(self.length, size=len(self.starts)) if self.partial else np.zeros_like(self.starts)
            self.placed = epoch, Places((self.starts + start) % len(self.ids), turns_B)
        return self.placed[1]

    def window(self, position: int, steps: int, epoch: int = 0) -> Window:
        steps = min(steps, self.length - position)
        if self.offset or self.partial:
            places = self.places(epoch)
            at_TB = (position + np.arange(steps)[:, None] + places.turns_B) % self.length
            index_TB = (places.starts_B + at_TB) % len(self.ids)
            inputs_TB = np.where(index_TB > 0, self.ids[index_TB - 1], self.boundary_id).astype(np.int64)
            targets_TB = self.ids[index_TB].astype(np.int64)
            return Window(inputs_TB, targets_TB, None, position == 0, position + steps, places)
        index_BT = (self.starts + position)[:, None] + np.arange(-1, steps)
        block_BT = self.ids[np.maximum(index_BT, 0)].astype(np.int64)
        block_BT[index_BT < 0] = self.boundary_id
        block_TB = np.ascontiguousarray(block_BT.T)
        counted_TB = (self.starts + position) + np.arange(steps)[:, None] >= self.owned
        mask_TB = None if counted_TB.all() else counted_TB
        return Window(block_TB[:-1], block_TB[1:], mask_TB, position == 0, position + steps)


class Sequences(Batches):
    """Sentences or documents, each read from `boundary_id` with a fresh state, batched with others of like length.

    `ends` are the places after each sequence's last token. A batch is as long as its longest row, padded with
    `boundary_id`; padding does not count. Batches longer than a window are read in several, with the state carried.
    In training the order is drawn anew for each epoch from (seed, epoch): sequences are sorted by length with noise,
    cut into batches, and the batches shuffled. In measurement (seed None) it is plainly by length. Every token counts,
    and as much as any other: a window of few tokens has a small `weight`.
    """

    NOISE = 0.1  # of a sequence's length: batches differ from epoch to epoch

    def __init__(
        self, ids: np.ndarray, ends: np.ndarray, batch_size: int, boundary_id: int, steps: int, seed: int | None = None
    ):
        self.ids, self.boundary_id, self.batch_size, self.steps, self.seed = ids, boundary_id, batch_size, steps, seed
        self.starts = np.concatenate(([0], ends[:-1]))
        self.lengths = ends - self.starts
        self.divisor = len(ids)
        self.epoch = -1
        self._arrange(0)
        self.length = int(self.first[-1])

    def epoch_length(self, epoch: int) -> int:
        """Windows of that epoch: they differ, for the longest row of each batch decides how many it takes."""
        self._arrange(epoch)
        return int(self.first[-1])

    def steps_per_epoch(self, config: DataConfig) -> int:
        return self.epoch_length(0)

    def _arrange(self, epoch: int) -> None:
        """Sets the batches of an epoch: `order` of sequences, `batches` in it, and each one's `first` window."""
        epoch = 0 if self.seed is None else epoch
        if epoch == self.epoch:
            return
        count = len(self.lengths)
        key = self.lengths.astype(np.float64)
        draw = None if self.seed is None else np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        if draw is not None:
            key *= 1 + self.NOISE * draw.random(count)
        self.order = np.argsort(key, kind="stable")
        self.batches = np.arange(0, count, self.batch_size)
        if draw is not None:
            self.batches = draw.permutation(self.batches)
        longest = np.maximum.reduceat(self.lengths[self.order], np.sort(self.batches))[self.batches // self.batch_size]
        self.first = np.concatenate(([0], np.cumsum(-(-longest // self.steps))))
        self.epoch = epoch

    def window(self, position: int, steps: int, epoch: int = 0) -> Window:
        """The window at `position`, a count of windows; `steps` is not heeded, for windows are cut once and for all."""
        self._arrange(epoch)
        batch = int(np.searchsorted(self.first, position, side="right")) - 1
        start = int(position - self.first[batch]) * self.steps
        rows = self.order[self.batches[batch] : self.batches[batch] + self.batch_size]
        size = min(self.steps, int(self.lengths[rows].max()) - start)
        at_TB = np.arange(start - 1, start + size)[:, None]
        block_TB = self.ids[np.clip(self.starts[rows] + at_TB, 0, len(self.ids) - 1)].astype(np.int64)
        block_TB[(at_TB < 0) | (at_TB >= self.lengths[rows])] = self.boundary_id
        counted_TB = at_TB[1:] < self.lengths[rows]
        mask_TB = None if counted_TB.all() else counted_TB
        weight = counted_TB.sum() * self.first[-1] / len(self.ids)
        return Window(block_TB[:-1], block_TB[1:], mask_TB, start == 0, position + 1, weight=float(weight))


def sentence_ends(ids: np.ndarray, boundary_id: int) -> np.ndarray:
    """The places after each line's end; the last line needs none."""
    ends = np.flatnonzero(ids == boundary_id) + 1
    return ends if len(ends) and ends[-1] == len(ids) else np.append(ends, len(ids))


def document_ends(ids: np.ndarray, boundary_id: int) -> np.ndarray:
    """The places after each run of empty lines, which ends a document; the last document needs none."""
    ends = sentence_ends(ids, boundary_id)
    empty = (np.diff(ends, prepend=0) == 1) & (ids[ends - 1] == boundary_id)
    last = empty & ~np.append(empty[1:], False)
    return np.unique(np.append(ends[last], len(ids)))


BATCHING: dict[str, Callable[[np.ndarray, int], np.ndarray] | None] = {
    "stream": None,
    "sentence": sentence_ends,
    "document": document_ends,
}
"""Where sequences end, by name; None: nowhere, the text is one stream."""


def reading_order(ids: np.ndarray, backward: bool, boundary_id: int) -> np.ndarray:
    """The ids as a model reads them. If `backward`, a copy from the end to the start, in which lines end as they do forward."""
    if not backward:
        return ids
    body = len(ids) - bool(len(ids) and ids[-1] == boundary_id)
    return np.concatenate((ids[:body][::-1], ids[body:]))


def training_batches(ids: np.ndarray, config: DataConfig, boundary_id: int, seed: int) -> Batches:
    """The Batches that training reads, as `config` says."""
    ends = BATCHING[config.batching]
    if ends is None:
        moved = config.random_offset, config.partial_shuffle
        return Streams(ids, config.batch_size, boundary_id, config.counting, seed, *moved)
    return Sequences(ids, ends(ids, boundary_id), config.batch_size, boundary_id, config.bptt, seed)


def measured_batches(
    ids: np.ndarray, batching: str, batch_size: int, boundary_id: int, counting: str, steps: int
) -> Batches:
    """The Batches that a measurement reads, in windows of `steps` at most."""
    ends = BATCHING[batching]
    if ends is None:
        return Streams(ids, batch_size, boundary_id, counting)
    return Sequences(ids, ends(ids, boundary_id), batch_size, boundary_id, steps)


def window_length(config: DataConfig, seed: int, step: int) -> int:
    """The window length drawn for one training step: a pure function of seed and step.

    Normal(base, bptt_spread) with base = bptt, or bptt / 2 with probability 1 - bptt_full_share; at least
    bptt_min and at most bptt_cap (Merity et al. 2018, section 5); rounded to whole bptt_steps from
    the mean.
    """
    if (config.bptt_spread == 0 and config.bptt_full_share == 1) or BATCHING[config.batching] is not None:
        return config.bptt
    draw = np.random.Generator(np.random.Philox(key=[seed, step]))
    base = config.bptt if draw.random() < config.bptt_full_share else config.bptt / 2
    drawn = draw.normal(base, config.bptt_spread)
    near = int(base)  # rounded to whole steps away from it, so that the mean stays what it is
    whole = int(drawn) if config.bptt_step == 1 else near + round((drawn - near) / config.bptt_step) * config.bptt_step
    length = max(config.bptt_min, whole)
    return min(length, config.bptt_cap) if config.bptt_cap else length
