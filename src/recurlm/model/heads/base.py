"""The contract of an output layer: hidden rows in, losses or probabilities of the next token out.

The embedding matrix is an argument, so that a head which shares it holds no reference to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Generator, Tensor, nn

from recurlm.config import ModelConfig


class Head(nn.Module, ABC):
    """Maps hidden_NH to a distribution over V tokens. Losses and probabilities are fp32, in nats."""

    tied: ClassVar[bool]
    """Whether the last layer must have the embedding's size."""

    @classmethod
    @abstractmethod
    def build(cls, vocab_size: int, hidden_size: int, config: ModelConfig, generator: Generator) -> Head:
        """The head with fresh weights; ConfigError when the sizes do not fit."""

    @abstractmethod
    def nll(self, hidden_NH: Tensor, targets_N: Tensor, embedding_VE: Tensor) -> Tensor:
        """nll_N = -log p(target)."""

    @abstractmethod
    def log_probs(self, hidden_NH: Tensor, embedding_VE: Tensor) -> Tensor:
        """log_probs_NV; each row's exponentials sum to one."""

    def topk(self, hidden_NH: Tensor, k: int, embedding_VE: Tensor) -> tuple[Tensor, Tensor]:
        """(log_probs_NK, ids_NK) of the k most probable tokens, best first."""
        values_NK, ids_NK = self.log_probs(hidden_NH, embedding_VE).topk(k)
        return values_NK, ids_NK
