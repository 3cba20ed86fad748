"""The loss of a mixture of softmaxes on the GPU, in bfloat16, with every logit computed once: the forward pass makes the gradients.

For a chunk of whole tokens after the other: E = exp(logit - logit of the target) of all experts' rows is kept in bfloat16, and
reduced to each row's loss; the tokens' losses and the experts' shares follow. With E put right at the targets, P = s E for a
number s of each row, so dh = s (E W) and (dW, db) = E' (s [h, 1]) are library products; nothing else reads E.
That needs the gradient of the tokens' losses to be the same number for all of them, as under a mean: the backward pass
multiplies by it. Where it is not, the logits are computed again (`cross_entropy_triton.by_columns`). Sums are fp32 and in a
fixed order throughout.
"""

# Triton's kernels are not Python to a type checker:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recurlm.kernels import cross_entropy
from recurlm.kernels import cross_entropy_triton as whole
from recurlm.kernels.cross_entropy_triton import OLDER, Tiles, described, matrix, product

LOG2E = tl.constexpr(1.4426950408889634)
ONCE = True  # False: logits are computed twice, to compare
EXPONENTIALS = Tiles(256, 128, 64, 8, 3, 1, True)
CHUNK_BYTES = 64 << 20  # of E at once
COLUMNS = 8  # added to the experts' vectors, two of them for the bias: 16 bytes in bf16
MULTIPLE = 16  # of columns of E: cuBLAS is six times slower where rows are not aligned
TILES = 64  # of the vocabulary, that `_finish` looks at together
ROWS = 8  # rows of a program of `_target_logits`, `_scaled` and `_unpack`
PARTS = ["h", "targets", "logits", "log_prior", "sums", "nll", "lse2", "share", "factor"]  # begin anywhere
FAR = {torch.bfloat16: 60.0, torch.float32: 60.0, torch.float16: 10.0}  # nats beyond the target that E can hold


