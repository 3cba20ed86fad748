"""The linear cross-entropy on a GPU, forward and backward, beside torch's: bfloat16, at the sizes of three data sets.

The limit is 6 N d V operations at the rate of a large square product; memory is what the peak takes beyond the inputs and
their gradients. `python -m recurlm.bench.cross_entropy` prints the rows alone, with --sweep the times of the kernels' tiles
and with --profile those of every kernel.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recurlm import kernels
from recurlm.bench.timing import Row, gemm_rate, gpu_memory, gpu_time
from recurlm.kernels import reference

# tokens, depth, vocabulary; the target
SHAPES = {
    "PTB": ((1400, 400, 10000), "130 us"),
    "WT2": ((5600, 400, 33278), "1.3 ms, 100 MB"),
    "WT103": ((8400, 400, 267735), "16 ms, 600 MB"),
}
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[list[Tensor], Tensor, Tensor]


def inputs(shape: tuple[int, int, int], seed: int = 0) -> Inputs:
    """([hidden, weight, bias], targets, upstream gradients), logits with a standard deviation of about 2."""
    N, d, V = shape
    draw = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device="cuda")

    values = normal(N, d), normal(V, d) * (2 / math.sqrt(d)), normal(V)
    targets = torch.randint(V, (N,), generator=draw, device="cuda")
    return [x.bfloat16().requires_grad_() for x in values], targets, normal(N) / N


def both(function: Function, given: Inputs) -> list[Tensor]:
    """Loss and gradients."""
    leaves, targets, upstream = given
    nll = function(*leaves, targets)  # type: ignore[call-arg]
    return [nll.detach(), *torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))]


def rows() -> list[dict[str, Any]]:
    """A row for each data set."""
    out, rate = [], gemm_rate(torch.bfloat16)
    for name, (shape, target) in SHAPES.items():
        given = inputs(shape)
        size = sum(x.nbytes for x in given[0]) / 1e6  # as large as the gradients
        times, memory = [], []
        for function in (kernels.linear_cross_entropy, reference.linear_cross_entropy):

            def work(function: Function = function, given: Inputs = given) -> list[Tensor]:
                return both(function, given)

            times.append(gpu_time(work, repeats=15))
            memory.append(gpu_memory(work) - size)
            torch.cuda.empty_cache()
        out.append(Row(
            measure="linear cross-entropy, forward + backward", shape=f"{name}: {' x '.join(f'{n:,}' for n in shape)} bf16",
            ours_us=times[0], peer_us=times[1], peer=f"torch, {memory[1]:,.0f} MB", limit_us=6e6 * math.prod(shape) / rate,
            target=target, memory_mb=memory[0],
        ).as_dict())  # fmt: skip
    return out


def profile() -> None:
    """Prints the GPU time of every kernel of one call, caches as they come."""
    for name, (shape, _) in SHAPES.items():
        given = inputs(shape)
        both(kernels.linear_cross_entropy, given)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
            both(kernels.linear_cross_entropy, given)
            torch.cuda.synchronize()
        print(f"-- {name}")
        for event in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total):
            print(f"{event.self_device_time_total:9.1f} us {event.count:4d} x {event.key[:70]}")


def sweep(seconds: float = 45) -> None:
    """Prints the times of other tiles in each kernel and of other chunk sizes; stops after about `seconds`."""
    from recurlm.kernels import cross_entropy_triton as fused

    start = time.perf_counter()
    given = {name: inputs(shape) for name, (shape, _) in SHAPES.items()}
    tiles = [
        fused.Tiles(*numbers, flatten=True)
        for numbers in (
            (128, 128, 64, 4, 3, 2), (128, 128, 64, 8, 4, 1), (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1),
            (256, 128, 64, 8, 3, 1),
        )
    ]  # fmt: skip

    def forward(name: str) -> float:
        leaves, targets, _ = given[name]
        return gpu_time(lambda: kernels.linear_cross_entropy(*leaves, targets).detach(), repeats=7)  # type: ignore[call-arg]

    def whole(name: str) -> float:
        return gpu_time(lambda: both(kernels.linear_cross_entropy, given[name]), repeats=5)

    def line(names: tuple[str, ...], measure: Callable[[str], float], label: object, **changed: Any) -> None:
        times = []
        try:
            with mock.patch.multiple(fused, **changed):
                for name in names:
                    late = time.perf_counter() - start > seconds
                    times.append("out of time" if late else f"{measure(name):9.1f} us")
        except Exception as error:  # such as too little shared memory
            times.append(f"{type(error).__name__}: {str(error)[:90]}")
        print(f"  {label!s:28} {'  '.join(times)}", flush=True)

    print("forward alone, nothing kept, PTB and WT2: n v k warps stages per_sm")
    for it in tiles:
        line(("PTB", "WT2"), forward, it[:-1], FORWARD=it, FORWARD_LARGE=it, KEPT_BYTES=0)
    print("both, nothing kept, PTB and WT2, with a kernel of the backward pass of n v k warps stages per_sm")
    for it in tiles[:3] + tiles[4:]:
        line(("PTB", "WT2"), whole, it[:-1], BACKWARD=it, KEPT_BYTES=0)
    print("forward and both, exponentials kept, PTB: n v k warps stages per_sm, rows of a program of `_rescale`")
    for numbers in ((128, 128, 64, 4, 2, 2), (128, 128, 64, 8, 4, 1), (128, 256, 64, 8, 3, 1), (256, 128, 64, 8, 3, 1)):
        it = fused.Tiles(*numbers, flatten=True)
        for part in (forward, whole):
            line(("PTB",), part, numbers, FORWARD_KEPT=it)
    for size in (16, 32, 128):
        line(("PTB",), whole, size, KEPT_ROWS=size)
    for name, sizes in {"WT2": (32, 48, 64, 72, 96), "WT103": (96, 192, 320, 375, 450)}.items():
        print(f"both, {name}, chunks of at most that many MB (2^20)")
        for size in sizes:
            line((name,), whole, size, CHUNK_BYTES=size << 20, CHUNK_SHARE=0)


if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep()
    elif "--profile" in sys.argv:
        profile()
    else:
        from recurlm.bench import timing

        for row in rows():
            print(timing.Row(**{key: value for key, value in row.items() if key != "share"}))
