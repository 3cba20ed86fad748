"""Batches against their definition: what is read, in which order, and what counts."""

import itertools

import numpy as np
import pytest

from recurlm.config import DataConfig
from recurlm.text.batches import (
    BATCHING,
    Batches,
    Sequences,
    Streams,
    document_ends,
    measured_batches,
    reading_order,
    sentence_ends,
    training_batches,
    window_length,
)

END = 0


def counted(batches: Batches, steps: int) -> list[int]:
    """All targets that count, in the order of reading."""
    out = []
    for window in batches.windows(steps):
        mask = window.counted_TB
        out += (window.targets_TB if mask is None else window.targets_TB[mask]).flatten().tolist()
    return out


def text(seed: int, lines: int = 40) -> np.ndarray:
    """Ids of lines of 0 to 12 tokens, each ended; token ids count up, so that every one is known again."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(lines):
        out += [*range(len(out) + 1, len(out) + 1 + int(rng.integers(0, 13))), END]
    return np.array(out, np.uint16)


@pytest.mark.parametrize("n", [1, 2, 7, 29, 30, 31, 100])
@pytest.mark.parametrize("batch", [1, 3, 10, 30])
@pytest.mark.parametrize("window", [1, 4, 50])
def test_exact_streams_count_every_token_once(n, batch, window):
    ids = np.arange(1, n + 1, dtype=np.uint16)
    streams = Streams(ids, batch, boundary_id=0)
    for found in streams.windows(window):
        # Each input is the token before its target, the first the boundary.
        assert np.array_equal(found.inputs_TB, found.targets_TB - 1)
    assert sorted(counted(streams, window)) == list(range(1, n + 1))
    assert streams.divisor == n


MOVED = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("offset", "partial"), MOVED)
@pytest.mark.parametrize("counting", ["exact", "published"])
def test_moved_streams_read_every_token_once_after_its_own_predecessor(offset, partial, counting):
    """But for those of the remainder, and under the published rule each stream's first one."""
    ids, batch = np.random.default_rng(3).permutation(206) + 1, 7
    streams = Streams(ids, batch, 0, counting, seed=5, offset=offset, partial=partial)
    before, left_out = dict(zip(ids, [0, *ids[:-1]], strict=True)), []
    for epoch in range(40):
        position, seen, rings = 0, [], [[] for _ in range(batch)]
        while position < streams.length:
            window = streams.window(position, 6, epoch)
            assert window.counted_TB is None and window.fresh == (position == 0)
            assert window.places is streams.places(epoch)
            for b in range(batch):
                rings[b] += window.targets_TB[:, b].tolist()
            pairs = zip(window.inputs_TB.ravel(), window.targets_TB.ravel(), strict=True)
            assert all(before[target] == source for source, target in pairs)
            seen += window.targets_TB.ravel().tolist()
            position = window.next
        assert len(seen) == len(set(seen)) == batch * streams.length
        breaks = sum(before[b] != a for ring in rings for a, b in itertools.pairwise(ring))
        assert breaks <= batch * partial + offset  # where a ring was cut, and where the text begins again
        left_out.append(set(ids) - set(seen))
    assert all(len(rest) == 206 - batch * streams.length < 2 * batch for rest in left_out)
    assert (len({frozenset(rest) for rest in left_out}) > 1) == offset


@pytest.mark.parametrize(("offset", "partial"), MOVED)
def test_streams_move_with_seed_and_epoch_alone(offset, partial):
    ids = np.arange(1, 500)

    def window(epoch, seed=1):
        return Streams(ids, 4, 0, seed=seed, offset=offset, partial=partial).window(8, 5, epoch).targets_TB.tolist()

    assert window(3) == window(3) and window(3) != window(4) and window(3) != window(3, seed=2)
    rows = np.array([window(epoch) for epoch in range(200)])[:, 0]
    spread = np.unique((rows[:, 0] - rows[:, 1]) % len(ids))
    assert (len(spread) > 1) == partial  # turned each by its own amount, or all moved alike


