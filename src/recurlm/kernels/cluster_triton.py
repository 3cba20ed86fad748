"""Cross-entropy on the GPU for rows whose target is in one of some clusters: others cost nothing, and the host need not know them.

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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurlm.kernels import reference
from recurlm.kernels.cross_entropy import refuse_second_derivative

LOG2E = tl.constexpr(1.4426950408889634)
LISTED = 4096  # positions that `_list` looks at together
COUNTS = tl.constexpr(4)  # places for each count, so that every count begins at a multiple of 16 bytes
SIDE_STREAMS = True  # whether clusters are computed side by side
ROWS = 16  # rows of a program of `_combine` and of `_add_up`
SHAPES = ((64, 128), (128, 64), (64, 64), (64, 32), (32, 32), (16, 16))  # rows that stay, rows that stream by
STAGES = 2
PER_SM = 2  # programs for each multiprocessor
MOST_HELD = 1 << 15  # fp32 sums of a program: half of a multiprocessor's registers


class Tiles(NamedTuple):
    """Rows that stay in a program and rows that stream past it, its warps, and programs that run at once."""

    stay: int
    stream: int
    warps: int
    slots: int


@triton.jit(do_not_specialize=["N", "stride"])
def _list(targets, rows, counts, N, stride, firsts, lasts, BLOCK: tl.constexpr):
    """The rows whose target is in the program's cluster, in order, and how many."""
    k = tl.program_id(0)
    first, last = firsts[0], lasts[0]
    for j in tl.static_range(1, len(firsts)):
        first, last = tl.where(k >= j, firsts[j], first), tl.where(k >= j, lasts[j], last)
    total = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        y = tl.load(targets + n, mask=n < N, other=-1)
        own = ((y >= first) & (y < last) & (n < N)).to(tl.int32)
        tl.store(rows + k * stride + total + tl.cumsum(own, 0) - own, n, mask=own > 0)
        total += tl.sum(own, 0)
    tl.store(counts + k * COUNTS, total)


