"""The full softmax, with a matrix of its own or with the embedding's (tied)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from recurlm.config import ModelConfig
from recurlm.kernels import linear_cross_entropy
from recurlm.kernels.reference import linear_log_softmax
from recurlm.model.heads.base import Head, HeadDropout, check_tied
from recurlm.model.layers.base import uniform


class SoftmaxHead(Head):
    """softmax(W h + b) with its own W."""

    tied = False

    def __init__(self, vocab_size: int, hidden_size: int, bound: float, generator: Generator):
        super().__init__()
        self.weight = uniform((vocab_size, hidden_size), bound, generator)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    @classmethod
    def build(cls, vocab_size: int, hidden_size: int, config: ModelConfig, generator: Generator) -> SoftmaxHead:
        return cls(vocab_size, hidden_size, config.init_range, generator)

    def blocks(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (1, 1), "bias": (1,)}

    def output(self, embedding_VE: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    def nll(
        self, hidden_NH: Tensor, targets_N: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None
    ) -> Tensor:
        return linear_cross_entropy(hidden_NH, self.weight, self.bias, targets_N)

    def log_probs(self, hidden_NH: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        return linear_log_softmax(hidden_NH, self.weight, self.bias)


class TiedHead(Head):
    """softmax(E h + b): the embedding matrix E is the output matrix (Inan et al. 2017; Press & Wolf 2017)."""

    tied = True

    def __init__(self, vocab_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    @classmethod
    def build(cls, vocab_size: int, hidden_size: int, config: ModelConfig, generator: Generator) -> TiedHead:
        check_tied("tied", hidden_size, config)
        return cls(vocab_size)

    def blocks(self) -> dict[str, tuple[int, ...]]:
        return {"bias": (1,)}

    def output(self, embedding_VE: Tensor) -> tuple[Tensor, Tensor]:
        return embedding_VE, self.bias

    def nll(
        self, hidden_NH: Tensor, targets_N: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None
    ) -> Tensor:
        return linear_cross_entropy(hidden_NH, embedding_VE, self.bias, targets_N)

    def log_probs(self, hidden_NH: Tensor, embedding_VE: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        return linear_log_softmax(hidden_NH, embedding_VE, self.bias)
