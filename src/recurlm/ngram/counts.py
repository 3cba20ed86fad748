"""Counting: every n-gram of a text, sorted, as a trie with its number of occurrences.

A line w1 .. wk is read as <s> w1 .. wk </s>, where the boundary id stands for both; an n-gram begins at any of them and
goes no further than </s>. So every n-gram is the beginning of one window of N ids, and sorted windows, shared
beginnings merged, are the trie. Shapes: R windows at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

import numpy as np

from recurlm.errors import RequestError
from recurlm.ngram.trie import MOST_NODES, Allocate, Trie, compiled, link, word_dtype

ROWS = 1 << 20  # windows at once
MOST_ORDER = 12
IN_MEMORY = 30_000_000  # tokens: above, windows are sorted on the disk

Windows = Iterable[tuple[np.ndarray, np.ndarray]]
"""Sorted windows in parts: (rows_RN, how often each occurs_R). Beyond a line's end a row holds V."""


@final
@dataclass(frozen=True)
class Counts:
    """The n-grams of a text and how often each occurs; of the boundary as a unigram: how many lines there are."""

    trie: Trie
    raw_K: np.ndarray
    boundary: int


def count(
    ids: np.ndarray, vocab_size: int, boundary: int, order: int, *, out_of_core: bool | None = None,
    memory_limit: str = "1500MB", scratch: Path | None = None,
) -> Counts:  # fmt: skip
    """The Counts of all n-grams up to `order` of a text's ids.

    In memory it takes some 60 bytes a token. `out_of_core` (unless told: above 30 million tokens) sorts in a database
    of about `memory_limit` and keeps what grows in files of the folder `scratch`.
    """
    if not 1 <= order <= MOST_ORDER:
        raise RequestError(f"order = {order}: expected 1 to {MOST_ORDER}.")
    if len(ids) >= MOST_NODES - order:
        raise RequestError(f"A text of {len(ids):,} tokens is too long; expected fewer than {MOST_NODES:,}.")
    if len(ids) == 0 or int(ids[-1]) != boundary:
        ids = np.append(ids, np.asarray(boundary, ids.dtype))
    if out_of_core is None:
        out_of_core = len(ids) > IN_MEMORY
    if not out_of_core:
        return build(sorted_windows(ids, vocab_size, boundary, order), vocab_size, boundary, order)
    from recurlm.ngram.external import externally_sorted_windows

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        windows = externally_sorted_windows(ids, vocab_size, boundary, order, memory_limit, Path(folder))
        return build(windows, vocab_size, boundary, order, scratch or Path(folder))


@compiled
def _pass(sequence, shift, positions, place, out):
    """A stable pass of counting sort by the id that is `shift` after each position."""
    for i in range(positions.size):
        p = positions[i]
        key = sequence[p + shift]
        out[place[key]] = p
        place[key] += 1


@compiled
def window_rows(sequence, positions, boundary, pad, rows_RN):
    """Writes the windows at the positions; after a boundary that does not begin a window it holds `pad`."""
    order = rows_RN.shape[1]
    for i in range(positions.size):
        ended = False
        for k in range(order):
            w = sequence[positions[i] + k]
            rows_RN[i, k] = pad if ended else w
            ended = ended or (k > 0 and w == boundary)


