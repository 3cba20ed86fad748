"""An experiment: a tile of time and columns in registers, read once; tiles of time pass their maps on within one launch.

python -m recurlm.bench.pooling_tiles short|long SECONDS     layouts beside today's kernel
"""

# pyright: basic, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportReturnType=false
# ruff: noqa: SIM108, RUF005 - Triton compiles no starred tuple
from __future__ import annotations

import concurrent.futures
import multiprocessing
import sys
import time
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurlm.bench import pooling
from recurlm.bench.timing import copy_bandwidth, gpu_time, in_turn
from recurlm.kernels import reference
from recurlm.kernels.pool_triton import _activated, _load_bias, _sigmoid


class Tiling(NamedTuple):
    """How a tile is laid out: chunks of time side by side, steps of each, columns, warps, and words a thread asks for."""

    chunks: int
    steps: int
    block: int
    warps: int
    look: int
    ticket: bool
    late: bool
    """Whether the output gate is loaded after the maps are found."""
    registers: int
    activation: str


@triton.jit
def _then(a, e, b, d):
    """The map c -> a c + e followed by c -> b c + d."""
    return b * a, b * e + d


@triton.jit
def _then_and_before(a, e, x, y, b, d, u, v):
    """As _then, of maps with those of all but their last part beside them."""
    return b * a, b * e + d, u * a, u * e + v


@triton.jit
def _word(a, e):
    """The map as a word that is never 0."""
    high = a.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return ~(high | (e.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF))


@triton.jit
def _map(word):
    word = ~word
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True), word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _again(x, ACT: tl.constexpr):
    """x, of which the compiler does not know that it is x: it computes anew what it would else keep in registers."""
    if ACT == "plain":
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)


@triton.jit
def _last_row(x, row, CHUNKS: tl.constexpr):
    return tl.sum(tl.where(row == CHUNKS - 1, x, 0.0), 0, keep_dims=True)


