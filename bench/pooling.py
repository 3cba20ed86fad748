"""QRNN pooling on the GPU: is it right, how near is it to the memory limit, and which layout is fastest.

    python bench/pooling.py            checks, then microseconds and shares of the copy bandwidth
    python bench/pooling.py --sweep    the same, and the layouts (block, warps, unroll, chunk, ahead) side by side

Every time is the median of CUDA graph replays on random data, each after 512 MB were written, so with a cold L2; the
peer is a plain loop over the columns, which keeps every c. Bytes: forward (G + 1) TBH, backward (2 G + 1) TBH elements.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from recurlm.kernels import pool_triton, reference
from recurlm.kernels.pool_triton import Plan

SHAPES = [(140, 60, 2500), (200, 128, 1840), (70, 20, 1550), (5000, 1, 1550)]
TARGETS = {
    ("forward", (140, 60, 2500)): ">= 85 %",
    ("forward", (200, 128, 1840)): ">= 85 %",
    ("backward", (140, 60, 2500)): ">= 80 %",
    ("backward", (200, 128, 1840)): ">= 80 %",
    ("forward", (70, 20, 1550)): "<= 9 us",
    ("forward", (5000, 1, 1550)): ">= 50 %",
}


@triton.jit
def _naive_forward(gates, c0, h_out, c_all, T, N, H, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < N
    at = gates + (n // H).to(tl.int64) * 3 * H + n % H
    c = tl.load(c0 + n, mask=keep, other=0.0).to(tl.float32)
    for t in range(T):
        row = tl.cast(t, tl.int64) * N
        z = tl.load(at + 3 * row, mask=keep, other=0.0).to(tl.float32)
        f = tl.load(at + 3 * row + H, mask=keep, other=0.0).to(tl.float32)
        o = tl.load(at + 3 * row + 2 * H, mask=keep, other=0.0).to(tl.float32)
        c = c + tl.sigmoid(f) * (2 * tl.sigmoid(2 * z) - 1 - c)
        tl.store(c_all + row + n, c, mask=keep)
        tl.store(h_out + row + n, tl.sigmoid(o) * c, mask=keep)


@triton.jit
def _naive_backward(gates, c0, c_all, dh, dgates, dc0, T, N, H, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < N
    offset = (n // H).to(tl.int64) * 3 * H + n % H
    r = tl.zeros((BLOCK,), tl.float32)
    for step in range(T):
        t = T - 1 - step
        row = tl.cast(t, tl.int64) * N
        at = 3 * row + offset
        z = 2 * tl.sigmoid(2 * tl.load(gates + at, mask=keep, other=0.0).to(tl.float32)) - 1
        f = tl.sigmoid(tl.load(gates + at + H, mask=keep, other=0.0).to(tl.float32))
        o = tl.sigmoid(tl.load(gates + at + 2 * H, mask=keep, other=0.0).to(tl.float32))
        g = tl.load(dh + row + n, mask=keep, other=0.0).to(tl.float32)
        after = tl.load(c_all + row + n, mask=keep, other=0.0).to(tl.float32)
        before = tl.load((c_all + row - N + n) if t > 0 else (c0 + n), mask=keep, other=0.0).to(tl.float32)
        r += g * o
        tl.store(dgates + at, r * f * (1 - z * z), mask=keep)
        tl.store(dgates + at + H, r * (z - before) * f * (1 - f), mask=keep)
        tl.store(dgates + at + 2 * H, g * after * o * (1 - o), mask=keep)
        r = r - r * f
    tl.store(dc0 + n, r, mask=keep)


def _naive(kind: str, gates: torch.Tensor, c: torch.Tensor, dh: torch.Tensor) -> Callable[[], None]:
    T, H, N = dh.shape[0], dh.shape[2], c.numel()
    h, c_all, dgates, dc0 = torch.empty_like(dh), torch.zeros_like(dh), torch.empty_like(gates), torch.empty_like(c)
    grid = (triton.cdiv(N, 64),)
    if kind == "forward":
        return lambda: _naive_forward[grid](gates, c, h, c_all, T, N, H, 64, num_warps=2)  # type: ignore[call-arg]
    return lambda: _naive_backward[grid](gates, c, c_all, dh, dgates, dc0, T, N, H, 64, num_warps=2)  # type: ignore[call-arg]


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device="cuda")


def microseconds(call: Callable[[], Any], repeats: int = 25) -> float:
    """The median time of one replay of the call, captured in a CUDA graph, with a cold L2."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    graph.replay()
    for start, end in events:
        _flush().zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1000 * start.elapsed_time(end) for start, end in events)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written a second by torch's copy of 1 GB of bfloat16."""
    a = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / microseconds(lambda: b.copy_(a)) * 1e6


