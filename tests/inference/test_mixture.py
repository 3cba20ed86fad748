"""Mixtures and the unigram cache against what they are by definition."""

import math

import numpy as np
import pytest
import torch

from recurlm.config import ModelConfig
from recurlm.errors import RequestError
from recurlm.evaluation.interpolation import tuned_mixture
from recurlm.inference.contexts import jensen_shannon, next_token
from recurlm.inference.mixture import Mixture, UnigramCache, fit_weights, losses
from recurlm.model.neural import NeuralModel
from recurlm.ngram.counts import count
from recurlm.ngram.model import NgramModel
from recurlm.ngram.smoothing import Settings, estimate
from recurlm.protocol import state_leaves
from recurlm.text.batches import measured_batches

V = 13


def ngram(seed: int, order: int) -> NgramModel:
    ids = np.random.default_rng(seed).integers(V - 1, size=400)  # the last word is unknown
    return NgramModel(estimate(count(ids, V, 0, order), ids, None, Settings(fallback=(0.5, 1, 1.5)))[0])


@pytest.fixture
def models(generator):
    neural = NeuralModel(ModelConfig(embedding_size=6, hidden_size=8, init_range=0.8), V, generator).requires_grad_(
        False
    )
    return [neural, ngram(1, 3), UnigramCache(V, 5)]


def test_the_cache_is_the_share_of_the_last_words(generator):
    cache, ids = UnigramCache(V, 4), torch.randint(3, (11, 2), generator=generator)
    log_probs_TBV, end = cache.advance(ids, cache.initial_state(2))
    for t in range(11):
        for b in range(2):
            seen = ids[max(0, t - 3) : t + 1, b].tolist()
            expected = [seen.count(w) / len(seen) for w in range(V)]
            assert log_probs_TBV[t, b].exp().numpy() == pytest.approx(expected, abs=1e-6)
    targets = torch.randint(3, (11, 2), generator=generator)
    nll_TB, same = cache.score(ids, targets, cache.initial_state(2))
    assert torch.allclose(nll_TB.float(), -log_probs_TBV.gather(-1, targets[..., None]).squeeze(-1))
    assert torch.equal(end, same) and torch.equal(end, ids[-4:].T)
    with pytest.raises(RequestError, match="window of 1"):
        UnigramCache(V, 0)


def test_a_mixture_is_the_weighted_sum_and_keeps_its_parts_in_the_state(models, generator):
    weights = [0.5, 0.3, 0.2]
    mixture, ids = Mixture(models, weights), torch.randint(V, (9, 3), generator=generator)
    parts = [m.advance(ids, m.initial_state(3))[0].double().exp() for m in models]
    expected = sum(w * p for w, p in zip(weights, parts, strict=True))
    log_probs_TBV, end = mixture.advance(ids, mixture.initial_state(3))
    assert torch.allclose(log_probs_TBV.double().exp(), expected, atol=1e-6)
    assert torch.allclose(log_probs_TBV.exp().sum(-1), torch.ones(()), atol=1e-5)
    targets = torch.randint(V, (9, 3), generator=generator)
    nll_TB, same = mixture.score(ids, targets, mixture.initial_state(3))
    assert torch.allclose((-nll_TB).exp(), expected.gather(-1, targets[..., None]).squeeze(-1), atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(state_leaves(end), state_leaves(same), strict=True))
    halfway = mixture.select(mixture.advance(ids[:4], mixture.initial_state(3))[1], torch.tensor([2, 0]))
    assert torch.allclose(mixture.advance(ids[4:, [2, 0]], halfway)[0], log_probs_TBV[4:, [2, 0]], atol=1e-5)


def test_a_part_without_weight_does_not_count(models, generator):
    ids = torch.randint(V, (5, 1), generator=generator)
    mixture = Mixture(models, [0.0, 1.0, 0.0])
    alone = models[1].advance(ids, models[1].initial_state(1))[0]
    assert torch.allclose(mixture.advance(ids, mixture.initial_state(1))[0], alone)
    nll_TB, _ = mixture.score(ids[:-1], ids[1:], mixture.initial_state(1))
    assert torch.allclose(nll_TB[:, 0].float(), -alone[:-1, 0].gather(-1, ids[1:])[:, 0])


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.6, 0.1], [1.5, -0.5, 0], [math.nan, 0.5, 0.5], []])
def test_weights_are_checked(models, weights):
    with pytest.raises(RequestError, match="expected"):
        Mixture(models, weights)


