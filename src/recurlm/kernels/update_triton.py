"""One training update on the GPU in two passes over memory: the gradients' norm, then everything else.

The second pass clips, adds weight decay, takes the step of SGD or Adam, moves the mean of iterates, and writes what the
next forward pass reads: the weights in the compute type, weight drop applied, padded to sizes that matrix units like.
Masks are bits, drawn by a counter (Philox 4x32-10, Salmon et al. 2011) from a seed on the device, the weight's number
and the element, so nothing of them is saved. Nothing here makes the host wait.

A weight is a matrix of R x C in `PARTS` row blocks and `SPLITS` column blocks (gates, window); the working copy may be
larger, each block padded by zeros. A vector is a matrix of one row. One program works on 8 rows of BLOCK columns.
"""

# The kernels are Triton's language, which a type checker of Python cannot follow:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
ROWS = 8  # bits of a mask's byte
# Places in the control vector (float64), which the host writes before a step.
LR, NEWEST, CORRECTION_1, CORRECTION_2, SEED, NEXT_SEED, POSITION, SLOT = range(8)
CONTROLS = 8
# Places in the status vector (float32), which the device keeps.
OK, COEFFICIENT = range(2)

METHODS = {"none": 0, "sgd": 1, "momentum": 2, "nesterov": 3, "adam": 4, "adamw": 5}


