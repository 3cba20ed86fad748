"""Cross-entropy on the GPU for the rows whose target is in a cluster: the others cost nothing, and the host need not know them.

The rows of the cluster are listed on the device. Every kernel has a grid of a fixed size and reads how many rows there
are: programs beyond them end at once, and where they are few the vocabulary is split over more programs. Forward: tiles of
logits, reduced at once as in `cross_entropy_triton`. Backward: logits are computed again, once for the hidden rows'
gradients and once for the weight's, as in FlashAttention (Dao 2023), so nothing of the logits' size is ever in memory.
Sums are fp32 and in a fixed order throughout.
"""

# Triton's kernels are not Python to a type checker:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurlm.kernels import reference
from recurlm.kernels.cross_entropy import refuse_second_derivative

LOG2E = tl.constexpr(1.4426950408889634)
LISTED = 1024  # positions that `_list` looks at together
ROWS = 16  # rows of a program of `_combine` and of `_add_up`
SHAPES = ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (16, 16))  # rows that stay, rows that stream by
STAGES = 2
PER_SM = 1  # programs for each multiprocessor
MOST_HELD = 1 << 15  # fp32 sums of a program: half of a multiprocessor's registers


class Tiles(NamedTuple):
    """Rows that stay in a program and rows that stream past it, its warps, and programs that run at once."""

    stay: int
    stream: int
    warps: int
    slots: int


@triton.jit(do_not_specialize=["N"])
def _list(targets, rows, count, N, V, BLOCK: tl.constexpr):
    """The rows whose target is in the cluster, in order, and how many."""
    total = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        y = tl.load(targets + n, mask=n < N, other=-1)
        own = ((y >= 0) & (y < V)).to(tl.int32)
        tl.store(rows + total + tl.cumsum(own, 0) - own, n, mask=own > 0)
        total += tl.sum(own, 0)
    tl.store(count, total)


