"""The one place that measures time, bandwidth and memory, and prints what was measured.

GPU times are the device's own, CPU times those of the wall clock with the functions that are compared taking turns.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from rich.table import Table

ROTATED_BYTES = 1 << 28  # several times the L2 cache of any GPU
CAPTURED_US = 2000.0  # of calls in a row, beside which the few microseconds of a launch are nothing
Work = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a measurement; times in microseconds, None for what there is not.

    `limit_us` is the time that the hardware needs at least, by a bandwidth or rate measured in the same run; `share` the
    part of it that is reached. `target` and `rate` are for people: "under 0.4 s", "12,300 tokens/s".
    """

    measure: str
    shape: str
    ours_us: float
    peer_us: float | None = None
    peer: str = ""
    limit_us: float | None = None
    target: str = ""
    rate: str = ""
    memory_mb: float | None = None

    @property
    def share(self) -> float | None:
        """limit_us / ours_us."""
        return None if self.limit_us is None else self.limit_us / self.ours_us

    def as_dict(self) -> dict[str, Any]:
        """The row as it is printed and kept, `share` included."""
        return {**asdict(self), "share": self.share}


class Times(NamedTuple):
    """The fastest and the middle of some repeats, in microseconds."""

    best: float
    median: float


def cpu_time(works: Mapping[str, Work], *, seconds: float = 2.0, rounds: int = 5) -> dict[str, Times]:
    """The Times of each function by its name.

    The functions take turns, every other round in reverse order, so that whatever else the machine does meets all of
    them: at least `rounds` rounds, then until about `seconds` are over. Each is called once before.
    """
    spent: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    started, turns = time.perf_counter(), list(works.items())
    while len(spent[turns[0][0]]) < rounds or time.perf_counter() - started < seconds:
        for name, work in turns:
            start = time.perf_counter()
            work()
            spent[name].append(time.perf_counter() - start)
        turns.reverse()
    return {name: Times(1e6 * min(times), 1e6 * statistics.median(times)) for name, times in spent.items()}


