"""Linear layer, softmax and cross-entropy in one on the GPU, in bfloat16: the logits never reach memory.

Forward: tiles of logits on tensor cores, each reduced at once to a maximum and a sum of exponentials per row; the
vocabulary is split over programs, whose partial results a second kernel combines in a fixed order (online softmax,
Milakov & Gimelshein 2018). Backward: for a chunk of the vocabulary after the other the logits are computed again and
P = (softmax - one-hot) * upstream gradient is written in bfloat16; then dW = P' h and dh += P W are library products, side by
side on two streams, for neither fills the GPU alone.
Where all of P is small enough for the L2 cache, the forward pass keeps the exponentials in bfloat16, and the backward
pass scales them instead of computing the logits again. Sums are fp32 and in a fixed order throughout.
"""

# Triton's kernels are not Python to a type checker:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from recurlm.kernels.cross_entropy import refuse_second_derivative

LOG2E = tl.constexpr(1.4426950408889634)
ROWS = 8  # rows of a program of `_combine`


class Tiles(NamedTuple):
    """One kernel's shape: rows (tokens), vocabulary and depth of a tile, and how it is scheduled."""

    n: int
    v: int
    k: int
    warps: int
    stages: int
    per_sm: int  # programs that share a multiprocessor
    flatten: bool  # whether loads run ahead across tiles


FORWARD = Tiles(128, 128, 64, 4, 3, 2, True)
FORWARD_LARGE = Tiles(128, 256, 64, 8, 3, 1, True)  # for LARGE logits or more
FORWARD_KEPT = Tiles(128, 128, 64, 8, 4, 1, True)  # where the exponentials are kept
BACKWARD = Tiles(256, 128, 64, 8, 3, 1, True)
OLDER = Tiles(64, 128, 32, 4, 3, 2, False)  # less shared memory than Hopper's
HOPPER_SHARED = 227 << 10  # bytes for one program
LARGE = 1 << 26
KEPT_BYTES = 32 << 20  # of exponentials, at most
KEPT_ROWS = 128  # of a program of `_rescale`
KEPT_MULTIPLE = 16  # of columns that are kept: cuBLAS is six times slower where rows are not aligned
CHUNK_BYTES = 72 << 20  # of P at once, and more for large vocabularies: CHUNK_SHARE of the weight
CHUNK_SHARE = 1.75
TWO_STREAMS = True  # for the products of the backward pass
SUMMED, COLUMNS = 16, 64  # rows at a time and columns of a program of `_sum_rows`


