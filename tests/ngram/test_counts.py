"""Counting against a dictionary."""

import numpy as np
import pytest
from toys import BOUNDARY, lines_of, nodes, occurrences, random_ids

from recurlm.errors import RequestError, RunError
from recurlm.ngram.counts import ROWS, build, count, sorted_windows
from recurlm.ngram.kneser_ney import adjusted_counts, last_suffixes
from recurlm.ngram.trie import Table

TEXTS = [(1, 1, 3), (2, 2, 3), (3, 40, 3), (4, 700, 9), (5, 3000, 70), (6, 0, 4)]


def as_table(counts) -> Table:
    k = counts.trie.levels[-1]
    return Table(counts.trie, np.zeros(k), np.zeros(counts.trie.inner), np.ones(counts.trie.vocab_size, bool), 0)


@pytest.mark.parametrize(("seed", "tokens", "vocab_size"), TEXTS)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_counts_are_those_of_a_dictionary(seed, tokens, vocab_size, order):
    ids = random_ids(seed, tokens, vocab_size)
    counts, expected = count(ids, vocab_size, BOUNDARY, order), occurrences(ids, order)
    found = {g: int(counts.raw_K[node]) for g, node in nodes(as_table(counts)).items()}
    assert {g: n for g, n in found.items() if n} == dict(expected)
    assert all(len(g) == 1 for g, n in found.items() if not n)


@pytest.mark.parametrize(("seed", "tokens", "vocab_size"), TEXTS)
def test_links_lead_to_the_longest_suffix_and_adjusted_counts_count_words_before(seed, tokens, vocab_size):
    ids, order = random_ids(seed, tokens, vocab_size), 4
    counts, seen = count(ids, vocab_size, BOUNDARY, order), occurrences(ids, order)
    ngrams = nodes(as_table(counts))
    a_K = adjusted_counts(counts)
    for g, node in ngrams.items():
        assert counts.trie.links_K[node] == (ngrams[g[1:]] if len(g) > 1 else -1)
        before = len({h[0] for h in seen if h[1:] == g})
        raw = len(g) == order or (g[0] == BOUNDARY and len(g) > 1)
        assert a_K[node] == (seen[g] if raw else before)


@pytest.mark.parametrize("seed", range(6))
def test_the_last_n_gram_in_the_order_of_suffixes(seed):
    ids, order = random_ids(seed, 60, 12), 4
    counts = count(ids, 12, BOUNDARY, order)
    when = {BOUNDARY: -1}
    for n, w in enumerate(ids.tolist()):
        when.setdefault(w, n)
    windows = [([BOUNDARY] * (order - 1) + line)[i : i + order] for line in lines_of(ids) for i in range(len(line))]
    last = max(windows, key=lambda window: [when[w] for w in reversed(window)])
    table = as_table(counts)
    expected = [nodes(table).get(tuple(last[order - m :]), -1) for m in range(1, order)]
    if last.count(BOUNDARY) > 1:  # no n-gram begins before its line
        begin = max(n for n, w in enumerate(last[:-1]) if w == BOUNDARY)
        expected = [node if order - m >= begin else -1 for m, node in enumerate(expected, 1)]
    assert last_suffixes(ids, counts) == expected


@pytest.mark.parametrize("order", [1, 2, 5])
def test_sorting_on_the_disk_gives_the_same(order, tmp_path, monkeypatch):
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    from recurlm.ngram import external

    monkeypatch.setattr(external, "TOKENS", 700)
    ids = random_ids(7, 5000, 70).astype(np.uint16)
    here = count(ids, 70, BOUNDARY, order)
    there = count(ids, 70, BOUNDARY, order, out_of_core=True, scratch=tmp_path)
    assert here.trie.levels == there.trie.levels
    for name in ("words_K", "first_I", "links_K"):
        assert np.array_equal(getattr(here.trie, name), getattr(there.trie, name)), name
    assert np.array_equal(here.raw_K, there.raw_K)
    assert not list(tmp_path.iterdir())  # nothing is left on the disk


def test_a_limit_that_is_too_small_is_one_sentence(tmp_path):
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    with pytest.raises(RunError, match="could not be sorted on the disk"):
        count(random_ids(7, 5000, 70), 70, BOUNDARY, 5, out_of_core=True, memory_limit="1KB", scratch=tmp_path)
    with pytest.raises(RunError, match="could not be sorted on the disk"):
        count(random_ids(7, 50, 70), 70, BOUNDARY, 5, out_of_core=True, memory_limit="much", scratch=tmp_path)
    assert not list(tmp_path.iterdir())


def test_windows_come_in_parts_and_the_parts_do_not_show():
    ids = random_ids(8, 2000, 30)
    rows_RN, times_R = (
        np.concatenate(parts) for parts in zip(*sorted_windows(np.append(ids, 0), 30, BOUNDARY, 3), strict=True)
    )
    cut = [(rows_RN[i : i + 7], times_R[i : i + 7]) for i in range(0, len(rows_RN), 7)]
    assert len(rows_RN) < ROWS
    here, there = build([(rows_RN, times_R)], 30, BOUNDARY, 3), build(cut, 30, BOUNDARY, 3)
    assert np.array_equal(here.raw_K, there.raw_K) and np.array_equal(here.trie.words_K, there.trie.words_K)


def test_an_order_out_of_range_is_refused():
    with pytest.raises(RequestError, match="order = 0"):
        count(random_ids(1, 10, 3), 3, BOUNDARY, 0)
