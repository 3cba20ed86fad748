"""QRNN pooling on the CPU: activations, recurrence and output gate in one compiled pass over memory.

The forward pass goes through memory in its order, with the last c as the running one. The backward pass takes a block of
columns (some units of one row of the batch) through all its time steps, a segment of them at a time: it computes the
gates anew in the place of their gradients, then these, back in time, while all of it is in the cache. Of c only every
`SEGMENT`-th is stored. Blocks are independent and always the same, so the number of threads changes no bit.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor
from torch.autograd.function import once_differentiable

from recurlm.kernels.reference import GATES

BLOCK = 2560  # units: a row of 10 KB an array; shorter ones leave the memory's prefetcher too little to go on
SEGMENT = 8  # time steps from one stored c to the next
ELEMENTS = 32768  # h values that are worth a thread: some 30 µs

# exp(x) = 2^k (1 + p(r)) with k = round(x / ln 2), r = x - k ln 2 and p a polynomial, minimax on |r| <= ln 2 / 2.
INVERSE_LN2 = np.float32(1 / math.log(2))
LN2 = np.float32(math.log(2))  # rounded by 2e-9 only; k times it is not rounded in a fused operation
P2, P3, P4, P5, P6 = (np.float32(c) for c in (0.50000001, 0.16666543, 0.04166628, 0.00836661, 0.00139465))
ROUND = np.float32(1.5 * 2**23 + 127)  # x + ROUND has the rounded x, as the exponent of 2^x, in its last 8 bits
LARGE, TINY, FLAT = np.float32(88.8), np.float32(-88.0), np.float32(18.1)  # exp overflows; is 0 beside 1; tanh is 1
ONE, TWO = np.float32(1), np.float32(2)
# Python's check for a division by zero would keep loops from being vectorised; "contract" allows fused multiply-add.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at first use, and kept on disk where that is possible."""
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no folder for it can be written
        return numba.njit(**OPTIONS)(function)


@_compiled
def _exp_parts(x: Any) -> tuple[Any, Any]:
    """(2^k, p) with exp(x) = 2^k + 2^k p, in fp32 for -88 <= x <= 88.8; plain arithmetic, which LLVM vectorises."""
    shifted = x * INVERSE_LN2 + ROUND
    k = shifted - ROUND
    r = x - k * LN2
    p = r + r * r * (P2 + r * (P3 + r * (P4 + r * (P5 + r * P6))))
    power = np.int32(np.float32(shifted).view(np.int32) << np.int32(23)).view(np.float32)
    return power, p


@_compiled
def _sigmoid32(x: Any) -> Any:
    """In fp32, to 3 units in the last place, 6 where it is below 1e-6; 0 below -88.4. The comparisons let NaN pass."""
    x = -x
    x = LARGE if x > LARGE else x
    x = TINY if x < TINY else x
    power, p = _exp_parts(x)
    return ONE / (ONE + power * (ONE + p))  # not power + power p: power may be infinite, and p negative


@_compiled
def _tanh32(x: Any) -> Any:
    """In fp32, to 3 units in the last place: e / (e + 2) = 1 - 2 / (e + 2) with e = exp(2 |x|) - 1, never rounded away.

    The second form is the better one near 1, where 1 - tanh² is wanted.
    """
    y = abs(x + x)
    y = FLAT if y > FLAT else y
    power, p = _exp_parts(y)
    e = power * p + (power - ONE)
    part = (TWO if e > ONE else e) / (e + TWO)
    part = ONE - part if e > ONE else part
    return -part if x < 0 else part


def _sigmoid(x):
    """The logistic function of a float32 or float64, in compiled code; as `_tanh` is the hyperbolic tangent."""
    return 1 / (1 + math.exp(-x))


def _tanh(x):
    return math.tanh(x)


@overload(_sigmoid)
def _sigmoid_of_type(x):
    return (lambda x: _sigmoid32(x)) if x == numba.float32 else lambda x: 1 / (1 + math.exp(-x))


@overload(_tanh)
def _tanh_of_type(x):
    return (lambda x: _tanh32(x)) if x == numba.float32 else lambda x: math.tanh(x)


@_compiled
def _row(x: np.ndarray, at: int, size: int) -> np.ndarray:
    return x[at : at + size]


# The loops have few arrays each: LLVM vectorises one only if at most eight comparisons show that its arrays do not overlap.


@_compiled
def _copy(x_N: np.ndarray, out_N: np.ndarray) -> None:
    for n in range(min(x_N.size, out_N.size)):
        out_N[n] = x_N[n]


