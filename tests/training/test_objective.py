"""The objective's terms against their formulas."""

import pytest
import torch

from recurlm.config import ModelConfig, ObjectiveConfig
from recurlm.model.neural import Activations, NeuralModel
from recurlm.training import objective


def test_objective_terms_are_the_published_formulas(generator):
    model = NeuralModel(ModelConfig(embedding_size=5, hidden_size=6), 7, generator)
    raw, dropped = torch.randn(4, 2, 5, generator=generator), torch.randn(4, 2, 5, generator=generator)
    targets = torch.randint(7, (4, 2), generator=generator)
    out = Activations(raw, dropped, ())
    terms = objective.terms(model, out, targets, ObjectiveConfig(ar=2, tar=3))
    logits = dropped @ model.embedding.T + model.head.bias
    assert terms["nll"].item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-5
    )
    assert terms["ar"].item() == pytest.approx(2 * dropped.pow(2).mean().item(), rel=1e-6)
    assert terms["tar"].item() == pytest.approx(3 * (raw[1:] - raw[:-1]).pow(2).mean().item(), rel=1e-6)
    assert set(objective.terms(model, out, targets, ObjectiveConfig())) == {"nll"}
    one = Activations(raw[:1], dropped[:1], ())
    assert "tar" not in objective.terms(model, one, targets[:1], ObjectiveConfig(tar=3))  # a mean of nothing


def test_means_leave_out_what_does_not_count(generator):
    model = NeuralModel(ModelConfig(embedding_size=5, hidden_size=6), 7, generator)
    raw, dropped = torch.randn(4, 2, 5, generator=generator), torch.randn(4, 2, 5, generator=generator)
    targets = torch.randint(7, (4, 2), generator=generator)
    counted = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]], dtype=torch.bool)
    config = ObjectiveConfig(ar=2, tar=3)
    found = objective.terms(model, Activations(raw, dropped, ()), targets, config, counted)
    nll = model.nll(dropped, targets)
    assert found["nll"].item() == pytest.approx((nll[:, 0].sum() + nll[:2, 1].sum()).item() / 6, rel=1e-6)
    squares = dropped.pow(2).mean(-1)
    assert found["ar"].item() == pytest.approx(2 * squares[counted].mean().item(), rel=1e-6)
    changes = (raw[1:] - raw[:-1]).pow(2).mean(-1)
    assert found["tar"].item() == pytest.approx(3 * changes[counted[1:]].mean().item(), rel=1e-6)
