"""The contract of a recurrent layer, and the legend of shape suffixes.

T time, B batch, V vocabulary, E embedding, H hidden, I a layer's input size, G the gates' width, K experts, N rows (any
of T x B). x_TBI is a tensor of shape (T, B, I). Time-major inside; batch-first only at the edges and in states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from recurlm.config import ModelConfig
from recurlm.model.dropout import Source

LayerState = tuple[Tensor, ...]


def uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> nn.Parameter:
    """A parameter drawn from U(-bound, bound)."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


class RecurrentLayer(nn.Module, ABC):
    """One layer: reads x_TBI and a state, returns y_TBH and the state after the last step. Keeps nothing itself."""

    input_size: int
    hidden_size: int
    has_recurrent_product: ClassVar[bool] = False
    """Whether h enters a hidden-to-hidden product, on which `recurrent` dropout acts."""

    @classmethod
    @abstractmethod
    def build(
        cls, input_size: int, hidden_size: int, index: int, config: ModelConfig, generator: Generator
    ) -> RecurrentLayer:
        """The layer at position `index` (from 0) with fresh weights."""

    @property
    @abstractmethod
    def droppable(self) -> nn.Parameter:
        """The raw weight that weight drop acts on."""

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Of each weight by name, how many equal blocks its axes hold (gates by rows, inputs by columns); {}: unknown.

        Who names them promises that zeros added to the end of every block add units that stay 0 and change nothing.
        """
        return {}

    def pack(self) -> None:
        """Moves the weights, in place, to where the library that computes the layer wants them; by default nowhere."""

    def overlaps(self, batch: int) -> bool:
        """Whether parts of a window of `batch` rows may run on a lane (`model.lanes`): by a call that leaves others room."""
        return False

    @abstractmethod
    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        """The state before any input: batch-first tensors with the dtype and device of `like`."""

    @abstractmethod
    def forward(
        self, x_TBI: Tensor, state: LayerState, weight: Tensor, recurrent: float, generator: Source | None
    ) -> tuple[Tensor, LayerState]:
        """(y_TBH, state). `weight` stands in for `droppable`; `generator` is None in evaluation.

        `recurrent` is the probability of variational dropout on h. Weights are cast to the type of `x_TBI`, which
        is the compute type.
        """