@triton.jit(do_not_specialize=["N"])
def _target_logits(h, w, bias, targets, out, N, K, V, D, BD: tl.constexpr, ROWS: tl.constexpr):
    """The logit of each row's target; NaN for a target outside of the vocabulary."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = tl.load(targets + n // K, mask=n < N, other=-1)
    known = (y >= 0) & (y < V)
    d = tl.arange(0, BD)
    inside = (d < D)[None, :] & known[:, None]
    h_ND = tl.load(h + n.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    w_ND = tl.load(w + y[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(h_ND * w_ND, 1) + tl.load(bias + y, mask=known, other=float("nan")).to(tl.float32)
    tl.store(out + n, logit, mask=n < N)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["logits"])
def _exponentials(
    h, w, bias, logits, marks, sums, kept, N, V, FAR: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """exp(logit - mark) and, of each tile of the vocabulary, their sums.

    A row's mark is its target's logit; only a tile that goes beyond it by more than FAR has its maximum as one of its own.
    """
    v_tiles = tl.cdiv(V, BV)
    for tile in tl.range(tl.program_id(0), v_tiles * tl.cdiv(N, BN), tl.num_programs(0), flatten=FLATTEN):
        v0, n0 = tile % v_tiles * BV, tile // v_tiles * BN
        acc = tl.zeros((BN, BV), tl.float32)
        for k in tl.range(0, D, BK):
            acc = tl.dot(h.load([n0, k]), w.load([v0, k]).T, acc)
        n, v = n0 + tl.arange(0, BN), v0 + tl.arange(0, BV)
        acc += tl.load(bias + v, mask=v < V, other=float("-inf")).to(tl.float32)[None, :]
        mark, most = tl.load(logits + n, mask=n < N, other=0.0), tl.max(acc, 1)
        mark = tl.where(most > mark + FAR, most, mark)
        acc = tl.exp2(acc * LOG2E - (mark * LOG2E)[:, None])
        at = tile % v_tiles * N + n
        tl.store(marks + at, mark, mask=n < N)
        tl.store(sums + at, tl.sum(acc, 1), mask=n < N)
        kept.store([n0, v0], acc.to(kept.dtype))


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=PARTS)
def _finish(
    h, targets, logits, log_prior, marks, sums, kept, nll, lse2, share, factor, weighted, N, K, V, VP, D,
    FAR: tl.constexpr, TILES: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A token: its loss and its experts' shares; its K rows of E at the target, and all of those whose target is far.

    nll = -log sum_k pi_k p_k(y). `factor` is s, by which E has to be multiplied; `weighted` is s h and two columns whose sum is s.
    """
    t, k, tiles = tl.program_id(0), tl.arange(0, KP), tl.cdiv(V, BV)
    n, own = t * K + k, k < K
    logit = tl.load(logits + n, mask=own, other=0.0)
    top, total = logit, tl.zeros((KP,), tl.float32)
    for start in range(0, tiles, TILES):
        one = start + tl.arange(0, TILES)
        at, keep = one[:, None] * N + n[None, :], (one < tiles)[:, None] & own[None, :]
        mark = tl.load(marks + at, mask=keep, other=-1e30)
        above = tl.maximum(top, tl.max(mark, 0))
        total = total * tl.exp2((top - above) * LOG2E)
        total += tl.sum(tl.load(sums + at, mask=keep, other=1.0) * tl.exp2((mark - above[None, :]) * LOG2E), 0)
        top = above
    total = tl.where(own, total, 1.0)
    loss = tl.log2(total) / LOG2E + (top - logit)
    loss = tl.where(loss < 0, 0.0, loss)  # below 0 only by rounding
    scaled = tl.log2(total) + top * LOG2E
    tl.store(lse2 + n, scaled, mask=own)

    x = tl.where(own, tl.load(log_prior + n, mask=own, other=0.0) - loss, float("-inf"))
    most = tl.max(x, 0)
    mixed = most + tl.log2(tl.sum(tl.exp2((x - most) * LOG2E), 0)) / LOG2E
    part = tl.exp2((x - mixed) * LOG2E)
    tl.store(nll + t, -mixed)
    tl.store(share + n, part, mask=own)
    # A tile's mark is raised beyond FAR; less is far already, whatever the rounding. NaN, as of a target outside of the
    # vocabulary, is neither near nor far.
    far, near, p = own & (loss > FAR - 1), own & (loss <= FAR - 1), tl.exp2(-loss * LOG2E)
    times = part * tl.where(far, 1.0, p)
    tl.store(factor + n, times, mask=own)

    y = tl.load(targets + t)
    row = kept + n.to(tl.int64) * VP
    at_target = tl.where(far, p - 1, 1 - tl.exp2(loss * LOG2E))
    tl.store(row + tl.where(near, y, 0), at_target.to(kept.dtype.element_ty), mask=near)
    d = tl.arange(0, BD)
    wide = tl.load(h + n.to(tl.int64)[:, None] * D + d[None, :], mask=own[:, None] & (d < D)[None, :], other=0.0)
    wide = wide.to(tl.float32) * times[:, None]
    rounded = times.to(weighted.dtype.element_ty).to(tl.float32)
    wide = tl.where((d == W - 8)[None, :], rounded[:, None], wide)
    wide = tl.where((d == W - 7)[None, :], (times - rounded)[:, None], wide)
    wide = wide.to(weighted.dtype.element_ty)
    tl.store(weighted + n.to(tl.int64)[:, None] * W + d[None, :], wide, mask=own[:, None] & (d < W)[None, :])
    if tl.max(far.to(tl.int32), 0) > 0:
        for tile in range(tiles):
            v = tile * BV + tl.arange(0, BV)
            inside = far[:, None] & (v < V)[None, :]
            mark = tl.load(marks + tile * N + n, mask=far, other=0.0)
            e = tl.load(row[:, None] + v[None, :], mask=inside, other=0.0).to(tl.float32)
            e = e * tl.exp2(mark * LOG2E - scaled)[:, None]
            e = tl.where((v == y)[None, :], at_target[:, None], e)
            tl.store(row[:, None] + v[None, :], e.to(kept.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def _scaled(x, factor, scale, out, R, D, BD: tl.constexpr, ROWS: tl.constexpr):
    """Rows times a number of each and one of all, rounded once."""
    r, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    keep, g = (r < R)[:, None] & (d < D)[None, :], tl.load(factor + r, mask=r < R, other=0.0) * tl.load(scale)
    at = r.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out + at, (tl.load(x + at, mask=keep, other=0.0) * g[:, None]).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _unpack(both, scale, dw, db, V, D, W, BD: tl.constexpr, ROWS: tl.constexpr):
    """dw and db: a matrix's columns to D, and the sum of its columns W - 8 and W - 7, times a number."""
    v, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    g = tl.load(scale)
    keep = (v < V)[:, None] & (d < D)[None, :]
    x = tl.load(both + v.to(tl.int64)[:, None] * W + d[None, :], mask=keep, other=0.0) * g
    tl.store(dw + v.to(tl.int64)[:, None] * D + d[None, :], x.to(dw.dtype.element_ty), mask=keep)
    bias = tl.load(both + v.to(tl.int64) * W + W - 8, mask=v < V, other=0.0)
    bias += tl.load(both + v.to(tl.int64) * W + W - 7, mask=v < V, other=0.0)
    tl.store(db + v, (bias * g).to(db.dtype.element_ty), mask=v < V)


def chunk_tokens(tokens: int, experts: int, columns: int, depth: int, itemsize: int, slots: int) -> int:
    """Tokens whose rows of E are in memory at once: near-equal chunks within the allowed bytes, unless one token is more.

    E W is a product of so few columns that cuBLAS makes 64 x 128 tiles of it: where there is a choice, they come out even.
    """
    rows, even = CHUNK_BYTES // (itemsize * columns), slots // triton.cdiv(depth, 128) * 64
    if rows > even > 0:
        rows -= rows % even
    most = max(1, rows // experts)
    return triton.cdiv(tokens, triton.cdiv(tokens, most))


class _MixtureCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, log_prior_NK: Tensor):  # type: ignore[override]
        h_RD, w_VD = rows_RD.contiguous(), weight_VD.to(rows_RD.dtype).contiguous()
        bias_V, targets_N, log_prior_NK = bias_V.contiguous(), targets_N.contiguous(), log_prior_NK.float().contiguous()
        (R, D), V, (N, K), dtype, device = h_RD.shape, len(w_VD), log_prior_NK.shape, h_RD.dtype, h_RD.device
        tiles = EXPONENTIALS if h_RD.is_cuda and whole.shared_memory(device.index) >= whole.HOPPER_SHARED else OLDER
        h, w = matrix(h_RD), matrix(w_VD, MULTIPLE)
        slots, v_tiles, VP, DP = whole.slots_of(h, tiles), triton.cdiv(V, tiles.v), len(w), h.shape[1]
        per, W = chunk_tokens(N, K, VP, DP, h.element_size(), slots), DP + COLUMNS
        e, weighted = h.new_empty(per * K, VP), h.new_empty(per * K, W)
        logits_R, lse2_R, factor_R = torch.empty(3, R, device=device)
        nll_N, share_NK = torch.empty(N, device=device), torch.empty(N, K, device=device)
        marks, sums = torch.empty(2, v_tiles * per * K, device=device)
        products_RD, both_VW = torch.empty(R, DP, device=device), torch.empty(VP, W, device=device)
        shape = TILES, max(4, triton.next_power_of_2(K)), triton.next_power_of_2(W), W, tiles.v
        with torch.cuda.device_of(h_RD):  # Triton launches on the current device
            _target_logits[(triton.cdiv(R, ROWS),)](
                h_RD, w_VD, bias_V, targets_N, logits_R, R, K, V, D, triton.next_power_of_2(D), ROWS
            )
            for first in range(0, N, per):
                t, r = slice(first, min(first + per, N)), slice(first * K, min(first + per, N) * K)
                rows = r.stop - r.start
                _exponentials[(min(slots, triton.cdiv(rows, tiles.n) * v_tiles),)](
                    described(h[r], tiles.n, tiles.k), described(w, tiles.v, tiles.k), bias_V, logits_R[r], marks, sums,
                    described(e[:rows], tiles.n, tiles.v), rows, V, FAR[dtype],
                    DP, tiles.n, tiles.v, tiles.k, tiles.flatten, num_warps=tiles.warps, num_stages=tiles.stages,
                )  # fmt: skip
                _finish[(t.stop - t.start,)](
                    h_RD[r], targets_N[t], logits_R[r], log_prior_NK[t], marks, sums, e, nll_N[t], lse2_R[r], share_NK[t],
                    factor_R[r], weighted, rows, K, V, VP, D, FAR[dtype], *shape,
                )  # fmt: skip
                product(e[:rows].t(), weighted[:rows], both_VW, add=first > 0)
                product(e[:rows], w, products_RD[r])
        ctx.save_for_backward(h_RD, w_VD, bias_V, targets_N, lse2_R, share_NK, factor_R, products_RD, both_VW)
        ctx.weight_dtype = weight_VD.dtype
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N: Tensor):  # type: ignore[override]
        h_RD, w_VD, bias_V, targets_N, lse2_R, share_NK, factor_R, products_RD, both_VW = ctx.saved_tensors
        (V, D), (R, DP), K = w_VD.shape, products_RD.shape, share_NK.shape[1]
        dprior_NK = share_NK * -upstream_N[:, None]
        if upstream_N.stride(0) and len(upstream_N) > 1:  # not one number for all
            upstream_R, targets_R = -dprior_NK.flatten(), targets_N[:, None].expand(-1, K).flatten()
            given = h_RD, w_VD, bias_V, targets_R, lse2_R, upstream_R
            return *whole.by_columns(*given, ctx.weight_dtype, ctx.needs_input_grad), None, dprior_NK
        scale = upstream_N[:1].float()
        dh, dw, db = h_RD.new_empty(R, DP), torch.empty_like(w_VD, dtype=ctx.weight_dtype), torch.empty_like(bias_V)
        with torch.cuda.device_of(h_RD):
            _scaled[(triton.cdiv(R, ROWS),)](products_RD, factor_R, scale, dh, R, DP, triton.next_power_of_2(DP), ROWS)
            _unpack[(triton.cdiv(V, ROWS),)](
                both_VW, scale, dw, db, V, D, both_VW.shape[1], triton.next_power_of_2(D), ROWS
            )
        return dh[:, :D], dw, db, None, dprior_NK


def mixture_cross_entropy(
    rows_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, log_prior_NK: Tensor
) -> Tensor:
    """nll_N as `reference.mixture_cross_entropy` has it, for GPU tensors with bfloat16 `rows_RD`; logits are fp32.

    Without gradients, and where all of E is small, it is the experts' `linear_cross_entropy` and its logsumexp.
    """
    size = rows_RD.element_size() * len(rows_RD) * len(weight_VD)
    if not ONCE or not torch.is_grad_enabled() or size <= whole.KEPT_BYTES:
        targets_R = targets_N[:, None].expand_as(log_prior_NK).flatten()
        return cross_entropy.mixed(log_prior_NK, whole.linear_cross_entropy(rows_RD, weight_VD, bias_V, targets_R))
    return _MixtureCrossEntropy.apply(rows_RD, weight_VD, bias_V, targets_N, log_prior_NK)  # type: ignore[return-value]