@triton.jit(do_not_specialize=["N", "splits"])
def _forward(
    h, w, bias, tops, sums, kept, marks, N, V, splits,
    D: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Row n's maximum and sum of exponentials over one of `splits` near-equal parts of the vocabulary's tiles.

    Unless `kept` is None, it gets exp(logit - mark), where a row's mark of a tile is the maximum up to there.
    """
    row_tiles, v_tiles = tl.cdiv(N, BN), tl.cdiv(V, BV)
    split, n0 = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles * BN
    n = n0 + tl.arange(0, BN)
    top = tl.full((BN,), -1e30, tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for tile in tl.range(split * v_tiles // splits, (split + 1) * v_tiles // splits, flatten=FLATTEN):
        acc = tl.zeros((BN, BV), tl.float32)
        for k in tl.range(0, D, BK):
            acc = tl.dot(h.load([n0, k]), w.load([tile * BV, k]).T, acc)
        v = tile * BV + tl.arange(0, BV)
        acc += tl.load(bias + v, mask=v < V, other=float("-inf")).to(tl.float32)[None, :]
        above = tl.maximum(top, tl.max(acc, 1))
        acc = tl.exp2(acc * LOG2E - (above * LOG2E)[:, None])
        total = total * tl.exp2((top - above) * LOG2E) + tl.sum(acc, 1)
        top = above
        if kept is not None:
            tl.store(marks + tile * N + n, above, mask=n < N)
            kept.store([n0, tile * BV], acc.to(kept.dtype))
    tl.store(tops + split * N + n, top, mask=n < N)
    tl.store(sums + split * N + n, total, mask=n < N)


@triton.jit(do_not_specialize=["N", "splits"])
def _combine(
    h, w, bias, targets, tops, sums, nll, lse2, N, V, D, splits,
    SPLITS: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """nll = log sum exp - logit of the target; NaN for a target outside of the vocabulary. lse2 is in powers of 2."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.arange(0, SPLITS)
    at = s[:, None] * N + n[None, :]
    keep = (s < splits)[:, None] & (n < N)[None, :]
    top = tl.load(tops + at, mask=keep, other=-1e30)
    above = tl.max(top, 0)
    total = tl.sum(tl.load(sums + at, mask=keep, other=0.0) * tl.exp2((top - above[None, :]) * LOG2E), 0)
    y = tl.load(targets + n, mask=n < N, other=-1)
    known = (y >= 0) & (y < V)
    d = tl.arange(0, BD)
    inside = (d < D)[None, :] & known[:, None]
    h_ND = tl.load(h + n.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    w_ND = tl.load(w + y[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(h_ND * w_ND, 1) + tl.load(bias + y, mask=known, other=float("nan")).to(tl.float32)
    loss = tl.log2(total) / LOG2E + (above - logit)
    tl.store(nll + n, tl.where(loss < 0, 0.0, loss), mask=n < N)  # below 0 only by rounding
    tl.store(lse2 + n, tl.log2(total) + above * LOG2E, mask=n < N)


@triton.jit(do_not_specialize=["N", "v_first", "v_last"])
def _backward(
    h, w, bias, targets, lse2, upstream, p, dbias, N, V, v_first, v_last,
    D: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """P' (vocabulary x rows, so that sums over rows stay within threads) and its sums over each tile's rows."""
    v_tiles = tl.cdiv(v_last - v_first, BV)
    for tile in tl.range(tl.program_id(0), v_tiles * tl.cdiv(N, BN), tl.num_programs(0), flatten=FLATTEN):
        v0, n0 = tile % v_tiles * BV, tile // v_tiles * BN
        acc = tl.zeros((BV, BN), tl.float32)
        for k in tl.range(0, D, BK):
            acc = tl.dot(w.load([v_first + v0, k]), h.load([n0, k]).T, acc)
        v, n = v_first + v0 + tl.arange(0, BV), n0 + tl.arange(0, BN)
        scaled = tl.load(bias + v, mask=v < v_last, other=float("-inf")).to(tl.float32) * LOG2E
        y = tl.load(targets + n, mask=n < N, other=-1).to(tl.int32)
        z = tl.load(lse2 + n, mask=n < N, other=float("inf"))  # rows beyond the last have P = 0, whatever the bias
        g = tl.load(upstream + n, mask=n < N, other=0.0)
        acc = tl.exp2(acc * LOG2E + scaled[:, None] - z[None, :])
        acc = tl.where(v[:, None] == y[None, :], acc - 1, acc) * g[None, :]
        tl.store(dbias + tile // v_tiles * V + v, tl.sum(acc, 1), mask=v < v_last)
        p.store([v0, n0], acc.to(p.dtype))


@triton.jit(do_not_specialize=["N"])
def _rescale(
    p, marks, targets, nll, lse2, upstream, dbias, N, V, BN: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr
):
    """P (rows x V) in the place of the exponentials of a tile of `_forward`, and its sums over BN rows."""
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    total = tl.zeros((ROWS, BV), tl.float32)
    for start in range(0, BN, ROWS):
        n = tl.program_id(1) * BN + start + tl.arange(0, ROWS)
        g = tl.load(upstream + n, mask=n < N, other=0.0)
        mark = tl.load(marks + tl.program_id(0) * N + n, mask=n < N, other=0.0)
        factor = g * tl.exp2(mark * LOG2E - tl.load(lse2 + n, mask=n < N, other=float("inf")))
        at_target = g * (tl.exp2(tl.load(nll + n, mask=n < N, other=0.0) * -LOG2E) - 1)
        y = tl.load(targets + n, mask=n < N, other=-1).to(tl.int32)
        at, keep = p + n.to(tl.int64)[:, None] * V + v[None, :], (n < N)[:, None] & (v < V)[None, :]
        x = tl.load(at, mask=keep, other=0.0).to(tl.float32) * factor[:, None]
        x = tl.where(v[None, :] == y[:, None], at_target[:, None], x)
        tl.store(at, x.to(p.dtype.element_ty), mask=keep)
        total += x
    tl.store(dbias + tl.program_id(1) * V + v, tl.sum(total, 0), mask=v < V)


@triton.jit(do_not_specialize=["R"])
def _sum_rows(parts, out, R, V, SUMMED: tl.constexpr, COLUMNS: tl.constexpr):
    """out_V: the sum of parts_RV, SUMMED rows at a time."""
    v = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((SUMMED, COLUMNS), tl.float32)
    for start in range(0, R, SUMMED):
        r = start + tl.arange(0, SUMMED)
        keep = (r < R)[:, None] & (v < V)[None, :]
        total += tl.load(parts + r.to(tl.int64)[:, None] * V + v[None, :], mask=keep, other=0.0)
    tl.store(out + v, tl.sum(total, 0).to(out.dtype.element_ty), mask=v < V)


def matrix(x: Tensor, rows: int = 1) -> Tensor:
    """`x` as kernels and products read matrices: whole rows that begin at multiples of 16 bytes, filled up with zeros.

    So many rows that their number is a multiple of `rows`.
    """
    missing, more = -x.shape[1] % (16 // x.element_size()), -x.shape[0] % rows
    if missing or more:
        return pad(x, (0, missing, 0, more))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def described(x: Tensor, *tile: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(tile))


def slots_of(x: Tensor, tiles: Tiles) -> int:
    """Programs that run at once on the device of `x`."""
    return tiles.per_sm * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2)


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes that one program may have."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def _tiles(x: Tensor, vocab: int, keep: bool) -> tuple[Tiles, Tiles]:
    """The shapes of the forward and of the backward kernel."""
    if not x.is_cuda or shared_memory(x.device.index) < HOPPER_SHARED:
        return OLDER, OLDER
    return FORWARD_KEPT if keep else FORWARD if len(x) * vocab < LARGE else FORWARD_LARGE, BACKWARD


def even_splits(row_tiles: int, v_tiles: int, slots: int) -> int:
    """Into how many parts the vocabulary is split, so that the slots are evenly busy."""
    return min(range(1, min(v_tiles, 64) + 1), key=lambda s: triton.cdiv(row_tiles * s, slots) * v_tiles / s)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, summed in fp32 and rounded once, to out's type."""
    if not add and out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif not a.is_cuda:  # the interpreter's
        out.copy_(a.float() @ b.float() + (out if add else 0))
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def chunk_size(rows: int, vocab: int, depth: int, itemsize: int) -> int:
    """Columns of P at once: near-equal chunks, multiples of 128, within the allowed bytes unless 128 are more."""
    most = max(CHUNK_BYTES, int(CHUNK_SHARE * vocab * depth * itemsize))
    most = max(1, most // (itemsize * rows) // 128) * 128
    return triton.cdiv(triton.cdiv(vocab, triton.cdiv(vocab, most)), 128) * 128


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor, keep: bool):  # type: ignore[override]
        h_NH, w_VH = hidden_NH.contiguous(), weight_VH.to(hidden_NH.dtype).contiguous()
        bias_V, targets_N = bias_V.contiguous(), targets_N.contiguous()
        (N, H), V = h_NH.shape, w_VH.shape[0]
        tiles = _tiles(h_NH, V, keep)[0]
        row_tiles, v_tiles = triton.cdiv(N, tiles.n), triton.cdiv(V, tiles.v)
        splits = even_splits(row_tiles, v_tiles, slots_of(h_NH, tiles))
        kept_NV = h_NH.new_empty(N, V + -V % KEPT_MULTIPLE) if keep else None  # exponentials of nothing: zeros
        marks_TN = torch.empty(v_tiles, N, device=h_NH.device) if keep else None
        partial_2SN = torch.empty(2, splits, N, device=h_NH.device)
        nll_N, lse2_N = torch.empty(N, device=h_NH.device), torch.empty(N, device=h_NH.device)
        h, w = matrix(h_NH), matrix(w_VH)
        with torch.cuda.device_of(h_NH):  # Triton launches on the current device
            _forward[(row_tiles * splits,)](
                described(h, tiles.n, tiles.k), described(w, tiles.v, tiles.k), bias_V, *partial_2SN,
                None if kept_NV is None else described(kept_NV, tiles.n, tiles.v), marks_TN, N, V, splits,
                h.shape[1], tiles.n, tiles.v, tiles.k, tiles.flatten, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            _combine[(triton.cdiv(N, ROWS),)](
                h_NH, w_VH, bias_V, targets_N, *partial_2SN, nll_N, lse2_N, N, V, H, splits,
                triton.next_power_of_2(splits), triton.next_power_of_2(H), ROWS,
            )  # fmt: skip
        ctx.save_for_backward(h_NH, w_VH, bias_V, targets_N, lse2_N)
        ctx.kept = (kept_NV, marks_TN, nll_N.detach(), tiles.v) if keep else None
        ctx.weight_dtype = weight_VH.dtype
        return nll_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor):  # type: ignore[override]
        refuse_second_derivative()
        h_NH, w_VH, bias_V, targets_N, lse2_N = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # they are overwritten: a second backward pass computes the logits again
        if kept is not None:
            return _from_kept(ctx, *kept, upstream_N.contiguous())
        given = h_NH, w_VH, bias_V, targets_N, lse2_N, upstream_N
        return *by_columns(*given, ctx.weight_dtype, ctx.needs_input_grad), None, None


def by_columns(
    h_NH: Tensor, w_VH: Tensor, bias_V: Tensor, targets_N: Tensor, lse2_N: Tensor, upstream_N: Tensor,
    weight_dtype: torch.dtype, needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """(dh, dW, db), the logits computed again for a chunk of the vocabulary after the other."""
    (N, H), V = h_NH.shape, w_VH.shape[0]
    tiles, chunk = _tiles(h_NH, V, False)[1], chunk_size(N, V, H, h_NH.element_size())
    for_hidden, for_weight, *_ = needed
    row_tiles, slots = triton.cdiv(N, tiles.n), slots_of(h_NH, tiles)
    # Both products read them too, and are several times slower with rows whose number is no multiple of 8.
    h, w, upstream_N = matrix(h_NH, 8), matrix(w_VH), upstream_N.contiguous()
    p_CN = h.new_empty(min(chunk, V), len(h))
    dbias_RV = torch.empty(row_tiles, V, device=h.device)
    dh = torch.empty_like(h, dtype=h.dtype if chunk >= V else torch.float32) if for_hidden else None
    dw = torch.empty_like(w, dtype=weight_dtype) if for_weight else None
    side = side_stream(h.device) if TWO_STREAMS and h.is_cuda and dh is not None and dw is not None else None
    for first in range(0, V, chunk):
        last = min(first + chunk, V)
        p = p_CN[: last - first]
        grid = (min(slots, row_tiles * triton.cdiv(last - first, tiles.v)),)
        with torch.cuda.device_of(h_NH):
            _backward[grid](
                described(h, tiles.n, tiles.k), described(w, tiles.v, tiles.k), bias_V, targets_N, lse2_N,
                upstream_N, described(p, tiles.v, tiles.n), dbias_RV, N, V, first, last,
                h.shape[1], tiles.n, tiles.v, tiles.k, tiles.flatten, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        if dw is not None:
            with beside(side):
                product(p, h, dw[first:last])
        if dh is not None:
            product(p.t(), w[first:last], dh, add=first > 0)
        if side is not None:
            torch.cuda.current_stream(h.device).wait_stream(side)
    dh_NH = None if dh is None else dh[:N, :H].to(h_NH.dtype)
    return dh_NH, None if dw is None else dw[:, :H], _summed(dbias_RV, bias_V)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(side: torch.cuda.Stream | None) -> Iterator[None]:
    """What is launched inside runs on `side` after all that was launched before; the caller waits for it."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield


def _summed(dbias_RV: Tensor, bias_V: Tensor) -> Tensor:
    """The sum of the rows, in the type of the bias, as long as it is."""
    (R, V), db_V = dbias_RV.shape, bias_V.new_empty(dbias_RV.shape[1])
    with torch.cuda.device_of(bias_V):
        _sum_rows[(triton.cdiv(V, COLUMNS),)](dbias_RV, db_V, R, V, SUMMED, COLUMNS, num_warps=4)
    return db_V[: len(bias_V)]


def _from_kept(ctx, p_NV: Tensor, marks_TN: Tensor, nll_N: Tensor, tile: int, upstream_N: Tensor) -> tuple:
    """The gradients from the exponentials that the forward pass kept."""
    h_NH, w_VH, bias_V, targets_N, lse2_N = ctx.saved_tensors
    (N, V), parts = p_NV.shape, triton.cdiv(len(p_NV), KEPT_ROWS)
    dbias_RV = torch.empty(parts, V, device=p_NV.device)
    with torch.cuda.device_of(p_NV):
        _rescale[(triton.cdiv(V, tile), parts)](
            p_NV, marks_TN, targets_N, nll_N, lse2_N, upstream_N, dbias_RV, N, V, KEPT_ROWS, tile, 16
        )
    for_hidden, for_weight, *_ = ctx.needs_input_grad
    h, w, H = matrix(h_NH), matrix(w_VH, KEPT_MULTIPLE), h_NH.shape[1]
    dh = torch.empty_like(h) if for_hidden else None
    dw = torch.empty_like(w, dtype=ctx.weight_dtype) if for_weight else None
    side = side_stream(h.device) if TWO_STREAMS and h.is_cuda and dh is not None and dw is not None else None
    if dw is not None:
        with beside(side):
            product(p_NV.t(), h, dw)
    if dh is not None:
        product(p_NV, w, dh)
    db_V = _summed(dbias_RV, bias_V)
    if side is not None:
        torch.cuda.current_stream(h.device).wait_stream(side)
    dw_VH = None if dw is None else dw[: len(w_VH), :H]
    return None if dh is None else dh[:, :H], dw_VH, db_V, None, None


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """nll_N as `reference.linear_cross_entropy` has it, for GPU tensors with bfloat16 `hidden_NH`; logits are fp32.

    The weight's gradient is rounded once, to the weight's type. A target outside of the vocabulary gives NaN.
    """
    if targets_N.shape[0] == 0:
        return hidden_NH.new_empty(0, dtype=torch.float32)
    size = hidden_NH.element_size() * len(targets_N) * len(weight_VH)
    keep = torch.is_grad_enabled() and size <= KEPT_BYTES
    return _LinearCrossEntropy.apply(hidden_NH, weight_VH, bias_V, targets_N, keep)  # type: ignore[return-value]
