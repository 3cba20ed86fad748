"""N-gram models behind the protocol, whatever their smoothing: against back-off spelled out, and summing to one."""

import math

import numpy as np
import pytest
import torch
from toys import BOUNDARY, FALLBACK, log10_p, model_of, nodes, random_ids

from recurlm.errors import ConfigError, DataError, RequestError
from recurlm.ngram.counts import count
from recurlm.ngram.model import NgramModel
from recurlm.ngram.prune import entropy_prune
from recurlm.ngram.smoothing import SMOOTHINGS, Settings, estimate, good_turing
from recurlm.ngram.trie import keep, renormalise
from recurlm.protocol import state_leaves

V = 25
TEXT, OTHER = random_ids(1, 900, V - 4), random_ids(2, 300, V)


def settings(name: str, **more) -> Settings:
    return Settings(smoothing=name, fallback=FALLBACK, **more)


@pytest.mark.parametrize("name", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("cutoffs", [(), (0, 1, 2), (2,)])
def test_probabilities_are_those_of_back_off_and_sum_to_one(name, order, cutoffs):
    table, facts = estimate(count(TEXT, V, BOUNDARY, order), TEXT, OTHER, settings(name, cutoffs=cutoffs))
    model, ngrams = NgramModel(table), nodes(table)
    inputs = torch.from_numpy(np.concatenate(([BOUNDARY], OTHER)))[:, None]
    log_probs_TBV, _ = model.advance(inputs, model.initial_state(1))
    if facts.get("normalised", True):
        assert log_probs_TBV.double().exp().sum(-1).numpy() == pytest.approx(1, abs=1e-5)
    nll_TB, _ = model.score(inputs[:-1], inputs[1:], model.initial_state(1))
    for t, w in enumerate(OTHER.tolist()):
        expected = math.log(10) * log10_p(table, ngrams, inputs[: t + 1, 0].tolist(), w)
        assert log_probs_TBV[t, 0, w] == pytest.approx(expected, abs=1e-5)
        assert -nll_TB[t, 0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_the_protocol(order, generator):
    model = model_of(TEXT, V, order)
    ids = torch.randint(V, (12, 3), generator=generator)
    targets = torch.randint(V, (12, 3), generator=generator)  # not the next inputs
    start = model.initial_state(3)
    log_probs_TBV, end = model.advance(ids, start)
    nll_TB, same = model.score(ids, targets, start)
    assert torch.allclose(nll_TB, -log_probs_TBV.gather(-1, targets[..., None]).squeeze(-1).double(), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state_leaves(end), state_leaves(same), strict=True))
    assert torch.equal(start, model.initial_state(3))  # a state is a value
    halfway = model.advance(ids[:5], start)[1]
    assert torch.equal(model.advance(ids[5:], halfway)[0], log_probs_TBV[5:])
    chosen = model.select(halfway, torch.tensor([2, 2]))
    assert torch.equal(model.advance(ids[5:, [2, 2]], chosen)[0], log_probs_TBV[5:, [2, 2]])


def test_an_id_that_is_no_word_is_refused():
    model = model_of(TEXT, V, 3)
    for bad in (-1, V, 2**40):
        with pytest.raises(RequestError, match="outside"):
            model.advance(torch.tensor([[bad]]), model.initial_state(1))


def test_no_n_gram_reaches_over_a_line():
    model = model_of(TEXT, V, 4)
    after = [model.advance(torch.tensor([[w], [BOUNDARY]]), model.initial_state(1))[0][1] for w in range(V)]
    assert all(torch.equal(after[0], other) for other in after)


@pytest.mark.parametrize("name", SMOOTHINGS)
def test_more_words_before_help(name):
    train, test = random_ids(3, 6000, 12), random_ids(4, 800, 12)
    train, test = (np.repeat(ids, 2) for ids in (train, test))  # a word says what the next is, every other time
    losses = []
    for order in (1, 2):
        table, _ = estimate(count(train, 12, BOUNDARY, order), train, test, settings(name))
        x = torch.from_numpy(np.concatenate(([BOUNDARY], test)))[:, None]
        losses.append(float(NgramModel(table).score(x[:-1], x[1:], torch.tensor([-1]))[0].mean()))
    assert losses[1] < losses[0] - 0.3


def test_good_turing_by_hand():
    raw = np.repeat([1, 2, 3, 4, 5, 6, 9], [60, 24, 12, 7, 5, 3, 8])
    a = 6 * 3 / 60
    expected = [(2 * 24 / 60 - a) / (1 - a), (3 * 12 / 24 / 2 - a) / (1 - a), (4 * 7 / 12 / 3 - a) / (1 - a)]
    assert good_turing(raw)[1:4] == pytest.approx(expected)
    assert good_turing(np.full(7, 9)) == pytest.approx([1])  # nothing can be said


def test_unknown_smoothings_and_impossible_cut_offs_are_refused():
    counts = count(TEXT, V, BOUNDARY, 3)
    with pytest.raises(ConfigError, match="Did you mean 'katz'"):
        estimate(counts, TEXT, OTHER, settings("kats"))
    with pytest.raises(RequestError, match="do not fall"):
        estimate(counts, TEXT, OTHER, settings("katz", cutoffs=(1, 0)))
    with pytest.raises(DataError, match="valid split"):
        estimate(counts, TEXT, None, settings("jelinek-mercer"))
    tiny = np.array([1, 2, 0])
    with pytest.raises(DataError, match="--discount-fallback"):
        estimate(count(tiny, V, BOUNDARY, 3), tiny, None, Settings())


def relative_entropy(one: NgramModel, two: NgramModel, history: list[int]) -> float:
    logs = [m.advance(torch.tensor(history)[:, None], m.initial_state(1))[0][-1, 0].double() for m in (one, two)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum())


def test_entropy_pruning_takes_what_costs_least():
    model = model_of(TEXT, V, 3)
    whole = model.table
    assert entropy_prune(whole, 0).trie.levels == whole.trie.levels
    sizes = [entropy_prune(whole, t).trie.levels[-1] for t in (0, 1e-5, 1e-4, 1e-3, 0.5)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    ngrams, kept = nodes(whole), nodes(entropy_prune(whole, 2e-4))
    assert kept.keys() <= ngrams.keys() and all(g[:-1] in kept for g in kept if len(g) > 1)
    # One trigram at a time, the change of perplexity by definition: p(h) times the divergence of what comes after h.
    checked = 0
    for g in [g for g in ngrams if len(g) == 3][::7]:
        keep_K = np.ones(whole.trie.levels[-1], bool)
        keep_K[ngrams[g]] = False
        without = keep(whole, keep_K)
        renormalise(without)
        history = 10 ** (float(whole.log10_K[g[0]]) + log10_p(whole, ngrams, [g[0]], g[1]))
        change = math.expm1(history * relative_entropy(model, NgramModel(without), list(g[:2])))
        if abs(change - 2e-4) > 2e-6:
            assert (g in kept) == (change >= 2e-4)
            checked += 1
    assert checked > 20
    for threshold in (-1, 1, math.nan):
        with pytest.raises(RequestError, match="threshold"):
            entropy_prune(whole, threshold)