@triton.jit
def _shares(count, programs, v_tiles, BN: tl.constexpr):
    """(tiles of rows that there are, parts of the vocabulary for each)."""
    active = tl.cdiv(tl.load(count), BN)
    return active, tl.minimum(tl.maximum(programs // tl.maximum(active, 1), 1), v_tiles)


@triton.jit
def _rows_of(x, at, keep, F: tl.constexpr, DP: tl.constexpr):
    """x[at], with zeros where not `keep` and to the right of the last feature."""
    d = tl.arange(0, DP)
    return tl.load(x + at.to(tl.int64)[:, None] * F + d[None, :], mask=keep[:, None] & (d < F)[None, :], other=0.0)


@triton.jit
def _forward(
    h, w, bias, rows, count, tops, sums, V,
    F: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of rows' maxima and sums of exponentials over a part of the vocabulary."""
    v_tiles = tl.cdiv(V, BV)
    active, splits = _shares(count, tl.num_programs(0), v_tiles, BN)
    item = tl.program_id(0)
    if item < active * splits:
        i = tl.arange(0, BN)
        own = item % active * BN + i < tl.load(count)
        h_ND = _rows_of(h, tl.load(rows + item % active * BN + i, mask=own, other=0), own, F, DP)
        split = item // active
        top = tl.full((BN,), -1e30, tl.float32)
        total = tl.zeros((BN,), tl.float32)
        for tile in tl.range(split * v_tiles // splits, (split + 1) * v_tiles // splits, num_stages=STAGES):
            v = tile * BV + tl.arange(0, BV)
            acc = tl.dot(h_ND, _rows_of(w, v, v < V, F, DP).T, input_precision=PRECISION)
            acc += tl.load(bias + v, mask=v < V, other=float("-inf")).to(tl.float32)[None, :]
            above = tl.maximum(top, tl.max(acc, 1))
            total = total * tl.exp2((top - above) * LOG2E) + tl.sum(tl.exp2((acc - above[:, None]) * LOG2E), 1)
            top = above
        tl.store(tops + item * BN + i, top)
        tl.store(sums + item * BN + i, total)


@triton.jit(do_not_specialize=["programs"])
def _combine(
    h, w, bias, rows, count, targets, tops, sums, nll, lse2, programs, V,
    F: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """nll = log sum exp - logit of the target, in the row's own place; lse2, in powers of 2, in the list's."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = n < tl.load(count)
    if tl.program_id(0) * ROWS < tl.load(count):
        active, splits = _shares(count, programs, tl.cdiv(V, BV), BN)
        top = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for s in range(splits):
            at = (s * active + n // BN) * BN + n % BN
            one = tl.load(tops + at, mask=own, other=-1e30)
            above = tl.maximum(top, one)
            total = total * tl.exp2((top - above) * LOG2E)
            total += tl.load(sums + at, mask=own, other=1.0) * tl.exp2((one - above) * LOG2E)
            top = above
        r = tl.load(rows + n, mask=own, other=0)
        y = tl.load(targets + r, mask=own, other=0)
        both = _rows_of(h, r, own, F, DP).to(tl.float32) * _rows_of(w, y, own, F, DP).to(tl.float32)
        logit = tl.sum(both, 1) + tl.load(bias + y, mask=own, other=0.0).to(tl.float32)
        loss = tl.log2(total) / LOG2E + (top - logit)
        tl.store(nll + r, tl.where(loss < 0, 0.0, loss), mask=own)  # below 0 only by rounding
        tl.store(lse2 + n, tl.log2(total) + top * LOG2E, mask=own)


@triton.jit
def _for_hidden(
    h, w, bias, rows, count, targets, lse2, upstream, parts, V,
    F: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P W of a tile of rows and a part of the vocabulary, P = (softmax - one-hot) * upstream."""
    v_tiles = tl.cdiv(V, BV)
    active, splits = _shares(count, tl.num_programs(0), v_tiles, BN)
    item = tl.program_id(0)
    if item < active * splits:
        i, d = tl.arange(0, BN), tl.arange(0, DP)
        n = item % active * BN + i
        own = n < tl.load(count)
        r = tl.load(rows + n, mask=own, other=0)
        h_ND = _rows_of(h, r, own, F, DP)
        y = tl.load(targets + r, mask=own, other=-1).to(tl.int32)
        z = tl.load(lse2 + n, mask=own, other=float("inf"))
        g = tl.load(upstream + r, mask=own, other=0.0)
        split = item // active
        out = tl.zeros((BN, DP), tl.float32)
        for tile in tl.range(split * v_tiles // splits, (split + 1) * v_tiles // splits, num_stages=STAGES):
            v = tile * BV + tl.arange(0, BV)
            w_VD = _rows_of(w, v, v < V, F, DP)
            acc = tl.dot(h_ND, w_VD.T, input_precision=PRECISION)
            scaled = tl.load(bias + v, mask=v < V, other=float("-inf")).to(tl.float32) * LOG2E
            acc = tl.exp2(acc * LOG2E + scaled[None, :] - z[:, None])
            acc = tl.where(v[None, :] == y[:, None], acc - 1, acc) * g[:, None]
            out = tl.dot(acc.to(w_VD.dtype), w_VD, out, input_precision=PRECISION)
        tl.store(parts + (item.to(tl.int64) * BN + i[:, None]) * DP + d[None, :], out)


@triton.jit(do_not_specialize=["programs"])
def _add_up(
    parts, rows, count, dh, programs, V, F: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The sum of a row's parts, in the row's own place."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = n < tl.load(count)
    if tl.program_id(0) * ROWS < tl.load(count):
        active, splits = _shares(count, programs, tl.cdiv(V, BV), BN)
        d = tl.arange(0, DP)
        total = tl.zeros((ROWS, DP), tl.float32)
        for s in range(splits):
            at = ((s * active + n // BN) * BN + n % BN).to(tl.int64)
            total += tl.load(parts + at[:, None] * DP + d[None, :], mask=own[:, None], other=0.0)
        r = tl.load(rows + n, mask=own, other=0).to(tl.int64)
        tl.store(dh + r[:, None] * F + d[None, :], total.to(dh.dtype.element_ty), mask=own[:, None] & (d < F)[None, :])


@triton.jit
def _for_weight(
    h, w, bias, rows, count, targets, lse2, upstream, dw, db, V,
    F: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P' h and the column sums of P for a tile of the vocabulary, over all rows of the cluster."""
    d = tl.arange(0, DP)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    w_VD = _rows_of(w, v, v < V, F, DP)
    scaled = tl.load(bias + v, mask=v < V, other=float("-inf")).to(tl.float32) * LOG2E
    last = tl.load(count)
    out = tl.zeros((BV, DP), tl.float32)
    total = tl.zeros((BV,), tl.float32)
    for start in tl.range(0, last, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        own = n < last
        r = tl.load(rows + n, mask=own, other=0)
        h_ND = _rows_of(h, r, own, F, DP)
        y = tl.load(targets + r, mask=own, other=-1).to(tl.int32)
        z = tl.load(lse2 + n, mask=own, other=float("inf"))
        g = tl.load(upstream + r, mask=own, other=0.0)
        acc = tl.dot(w_VD, h_ND.T, input_precision=PRECISION)
        acc = tl.exp2(acc * LOG2E + scaled[:, None] - z[None, :])
        acc = tl.where(v[:, None] == y[None, :], acc - 1, acc) * g[None, :]
        total += tl.sum(acc, 1)
        out = tl.dot(acc.to(h_ND.dtype), h_ND, out, input_precision=PRECISION)
    keep = (v < V)[:, None] & (d < F)[None, :]
    tl.store(dw + v.to(tl.int64)[:, None] * F + d[None, :], out.to(dw.dtype.element_ty), mask=keep)
    tl.store(db + v, total.to(db.dtype.element_ty), mask=v < V)


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """(bytes of shared memory that a program may have, multiprocessors)."""
    facts = triton.runtime.driver.active.utils.get_device_properties(index)
    return facts["max_shared_mem"], facts["multiprocessor_count"]


def tiles(features: int, itemsize: int, shared: int, multiprocessors: int) -> Tiles | None:
    """The largest tiles of SHAPES that fit; None when there are too many features for any."""
    width = max(16, triton.next_power_of_2(features))
    for stay, stream in SHAPES:
        needed = (stay + STAGES * stream) * width * itemsize + 4 * stay * stream
        if needed <= shared and stay * width <= MOST_HELD:
            warps = 8 if stay * max(width, stream) >= 1 << 14 else 4
            return Tiles(stay, stream, warps, PER_SM * multiprocessors)
    return None


def _precision(x: Tensor) -> str:
    """How fp32 is multiplied: as torch does at the time of the call. Other types know no difference."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class _ClusterCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NF: Tensor, weight_VF: Tensor, bias_V: Tensor, targets_N: Tensor, it: Tiles):  # type: ignore[override]
        h_NF, w_VF = hidden_NF.contiguous(), weight_VF.to(hidden_NF.dtype).contiguous()
        bias_V, targets_N = bias_V.contiguous(), targets_N.contiguous()
        (N, F), V = h_NF.shape, len(w_VF)
        shape = F, max(16, triton.next_power_of_2(F)), it.stay, it.stream
        programs = max(it.slots, triton.cdiv(N, it.stay))
        rows_N, count = (torch.empty(n, dtype=torch.int32, device=h_NF.device) for n in (N, 1))
        tops, sums = torch.empty(2, programs, it.stay, device=h_NF.device)
        nll_N, lse2_N = torch.zeros(N, device=h_NF.device), torch.empty(N, device=h_NF.device)
        with torch.cuda.device_of(h_NF):  # Triton launches on the current device
            _list[(1,)](targets_N, rows_N, count, N, V, LISTED, num_warps=8)
            _forward[(programs,)](
                h_NF, w_VF, bias_V, rows_N, count, tops, sums, V, *shape, _precision(h_NF), STAGES, num_warps=it.warps
            )
            _combine[(triton.cdiv(N, ROWS),)](
                h_NF, w_VF, bias_V, rows_N, count, targets_N, tops, sums, nll_N, lse2_N, programs, V, *shape, ROWS
            )
        ctx.save_for_backward(h_NF, w_VF, bias_V, targets_N, rows_N, count, lse2_N)
        ctx.how = shape, programs, it, weight_VF.dtype
        return nll_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor):  # type: ignore[override]
        refuse_second_derivative()
        h_NF, w_VF, bias_V, targets_N, rows_N, count, lse2_N = ctx.saved_tensors
        (F, DP, stay, stream), programs, it, weight_dtype = ctx.how
        given = h_NF, w_VF, bias_V, rows_N, count, targets_N, lse2_N, upstream_N.contiguous()
        (N, V), precision = (len(h_NF), len(w_VF)), _precision(h_NF)
        dh_NF = dw_VF = db_V = None
        with torch.cuda.device_of(h_NF):
            if ctx.needs_input_grad[0]:
                dh_NF = torch.zeros_like(h_NF)
                parts = torch.empty(programs, stay, DP, device=h_NF.device)
                _for_hidden[(programs,)](*given, parts, V, F, DP, stay, stream, precision, STAGES, num_warps=it.warps)
                _add_up[(triton.cdiv(N, ROWS),)](parts, rows_N, count, dh_NF, programs, V, F, DP, stay, stream, ROWS)
            if any(ctx.needs_input_grad[1:3]):
                dw_VF, db_V = torch.empty_like(w_VF, dtype=weight_dtype), torch.empty_like(bias_V)
                _for_weight[(triton.cdiv(V, stay),)](
                    *given, dw_VF, db_V, V, F, DP, stream, stay, precision, STAGES, num_warps=it.warps
                )
        return dh_NF, dw_VF, db_V, None, None


def cluster_cross_entropy(hidden_NF: Tensor, weight_VF: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """nll_N as `reference.cluster_cross_entropy` has it, for GPU tensors; logits are fp32.

    With more features than a program can hold (some 2,000 in bf16 on an H200) it is the slow twin, over all rows.
    """
    if len(targets_N) == 0:
        return hidden_NF.new_empty(0, dtype=torch.float32)
    facts = _device(hidden_NF.device.index) if hidden_NF.is_cuda else (1 << 17, 2)
    it = tiles(hidden_NF.shape[1], hidden_NF.element_size(), *facts)
    if it is None:
        return reference.cluster_cross_entropy(hidden_NF, weight_VF, bias_V, targets_N)
    return _ClusterCrossEntropy.apply(hidden_NF, weight_VF, bias_V, targets_N, it)  # type: ignore[return-value]
