"""The contract of an output layer: hidden rows in, losses or probabilities of the next token out.

The embedding matrix is an argument, so that a head which shares it holds no reference to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Generator, Tensor, nn

from recurlm.config import ModelConfig
from recurlm.errors import ConfigError
from recurlm.model.dropout import Source


class HeadDropout(NamedTuple):
    """What a head drops of its own activations in a training pass; its rows are time-major, `batch` of them a step."""

    p: float
    batch: int
    source: Source


class Use(NamedTuple):
    """What a model is trained on, for a head whose structure depends on it."""

    counts_V: Callable[[], np.ndarray]
    """How often each id is in the training text; asked only when needed, for it takes a pass over the text."""
    rows: int
    """Predictions in a training step."""
    device: str
    """cpu or cuda."""


class Head(nn.Module, ABC):
    """Maps hidden_NH to a distribution over V tokens. Losses and probabilities are fp32 or wider, in nats."""

    tied: ClassVar[bool]
    """Whether the last layer must have the embedding's size."""

    @classmethod
    @abstractmethod
    def build(cls, vocab_size: int, hidden_size: int, config: ModelConfig, generator: Generator) -> Head:
        """The head with fresh weights; ConfigError when the sizes do not fit."""

    @classmethod
    def settle(cls, config: ModelConfig, hidden_size: int, use: Use) -> tuple[ModelConfig, str]:
        """(the settings with whatever the head chooses for this use written out, what it chose, as a sentence or '')."""
        return config, ""

    def blocks(self) -> dict[str, tuple[int, ...]]:
        """Of each weight by name, how many equal blocks its axes hold (see `RecurrentLayer.parts`); {}: unknown.

        Who names them promises that zeros at the end of the rows of `hidden_NH` and of the embedding, with weights padded
        to match, change nothing.
        """
        return {}

    def output(self, embedding_VE: Tensor) -> tuple[Tensor, Tensor] | None:
        """(W_VH, b_V) where the distribution is softmax(W h + b); None where it is not."""
        return None

    @abstractmethod
    def nll(
        self, hidden_NH: Tensor, targets_N: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None
    ) -> Tensor:
        """nll_N = -log p(target). On a GPU the host waits for nothing, and shapes do not depend on the targets."""

    @abstractmethod
    def log_probs(self, hidden_NH: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        """log_probs_NV; each row's exponentials sum to one. `dropout` as in `nll`."""

    def topk(self, hidden_NH: Tensor, k: int, embedding_VE: Tensor) -> tuple[Tensor, Tensor]:
        """(log_probs_NK, ids_NK) of the k most probable tokens, best first."""
        values_NK, ids_NK = self.log_probs(hidden_NH, embedding_VE).topk(k)
        return values_NK, ids_NK

    def sample(self, hidden_NH: Tensor, embedding_VE: Tensor, generator: Generator) -> Tensor:
        """ids_N drawn from the distribution; the generator is on the device of the rows."""
        return self.log_probs(hidden_NH, embedding_VE).exp().multinomial(1, generator=generator).squeeze(1)


def check_tied(head: str, hidden_size: int, config: ModelConfig) -> None:
    """None; ConfigError when rows of this size cannot be multiplied with the embedding."""
    if hidden_size != config.embedding_size:
        raise ConfigError(
            f"model.head = {head!r} needs a last layer of embedding_size = {config.embedding_size} units, "
            f"found {hidden_size}; change model.hidden_sizes or take another head."
        )