@triton.jit
def _shares(count, programs, v_tiles, BN: tl.constexpr):
    """(tiles of rows that there are, parts of the vocabulary for each)."""
    active = tl.cdiv(tl.load(count), BN)
    return active, tl.minimum(tl.maximum(programs // tl.maximum(active, 1), 1), v_tiles)


@triton.jit
def _rows_of(x, at, keep, stride, F: tl.constexpr, DP: tl.constexpr):
    """x[at], rows `stride` apart, with zeros where not `keep` and to the right of the last feature."""
    d = tl.arange(0, DP)
    return tl.load(x + at.to(tl.int64)[:, None] * stride + d[None, :], mask=keep[:, None] & (d < F)[None, :], other=0.0)


@triton.jit
def _forward(
    h, w, bias, rows, count, tops, sums, H, V,
    F: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of rows' maxima and sums of exponentials over a part of the vocabulary."""
    v_tiles = tl.cdiv(V, BV)
    active, splits = _shares(count, tl.num_programs(0), v_tiles, BN)
    item = tl.program_id(0)
    if item < active * splits:
        i = tl.arange(0, BN)
        own = item % active * BN + i < tl.load(count)
        h_ND = _rows_of(h, tl.load(rows + item % active * BN + i, mask=own, other=0), own, H, F, DP)
        split = item // active
        top = tl.full((BN,), -1e30, tl.float32)
        total = tl.zeros((BN,), tl.float32)
        for tile in tl.range(split * v_tiles // splits, (split + 1) * v_tiles // splits, num_stages=STAGES):
            v = tile * BV + tl.arange(0, BV)
            acc = tl.dot(h_ND, _rows_of(w, v, v < V, F, F, DP).T, input_precision=PRECISION)
            acc += tl.load(bias + v, mask=v < V, other=float("-inf")).to(tl.float32)[None, :]
            above = tl.maximum(top, tl.max(acc, 1))
            total = total * tl.exp2((top - above) * LOG2E) + tl.sum(tl.exp2((acc - above[:, None]) * LOG2E), 1)
            top = above
        tl.store(tops + item * BN + i, top)
        tl.store(sums + item * BN + i, total)


@triton.jit(do_not_specialize=["programs", "first"])
def _combine(
    h, w, bias, rows, count, targets, tops, sums, nll, lse2, programs, first, H, V,
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
        y = tl.load(targets + r, mask=own, other=first) - first
        both = _rows_of(h, r, own, H, F, DP).to(tl.float32) * _rows_of(w, y, own, F, F, DP).to(tl.float32)
        logit = tl.sum(both, 1) + tl.load(bias + y, mask=own, other=0.0).to(tl.float32)
        loss = tl.log2(total) / LOG2E + (top - logit)
        tl.store(nll + r, tl.where(loss < 0, 0.0, loss), mask=own)  # below 0 only by rounding
        tl.store(lse2 + n, tl.log2(total) + top * LOG2E, mask=own)


@triton.jit(do_not_specialize=["first"])
def _for_hidden(
    h, w, bias, rows, count, targets, lse2, upstream, parts, first, H, V,
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
        h_ND = _rows_of(h, r, own, H, F, DP)
        y = (tl.load(targets + r, mask=own, other=-1) - first).to(tl.int32)
        z = tl.load(lse2 + n, mask=own, other=float("inf"))
        g = tl.load(upstream + r, mask=own, other=0.0)
        split = item // active
        out = tl.zeros((BN, DP), tl.float32)
        for tile in tl.range(split * v_tiles // splits, (split + 1) * v_tiles // splits, num_stages=STAGES):
            v = tile * BV + tl.arange(0, BV)
            w_VD = _rows_of(w, v, v < V, F, F, DP)
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


@triton.jit(do_not_specialize=["first"])
def _for_weight(
    h, w, bias, rows, count, targets, lse2, upstream, dw, db, first, H, V,
    F: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P' h and the column sums of P for a tile of the vocabulary, over all rows of the cluster."""
    d = tl.arange(0, DP)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    w_VD = _rows_of(w, v, v < V, F, F, DP)
    scaled = tl.load(bias + v, mask=v < V, other=float("-inf")).to(tl.float32) * LOG2E
    last = tl.load(count)
    out = tl.zeros((BV, DP), tl.float32)
    total = tl.zeros((BV,), tl.float32)
    for start in tl.range(0, last, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        own = n < last
        r = tl.load(rows + n, mask=own, other=0)
        h_ND = _rows_of(h, r, own, H, F, DP)
        y = (tl.load(targets + r, mask=own, other=-1) - first).to(tl.int32)
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


class _ClusterCrossEntropies(torch.autograd.Function):
    """Of several clusters; the tensors are features, weights and biases, those of the first cluster, the second, ..."""

    @staticmethod
    def forward(ctx, targets_N: Tensor, firsts: tuple[int, ...], its: list[Tiles], *tensors: Tensor):  # type: ignore[override]
        targets_N, clusters = targets_N.contiguous(), list(zip(*(tensors[k::3] for k in range(3)), strict=True))
        N, device, dtype = len(targets_N), targets_N.device, tensors[0].dtype
        clusters = [
            (h if h.stride(1) == 1 else h.contiguous(), w.to(dtype).contiguous(), b.contiguous())
            for h, w, b in clusters
        ]
        stride = N + -N % 16
        rows_KN = torch.empty(len(clusters), stride, dtype=torch.int32, device=device)
        counts = torch.empty(len(clusters), COUNTS.value, dtype=torch.int32, device=device)
        nll_N, lse2_KN = torch.zeros(N, device=device), torch.empty(len(clusters), stride, device=device)
        lasts = tuple(first + len(w) for first, (_, w, _) in zip(firsts, clusters, strict=True))
        with torch.cuda.device_of(nll_N):  # Triton launches on the current device
            _list[(len(clusters),)](targets_N, rows_KN, counts, N, stride, firsts, lasts, LISTED, num_warps=16)
            for k in _side_by_side(len(clusters), device):
                (h, w, bias), it = clusters[k], its[k]
                (F, V), programs = (h.shape[1], len(w)), _programs(N, it)
                shape = F, max(16, triton.next_power_of_2(F)), it.stay, it.stream
                tops, sums = torch.empty(2, programs, it.stay, device=device)
                _forward[(programs,)](
                    h, w, bias, rows_KN[k], counts[k], tops, sums, h.stride(0), V, *shape, _precision(h), STAGES,
                    num_warps=it.warps,
                )  # fmt: skip
                _combine[(triton.cdiv(N, ROWS),)](
                    h, w, bias, rows_KN[k], counts[k], targets_N, tops, sums, nll_N, lse2_KN[k], programs, firsts[k],
                    h.stride(0), V, *shape, ROWS,
                )  # fmt: skip
        ctx.save_for_backward(targets_N, rows_KN, counts, lse2_KN, *(x for cluster in clusters for x in cluster))
        ctx.how = firsts, its, [w.dtype for w in tensors[1::3]]
        return nll_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor):  # type: ignore[override]
        refuse_second_derivative()
        targets_N, rows_KN, counts, lse2_KN, *tensors = ctx.saved_tensors
        firsts, its, weight_dtypes = ctx.how
        N, device, upstream_N = len(targets_N), targets_N.device, upstream_N.contiguous()
        gradients: list[Tensor | None] = [None] * len(tensors)
        with torch.cuda.device_of(upstream_N):
            for k in _side_by_side(len(its), device):
                (h, w, bias), it = tensors[3 * k : 3 * k + 3], its[k]
                (F, V), programs, precision = (h.shape[1], len(w)), _programs(N, it), _precision(h)
                DP = max(16, triton.next_power_of_2(F))
                given = h, w, bias, rows_KN[k], counts[k], targets_N, lse2_KN[k], upstream_N
                for_hidden, *for_weight = ctx.needs_input_grad[3 + 3 * k : 6 + 3 * k]
                if for_hidden:
                    dh = gradients[3 * k] = torch.zeros(N, F, dtype=h.dtype, device=device)
                    parts = torch.empty(programs, it.stay, DP, device=device)
                    _for_hidden[(programs,)](
                        *given, parts, firsts[k], h.stride(0), V, F, DP, it.stay, it.stream, precision, STAGES,
                        num_warps=it.warps,
                    )  # fmt: skip
                    _add_up[(triton.cdiv(N, ROWS),)](
                        parts, rows_KN[k], counts[k], dh, programs, V, F, DP, it.stay, it.stream, ROWS
                    )
                if any(for_weight):
                    dw = gradients[3 * k + 1] = torch.empty_like(w, dtype=weight_dtypes[k])
                    db = gradients[3 * k + 2] = torch.empty_like(bias)
                    _for_weight[(triton.cdiv(V, it.stay),)](
                        *given, dw, db, firsts[k], h.stride(0), V, F, DP, it.stream, it.stay, precision, STAGES,
                        num_warps=it.warps,
                    )  # fmt: skip
        return None, None, None, *gradients


def _programs(rows: int, it: Tiles) -> int:
    return max(it.slots, triton.cdiv(rows, it.stay))


@functools.cache
def _sides(device: torch.device, number: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(number)]


def _side_by_side(number: int, device: torch.device) -> Iterator[int]:
    """0, 1, ..., `number` - 1; what is launched for each runs on a stream of its own, after all before and before all after."""
    if not SIDE_STREAMS or number < 2 or device.type != "cuda":
        yield from range(number)
        return
    main, sides = torch.cuda.current_stream(device), _sides(device, number)
    for k, side in enumerate(sides):
        side.wait_stream(main)
        with torch.cuda.stream(side):
            yield k
    for side in sides:
        main.wait_stream(side)


def cluster_cross_entropies(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets_N: Tensor,
    firsts: Sequence[int],
) -> Tensor:
    """nll_N as `reference.cluster_cross_entropies` has it, for GPU tensors; logits are fp32.

    With more features than a program can hold (some 2,000 in bf16 on an H200) it is the slow twin, over all rows.
    """
    if len(targets_N) == 0:
        return features[0].new_empty(0, dtype=torch.float32)
    facts = _device(targets_N.device.index) if targets_N.is_cuda else (1 << 17, 2)
    its = [tiles(h.shape[1], h.element_size(), *facts) for h in features]
    if any(it is None for it in its):
        return reference.cluster_cross_entropies(features, weights, biases, targets_N, firsts)
    tensors = (x for cluster in zip(features, weights, biases, strict=True) for x in cluster)
    return _ClusterCrossEntropies.apply(targets_N, tuple(firsts), its, *tensors)  # type: ignore[return-value]
