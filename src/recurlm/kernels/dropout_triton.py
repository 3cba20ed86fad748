"""Dropout on the GPU with masks that are recomputed, never stored.

A mask is Philox 4x32-10 (Salmon et al. 2011) of a seed on the device, the number of the draw, and the element.
"""

# The kernels are Triton's language, which a type checker of Python cannot follow:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurlm.kernels import embedding_triton

BLOCK = 512


@triton.jit
def _factor(seed, element, draw, p, scale):
    """`scale`, or 0 with probability p."""
    a = element.to(tl.uint32, bitcast=True)
    bits, _b, _c, _d = tl.philox(seed, a, a * 0 + draw, a * 0, a * 0)
    return tl.where((bits >> 8).to(tl.float32) * (1.0 / 16777216.0) >= p, scale, 0.0)


@triton.jit
def _locked(x, y, seed, draw, p, scale, F, T, BLOCK: tl.constexpr):
    """One mask for all time steps: y_TF = x_TF * factor_F; F counts batch x features."""
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = _factor(tl.load(seed).to(tl.int64), f, draw, p, scale)
    for t in range(tl.program_id(1), T, tl.num_programs(1)):
        at = tl.cast(t, tl.int64) * F + f
        value = tl.load(x + at, mask=f < F, other=0.0).to(tl.float32) * factor
        tl.store(y + at, value.to(y.dtype.element_ty), mask=f < F)


@triton.jit
def _embed(ids, table, y, seed, draw, p_word, scale_word, p, scale, B, E, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """y_NE = table[id] * word factor * locked factor; backward: the same factors on the gradient, row by row."""
    n = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed).to(tl.int64)
    token = tl.load(ids + n)
    factor = _factor(key, (n % B) * E + e, draw + 1, p, scale)
    word = _factor(key, token.to(tl.int32) + tl.zeros((1,), tl.int32), draw, p_word, scale_word)
    factor = factor * tl.sum(word, axis=0)
    source = n.to(tl.int64) if BACKWARD else token.to(tl.int64)
    value = tl.load(table + source * E + e, mask=e < E, other=0.0).to(tl.float32) * factor
    tl.store(y + n.to(tl.int64) * E + e, value.to(y.dtype.element_ty), mask=e < E)


@triton.jit
def _bernoulli(y, seed, draw, p, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = _factor(tl.load(seed).to(tl.int64), at, draw, 1.0 - p, 1.0)
    tl.store(y + at, factor.to(y.dtype.element_ty), mask=at < n)


def _apply_locked(x_TBF: Tensor, p: float, seed: Tensor, draw: int) -> Tensor:
    x_TBF, width = x_TBF.contiguous(), x_TBF[0].numel()
    y_TBF = torch.empty_like(x_TBF)
    grid = (triton.cdiv(width, BLOCK), min(len(x_TBF), 16))
    with torch.cuda.device_of(x_TBF):
        _locked[grid](x_TBF, y_TBF, seed, draw, p, 1 / (1 - p), width, len(x_TBF), BLOCK, num_warps=4)
    return y_TBF


class _Locked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TBF: Tensor, p: float, seed: Tensor, draw: int):  # type: ignore[override]
        ctx.save_for_backward(seed)
        ctx.how = p, draw
        return _apply_locked(x_TBF, p, seed, draw)

    @staticmethod
    def backward(ctx, grad_TBF: Tensor):  # type: ignore[override]
        p, draw = ctx.how
        return _apply_locked(grad_TBF, p, ctx.saved_tensors[0], draw), None, None, None


def locked(x_TBF: Tensor, p: float, seed: Tensor, draw: int) -> Tensor:
    """x with one mask for all time steps; `seed`: one number (float64) on the device."""
    return _Locked.apply(x_TBF, p, seed, draw)  # type: ignore[return-value]


def _apply_embed(
    ids_TB: Tensor, table: Tensor, seed: Tensor, draw: int, p_word: float, p: float, backward: bool
) -> Tensor:
    E = table.shape[-1]
    y_TBE = table.new_empty(*ids_TB.shape, E)
    block = min(triton.next_power_of_2(E), 1024)
    with torch.cuda.device_of(table):
        _embed[(ids_TB.numel(), triton.cdiv(E, block))](
            ids_TB, table, y_TBE, seed, draw, p_word, 1 / (1 - p_word), p, 1 / (1 - p), ids_TB.shape[1], E, backward,
            block, num_warps=2,
        )  # fmt: skip
    return y_TBE


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids_TB: Tensor, weight_VE: Tensor, p_word: float, p: float, seed: Tensor, draw: int):  # type: ignore[override]
        ctx.save_for_backward(ids_TB, seed)
        ctx.how = p_word, p, draw, weight_VE.shape[0]
        return _apply_embed(ids_TB, weight_VE.contiguous(), seed, draw, p_word, p, False)

    @staticmethod
    def backward(ctx, grad_TBE: Tensor):  # type: ignore[override]
        (ids_TB, seed), (p_word, p, draw, words) = ctx.saved_tensors, ctx.how
        rows_TBE = _apply_embed(ids_TB, grad_TBE.contiguous(), seed, draw, p_word, p, True)
        grad_VE = embedding_triton.gradient(rows_TBE.flatten(0, -2), ids_TB.flatten(), words)
        return None, grad_VE, None, None, None, None


def embed(ids_TB: Tensor, weight_VE: Tensor, p_word: float, p: float, seed: Tensor, draw: int) -> Tensor:
    """x_TBE: rows of the table, whole words dropped (draw) and one mask for all time steps (draw + 1)."""
    return _Embed.apply(ids_TB.contiguous(), weight_VE, p_word, p, seed, draw)  # type: ignore[return-value]


def bernoulli(y: Tensor, p: float, seed: Tensor, draw: int) -> Tensor:
    """y, contiguous, filled with 1 with probability p and 0 otherwise."""
    with torch.cuda.device_of(y):
        _bernoulli[(triton.cdiv(y.numel(), BLOCK),)](y, seed, draw, p, y.numel(), BLOCK, num_warps=4)
    return y
