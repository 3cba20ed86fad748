"""The activation penalties on the GPU: both means in one pass over memory, both gradients in another.

Sums are fp32 and in a fixed order, from any storage type.
"""

# Triton's kernels are not Python to a type checker:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurlm.kernels.cross_entropy import refuse_second_derivative

BLOCK = 2048


@triton.jit(do_not_specialize=["n"])
def _squares(raw, dropped, partials, n, W, AR: tl.constexpr, TAR: tl.constexpr, BLOCK: tl.constexpr):
    """One block's sums of dropped^2 and of (raw_t - raw_{t-1})^2; a time step has W elements, all together have n."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if AR:
        x = tl.load(dropped + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(partials + tl.program_id(0), tl.sum(x * x, 0))
    if TAR:
        later = (at >= W) & (at < n)
        x = tl.load(raw + at, mask=later, other=0.0).to(tl.float32)
        x -= tl.load(raw + at - W, mask=later, other=0.0).to(tl.float32)
        tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["count"])
def _finish(partials, out, count, ar, tar, AR: tl.constexpr, TAR: tl.constexpr, BLOCK: tl.constexpr):
    """out = (ar, tar) times the sums of the partial sums."""
    for which in tl.static_range(2):
        total = tl.zeros((BLOCK,), tl.float32)
        if AR if which == 0 else TAR:
            for start in range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                total += tl.load(partials + which * count + at, mask=at < count, other=0.0)
        tl.store(out + which, tl.sum(total, 0) * (ar if which == 0 else tar))


@triton.jit(do_not_specialize=["n"])
def _gradients(
    raw, dropped, for_raw, for_dropped, up_ar, up_tar, ar, tar, n, W,
    AR: tl.constexpr, TAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """2 ar dropped, and 2 tar ((raw_t - raw_{t-1}) - (raw_{t+1} - raw_t)), each times its upstream gradient."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if AR:
        x = tl.load(dropped + at, mask=at < n, other=0.0).to(tl.float32) * (2 * ar * tl.load(up_ar))
        tl.store(for_dropped + at, x.to(for_dropped.dtype.element_ty), mask=at < n)
    if TAR:
        x = tl.load(raw + at, mask=at < n, other=0.0).to(tl.float32)
        before = tl.load(raw + at - W, mask=(at >= W) & (at < n), other=0.0).to(tl.float32)
        after = tl.load(raw + at + W, mask=at + W < n, other=0.0).to(tl.float32)
        x = tl.where(at >= W, x - before, 0.0) - tl.where(at + W < n, after - x, 0.0)
        tl.store(for_raw + at, (x * (2 * tar * tl.load(up_tar))).to(for_raw.dtype.element_ty), mask=at < n)


class _Penalties(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw_TBH: Tensor, dropped_TBH: Tensor, ar: float, tar: float):  # type: ignore[override]
        raw_TBH, dropped_TBH = raw_TBH.contiguous(), dropped_TBH.contiguous()
        n, width = raw_TBH.numel(), raw_TBH[0].numel()
        has_ar, has_tar = ar != 0, tar != 0 and n > width
        ar, tar = ar / n if has_ar else 0.0, tar / (n - width) if has_tar else 0.0
        programs = triton.cdiv(n, BLOCK)
        partials = torch.empty(2 * programs, device=raw_TBH.device)
        out = torch.empty(2, device=raw_TBH.device)
        with torch.cuda.device_of(raw_TBH):  # Triton launches on the current device
            _squares[(programs,)](raw_TBH, dropped_TBH, partials, n, width, has_ar, has_tar, BLOCK, num_warps=8)
            _finish[(1,)](partials, out, programs, ar, tar, has_ar, has_tar, 512, num_warps=4)
        ctx.save_for_backward(raw_TBH, dropped_TBH)
        ctx.weights = ar, tar, has_ar, has_tar
        ctx.set_materialize_grads(False)
        return out[0], out[1]

    @staticmethod
    def backward(ctx, up_ar: Tensor | None, up_tar: Tensor | None):  # type: ignore[override]
        refuse_second_derivative()
        (raw_TBH, dropped_TBH), (ar, tar, has_ar, has_tar) = ctx.saved_tensors, ctx.weights
        has_ar, has_tar = has_ar and up_ar is not None, has_tar and up_tar is not None
        for_raw = torch.empty_like(raw_TBH) if has_tar else None
        for_dropped = torch.empty_like(dropped_TBH) if has_ar else None
        n, width = raw_TBH.numel(), raw_TBH[0].numel()
        if has_ar or has_tar:
            with torch.cuda.device_of(raw_TBH):
                _gradients[(triton.cdiv(n, BLOCK),)](
                    raw_TBH, dropped_TBH, for_raw, for_dropped, up_ar, up_tar, ar, tar, n, width, has_ar, has_tar,
                    BLOCK, num_warps=8,
                )  # fmt: skip
        return for_raw, for_dropped, None, None


def penalties(raw_TBH: Tensor, dropped_TBH: Tensor, ar: float, tar: float) -> tuple[Tensor, Tensor]:
    """The two terms as `reference.penalties` has them, for GPU tensors of one shape."""
    return _Penalties.apply(raw_TBH, dropped_TBH, ar, tar)  # type: ignore[return-value]
