"""GRU (Cho et al. 2014, the variant with the reset gate after the product), computed by cuDNN or oneDNN."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from recurlm.config import ModelConfig
from recurlm.model.dropout import Source
from recurlm.model.layers import gated
from recurlm.model.layers.base import LayerState, RecurrentLayer


def cell(x_BG: Tensor, r_BG: Tensor, state: LayerState) -> LayerState:
    """(h_BH,) after one step."""
    (xr_BH, xz_BH, xn_BH), (rr_BH, rz_BH, rn_BH) = x_BG.chunk(3, dim=-1), r_BG.chunk(3, dim=-1)
    n_BH = (xn_BH + (xr_BH + rr_BH).sigmoid() * rn_BH).tanh()
    return (n_BH + (xz_BH + rz_BH).sigmoid() * (state[0] - n_BH),)


class GRU(RecurrentLayer):
    """Gates r, z, n; state (h_BH,). h_t = (1 - z) n + z h_{t-1} with n = tanh(W x + r (U h_{t-1} + b))."""

    has_recurrent_product = True

    def __init__(self, input_size: int, hidden_size: int, zoneout: float, generator: Generator):
        super().__init__()
        self.input_size, self.hidden_size, self.zoneout = input_size, hidden_size, zoneout
        self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh = gated.weights(
            3, input_size, hidden_size, generator
        )

    @classmethod
    def build(cls, input_size: int, hidden_size: int, index: int, config: ModelConfig, generator: Generator) -> GRU:
        return cls(input_size, hidden_size, config.zoneout, generator)

    @property
    def droppable(self) -> nn.Parameter:
        return self.weight_hh

    def parts(self) -> dict[str, tuple[int, ...]]:
        return gated.parts(3)

    def pack(self) -> None:
        gated.pack("gru", [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh])

    def overlaps(self, batch: int) -> bool:
        return not self.zoneout

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        return (like.new_zeros(batch, self.hidden_size),)

    def forward(
        self, x_TBI: Tensor, state: LayerState, weight: Tensor, recurrent: float, generator: Source | None
    ) -> tuple[Tensor, LayerState]:
        weights = [self.weight_ih, weight, self.bias_ih, self.bias_hh]
        return gated.run("gru", cell, x_TBI, state, weights, recurrent, (self.zoneout,), generator)
