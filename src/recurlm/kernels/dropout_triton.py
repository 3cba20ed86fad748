"""Dropout on the GPU with masks that are recomputed, never stored.

A mask is Philox 4x32-10 (Salmon et al. 2011) of a seed on the device, the number of the draw, and the element.
"""

# The kernels are Triton's language, which a type checker of Python cannot follow:
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurlm.kernels import embedding_triton

BLOCK = 1024
STEPS = 8  # time steps that a program of `_locked` loads at once
WARPS = 4


@triton.jit
def _kept(word, p, scale):
    """`scale`, or 0 with probability p."""
    return tl.where((word >> 8).to(tl.float32) * (1.0 / 16777216.0) >= p, scale, 0.0)


@triton.jit
def _factors(seed, draw, p, scale, BLOCK: tl.constexpr):
    """The factors of this program's BLOCK elements, four from each number of the counter."""
    n = (tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed).to(tl.int64), n, n * 0 + draw, n * 0, n * 0)
    a, b, c, d = _kept(a, p, scale), _kept(b, p, scale), _kept(c, p, scale), _kept(d, p, scale)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))


@triton.jit
def _factor(seed, element, draw, p, scale):
    """The factor of one element each, which may be any."""
    n = element.to(tl.uint32)
    word, _b, _c, _d = tl.philox(seed, n, n * 0 + draw, n * 0, n * 0)
    return _kept(word, p, scale)


@triton.jit(do_not_specialize=["T", "draw"])
def _locked(x, y, seed, draw, p, scale, UNITS, T, UNIT: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """One mask for all time steps: y_TF = x_TF * factor_F; F = UNITS * UNIT counts batch x features."""
    F = UNITS * UNIT
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * STEPS
    xs = ()
    for j in tl.static_range(STEPS):
        xs = xs + (tl.load(x + (first + j) * F + f, mask=f < tl.where(first + j < T, F, 0), other=0.0),)
    factor = _factors(seed, draw, p, scale, BLOCK)
    for j in tl.static_range(STEPS):
        value = (xs[j].to(tl.float32) * factor).to(y.dtype.element_ty)
        tl.store(y + (first + j) * F + f, value, mask=f < tl.where(first + j < T, F, 0))


@triton.jit(do_not_specialize=["draw"])
def _embed(
    ids, table, y, seed, draw, p_word, scale_word, p, scale, B, E_UNITS,
    UNIT: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_NE = table[id] * word factor * locked factor; backward: the same factors on the gradient, row by row."""
    E = E_UNITS * UNIT
    n = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key, token = tl.load(seed).to(tl.int64), tl.load(ids + n)
    source = n.to(tl.int64) if BACKWARD else token.to(tl.int64)
    value = tl.load(table + source * E + e, mask=e < E, other=0.0).to(tl.float32)
    factor = _factor(key, (n % B) * E + e, draw + 1, p, scale) * _factor(key, token, draw, p_word, scale_word)
    tl.store(y + n.to(tl.int64) * E + e, (value * factor).to(y.dtype.element_ty), mask=e < E)


@triton.jit(do_not_specialize=["draw"])
def _bernoulli(y, seed, draw, p, UNITS, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, _factors(seed, draw, 1.0 - p, 1.0, BLOCK).to(y.dtype.element_ty), mask=at < UNITS * UNIT)


def _apply_locked(x_TBF: Tensor, p: float, seed: Tensor, draw: int) -> Tensor:
    x_TBF = x_TBF.contiguous()
    y_TBF, width = torch.empty_like(x_TBF), x_TBF[0].numel()
    unit, grid = math.gcd(width, 8), (triton.cdiv(width, BLOCK), triton.cdiv(len(x_TBF), STEPS))
    with torch.cuda.device_of(x_TBF):
        _locked[grid](
            x_TBF, y_TBF, seed, draw, p, 1 / (1 - p), width // unit, len(x_TBF), unit, STEPS, BLOCK, num_warps=WARPS
        )
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
    block, unit = min(triton.next_power_of_2(E), 1024), math.gcd(E, 8)
    with torch.cuda.device_of(table):
        _embed[(ids_TB.numel(), triton.cdiv(E, block))](
            ids_TB, table, y_TBE, seed, draw, p_word, 1 / (1 - p_word), p, 1 / (1 - p), ids_TB.shape[1], E // unit,
            unit, backward, block, num_warps=2,
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
    unit = math.gcd(y.numel(), 8)
    with torch.cuda.device_of(y):
        _bernoulli[(triton.cdiv(y.numel(), BLOCK),)](y, seed, draw, p, y.numel() // unit, unit, BLOCK, num_warps=WARPS)
    return y
