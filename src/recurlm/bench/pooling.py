"""QRNN pooling on the GPU beside a plain loop over the columns and the limit of the memory.

The limit counts what must be read and written, at the bandwidth of a copy: TBH elements (G + 1) times forwards and
(2 G + 1) times backwards, G = 3 gates. The marks that the forward pass leaves for the backward pass are not counted.

    python -m recurlm.bench.pooling --sweep     layouts of the kernels side by side, each checked against float64
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurlm.bench.timing import Row, copy_bandwidth, gpu_time, in_turn
from recurlm.kernels import reference

if TYPE_CHECKING:
    from recurlm.kernels.pool_triton import Plan

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((140, 60, 2500), (200, 128, 1840), (70, 20, 1550), (5000, 1, 1550))
TARGETS = {
    ("forward", SHAPES[0]): ">= 85 %",
    ("forward", SHAPES[1]): ">= 85 %",
    ("backward", SHAPES[0]): ">= 80 %",
    ("backward", SHAPES[1]): ">= 80 %",
    ("forward", SHAPES[2]): "<= 9 us",
    ("forward", SHAPES[3]): ">= 50 %",
}
DIRECTIONS = ("forward", "backward")


def rows() -> list[dict[str, Any]]:
    """fo-pooling in bfloat16, and in float32 at one shape.

    `forward` is the kernel where no gradient is needed; in training it also writes marks of c, whose bytes the limit
    does not count, and both directions see to the bias.
    """
    found, bf16, fp32 = [], torch.bfloat16, torch.float32
    cases = [(bf16, shape, direction, False) for shape, direction in itertools.product(SHAPES, DIRECTIONS)]
    cases += [(dtype, SHAPES[2], direction, dtype == bf16) for dtype in (bf16, fp32) for direction in DIRECTIONS]
    for dtype, shape, direction, training in cases:
        nbytes = _bytes(direction, shape, dtype)
        compared = dtype == bf16 and not training
        row = Row(
            measure=f"pool {direction}" + " in training, bias" * training,
            shape=" x ".join(f"{n:,}" for n in shape) + f" {str(dtype).removeprefix('torch.')}",
            ours_us=gpu_time(in_turn(lambda: _ours(direction, shape, dtype, training), nbytes)),  # noqa: B023
            peer_us=gpu_time(in_turn(lambda: _naive(direction, shape, dtype), nbytes)) if compared else None,  # noqa: B023
            peer="plain loop" if compared else "",
            limit_us=_limit(direction, shape, dtype),
            target=TARGETS.get((direction, shape), "") if compared else "",
        )
        found.append(row.as_dict())
    return found


def _bytes(direction: str, shape: Shape, dtype: torch.dtype) -> int:
    T, B, H = shape
    return (4 if direction == "forward" else 7) * T * B * H * dtype.itemsize


def _limit(direction: str, shape: Shape, dtype: torch.dtype) -> float:
    return 1e6 * _bytes(direction, shape, dtype) / copy_bandwidth()


def _given(shape: Shape, dtype: torch.dtype, gates: int = 3, memory: float = 0.0) -> tuple[Tensor, ...]:
    """Random (gates_TBG, c_BH, grad_h_TBH, bias_G); forget gates are `memory` lower than the others."""
    T, B, H = shape
    g = torch.Generator("cuda").manual_seed(1)
    sizes = ((T, B, gates * H), (B, H), (T, B, H), (gates * H,))
    x_TBG, *others = (torch.randn(size, generator=g, device="cuda") for size in sizes)
    x_TBG[..., H : 2 * H] -= memory
    return tuple(x.to(dtype) for x in (x_TBG, *others))


def _ours(
    direction: str,
    shape: Shape,
    dtype: torch.dtype,
    training: bool,
    plan: Plan | None = None,
    given: tuple[Tensor, ...] = (),
) -> Callable[[], Any]:
    """A call of the forward or the backward kernel, on data of its own and in its own plan unless they are given."""
    from recurlm.kernels import pool_triton

    gates_TBG, c_BH, grad_h_TBH, bias_G = given or _given(shape, dtype)
    bias = bias_G.float() if training else None
    back = pool_triton.backward_plan(gates_TBG, c_BH)
    if direction == "forward":
        plan = plan or pool_triton.forward_plan(gates_TBG, c_BH)
        return lambda: pool_triton.run_forward(gates_TBG, c_BH, None, "fo", bias, plan, back.unroll if training else 0)
    plan = plan or back
    forward = pool_triton.forward_plan(gates_TBG, c_BH)
    if plan is not back:  # one that leaves marks as far apart as this plan needs them
        forward = forward._replace(block=64, warps=1, unroll=plan.unroll, rows=1)
    marks_SBH = pool_triton.run_forward(gates_TBG, c_BH, None, "fo", bias, forward, plan.unroll)[2]
    grad_last_BH = torch.zeros_like(c_BH)
    return lambda: pool_triton.run_backward(gates_TBG, marks_SBH, None, "fo", bias, plan, grad_h_TBH, grad_last_BH)


def _naive(direction: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Any]:
    from recurlm.bench import pooling_naive

    gates_TBG, c_BH, grad_h_TBH, _ = _given(shape, dtype)
    if direction == "forward":
        return lambda: pooling_naive.forward(gates_TBG, c_BH)
    c_TBH = pooling_naive.forward(gates_TBG, c_BH)[1]
    return lambda: pooling_naive.backward(gates_TBG, c_BH, c_TBH, grad_h_TBH)


Variant = tuple[str, Shape, torch.dtype, tuple[Any, ...]]


def variants() -> list[Variant]:
    """(direction, shape, dtype, the Plan's fields) of the layouts that are compared."""
    whole, bf16, (first, second, short, long) = 1 << 30, torch.bfloat16, SHAPES
    found: list[Variant] = []

    def add(direction: str, shape: Shape, tiles: Any, unrolls: Any, chunks: Any = (whole,), aheads: Any = (True,)):
        for (block, warps), unroll, chunk, ahead in itertools.product(tiles, unrolls, chunks, aheads):
            found.append((direction, shape, bf16, (block, warps, unroll, chunk, ahead, "approx")))

    narrow, one, two, four, wide = (32, 1), (64, 1), (128, 2), (128, 1), (256, 4)
    add("forward", first, (two, wide), (7, 8))
    add("forward", first, (four,), (4, 8))
    add("forward", second, (four, (256, 2)), (4, 8))
    add("forward", second, (two,), (4, 8))
    add("forward", short, (narrow,), (16, 20))
    found += [("forward", short, bf16, (64, 8, unroll, whole, True, "approx", 8)) for unroll in (9, 10)]
    add("forward", long, (one,), (8,), (64, 72, 80))
    add("backward", first, (four,), (4, 8), aheads=(True, False))
    add("backward", second, (four, (256, 2)), (8,), aheads=(False,))
    add("backward", short, (narrow, (64, 2)), (8, 12))
    add("backward", long, (one,), (8,), (64, 72))
    return list(dict.fromkeys(found))


def _prepared(variant: Variant, given: tuple[Tensor, ...] = ()) -> Callable[[], Any]:
    from recurlm.kernels.pool_triton import Plan

    direction, shape, dtype, plan = variant
    return _ours(direction, shape, dtype, False, Plan(*plan), given)


def _compiled(variant: Variant) -> str:
    """Puts a variant into Triton's cache on disk; returns what went wrong, if anything."""
    try:
        _prepared(variant)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{variant}: {error!r}"[:300]
    return ""


def _truth(shape: Shape, dtype: torch.dtype, given: tuple[Tensor, ...]) -> dict[str, list[tuple[Tensor, float]]]:
    """Of each direction the results in float64, each with the distance of the reference in the type given from it."""
    outcomes = []
    for kind in (torch.float64, dtype):
        gates, c, grad = (x.to(kind).requires_grad_() for x in given[:3])
        h, last = reference.pool(gates, c, None, "fo")
        outcomes.append([h.detach(), last.detach(), *torch.autograd.grad(h, (gates, c), grad)])
    pairs = [(exact, (exact - eager).norm().item()) for exact, eager in zip(*outcomes, strict=True)]
    return {"forward": pairs[:2], "backward": pairs[2:]}


def _worst(found: tuple[Tensor, ...], truth: list[tuple[Tensor, float]]) -> float:
    """The largest distance from float64, as a multiple of the reference's; at most 2 is right."""
    return max(
        ((ours.double() - exact).norm().item() / allowed) for ours, (exact, allowed) in zip(found, truth, strict=False)
    )


def sweep(processes: int, seconds: float) -> None:
    """Prints the variants' times, best first for each direction and shape; none is begun after so many seconds."""
    start, tried = time.perf_counter(), variants()
    heavy_first = sorted(tried, key=lambda variant: -variant[3][2] * (1 + (variant[1] == SHAPES[3])))
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as workers:
            for fault in filter(None, workers.map(_compiled, heavy_first)):
                print("FAILED", fault)
    except Exception as error:  # what is not compiled now is when it is timed
        print("FAILED", repr(error)[:300])
    print(f"{len(tried)} variants compiled in {time.perf_counter() - start:.0f} s", flush=True)
    print(torch.cuda.get_device_name(), f"copies {copy_bandwidth() / 1e9:,.0f} GB/s", flush=True)
    data: dict[Any, list[tuple[Tensor, ...]]] = {}
    truths: dict[Any, dict[str, list[tuple[Tensor, float]]]] = {}
    timed: dict[tuple[Any, ...], list[tuple[float, float, tuple[Any, ...]]]] = {}
    for variant in tried:
        direction, shape, dtype, plan = variant
        if time.perf_counter() - start > seconds:
            print("no time left for", variant)
            continue
        try:
            key = shape, dtype
            if key not in data:
                data[key] = in_turn(lambda: _given(shape, dtype), _bytes("forward", shape, dtype))  # type: ignore[arg-type] # noqa: B023
                truths[key] = _truth(shape, dtype, data[key][0])
            works = [_prepared(variant, given) for given in data[key]]
            worst = _worst(works[0](), truths[key][direction])
            us = gpu_time(works)
        except Exception as error:
            print("FAILED", variant, repr(error)[:200])
            continue
        timed.setdefault((direction, shape, dtype), []).append((us, worst, plan))
    for key, times in timed.items():
        print(*key, f"limit {_limit(*key):.1f} us; us, share, error beside the reference's, plan")
        for us, worst, plan in sorted(times):
            print(f"  {us:7.1f} {_limit(*key) / us:6.1%} {worst:5.2f}{' WRONG' * (not worst <= 2)} {plan}")
    print(f"{time.perf_counter() - start:.0f} s")


def main() -> None:
    """Measures as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="compare layouts")
    parser.add_argument("--processes", type=int, default=14, help="that compile side by side (default: 14)")
    parser.add_argument("--seconds", type=float, default=80, help="after which no variant is begun (default: 80)")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep(arguments.processes, arguments.seconds)
        return
    print(f"{'measure':<22} {'shape':<25} {'us':>7} {'share':>6} {'naive':>7} {'limit':>6}  target")
    for row in rows():
        peer = "" if row["peer_us"] is None else f"{row['peer_us']:.1f}"
        figures = f"{row['ours_us']:7.1f} {row['share']:6.1%} {peer:>7} {row['limit_us']:6.1f}"
        print(f"{row['measure']:<22} {row['shape']:<25} {figures}  {row['target']}", flush=True)


if __name__ == "__main__":
    main()
