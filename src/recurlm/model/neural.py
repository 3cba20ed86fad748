"""The neural language model: embedding -> recurrent layers -> head. State goes in and comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from recurlm.config import DropoutConfig, ModelConfig
from recurlm.errors import ConfigError, lookup
from recurlm.model import dropout as drop
from recurlm.model.embedding import AdaptiveEmbedding
from recurlm.model.heads import HEADS
from recurlm.model.heads.adaptive import tied_clusters
from recurlm.model.heads.base import HeadDropout
from recurlm.model.lanes import Lane, overlapped
from recurlm.model.layers import LAYERS
from recurlm.model.layers.base import uniform
from recurlm.model.precision import FP32, Precision, applied
from recurlm.protocol import State, StatefulModel

PARTS, LEAST_PART = 3, 4  # of a window whose layers overlap: their number, and steps at least
NO_DROPOUT = DropoutConfig(embedding=0, input=0, hidden=0, output=0, weight=0, recurrent=0, latent=0)


class Activations(NamedTuple):
    """What one forward pass gives: the last layer before and after its dropout, the state, and what the head is to drop."""

    raw_TBH: Tensor
    dropped_TBH: Tensor
    state: State
    head_dropout: HeadDropout | None = None


def layer_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Units of every layer: `hidden_sizes`, or hidden_size with a last layer that fits a tied head."""
    if config.hidden_sizes:
        return config.hidden_sizes
    tied = lookup(HEADS, config.head, "model.head").tied
    last = config.embedding_size if tied else config.hidden_size
    return (config.hidden_size,) * (config.num_layers - 1) + (last,)


def _embedding(config: ModelConfig, vocab_size: int, generator: Generator) -> nn.Parameter | AdaptiveEmbedding:
    """The input vectors: a matrix, or with `adaptive_inputs` one with smaller vectors for rarer words."""
    if not config.adaptive_inputs:
        return uniform((vocab_size, config.embedding_size), config.init_range, generator)
    head = config.base if config.head == "mixture" else config.head
    if head != "tied-adaptive":
        raise ConfigError(
            "model.adaptive_inputs = true shares the clusters of a head; it needs head = 'tied-adaptive'."
        )
    bounds, sizes = tied_clusters(config, vocab_size)
    return AdaptiveEmbedding(bounds, sizes, config.init_range, generator)


class NeuralModel(nn.Module, StatefulModel):
    """A recurrent language model with fp32 weights and an explicit precision, which `advance` and `score` apply."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        generator: Generator,
        how: Precision = FP32,
    ):
        super().__init__()
        layer, head = lookup(LAYERS, config.layer, "model.layer"), lookup(HEADS, config.head, "model.head")
        self.config, self.vocab_size, self.precision, self.backward = config, vocab_size, how, config.backward
        sizes = layer_sizes(config)
        inputs = (config.embedding_size, *sizes[:-1])
        self.embedding = _embedding(config, vocab_size, generator)
        self.layers = nn.ModuleList(
            layer.build(i, h, n, config, generator) for n, (i, h) in enumerate(zip(inputs, sizes, strict=True))
        )
        self.head = head.build(vocab_size, sizes[-1], config, generator)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def initial_state(self, batch: int) -> State:
        like = torch.empty(0, dtype=self._dtype(), device=self.device)
        return tuple(layer.initial_state(batch, like) for layer in self.layers)  # type: ignore[operator]

    def _dtype(self) -> torch.dtype:
        """The compute type; a model in float64 (tests) computes in float64."""
        return torch.float64 if next(self.parameters()).dtype == torch.float64 else self.precision.dtype

    def forward(
        self,
        ids_TB: Tensor,
        state: State,
        dropout: DropoutConfig | None = None,
        generator: drop.Source | None = None,
        lanes: Sequence[Lane] = (),
    ) -> Activations:
        """The activations for `ids_TB`. With `dropout` and `generator` it is a training pass, without an evaluation.

        With `lanes`, one a layer, the layers overlap in PARTS parts of the window (see `model.lanes`), which pays from
        LEAST_PART steps a part on.
        """
        p = dropout if dropout is not None and generator is not None else NO_DROPOUT
        noise = generator if dropout is not None else None
        head_dropout = None if noise is None or p.latent == 0 else HeadDropout(p.latent, ids_TB.shape[1], noise)
        x = drop.embed(ids_TB, self.embedding, p.embedding, p.input, self._dtype(), noise)
        if lanes and isinstance(noise, drop.Noise):
            out = overlapped(list(self.layers), x, state, p, noise, lanes, PARTS)  # type: ignore[arg-type]
            return Activations(*out, head_dropout)
        raw, states = x, []
        for n, (layer, layer_state) in enumerate(zip(self.layers, state, strict=True)):
            weight = drop.weight_drop(layer.droppable, p.weight, noise)  # type: ignore[arg-type]
            raw, new_state = layer(x, layer_state, weight, p.recurrent, noise)
            x = drop.locked(raw, p.hidden if n < len(self.layers) - 1 else p.output, noise)
            states.append(new_state)
        return Activations(raw, x, tuple(states), head_dropout)

    def vectors(self) -> Tensor:
        """The input vector of every word, x_VE."""
        return self.embedding if isinstance(self.embedding, Tensor) else self.embedding.matrix()

    def nll(self, hidden_TBH: Tensor, targets_TB: Tensor, dropout: HeadDropout | None = None) -> Tensor:
        """nll_TB of the targets given the last layer's output; `dropout` is the head's own, in a training pass."""
        rows_NH, targets_N = hidden_TBH.flatten(0, 1), targets_TB.flatten()
        nll_N = self.head.nll(rows_NH, targets_N, self.embedding, dropout)  # type: ignore[operator]
        return nll_N.view(targets_TB.shape)

    def read(self, ids_TB: Tensor, state: State, targets_TB: Tensor | None = None) -> tuple[Tensor, Tensor, State]:
        """(hidden_TBH, nll_TB of the targets or, without them, log_probs_TBV, state after the last input)."""
        with applied(self.precision):
            out = self(ids_TB, state)
            if targets_TB is not None:
                return out.raw_TBH, self.nll(out.raw_TBH, targets_TB), out.state
            log_probs_NV = self.head.log_probs(out.raw_TBH.flatten(0, 1), self.embedding)  # type: ignore[operator]
        return out.raw_TBH, log_probs_NV.view(*ids_TB.shape, self.vocab_size), out.state

    def advance(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        return self.read(ids_TB, state)[1:]

    def score(self, ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        return self.read(ids_TB, state, targets_TB)[1:]