@triton.jit
def _where(r, c, C, PARTS: tl.constexpr, ROW: tl.constexpr, ROW_PADDED: tl.constexpr,
           SPLITS: tl.constexpr, COLUMN: tl.constexpr, COLUMN_PADDED: tl.constexpr):  # fmt: skip
    """The place of element (r, c) in the padded copy."""
    if PARTS > 1 and ROW != ROW_PADDED:
        r = r + (r // ROW) * (ROW_PADDED - ROW)
    if SPLITS > 1 and COLUMN != COLUMN_PADDED:
        c = c + (c // COLUMN) * (COLUMN_PADDED - COLUMN)
    return r.to(tl.int64) * (SPLITS * COLUMN_PADDED) + c


@triton.jit
def _squares(
    grad, bits, partials, R, C_UNITS, scale,
    UNIT: tl.constexpr, PARTS: tl.constexpr, ROW: tl.constexpr, ROW_PADDED: tl.constexpr, SPLITS: tl.constexpr,
    COLUMN: tl.constexpr, COLUMN_PADDED: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    C = C_UNITS * UNIT
    r0 = tl.program_id(0) * 8
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    total = tl.zeros((BLOCK,), tl.float32)
    if DROPS:
        kept = tl.load(bits + tl.program_id(0).to(tl.int64) * C + c, mask=inside, other=0).to(tl.int32)
    gs = ()
    for j in tl.static_range(8):
        at = _where(r0 + j, c, C, PARTS, ROW, ROW_PADDED, SPLITS, COLUMN, COLUMN_PADDED)
        gs = gs + (tl.load(grad + at, mask=c < tl.where(r0 + j < R, C, 0), other=0.0),)
    for j in tl.static_range(8):
        g = gs[j].to(tl.float32)
        if DROPS:
            g = tl.where((kept >> j) & 1 == 1, g * scale, 0.0)
        total += g * g
    tl.store(partials + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(total, axis=0))


@triton.jit
def _judge(partials, count, terms, controls, status, ring, clip, TERMS: tl.constexpr, WIDTH: tl.constexpr,
           SLOT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums the squares, says whether the step may be taken (and no earlier one failed), and records its numbers."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    row = ring + tl.load(controls + SLOT).to(tl.int64) * WIDTH
    tl.store(row, norm)
    finite = (norm - norm) == 0.0
    for k in tl.static_range(TERMS):
        term = tl.load(terms + k)
        tl.store(row + 1 + k, term)
        finite = finite & ((term - term) == 0.0)
    ok = tl.where(finite, tl.load(status), 0.0)
    tl.store(row + WIDTH - 1, ok)
    tl.store(status, ok)
    coefficient = 1.0
    if clip > 0:
        coefficient = tl.minimum(tl.div_rn(clip, norm + 1e-6), 1.0)
    tl.store(status + 1, coefficient)


@triton.jit
def _update(
    grad, weight, moment_1, moment_2, mean, working, bits, controls, status,
    R, C_UNITS, number, threshold, scale, decay, beta_1, beta_2, eps,
    LR: tl.constexpr, NEWEST: tl.constexpr, CORRECTION_1: tl.constexpr, CORRECTION_2: tl.constexpr,
    NEXT_SEED: tl.constexpr,
    METHOD: tl.constexpr, MEAN: tl.constexpr, WORKING: tl.constexpr, DROPS: tl.constexpr, UNIT: tl.constexpr,
    PARTS: tl.constexpr, ROW: tl.constexpr, ROW_PADDED: tl.constexpr, SPLITS: tl.constexpr,
    COLUMN: tl.constexpr, COLUMN_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ok = True
    if METHOD > 0:
        ok = tl.load(status) != 0.0
    if ok:
        C = C_UNITS * UNIT
        r0 = tl.program_id(0) * 8
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = c < C
        byte = tl.program_id(0).to(tl.int64) * C + c
        kept = tl.zeros((BLOCK,), tl.int32)
        drawn = (kept, kept, kept, kept)
        if DROPS:
            if METHOD > 0:
                kept = tl.load(bits + byte, mask=inside, other=0).to(tl.int32)
            seed = tl.load(controls + NEXT_SEED).to(tl.int64)
            first = c.to(tl.uint32, bitcast=True)
            drawn = tl.philox(seed, first, first * 0 + tl.program_id(0), first * 0 + number, first * 0)
        gs, ps, ms, vs, means = (), (), (), (), ()
        for j in tl.static_range(8):
            there = c < tl.where(r0 + j < R, C, 0)
            raw = (r0 + j).to(tl.int64) * C + c
            ps = ps + (tl.load(weight + raw, mask=there, other=0.0),)
            if METHOD > 0:
                at = _where(r0 + j, c, C, PARTS, ROW, ROW_PADDED, SPLITS, COLUMN, COLUMN_PADDED)
                gs = gs + (tl.load(grad + at, mask=there, other=0.0),)
            if METHOD > 1:
                ms = ms + (tl.load(moment_1 + raw, mask=there, other=0.0),)
            if METHOD > 3:
                vs = vs + (tl.load(moment_2 + raw, mask=there, other=0.0),)
            if MEAN:
                means = means + (tl.load(mean + raw, mask=there, other=0.0),)
        lr = tl.load(controls + LR).to(tl.float32)
        newest = tl.load(controls + NEWEST).to(tl.float32)
        coefficient = tl.load(status + 1)
        step = lr / tl.load(controls + CORRECTION_1).to(tl.float32)
        root = tl.sqrt(tl.load(controls + CORRECTION_2).to(tl.float32))
        fresh = tl.zeros((BLOCK,), tl.int32)
        for j in tl.static_range(8):
            there = c < tl.where(r0 + j < R, C, 0)
            raw = (r0 + j).to(tl.int64) * C + c
            p = ps[j]
            if METHOD > 0:
                g = gs[j].to(tl.float32)
                if DROPS:
                    g = tl.where((kept >> j) & 1 == 1, g * scale, 0.0)
                g = g * coefficient
                if METHOD == 5:
                    p = p - lr * decay * p
                else:
                    g = g + decay * p
                if METHOD == 2 or METHOD == 3:
                    m = beta_1 * ms[j] + g
                    tl.store(moment_1 + raw, m, mask=there)
                    g = m if METHOD == 2 else g + beta_1 * m
                if METHOD > 3:
                    m = ms[j] + (1.0 - beta_1) * (g - ms[j])
                    v = beta_2 * vs[j] + (1.0 - beta_2) * g * g
                    tl.store(moment_1 + raw, m, mask=there)
                    tl.store(moment_2 + raw, v, mask=there)
                    p = p - step * m / (tl.sqrt(v) / root + eps)
                else:
                    p = p - lr * g
                tl.store(weight + raw, p, mask=there)
            if MEAN:
                a = means[j]
                tl.store(
                    mean + raw, tl.where(newest < 0.5, a + newest * (p - a), p - (p - a) * (1.0 - newest)), mask=there
                )
            if WORKING:
                w = p
                if DROPS:
                    half = (drawn[j // 2] >> (16 * (j % 2))) & 0xFFFF
                    keep = half.to(tl.int32) >= threshold
                    fresh = fresh | (keep.to(tl.int32) << j)
                    w = tl.where(keep, p * scale, 0.0)
                at = _where(r0 + j, c, C, PARTS, ROW, ROW_PADDED, SPLITS, COLUMN, COLUMN_PADDED)
                tl.store(working + at, w.to(working.dtype.element_ty), mask=there)
        if DROPS:
            tl.store(bits + byte, fresh.to(tl.uint8), mask=inside)


@triton.jit
def _keep_if_ok(old, new, status, n, BLOCK: tl.constexpr):
    if tl.load(status) != 0.0:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(old + at, tl.load(new + at, mask=at < n), mask=at < n)


class Shape(NamedTuple):
    """A weight's matrix R x C, and its blocks raw and padded."""

    R: int
    C: int
    blocks: tuple[int, int, int, int, int, int]
    """Row blocks, rows of one, padded rows of one, column blocks, columns of one, padded columns of one."""

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.R, ROWS), triton.cdiv(self.C, BLOCK)

    @property
    def unit(self) -> int:
        """The columns' divisor that the kernel may count on."""
        return next(unit for unit in (16, 8, 4, 2, 1) if self.C % unit == 0)


def shape_of(raw: tuple[int, ...], padded: tuple[int, ...], parts: tuple[int, ...]) -> Shape:
    """The Shape of a weight whose axes hold `parts` equal blocks each."""
    if len(raw) == 1:
        raw, padded, parts = (1, *raw), (1, *padded), (1, *parts)
    (rows, columns), (gates, splits) = raw, parts
    return Shape(
        rows, columns,
        (gates, rows // gates, padded[0] // gates, splits, columns // splits, padded[1] // splits),
    )  # fmt: skip


class Weight(NamedTuple):
    """One parameter and all that an update touches of it. `working` is None where the parameter itself is read."""

    number: int
    shape: Shape
    drop: float
    raw: Tensor
    working: Tensor | None
    bits: Tensor | None
    moments: tuple[Tensor, ...]


class Rule(NamedTuple):
    """How a step is taken; beta_1 is also the momentum."""

    method: str
    clip: float
    decay: float
    beta_1: float
    beta_2: float
    eps: float


def empty_bits(shape: Shape, device: torch.device) -> Tensor:
    """Room for the mask of one weight: a byte for 8 rows of a column."""
    return torch.zeros(triton.cdiv(shape.R, ROWS), shape.C, dtype=torch.uint8, device=device)


def judge(
    weights: list[Weight],
    gradients: list[Tensor],
    terms: Tensor,
    controls: Tensor,
    status: Tensor,
    ring: Tensor,
    clip: float,
) -> None:
    """Writes the norm, whether the step may be taken, and the numbers of the step to ring[slot]: norm, terms, ok."""
    counts = [w.shape.grid[0] * w.shape.grid[1] for w in weights]
    partials, start = torch.empty(sum(counts), device=terms.device), 0
    for w, gradient, count in zip(weights, gradients, counts, strict=True):
        drops = w.drop > 0
        _squares[w.shape.grid](
            gradient, w.bits if drops else gradient, partials[start:], w.shape.R, w.shape.C // w.shape.unit,
            1 / (1 - w.drop), w.shape.unit, *w.shape.blocks, drops, BLOCK, num_warps=4,
        )  # fmt: skip
        start += count
    _judge[(1,)](
        partials, start, terms, controls, status, ring, clip, terms.numel(), ring.shape[1], SLOT, 1024, num_warps=8
    )


def update(
    weights: list[Weight], gradients: list[Tensor], mean: list[Tensor], controls: Tensor, status: Tensor, rule: Rule
) -> None:
    """Moves weights, moments and (where there is one) the mean, and writes the working copies; nothing when not ok.

    With `rule.method` 'none' only the working copies are written, whatever the status.
    """
    for n, w in enumerate(weights):
        method, drops = METHODS[rule.method], w.drop > 0
        if w.working is None and method == 0:
            continue
        some = w.raw  # any pointer: what the flags rule out is not read
        _update[w.shape.grid](
            gradients[n] if method else some, w.raw,
            w.moments[0] if w.moments else some, w.moments[1] if len(w.moments) > 1 else some,
            mean[n] if mean and method else some, some if w.working is None else w.working, w.bits if drops else some,
            controls, status, w.shape.R, w.shape.C // w.shape.unit, w.number, round(w.drop * 65536), 1 / (1 - w.drop),
            rule.decay, rule.beta_1, rule.beta_2, rule.eps,
            LR, NEWEST, CORRECTION_1, CORRECTION_2, NEXT_SEED,
            method, bool(mean) and method > 0, w.working is not None, drops, w.shape.unit, *w.shape.blocks, BLOCK, num_warps=4,
        )  # fmt: skip


def keep_if_ok(old: Tensor, new: Tensor, status: Tensor) -> None:
    """Copies `new` over `old` unless a step failed."""
    if old.numel():
        _keep_if_ok[(triton.cdiv(old.numel(), 1024),)](old, new.contiguous(), status, old.numel(), 1024)
