"""What is claimed of the LSTM kernels beside their speed, shown on a GPU; each part in a process of its own.

    python bench/lstm_robust.py [--seconds 120]

shapes: outputs and gradients of 100 random layers are within twice the error of cuDNN in the same type against float64, and two
runs are equal to the bit; in turn with and without clusters. launches: 10,000 in a row of each kernel end and agree. beside: the
results do not change while another process, and another stream, multiply matrices on the same GPU. memcheck, racecheck:
compute-sanitizer on small layers (racecheck sees shared memory only).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from recurlm.kernels import lstm_cuda, nvrtc, reference
from recurlm.kernels.lstm_cuda import Card, Layout

TYPES = torch.bfloat16, torch.float16
SMALL, SMALL_HOPPER = Card(8, 60000, (8, 0)), Card(36, 232448, (9, 0), ((2, 14), (3, 8), (4, 6), (8, 2)))
Pair = tuple[Layout, Layout]


def pair(H: int, B: int, clusters: bool, small: bool = False) -> Pair | None:
    """The forward and the backward layout estimated best with clusters, or those that are used."""
    if not clusters and not small:
        return lstm_cuda.best(H, B, torch.cuda.current_device())
    H = -(-H // lstm_cuda.MULTIPLE) * lstm_cuda.MULTIPLE
    card = (SMALL_HOPPER if clusters else SMALL) if small else lstm_cuda.card(0)
    if not clusters:
        found = [lstm_cuda.LAYOUTS[name](H, B, card) for name in ("forward", "backward")]
    else:
        found = [lstm_cuda.cluster_layouts(name, H, B, card) for name in ("forward", "backward")]
    return (found[0][0], found[1][0]) if all(found) else None


def layer(number: int) -> tuple[tuple[int, int, int, int], torch.dtype, Pair | None]:
    draw = torch.Generator().manual_seed(number)

    def pick(*of: int) -> int:
        return of[int(torch.randint(len(of), (), generator=draw))]

    T, B, E = pick(1, 2, 5, 13, 31), pick(1, 2, 7, 20, 33, 64, 80), pick(1, 17, 64, 300)
    H = pick(1, 2, 16, 50, 126, 400, 650, 1024, 1150, 1152)
    clusters = number % 2 and lstm_cuda.card(0).capability >= lstm_cuda.CLUSTER_CAPABILITY
    layouts = pair(H, B, True) if clusters else None
    return (T, B, E, H), TYPES[number // 2 % 2], layouts or pair(H, B, False)  # small layers have none with clusters


def values(shape: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """x, h, c, weights, and the gradients of the three results."""
    (T, B, E, H), draw = shape, torch.Generator("cuda").manual_seed(seed)

    def uniform(*of: int) -> Tensor:
        return 2 * torch.rand(*of, device="cuda", generator=draw) - 1

    weights = [uniform(*of) * H**-0.5 for of in ((4 * H, E), (4 * H, H), (4 * H,), (4 * H,))]
    given = uniform(T, B, E), uniform(B, H), uniform(B, H), *weights, uniform(T, B, H), uniform(B, H), uniform(B, H)
    return [t.to(dtype) for t in given]


def outcome(function: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and all gradients."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in given[:7]]
    results = function(*leaves[:3], leaves[3:])
    upstream = [u.to(r.dtype) for u, r in zip(given[7:], results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, upstream)]


def ours(layouts: Pair) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x, h, c, weights: lstm_cuda.lstm(x, h, c, weights, layouts)


def shapes() -> None:
    worst, wrong, done = 0.0, 0, 0
    for number in range(100):
        shape, dtype, layouts = layer(number)
        if layouts is None:
            print(f"  {shape} does not fit", flush=True)
            continue
        given = values(shape, dtype, number)
        try:
            mine, again = (outcome(ours(layouts), given, dtype) for _ in range(2))
        except RuntimeError as error:
            print(f"  {shape} {dtype} {' '.join(str(error).split())[:120]}", flush=True)
            wrong += 1
            continue
        theirs, exact = outcome(reference.lstm, given, dtype), outcome(reference.lstm, given, torch.float64)
        same = all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
        ratios = []
        for a, b, true in zip(mine, theirs, exact, strict=True):
            error, allowed = (((t.double() - true).norm() / true.norm().clamp(min=1e-12)).item() for t in (a, b))
            ratios.append(error / max(allowed, torch.finfo(dtype).eps))
        most = max(ratios, key=lambda ratio: (ratio != ratio, ratio))
        done, worst = done + 1, max(worst, most)
        if not same or not most <= 2:
            wrong += 1
            print(
                f"  WRONG {shape} {dtype} ratio {most:.2f} equal {same} {[dict(p.macros) for p in layouts]}", flush=True
            )
    late = lstm_cuda.waited_too_long(torch.device("cuda"))
    print(
        f"shapes: {done} layers, {wrong} wrong, largest error {worst:.2f} times cuDNN's, waited in vain: {late}",
        flush=True,
    )


def launches() -> None:
    for (T, B, E, H), clusters in (((3, 4, 16, 64), False), ((3, 4, 16, 64), True), ((16, 80, 64, 1152), False)):
        layouts = pair(H, B, clusters)
        if layouts is None:
            continue
        given = values((T, B, E, H), torch.bfloat16, 1)
        with torch.no_grad():
            first = ours(layouts)(*given[:3], given[3:7])[0]
            start, different = time.monotonic(), 0
            for _ in range(10_000):
                last = ours(layouts)(*given[:3], given[3:7])[0]
                different = different + (last != first).any()
        expected = outcome(ours(layouts), given, torch.bfloat16)
        backward_differs = 0
        for _ in range(1000):
            found = outcome(ours(layouts), given, torch.bfloat16)
            backward_differs += any(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        late = lstm_cuda.waited_too_long(torch.device("cuda"))
        seconds = time.monotonic() - start
        print(
            f"launches: 10000 forward, 1000 with backward, {H} units, {'clusters' if clusters else 'layouts in use'}: "
            f"{int(different)} and {backward_differs} differ, waited in vain: {late}, {seconds:.1f} s",
            flush=True,
        )


def busy() -> None:
    """Multiplies matrices until it is killed."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    while True:
        for _ in range(50):
            torch.mm(a, a, out=b)
        torch.cuda.synchronize()


