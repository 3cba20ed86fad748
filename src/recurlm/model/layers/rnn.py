"""The simple recurrent network (Elman 1990; Mikolov et al. 2010), with tanh or ReLU."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from recurlm.config import ModelConfig
from recurlm.model.dropout import Source
from recurlm.model.layers import gated
from recurlm.model.layers.base import LayerState, RecurrentLayer

CELLS: dict[str, gated.Cell] = {
    "tanh": lambda x_BG, r_BG, state: ((x_BG + r_BG).tanh(),),
    "relu": lambda x_BG, r_BG, state: ((x_BG + r_BG).relu(),),
}


class RNN(RecurrentLayer):
    """State (h_BH,). h_t = phi(W x_t + U h_{t-1} + b), phi = `nonlinearity`."""

    has_recurrent_product = True

    def __init__(self, input_size: int, hidden_size: int, nonlinearity: str, zoneout: float, generator: Generator):
        super().__init__()
        self.input_size, self.hidden_size, self.zoneout = input_size, hidden_size, zoneout
        self.nonlinearity = nonlinearity
        self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh = gated.weights(
            1, input_size, hidden_size, generator
        )

    @classmethod
    def build(cls, input_size: int, hidden_size: int, index: int, config: ModelConfig, generator: Generator) -> RNN:
        return cls(input_size, hidden_size, config.nonlinearity, config.zoneout, generator)

    @property
    def droppable(self) -> nn.Parameter:
        return self.weight_hh

    def parts(self) -> dict[str, tuple[int, ...]]:
        return gated.parts(1)

    def pack(self) -> None:
        gated.pack(f"rnn_{self.nonlinearity}", [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh])

    def overlaps(self, batch: int) -> bool:
        return not self.zoneout

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        return (like.new_zeros(batch, self.hidden_size),)

    def forward(
        self, x_TBI: Tensor, state: LayerState, weight: Tensor, recurrent: float, generator: Source | None
    ) -> tuple[Tensor, LayerState]:
        kind, cell = f"rnn_{self.nonlinearity}", CELLS[self.nonlinearity]
        weights = [self.weight_ih, weight, self.bias_ih, self.bias_hh]
        return gated.run(kind, cell, x_TBI, state, weights, recurrent, (self.zoneout,), generator)
