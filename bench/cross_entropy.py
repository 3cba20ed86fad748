"""The fused linear cross-entropy on a GPU: against float64, then time and memory beside torch's.

python bench/cross_entropy.py [--sweep] [--profile] [--compile]; bfloat16, forward and backward, medians of CUDA graph replays with
a cold L2 cache. The limit is 6 N d V operations at the rate of a large square product in the same run.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recurlm import kernels
from recurlm.kernels import reference

SHAPES = {"PTB": (1400, 400, 10000), "WT2": (5600, 400, 33278), "WT103": (8400, 400, 267735)}
TARGETS = {"PTB": "<= 130 us", "WT2": "<= 1300 us, < 100 MB", "WT103": "<= 16000 us, < 600 MB"}
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs(shape: tuple[int, int, int], seed: int = 0, spread: float = 1.0) -> tuple[list[Tensor], Tensor, Tensor]:
    """([hidden, weight, bias], targets, upstream gradients), logits with a standard deviation of about 2 `spread`."""
    N, d, V = shape
    g = torch.Generator("cuda").manual_seed(seed)
    like = {"generator": g, "device": "cuda"}
    h, w = torch.randn(N, d, **like), torch.randn(V, d, **like) * (2 * spread / math.sqrt(d))  # type: ignore[call-overload]
    leaves = [x.bfloat16().requires_grad_() for x in (h, w, torch.randn(V, **like))]  # type: ignore[call-overload]
    targets = torch.randint(V, (N,), **like)  # type: ignore[call-overload]
    upstream = torch.rand(N, **like) * (torch.rand(N, **like) > 0.1) / N  # type: ignore[call-overload]
    return leaves, targets, upstream


def eager(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w, b), y, reduction="none")


def both(function: Function, leaves: list[Tensor], y: Tensor, upstream: Tensor) -> list[Tensor]:
    nll = function(*leaves, y)  # type: ignore[call-arg]
    return [nll.detach(), *torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))]


def error(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(found, expected, strict=True)]


def check(shape: tuple[int, int, int], spread: float = 1.0) -> str:
    """One line: relative errors of loss and gradients against float64, ours and eager bfloat16's, and bit equality."""
    leaves, y, upstream = inputs(shape, 1, spread)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = both(reference.linear_cross_entropy, wide, y, upstream.double())
    theirs = error(both(eager, leaves, y, upstream), expected)
    torch.full((1 << 28,), math.nan, device="cuda")  # what the allocator hands out next holds NaN
    found = both(kernels.linear_cross_entropy, leaves, y, upstream)
    same = all(
        torch.equal(a, b) for a, b in zip(found, both(kernels.linear_cross_entropy, leaves, y, upstream), strict=True)
    )
    ours = error(found, expected)
    good = same and all(a <= 2 * b + 1e-5 for a, b in zip(ours, theirs, strict=True))
    numbers = "  ".join(f"{a:.1e}/{b:.1e}" for a, b in zip(ours, theirs, strict=True))
    verdict, bits = "ok " if good else "BAD", "equal" if same else "DIFFER"
    return f"{verdict} {shape!s:22} x{spread:<6g} bits {bits}  nll,h,w,b ours/eager: {numbers}"


def replayed(run: Callable[[], Any], repeats: int = 15) -> float:
    """Median microseconds of a CUDA graph replay of `run`, with cold caches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed(graph.replay, repeats)


def timed(run: Callable[[], Any], repeats: int = 15) -> float:
    """Median microseconds of `run` on the GPU, with cold caches."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 2):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def attempt(run: Callable[[], Any]) -> Any:
    """Its result, or NaN with the reason printed."""
    try:
        return run()
    except Exception as problem:
        print(f"  failed: {type(problem).__name__}: {str(problem)[:160]}", flush=True)
        return math.nan


def extra_memory(function: Function, leaves: list[Tensor], y: Tensor, upstream: Tensor) -> float:
    """MB at the peak of forward and backward beyond the inputs and their gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() + sum(x.numel() * x.element_size() for x in leaves)
    both(function, leaves, y, upstream)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def product_rate() -> float:
    """Operations a microsecond of a bfloat16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / timed(lambda: a @ b)


