"""What every optimiser, schedule and averaging must keep, looped over the registries: nothing here names one."""

import math

import pytest
import torch

from recurlm.config import AveragingConfig, OptimizerConfig, ScheduleConfig
from recurlm.training import checkpoint
from recurlm.training.averaging import AVERAGING
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.schedules import SCHEDULES, Progress, warm_up
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
    config = ScheduleConfig(name=name, milestones=(2, 4), milestone_shares=(0.5, 0.75), warmup_steps=5)
    for step in range(0, 101, 5):
        progress = Progress(step, step // 10, step / 100, tuple(5 - 0.1 * i for i in range(step // 10)))
        value = SCHEDULES[name](config, progress)
        assert 0 <= value <= 1
        assert 0 < warm_up(config, progress) <= 1
        assert value == SCHEDULES[name](config, progress)


@pytest.mark.parametrize("name", AVERAGING)
def test_every_averaging_survives_a_checkpoint(name):
    def run(averaging, values):
        p = torch.nn.Parameter(torch.zeros(4))
        for value in values:
            p.data.fill_(value)
            averaging.move([p], averaging.enters(int(value), 0.5))
        return p

    config = AveragingConfig(name=name, nonmono=1, start=0.5, decay=0.9)
    one = AVERAGING[name](config)
    one.observe([1.0, 2.0, 3.0])
    run(one, [1.0, 2.0, 4.0])
    tensors, values = one.state()
    two = AVERAGING[name](config)
    two.restore({k: v.clone() for k, v in tensors.items()}, values)
    run(one, [8.0]), run(two, [8.0])
    for a, b in zip(one.weights() or [], two.weights() or [], strict=True):
        assert torch.equal(a, b)


def test_the_tiny_configuration_uses_every_dropout_that_every_layer_has():
    assert all(p > 0 for name, p in vars(tiny_config().dropout).items() if name != "recurrent")
    assert math.isfinite(tiny_config().optimizer.lr)


@pytest.mark.parametrize("name", AVERAGING)
def test_every_average_stays_among_its_iterates(name):
    averaging = AVERAGING[name](AveragingConfig(name=name, nonmono=1, start=0.2, every=3))
    p = torch.nn.Parameter(torch.zeros(1))
    for step in range(1, 101):
        p.data.fill_(step)
        averaging.move([p], averaging.enters(step, step / 100))
        if step % 10 == 0:
            averaging.observe([1.0, 2.0, 3.0, 4.0])
    for mean in averaging.weights() or []:
        assert 10 <= mean.item() <= 100
