"""QRNN pooling on the CPU: torch's vectorised activations around a compiled scan over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from recurlm.kernels.reference import GATES


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function, compiled at first use, and kept on disk where that is possible."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder for it can be written
        return numba.njit(nogil=True)(function)


@_compiled
def _scan(z_TN: np.ndarray, f_TN: np.ndarray, i_TN: np.ndarray | None, c_N: np.ndarray, out_TN: np.ndarray) -> None:
    """Fills out with c_t; without an input gate of its own (i is None, compiled away) f is the input gate too."""
    for t in range(z_TN.shape[0]):
        previous = c_N if t == 0 else out_TN[t - 1]
        for n in range(z_TN.shape[1]):
            if i_TN is None:
                out_TN[t, n] = previous[n] + f_TN[t, n] * (z_TN[t, n] - previous[n])
            else:
                out_TN[t, n] = previous[n] - f_TN[t, n] * previous[n] + i_TN[t, n] * z_TN[t, n]


@_compiled
def _scan_backward(
    z_TN: np.ndarray,
    f_TN: np.ndarray,
    i_TN: np.ndarray | None,
    c_TN: np.ndarray,
    c_N: np.ndarray,
    grad_TN: np.ndarray,
    running_N: np.ndarray,
    grad_z_TN: np.ndarray,
    grad_f_TN: np.ndarray,
    grad_i_TN: np.ndarray | None,
) -> None:
    """Fills the gates' gradients; `running_N` enters as the gradient of the last c and leaves as that of the first."""
    for t in range(z_TN.shape[0] - 1, -1, -1):
        previous = c_N if t == 0 else c_TN[t - 1]
        for n in range(z_TN.shape[1]):
            r = running_N[n] + grad_TN[t, n]
            if i_TN is None or grad_i_TN is None:
                grad_z_TN[t, n] = f_TN[t, n] * r
                grad_f_TN[t, n] = (z_TN[t, n] - previous[n]) * r
            else:
                grad_z_TN[t, n] = i_TN[t, n] * r
                grad_f_TN[t, n] = -previous[n] * r
                grad_i_TN[t, n] = z_TN[t, n] * r
            running_N[n] = r - f_TN[t, n] * r


def _flat(x: Tensor | None) -> Any:
    """A numpy view (T, N) or (N,) of a contiguous tensor (T, B, H) or (B, H)."""
    return None if x is None else x.reshape(x.shape[0], -1).numpy() if x.dim() == 3 else x.reshape(-1).numpy()


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_TBG: Tensor, c_BH: Tensor, scale_TBH: Tensor | None, pooling: str):  # type: ignore[override]
        z_TBH, *rest = gates_TBG.chunk(GATES[pooling], dim=-1)
        z_TBH, (s_TBH, *rest) = z_TBH.tanh().contiguous(), [gate.sigmoid() for gate in rest]
        o_TBH = rest[0] if rest else None
        si_TBH = rest[1] if pooling == "ifo" else None
        f_TBH = (s_TBH if scale_TBH is None else s_TBH * scale_TBH).contiguous()
        i_TBH = si_TBH if si_TBH is None or scale_TBH is None else si_TBH * scale_TBH
        i_TBH = None if i_TBH is None else i_TBH.contiguous()
        c_BH, c_TBH = c_BH.contiguous(), torch.empty_like(z_TBH)
        _scan(_flat(z_TBH), _flat(f_TBH), _flat(i_TBH), _flat(c_BH), _flat(c_TBH))
        ctx.save_for_backward(z_TBH, s_TBH, f_TBH, o_TBH, si_TBH, i_TBH, c_TBH, c_BH, scale_TBH)
        return c_TBH.clone() if o_TBH is None else o_TBH * c_TBH, c_TBH[-1].clone()

    @staticmethod
    def backward(ctx, grad_h_TBH: Tensor, grad_last_BH: Tensor):  # type: ignore[override]
        z_TBH, s_TBH, f_TBH, o_TBH, si_TBH, i_TBH, c_TBH, c_BH, scale_TBH = ctx.saved_tensors
        grad_c_TBH = (grad_h_TBH if o_TBH is None else grad_h_TBH * o_TBH).contiguous()
        running_BH = grad_last_BH.contiguous().clone()
        grad_z_TBH, grad_f_TBH = torch.empty_like(z_TBH), torch.empty_like(f_TBH)
        grad_i_TBH = None if i_TBH is None else torch.empty_like(i_TBH)
        arrays = (z_TBH, f_TBH, i_TBH, c_TBH, c_BH, grad_c_TBH, running_BH, grad_z_TBH, grad_f_TBH, grad_i_TBH)
        _scan_backward(*(_flat(a) for a in arrays))
        scale = 1 if scale_TBH is None else scale_TBH
        parts = [grad_z_TBH * (1 - z_TBH * z_TBH), grad_f_TBH * scale * (s_TBH * (1 - s_TBH))]
        if o_TBH is not None:
            parts.append(grad_h_TBH * c_TBH * (o_TBH * (1 - o_TBH)))
        if grad_i_TBH is not None:
            parts.append(grad_i_TBH * scale * (si_TBH * (1 - si_TBH)))
        return torch.cat(parts, dim=-1), running_BH, None, None


def pool(
    gates_TBG: Tensor, c_BH: Tensor, scale: Tensor | float | None, pooling: str, bias_G: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH); the same as `reference.pool`, for CPU tensors; 16-bit types compute in fp32."""
    if bias_G is not None:
        gates_TBG = gates_TBG + bias_G.to(gates_TBG.dtype)
    if gates_TBG.shape[0] == 0:
        return gates_TBG.new_empty((0, *c_BH.shape)), c_BH
    if gates_TBG.dtype in (torch.bfloat16, torch.float16):
        scale = scale.float() if isinstance(scale, Tensor) else scale
        h_TBH, last_BH = pool(gates_TBG.float(), c_BH.float(), scale, pooling)
        return h_TBH.to(gates_TBG.dtype), last_BH.to(gates_TBG.dtype)
    scale = gates_TBG.new_full((1, 1, 1), scale) if isinstance(scale, float) else scale
    return _Pool.apply(gates_TBG, c_BH, scale, pooling)  # type: ignore[return-value]
