"""The neural cache against a loop over tokens in float64, and what it is at its limits."""

import dataclasses

import numpy as np
import pytest
import torch

from recurlm.config import CacheConfig, ModelConfig, cache_config
from recurlm.errors import ConfigError, RequestError
from recurlm.evaluation.interpolation import THETAS, tuned_mixture
from recurlm.inference import neural_cache
from recurlm.inference.mixture import Mixture, UnigramCache, losses
from recurlm.inference.neural_cache import NeuralCache
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NeuralModel
from recurlm.protocol import state_leaves
from recurlm.text.batches import measured_batches

V, T = 13, 90
CACHE = CacheConfig(window=7, theta=1.5, lambda_=0.3)


@pytest.fixture
def model(generator):
    sizes = {"embedding_size": 6, "hidden_size": 8, "init_range": 0.8}
    return NeuralModel(ModelConfig(**sizes), V, generator).double().requires_grad_(False)


@pytest.fixture
def ids(generator):
    return torch.randint(V, (T + 1, 2), generator=generator)


def by_hand(model, ids, config: CacheConfig) -> torch.Tensor:
    """probs_TBV, one token and row at a time; rule published as the published loop has it, its history cut at each chunk."""
    rows = []
    for ids_T1 in ids.split(1, dim=1):
        hidden = model(ids_T1[:-1], model.initial_state(1)).raw_TBH[:, 0]
        vocabulary = model.advance(ids_T1[:-1], model.initial_state(1))[0][:, 0].exp()
        keys, values, out = [], [], []
        published = config.rule == "published"
        for start in range(0, len(hidden), config.chunk if published else len(hidden)):
            chunk = range(start, min(len(hidden), start + config.chunk if published else len(hidden)))
            before = len(keys)
            for number, t in enumerate(chunk):
                p = vocabulary[t]
                if (before + number > config.window) if published else t > 0:
                    near = list(zip(keys, values, strict=True))[-config.window :]
                    attention = torch.stack([(config.theta * hidden[t] @ key) for key, _ in near]).softmax(0)
                    p = p * (1 - config.lambda_)
                    for a, (_, value) in zip(attention, near, strict=True):
                        p[value] += config.lambda_ * a
                out.append(p)
                keys.append(hidden[t])
                values.append(int(ids_T1[t + 1, 0]))
            if published:
                keys, values = keys[-config.window :], values[-config.window :]
        rows.append(torch.stack(out))
    return torch.stack(rows, 1)


