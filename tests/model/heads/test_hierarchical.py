"""Trees over a vocabulary: optimal code lengths, the canonical tree, and the losses written out node by node."""

import heapq
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurlm.config import ModelConfig
from recurlm.errors import ConfigError
from recurlm.model.heads import hierarchical
from recurlm.model.heads.base import Use
from recurlm.model.heads.hierarchical import HierarchicalHead, balanced, huffman, levels, mean_bits, paths

CPU = torch.device("cpu")


def cost_by_a_heap(counts: list[int]) -> int:
    """Bits of the whole text under an optimal code: the sum of all sums."""
    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=80))
def test_huffman_is_optimal_and_its_tree_is_full(counts):
    counts = sorted(counts, reverse=True)
    lengths = huffman(np.array(counts))
    assert sum(lengths) == len(counts) and sum(n / 2**i for i, n in enumerate(lengths)) == 1
    assert mean_bits(lengths, np.array(counts)) * sum(counts) == pytest.approx(cost_by_a_heap(counts))
    levels(lengths)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 1000])
def test_balanced_trees(size):
    lengths = balanced(size)
    assert sum(lengths) == size and sum(n / 2**i for i, n in enumerate(lengths)) == 1
    assert len(lengths) - 1 == math.ceil(math.log2(size))
    assert sum(n > 0 for n in lengths) <= 2


def test_words_that_never_occur_have_long_codes():
    lengths = huffman(np.array([1000, 500, 0, 0, 0, 0]))
    assert lengths == (0, 1, 1, 0, 4)


@pytest.mark.parametrize("lengths", [balanced(13), huffman(np.arange(40, 0, -1) ** 3), (0, 1, 1, 2), (1,)])
def test_paths_are_prefix_free_and_meet_every_node(lengths):
    tables = paths(lengths, CPU)
    codes = set()
    for nodes, signs, bits in zip(*(t.tolist() for t in tables), strict=True):
        assert all(s != 0 for s in signs[:bits]) and not any(signs[bits:])
        codes.add(tuple(zip(nodes[:bits][::-1], signs[:bits][::-1], strict=True)))  # from the root on
        assert bits == 0 or nodes[bits - 1] == 0
    assert len(codes) == sum(lengths)
    assert not any(a != b and b[: len(a)] == a for a in codes for b in codes)
    assert {node for code in codes for node, _ in code} == set(range(sum(lengths) - 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tree", ["huffman", "balanced"])
def test_losses_are_sums_along_the_way_padded_or_not(tree, dtype, generator, monkeypatch):
    made = HierarchicalHead.build(37, 5, ModelConfig(tree=tree), generator).to(dtype)
    made.bias.data.normal_(generator=generator)
    hidden, targets = torch.randn(50, 5, generator=generator).to(dtype), torch.randint(37, (50,), generator=generator)
    tables = paths(made.lengths, CPU)
    expected = []
    for h, y in zip(hidden, targets.tolist(), strict=True):
        way = zip(tables.nodes_VL[y].tolist(), tables.signs_VL[y].tolist(), strict=True)
        x = [(s * (made.weight[n] @ h + made.bias[n])).double().item() for n, s in way if s]
        expected.append(sum(math.log1p(math.exp(-v)) for v in x))
    allowed = 1e-12 if dtype == torch.float64 else 0.1
    for along in (made._along, made._along_padded):
        found = along(tables, hidden, targets)
        assert (found.double() - torch.tensor(expected, dtype=torch.float64)).abs().max() < allowed
    whole = made.nll(hidden, targets, hidden)
    monkeypatch.setattr(hierarchical, "ELEMENTS", {"cpu": 100})
    torch.testing.assert_close(made.nll(hidden, targets, hidden), whole)


def test_gradients_padded_or_not_are_the_same(generator):
    made = HierarchicalHead.build(37, 5, ModelConfig(), generator).double()
    hidden = torch.randn(50, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, tables = torch.randint(37, (50,), generator=generator), paths(made.lengths, CPU)
    one, two = (
        torch.autograd.grad(along(tables, hidden, targets).sum(), [hidden, *made.parameters()])
        for along in (made._along, made._along_padded)
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


def test_ids_in_another_order_than_that_of_frequency_get_a_balanced_tree():
    counts = np.arange(1, 101) ** 4
    config = ModelConfig()
    settled, why = HierarchicalHead.settle(config, 8, Use(lambda: counts, 10, "cpu"))
    assert settled.code_lengths == balanced(100) and "not in order of frequency" in why
    settled, why = HierarchicalHead.settle(config, 8, Use(lambda: counts[::-1], 10, "cpu"))
    assert settled.code_lengths == huffman(counts) and "huffman" in why


@pytest.mark.parametrize("lengths", [(0, 1), (0, 3), (2,), (0, 0), (0, 1, 1, 1), (0, 2, 5)])
def test_lengths_that_are_no_tree_are_refused(lengths, generator):
    with pytest.raises(ConfigError, match="code_lengths"):
        HierarchicalHead.build(sum(lengths), 4, ModelConfig(code_lengths=lengths), generator)


def test_lengths_for_another_vocabulary_are_refused(generator):
    with pytest.raises(ConfigError, match="for 2 words, but the vocabulary has 3"):
        HierarchicalHead.build(3, 4, ModelConfig(code_lengths=(0, 2)), generator)


def test_a_search_that_would_open_too_many_nodes_gives_up(generator, monkeypatch):
    made = HierarchicalHead.build(5000, 5, ModelConfig(tree="balanced"), generator).double()
    hidden = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    made.weight.data.zero_()  # all words are about as probable: everything is open
    assert made._best(hidden[0], 2, most=78) is None
    values, _ = made.topk(hidden, 2, hidden)
    expected = made.log_probs(hidden, hidden).topk(2).values
    torch.testing.assert_close(values, expected)
    made.bias.data += 20  # always to the left
    (best, *_) = made._best(hidden[0], 2, most=78)
    assert best[1] == 0 and best[0] < 1e-6
