"""Timing: that it calls, orders, counts and prints as it says. No time is compared with another."""

import io

import pytest
import torch
from rich.console import Console

from recurlm.bench import timing
from recurlm.bench.timing import Row, cpu_time, duration, table

CUDA = torch.cuda.is_available()


def test_cpu_functions_take_turns():
    calls = []
    times = cpu_time({name: lambda name=name: calls.append(name) for name in "abc"}, seconds=0, rounds=4)
    assert "".join(calls) == "abc" + "abccba" * 2  # once before, then in turn
    assert list(times) == ["a", "b", "c"]
    assert all(0 < t.best <= t.median for t in times.values())


def test_best_and_median_are_those_of_the_clock(monkeypatch):
    clock = iter([0, 0, 3, 3, 4, 4, 12, 99])  # of one function, after the start: 3, 1, 8 s, then the time is up
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert cpu_time({"": lambda: None}, seconds=0, rounds=3)[""] == (1e6, 3e6)


@pytest.mark.parametrize(
    ("microseconds", "shown"),
    [
        (None, ""), (0.1234, "0.12 us"), (9.996, "10.0 us"), (45.72, "45.7 us"), (812.3, "812 us"), (999.4, "999 us"),
        (999.6, "1.00 ms"), (4561, "4.56 ms"), (999_600, "1.00 s"), (1.3e6, "1.30 s"), (3.6e9, "3,600 s"),
    ],
)  # fmt: skip
def test_durations_have_three_digits(microseconds, shown):
    assert duration(microseconds) == shown


FULL = Row(
    measure="linear_cross_entropy forward + backward", shape="4,480 x 1,150 x 33,278 bfloat16", ours_us=123_456.0,
    peer_us=234_567.0, peer="torch.compile, max-autotune", limit_us=98_765.0, target="90 % of the limit",
    rate="12,345 tokens/s", memory_mb=12_345.6,
)  # fmt: skip


def test_share_is_of_the_limit():
    assert FULL.as_dict()["share"] == 98_765 / 123_456
    assert Row(measure="m", shape="s", ours_us=1.0).as_dict()["share"] is None


def printed(rows, width):
    out = io.StringIO()
    Console(file=out, width=width).print(table("pooling", rows, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_with_every_number_whole(width):
    text = printed([FULL.as_dict(), Row(measure="m", shape="s", ours_us=5.0).as_dict()], width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number in ("123 ms", "235 ms", "1.90", "98.8 ms", "80%", "12,346 MB", "5.00 us"):
        assert number in text
    for words in (FULL.measure, FULL.peer, FULL.target, FULL.rate):
        assert all(word in text for word in words.split())


def test_empty_columns_are_left_out():
    text = printed([Row(measure="m", shape="s", ours_us=5.0).as_dict()], 80)
    assert "ours" in text and not any(name in text for name in ("peer", "ratio", "limit", "target", "MB"))


def test_works_in_turn():
    made = iter(range(99))
    assert timing.in_turn(lambda: next(made), timing.ROTATED_BYTES // 3) == [0, 1, 2, 3]
    assert len(timing.in_turn(lambda: next(made), 10 * timing.ROTATED_BYTES)) == 1


def test_each_call_is_made_while_the_other_works_results_live():
    alive, seen = [], []

    class Result:
        def __init__(self, name):
            self.name = name
            seen.append("".join(alive) + name)
            alive.append(name)

        def __del__(self):
            alive.remove(self.name)

    timing._call_in_turn([lambda name=name: Result(name) for name in "abc"], 5)
    assert seen == ["a", "ab", "abc", "bca", "cab"] and not alive


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("graph", [True, False])
def test_gpu_time_runs_and_measures(graph):
    def make():
        x = torch.randn(1 << 20, device="cuda")
        return lambda: x + 1.0

    assert timing.gpu_time(make(), graph=graph) > 0
    works = timing.in_turn(make, 8 << 20)
    assert len(works) == 32
    assert timing.gpu_time(works, graph=graph) > 1  # 8 MB take more than 1 us in the memory of any GPU
    assert timing.gpu_memory(lambda: torch.empty(1 << 20, device="cuda")) == pytest.approx(4.2, abs=0.1)


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_rates_of_the_gpu_are_above_those_of_any_cpu():
    assert timing.copy_bandwidth() > 1e11 and timing.gemm_rate(torch.bfloat16) > 1e13
