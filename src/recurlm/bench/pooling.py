"""QRNN pooling on the GPU beside a plain loop over the columns and the limit of the memory.

The limit counts what must be read and written, at the bandwidth of a copy: TBH elements (G + 1) times forwards and
(2 G + 1) times backwards, G = 3 gates. The marks that the forward pass leaves for the backward pass are not counted.

    python -m recurlm.bench.pooling --sweep     layouts and activations of the kernels side by side
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
    forward = pool_triton.forward_plan(gates_TBG, c_BH)._replace(unroll=plan.unroll, group=plan.unroll)
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
    whole, (first, second, short, long) = 1 << 30, SHAPES
    found: list[tuple[str, Shape, tuple[Any, ...]]] = []

    def ring(
        shape: Shape,
        tile: tuple[int, int],
        unroll: int,
        groups: Any,
        chunks: Any = (whole,),
        hints: Any = (0,),
        regs: int = 0,
    ):
        for group, chunk, hint in itertools.product(groups, chunks, hints):
            found.append(("forward", shape, (*tile, unroll, chunk, True, "approx", group, 0, hint, regs)))

    def staged(
        shape: Shape, tile: tuple[int, int], unroll: int, stages: Any, chunks: Any = (whole,), hints: Any = (0,)
    ):
        for stage, chunk, hint in itertools.product(stages, chunks, hints):
            found.append(("forward", shape, (*tile, unroll, chunk, True, "approx", unroll, stage, hint, 0)))

    def back(shape: Shape, tile: tuple[int, int], unrolls: Any, chunks: Any = (whole,)):
        for unroll, chunk in itertools.product(unrolls, chunks):
            found.append(("backward", shape, (*tile, unroll, chunk, True, "approx")))

    narrow, one, two, four, wide = (32, 1), (64, 1), (128, 2), (128, 1), (256, 4)
    ring(second, two, 4, (4, 2, 1))
    ring(second, four, 4, (4, 2, 1))
    staged(second, four, 4, (2, 3, 4))
    ring(first, two, 8, (8, 4, 2, 1))
    ring(first, four, 4, (4, 2, 1))
    staged(first, two, 4, (3, 4))
    staged(first, four, 4, (2, 3, 4))
    ring(short, narrow, 16, (16, 8, 4))
    ring(short, one, 16, (8, 4))
    staged(short, one, 4, (4, 6, 8))
    ring(long, one, 8, (4,), (72, 96, 128), (0, 6))
    ring(long, one, 16, (8,), (96, 128, 160), (0,))
    staged(long, one, 4, (4,), (96, 128), (0, 6))
    back(long, one, (8,), (64, 96, 128))
    back(short, narrow, (7, 8, 14))
    ring(second, four, 8, (8, 4, 2))
    ring(second, four, 8, (4,), regs=128)
    ring(second, two, 8, (8, 4, 2), regs=64)
    ring(second, two, 5, (5, 1))
    ring(second, four, 5, (5, 1))
    staged(second, four, 2, (4, 6))
    staged(second, two, 4, (3,))
    ring(second, two, 4, (2,), hints=(1,))
    ring(second, four, 4, (2,), hints=(1,))
    ring(second, (256, 2), 4, (2,))
    ring(second, wide, 4, (2,))
    ring(second, one, 4, (2,))
    ring(first, two, 7, (7, 1))
    ring(first, two, 10, (10, 5, 2))
    ring(first, two, 5, (1,))
    ring(first, four, 5, (1,))
    ring(first, four, 8, (8, 4))
    ring(first, four, 7, (1,))
    ring(first, (256, 2), 4, (2,))
    ring(first, wide, 8, (4,))
    ring(first, one, 8, (4,))
    ring(first, two, 8, (4,), hints=(1,))
    ring(first, four, 4, (2,), hints=(1,))
    staged(first, two, 2, (5,))
    staged(first, four, 2, (4, 6))
    ring(short, narrow, 24, (8,))
    ring(short, narrow, 14, (14, 7))
    ring(short, narrow, 10, (10, 5))
    ring(short, one, 8, (8, 4))
    ring(short, two, 8, (4,))
    ring(short, narrow, 16, (8,), hints=(1,))
    staged(short, one, 2, (8, 12))
    staged(short, one, 7, (4,))
    staged(short, one, 10, (3,))
    ring(long, one, 8, (2,), (96,), (0, 2, 4))
    ring(long, one, 8, (4,), (192,))
    ring(long, narrow, 16, (8,), (128,))
    staged(long, one, 4, (6,), (128,))
    staged(long, one, 8, (3,), (128,))
    back(long, narrow, (8,), (128,))
    back(short, one, (8,))
    back(short, narrow, (10,))
    return [(direction, shape, torch.bfloat16, plan) for direction, shape, plan in dict.fromkeys(found)]


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


def _errors() -> None:
    """Prints how far each activation is from float64, as a multiple of the reference's distance in the same type."""
    from recurlm.kernels.pool_triton import WHOLE, Plan, run_backward, run_forward

    print("bfloat16, distance from float64 beside the reference's: h, gradients of gates, c and bias")
    for memory, act in itertools.product((0.0, 5.0, 10.0), ("shared", "mixed", "approx")):
        values = _given((70, 20, 1550), torch.bfloat16, memory=memory)
        outcomes = []
        for dtype in (torch.float64, torch.bfloat16):
            gates, c, grad, bias = (x.to(dtype).requires_grad_() for x in values)
            h = reference.pool(gates, c, None, "fo", bias)[0]
            outcomes.append([h.detach(), *torch.autograd.grad(h, (gates, c, bias), grad)])
        gates, c, grad, bias = values
        plan = Plan(128, 2, 8, WHOLE, False, act)
        h, last, marks = run_forward(gates, c, None, "fo", bias, plan, 8)
        ours = (h, *run_backward(gates, marks, None, "fo", bias, plan, grad, torch.zeros_like(last)))
        found = [((a.double() - b).norm() / (e - b).norm()).item() for a, b, e in zip(ours, *outcomes, strict=True)]
        print(f"  F - {memory:<4.0f} {act:<7}", *(f"{x:6.3f}" for x in found))