def beside() -> None:
    cases = [
        (pair(1152, B, clusters), values((70, B, 1152, 1152), torch.bfloat16, 2))
        for B, clusters in ((20, False), (20, True), (80, False))
    ]
    cases = [(layouts, given) for layouts, given in cases if layouts is not None]
    quiet = [outcome(ours(layouts), given, torch.bfloat16) for layouts, given in cases]

    def differing(rounds: int) -> int:
        count = 0
        for _ in range(rounds):
            for (layouts, given), expected in zip(cases, quiet, strict=True):
                found = outcome(ours(layouts), given, torch.bfloat16)
                count += any(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        return count

    other = subprocess.Popen([sys.executable, __file__, "--part", "busy"])
    try:
        time.sleep(6)
        start = time.monotonic()
        process = differing(20), other.poll() is None, time.monotonic() - start
    finally:
        other.kill()
        other.wait()
    side, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    count, b = 0, torch.empty_like(a)
    for _ in range(10):
        with torch.cuda.stream(side):
            for _ in range(20):
                torch.mm(a, a, out=b)
        count += differing(1)
    late = lstm_cuda.waited_too_long(torch.device("cuda"))
    print(
        f"beside another process (alive: {process[1]}): {process[0]} of {20 * len(cases)} differ, {process[2]:.1f} s; beside "
        f"another stream: {count} of {10 * len(cases)} differ; waited in vain: {late}",
        flush=True,
    )


def small(clusters: bool) -> None:
    """A small layer, for compute-sanitizer."""
    lstm_cuda.PATIENCE = 60_000_000_000
    layouts = pair(48, 5, clusters, small=True)
    if layouts is not None:
        T = lstm_cuda.LEAST_STEPS if clusters else 4
        if clusters:
            layouts = layouts[0]._replace(beside=(0.5,)), layouts[1]._replace(beside=(0.25, 0.6))
        outcome(ours(layouts), values((T, 5, 16, 48), torch.bfloat16, 3), torch.bfloat16)
        torch.cuda.synchronize()
        print("small", "clusters" if clusters else "no clusters", [layout.blocks for layout in layouts], flush=True)


def sanitized(tool: str, part: str, seconds: float) -> None:
    """What the tool says of our kernels; CUDA calls that fail are none of its business: cuda-bindings asks for functions that
    an older driver does not have."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for only in (["--kernel-name", "kns=ward"], []):  # forward and backward; then, where that is not understood, all
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [program, "--tool", tool, *quiet, *only, sys.executable, __file__, "--part", part]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{tool}, {part}: {str(error)[-120:]}", flush=True)
            return
        lines = [line for line in run.stdout.splitlines() if "=====" in line or line.startswith("small")]
        if any("SUMMARY" in line for line in lines):
            break
    print("\n".join(lines[:20] + lines[-3:] if len(lines) > 23 else lines) or run.stderr[-500:], flush=True)


def compiled(layout: Layout, half: bool, capability: tuple[int, int]) -> None:
    nvrtc.compiled(lstm_cuda.source(layout), {**dict(layout.macros), "HALF": int(half)}, capability)


PARTS = {"shapes": shapes, "launches": launches, "beside": beside, "busy": busy}
PARTS |= {"small": lambda: small(False), "small-clusters": lambda: small(True)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Shows what is claimed of the LSTM kernels beside their speed.")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--part", choices=PARTS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA GPU, and torch sees none here")
    if given.part:
        PARTS[given.part]()
        return
    until = time.monotonic() + given.seconds
    jobs = {}
    for number in range(100):
        _, dtype, layouts = layer(number)
        for layout in layouts or ():
            jobs[layout, dtype == torch.float16, lstm_cuda.card(0).capability] = None
    for H, B, small in ((64, 4, False), (1152, 20, False), (1152, 80, False), (48, 5, True)):
        for clusters in (False, True):
            for layout in pair(H, B, clusters, small) or ():
                jobs[layout, False, lstm_cuda.card(0).capability] = None
    start = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compiled, *zip(*jobs, strict=True)))
    print(
        f"# {torch.cuda.get_device_name()}; {len(jobs)} kernels compiled in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    for part, most in (("shapes", 45), ("launches", 30), ("beside", 35)):
        start = time.monotonic()
        try:
            subprocess.run(
                [sys.executable, __file__, "--part", part], timeout=max(5, min(most, until - start)), check=False
            )
        except subprocess.TimeoutExpired:
            print(f"{part}: out of time", flush=True)
        print(f"# {part}: {time.monotonic() - start:.0f} s", flush=True)
    for tool in ("memcheck", "racecheck"):
        for part in ("small", "small-clusters"):
            start = time.monotonic()
            sanitized(tool, part, max(10, min(40, until - start)))
            print(f"# {tool}, {part}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