def given(
    shape: tuple[int, int, int], dtype: torch.dtype, gates: int = 3, memory: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random (gates_TBG, c_BH, dh_TBH); forget gates are `memory` lower than the others."""
    T, B, H = shape
    generator = torch.Generator("cuda").manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator, device="cuda")
    x_TBG = draw(T, B, gates * H)
    x_TBG[..., H : 2 * H] -= memory
    return x_TBG.to(dtype), draw(B, H).to(dtype), draw(T, B, H).to(dtype)


def ours(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, marks: bool = True) -> Callable[[], Any]:
    """One launch of our forward or backward kernel, for fo-pooling, in the layout that is chosen now."""
    gates, c, dh = given(shape, dtype)
    plan = pool_triton.backward_plan(*shape, dtype.itemsize)
    if kind == "forward":
        return lambda: pool_triton.run_forward(gates, c, None, "fo", plan.unroll if marks else 0)
    kept = pool_triton.run_forward(gates, c, None, "fo", plan.unroll)[2]
    dlast = torch.zeros_like(c)
    return lambda: pool_triton.run_backward(gates, kept, None, "fo", plan, dh, dlast)


def limit(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Microseconds that the counted bytes take at the copy bandwidth."""
    T, B, H = shape
    return (4 if kind == "forward" else 7) * T * B * H * dtype.itemsize / copy_bandwidth() * 1e6


def rows() -> list[dict[str, Any]]:
    """Each measure of fo-pooling: ours, the naive kernel, and the limit, in microseconds."""
    found = []
    for dtype, shape, kind in itertools.product((torch.bfloat16, torch.float32), SHAPES, ("forward", "backward")):
        name = f"pool {kind} {str(dtype).removeprefix('torch.')}"
        least, us = limit(kind, shape, dtype), microseconds(ours(kind, shape, dtype))
        peer = microseconds(_naive(kind, *given(shape, dtype)))
        target = TARGETS.get((kind, shape), "") if dtype == torch.bfloat16 else ""
        found.append(
            {"measure": name, "shape": shape, "ours_us": us, "peer_us": peer, "peer": "naive kernel", "limit_us": least,
             "share": least / us, "target": target}
        )  # fmt: skip
    return found


def _outcome(
    function: Callable[..., Any], gates: torch.Tensor, c: torch.Tensor, dh: torch.Tensor, pooling: str
) -> list[torch.Tensor]:
    gates, c = gates.detach().requires_grad_(), c.detach().requires_grad_()
    h, last = function(gates, c, None, pooling)
    return [h.detach(), last.detach(), *torch.autograd.grad((h, last), (gates, c), (dh, torch.ones_like(last)))]


CASES = (
    ("fo", (70, 20, 1550), 0.0),
    ("fo", (70, 20, 1550), 5.0),
    ("ifo", (333, 2, 257), 2.0),
    ("f", (2000, 1, 130), 0.0),
)


def check(case: tuple[str, tuple[int, int, int], float], dtype: torch.dtype) -> list[str]:
    """Lines that give the error of h, c and both gradients as a multiple of the eager version's in the same type."""
    pooling, shape, memory = case
    values = given(shape, dtype, reference.GATES[pooling], memory)
    exact = _outcome(reference.pool, *(x.double() for x in values), pooling)
    eager = _outcome(reference.pool, *values, pooling)
    lines, chosen = [], pool_triton.activation
    for act in ("ptx", "plain", "mixed", "approx") if pooling == "fo" else ("ptx",):
        pool_triton.activation = lambda *_, act=act: act
        line = f"{pooling:<4}{shape!s:<16} F - {memory:.0f} {dtype!s:<15} {act:<7}"
        try:
            found, again = (_outcome(pool_triton.pool, *values, pooling) for _ in range(2))
            for a, e, x in zip(found, eager, exact, strict=True):
                line += f" {((a.double() - x).norm() / (e.double() - x).norm()).item():7.3f}"
            equal = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            lines.append(line + (" equal" if equal else " UNEQUAL"))
        except Exception:
            lines.append(line + " FAILED " + traceback.format_exc(limit=3))
    pool_triton.activation = chosen
    return lines


def check_all(workers: concurrent.futures.Executor) -> None:
    print("error as a multiple of eager's: h, last c, grad gates, grad c; and whether two runs are equal")
    pairs = itertools.product(CASES, (torch.float32, torch.bfloat16, torch.float16))
    for lines in workers.map(check, *zip(*pairs, strict=True)):
        print(*lines, sep="\n")


Variant = tuple[str, tuple[int, int, int], torch.dtype, Plan, str]


def chosen() -> list[Variant]:
    """(kind, shape, dtype, plan, activation) as the kernels choose them for `rows`."""
    plans = {"forward": pool_triton.forward_plan, "backward": pool_triton.backward_plan}
    act = pool_triton.activation(torch.device("cuda"), torch.bfloat16)
    return [
        (kind, shape, dtype, plans[kind](*shape, dtype.itemsize), act)
        for shape, dtype, kind in itertools.product(SHAPES, (torch.float32, torch.bfloat16), plans)
    ]


def variants() -> list[Variant]:
    """The others, to be compared."""
    bf16, whole = torch.bfloat16, 10**6
    big, found = SHAPES[:2], []
    tiles = ((64, 1), (128, 2), (256, 4), (128, 1), (256, 2), (64, 2))
    for shape, tile, (unroll, ahead) in itertools.product(big, tiles, ((8, True), (8, False), (16, False))):
        found.append(("forward", shape, bf16, Plan(*tile, unroll, whole, ahead), "ptx"))
    for shape, act, tile in itertools.product(big, ("plain", "mixed", "approx"), ((128, 2), (128, 1))):
        found.append(("forward", shape, bf16, Plan(*tile, 8, whole, True), act))
        found.append(("backward", shape, bf16, Plan(*tile, 8, whole, False), act))
    for shape, tile, unroll, ahead in itertools.product(
        big, ((64, 1), (128, 2), (128, 1), (64, 2)), (4, 8), (True, False)
    ):
        found.append(("backward", shape, bf16, Plan(*tile, unroll, whole, ahead), "ptx"))
    for tile, unroll, ahead in itertools.product(((64, 1), (64, 2), (32, 1)), (8, 16, 24), (True, False)):
        found.append(("forward", SHAPES[2], bf16, Plan(*tile, unroll, whole, ahead), "ptx"))
    for tile, unroll, ahead in itertools.product(((64, 1), (64, 2), (32, 1)), (4, 8, 16), (True, False)):
        found.append(("backward", SHAPES[2], bf16, Plan(*tile, unroll, whole, ahead), "ptx"))
    for tile, unroll, chunk, ahead in itertools.product(((64, 1), (64, 2)), (8, 16), (64, 96, 160, 256), (True, False)):
        found.append(("forward", SHAPES[3], bf16, Plan(*tile, unroll, chunk, ahead), "ptx"))
    for tile, unroll, chunk, ahead in itertools.product(((64, 1), (64, 2)), (8,), (64, 96, 160, 256), (True, False)):
        found.append(("backward", SHAPES[3], bf16, Plan(*tile, unroll, chunk, ahead), "ptx"))
    for tile, unroll, ahead in itertools.product(((64, 1), (64, 2), (128, 2)), (8,), (True, False)):
        found.append(("forward", SHAPES[0], torch.float32, Plan(*tile, unroll, whole, ahead), "ptx"))
        found.append(("backward", SHAPES[0], torch.float32, Plan(*tile, unroll, whole, ahead), "ptx"))
    return found


def prepared(variant: Variant) -> Callable[[], Any]:
    kind, shape, dtype, plan, act = variant
    spacing = 8 if kind == "forward" else plan.unroll
    other = Plan(64, 2, spacing, plan.chunk, False)
    pool_triton.forward_plan = lambda *_: plan if kind == "forward" else other
    pool_triton.backward_plan = lambda *_: plan if kind == "backward" else other
    pool_triton.activation = lambda *_: act
    return ours(kind, shape, dtype)


def _warm(variant: Variant) -> str:
    """Compiles a variant into Triton's cache on disk; returns what went wrong, if anything."""
    try:
        prepared(variant)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{variant}: {error!r}"[:300]
    return ""


def warm(tried: list[Variant], workers: concurrent.futures.Executor) -> None:
    """Compiles the variants side by side."""
    start = time.perf_counter()
    for fault in filter(None, workers.map(_warm, tried)):
        print("FAILED", fault)
    print(f"{len(tried)} variants compiled in {time.perf_counter() - start:.0f} s", flush=True)


def sweep(tried: list[Variant]) -> None:
    """Prints the variants' times, best first for each kernel and shape."""
    timed: dict[tuple[Any, ...], list[tuple[float, Plan, str]]] = {}
    for variant in tried:
        kind, shape, dtype, plan, act = variant
        try:
            us = microseconds(prepared(variant), repeats=15)
        except Exception as error:
            print("FAILED", variant, repr(error)[:200])
            continue
        timed.setdefault((kind, shape, dtype), []).append((us, plan, act))
    for (kind, shape, dtype), times in timed.items():
        least = limit(kind, shape, dtype)
        print(
            f"{kind} {shape} {dtype}: limit {least:.1f} us; us, share, (block, warps, unroll, chunk, ahead), activation"
        )
        for us, plan, act in sorted(times):
            print(f"  {us:7.1f} {least / us:6.1%} {tuple(plan)} {act}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="compare layouts and activations")
    parser.add_argument("--processes", type=int, default=14, help="that check and compile side by side (default: 14)")
    arguments = parser.parse_args()
    originals = pool_triton.forward_plan, pool_triton.backward_plan, pool_triton.activation
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    tried = list(dict.fromkeys(chosen() + (variants() if arguments.sweep else [])))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, mp_context=context) as workers:
        check_all(workers)
        warm(tried, workers)
    if arguments.sweep:
        sweep(tried)
        pool_triton.forward_plan, pool_triton.backward_plan, pool_triton.activation = originals
    print(f"copy {copy_bandwidth() / 1e9:.0f} GB/s; an empty graph {microseconds(lambda: _flush()[:1].zero_()):.1f} us")
    print(f"{'measure':<24} {'shape':<17} {'us':>7} {'GB/s':>6} {'share':>6} {'naive':>7} {'limit':>7}  target")
    for row in rows():
        rate = row["share"] * copy_bandwidth() / 1e9
        print(
            f"{row['measure']:<24} {row['shape']!s:<17} {row['ours_us']:7.1f} {rate:6.0f} {row['share']:6.1%}"
            f" {row['peer_us']:7.1f} {row['limit_us']:7.1f}  {row['target']}"
        )


if __name__ == "__main__":
    main()
