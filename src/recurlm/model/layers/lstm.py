"""LSTM (Hochreiter & Schmidhuber 1997), computed by cuDNN or oneDNN."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from recurlm import kernels
from recurlm.config import ModelConfig
from recurlm.model.dropout import Source
from recurlm.model.layers import gated
from recurlm.model.layers.base import LayerState, RecurrentLayer


def cell(x_BG: Tensor, r_BG: Tensor, state: LayerState) -> LayerState:
    """(h_BH, c_BH) after one step."""
    if x_BG.is_cuda:  # one kernel in place of a dozen
        h_BH, c_BH, _ = torch.ops.aten._thnn_fused_lstm_cell(x_BG, r_BG, state[1])
        return h_BH, c_BH
    i_BH, f_BH, g_BH, o_BH = (x_BG + r_BG).chunk(4, dim=-1)
    c_BH = f_BH.sigmoid() * state[1] + i_BH.sigmoid() * g_BH.tanh()
    return o_BH.sigmoid() * c_BH.tanh(), c_BH


class LSTM(RecurrentLayer):
    """Gates i, f, g, o; state (h_BH, c_BH). c_t = f c_{t-1} + i g;  h_t = o tanh c_t.

    Zoneout keeps a unit of c with probability `zoneout` and one of h with `zoneout_hidden`.
    """

    has_recurrent_product = True

    def __init__(self, input_size: int, hidden_size: int, zoneout: tuple[float, float], generator: Generator):
        super().__init__()
        self.input_size, self.hidden_size, self.zoneout = input_size, hidden_size, zoneout
        self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh = gated.weights(
            4, input_size, hidden_size, generator
        )

    @classmethod
    def build(cls, input_size: int, hidden_size: int, index: int, config: ModelConfig, generator: Generator) -> LSTM:
        return cls(input_size, hidden_size, (config.zoneout_hidden, config.zoneout), generator)

    @property
    def droppable(self) -> nn.Parameter:
        return self.weight_hh

    def parts(self) -> dict[str, tuple[int, ...]]:
        return gated.parts(4)

    def pack(self) -> None:
        gated.pack("lstm", [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh])

    def overlaps(self, batch: int) -> bool:
        weight = self.weight_hh
        return not any(self.zoneout) and not kernels.lstm_is_resident(
            self.hidden_size, batch, weight.dtype, weight.device
        )

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        zeros = like.new_zeros(batch, self.hidden_size)
        return zeros, zeros

    def forward(
        self, x_TBI: Tensor, state: LayerState, weight: Tensor, recurrent: float, generator: Source | None
    ) -> tuple[Tensor, LayerState]:
        weights = [self.weight_ih, weight, self.bias_ih, self.bias_hh]
        return gated.run("lstm", cell, x_TBI, state, weights, recurrent, self.zoneout, generator)
