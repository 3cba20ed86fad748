"""Losses against an oracle in numpy."""

import math

import numpy as np
import pytest
import torch

from recurlm.config import ModelConfig
from recurlm.errors import DataError
from recurlm.evaluation.metrics import ranks
from recurlm.evaluation.perplexity import evaluate_ids, mean_loss
from recurlm.model.neural import NeuralModel

COUNTS = {"words": 50, "characters": 200, "bytes": 210}


@pytest.fixture
def model(generator):
    return NeuralModel(ModelConfig(embedding_size=6, hidden_size=8, init_range=0.8), 13, generator).double()


def oracle(model, ids) -> float:
    """Nats summed over one row, the first token predicted from id 0, one step at a time."""
    state, total, before = model.initial_state(1), 0.0, 0
    for token in ids.tolist():
        log_probs, state = model.advance(torch.tensor([[before]]), state)
        total -= log_probs[0, 0, token].item()
        before = token
    return total


def test_one_stream_equals_the_oracle(model):
    ids = np.random.default_rng(1).integers(13, size=157).astype(np.uint16)
    expected = oracle(model, ids)
    values = evaluate_ids(model, ids, 0, COUNTS, 1, "exact", with_ranks=True)
    assert values["loss_nats"] == pytest.approx(expected / 157, rel=1e-9)
    assert values["ppl"] == pytest.approx(math.exp(expected / 157), rel=1e-9)
    assert values["ppl_word"] == pytest.approx(math.exp(expected / 50), rel=1e-9)
    assert values["bpc"] == pytest.approx(expected / math.log(2) / 200, rel=1e-9)
    assert values["bpb"] == pytest.approx(expected / math.log(2) / 210, rel=1e-9)
    assert values["targets"] == 157
    assert mean_loss(model, ids, 0, 1, "exact") == pytest.approx(expected / 157, rel=1e-9)


@pytest.mark.parametrize("batch", [2, 10, 156, 157, 400])
def test_every_token_counts_once_in_any_batch(model, batch):
    ids = np.random.default_rng(1).integers(13, size=157).astype(np.uint16)
    values = evaluate_ids(model, ids, 0, COUNTS, batch, "exact", with_ranks=False)
    with_ranks = evaluate_ids(model, ids, 0, COUNTS, batch, "exact", with_ranks=True)
    assert values["targets"] == 157
    assert with_ranks["loss_nats"] == pytest.approx(values["loss_nats"], rel=1e-12)


def test_the_published_rule_divides_by_tokens_and_drops_the_remainder(model):
    ids = np.random.default_rng(1).integers(13, size=157).astype(np.uint16)
    rows = torch.from_numpy(ids[:150].reshape(10, 15).T.astype(np.int64))
    nll, _ = model.score(rows[:-1], rows[1:], model.initial_state(10))
    values = evaluate_ids(model, ids, 0, COUNTS, 10, "published", with_ranks=False)
    assert values["loss_nats"] == pytest.approx(nll.sum().item() / 150, rel=1e-9)
    assert values["targets"] == 140


def test_ranks_count_ties_half():
    log_probs = torch.tensor([[[0.1, 0.3, 0.3, 0.3]]]).log()
    assert ranks(log_probs, torch.tensor([[0]])).item() == 4
    assert ranks(log_probs, torch.tensor([[1]])).item() == 2


def test_a_text_too_short_for_its_streams_is_refused_not_measured_as_perfect(model):
    with pytest.raises(DataError, match="too short"):
        mean_loss(model, np.zeros(15, np.uint16), 0, 10, "published")
