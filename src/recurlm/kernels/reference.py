"""The truth: each fast kernel's slow, obvious twin in plain torch, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def fo_pool(gates_TB3H: Tensor, c_BH: Tensor, scale_TBH: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h_TBH, last c_BH) of QRNN fo-pooling from pre-activations Z, F, O (in this order along the last axis).

    z = tanh Z, f = scale * sigmoid F, o = sigmoid O;  c_t = f_t z_t + (1 - f_t) c_{t-1};  h_t = o_t c_t.
    Bradbury et al. 2017 (Quasi-recurrent neural networks), eq. 4 with the f of awd-lstm-lm, which is their 1 - f.
    `scale` carries zoneout: a 0/1 mask in training, the constant 1 - p in evaluation, None for none.
    """
    z_TBH, f_TBH, o_TBH = gates_TB3H.chunk(3, dim=-1)
    z_TBH, f_TBH, o_TBH = z_TBH.tanh(), f_TBH.sigmoid(), o_TBH.sigmoid()
    if scale_TBH is not None:
        f_TBH = f_TBH * scale_TBH
    rows = []
    for z_BH, f_BH in zip(z_TBH, f_TBH, strict=True):
        c_BH = f_BH * z_BH + (1 - f_BH) * c_BH
        rows.append(c_BH)
    return o_TBH * torch.stack(rows), c_BH