@_compiled
def _sigmoids(x_N: np.ndarray, out_N: np.ndarray) -> None:
    for n in range(x_N.size):
        out_N[n] = _sigmoid(x_N[n])


@_compiled
def _tanhs(x_N: np.ndarray, out_N: np.ndarray) -> None:
    for n in range(x_N.size):
        out_N[n] = _tanh(x_N[n])


@_compiled
def _advance(z_N: np.ndarray, f_N: np.ndarray, scale_N: np.ndarray, c_N: np.ndarray) -> None:
    """The next c from pre-activations, in place."""
    for n in range(z_N.size):
        c_N[n] = c_N[n] + _sigmoid(f_N[n]) * scale_N[n] * (_tanh(z_N[n]) - c_N[n])


@_compiled
def _advance_ifo(z_N: np.ndarray, f_N: np.ndarray, i_N: np.ndarray, scale_N: np.ndarray, c_N: np.ndarray) -> None:
    for n in range(z_N.size):
        s, i = _sigmoid(f_N[n]), _sigmoid(i_N[n])
        c_N[n] = c_N[n] - s * scale_N[n] * c_N[n] + i * scale_N[n] * _tanh(z_N[n])


@_compiled
def _output(o_N: np.ndarray, c_N: np.ndarray, h_N: np.ndarray) -> None:
    for n in range(h_N.size):
        h_N[n] = _sigmoid(o_N[n]) * c_N[n]


@_compiled
def _step(z_N: np.ndarray, s_N: np.ndarray, scale_N: np.ndarray, c_N: np.ndarray, out_N: np.ndarray) -> None:
    """The next c from activations."""
    for n in range(z_N.size):
        out_N[n] = c_N[n] + s_N[n] * scale_N[n] * (z_N[n] - c_N[n])


@_compiled
def _step_ifo(
    z_N: np.ndarray, s_N: np.ndarray, i_N: np.ndarray, scale_N: np.ndarray, c_N: np.ndarray, out_N: np.ndarray
) -> None:
    for n in range(z_N.size):
        out_N[n] = c_N[n] - s_N[n] * scale_N[n] * c_N[n] + i_N[n] * scale_N[n] * z_N[n]


# Backwards: each gradient takes the place of the activation.


@_compiled
def _add(x_N: np.ndarray, out_N: np.ndarray) -> None:
    for n in range(x_N.size):
        out_N[n] += x_N[n]


@_compiled
def _output_backward(grad_h_N: np.ndarray, c_N: np.ndarray, running_N: np.ndarray, o_N: np.ndarray) -> None:
    """O's gradient; that of c is added to the running one."""
    for n in range(o_N.size):
        grad_c = grad_h_N[n] * o_N[n]
        o_N[n] = grad_c * c_N[n] * (ONE - o_N[n])
        running_N[n] += grad_c


@_compiled
def _carry(s_N: np.ndarray, scale_N: np.ndarray, running_N: np.ndarray, part_N: np.ndarray) -> None:
    """The part of the running gradient that z - c gets; the rest is that of the c before."""
    for n in range(s_N.size):
        part = running_N[n] * scale_N[n] * s_N[n]
        part_N[n] = part
        running_N[n] -= part


@_compiled
def _zf_backward(part_N: np.ndarray, c_N: np.ndarray, z_N: np.ndarray, s_N: np.ndarray) -> None:
    """The gradients of Z and F, where f is the input gate too."""
    for n in range(z_N.size):
        z, part = z_N[n], part_N[n]
        s_N[n] = part * (ONE - s_N[n]) * (z - c_N[n])
        z_N[n] = part * (ONE - z * z)


@_compiled
def _carry_ifo(s_N: np.ndarray, scale_N: np.ndarray, running_N: np.ndarray, part_N: np.ndarray) -> None:
    """The running gradient times the scale; what is left of it is that of the c before."""
    for n in range(s_N.size):
        part = running_N[n] * scale_N[n]
        part_N[n] = part
        running_N[n] -= part * s_N[n]


@_compiled
def _zi_backward(part_N: np.ndarray, z_N: np.ndarray, i_N: np.ndarray) -> None:
    for n in range(z_N.size):
        z, part = z_N[n], part_N[n] * i_N[n]
        i_N[n] = part * (ONE - i_N[n]) * z
        z_N[n] = part * (ONE - z * z)


@_compiled
def _f_backward(part_N: np.ndarray, c_N: np.ndarray, s_N: np.ndarray) -> None:
    for n in range(s_N.size):
        s_N[n] = -part_N[n] * s_N[n] * (ONE - s_N[n]) * c_N[n]