def peers(name: str, compiled: bool) -> dict[str, Function]:
    out: dict[str, Function] = {"torch": eager}
    if compiled and name != "WT103":
        out["torch.compile"] = torch.compile(eager)
    if hasattr(F, "linear_cross_entropy"):
        out["F.linear_cross_entropy"] = lambda h, w, b, y: F.linear_cross_entropy(
            h, w, y, linear_bias=b, reduction="none"
        )
    return out


def rows(compiled: bool = True) -> list[dict[str, Any]]:
    """One row a shape and peer: forward and backward together; microseconds, and MB beyond inputs and gradients."""
    rate, out = product_rate(), []
    for name, shape in SHAPES.items():
        leaves, y, upstream = inputs(shape)
        ours = attempt(lambda: replayed(lambda: both(kernels.linear_cross_entropy, leaves, y, upstream)))  # noqa: B023
        memory = attempt(lambda: extra_memory(kernels.linear_cross_entropy, leaves, y, upstream))  # noqa: B023
        limit = 6 * math.prod(shape) / rate
        for peer, function in peers(name, compiled).items():
            theirs = attempt(lambda: replayed(lambda: both(function, leaves, y, upstream)))  # noqa: B023
            out.append({
                "measure": f"linear cross-entropy, {name}", "shape": shape, "ours_us": ours, "peer_us": theirs, "peer": peer,
                "limit_us": limit, "share": limit / ours, "target": TARGETS[name], "extra_mb": memory,
                "peer_extra_mb": attempt(lambda: extra_memory(function, leaves, y, upstream)),  # noqa: B023
            })  # fmt: skip
            torch.cuda.empty_cache()
    return out


def parts() -> None:
    """Prints forward and backward apart, in a graph and launched one by one."""
    print("shape   forward  backward      both   launched one by one   us")
    for name, shape in SHAPES.items():
        leaves, y, upstream = inputs(shape)
        forward = replayed(lambda: kernels.linear_cross_entropy(*leaves, y).detach())  # noqa: B023
        whole = replayed(lambda: both(kernels.linear_cross_entropy, leaves, y, upstream))  # noqa: B023
        loose = timed(lambda: both(kernels.linear_cross_entropy, leaves, y, upstream))  # noqa: B023
        print(f"{name:6} {forward:8.1f} {whole - forward:9.1f} {whole:9.1f} {loose:21.1f}", flush=True)


def profile() -> None:
    """Prints the GPU time of every kernel of one call, caches as they come."""
    for name, shape in SHAPES.items():
        leaves, y, upstream = inputs(shape)
        both(kernels.linear_cross_entropy, leaves, y, upstream)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            both(kernels.linear_cross_entropy, leaves, y, upstream)
            torch.cuda.synchronize()
        print(f"-- {name}")
        for event in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:9]:
            print(f"{event.self_device_time_total:9.1f} us {event.count:4d} x {event.key[:100]}")


