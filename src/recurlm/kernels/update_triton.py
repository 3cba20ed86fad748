"""One training update on the GPU in two passes over memory: the gradients' norm, then everything else.

The second pass clips, adds weight decay, takes the step of SGD or Adam, moves the mean of iterates, and writes what the
next forward pass reads: the weights in the compute type, weight drop applied, padded to sizes that matrix units like.
Masks are bits, drawn by a counter (Philox 4x32-10, Salmon et al. 2011) from a seed on the device, the weight's number
and the element, so nothing of them is saved. Nothing here makes the host wait.

A weight is a matrix of R x C in `PARTS` row blocks and `SPLITS` column blocks (gates, window); the working copy may be
larger, each block padded by zeros. A vector is a matrix of one row. One launch serves all weights: a program finds its
weight by its number. It works on columns of 8 rows, `unit` neighbours at a time, counted through the whole matrix.
"""

# The kernels are Triton's language, which a type checker of Python cannot follow:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # bits of a mask's byte
MOST_WEIGHTS = 16  # in one launch: each adds to what every program computes to find its own
# Places in the control vector (float64), which the host writes before a step.
LR, NEWEST, CORRECTION_1, CORRECTION_2, SEED, NEXT_SEED, POSITION, SLOT = range(8)
CONTROLS = 8
# Places in the status vector (float32), which the device keeps.
OK, COEFFICIENT = range(2)

METHODS = {"none": 0, "sgd": 1, "momentum": 2, "nesterov": 3, "adam": 4, "adamw": 5}


class Tiles(NamedTuple):
    """How a pass over the weights is cut."""

    unit: int
    """Most neighbouring columns that one thread loads at once."""
    block: int
    """Columns of 8 rows at a time."""
    loops: int
    """Blocks of one program, one after the other."""
    warps: int
    backwards: bool
    """From the last weight to the first, to find in the cache what the pass before read last."""


SQUARES = Tiles(2, 1024, 2, 4, False)
UPDATE = Tiles(2, 512, 1, 8, True)


@triton.jit
def _pick(values, starts, at):
    """The value of the weight whose programs include `at`."""
    value = values[0]
    for k in tl.static_range(1, len(starts)):
        value = tl.where(at >= starts[k], values[k], value)
    return value


@triton.jit
def _program(BACKWARDS: tl.constexpr):
    return tl.num_programs(0) - 1 - tl.program_id(0) if BACKWARDS else tl.program_id(0)


@triton.jit
def _place(n, C, row_block, row_gap, column_block, column_gap, stride, GAPS: tl.constexpr):
    """Of column n: its row group, its column, its first row's place raw, padded, and among the rows of its block."""
    group = n // C
    c = n - group * C
    block = group * 8 // row_block
    raw = group * 8 * C + c
    padded = (group * 8 + block * row_gap) * stride + c
    if GAPS:
        padded += c // column_block * column_gap
    return group, c, raw, padded, group * 8 - block * row_block


@triton.jit
def _next_row(padded, among, row_block, row_gap, stride):
    """The place of the row below, and which of its block it is."""
    crosses = among + 1 == row_block
    return padded + stride + tl.where(crosses, row_gap * stride, 0), tl.where(crosses, 0, among + 1)


