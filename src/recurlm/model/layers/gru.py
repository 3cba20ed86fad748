"""GRU (Cho et al. 2014, the variant with the reset gate after the product), computed by cuDNN or oneDNN."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from recurlm.config import ModelConfig
from recurlm.model.layers import cudnn
from recurlm.model.layers.base import LayerState, RecurrentLayer, uniform


class GRU(RecurrentLayer):
    """Gates r, z, n; state (h_BH,). h_t = (1 - z) n + z h_{t-1} with n = tanh(W x + r (U h_{t-1} + b))."""

    def __init__(self, input_size: int, hidden_size: int, generator: Generator):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        bound = hidden_size**-0.5
        self.weight_ih = uniform((3 * hidden_size, input_size), bound, generator)
        self.weight_hh = uniform((3 * hidden_size, hidden_size), bound, generator)
        self.bias_ih = uniform((3 * hidden_size,), bound, generator)
        self.bias_hh = uniform((3 * hidden_size,), bound, generator)

    @classmethod
    def build(cls, input_size: int, hidden_size: int, index: int, config: ModelConfig, generator: Generator) -> GRU:
        return cls(input_size, hidden_size, generator)

    @property
    def droppable(self) -> nn.Parameter:
        return self.weight_hh

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        return (like.new_zeros(batch, self.hidden_size),)

    def forward(
        self, x_TBI: Tensor, state: LayerState, weight: Tensor, generator: Generator | None
    ) -> tuple[Tensor, LayerState]:
        y_TBH, h_BH = cudnn.run("gru", x_TBI, state, [self.weight_ih, weight, self.bias_ih, self.bias_hh])
        return y_TBH, (h_BH,)
