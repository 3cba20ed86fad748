"""QRNN (Bradbury et al. 2017): a convolution over time for the gates, then f-, fo- or ifo-pooling."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from recurlm import kernels
from recurlm.config import ModelConfig
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
        # On a GPU the pooling adds the bias and sums its gradient, in a pass over the gates that it makes anyway.
        added, pooled = (None, self.bias) if x_TBI.is_cuda else (self.bias.to(x_TBI.dtype), None)
        if self.window == 1:
            gates_TBG = linear(x_TBI, weight, added)
            carried: tuple[Tensor, ...] = ()
        else:
            past_TBI = torch.cat((state[1].transpose(0, 1), x_TBI))
            first, *others = (
                linear(past_TBI[start : start + T], part)
                for start, part in zip(range(self.window)[::-1], weight.split(self.input_size, dim=1), strict=True)
            )
            gates_TBG = first if added is None else added + first
            for product_TBG in others:
                gates_TBG = gates_TBG + product_TBG
            carried = (past_TBI[T:].transpose(0, 1),)
        h_TBH, c_BH = kernels.pool(gates_TBG, state[0], self._scale(x_TBI, generator), self.pooling, pooled)
        return h_TBH, (c_BH, *carried)
