"""LSTM (Hochreiter & Schmidhuber 1997), computed by cuDNN or oneDNN."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from recurlm.config import ModelConfig
from recurlm.model.layers import cudnn
from recurlm.model.layers.base import LayerState, RecurrentLayer, uniform


class LSTM(RecurrentLayer):
    """Gates i, f, g, o; state (h_BH, c_BH). c_t = f c_{t-1} + i g;  h_t = o tanh c_t."""

    def __init__(self, input_size: int, hidden_size: int, generator: Generator):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        bound = hidden_size**-0.5
        self.weight_ih = uniform((4 * hidden_size, input_size), bound, generator)
        self.weight_hh = uniform((4 * hidden_size, hidden_size), bound, generator)
        self.bias_ih = uniform((4 * hidden_size,), bound, generator)
        self.bias_hh = uniform((4 * hidden_size,), bound, generator)

    @classmethod
    def build(cls, input_size: int, hidden_size: int, index: int, config: ModelConfig, generator: Generator) -> LSTM:
        return cls(input_size, hidden_size, generator)

    @property
    def droppable(self) -> nn.Parameter:
        return self.weight_hh

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        zeros = like.new_zeros(batch, self.hidden_size)
        return zeros, zeros

    def forward(
        self, x_TBI: Tensor, state: LayerState, weight: Tensor, generator: Generator | None
    ) -> tuple[Tensor, LayerState]:
        y_TBH, h_BH, c_BH = cudnn.run("lstm", x_TBI, state, [self.weight_ih, weight, self.bias_ih, self.bias_hh])
        return y_TBH, (h_BH, c_BH)
