"""What every language model answers, neural or n-gram: ids in, log-probabilities out, state as a value.

Shapes: T time, B batch, V vocabulary. A state is a nest of tuples of tensors, batch first in every leaf.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = Any  # Tensor | tuple[State, ...]; never mutated, so it can be kept, compared, saved and branched from


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The same nest with `function` applied to every tensor."""
    if isinstance(state, tuple):
        return tuple(map_state(function, part) for part in state)
    return function(state)


def state_leaves(state: State) -> list[Tensor]:
    """The tensors of a state, depth first."""
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in state_leaves(part)]
    return [state]


def detach(state: State) -> State:
    """The state without its gradient history (truncated back-propagation)."""
    return map_state(Tensor.detach, state)


class StatefulModel(ABC):
    """A language model over ids. `vocab_size` bounds the ids that it takes and scores."""

    vocab_size: int
    backward: bool = False
    """Whether it reads text from its end to its start; the ids that it is given are in that order."""

    @abstractmethod
    def initial_state(self, batch: int) -> State:
        """The state before any input, for `batch` rows."""

    @abstractmethod
    def advance(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        """(log_probs_TBV of the next token after each input, state after the last input)."""

    @abstractmethod
    def score(self, ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        """(nll_TB of `targets_TB` in nats, state after the last input), without building V where it need not."""

    def select(self, state: State, index_B: Tensor) -> State:
        """The state's rows `index_B`: reorders, repeats or drops rows."""
        return map_state(lambda leaf: leaf.index_select(0, index_B.to(leaf.device)), state)

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return torch.device("cpu")
