"""QRNN (Bradbury et al. 2017): a convolution over time for the gates, then f-, fo- or ifo-pooling."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from recurlm import kernels
from recurlm.config import ModelConfig
from recurlm.kernels.window import window
from recurlm.model import dropout as drop
from recurlm.model.dropout import Source
from recurlm.model.layers.base import LayerState, RecurrentLayer, uniform


class QRNN(RecurrentLayer):
    """Gates Z, F, O, I (as the pooling needs) from [x_t ; x_{t-1} ; ...] (window inputs); state (c_BH,) or (c_BH, previous_BWI).

    The carried c is the one before the output gate. `previous` holds the last window - 1 inputs, oldest first;
    a zero stands for an input before the text. Weight drop acts on the whole input weight.
    """

    def __init__(
        self, input_size: int, hidden_size: int, window: int, pooling: str, zoneout: float, generator: Generator
    ):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.window, self.pooling, self.zoneout = window, pooling, zoneout
        bound, gates = (window * input_size) ** -0.5, kernels.GATES[pooling] * hidden_size
        self.weight = uniform((gates, window * input_size), bound, generator)
        self.bias = uniform((gates,), bound, generator)

    @classmethod
    def build(cls, input_size: int, hidden_size: int, index: int, config: ModelConfig, generator: Generator) -> QRNN:
        window = config.windows[index] if index < len(config.windows) else 1
        return cls(input_size, hidden_size, window, config.pooling, config.zoneout, generator)

    @property
    def droppable(self) -> nn.Parameter:
        return self.weight

    def parts(self) -> dict[str, tuple[int, ...]]:
        gates = kernels.GATES[self.pooling]
        return {"weight": (gates, self.window), "bias": (gates,)}

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        c_BH = like.new_zeros(batch, self.hidden_size)
        if self.window == 1:
            return (c_BH,)
        return c_BH, like.new_zeros(batch, self.window - 1, self.input_size)

    def _scale(self, x_TBI: Tensor, generator: Source | None) -> Tensor | float | None:
        if self.zoneout == 0:
            return None
        if generator is None:
            return 1 - self.zoneout
        return drop.bernoulli((*x_TBI.shape[:2], self.hidden_size), 1 - self.zoneout, x_TBI, generator, x_TBI.dtype)

    def forward(
        self, x_TBI: Tensor, state: LayerState, weight: Tensor, recurrent: float, generator: Source | None
    ) -> tuple[Tensor, LayerState]:
        weight, T = weight.to(x_TBI.dtype), x_TBI.shape[0]
        if self.window == 1:
            gates_TBG = linear(x_TBI, weight)
            carried: tuple[Tensor, ...] = ()
        else:
            gates_TBG = window(x_TBI, state[1].transpose(0, 1), weight)
            last_BWI = x_TBI[max(0, T - self.window + 1) :].transpose(0, 1)
            carried = (torch.cat((state[1][:, last_BWI.shape[1] :], last_BWI), dim=1),)
        h_TBH, c_BH = kernels.pool(gates_TBG, state[0], self._scale(x_TBI, generator), self.pooling, self.bias)
        return h_TBH, (c_BH, *carried)