@triton.jit(do_not_specialize=["T", "B"])
def _tile(
    gates, scale, factor, bias, c0, h_out, last, marks, words, T, B,
    H: tl.constexpr, GATES: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    TICKET: tl.constexpr, LATE: tl.constexpr, SPACING: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr, LOOK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    MASK: tl.constexpr = SCALE == "mask"
    number = tl.program_id(0)
    if SPLIT:
        if TICKET:  # programs begin in any order, but every number before theirs has begun
            number = tl.atomic_add(words, 1, sem="relaxed").to(tl.int32)
        words += 1
    place, column = number // (B * BLOCKS), number % (B * BLOCKS)
    b, h = column // BLOCKS, column % BLOCKS * BLOCK + tl.arange(0, BLOCK)[None, :]
    n, row = b * H + h, tl.arange(0, CHUNKS)[:, None]
    first = place * (CHUNKS * STEPS) + row * STEPS
    bound = tl.where(h < H, T - first, 0)  # step j of a row exists if it is less
    stride = tl.cast(B, tl.int64) * H
    at = gates + (first * (GATES * stride) + (tl.cast(b, tl.int64) * (GATES * H) + h))
    scale += first * stride + n
    rows, outs = (), ()
    for j in tl.static_range(STEPS):
        inside = j < bound
        z = tl.load(at + j * GATES * stride, mask=inside)
        f = tl.load(at + j * GATES * stride + H, mask=inside)
        o, i, s = f, f, f
        if GATES >= 3 and not LATE:
            o = tl.load(at + j * GATES * stride + 2 * H, mask=inside)
        if GATES == 4:
            i = tl.load(at + j * GATES * stride + 3 * H, mask=inside)
        if MASK:
            s = tl.load(scale + j * stride, mask=inside)
        rows = rows + ((z, f, o, i, s),)
    biases = _load_bias(bias, h, H, GATES, BIAS)
    carry = tl.load(c0 + n, mask=h < H, other=0.0).to(tl.float32)
    a = tl.full((CHUNKS, BLOCK), 1.0, tl.float32)
    e = tl.zeros((CHUNKS, BLOCK), tl.float32)
    steps = ()
    bound = _again(bound, ACT)
    for j in tl.static_range(STEPS):
        z, f, o, i = _activated(rows[j], biases, True, False, GATES == 4, ACT)
        if MASK:
            f = f * rows[j][4].to(tl.float32)
            i = i * rows[j][4].to(tl.float32)
        if SCALE == "constant":
            f = f * factor
            i = i * factor
        f = tl.where(j < bound, f, 0.0)
        if GATES == 4:
            z = i * z
        z = tl.where(j < bound, z, 0.0)
        if GATES == 4:
            e = e - f * e + z
        else:
            e = e + f * (z - e)
        a = a - f * a
        steps = steps + ((z, f),)
    if GATES >= 3:
        if LATE:
            first, bound = _again(first, ACT), _again(bound, ACT)
            at = gates + (first * (GATES * stride) + (tl.cast(b, tl.int64) * (GATES * H) + h))
        for j in tl.static_range(STEPS):
            if LATE:
                inside = j < bound
                outs = outs + (tl.load(at + j * GATES * stride + 2 * H, mask=inside),)
            else:
                outs = outs + (rows[j][2],)
    one = tl.full((CHUNKS, BLOCK), 1.0, tl.float32)
    a, e, x, y = tl.associative_scan((a, e, one, one * 0.0), 0, _then_and_before)
    if SPLIT:
        if place * (CHUNKS * STEPS) + CHUNKS * STEPS < T:
            whole = words + (tl.cast(place, tl.int64) * (B * H) + n)
            tl.atomic_xchg(whole + row * 0, _word(a, e), mask=(h < H) & (row == CHUNKS - 1), sem="relaxed")
        for k in range(0, place, CHUNKS * LOOK):
            p = tl.full((CHUNKS, BLOCK), 1.0, tl.float32)
            q = tl.zeros((CHUNKS, BLOCK), tl.float32)
            missing = 1
            while missing > 0:
                p = tl.full((CHUNKS, BLOCK), 1.0, tl.float32)
                q = tl.zeros((CHUNKS, BLOCK), tl.float32)
                empty = tl.zeros((CHUNKS, BLOCK), tl.int32)
                for j in tl.static_range(LOOK):
                    other = k + row * LOOK + j
                    there = (h < H) & (other < place)
                    word = tl.load(words + (other.to(tl.int64) * (B * H) + n), mask=there, other=1, volatile=True)
                    empty = empty | tl.where(word == 0, 1, 0)
                    b_, d_ = _map(word)
                    p, q = _then(p, q, tl.where(there, b_, 1.0), tl.where(there, d_, 0.0))
                missing = tl.max(empty)
            p, q = tl.associative_scan((p, q), 0, _then)
            carry = _last_row(p * carry + q, row, CHUNKS)
    c = x * carry + y
    first, bound = _again(first, ACT), _again(bound, ACT)
    h_out += first * stride + n
    for j in tl.static_range(STEPS):
        inside = j < bound
        if SPACING > 0:
            mark = marks + ((first + j) // SPACING * stride + n)
            tl.store(mark, c, mask=inside & ((first + j) % SPACING == 0))
        z, f = steps[j]
        if GATES == 4:
            c = c - f * c + z
        else:
            c = c + f * (z - c)
        y = c
        if GATES >= 3:
            y = _sigmoid(outs[j], biases[2], ACT) * c
        tl.store(h_out, y, mask=inside)
        h_out += stride
    if place * (CHUNKS * STEPS) + CHUNKS * STEPS >= T:
        tl.store(last + (n + row * 0), c, mask=(h < H) & (row == CHUNKS - 1))


def run(gates_TBG: Tensor, c_BH: Tensor, scale, pooling: str, bias_G, tiling: Tiling, spacing: int):
    """As pool_triton.run_forward."""
    T, B, H = gates_TBG.shape[0], *c_BH.shape
    mask = isinstance(scale, Tensor)
    h_TBH = torch.empty((T, B, H), dtype=gates_TBG.dtype, device=gates_TBG.device)
    last_BH = torch.empty_like(c_BH)
    marks_SBH = (
        torch.empty((triton.cdiv(T, spacing), B, H), dtype=h_TBH.dtype, device=c_BH.device) if spacing else h_TBH
    )
    tiles = triton.cdiv(T, tiling.chunks * tiling.steps)
    words = gates_TBG
    if tiles > 1:
        words = torch.zeros(1 + (tiles - 1) * B * H, dtype=torch.int64, device=c_BH.device)
    options = {} if not tiling.registers else {"maxnreg": tiling.registers}
    _tile[(tiles * B * triton.cdiv(H, tiling.block),)](
        gates_TBG, scale if mask else gates_TBG, 1.0 if mask or scale is None else float(scale),
        gates_TBG if bias_G is None else bias_G, c_BH, h_TBH, last_BH, marks_SBH, words, T, B,
        H=H, GATES=reference.GATES[pooling], SCALE="none" if scale is None else "mask" if mask else "constant",
        BIAS=bias_G is not None, SPLIT=tiles > 1, TICKET=tiling.ticket, LATE=tiling.late, SPACING=spacing,
        CHUNKS=tiling.chunks, STEPS=tiling.steps, BLOCK=tiling.block, LOOK=tiling.look, ACT=tiling.activation,
        num_warps=tiling.warps, **options,
    )  # fmt: skip
    return h_TBH, last_BH, marks_SBH


SHORT, LONG, TWICE = (70, 20, 1550), (5000, 1, 1550), (140, 20, 1550)
Variant = tuple[tuple[int, int, int], Tiling | None]


def variants() -> list[Variant]:
    """What is compared; None is today's kernel."""
    found: list[Variant] = []
    for shape, tilings in {
        SHORT: (
            (4, 18, 32, 4, 1, True, False, 0),
            (4, 18, 32, 4, 1, True, False, 64),
            (4, 18, 32, 4, 1, True, False, 72),
            (4, 18, 32, 4, 1, True, True, 0),
            (4, 18, 32, 4, 1, True, True, 64),
            (4, 20, 32, 4, 1, True, False, 64),
            (4, 20, 32, 4, 1, True, False, 0),
            (8, 9, 32, 8, 1, True, False, 0),
            (8, 9, 64, 8, 1, True, False, 64),
            (8, 10, 64, 8, 1, True, False, 64),
            (8, 9, 64, 8, 1, True, True, 64),
            (4, 18, 16, 2, 1, True, False, 64),
        ),
        LONG: (
            (8, 16, 32, 8, 5, True, False, 0),
            (8, 16, 32, 8, 5, True, False, 64),
            (8, 16, 32, 8, 5, True, False, 80),
            (8, 16, 32, 8, 5, False, False, 64),
            (8, 16, 32, 8, 5, True, True, 64),
            (8, 16, 32, 8, 2, True, False, 64),
            (8, 12, 32, 8, 7, True, False, 0),
            (8, 12, 32, 8, 7, True, False, 64),
            (8, 20, 32, 8, 4, True, False, 80),
            (8, 8, 32, 8, 5, True, False, 0),
            (4, 16, 32, 4, 10, True, False, 0),
            (16, 16, 32, 16, 2, True, False, 64),
            (16, 16, 32, 16, 1, True, False, 64),
            (16, 12, 32, 16, 2, True, False, 64),
            (16, 16, 32, 16, 2, False, False, 64),
            (16, 8, 64, 16, 3, True, False, 0),
            (16, 8, 64, 16, 3, True, False, 64),
            (8, 8, 64, 8, 4, True, False, 64),
            (8, 8, 64, 8, 4, True, False, 80),
            (16, 8, 32, 16, 3, True, False, 0),
            (8, 16, 64, 8, 5, True, False, 128),
        ),
        TWICE: ((8, 18, 32, 8, 1, True, False, 64), (4, 18, 32, 4, 1, True, False, 64)),
    }.items():
        found += [(shape, None)] + [(shape, Tiling(*tiling, "approx")) for tiling in tilings]
    return found


def work(shape, tiling: Tiling | None, given: tuple[Tensor, ...] = ()):
    """A call of it."""
    gates, c, grad, _ = given or pooling._given(shape, torch.bfloat16)
    if tiling is None:
        return pooling._ours("forward", shape, torch.bfloat16, False, None, (gates, c, grad, grad))
    return lambda: run(gates, c, None, "fo", None, tiling, 0)


def compiled(variant: Variant) -> str:
    """Fills Triton's cache."""
    start = time.perf_counter()
    try:
        work(*variant)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"FAILED {variant}: {error!r}"[:400]
    return f"{time.perf_counter() - start:.1f} s {variant}"


def main() -> None:
    """The table."""
    start, seconds = time.perf_counter(), float(sys.argv[2])
    chosen = {"short": (SHORT,), "long": (LONG, TWICE)}[sys.argv[1]]  # if one hangs, the other is not lost
    tried = [variant for variant in variants() if variant[0] in chosen]
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(14, mp_context=context) as workers:
            for line in workers.map(compiled, tried):
                print(line, flush=True)
    except Exception as error:
        print("FAILED", repr(error)[:300])
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    print(torch.cuda.get_device_name(), f"copies {copy_bandwidth() / 1e9:,.0f} GB/s", flush=True)
    for shape in dict.fromkeys(shape for shape, _ in tried):
        data = in_turn(lambda: pooling._given(shape, torch.bfloat16), pooling._bytes("forward", shape, torch.bfloat16))  # noqa: B023
        truth = pooling._truth(shape, torch.bfloat16, data[0])["forward"]  # type: ignore[arg-type]
        limit = pooling._limit("forward", shape, torch.bfloat16)
        print(shape, f"limit {limit:.1f} us; us, share, error beside the reference's, same bits twice", flush=True)
        for tiling in [tiling for other, tiling in tried if other == shape]:
            if time.perf_counter() - start > seconds:
                print("no time for", tiling)
                continue
            try:
                works = [work(shape, tiling, given) for given in data]  # type: ignore[arg-type]
                first = works[0]()
                worst = pooling._worst(first, truth)
                torch.cuda.synchronize()
                us = gpu_time(works)
                same = all(torch.equal(x, y) for x, y in zip(first[:2], works[0]()[:2], strict=True))
                note = ""
                if tiling is not None:
                    kernels = list(_tile.device_caches[torch.cuda.current_device()][0].values())
                    note = f"{kernels[-1].n_regs} registers, {kernels[-1].n_spills} spilled"
                print(
                    f"  {us:7.2f} {limit / us:6.1%} {worst:5.2f}{' WRONG' * (not worst <= 2)} {same} {tiling} {note}",
                    flush=True,
                )
            except Exception as error:
                print("  FAILED", tiling, repr(error)[:300], flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
