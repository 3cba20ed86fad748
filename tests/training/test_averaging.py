"""Each averaging against its definition."""

import numpy as np
import pytest
import torch

from recurlm.config import AveragingConfig
from recurlm.training.averaging import AVERAGING, EMA, NTASGD, SWA, Averaging, Tail, applied


def feed(averaging: Averaging, values: list[float]) -> float:
    """The mean after iterates of these values, all in the second half of training."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    for step, value in enumerate(values, 1):
        p.data.fill_(value)
        averaging.move([p], averaging.enters(step, 0.5))
    mean = averaging.weights()
    assert mean is not None
    return mean[0].item()


def test_an_exponential_average_is_a_plain_mean_first_and_then_forgets():
    values = [1.0, 2.0, 6.0, 3.0]
    assert feed(EMA(AveragingConfig(start=0.5, decay=0.999)), values) == pytest.approx(3.0)
    assert feed(EMA(AveragingConfig(start=0.5, decay=0.5)), values) == pytest.approx(((1.5 + 6) / 2 + 3) / 2)


def test_stochastic_weight_averaging_takes_every_nth():
    assert feed(SWA(AveragingConfig(start=0.5, every=2)), [1.0, 2.0, 9.0, 6.0, 7.0]) == pytest.approx(3.0)


@pytest.mark.parametrize("forget", [0.0, 1.0, 3.0])
def test_the_tail_mean_weighs_as_its_polynomial(forget):
    values = np.random.default_rng(1).normal(size=50)
    expected = 0.0
    for t, value in enumerate(values, 1):
        share = (forget + 1) / (t + forget)
        expected = (1 - share) * expected + share * value
    assert feed(Tail(AveragingConfig(start=0.5, forget=forget)), values.tolist()) == pytest.approx(expected)
    if forget == 0:
        assert expected == pytest.approx(values.mean())


@pytest.mark.parametrize("kind", [EMA, SWA, Tail])
def test_timed_averages_begin_at_their_share(kind):
    averaging, p = kind(AveragingConfig(start=0.75)), torch.nn.Parameter(torch.ones(2))
    averaging.move([p], averaging.enters(1, 0.74))
    assert averaging.weights() is None
    averaging.move([p], averaging.enters(2, 0.75))
    assert averaging.weights() is not None


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


def test_patience_waits_for_as_many_worse_validations_in_a_row():
    losses = [3.0, 2.0, 2.5, 1.9, 2.6, 2.7, 2.8, 1.0, 2.9, 2.9]
    worse = [len(losses[:t]) - 1 > 1 and losses[t - 1] > min(losses[: t - 2]) for t in range(1, len(losses) + 1)]
    for patience in range(4):
        averaging = NTASGD(AveragingConfig(nonmono=1, patience=patience))
        fired = [t for t in range(1, len(losses) + 1) if averaging.observe(losses[:t])]
        rows = [t for t in range(patience, len(losses)) if all(worse[t - patience : t + 1])]
        assert fired == [t + 1 for t in rows[:1]]


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("trigger", ["share", "nonmono"])
def test_any_mean_starts_by_either_trigger(name, trigger):
    averaging = AVERAGING[name](AveragingConfig(trigger=trigger, start=0.5, nonmono=1))
    p = torch.nn.Parameter(torch.ones(2))
    averaging.move([p], averaging.enters(1, 0.4))
    assert averaging.weights() is None
    fired = averaging.observe([1.0, 2.0, 3.0])
    averaging.move([p], averaging.enters(2, 0.45))
    by_losses = averaging.weights() is not None
    averaging.move([p], averaging.enters(3, 0.5))
    by_share = averaging.weights() is not None and not by_losses
    assert (fired, by_losses, by_share) == (
        (False, False, False) if name == "none" else (trigger == "nonmono", trigger == "nonmono", trigger == "share")
    )


@pytest.mark.parametrize("trigger", ["share", "nonmono"])
def test_a_mean_starts_afresh_when_its_own_validations_rise(trigger):
    averaging = NTASGD(AveragingConfig(trigger=trigger, start=0.0, nonmono=1, restart=1))
    p, losses = torch.nn.Parameter(torch.zeros(1)), [1.0, 2.0, 3.0] if trigger == "nonmono" else []
    assert averaging.observe(losses) == (trigger == "nonmono")

    def epoch(value: float, loss: float) -> bool:
        p.data.fill_(value)
        for step in range(4):
            averaging.move([p], averaging.enters(step, 0.3))
        losses.append(loss)
        return averaging.observe(losses)

    assert not epoch(1.0, 2.9) and not epoch(3.0, 2.8)  # better than before the mean, or not long enough
    mean = averaging.weights()
    assert mean is not None and mean[0].item() == pytest.approx(2.0)
    tensors, values = averaging.state()
    again = NTASGD(averaging.config)
    again.restore({name: t.clone() for name, t in tensors.items()}, values)
    assert epoch(5.0, 3.5) and again.observe(losses)
    mean = averaging.weights()
    assert mean is not None and mean[0].item() == pytest.approx(3.0)  # until the next iterate
    assert not epoch(7.0, 9.0)
    mean = averaging.weights()
    assert mean is not None and mean[0].item() == pytest.approx(7.0)
    assert not epoch(7.0, 8.0) and not epoch(7.0, 8.5) and epoch(7.0, 8.6)


def test_nt_asgd_cannot_fire_before_epoch_7():
    averaging = NTASGD(AveragingConfig(nonmono=5))
    losses = [1.0, *[2.0] * 9]
    assert [t for t in range(1, 11) if averaging.observe(losses[:t])] == [7]


def test_nt_asgd_averages_every_iterate_after_the_start_for_all_parameters():
    averaging = NTASGD(AveragingConfig(nonmono=1))
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    averaging.move(parameters, averaging.enters(1, 0.0))
    assert averaging.weights() is None
    assert averaging.observe([1.0, 2.0, 3.0])
    for value in (1.0, 2.0, 6.0):
        for p in parameters:
            p.data.fill_(value)
        averaging.move(parameters, averaging.enters(1, 0.0))
    for mean in averaging.weights() or []:
        torch.testing.assert_close(mean, torch.full_like(mean, 3.0))
    with applied(averaging, parameters):
        assert parameters[0][0].item() == pytest.approx(3.0)
    assert parameters[0][0].item() == 6.0
