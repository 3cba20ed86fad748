"""The peer of the pooling kernels: a plain loop over time for each column, which keeps every c; fo-pooling alone."""

# The kernels are Triton's language, which a type checker of Python cannot follow:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(gates, c0, h_out, c_all, T, N, H, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < N
    at = gates + (n // H).to(tl.int64) * 3 * H + n % H
    c = tl.load(c0 + n, mask=keep, other=0.0).to(tl.float32)
    for t in range(T):
        row = tl.cast(t, tl.int64) * N
        z = tl.load(at + 3 * row, mask=keep, other=0.0).to(tl.float32)
        f = tl.load(at + 3 * row + H, mask=keep, other=0.0).to(tl.float32)
        o = tl.load(at + 3 * row + 2 * H, mask=keep, other=0.0).to(tl.float32)
        c = c + tl.sigmoid(f) * (2 * tl.sigmoid(2 * z) - 1 - c)
        tl.store(c_all + row + n, c, mask=keep)
        tl.store(h_out + row + n, tl.sigmoid(o) * c, mask=keep)


@triton.jit
def _backward(gates, c0, c_all, dh, dgates, dc0, T, N, H, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < N
    offset = (n // H).to(tl.int64) * 3 * H + n % H
    r = tl.zeros((BLOCK,), tl.float32)
    for step in range(T):
        t = T - 1 - step
        row = tl.cast(t, tl.int64) * N
        at = 3 * row + offset
        z = 2 * tl.sigmoid(2 * tl.load(gates + at, mask=keep, other=0.0).to(tl.float32)) - 1
        f = tl.sigmoid(tl.load(gates + at + H, mask=keep, other=0.0).to(tl.float32))
        o = tl.sigmoid(tl.load(gates + at + 2 * H, mask=keep, other=0.0).to(tl.float32))
        g = tl.load(dh + row + n, mask=keep, other=0.0).to(tl.float32)
        after = tl.load(c_all + row + n, mask=keep, other=0.0).to(tl.float32)
        before = tl.load((c_all + row - N + n) if t > 0 else (c0 + n), mask=keep, other=0.0).to(tl.float32)
        r += g * o
        tl.store(dgates + at, r * f * (1 - z * z), mask=keep)
        tl.store(dgates + at + H, r * (z - before) * f * (1 - f), mask=keep)
        tl.store(dgates + at + 2 * H, g * after * o * (1 - o), mask=keep)
        r = r - r * f
    tl.store(dc0 + n, r, mask=keep)


def forward(gates_TBG: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
    """(h_TBH, c_TBH)."""
    T, (B, H) = gates_TBG.shape[0], c_BH.shape
    h_TBH, c_TBH = (gates_TBG.new_empty(T, B, H) for _ in range(2))
    _forward[(triton.cdiv(B * H, 64),)](gates_TBG, c_BH, h_TBH, c_TBH, T, B * H, H, BLOCK=64, num_warps=2)
    return h_TBH, c_TBH


def backward(gates_TBG: Tensor, c_BH: Tensor, c_TBH: Tensor, grad_h_TBH: Tensor) -> tuple[Tensor, Tensor]:
    """(grad_gates_TBG, grad_c_BH)."""
    T, (B, H) = gates_TBG.shape[0], c_BH.shape
    grad_gates_TBG, grad_c_BH = torch.empty_like(gates_TBG), torch.empty_like(c_BH)
    arguments = (gates_TBG, c_BH, c_TBH, grad_h_TBH, grad_gates_TBG, grad_c_BH, T, B * H, H)
    _backward[(triton.cdiv(B * H, 64),)](*arguments, BLOCK=64, num_warps=2)
    return grad_gates_TBG, grad_c_BH
