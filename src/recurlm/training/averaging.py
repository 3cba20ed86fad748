"""Which weights are validated and kept: the last ones, or a mean of iterates."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recurlm.config import AveragingConfig


class Averaging(ABC):
    """Sees every update and every validation loss; `weights` are the ones to validate.

    A subclass says when it starts (never, unless it overrides one of the two) and how the newest iterate enters.
    """

    def __init__(self, config: AveragingConfig):
        self.config = config
        self.count = -1  # iterates in the mean; -1 before the start
        self.mean: list[Tensor] = []

    @abstractmethod
    def newest_weight(self, count: int) -> float:
        """The weight of the newest iterate in the mean of `count` iterates (2 or more)."""

    def starts(self, share: float) -> bool:
        """Whether averaging starts when this share of training is done."""
        return False

    def triggered(self, losses: list[float]) -> bool:
        """Whether averaging starts after these validation losses, the newest last."""
        return False

    def takes(self, step: int) -> bool:
        """Whether the iterate after `step` updates enters the mean; the first one always does."""
        return True

    def enters(self, step: int, share: float) -> float:
        """The weight with which the iterate after `step` updates enters the mean, and counts it; 0: it does not."""
        if self.count < 0 and self.starts(share):
            self.count = 0
        if self.count < 0 or (self.count > 0 and not self.takes(step)):
            return 0.0
        self.count += 1
        return 1.0 if self.count == 1 else self.newest_weight(self.count)

    def move(self, parameters: list[nn.Parameter], weight: float) -> None:
        """Moves the mean towards the parameters by `weight` of the way."""
        if weight == 0:
            return
        values = [p.detach() for p in parameters]
        if self.count == 1:
            self.mean = [v.clone() for v in values]
        else:
            torch._foreach_lerp_(self.mean, values, weight)

    def observe(self, losses: list[float]) -> bool:
        """Takes note of the validation losses so far, the newest last; True when averaging starts now."""
        if self.count >= 0 or not self.triggered(losses):
            return False
        self.count = 0
        return True

    def weights(self) -> list[Tensor] | None:
        """The averaged weights in the parameters' order; None when the parameters themselves are meant."""
        return self.mean or None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) from which `restore` continues exactly."""
        return {str(i): mean for i, mean in enumerate(self.mean)}, {"count": self.count}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continues from a saved `state`."""
        self.mean = [tensors[str(i)] for i in range(len(tensors))]
        self.count = values["count"]


class NoAveraging(Averaging):
    """The last weights: it never starts."""

    def newest_weight(self, count: int) -> float:
        return 1.0


class NTASGD(Averaging):
    """Non-monotonically triggered averaged SGD (Merity, Keskar & Socher 2018, algorithm 1).

    With v_1 .. v_t the validation losses, averaging starts at t when t - 1 > n and v_t > min(v_1 .. v_{t-1-n});
    from then on `weights` is the mean of all iterates after the start. Every parameter takes part, and the
    update itself is untouched: the learning rate of a step is the one of that step.
    """

    def triggered(self, losses: list[float]) -> bool:
        n = self.config.nonmono
        return len(losses) - 1 > n and losses[-1] > min(losses[: len(losses) - 1 - n])

    def newest_weight(self, count: int) -> float:
        return 1.0 / count


class EMA(Averaging):
    """Exponential moving average from the share `start` on: `decay` of the mean and 1 - decay of the newest iterate.

    While fewer than 1 / (1 - decay) iterates are in it, it is their plain mean, so that the first one weighs no more.
    """

    def starts(self, share: float) -> bool:
        return share >= self.config.start

    def newest_weight(self, count: int) -> float:
        return max(1.0 - self.config.decay, 1.0 / count)


class SWA(Averaging):
    """Stochastic weight averaging (Izmailov et al. 2018): the mean of the first iterate from the share `start` on and of
    those after every `every`-th update."""

    def starts(self, share: float) -> bool:
        return share >= self.config.start

    def takes(self, step: int) -> bool:
        return step % self.config.every == 0

    def newest_weight(self, count: int) -> float:
        return 1.0 / count


class Tail(Averaging):
    """A mean that forgets, from the share `start` on: polynomial-decay averaging (Shamir & Zhang 2013, eq. 2).

    The t-th iterate enters with weight (g + 1) / (t + g), g = `forget`: 0 is the plain mean, larger g weighs the
    last 1 / (g + 1) or so of the iterates most.
    """

    def starts(self, share: float) -> bool:
        return share >= self.config.start

    def newest_weight(self, count: int) -> float:
        g = self.config.forget
        return (g + 1) / (count + g)


AVERAGING: dict[str, type[Averaging]] = {"none": NoAveraging, "nt-asgd": NTASGD, "ema": EMA, "swa": SWA, "tail": Tail}


@contextlib.contextmanager
def applied(averaging: Averaging, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Puts the averaged weights into the parameters and the raw ones back afterwards."""
    mean = averaging.weights()
    if mean is None:
        yield
        return
    raw = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(list[Tensor](parameters), mean)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](parameters), raw)
