"""Optimisers, schedules, averaging, objective and batches, each against its definition."""

import math

import numpy as np
import pytest
import torch

from recurlm.config import (
    AveragingConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from recurlm.model.neural import Activations, NeuralModel
from recurlm.text.batches import Streams, window_length
from recurlm.training import checkpoint, objective
from recurlm.training.averaging import AVERAGING, NTASGD, applied
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.schedules import SCHEDULES, Progress
from support import tiny_config


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends_and_continues_from_its_saved_state(name):
    def make():
        p = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        return p, OPTIMIZERS[name]([p], OptimizerConfig(name=name, lr=0.05, momentum=0.5, weight_decay=1e-3))

    def steps(p, optimizer, count):
        for _ in range(count):
            p.grad = 2 * p.detach()
            optimizer.step()

    p, optimizer = make()
    steps(p, optimizer, 20)
    saved, weights = checkpoint.flatten_optimizer(optimizer), p.detach().clone()
    saved = {k: v.clone() for k, v in saved.items()}
    steps(p, optimizer, 20)
    assert p.abs().sum() < weights.abs().sum() < 5
    again, optimizer = make()
    again.data.copy_(weights)
    checkpoint.restore_optimizer(optimizer, saved)
    steps(again, optimizer, 20)
    assert torch.equal(again, p)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_a_pure_factor_between_0_and_1(name):
    config = ScheduleConfig(name=name, milestones=(2, 4), warmup_steps=5)
    for step in range(0, 100, 7):
        progress = Progress(step, step // 10, step / 100, tuple(5 - 0.1 * i for i in range(step // 10)))
        value = SCHEDULES[name](config, progress)
        assert 0 <= value <= 1
        assert value == SCHEDULES[name](config, progress)


def test_milestones_divide_after_the_epoch():
    config = ScheduleConfig(milestones=(300, 400), factor=0.1)
    values = [SCHEDULES["milestones"](config, Progress(0, e, 0, ())) for e in (299, 300, 399, 400)]
    assert values == pytest.approx([1, 0.1, 0.1, 0.01])


def test_plateau_waits_for_its_patience():
    config = ScheduleConfig(factor=0.5, patience=1)
    losses, values = (5.0, 4.0, 4.5, 4.6, 4.7, 4.8, 3.0), []
    for n in range(len(losses) + 1):
        values.append(SCHEDULES["plateau"](config, Progress(0, n, 0, losses[:n])))
    assert values == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_linear_warms_up_and_ends_at_zero():
    config = ScheduleConfig(warmup_steps=3)
    assert [SCHEDULES["linear"](config, Progress(s, 0, 0, ())) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert SCHEDULES["linear"](config, Progress(9, 0, 1.0, ())) == 0


def published_trigger(losses, n):
    """Fires at the first t with t - 1 > n and v_t > min(v_1 .. v_{t-1-n}); the code's own words, one-based t."""
    for t in range(1, len(losses) + 1):
        if t - 1 > n and losses[t - 1] > min(losses[: t - 1 - n]):
            return t
    return None


@pytest.mark.parametrize("seed", range(30))
def test_nt_asgd_fires_exactly_when_published(seed):
    rng = np.random.default_rng(seed)
    losses = (5 - np.arange(40) * 0.05 + rng.normal(0, 0.15, 40)).tolist()
    averaging = NTASGD(AveragingConfig(nonmono=5))
    fired = [t for t in range(1, 41) if averaging.observe(losses[:t])]
    expected = published_trigger(losses, 5)
    assert fired == ([expected] if expected else [])


def test_nt_asgd_cannot_fire_before_epoch_7():
    averaging = NTASGD(AveragingConfig(nonmono=5))
    losses = [1.0, *[2.0] * 9]
    assert [t for t in range(1, 11) if averaging.observe(losses[:t])] == [7]


@pytest.mark.parametrize("name", AVERAGING)
def test_every_averaging_survives_a_checkpoint(name):
    def run(averaging, values):
        p = torch.nn.Parameter(torch.zeros(4))
        for value in values:
            p.data.fill_(value)
            averaging.update([p])
        return p

    one = AVERAGING[name](AveragingConfig(name=name, nonmono=1))
    one.observe([1.0, 2.0, 3.0])
    run(one, [1.0, 2.0, 4.0])
    tensors, values = one.state()
    two = AVERAGING[name](AveragingConfig(name=name, nonmono=1))
    two.restore({k: v.clone() for k, v in tensors.items()}, values)
    run(one, [8.0]), run(two, [8.0])
    for a, b in zip(one.weights() or [], two.weights() or [], strict=True):
        assert torch.equal(a, b)


def test_nt_asgd_averages_every_iterate_after_the_start_for_all_parameters():
    averaging = NTASGD(AveragingConfig(nonmono=1))
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    averaging.update(parameters)
    assert averaging.weights() is None
    assert averaging.observe([1.0, 2.0, 3.0])
    for value in (1.0, 2.0, 6.0):
        for p in parameters:
            p.data.fill_(value)
        averaging.update(parameters)
    for mean in averaging.weights() or []:
        torch.testing.assert_close(mean, torch.full_like(mean, 3.0))
    with applied(averaging, parameters):
        assert parameters[0][0].item() == pytest.approx(3.0)
    assert parameters[0][0].item() == 6.0


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


@pytest.mark.parametrize("n", [1, 2, 7, 29, 30, 31, 100])
@pytest.mark.parametrize("batch", [1, 3, 10, 30])
@pytest.mark.parametrize("window", [1, 4, 50])
def test_exact_streams_count_every_token_once(n, batch, window):
    ids = np.arange(1, n + 1, dtype=np.uint16)
    streams = Streams(ids, batch, boundary_id=0)
    counted, position = [], 0
    while position < streams.length:
        inputs, targets = streams.window(position, window)
        assert np.array_equal(inputs, targets - 1)  # each input is the token before its target, the first the boundary
        mask = streams.counted(position, window)
        counted += targets[mask].tolist() if mask is not None else targets.flatten().tolist()
        position += window
    assert sorted(counted) == list(range(1, n + 1))
    assert streams.targets == n


def test_published_streams_are_those_of_awd_lstm_lm():
    ids, batch = np.arange(103, dtype=np.uint16), 10
    streams = Streams(ids, batch, 0, "published")
    rows = ids[: 103 // batch * batch].reshape(batch, -1).T  # batchify
    inputs, targets = streams.window(0, 70)
    assert np.array_equal(inputs, rows[:-1])
    assert np.array_equal(targets, rows[1:])
    assert streams.train_length == len(rows) - 2


def test_window_lengths_have_the_published_distribution():
    config = DataConfig(bptt=70, bptt_full_share=0.95, bptt_spread=5.0)
    lengths = np.array([window_length(config, 1, step) for step in range(4000)])
    assert np.array_equal(lengths, [window_length(config, 1, step) for step in range(4000)])
    assert abs(lengths.mean() - 67.75) < 0.6
    assert abs((lengths < 52).mean() - 0.05) < 0.015
    assert lengths.min() >= 5
    capped = DataConfig(bptt=70, bptt_spread=5.0, bptt_cap=72, bptt_min=69)
    assert {window_length(capped, 2, step) for step in range(200)} == {69, 70, 71, 72}
    assert window_length(DataConfig(bptt=33), 1, 5) == 33


def test_the_tiny_configuration_uses_every_dropout():
    assert all(p > 0 for p in vars(tiny_config().dropout).values())
    assert math.isfinite(tiny_config().optimizer.lr)
