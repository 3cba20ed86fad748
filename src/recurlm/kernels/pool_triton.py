"""QRNN pooling on the GPU: activations, recurrence and output gate in one pass over memory.

The pre-activations are those given plus a bias, if there is one; the sum of its gradient over time comes with the others'.
A program owns BLOCK columns of one batch row and walks through time. Forwards K steps are on their way to it at any
time: as soon as a few are computed, those that come K later are loaded into their registers, so that memory never waits
for arithmetic. It writes h, and, only where a gradient is needed, c before every `spacing`-th step. The backward pass
reads the gates and these marks, recomputes c between two marks in registers, and walks the same steps back.

Where there are too few columns to fill the GPU, time is split into chunks. The recurrence is linear in c, so a chunk
maps the c before it to the c after it as c -> a c + e: a first launch finds (a, e) of each chunk, and in the second each
chunk starts from the earlier ones' maps, applied in order. The same holds backwards for the gradient of c. The second
launch begins while the first still runs, where the GPU can do so. Forwards, a short time of few columns takes one launch:
all of its steps are on their way at once, and rows of a program walk parts of it side by side.

Arithmetic is fp32 for every storage type, and its order is fixed: equal calls give equal bits.
"""

# The kernels are Triton's language, which a type checker of Python cannot follow:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportReturnType=false
# ruff: noqa: SIM102, SIM108 - Triton compiles no starred tuple, and a constant condition must stand alone
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurlm.kernels import reference

INTERPRETED = triton.knobs.runtime.interpret
WHOLE = 1 << 30
"""A chunk that holds any time: it is not split."""


class Plan(NamedTuple):
    """How a kernel is laid out: columns and warps a program, steps in flight, and steps a chunk."""

    block: int
    warps: int
    unroll: int
    chunk: int
    ahead: bool
    """Backwards, whether the next steps are loaded before the current ones are computed; forwards they always are."""
    activation: str
    """A key of ACTIVATIONS."""
    rows: int = 1
    """Forwards, how many parts of `unroll` steps a program walks side by side; if more than one, all of time."""


ACTIVATIONS = {
    "plain": "the compiler's exponentials and divisions; any GPU",
    "exact": "the same as single instructions of NVIDIA's; as near to the truth as torch's in fp32",
    "shared": "as exact, with one reciprocal for all gates: fewer operations of the scarce special function unit",
    "mixed": "as shared, with the hardware's tanh for z, of which 10 bits are right: NVIDIA from 7.5",
    "approx": "the hardware's tanh for all gates",
}


def _activation(gates_TBG: Tensor) -> str:
    device = gates_TBG.device
    if INTERPRETED or device.type != "cuda" or torch.version.hip:
        return "plain"
    if gates_TBG.dtype == torch.float32:
        return "exact"
    return "approx" if torch.cuda.get_device_capability(device) >= (7, 5) else "shared"