CASES = [
    CACHE,
    dataclasses.replace(CACHE, window=1),
    dataclasses.replace(CACHE, window=10 * T),
    dataclasses.replace(CACHE, lambda_=1.0),
    dataclasses.replace(CACHE, theta=0.0),
    dataclasses.replace(CACHE, rule="published"),
    dataclasses.replace(CACHE, rule="published", chunk=5),
    dataclasses.replace(CACHE, rule="published", chunk=20),
    dataclasses.replace(CACHE, rule="published", window=1, chunk=1),
]


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("band", [neural_cache.QUERIES, 4])
def test_it_equals_a_loop_over_tokens(model, ids, config, band, monkeypatch):
    monkeypatch.setattr(neural_cache, "QUERIES", band)
    expected = by_hand(model, ids, config)
    cached = NeuralCache(model, config)
    log_probs_TBV, end = cached.advance(ids[:-1], cached.initial_state(2))
    torch.testing.assert_close(log_probs_TBV.exp(), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(log_probs_TBV.exp().sum(-1), torch.ones(T, 2).double(), rtol=0, atol=1e-13)
    nll_TB, same = cached.score(ids[:-1], ids[1:], cached.initial_state(2))
    torch.testing.assert_close((-nll_TB).exp(), expected.gather(-1, ids[1:, :, None])[..., 0], rtol=0, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(state_leaves(end), state_leaves(same), strict=True))


@pytest.mark.parametrize("config", CASES)
def test_windows_of_time_change_nothing_and_memory_is_bounded(model, ids, config, monkeypatch):
    monkeypatch.setattr(neural_cache, "SCORES", 40)  # one position at a time
    cached = NeuralCache(model, config)
    whole = cached.score(ids[:-1], ids[1:], cached.initial_state(2))[0]
    state, parts = cached.initial_state(2), []
    for x, y in zip(ids[:-1].split(11), ids[1:].split(11), strict=True):
        nll, state = cached.score(x, y, state)
        parts.append(nll)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-13)
    assert state[1].shape[1] == min(config.window, T)
    half = cached.select(cached.score(ids[:40], ids[1:41], cached.initial_state(2))[1], torch.tensor([1]))
    rest = cached.score(ids[40:-1, 1:], ids[41:, 1:], half)[0]
    torch.testing.assert_close(rest[:, 0], whole[40:, 1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("layer", LAYERS)
def test_lambda_0_is_the_model_and_any_layer_serves(layer, ids, generator):
    model = NeuralModel(ModelConfig(layer=layer, embedding_size=6, hidden_size=8), V, generator).requires_grad_(False)
    cached = NeuralCache(model, dataclasses.replace(CACHE, lambda_=0.0))
    expected = model.score(ids[:-1], ids[1:], model.initial_state(2))[0]
    assert torch.equal(cached.score(ids[:-1], ids[1:], cached.initial_state(2))[0], expected)
    expected = model.advance(ids[:-1], model.initial_state(2))[0]
    assert torch.equal(cached.advance(ids[:-1], cached.initial_state(2))[0], expected)


def repetitive(seed: int) -> np.ndarray:
    return np.repeat(np.random.default_rng(seed).integers(V, size=200), 2).astype(np.uint16)


def test_tuning_finds_the_least_loss_of_its_grid_and_that_is_what_evaluation_gives(model):
    ids, other = repetitive(1), UnigramCache(V, 9)
    batches = measured_batches(ids, "stream", 1, 0, "exact", 64)

    def loss(config, *weights):
        cached = NeuralCache(model, config)
        return losses([Mixture([cached, other], weights) if weights else cached], batches, 64).mean()

    found, weights, tuned = tuned_mixture({"a": model}, [], ids, 0, 1, "stream", CACHE, {"theta", "lambda"})
    assert loss(found.config) == pytest.approx(tuned, abs=1e-12) and list(weights) == ["a"]
    assert found.config.window == CACHE.window
    for theta in (0.5, 0.8, 1.0, 1.25, 2.0):
        for share in (0.5, 0.9, 1.1, 2.0):
            near = dataclasses.replace(
                found.config, theta=found.config.theta * theta, lambda_=min(1, found.config.lambda_ * share)
            )
            if THETAS[0] <= near.theta <= THETAS[-1]:
                assert tuned <= loss(near) + (1e-9 if theta == 1 else 1e-3)
    found, weights, tuned = tuned_mixture({"a": model}, [9, 2], ids, 0, 1, "stream", CACHE, {"theta", "lambda"})
    assert len(weights) == 2 and sum(weights.values()) == pytest.approx(1)
    assert losses([found], batches, 64).mean() == pytest.approx(tuned, abs=1e-12)
    found, weights, tuned = tuned_mixture({"a": model}, [9], ids, 0, 1, "stream", CACHE)  # the cache as it is given
    assert found.models[0].config == CACHE and loss(CACHE, *weights.values()) == pytest.approx(tuned, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"windw": 5}, "'window'"),
        ({"window": 0}, "window = 0"),
        ({"window": 2.5}, "a whole number"),
        ({"lambda": 1.5}, "from 0 to 1"),
        ({"theta": float("nan")}, "finite"),
        ({"rule": "publishd"}, "'published'"),
    ],
)
def test_settings_are_checked(values, says):
    with pytest.raises(ConfigError, match=says):
        cache_config(values)


def test_a_model_without_hidden_states_has_no_neural_cache():
    with pytest.raises(RequestError, match="neural model"):
        NeuralCache(UnigramCache(V, 3), CACHE)