def sorted_windows(
    ids: np.ndarray, vocab_size: int, boundary: int, order: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The windows that begin at ids `start` - 1 to `stop` - 1 of a text, sorted: a radix sort of their places, a pass a word.

    Before the first id there is a boundary; the last id is one, and begins no line.
    """
    size = min(len(ids) if stop is None else stop, len(ids)) - start
    text = np.full(size + order - 1, boundary, np.int32)
    part = ids[max(start - 1, 0) : start + size + order - 2]
    text[start == 0 :][: len(part)] = part[: len(text) - (start == 0)]
    positions = np.arange(size, dtype=np.int32)
    other = np.empty_like(positions)
    for shift in reversed(range(order)):
        held = np.bincount(text[shift : shift + size], minlength=vocab_size)
        _pass(text, shift, positions, np.cumsum(held) - held, other)
        positions, other = other, positions
    del other
    for first in range(0, size, ROWS):
        rows_RN = np.empty((min(ROWS, size - first), order), np.int32)
        window_rows(text, positions[first : first + ROWS], boundary, vocab_size, rows_RN)
        yield rows_RN, np.ones(len(rows_RN), np.int64)


@compiled
def _grow(rows_RN, times_R, pad, last_N, totals_N, sizes_N, words_NR, starts_NR, children_NR):
    """Adds windows to the trie: writes the new nodes of each order and returns how many there are.

    `totals_N` are the occurrences seen so far: what they were when a node came gives its own number by differences.
    """
    order = rows_RN.shape[1]
    fresh_N = np.zeros(order, np.int64)
    for i in range(rows_RN.shape[0]):
        same = 0
        while same < order and rows_RN[i, same] == last_N[same]:
            same += 1
        for m in range(order):
            w = rows_RN[i, m]
            if w == pad:
                break
            if m >= same:
                at = fresh_N[m]
                words_NR[m, at], starts_NR[m, at] = w, totals_N[m]
                if m + 1 < order:
                    children_NR[m, at] = sizes_N[m + 1]
                fresh_N[m] += 1
                sizes_N[m] += 1
            totals_N[m] += times_R[i]
        for m in range(order):
            last_N[m] = rows_RN[i, m]
    return fresh_N


@final
class _Column:
    """An array that grows: in memory, or in an open file."""

    def __init__(self, dtype: Any, file: IO[bytes] | None):
        self.dtype, self.file = np.dtype(dtype), file
        self.parts: list[np.ndarray] = []

    def append(self, values: np.ndarray) -> None:
        part = values.astype(self.dtype)
        self.parts.append(part) if self.file is None else self.file.write(part.data)

    def take(self) -> np.ndarray:
        """The whole array; the column is empty then."""
        if self.file is None:
            parts, self.parts = self.parts, []
            return np.concatenate(parts) if parts else np.empty(0, self.dtype)
        size = self.file.tell() // self.dtype.itemsize
        with self.file as file:
            file.flush()
            return np.asarray(np.memmap(file, self.dtype, "r")) if size else np.empty(0, self.dtype)


def in_files(folder: Path) -> Allocate:
    """An Allocate whose arrays lie in files of the folder that have no name any more: they go with the array."""

    def allocate(size: int, dtype: Any) -> np.ndarray:
        with tempfile.TemporaryFile(dir=folder) as file:
            return np.asarray(np.memmap(file, np.dtype(dtype), "w+", shape=(max(1, size),)))[:size]

    return allocate


def build(windows: Windows, vocab_size: int, boundary: int, order: int, scratch: Path | None = None) -> Counts:
    """The Counts of sorted windows; with `scratch` their arrays lie in files there."""
    allocate = np.empty if scratch is None else in_files(scratch)
    kinds = {"words": word_dtype(vocab_size), "starts": np.uint32, "children": np.int32}
    last_N, totals_N, sizes_N = np.full(order, -1), np.zeros(order, np.int64), np.zeros(order, np.int64)
    with ExitStack() as stack:
        columns = [
            {
                kind: _Column(dtype, scratch and stack.enter_context(tempfile.TemporaryFile(dir=scratch)))
                for kind, dtype in kinds.items()
            }
            for _ in range(order)
        ]
        for rows_RN, times_R in windows:
            out = [np.empty((order, len(rows_RN)), np.int64 if k else np.int32) for k in range(3)]
            fresh_N = _grow(rows_RN, times_R, vocab_size, last_N, totals_N, sizes_N, *out)
            for m, column in enumerate(columns):
                for values_NR, grown in zip(out, column.values(), strict=True):
                    grown.append(values_NR[m, : fresh_N[m]])
        return _assembled(columns, totals_N, sizes_N, vocab_size, boundary, allocate)


def _assembled(
    columns: list[dict[str, _Column]],
    totals_N: np.ndarray,
    sizes_N: np.ndarray,
    vocab_size: int,
    boundary: int,
    allocate: Allocate,
) -> Counts:
    """The Counts of the columns, which are used up."""
    order = len(columns)
    levels = np.cumsum([0, vocab_size, *sizes_N[1:]])
    if levels[-1] > MOST_NODES:
        raise RequestError(f"The text has {levels[-1]:,} n-grams; expected at most {MOST_NODES:,}: take a lower order.")
    words_K, raw_K = allocate(levels[-1], word_dtype(vocab_size)), allocate(levels[-1], np.uint32)
    first_I = allocate(levels[-2] + 1, np.int32)
    first_I[-1] = levels[-1]
    for m, column in enumerate(columns):
        words, starts, children = (grown.take() for grown in column.values())
        times = np.diff(starts, append=np.uint32(totals_N[m]))
        if m == 0:  # every word has a unigram, whether it occurs or not
            raw_K[:vocab_size] = np.bincount(words, times, minlength=vocab_size)
            words_K[:vocab_size] = np.arange(vocab_size)
            sizes = np.zeros(vocab_size, np.int64)
            if order > 1:
                sizes[words] = np.diff(children, append=sizes_N[1])
                first_I[:vocab_size] = levels[1] + np.cumsum(sizes) - sizes
            continue
        words_K[levels[m] : levels[m + 1]] = words
        raw_K[levels[m] : levels[m + 1]] = times
        if m + 1 < order:
            first_I[levels[m] : levels[m + 1]] = children + levels[m + 1]
    return Counts(link(tuple(levels.tolist()), words_K, first_I, allocate), raw_K, boundary)