def test_published_streams_are_those_of_awd_lstm_lm():
    ids, batch = np.arange(103, dtype=np.uint16), 10
    streams = Streams(ids, batch, 0, "published")
    rows = ids[: 103 // batch * batch].reshape(batch, -1).T  # batchify
    window = streams.window(0, 70)
    assert np.array_equal(window.inputs_TB, rows[:-1])
    assert np.array_equal(window.targets_TB, rows[1:])
    assert streams.epoch_length(0) == len(rows) - 2


def test_window_lengths_have_the_published_distribution():
    config = DataConfig(bptt=70, bptt_full_share=0.95, bptt_spread=5.0, bptt_step=1)
    lengths = np.array([window_length(config, 1, step) for step in range(4000)])
    assert np.array_equal(lengths, [window_length(config, 1, step) for step in range(4000)])
    assert abs(lengths.mean() - 67.75) < 0.6
    assert abs((lengths < 52).mean() - 0.05) < 0.015
    assert lengths.min() >= 5
    capped = DataConfig(bptt=70, bptt_spread=5.0, bptt_cap=72, bptt_min=69, bptt_step=1)
    assert {window_length(capped, 2, step) for step in range(200)} == {69, 70, 71, 72}
    assert window_length(DataConfig(bptt=33), 1, 5) == 33
    rounded = DataConfig(bptt=70, bptt_full_share=0.95, bptt_spread=5.0)
    fives = np.array([window_length(rounded, 1, step) for step in range(4000)])
    assert set(fives % 5) == {0} and abs(fives - lengths).max() <= 3
    odd = DataConfig(bptt=12, bptt_full_share=0.95)
    assert {window_length(odd, 1, step) for step in range(300)} == {12, 6}


def test_sentences_end_with_their_line():
    assert sentence_ends(np.array([5, 6, END, END, 7]), END).tolist() == [3, 4, 5]
    assert sentence_ends(np.array([5, END]), END).tolist() == [2]
    assert sentence_ends(np.array([5]), END).tolist() == [1]


def test_documents_end_with_empty_lines():
    ids = np.array([5, END, 6, END, END, END, 7, END, END, 8, END])
    assert document_ends(ids, END).tolist() == [6, 9, 11]
    assert document_ends(np.array([END, 5, END]), END).tolist() == [1, 3]
    assert document_ends(np.array([5, END, 6]), END).tolist() == [3]
    assert document_ends(np.array([END, END, 7]), END).tolist() == [2, 3]


def test_document_ends_are_those_of_a_plain_reading():
    for bits in range(2**9):
        ids = np.array([END if bits >> n & 1 else 7 for n in range(9)])
        ends, line, empty_before = [], 0, False
        for n, token in enumerate(ids):  # a document ends where an empty line is followed by one that is not empty
            if line == 0 and empty_before and token != END:
                ends.append(n)
            if token == END:
                empty_before, line = line == 0, 0
            else:
                line += 1
        assert document_ends(ids, END).tolist() == [*ends, 9], ids


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize(("batch", "steps"), [(1, 3), (4, 5), (7, 100), (500, 2)])
def test_every_token_counts_once_however_it_is_read(batching, batch, steps):
    ids = text(3)
    batches = measured_batches(ids, batching, batch, END, "exact", steps)
    assert sorted(counted(batches, steps)) == sorted(ids.tolist())
    assert batches.divisor == len(ids)


@pytest.mark.parametrize("batching", [name for name, ends in BATCHING.items() if ends is not None])
def test_a_sequence_sees_itself_alone(batching):
    """Each row's tokens, window after window, are one sequence that starts after a boundary."""
    ids, steps = text(4), 4
    ends = BATCHING[batching](ids, END)
    expected = {tuple(ids[a:b].tolist()) for a, b in zip([0, *ends[:-1]], ends, strict=True)}
    batches, rows, found = measured_batches(ids, batching, 5, END, "exact", steps), [], set()
    for window in batches.windows(steps):
        if window.fresh:
            found |= {tuple(row) for row in rows}
            rows = [[] for _ in range(window.inputs_TB.shape[1])]
            assert (window.inputs_TB[0] == END).all()
        mask = np.ones_like(window.targets_TB, bool) if window.counted_TB is None else window.counted_TB
        for row, column in enumerate(rows):
            column += window.targets_TB[:, row][mask[:, row]].tolist()
            inputs = window.inputs_TB[1:, row][mask[1:, row]]
            assert np.array_equal(inputs, window.targets_TB[:-1, row][mask[1:, row]])
    assert found | {tuple(row) for row in rows} == expected


@pytest.mark.parametrize("seed", range(20))
def test_training_reads_every_sequence_in_an_order_of_its_own_each_epoch(seed):
    """The number of windows differs from epoch to epoch, for many a sentence is longer than one."""
    ids, config = text(seed, 200), DataConfig(batching="sentence", batch_size=4, bptt=3)
    batches = training_batches(ids, config, END, seed=1)
    assert isinstance(batches, Sequences)
    orders = []
    for epoch in range(3):
        position, seen = 0, []
        while position < batches.epoch_length(epoch):
            window = batches.window(position, 3, epoch)
            mask = window.counted_TB
            seen += (window.targets_TB if mask is None else window.targets_TB[mask]).flatten().tolist()
            position = window.next
        assert sorted(seen) == sorted(ids.tolist())
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    again = training_batches(ids, config, END, seed=1)  # the order is a function of seed and epoch alone
    assert again.epoch_length(2) == batches.epoch_length(2)
    assert np.array_equal(again.window(7, 3, 2).inputs_TB, batches.window(7, 3, 2).inputs_TB)
    assert len({training_batches(ids, config, END, seed=s).window(0, 3, 0).inputs_TB.tobytes() for s in range(5)}) > 1


def test_batches_hold_sequences_of_like_length():
    ids = text(6, 2000)
    batches = training_batches(ids, DataConfig(batching="sentence", batch_size=16, bptt=20), END, seed=2)
    cells = [batches.window(p, 20).inputs_TB.size for p in range(batches.epoch_length(0))]
    assert len(ids) / sum(cells) > 0.85  # the rest is padding


def test_backward_reads_each_line_from_its_end():
    ids = np.array([1, 2, END, 3, END, 4, 5, END])
    assert reading_order(ids, True, END).tolist() == [5, 4, END, 3, END, 2, 1, END]
    assert reading_order(ids[:-1], True, END).tolist() == [5, 4, END, 3, END, 2, 1]
    assert reading_order(ids, False, END) is ids