def sweep(seconds: float = 75) -> None:
    """Prints the times of the kernels' shapes: forward, the writing of P, and the size of a chunk."""
    from recurlm.kernels import cross_entropy_triton as fused

    start, forward, backward = time.perf_counter(), *fused.HOPPER
    names = "_forward", "_combine", "_backward", "_product"
    real = [getattr(fused, name) for name in names]

    def only(*kept: str) -> None:
        for name, function in zip(names, real, strict=True):
            setattr(fused, name, function if name in kept else _Nothing())

    shapes = [
        fused.Tiles(n, v, k, warps, stages, per_sm, flatten)
        for n, v, k, warps, stages, per_sm in (
            (128, 128, 64, 4, 3, 2), (128, 128, 64, 4, 2, 2), (128, 256, 64, 8, 3, 1), (256, 128, 64, 8, 3, 1),
            (128, 256, 64, 8, 4, 1), (256, 128, 64, 8, 4, 1), (128, 128, 64, 8, 3, 2), (128, 128, 64, 8, 4, 1),
            (128, 64, 64, 4, 3, 3), (64, 128, 64, 4, 3, 3), (128, 128, 128, 8, 2, 1), (128, 128, 32, 4, 4, 2),
        )
        for flatten in (True, False)
    ]  # fmt: skip
    data = {name: inputs(SHAPES[name]) for name in ("PTB", "WT2")}
    for which, part in enumerate(("forward", "writing P")):
        only(*(("_forward", "_combine") if which == 0 else ("_backward",)))
        print(f"{part}: n v k warps stages per_sm flatten -> us PTB, WT2")
        for tiles in shapes:
            if time.perf_counter() - start > seconds * (which + 1) / 2.5:
                print("  out of time")
                break
            fused.HOPPER = (tiles, backward) if which == 0 else (forward, tiles)
            times = []
            for leaves, y, upstream in data.values():
                run = (
                    (lambda: kernels.linear_cross_entropy(*leaves, y).detach())  # noqa: B023
                    if which == 0
                    else (lambda: both(kernels.linear_cross_entropy, leaves, y, upstream))  # noqa: B023
                )
                times.append(attempt(lambda: replayed(run, 7)))  # noqa: B023
                if math.isnan(times[-1]):
                    break
            print(f"  {' '.join(f'{int(x):3}' for x in tiles)}  {'  '.join(f'{t:9.1f}' for t in times)}", flush=True)
    fused.HOPPER = forward, backward
    print("chunk MB -> us forward and backward WT2, WT103; the products alone WT2, WT103")
    given, size = [data["WT2"], inputs(SHAPES["WT103"])], fused.CHUNK_BYTES
    for megabytes in (16, 24, 32, 48, 64, 96, 192, 384):
        if time.perf_counter() - start > seconds:
            print("  out of time")
            break
        fused.CHUNK_BYTES = megabytes << 20
        times = []
        for kept in (names, ("_product",)):
            only(*kept)
            times += [attempt(lambda: replayed(lambda: both(kernels.linear_cross_entropy, *g), 5)) for g in given]  # noqa: B023
        print(f"  {megabytes:4} {'  '.join(f'{t:9.1f}' for t in times)}", flush=True)
    only(*names)
    fused.CHUNK_BYTES = size


class _Nothing:
    """A kernel, or a function, that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> "_Nothing":
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


def probe() -> None:
    """Does what this torch does with fp32 += bfloat16 products; if it refuses, the sum is made apart, and that is said."""
    from recurlm.kernels import cross_entropy_triton as fused

    a, out = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16), torch.ones(64, 64, device="cuda")
    try:
        fused._product(a, a, out, add=True)
        print("addmm with out_dtype:", "as expected" if bool((out == 65).all()) else f"WRONG {out[0, 0]}")
    except RuntimeError as problem:
        print("addmm with out_dtype:", problem)
        product = fused._product
        fused._product = lambda a, b, out, add=False: (
            out.add_(torch.mm(a, b, out_dtype=out.dtype)) if add else product(a, b, out)
        )


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    probe()
    for shape, spread in [
        ((1, 64, 1), 1), ((2, 100, 17), 1), ((131, 400, 1009), 1), ((257, 1024, 5003), 1), ((300, 37, 300), 1),
        ((500, 400, 10000), 100), ((500, 400, 10000), 3000), ((3000, 280, 10000), 1), (SHAPES["PTB"], 1), (SHAPES["WT2"], 1),
    ]:  # fmt: skip
        try:
            print(check(shape, spread), flush=True)
        except Exception as problem:
            print(f"BAD {shape} x{spread}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
    for flag, part in (("--sweep", sweep), ("--profile", profile), ("", parts)):
        if not flag or flag in sys.argv:
            attempt(part)
    print("measure                          ours us   peer us  limit us  share  extra MB  peer MB  peer")
    for row in rows("--compile" in sys.argv):
        print(
            f"{row['measure']:30} {row['ours_us']:9.1f} {row['peer_us']:9.1f} {row['limit_us']:9.1f}  {row['share']:.2f} "
            f"{row['extra_mb']:9.1f} {row['peer_extra_mb']:8.1f}  {row['peer']}; target {row['target']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