def sweep(processes: int, seconds: float) -> None:
    """Prints the variants' times, best first for each direction and shape; none is begun after so many seconds."""
    from recurlm.kernels import pool_triton

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
    data: dict[Shape, list[tuple[Tensor, ...]]] = {}
    truths: dict[Shape, dict[str, list[tuple[Tensor, float]]]] = {}
    timed: dict[tuple[Any, ...], list[tuple[float, float, tuple[Any, ...], str]]] = {}
    for variant in tried:
        direction, shape, dtype, plan = variant
        if time.perf_counter() - start > seconds:
            print("no time left for", variant)
            continue
        try:
            if shape not in data:
                data[shape] = in_turn(lambda: _given(shape, dtype), _bytes("forward", shape, dtype))  # type: ignore[arg-type] # noqa: B023
                truths[shape] = _truth(shape, dtype, data[shape][0])
            works = [_prepared(variant, given) for given in data[shape]]
            worst = _worst(works[0](), truths[shape][direction])
            us = gpu_time(works)
            kernel = pool_triton.NOTES["_" + direction]
            regs = f"{getattr(kernel, 'n_regs', 0)} registers, {getattr(kernel, 'n_spills', 0)} spilled"
        except Exception as error:
            print("FAILED", variant, repr(error)[:200])
            continue
        timed.setdefault((direction, shape, dtype), []).append((us, worst, plan, regs))
    for key, times in timed.items():
        print(*key, f"limit {_limit(*key):.1f} us; us, share, error beside the reference's, plan")
        for us, worst, plan, regs in sorted(times):
            print(f"  {us:7.1f} {_limit(*key) / us:6.1%} {worst:5.2f}{' WRONG' * (not worst <= 2)} {plan} {regs}")
    print(f"{time.perf_counter() - start:.0f} s")


def main() -> None:
    """Measures as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="compare layouts and activations")
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
