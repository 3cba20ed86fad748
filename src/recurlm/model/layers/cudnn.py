"""The gated layers that torch and cuDNN compute: one call for the whole sequence."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# True of every call here, and meant: see `run`.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")

CUDNN_MODE = {"lstm": 2, "gru": 3}  # cudnnRNNMode_t


def run(kind: str, x_TBI: Tensor, state: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
    """(y_TBH, *new state) of one LSTM or GRU layer; weights are W_ih, W_hh, b_ih, b_hh in torch's gate order.

    cuDNN is called below torch's module, which expects weights as views of one flat buffer; a dropped weight
    never is one, so cuDNN packs them at each call.
    """
    weights = [w.to(x_TBI.dtype) for w in weights]
    hidden = [leaf.unsqueeze(0) for leaf in state]
    training = torch.is_grad_enabled()
    if x_TBI.is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available():
        size = state[0].shape[-1]
        cell = hidden[1].contiguous() if len(hidden) > 1 else None
        out = torch._cudnn_rnn(
            x_TBI, weights, 4, None, hidden[0].contiguous(), cell, CUDNN_MODE[kind], size, 0, 1, False, 0.0,
            training, False, [], None,
        )  # fmt: skip
        return (out[0], *(leaf.squeeze(0) for leaf in out[1 : 1 + len(hidden)]))
    if kind == "lstm":
        y, h, c = torch.lstm(x_TBI, hidden, weights, True, 1, 0.0, training, False, False)
        return y, h.squeeze(0), c.squeeze(0)
    y, h = torch.gru(x_TBI, hidden[0], weights, True, 1, 0.0, training, False, False)
    return y, h.squeeze(0)