def in_turn(make: Callable[[], Work], nbytes: int) -> list[Work]:
    """So many works, each made with data of its own, that calls in turn find nothing of theirs in the GPU's L2 cache.

    One call reads and writes `nbytes`; a single work is enough where that is several times the cache.
    """
    return [make() for _ in range(-(-ROTATED_BYTES // nbytes))]


def gpu_time(work: Work | Sequence[Work], *, graph: bool = True, repeats: int = 20) -> float:
    """Median microseconds of one call on the current GPU, after three to warm up.

    Many calls in a row are timed as one, some 2 ms of them or each work once, and several works take turns: each then
    meets a cache full of the others' data, and pays for the write-back of what the others wrote as they do for its own.
    A work alone finds its data in the L2 cache as far as it fits there: give `in_turn(...)` unless its data is far
    larger. What a call returns is kept for one turn, so that results do not share memory either. With `graph` the
    calls are captured in one CUDA graph, so no Python stands between their kernels (they must be capturable);
    without, they are timed as Python launches them.
    """
    works = [work] if callable(work) else list(work)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _call_in_turn(works, len(works))
    torch.cuda.current_stream().wait_stream(side)
    series = _series(works, 1, graph)
    turns = max(1, round(CAPTURED_US / _elapsed([series] * 3)))
    if turns > 1:
        series = _series(works, turns, graph)
    return _elapsed([series] * repeats) / (turns * len(works))


def _series(works: Sequence[Work], turns: int, graph: bool) -> Work:
    """The works in turn, so many times; with `graph` as one CUDA graph, which ran once."""
    if not graph:
        return lambda: _call_in_turn(works, turns * len(works))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        _call_in_turn(works, turns * len(works))
    captured.replay()
    return captured.replay


def _call_in_turn(works: Sequence[Work], calls: int) -> None:
    kept: deque[Any] = deque(maxlen=len(works) - 1)
    for n in range(calls):
        kept.append(works[n % len(works)]())


def _elapsed(works: Sequence[Work]) -> float:
    """Median microseconds of the works, one after the other, on the current GPU."""
    marks = []
    for work in works:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return 1000 * statistics.median(start.elapsed_time(end) for start, end in marks)


def gpu_memory(work: Work) -> float:
    """Megabytes (1e6 bytes) that one call of the work takes at its peak beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@cache
def copy_bandwidth(device: str = "cuda") -> float:
    """Bytes a second, read and written together, of copying a large random tensor; measured once in a process.

    Not in a CUDA graph: there a copy is a node of its own kind, which the GPU's copy engines do, more slowly.
    """
    source = torch.randn((1 << 28) if device == "cuda" else (1 << 24), device=device)  # 1 GiB, 64 MiB
    copy = torch.empty_like(source)
    return 2 * source.nbytes / (1e-6 * _time(lambda: copy.copy_(source), device, graph=False))


def gemm_rate(dtype: torch.dtype, device: str = "cuda") -> float:
    """Multiplications and additions a second of a large square matrix product; measured once in a process.

    float32 multiplies as torch.set_float32_matmul_precision says at the time of the call.
    """
    return _gemm_rate(dtype, device, torch.get_float32_matmul_precision())


@cache
def _gemm_rate(dtype: torch.dtype, device: str, how: str) -> float:
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / (1e-6 * _time(lambda: torch.mm(a, b, out=out), device))


def _time(work: Work, device: str, graph: bool = True) -> float:
    """Microseconds: the median on the GPU, the fastest of about a second on the CPU."""
    return gpu_time(work, graph=graph) if device == "cuda" else cpu_time({"": work}, seconds=1.0)[""].best


def duration(microseconds: float | None) -> str:
    """A time with three digits and its unit, such as '4.56 ms'; '' for None."""
    if microseconds is None:
        return ""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.9995 * size:
            return f"{_digits(microseconds / size)} {unit}"
    return f"{_digits(microseconds)} us"


def _digits(value: float) -> str:
    """Three digits, more before the point where there are more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def table(title: str, rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """The rows as a table for people, two lines a row or more, in at most `width` characters.

    Columns that no row fills are left out. Numbers are always whole; words are wrapped, and broken where they must be.
    """
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    cells = {
        "measure\n  shape": [f"{row['measure']}\n  {row['shape']}" for row in rows],
        "ours": [duration(row["ours_us"]) + _memory(row.get("memory_mb")) for row in rows],
        "peer": [f"{duration(row['peer_us'])}\n{row['peer']}" for row in rows],
        "ratio": [_digits(row["peer_us"] / row["ours_us"]) if row["peer_us"] else "" for row in rows],
        "limit\nshare": [_limit(row["limit_us"], row["share"]) for row in rows],
        "target\nrate": [f"{row['target'] or ''}\n{row.get('rate') or ''}" for row in rows],
    }
    cells = {name: column for name, column in cells.items() if any(map(str.strip, column))}
    widest = {name: max(len(x) for cell in (name, *column) for x in cell.split("\n")) for name, column in cells.items()}
    words = [name for name in ("target\nrate", "peer", "measure\n  shape") if name in cells]
    left = width - 2 * len(cells) - sum(size for name, size in widest.items() if name not in words)
    for n, name in enumerate(words):  # each gets what the later ones leave, or else a quarter; the measure the rest
        longest = max(len(word) for cell in cells[name] for word in cell.split())
        share = max(left - sum(widest[later] for later in words[n + 1 :]), min(max(left // 4, longest), left // 2))
        widest[name] = max(1, min(widest[name], left if name == words[-1] else share))
        left -= widest[name]
    columns = [
        Column(name, width=size, justify="left" if name in words else "right", overflow="fold")
        for name, size in widest.items()
    ]
    out = Table(*columns, title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for line in zip(*cells.values(), strict=True):
        out.add_row(*map(Text, line))
    return out


def _memory(megabytes: float | None) -> str:
    return "" if megabytes is None else f"\n{megabytes:,.0f} MB"


def _limit(microseconds: float | None, share: float | None) -> str:
    return "" if microseconds is None or share is None else f"{duration(microseconds)}\n{share:.0%}"