@triton.jit
def _squares(
    grads, bits, partials, starts, rows, columns, row_blocks, row_gaps, column_blocks, column_gaps, strides,
    thresholds, scales,
    WIDE: tl.constexpr, GAPS: tl.constexpr, DROPS: tl.constexpr, BACKWARDS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    at = _program(BACKWARDS)
    grad, R, C = _pick(grads, starts, at), _pick(rows, starts, at), _pick(columns, starts, at)
    row_block, row_gap = _pick(row_blocks, starts, at), _pick(row_gaps, starts, at)
    column_block, column_gap = _pick(column_blocks, starts, at), _pick(column_gaps, starts, at)
    stride = _pick(strides, starts, at)
    first = (at - _pick(starts, starts, at)) * (BLOCK // UNIT * LOOPS)
    if DROPS:
        mask, threshold, scale = _pick(bits, starts, at), _pick(thresholds, starts, at), _pick(scales, starts, at)
        dropped = tl.where(threshold > 0, R, 0)
    v = tl.arange(0, UNIT)[None, :]
    total = tl.zeros((BLOCK // UNIT, UNIT), tl.float32)
    for loop in range(LOOPS):
        n = first + loop * (BLOCK // UNIT) + tl.arange(0, BLOCK // UNIT)
        if WIDE:
            n = n.to(tl.int64)
        group, c, _, padded, among = _place(n, C, row_block, row_gap, column_block, column_gap, stride, GAPS)
        if DROPS:
            there = (group * 8 < dropped)[:, None]
            byte = (group * C + c)[:, None] * UNIT + v
            kept = tl.load(mask + byte, mask=there, other=255).to(tl.int32)
        gs = ()
        for j in tl.static_range(8):
            there = (group * 8 + j < R)[:, None]
            gs = gs + (tl.load(grad + (padded[:, None] * UNIT + v), mask=there, other=0.0),)
            padded, among = _next_row(padded, among, row_block, row_gap, stride)
        for j in tl.static_range(8):
            g = gs[j].to(tl.float32)
            if DROPS:
                g = tl.where((kept >> j) & 1 == 1, g * scale, 0.0)
            total += g * g
    tl.store(partials + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit(do_not_specialize=["count"])
def _judge(partials, count, terms, controls, status, ring, clip, TERMS: tl.constexpr, WIDTH: tl.constexpr,
           SLOT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums the squares, says whether the step may be taken (and no earlier one failed), and records its numbers."""
    slot, ok = tl.load(controls + SLOT).to(tl.int64), tl.load(status)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    row = ring + slot * WIDTH
    tl.store(row, norm)
    finite = (norm - norm) == 0.0
    for k in tl.static_range(TERMS):
        term = tl.load(terms + k)
        tl.store(row + 1 + k, term)
        finite = finite & ((term - term) == 0.0)
    ok = tl.where(finite, ok, 0.0)
    tl.store(row + WIDTH - 1, ok)
    tl.store(status, ok)
    coefficient = 1.0
    if clip > 0:
        coefficient = tl.minimum(tl.div_rn(clip, norm + 1e-6), 1.0)
    tl.store(status + 1, coefficient)


@triton.jit
def _update(
    grads, weights, moments_1, moments_2, means, workings, bits, controls, status,
    starts, rows, columns, row_blocks, row_gaps, column_blocks, column_gaps, strides, thresholds, scales, numbers,
    decay, beta_1, beta_2, eps,
    LR: tl.constexpr, NEWEST: tl.constexpr, CORRECTION_1: tl.constexpr, CORRECTION_2: tl.constexpr,
    NEXT_SEED: tl.constexpr,
    METHOD: tl.constexpr, MEAN: tl.constexpr, WORKING: tl.constexpr,
    WIDE: tl.constexpr, GAPS: tl.constexpr, DROPS: tl.constexpr, BACKWARDS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    at = _program(BACKWARDS)
    weight, R, C = _pick(weights, starts, at), _pick(rows, starts, at), _pick(columns, starts, at)
    row_block, row_gap = _pick(row_blocks, starts, at), _pick(row_gaps, starts, at)
    column_block, column_gap = _pick(column_blocks, starts, at), _pick(column_gaps, starts, at)
    stride = _pick(strides, starts, at)
    first = (at - _pick(starts, starts, at)) * (BLOCK // UNIT * LOOPS)
    written = R
    if METHOD > 0:
        grad, coefficient = _pick(grads, starts, at), tl.load(status + 1)
        written = tl.where(tl.load(status) != 0.0, R, 0)
    if METHOD > 1:
        moment_1 = _pick(moments_1, starts, at)
    if METHOD > 3:
        moment_2 = _pick(moments_2, starts, at)
    if MEAN:
        mean = _pick(means, starts, at)
    if WORKING:
        working = _pick(workings, starts, at)
    if DROPS:
        mask, number = _pick(bits, starts, at), _pick(numbers, starts, at)
        threshold, scale = _pick(thresholds, starts, at), _pick(scales, starts, at)
        seed = tl.load(controls + NEXT_SEED).to(tl.int64)
    lr = tl.load(controls + LR).to(tl.float32)
    newest = tl.load(controls + NEWEST).to(tl.float32)
    step = lr / tl.load(controls + CORRECTION_1).to(tl.float32)
    root = tl.sqrt(tl.load(controls + CORRECTION_2).to(tl.float32))
    v = tl.arange(0, UNIT)[None, :]
    for loop in range(LOOPS):
        n = first + loop * (BLOCK // UNIT) + tl.arange(0, BLOCK // UNIT)
        if WIDE:
            n = n.to(tl.int64)
        group, c, raw_0, padded_0, among_0 = _place(n, C, row_block, row_gap, column_block, column_gap, stride, GAPS)
        gs, ps, m1s, m2s, olds = (), (), (), (), ()
        padded, among = padded_0, among_0
        for j in tl.static_range(8):
            there = (group * 8 + j < R)[:, None]
            raw = (raw_0 + j * C)[:, None] * UNIT + v
            ps = ps + (tl.load(weight + raw, mask=there, other=0.0, eviction_policy="evict_first"),)
            if METHOD > 0:
                place = padded[:, None] * UNIT + v
                gs = gs + (tl.load(grad + place, mask=there, other=0.0, eviction_policy="evict_first"),)
                padded, among = _next_row(padded, among, row_block, row_gap, stride)
            if METHOD > 1:
                m1s = m1s + (tl.load(moment_1 + raw, mask=there, other=0.0, eviction_policy="evict_first"),)
            if METHOD > 3:
                m2s = m2s + (tl.load(moment_2 + raw, mask=there, other=0.0, eviction_policy="evict_first"),)
            if MEAN:
                olds = olds + (tl.load(mean + raw, mask=there, other=0.0, eviction_policy="evict_first"),)
        if DROPS:
            byte = (group * C + c)[:, None] * UNIT + v
            dropping = (group * 8 < tl.where(threshold > 0, R, 0))[:, None]
            kept = tl.load(mask + byte, mask=dropping, other=255).to(tl.int32)
            # + 0, of what was loaded: so the words are drawn by the threads that use them, without an exchange
            column = (c[:, None] * UNIT + v + (kept >> 8)).to(tl.uint32)
            words = tl.philox(seed, column, column * 0 + group[:, None].to(tl.uint32), column * 0 + number, column * 0)
            fresh = tl.zeros((BLOCK // UNIT, UNIT), tl.int32)
        padded, among = padded_0, among_0
        for j in tl.static_range(8):
            writes = (group * 8 + j < written)[:, None]
            raw = (raw_0 + j * C)[:, None] * UNIT + v
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
                    m = beta_1 * m1s[j] + g
                    tl.store(moment_1 + raw, m, mask=writes, eviction_policy="evict_first")
                    g = m if METHOD == 2 else g + beta_1 * m
                if METHOD > 3:
                    m = m1s[j] + (1.0 - beta_1) * (g - m1s[j])
                    s = beta_2 * m2s[j] + (1.0 - beta_2) * g * g
                    tl.store(moment_1 + raw, m, mask=writes, eviction_policy="evict_first")
                    tl.store(moment_2 + raw, s, mask=writes, eviction_policy="evict_first")
                    p = p - step * m / (tl.sqrt(s) / root + eps)
                else:
                    p = p - lr * g
                tl.store(weight + raw, p, mask=writes, eviction_policy="evict_first")
            if MEAN:
                old = olds[j]
                moved = tl.where(newest < 0.5, old + newest * (p - old), p - (p - old) * (1.0 - newest))
                tl.store(mean + raw, moved, mask=writes, eviction_policy="evict_first")
            if WORKING:
                w = p
                if DROPS:
                    keep = ((words[j // 2] >> (16 * (j % 2))) & 0xFFFF).to(tl.int32) >= threshold
                    fresh = fresh | (keep.to(tl.int32) << j)
                    w = tl.where(keep, p * scale, 0.0)
                place = padded[:, None] * UNIT + v
                tl.store(working + place, w.to(working.dtype.element_ty), mask=writes)
                padded, among = _next_row(padded, among, row_block, row_gap, stride)
        if DROPS:
            dropping = (group * 8 < tl.where(threshold > 0, written, 0))[:, None]
            tl.store(mask + byte, fresh.to(tl.uint8), mask=dropping)


@triton.jit
def _keep_if_ok(olds, news, starts, sizes, status, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    old, new, size = _pick(olds, starts, program), _pick(news, starts, program), _pick(sizes, starts, program)
    at = (program - _pick(starts, starts, program)) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(new + at, mask=at < size)
    tl.store(old + at, value, mask=at < tl.where(tl.load(status) != 0.0, size, 0))


class Shape(NamedTuple):
    """A weight's matrix R x C, and its blocks raw and padded."""

    R: int
    C: int
    blocks: tuple[int, int, int, int, int, int]
    """Row blocks, rows of one, padded rows of one, column blocks, columns of one, padded columns of one."""

    def unit(self, most: int) -> int:
        """The neighbouring columns, 1, 2, 4 ... `most`, that lie together in every row, raw and padded."""
        return math.gcd(most, self.blocks[4], self.blocks[5])


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


class _Launch(NamedTuple):
    """Some of the weights, by their places in the list, that one launch serves."""

    which: list[int]
    programs: int
    geometry: tuple[tuple[int, ...], ...]
    """First program, rows, columns, rows of a block, rows between blocks, the same of columns, and padded columns."""
    drops: tuple[tuple[int, ...], tuple[float, ...]]
    """Of 65,536 how many are dropped; the scale of those that are kept."""
    options: tuple[bool | int, ...]


def _launches(weights: list[Weight], dtypes: Sequence[object], tiles: Tiles) -> Iterator[_Launch]:
    """The launches that serve all weights, each for those of one unit and one of `dtypes`."""
    kinds: dict[object, list[int]] = {}
    for n, (w, dtype) in enumerate(zip(weights, dtypes, strict=True)):
        kinds.setdefault((w.shape.unit(tiles.unit), dtype), []).append(n)
    for (unit, _), members in kinds.items():  # type: ignore[misc]
        for which in (members[n : n + MOST_WEIGHTS] for n in range(0, len(members), MOST_WEIGHTS)):
            lines, programs, wide = [], 0, False
            for w in (weights[n] for n in which):
                parts, row, row_padded, splits, column, column_padded = w.shape.blocks
                wide |= parts * row_padded * splits * column_padded >= 2**31 - 2**16 * column_padded * splits
                lines.append((
                    programs, w.shape.R, w.shape.C // unit, row, (row_padded - row) * (parts > 1),
                    column // unit, (column_padded - column) // unit * (splits > 1), splits * column_padded // unit,
                ))  # fmt: skip
                programs += triton.cdiv(triton.cdiv(w.shape.R, ROWS) * w.shape.C, tiles.block * tiles.loops)
            geometry = tuple(zip(*lines, strict=True))
            drops = tuple(weights[n].drop for n in which)
            yield _Launch(
                which, programs, geometry,
                (tuple(round(p * 65536) for p in drops), tuple(1 / (1 - p) for p in drops)),
                (wide, any(geometry[6]), any(drops), tiles.backwards, unit, tiles.block, tiles.loops),
            )  # fmt: skip


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
    launches = list(_launches(weights, [g.dtype for g in gradients], SQUARES))
    count, start = sum(launch.programs for launch in launches), 0
    partials = torch.empty(count, device=terms.device)
    for which, programs, geometry, drops, options in launches:
        grads = tuple(gradients[n] for n in which)
        _squares[(programs,)](
            grads, _bits(weights, which), partials[start:], *geometry, *drops, *options, num_warps=SQUARES.warps
        )
        start += programs
    _judge[(1,)](
        partials, count, terms, controls, status, ring, clip, terms.numel(), ring.shape[1], SLOT, 2048, num_warps=8
    )


def update(
    weights: list[Weight], gradients: list[Tensor], mean: list[Tensor], controls: Tensor, status: Tensor, rule: Rule
) -> None:
    """Moves weights, moments and (where there is one) the mean, and writes the working copies; nothing when not ok.

    With `rule.method` 'none' only the working copies are written, whatever the status.
    """
    method = METHODS[rule.method]
    if method == 0:
        weights = [w for w in weights if w.working is not None]
    dtypes = [(w.working.dtype if w.working is not None else None, method and gradients[n].dtype)
              for n, w in enumerate(weights)]  # fmt: skip
    for which, programs, geometry, drops, options in _launches(weights, dtypes, UPDATE):
        served = [weights[n] for n in which]
        raw = tuple(w.raw for w in served)  # also stands in for what the flags rule out, which is not read
        moments = [tuple(w.moments[k] for w in served) if method > after else raw for k, after in enumerate((1, 3))]
        working = tuple(w.working for w in served)
        _update[(programs,)](
            tuple(gradients[n] for n in which) if method else raw, raw, *moments,
            tuple(mean[n] for n in which) if mean and method else raw, raw if working[0] is None else working,
            _bits(weights, which), controls, status, *geometry, *drops, tuple(w.number for w in served),
            rule.decay, rule.beta_1, rule.beta_2, rule.eps,
            LR, NEWEST, CORRECTION_1, CORRECTION_2, NEXT_SEED,
            method, bool(mean) and method > 0, working[0] is not None, *options, num_warps=UPDATE.warps,
        )  # fmt: skip


def _bits(weights: list[Weight], which: list[int]) -> tuple[Tensor, ...]:
    """The masks; where a weight has none, another's, which is not read."""
    some = next((weights[n].bits for n in which if weights[n].drop), weights[which[0]].raw)
    return tuple(weights[n].bits if weights[n].drop else some for n in which)  # type: ignore[misc]


def keep_if_ok(old: Tensor | Sequence[Tensor], new: Tensor | Sequence[Tensor], status: Tensor) -> None:
    """Copies `new` over `old`, a tensor or as many as there are, unless a step failed."""
    olds, news = ([x] if isinstance(x, Tensor) else list(x) for x in (old, new))
    kinds: dict[object, list[tuple[Tensor, Tensor]]] = {}
    for a, b in zip(olds, news, strict=True):
        if a.numel():
            kinds.setdefault((a.dtype, b.dtype), []).append((a, b.contiguous()))
    for pairs in kinds.values():
        for some in (pairs[n : n + MOST_WEIGHTS] for n in range(0, len(pairs), MOST_WEIGHTS)):
            starts, programs = [], 0
            for a, _ in some:
                starts.append(programs)
                programs += triton.cdiv(a.numel(), 1024)
            some_olds, some_news = zip(*some, strict=True)
            sizes = tuple(a.numel() for a in some_olds)
            _keep_if_ok[(programs,)](some_olds, some_news, tuple(starts), sizes, status, 1024)