@_compiled
def _forward(
    first: int, stop: int, T: int, B: int, H: int, G: int,
    gates: np.ndarray, c0: np.ndarray, mask: np.ndarray, constant: float,
    h: np.ndarray, last: np.ndarray, kept: np.ndarray,
) -> None:  # fmt: skip
    """Fills h, the last c and, unless it is empty, `kept` with the c before each segment; arrays are flat."""
    blocks = (H + BLOCK - 1) // BLOCK
    width = (H + blocks - 1) // blocks
    constants = np.empty(width, h.dtype)
    for n in range(width):
        constants[n] = constant
    for t in range(T):
        for block in range(first, stop):
            b, unit = block // blocks, block % blocks * width
            W, column = min(width, H - unit), b * H + unit
            at, gate = t * B * H + column, (t * B + b) * G * H + unit
            c = _row(last, column, W)
            if t == 0:
                _copy(_row(c0, column, W), c)
            if kept.size and t % SEGMENT == 0:
                _copy(c, _row(kept, t // SEGMENT * B * H + column, W))
            scale_N = _row(mask, at, W) if mask.size else constants
            z_N, f_N = _row(gates, gate, W), _row(gates, gate + H, W)
            if G == 4:
                _advance_ifo(z_N, f_N, _row(gates, gate + 3 * H, W), scale_N, c)
            else:
                _advance(z_N, f_N, scale_N, c)
            if G >= 3:
                _output(_row(gates, gate + 2 * H, W), c, _row(h, at, W))
            else:
                _copy(c, _row(h, at, W))


@_compiled
def _backward(
    first: int, stop: int, T: int, B: int, H: int, G: int,
    gates: np.ndarray, mask: np.ndarray, constant: float, kept: np.ndarray, grad_h: np.ndarray, grad_last: np.ndarray,
    grad_gates: np.ndarray, grad_c0: np.ndarray,
) -> None:  # fmt: skip
    """Fills the gradients of the gates and of the first c."""
    blocks = (H + BLOCK - 1) // BLOCK
    width = (H + blocks - 1) // blocks
    c = np.empty((SEGMENT + 1, width), gates.dtype)
    running, part, constants = np.empty(width, c.dtype), np.empty(width, c.dtype), np.empty(width, c.dtype)
    for n in range(width):
        constants[n] = constant
    for block in range(first, stop):
        b, unit = block // blocks, block % blocks * width
        W, column = min(width, H - unit), b * H + unit
        _copy(_row(grad_last, column, W), running)
        for start in range((T - 1) // SEGMENT * SEGMENT, -1, -SEGMENT):
            stop_t = min(start + SEGMENT, T)
            _copy(_row(kept, start // SEGMENT * B * H + column, W), c[0])
            for t in range(start, stop_t):
                at, gate = t * B * H + column, (t * B + b) * G * H + unit
                scale_N = _row(mask, at, W) if mask.size else constants
                _tanhs(_row(gates, gate, W), _row(grad_gates, gate, W))
                for g in range(1, G):
                    _sigmoids(_row(gates, gate + g * H, W), _row(grad_gates, gate + g * H, W))
                z_N, s_N = _row(grad_gates, gate, W), _row(grad_gates, gate + H, W)
                if G == 4:
                    i_N = _row(grad_gates, gate + 3 * H, W)
                    _step_ifo(z_N, s_N, i_N, scale_N, c[t - start], c[t - start + 1])
                else:
                    _step(z_N, s_N, scale_N, c[t - start], c[t - start + 1])
            for t in range(stop_t - 1, start - 1, -1):
                at, gate = t * B * H + column, (t * B + b) * G * H + unit
                scale_N = _row(mask, at, W) if mask.size else constants
                z_N, s_N, grad_h_N = _row(grad_gates, gate, W), _row(grad_gates, gate + H, W), _row(grad_h, at, W)
                if G >= 3:
                    _output_backward(grad_h_N, c[t - start + 1], running, _row(grad_gates, gate + 2 * H, W))
                else:
                    _add(grad_h_N, running)
                if G == 4:
                    _carry_ifo(s_N, scale_N, running, part)
                    _zi_backward(part, z_N, _row(grad_gates, gate + 3 * H, W))
                    _f_backward(part, c[t - start], s_N)
                else:
                    _carry(s_N, scale_N, running, part)
                    _zf_backward(part, c[t - start], z_N, s_N)
        _copy(running, _row(grad_c0, column, W))


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """The threads beside the calling one; started when first needed, and anew in a forked process."""
    return ThreadPoolExecutor(os.cpu_count(), "pool")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)


def _spread(kernel: Callable[..., None], T: int, B: int, H: int, *rest: Any) -> None:
    """Calls the kernel for all blocks, on as many threads as torch uses if there is work for them."""
    blocks = B * ((H + BLOCK - 1) // BLOCK)
    parts = max(1, min(torch.get_num_threads(), blocks, T * B * H // ELEMENTS))
    spans = list(itertools.pairwise(blocks * part // parts for part in range(parts + 1)))
    others = [_workers().submit(kernel, *span, T, B, H, *rest) for span in spans[1:]]
    kernel(*spans[0], T, B, H, *rest)
    for other in others:
        other.result()


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(-1).numpy()


def _mask(scale: Tensor | float | None, gates_TBG: Tensor, shape: tuple[int, ...]) -> tuple[np.ndarray, np.floating]:
    """(The mask or an empty array, the constant that scales f and i without a mask)."""
    of = torch.empty(0, dtype=gates_TBG.dtype).numpy().dtype.type
    if isinstance(scale, Tensor):
        return _flat(scale.to(gates_TBG.dtype).expand(shape)), of(1)
    return np.empty(0, of), of(1 if scale is None else scale)


def _pooled(
    gates_TBG: Tensor, c_BH: Tensor, scale: Tensor | float | None, pooling: str, keep: bool
) -> tuple[Tensor, Tensor, np.ndarray]:
    """(h_TBH, last c_BH, the c before each segment, if they are to be kept)."""
    T, (B, H), gates = gates_TBG.shape[0], c_BH.shape, _flat(gates_TBG)
    # numpy asks the kernel for huge pages, which makes large new arrays several times cheaper than torch's.
    h, last = np.empty((T, B, H), gates.dtype), np.empty((B, H), gates.dtype)
    kept = np.empty((T + SEGMENT - 1) // SEGMENT * B * H if keep else 0, gates.dtype)
    mask = _mask(scale, gates_TBG, h.shape)
    _spread(_forward, T, B, H, GATES[pooling], gates, _flat(c_BH), *mask, h.reshape(-1), last.reshape(-1), kept)
    return torch.from_numpy(h), torch.from_numpy(last), kept


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_TBG: Tensor, c_BH: Tensor, scale: Tensor | float | None, pooling: str):  # type: ignore[override]
        h_TBH, last_BH, kept = _pooled(gates_TBG, c_BH, scale, pooling, keep=True)
        ctx.save_for_backward(gates_TBG, scale if isinstance(scale, Tensor) else None, torch.from_numpy(kept))
        ctx.constant, ctx.pooling = None if isinstance(scale, Tensor) else scale, pooling
        return h_TBH, last_BH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h_TBH: Tensor, grad_last_BH: Tensor):  # type: ignore[override]
        gates_TBG, scale_TBH, kept = ctx.saved_tensors
        T, B, H = grad_h_TBH.shape
        mask = _mask(ctx.constant if scale_TBH is None else scale_TBH, gates_TBG, grad_h_TBH.shape)
        gates, given = _flat(gates_TBG), (_flat(kept), _flat(grad_h_TBH), _flat(grad_last_BH))
        grad_gates, grad_c = np.empty(gates_TBG.shape, gates.dtype), np.empty((B, H), gates.dtype)
        found = grad_gates.reshape(-1), grad_c.reshape(-1)
        _spread(_backward, T, B, H, GATES[ctx.pooling], gates, *mask, *given, *found)
        return torch.from_numpy(grad_gates), torch.from_numpy(grad_c), None, None


def pool(
    gates_TBG: Tensor, c_BH: Tensor, scale: Tensor | float | None, pooling: str, bias_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH); the same as `reference.pool`, for CPU tensors; 16-bit types compute in fp32."""
    if bias_G is not None:
        gates_TBG = gates_TBG + bias_G.to(gates_TBG.dtype)
    if gates_TBG.shape[0] == 0:
        return gates_TBG.new_empty((0, *c_BH.shape)), c_BH
    if gates_TBG.dtype in (torch.bfloat16, torch.float16):
        h_TBH, last_BH = pool(gates_TBG.float(), c_BH.float(), scale, pooling)
        return h_TBH.to(gates_TBG.dtype), last_BH.to(gates_TBG.dtype)
    if torch.is_grad_enabled() and (gates_TBG.requires_grad or c_BH.requires_grad):
        return _Pool.apply(gates_TBG, c_BH, scale, pooling)  # type: ignore[return-value]
    return _pooled(gates_TBG, c_BH, scale, pooling, keep=False)[:2]
