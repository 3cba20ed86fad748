"""QRNN pooling on the GPU: activations, recurrence and output gate in one pass over memory, one column a lane.

Gates are read once and recomputed in the backward pass, which stores only c. Arithmetic is fp32 for every
storage type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurlm.kernels import reference

BLOCK = 64


@triton.jit
def _forward(
    gates, c0, scale, h_out, c_all, T, N, H, GATES: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < N
    z_at = gates + (n // H).to(tl.int64) * GATES * H + n % H
    c = tl.load(c0 + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(c_all + n, c, mask=keep)  # row 0 is the state before, row t + 1 that after step t
    for t in range(T):
        row = tl.cast(t, tl.int64) * N
        z = tl.load(z_at + GATES * row, mask=keep, other=0.0).to(tl.float32)
        f = tl.load(z_at + GATES * row + H, mask=keep, other=0.0).to(tl.float32)
        z = 2 * tl.sigmoid(2 * z) - 1  # tanh
        f = tl.sigmoid(f)
        scaled = 1.0
        if HAS_SCALE:
            scaled = tl.load(scale + row + n, mask=keep, other=0.0).to(tl.float32)
            f = f * scaled
        if GATES == 4:
            i = tl.load(z_at + GATES * row + 3 * H, mask=keep, other=0.0).to(tl.float32)
            c = c - f * c + tl.sigmoid(i) * scaled * z
        else:
            c = c + f * (z - c)
        tl.store(c_all + row + N + n, c, mask=keep)
        h = c
        if GATES >= 3:
            h = tl.sigmoid(tl.load(z_at + GATES * row + 2 * H, mask=keep, other=0.0).to(tl.float32)) * c
        tl.store(h_out + row + n, h, mask=keep)


@triton.jit
def _backward(
    gates, scale, c_all, dh, dlast, dgates, dc0, T, N, H,
    GATES: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < N
    offset = (n // H).to(tl.int64) * GATES * H + n % H
    r = tl.load(dlast + n, mask=keep, other=0.0).to(tl.float32)
    c = tl.load(c_all + tl.cast(T, tl.int64) * N + n, mask=keep, other=0.0).to(tl.float32)
    for step in range(T):
        t = T - 1 - step
        row = tl.cast(t, tl.int64) * N
        at = GATES * row + offset
        z = tl.load(gates + at, mask=keep, other=0.0).to(tl.float32)
        s = tl.load(gates + at + H, mask=keep, other=0.0).to(tl.float32)
        g = tl.load(dh + row + n, mask=keep, other=0.0).to(tl.float32)
        before = tl.load(c_all + row + n, mask=keep, other=0.0).to(tl.float32)
        z = 2 * tl.sigmoid(2 * z) - 1
        s = tl.sigmoid(s)
        scaled = 1.0
        if HAS_SCALE:
            scaled = tl.load(scale + row + n, mask=keep, other=0.0).to(tl.float32)
        f = s * scaled
        if GATES >= 3:
            o = tl.sigmoid(tl.load(gates + at + 2 * H, mask=keep, other=0.0).to(tl.float32))
            tl.store(dgates + at + 2 * H, g * c * o * (1 - o), mask=keep)
            g = g * o
        r += g
        if GATES == 4:
            i = tl.sigmoid(tl.load(gates + at + 3 * H, mask=keep, other=0.0).to(tl.float32))
            tl.store(dgates + at + 3 * H, r * z * scaled * i * (1 - i), mask=keep)
            tl.store(dgates + at, r * i * scaled * (1 - z * z), mask=keep)
            tl.store(dgates + at + H, -r * before * scaled * s * (1 - s), mask=keep)
        else:
            tl.store(dgates + at, r * f * (1 - z * z), mask=keep)
            tl.store(dgates + at + H, r * (z - before) * scaled * s * (1 - s), mask=keep)
        r = r - r * f
        c = before
    tl.store(dc0 + n, r, mask=keep)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_TBG: Tensor, c_BH: Tensor, scale_TBH: Tensor | None, pooling: str):  # type: ignore[override]
        T, B, H = gates_TBG.shape[0], *c_BH.shape
        gates_TBG, c_BH = gates_TBG.contiguous(), c_BH.contiguous()
        scale_TBH = None if scale_TBH is None else scale_TBH.expand(T, B, H).contiguous()
        h_TBH = gates_TBG.new_empty(T, B, H)
        c_SBH = gates_TBG.new_empty(T + 1, B, H)
        grid, kinds = (triton.cdiv(B * H, BLOCK),), (reference.GATES[pooling], scale_TBH is not None, BLOCK)
        mask = gates_TBG if scale_TBH is None else scale_TBH  # any pointer: not read without a scale
        with torch.cuda.device_of(gates_TBG):  # Triton launches on the current device
            _forward[grid](gates_TBG, c_BH, mask, h_TBH, c_SBH, T, B * H, H, *kinds, num_warps=2)  # type: ignore[call-arg]
        ctx.save_for_backward(gates_TBG, scale_TBH, c_SBH)
        ctx.kinds = kinds
        return h_TBH, c_SBH[-1].clone()

    @staticmethod
    def backward(ctx, grad_h_TBH: Tensor, grad_last_BH: Tensor):  # type: ignore[override]
        gates_TBG, scale_TBH, c_SBH = ctx.saved_tensors
        T, B, H = grad_h_TBH.shape
        grad_gates_TBG, grad_c_BH = torch.empty_like(gates_TBG), torch.empty_like(c_SBH[0])
        grid = (triton.cdiv(B * H, BLOCK),)
        mask = gates_TBG if scale_TBH is None else scale_TBH
        with torch.cuda.device_of(gates_TBG):
            _backward[grid](
                gates_TBG, mask, c_SBH, grad_h_TBH.contiguous(), grad_last_BH.contiguous(),
                grad_gates_TBG, grad_c_BH, T, B * H, H, *ctx.kinds, num_warps=2,  # type: ignore[call-arg]
            )  # fmt: skip
        return grad_gates_TBG, grad_c_BH, None, None


def pool(gates_TBG: Tensor, c_BH: Tensor, scale_TBH: Tensor | None, pooling: str) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH); the same as `reference.pool`, for GPU tensors of float32, bfloat16 or float16."""
    if gates_TBG.shape[0] == 0:
        return gates_TBG.new_empty((0, *c_BH.shape)), c_BH
    return _Pool.apply(gates_TBG, c_BH, scale_TBH, pooling)  # type: ignore[return-value]