def _overlaps(device: torch.device) -> bool:
    """Whether a launch can begin while the one before it still runs: NVIDIA from 9.0."""
    if INTERPRETED or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _chunk(T: int, columns: int, unroll: int) -> int:
    """Steps a chunk, a multiple of `unroll`: so many chunks that about 120,000 columns run at once; WHOLE if < 3."""
    chunks = min(120_000 // columns, T // 64)
    return WHOLE if chunks < 3 else triton.cdiv(T, chunks) // unroll * unroll


def _short(T: int, gates_TBG: Tensor) -> bool:
    """Whether all steps fit into the registers of 8 rows of 10."""
    return T <= 80 and gates_TBG.dtype != torch.float32


def _crowded(columns: int, device: torch.device) -> bool:
    """Whether the columns are more than run at once at two a thread; four a thread then do better than a second wave."""
    slots = 12 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
    return columns > 128 * slots


def forward_plan(gates_TBG: Tensor, c_BH: Tensor) -> Plan:
    """The forward kernel's layout. `unroll` is a multiple of the backward kernel's, or divides it."""
    T, columns, how = gates_TBG.shape[0], c_BH.numel(), _activation(gates_TBG)
    chunk = _chunk(T, columns, 8)
    if chunk != WHOLE:
        return Plan(64, 1, 8, chunk, True, how)
    if columns < 64_000:  # little parallelism: all of a short time on its way at once, or else 16 steps
        if _short(T, gates_TBG):
            return Plan(64, 8, 10, WHOLE, True, how, rows=8)
        return Plan(32, 1, 16, WHOLE, True, how)
    if gates_TBG.dtype != torch.float32 and _crowded(columns, c_BH.device):
        return Plan(128, 1, 4, WHOLE, True, how)
    return Plan(128, 2, 8, WHOLE, True, how)


def backward_plan(gates_TBG: Tensor, c_BH: Tensor) -> Plan:
    """The backward kernel's layout; its `unroll` is also the spacing of the marks."""
    T, columns, how = gates_TBG.shape[0], c_BH.numel(), _activation(gates_TBG)
    chunk = _chunk(T, columns, 8)
    if chunk != WHOLE:
        return Plan(64, 1, 8, chunk, True, how)
    if columns < 64_000:
        return Plan(32, 1, 10 if _short(T, gates_TBG) else 8, WHOLE, True, how)
    if gates_TBG.dtype == torch.float32:
        return Plan(128, 2, 8, WHOLE, True, how)
    return Plan(128, 1, 8, WHOLE, False, how) if _crowded(columns, c_BH.device) else Plan(128, 1, 4, WHOLE, True, how)


@triton.jit
def _exp2(x, ACT: tl.constexpr):
    if ACT == "plain":
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _reciprocal(x, ACT: tl.constexpr):
    if ACT == "plain":
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _tanh_approx(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _one_plus_exp(x, bias, RATE: tl.constexpr, ACT: tl.constexpr):
    """1 + e^(-RATE (x + bias)), at most 1 + 2^30; a NaN stays one."""
    power = x.to(tl.float32) * (-1.4426950408889634 * RATE) + bias * (-1.4426950408889634 * RATE)  # one operation
    return 1.0 + _exp2(tl.minimum(power, 30.0, propagate_nan=tl.PropagateNan.ALL), ACT)


@triton.jit
def _sigmoid(x, bias, ACT: tl.constexpr):
    if ACT == "approx":
        return 0.5 + 0.5 * _tanh_approx(0.5 * x.to(tl.float32) + 0.5 * bias)
    return _reciprocal(1.0 + _exp2((x.to(tl.float32) + bias) * -1.4426950408889634, ACT), ACT)


@triton.jit
def _tanh(x, bias, ACT: tl.constexpr):
    total = x.to(tl.float32) + bias
    if ACT == "approx" or ACT == "mixed":
        return _tanh_approx(total)
    fading = _exp2(tl.abs(total) * -2.8853900817779268, ACT)  # e^(-2 |x|): no digits cancel where |z| is near 1
    size = (1.0 - fading) * _reciprocal(1.0 + fading, ACT)
    return tl.where(total < 0.0, -size, size)


@triton.jit
def _activated(row, bias, WITH_Z: tl.constexpr, WITH_O: tl.constexpr, WITH_I: tl.constexpr, ACT: tl.constexpr):
    """(tanh Z, sigmoid F, sigmoid O, sigmoid I) of a row of pre-activations; what is not asked for is no number."""
    z, o, i = 0.0, 0.0, 0.0
    if ACT == "shared" or ACT == "mixed":  # each denominator is at most 2^30 + 1, so their product is finite
        over_z, over_o, over_i = 1.0, 1.0, 1.0
        if WITH_Z and ACT == "shared":
            over_z = _one_plus_exp(row[0], bias[0], 2.0, ACT)
        over_f = _one_plus_exp(row[1], bias[1], 1.0, ACT)
        if WITH_O:
            over_o = _one_plus_exp(row[2], bias[2], 1.0, ACT)
        if WITH_I:
            over_i = _one_plus_exp(row[3], bias[3], 1.0, ACT)
        zf, oi = over_z * over_f, over_o * over_i
        inverse = _reciprocal(zf * oi, ACT)
        inverse_zf, inverse_oi = inverse * oi, inverse * zf
        z, f = 2.0 * (inverse_zf * over_f) - 1.0, inverse_zf * over_z
        o, i = inverse_oi * over_i, inverse_oi * over_o
    else:
        f = _sigmoid(row[1], bias[1], ACT)
        if WITH_O:
            o = _sigmoid(row[2], bias[2], ACT)
        if WITH_I:
            i = _sigmoid(row[3], bias[3], ACT)
    if WITH_Z and ACT != "shared":
        z = _tanh(row[0], bias[0], ACT)
    return z, f, o, i


@triton.jit
def _load_bias(bias, h, H: tl.constexpr, GATES: tl.constexpr, BIAS: tl.constexpr):
    """The columns' biases of the gates Z, F, O, I; -0 where there is none, for to add it is no operation (to add 0 is one)."""
    none = tl.full((), -(1 << 31), tl.int32).to(tl.float32, bitcast=True)  # Triton writes -0.0 as 0
    found = (none, none, none, none)
    if BIAS:
        z = tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)
        f = tl.load(bias + H + h, mask=h < H, other=0.0).to(tl.float32)
        o, i = f, f
        if GATES >= 3:
            o = tl.load(bias + 2 * H + h, mask=h < H, other=0.0).to(tl.float32)
        if GATES == 4:
            i = tl.load(bias + 3 * H + h, mask=h < H, other=0.0).to(tl.float32)
        found = (z, f, o, i)
    return found


@triton.jit
def _width(t, begin, end, H):
    """H if begin <= t < end, else 0: `h < _width(...)` says which elements of step t exist."""
    return tl.where(t >= begin, tl.where(t < end, H, 0), 0)


@triton.jit
def _load_rows(
    gates, scale, dh, stride, t, begin, end, h, H: tl.constexpr, GATES: tl.constexpr, MASK: tl.constexpr,
    WITH_Z: tl.constexpr, WITH_O: tl.constexpr, WITH_G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """K rows (Z, F, O, I, scale, dh), as stored, of the steps t, t + 1, ...; a stand-in for what is not asked for.

    The pointers are those of step t, and a step is `stride` elements of (B, H). Steps outside [begin, end) read as 0 if
    WITH_G, else as anything: nothing that the forward pass keeps is computed from them.
    """
    OTHER: tl.constexpr = 0.0 if WITH_G else None
    rows = ()
    for j in tl.static_range(K):
        inside = h < _width(t + j, begin, end, H)
        at = gates + j * GATES * stride
        f = tl.load(at + H, mask=inside, other=OTHER)
        z, o, i, s, g = f, f, f, f, f
        if WITH_Z:
            z = tl.load(at, mask=inside, other=OTHER)
            if GATES == 4:
                i = tl.load(at + 3 * H, mask=inside, other=OTHER)
        if WITH_O:
            o = tl.load(at + 2 * H, mask=inside, other=OTHER)
        if MASK:
            s = tl.load(scale + j * stride, mask=inside, other=OTHER)
        if WITH_G:
            g = tl.load(dh + j * stride, mask=inside, other=OTHER)
        rows = rows + ((z, f, o, i, s, g),)
    return rows


@triton.jit
def _let_begin(NOW: tl.constexpr):
    """If NOW, the next launch may begin as soon as every program of this one is here, if it asked for it."""
    if NOW:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _through(r, maps, h, n, N, last, H: tl.constexpr, OVERLAP: tl.constexpr):
    """r after the maps r -> a r + e of the chunks 0, 1, ... last - 1, whose (a, e) lie at `maps`.

    With OVERLAP this launch began before the one that writes the maps was done, and waits for it here.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for k in range(0, last, 16):
        pairs = ()
        for j in tl.static_range(16):
            at = maps + tl.cast(k + j, tl.int64) * (2 * N) + n
            inside = h < _width(k + j, 0, last, H)
            pairs = pairs + ((tl.load(at, mask=inside, other=1.0), tl.load(at + N, mask=inside, other=0.0)),)
        for j in tl.static_range(16):
            r = pairs[j][0] * r + pairs[j][1]
    return r


@triton.jit(do_not_specialize=["T", "B", "chunk"])
def _forward(
    gates, scale, factor, bias, c0, h_out, last, marks, maps, T, B, chunk,
    H: tl.constexpr, GATES: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, FIND_MAPS: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr, SPACING: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """h_out and last, and marks if SPACING > 0; or, if FIND_MAPS, the map of each chunk of time but the last."""
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    MASK: tl.constexpr = SCALE == "mask"
    WITH_O: tl.constexpr = GATES >= 3 and not FIND_MAPS
    GROUP: tl.constexpr = 4 if K % 4 == 0 else K  # steps loaded at once
    b, h = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    keep, n = h < H, b * H + h
    place = tl.program_id(1)
    if not FIND_MAPS:  # those that the first launch read last come first: they are still in the cache
        place = tl.num_programs(1) - 1 - place
    begin = place * chunk
    end = tl.minimum(begin + chunk, T)
    stride = tl.cast(B, tl.int64) * H
    biases = _load_bias(bias, h, H, GATES, BIAS)
    gates += begin * GATES * stride + (tl.cast(b, tl.int64) * (GATES * H) + h)
    scale += begin * stride + n
    h_out += begin * stride + n
    _let_begin(FIND_MAPS and OVERLAP)
    rows = _load_rows(gates, scale, gates, stride, begin, 0, end, h, H, GATES, MASK, True, WITH_O, False, K)
    gates += K * GATES * stride
    scale += K * stride
    a = tl.full((BLOCK,), 1.0, tl.float32)
    if FIND_MAPS:
        c = tl.zeros((BLOCK,), tl.float32)
    else:
        c = tl.load(c0 + n, mask=keep, other=0.0).to(tl.float32)
        if SPLIT:
            c = _through(c, maps, h, n, B * H, place, H, OVERLAP)
        if SPACING > 0:
            tl.static_assert(K % SPACING == 0 or SPACING % K == 0)
            marks += begin // SPACING * stride + n
    for t in range(begin, end, K):
        following = ()
        for j in tl.static_range(K):
            inside = h < _width(t + j, 0, end, H)
            if SPACING > 0 and not FIND_MAPS:
                if j % SPACING == 0:
                    if SPACING <= K:
                        tl.store(marks, c, mask=inside)
                        marks += stride
                    else:
                        tl.store(marks, c, mask=h < tl.where(t % SPACING == 0, H, 0))
                        marks += tl.where(t % SPACING == 0, stride, 0)
            z, f, o, i = _activated(rows[j], biases, True, WITH_O, GATES == 4, ACT)
            if MASK:
                f = f * rows[j][4].to(tl.float32)
                i = i * rows[j][4].to(tl.float32)
            if SCALE == "constant":
                f = f * factor
                i = i * factor
            if GATES == 4:
                after = c - f * c + i * z
            else:
                after = c + f * (z - c)
            if FIND_MAPS:
                a = tl.where(t + j < end, a - f * a, a)
            else:
                y = after
                if GATES >= 3:
                    y = o * after
                tl.store(h_out + j * stride, y, mask=inside)
            c = tl.where(t + j < end, after, c)
            if j % GROUP == GROUP - 1:  # what is K steps later takes the registers of what is done
                following = following + _load_rows(
                    gates, scale, gates, stride, t + K + j + 1 - GROUP, 0, end, h, H, GATES, MASK, True, WITH_O, False,
                    GROUP,
                )  # fmt: skip
                gates += GROUP * GATES * stride
                scale += GROUP * stride
        h_out += K * stride
        rows = following
    if FIND_MAPS:
        maps += place * 2 * stride + n
        tl.store(maps, a, mask=keep)
        tl.store(maps + stride, c, mask=keep)
    elif end == T:
        tl.store(last + n, c, mask=keep)


@triton.jit
def _again(x, ACT: tl.constexpr):
    """x, which the compiler does not know to be x: it computes anew what it would keep in registers for long."""
    if ACT == "plain":
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)


@triton.jit
def _then(a, e, before_a, before_e, b, d, before_b, before_d):
    """The maps c -> a c + e, then c -> b c + d; beside each the map of all but its last part, and so of the result."""
    return b * a, b * e + d, before_b * a, before_b * e + before_d


@triton.jit(do_not_specialize=["T", "B"])
def _forward_at_once(
    gates, scale, factor, bias, c0, h_out, last, marks, T, B,
    H: tl.constexpr, GATES: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    SPACING: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """As _forward, of at most ROWS x K steps: a program loads all of them at once, and row r walks the r-th K of them.

    A row first finds the map of its steps; then it walks again, from where the earlier rows' maps lead.
    """
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    MASK: tl.constexpr = SCALE == "mask"
    tl.static_assert(SPACING == 0 or K % SPACING == 0)
    b, h = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)[None, :]
    keep, n, row = h < H, b * H + h, tl.arange(0, ROWS)[:, None]
    first, left = row * K, T - row * K
    stride = tl.cast(B, tl.int64) * H
    gates += first * (GATES * stride) + (tl.cast(b, tl.int64) * (GATES * H) + h)
    scale += first * stride + n
    rows = ()
    for j in tl.static_range(K):
        inside = h < tl.where(j < left, H, 0)
        at = gates + j * GATES * stride
        z = tl.load(at, mask=inside, other=0.0)
        f = tl.load(at + H, mask=inside, other=float("-inf"))  # whose sigmoid is 0: c stays
        o, i, s = f, f, f
        if GATES >= 3:
            o = tl.load(at + 2 * H, mask=inside)
        if GATES == 4:
            i = tl.load(at + 3 * H, mask=inside, other=float("-inf"))
        if MASK:
            s = tl.load(scale + j * stride, mask=inside, other=0.0)
        rows = rows + ((z, f, o, i, s),)
    biases = _load_bias(bias, h, H, GATES, BIAS)
    c = tl.load(c0 + n, mask=keep, other=0.0).to(tl.float32)
    one = tl.full((ROWS, BLOCK), 1.0, tl.float32)
    a, e = one, one * 0.0
    steps = ()
    for j in tl.static_range(K):
        z, f, o, i = _activated(rows[j], biases, True, False, GATES == 4, ACT)
        if GATES < 4:
            i = f
        if MASK:
            f = f * rows[j][4].to(tl.float32)
            i = i * rows[j][4].to(tl.float32)
        if SCALE == "constant":
            f = f * factor
            i = i * factor
        fading, new = 1.0 - f, i * z
        a, e = fading * a, fading * e + new
        steps = steps + ((fading, new),)
    _, _, a, e = tl.associative_scan((a, e, one, one * 0.0), 0, _then)
    c = a * c + e
    first, left = _again(first, ACT), _again(left, ACT)
    h_out += first * stride + n
    for j in tl.static_range(K):
        inside = h < tl.where(j < left, H, 0)
        if SPACING > 0:
            if j % SPACING == 0:
                tl.store(marks + ((first + j) // SPACING * stride + n), c, mask=inside)
        c = steps[j][0] * c + steps[j][1]
        y = c
        if GATES >= 3:
            y = _sigmoid(rows[j][2], biases[2], ACT) * c
        tl.store(h_out, y, mask=inside)
        h_out += stride
    tl.store(last + (n + row * 0), c, mask=keep & (row == ROWS - 1))


@triton.jit(do_not_specialize=["T", "B", "chunk"])
def _backward(
    gates, scale, factor, bias, marks, dh, dlast, dgates, dc0, dbias, maps, T, B, chunk,
    H: tl.constexpr, GATES: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, FIND_MAPS: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dgates, dc0, and dbias of each chunk and batch row if BIAS; or, if FIND_MAPS, the map of dc over each chunk.

    Chunks are counted from the end of time.
    """
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    MASK: tl.constexpr = SCALE == "mask"
    FULL: tl.constexpr = not FIND_MAPS
    WITH_O: tl.constexpr = GATES >= 3
    b, h = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    keep, n = h < H, b * H + h
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * chunk
    if FIND_MAPS:
        begin += chunk  # the first chunk of time, which is the last here, needs no map and has no program
    end = tl.minimum(begin + chunk, T)
    start = begin + (end - begin - 1) // K * K
    stride = tl.cast(B, tl.int64) * H
    biases = _load_bias(bias, h, H, GATES, BIAS)
    offset = start * GATES * stride + (tl.cast(b, tl.int64) * (GATES * H) + h)
    gates += offset
    dgates += offset
    scale += start * stride + n
    dh += start * stride + n
    a = tl.full((BLOCK,), 1.0, tl.float32)
    zero = tl.zeros((BLOCK,), tl.float32)
    sum_z, sum_f, sum_o, sum_i = zero, zero, zero, zero
    _let_begin(FIND_MAPS and OVERLAP)
    if AHEAD:  # before what follows, so that nobody waits twice
        rows = _load_rows(gates, scale, dh, stride, start, begin, end, h, H, GATES, MASK, FULL, WITH_O, True, K)
    if FIND_MAPS:
        r = tl.zeros((BLOCK,), tl.float32)
    else:
        r = tl.load(dlast + n, mask=keep, other=0.0).to(tl.float32)
        if SPLIT:
            r = _through(r, maps, h, n, B * H, tl.program_id(1), H, OVERLAP)
        marks += start // K * stride + n
        mark = tl.load(marks, mask=keep, other=0.0)
    for t in range(start, begin - 1, -K):
        if AHEAD:
            gates -= K * GATES * stride
            scale -= K * stride
            dh -= K * stride
            following = _load_rows(
                gates, scale, dh, stride, t - K, begin, end, h, H, GATES, MASK, FULL, WITH_O, True, K
            )
        else:
            rows = _load_rows(gates, scale, dh, stride, t, begin, end, h, H, GATES, MASK, FULL, WITH_O, True, K)
            gates -= K * GATES * stride
            scale -= K * stride
            dh -= K * stride
        if FULL:
            c = mark.to(tl.float32)
            marks -= stride
            mark = tl.load(marks, mask=h < _width(t, begin + 1, T, H), other=0.0)
        else:
            c = r  # any number: nothing below reads it
        steps = ()
        for j in tl.static_range(K):
            before = c
            z, s, o, i = _activated(rows[j], biases, FULL, WITH_O, FULL and GATES == 4, ACT)
            scaled = 1.0
            if MASK:
                scaled = rows[j][4].to(tl.float32)
            if SCALE == "constant":
                scaled = factor
            if GATES == 4:
                c = c - s * scaled * c + i * scaled * z
            else:
                c = c + s * scaled * (z - c)
            steps = steps + ((z, s, o, i, scaled, before, c),)
        part_z, part_f, part_o, part_i = zero, zero, zero, zero  # of the sums: fewer roundings follow each other
        for j in tl.static_range(K - 1, -1, -1):
            z, s, o, i, scaled, before, after = steps[j]
            inside = h < _width(t + j, 0, end, H)
            f = tl.where(t + j < end, s * scaled, 0.0)  # beyond the end dh is 0 and nothing fades: r stays
            g = rows[j][5].to(tl.float32)
            at = dgates + j * GATES * stride
            if GATES >= 3:
                if FULL:
                    d = g * after * (o * (1.0 - o))
                    part_o += d
                    tl.store(at + 2 * H, d, mask=inside)
                g = g * o
            r += g
            if FIND_MAPS:
                a = a - a * f
            else:
                if GATES == 4:
                    inner = tl.where(t + j < end, r, 0.0)
                    di = inner * z * (scaled * (i * (1.0 - i)))
                    dz = inner * (i * scaled) * (1.0 - z * z)
                    df = -(inner * before) * (scaled * (s * (1.0 - s)))
                    part_i += di
                    tl.store(at + 3 * H, di, mask=inside)
                else:
                    rf = r * f
                    dz = rf * (1.0 - z * z)
                    df = rf * (1.0 - s) * (z - before)
                part_z += dz
                part_f += df
                tl.store(at, dz, mask=inside)
                tl.store(at + H, df, mask=inside)
            r = r - r * f
        if BIAS and FULL:
            sum_z += part_z
            sum_f += part_f
            sum_o += part_o
            sum_i += part_i
        dgates -= K * GATES * stride
        if AHEAD:
            rows = following
    if FIND_MAPS:
        maps += tl.program_id(1) * 2 * stride + n
        tl.store(maps, a, mask=keep)
        tl.store(maps + stride, r, mask=keep)
    elif begin == 0:
        tl.store(dc0 + n, r, mask=keep)
    if BIAS and FULL:
        dbias += (tl.program_id(1) * B + b) * (GATES * H) + h
        tl.store(dbias, sum_z, mask=keep)
        tl.store(dbias + H, sum_f, mask=keep)
        if GATES >= 3:
            tl.store(dbias + 2 * H, sum_o, mask=keep)
        if GATES == 4:
            tl.store(dbias + 3 * H, sum_i, mask=keep)


Scale = Tensor | float | None


def _launch(
    kernel: Any, plan: Plan, shape: tuple[int, int, int], gates_TBG: Tensor, scale: Scale, bias_G: Tensor | None,
    pooling: str, others: tuple[Tensor, ...], constants: dict[str, int],
) -> None:  # fmt: skip
    """Runs the kernel over all columns; over time in chunks, after finding their maps, if the plan splits it.

    The kernel's arguments are the gates, the scale (a mask, or none and a factor), the bias and the others. A mask or
    bias that is not there is any tensor: it is not read.
    """
    (T, B, H), mask = shape, isinstance(scale, Tensor)
    programs, chunks = B * triton.cdiv(H, plan.block), triton.cdiv(T, plan.chunk)
    inputs = (
        gates_TBG, scale if mask else gates_TBG, 1.0 if mask or scale is None else float(scale),
        gates_TBG if bias_G is None else bias_G,
    )  # fmt: skip
    options = constants | {
        "H": H,
        "GATES": reference.GATES[pooling],
        "SCALE": "none" if scale is None else "mask" if mask else "constant",
        "BIAS": bias_G is not None,
        "K": plan.unroll,
        "BLOCK": plan.block,
        "ACT": plan.activation,
        "num_warps": plan.warps,
        "enable_fp_fusion": True,
    }
    if plan.rows > 1:
        if plan.rows * plan.unroll < T:
            raise ValueError(f"{plan} is for fewer than {T} steps")
        if plan.activation != "plain":
            options["maxnreg"] = 64  # so that 70 x 20 x 1,550 runs in one wave
        with torch.cuda.device_of(gates_TBG):
            _forward_at_once[(programs,)](*inputs, *others, T, B, ROWS=plan.rows, **options)
        return
    overlap = chunks > 1 and _overlaps(gates_TBG.device)
    options |= {"SPLIT": chunks > 1, "OVERLAP": overlap}
    maps = torch.empty((chunks - 1, 2, B, H) if chunks > 1 else (1,), dtype=torch.float32, device=gates_TBG.device)
    with torch.cuda.device_of(gates_TBG):  # Triton launches on the current device
        for find_maps in (True, False) if chunks > 1 else (False,):
            grid = programs, chunks - find_maps
            early = {"launch_pdl": True} if overlap and not find_maps else {}
            kernel[grid](*inputs, *others, maps, T, B, plan.chunk, FIND_MAPS=find_maps, **options, **early)


def run_forward(
    gates_TBG: Tensor, c_BH: Tensor, scale: Scale, pooling: str, bias_G: Tensor | None, plan: Plan, spacing: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(h_TBH, last c_BH, marks_SBH): c before steps 0, spacing, 2 spacing, ...; no marks if spacing is 0."""
    T, B, H = gates_TBG.shape[0], *c_BH.shape
    h_TBH = torch.empty((T, B, H), dtype=gates_TBG.dtype, device=gates_TBG.device)
    last_BH = torch.empty((B, H), dtype=c_BH.dtype, device=c_BH.device)
    marks_SBH = (
        torch.empty((triton.cdiv(T, spacing), B, H), dtype=h_TBH.dtype, device=c_BH.device) if spacing else h_TBH
    )
    others = (c_BH, h_TBH, last_BH, marks_SBH)
    _launch(_forward, plan, (T, B, H), gates_TBG, scale, bias_G, pooling, others, {"SPACING": spacing})
    return h_TBH, last_BH, marks_SBH


def run_backward(
    gates_TBG: Tensor, marks_SBH: Tensor, scale: Scale, pooling: str, bias_G: Tensor | None, plan: Plan,
    grad_h_TBH: Tensor, grad_last_BH: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(grad_gates_TBG, grad_c_BH, grad_bias_G), from marks whose spacing is the plan's `unroll`."""
    shape = T, B, H = tuple(grad_h_TBH.shape)
    grad_gates_TBG = torch.empty(gates_TBG.shape, dtype=gates_TBG.dtype, device=gates_TBG.device)
    grad_c_BH = torch.empty((B, H), dtype=grad_last_BH.dtype, device=gates_TBG.device)
    parts_NG = grad_c_BH  # not written without a bias
    if bias_G is not None:
        parts_NG = torch.empty(
            (triton.cdiv(T, plan.chunk) * B, gates_TBG.shape[-1]), dtype=torch.float32, device=gates_TBG.device
        )
    others = (marks_SBH, grad_h_TBH, grad_last_BH, grad_gates_TBG, grad_c_BH, parts_NG)
    _launch(_backward, plan, shape, gates_TBG, scale, bias_G, pooling, others, {"AHEAD": plan.ahead})
    return grad_gates_TBG, grad_c_BH, None if bias_G is None else parts_NG.sum(0).to(bias_G.dtype)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_TBG: Tensor, c_BH: Tensor, scale: Scale, pooling: str, bias_G: Tensor | None):  # type: ignore[override]
        ctx.plan = backward_plan(gates_TBG, c_BH)
        plan, spacing = forward_plan(gates_TBG, c_BH), ctx.plan.unroll
        h_TBH, last_BH, marks_SBH = run_forward(gates_TBG, c_BH, scale, pooling, bias_G, plan, spacing)
        ctx.save_for_backward(gates_TBG, marks_SBH, scale if isinstance(scale, Tensor) else None, bias_G)
        ctx.factor, ctx.pooling = None if isinstance(scale, Tensor) else scale, pooling
        return h_TBH, last_BH

    @staticmethod
    def backward(ctx, grad_h_TBH: Tensor, grad_last_BH: Tensor):  # type: ignore[override]
        gates_TBG, marks_SBH, mask_TBH, bias_G = ctx.saved_tensors
        scale = ctx.factor if mask_TBH is None else mask_TBH
        given = grad_h_TBH.contiguous(), grad_last_BH.contiguous()
        gates, c, bias = run_backward(gates_TBG, marks_SBH, scale, ctx.pooling, bias_G, ctx.plan, *given)
        return gates, c, None, None, bias


def pool(
    gates_TBG: Tensor, c_BH: Tensor, scale: Scale, pooling: str, bias_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH); the same as `reference.pool`, for GPU tensors of float32, bfloat16 or float16.

    The bias is added in fp32.
    """
    if gates_TBG.shape[0] == 0:
        return gates_TBG.new_empty((0, *c_BH.shape)), c_BH
    gates_TBG, c_BH = gates_TBG.contiguous(), c_BH.contiguous()
    if isinstance(scale, Tensor):
        scale = scale.expand(gates_TBG.shape[0], *c_BH.shape).contiguous()
    if bias_G is not None:
        bias_G = bias_G.contiguous()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gates_TBG, c_BH, bias_G)):
        return _Pool.apply(gates_TBG, c_BH, scale, pooling, bias_G)  # type: ignore[return-value]
    return run_forward(gates_TBG, c_BH, scale, pooling, bias_G, forward_plan(gates_TBG, c_BH), spacing=0)[:2]
