"""Evaluation with dropout, against its formula."""

import dataclasses
import math

import pytest
import torch

from recurlm import api
from recurlm.config import DropoutConfig, ModelConfig
from recurlm.errors import RequestError, UserError
from recurlm.inference.monte_carlo import MonteCarloDropout
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NO_DROPOUT, NeuralModel
from support import tiny_config

DROPOUT = DropoutConfig(embedding=0.2, input=0.3, hidden=0.3, output=0.4, weight=0.3)


@pytest.fixture(params=LAYERS)
def model(request, generator) -> NeuralModel:
    config = ModelConfig(layer=request.param, embedding_size=6, hidden_sizes=(7, 6), windows=(2,), init_range=2.0)
    return NeuralModel(config, 11, generator).requires_grad_(False)


@pytest.fixture
def ids_TB(generator) -> torch.Tensor:
    return torch.randint(11, (9, 3), generator=generator)


def test_without_dropout_it_is_the_model(model, ids_TB):
    mean = MonteCarloDropout(model, NO_DROPOUT, 3)
    found, _ = mean.score(ids_TB[:-1], ids_TB[1:], mean.initial_state(3))
    expected, _ = model.score(ids_TB[:-1], ids_TB[1:], model.initial_state(3))
    torch.testing.assert_close(found.float(), expected)


def test_it_is_the_mean_of_the_probabilities_of_its_samples(model, ids_TB):
    mean = MonteCarloDropout(model, DROPOUT, 4, seed=5)
    state = mean.initial_state(3)
    found, states = mean.score(ids_TB[:-1], ids_TB[1:], state)
    log_probs, _ = mean.advance(ids_TB[:-1], state)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(8, 3))
    torch.testing.assert_close(-log_probs.gather(-1, ids_TB[1:, :, None])[..., 0], found.float())
    each = []
    for k in range(4):
        draw = torch.Generator().manual_seed(5 * 10_000 + k)
        each.append(-model.nll(model(ids_TB[:-1], model.initial_state(3), DROPOUT, draw).dropped_TBH, ids_TB[1:]))
    torch.testing.assert_close(found.float(), math.log(4) - torch.stack(each).logsumexp(0))
    assert not torch.equal(each[0], each[1]) and len(states) == 4


def test_windows_make_no_difference(model, ids_TB):
    mean = MonteCarloDropout(model, DROPOUT, 3)
    whole, end = mean.score(ids_TB[:-1], ids_TB[1:], mean.initial_state(3))
    state, parts = mean.initial_state(3), []
    for start in (0, 3, 4):
        stop = {0: 3, 3: 4, 4: 8}[start]
        part, state = mean.score(ids_TB[start:stop], ids_TB[start + 1 : stop + 1], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end)


def test_evaluate_takes_the_dropout_of_the_run(text_file, tmp_path):
    api.train(tiny_config("train.max_steps=30", f'data.path="{text_file}"'), tmp_path / "run", quiet=True)
    plain = api.evaluate(tmp_path / "run", batch_size=4)
    mean = api.evaluate(tmp_path / "run", batch_size=4, mc_dropout=5)
    assert mean["loss_nats"] != plain["loss_nats"] and mean["mc_dropout"] == 5 and "mc_dropout" not in plain
    assert mean["loss_nats"] == pytest.approx(plain["loss_nats"], rel=0.1)
    assert mean == api.evaluate(tmp_path / "run", batch_size=4, mc_dropout=5) | {"tokens_per_s": mean["tokens_per_s"]}
    ranked = api.evaluate(tmp_path / "run", batch_size=4, mc_dropout=5, with_ranks=False)
    assert ranked["loss_nats"] == pytest.approx(mean["loss_nats"], rel=1e-5)
    with pytest.raises(RequestError, match="mc_dropout = -1"):
        api.evaluate(tmp_path / "run", mc_dropout=-1)
    with pytest.raises(UserError, match="neural run directory"):
        api.evaluate(api.load(tmp_path / "run"), data=text_file, mc_dropout=2)


def test_what_a_head_drops_is_dropped(generator, ids_TB):
    config = ModelConfig(embedding_size=6, hidden_sizes=(7,), head="mixture", experts=2, init_range=2.0)
    model = NeuralModel(config, 11, generator).requires_grad_(False)
    mean = MonteCarloDropout(model, dataclasses.replace(NO_DROPOUT, latent=0.4), 3)
    found, _ = mean.score(ids_TB[:-1], ids_TB[1:], mean.initial_state(3))
    plain, _ = model.score(ids_TB[:-1], ids_TB[1:], model.initial_state(3))
    assert (found - plain).abs().max() > 0.01
    log_probs, _ = mean.advance(ids_TB[:-1], mean.initial_state(3))
    torch.testing.assert_close(-log_probs.gather(-1, ids_TB[1:, :, None])[..., 0], found.float())
    first, state = mean.score(ids_TB[:3], ids_TB[1:4], mean.initial_state(3))
    rest, _ = mean.score(ids_TB[3:-1], ids_TB[4:], state)
    torch.testing.assert_close(torch.cat((first, rest)), found)


def test_zoneout_has_no_masks_for_a_whole_text(generator):
    model = NeuralModel(ModelConfig(embedding_size=6, hidden_sizes=(6,), zoneout=0.1), 11, generator)
    with pytest.raises(RequestError, match="zoneout"):
        MonteCarloDropout(model, DROPOUT, 2)