def test_models_of_other_vocabularies_or_directions_do_not_mix(models, generator):
    with pytest.raises(RequestError, match="one tokenizer"):
        Mixture([models[0], UnigramCache(V + 1, 5)], [0.5, 0.5])
    backward = NeuralModel(ModelConfig(embedding_size=6, hidden_size=8, backward=True), V, generator)
    with pytest.raises(RequestError, match="backward"):
        Mixture([models[1], backward], [0.5, 0.5])


@pytest.mark.parametrize("seed", range(5))
def test_em_finds_the_least_loss(seed):
    rng = np.random.default_rng(seed)
    nll_KN = rng.exponential(2, (3, 500)) + rng.normal(0, 0.3, (3, 1))
    nll_KN[2, ::3] = np.inf  # a cache has never seen a third
    weights, loss = fit_weights(nll_KN)
    assert math.fsum(weights) == pytest.approx(1)

    def mean_loss(w):
        return float(-np.log(np.asarray(w) @ np.exp(-nll_KN)).mean())

    assert loss == pytest.approx(mean_loss(weights), abs=1e-9)
    grid = [(a, b, 1 - a - b) for a in np.linspace(0.01, 0.97, 49) for b in np.linspace(0.01, 0.97, 49) if a + b < 1]
    assert loss <= min(map(mean_loss, grid)) + 1e-6
    with pytest.raises(RequestError, match="impossible"):
        fit_weights(np.full((2, 4), np.inf))


@pytest.mark.parametrize(("batch", "batching"), [(1, "stream"), (7, "stream"), (4, "sentence")])
def test_losses_are_those_of_each_model_and_every_target_counts_once(models, batch, batching):
    ids = np.random.default_rng(4).integers(V, size=201).astype(np.uint16)
    nll_KN = losses(models, measured_batches(ids, batching, batch, 0, "exact", 16), 16)
    assert nll_KN.shape == (3, 201)
    one = [losses([model], measured_batches(ids, batching, batch, 0, "exact", 16), 16)[0] for model in models]
    assert np.allclose(nll_KN, one)
    if batch == 1:
        x = torch.from_numpy(np.concatenate(([0], ids)).astype(np.int64))[:, None]
        assert nll_KN[1] == pytest.approx(models[1].score(x[:-1], x[1:], torch.tensor([-1]))[0][:, 0].numpy())


def test_a_tuned_mixture_is_no_worse_than_any_part_and_takes_the_best_cache(models):
    ids = np.repeat(np.random.default_rng(6).integers(V, size=150), 3).astype(np.uint16)
    parts = {"neural": models[0], "ngram": models[1]}
    mixture, weights, loss = tuned_mixture(parts, [1, 40], ids, 0, 1, "stream")
    assert list(weights) == ["neural", "ngram", "cache 1"] and weights["cache 1"] > 0.5
    alone = losses(models, measured_batches(ids, "stream", 1, 0, "exact", 64), 64).mean(1)
    assert loss < alone.min()
    again = losses([mixture], measured_batches(ids, "stream", 1, 0, "exact", 64), 64).mean()
    assert again == pytest.approx(loss, abs=1e-9)
    with pytest.raises(RequestError, match="batch_size"):
        tuned_mixture(parts, [], ids, 0, 0, "stream")


def test_the_divergence_of_two_contexts(models):
    p, q = (torch.tensor(values).log() for values in ([0.5, 0.5, 0.0], [0.0, 0.0, 1.0]))
    assert jensen_shannon(p, p) == 0 and jensen_shannon(p, q) == pytest.approx(1)
    half = torch.tensor([0.25, 0.25, 0.5]).log()
    by_hand = 0.5 * (0.5 * math.log2(0.5 / 0.375) * 2) + 0.5 * (
        0.5 * math.log2(0.25 / 0.375) + 0.5 * math.log2(0.5 / 0.25)
    )
    assert jensen_shannon(p, half) == pytest.approx(by_hand) == jensen_shannon(half, p)
    for model in models[:2]:
        assert next_token(model, [0, 3, 4]).exp().sum() == pytest.approx(1, abs=1e-5)
