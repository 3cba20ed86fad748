"""fo-pooling on the CPU: torch's vectorised activations around a compiled scan over time."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


@numba.njit(cache=True, nogil=True)
def _scan(z_TN: np.ndarray, f_TN: np.ndarray, c_N: np.ndarray, out_TN: np.ndarray) -> None:
    for t in range(z_TN.shape[0]):
        previous = c_N if t == 0 else out_TN[t - 1]
        for n in range(z_TN.shape[1]):
            out_TN[t, n] = previous[n] + f_TN[t, n] * (z_TN[t, n] - previous[n])


@numba.njit(cache=True, nogil=True)
def _scan_backward(
    z_TN: np.ndarray,
    f_TN: np.ndarray,
    c_TN: np.ndarray,
    c_N: np.ndarray,
    grad_TN: np.ndarray,
    running_N: np.ndarray,
    grad_z_TN: np.ndarray,
    grad_f_TN: np.ndarray,
) -> None:
    """Fills grad_z and grad_f; `running_N` enters as the gradient of the last c and leaves as that of the first."""
    for t in range(z_TN.shape[0] - 1, -1, -1):
        previous = c_N if t == 0 else c_TN[t - 1]
        for n in range(z_TN.shape[1]):
            r = running_N[n] + grad_TN[t, n]
            grad_z_TN[t, n] = f_TN[t, n] * r
            grad_f_TN[t, n] = (z_TN[t, n] - previous[n]) * r
            running_N[n] = r - f_TN[t, n] * r


def _flat(x: Tensor) -> np.ndarray:
    """A numpy view (T, N) or (N,) of a contiguous tensor (T, B, H) or (B, H)."""
    return x.reshape(x.shape[0], -1).numpy() if x.dim() == 3 else x.reshape(-1).numpy()


class _FoPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_TB3H: Tensor, c_BH: Tensor, scale_TBH: Tensor | None):  # type: ignore[override]
        z_TBH, f_TBH, o_TBH = gates_TB3H.chunk(3, dim=-1)
        z_TBH, s_TBH, o_TBH = z_TBH.tanh(), f_TBH.sigmoid(), o_TBH.sigmoid()
        f_TBH = s_TBH if scale_TBH is None else s_TBH * scale_TBH
        z_TBH, f_TBH, c_BH = z_TBH.contiguous(), f_TBH.contiguous(), c_BH.contiguous()
        c_TBH = torch.empty_like(z_TBH)
        _scan(_flat(z_TBH), _flat(f_TBH), _flat(c_BH), _flat(c_TBH))
        ctx.save_for_backward(z_TBH, s_TBH, o_TBH, f_TBH, c_TBH, c_BH, scale_TBH)
        return o_TBH * c_TBH, c_TBH[-1].clone()

    @staticmethod
    def backward(ctx, grad_h_TBH: Tensor, grad_last_BH: Tensor):  # type: ignore[override]
        z_TBH, s_TBH, o_TBH, f_TBH, c_TBH, c_BH, scale_TBH = ctx.saved_tensors
        grad_o_TBH = grad_h_TBH * c_TBH
        grad_c_TBH = (grad_h_TBH * o_TBH).contiguous()
        running_BH = grad_last_BH.contiguous().clone()
        grad_z_TBH, grad_f_TBH = torch.empty_like(z_TBH), torch.empty_like(f_TBH)
        arrays = (z_TBH, f_TBH, c_TBH, c_BH, grad_c_TBH, running_BH, grad_z_TBH, grad_f_TBH)
        _scan_backward(*(_flat(a) for a in arrays))
        if scale_TBH is not None:
            grad_f_TBH = grad_f_TBH * scale_TBH
        grad_gates_TB3H = torch.cat(
            (
                grad_z_TBH * (1 - z_TBH * z_TBH),
                grad_f_TBH * (s_TBH * (1 - s_TBH)),
                grad_o_TBH * (o_TBH * (1 - o_TBH)),
            ),
            dim=-1,
        )
        return grad_gates_TB3H, running_BH, None


def fo_pool(gates_TB3H: Tensor, c_BH: Tensor, scale_TBH: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH); the same as `reference.fo_pool`, for CPU tensors; 16-bit types compute in fp32."""
    if gates_TB3H.shape[0] == 0:
        return gates_TB3H.new_empty((0, *c_BH.shape)), c_BH
    if gates_TB3H.dtype in (torch.bfloat16, torch.float16):
        scale = None if scale_TBH is None else scale_TBH.float()
        h_TBH, last_BH = fo_pool(gates_TB3H.float(), c_BH.float(), scale)
        return h_TBH.to(gates_TB3H.dtype), last_BH.to(gates_TB3H.dtype)
    return _FoPool.apply(gates_TB3H, c_BH, scale_TBH)  # type: ignore[return-value]
