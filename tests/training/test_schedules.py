"""Each schedule against its definition."""

import math

import pytest

from recurlm.config import ScheduleConfig
from recurlm.training.schedules import SCHEDULES, Progress, warm_up


def at(name: str, shares, **settings) -> list[float]:
    config = ScheduleConfig(name=name, **settings)
    return [SCHEDULES[name](config, Progress(0, 0, share, ())) for share in shares]


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


def test_warm_up_is_linear_and_there_for_every_schedule():
    config = ScheduleConfig(warmup_steps=3)
    assert [warm_up(config, Progress(s, 0, 0, ())) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert warm_up(ScheduleConfig(warmup_steps=0), Progress(0, 0, 0, ())) == 1


def test_fixed_milestones_of_the_whole():
    assert at("milestones", (0.49, 0.5, 0.74, 0.75, 1), milestone_shares=(0.5, 0.75), factor=0.5) == [
        1,
        0.5,
        0.5,
        0.25,
        0.25,
    ]


def test_linear_and_cosine_end_at_their_floor():
    assert at("linear", (0, 0.5, 1)) == [1, 0.5, 0]
    assert at("linear", (0, 1), floor=0.1) == pytest.approx([1, 0.1])
    assert at("cosine", (0, 0.25, 0.5, 1)) == pytest.approx([1, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0])
    assert at("cosine", (0, 0.25, 0.5, 0.75, 1), cycles=2, floor=0.2) == pytest.approx([1, 0.6, 1, 0.6, 0.2])


def test_cyclic_goes_up_and_down():
    assert at("cyclic", (0, 0.125, 0.25, 0.5, 0.75), cycles=2) == pytest.approx([0, 0.5, 1, 0, 1])


def test_slanted_triangle_peaks_where_it_is_told():
    assert at("slanted-triangular", (0, 0.05, 0.1, 0.55, 1), peak=0.1) == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_rate_may_hold_before_it_falls(name):
    held, plain = at(name, (0.0, 0.6, 0.7, 0.8, 1.0), hold=0.6, floor=0.1), at(name, (0.25, 0.5), floor=0.1)
    assert held == pytest.approx([1, 1, *plain, 0.1])
