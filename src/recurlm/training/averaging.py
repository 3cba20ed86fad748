"""Which weights are validated and kept: the last ones, or a mean of iterates."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurlm.config import AveragingConfig


def nonmonotone(losses: Sequence[float], n: int) -> bool:
    """Whether the newest loss is worse than the best of all but the n before it (Merity, Keskar & Socher 2018, algorithm 1)."""
    return len(losses) - 1 > n and losses[-1] > min(losses[: len(losses) - 1 - n])


class Averaging(ABC):
    """Sees every update and every validation loss; `weights` are the ones to validate.

    When the mean starts, and starts afresh, is a matter of the settings; a subclass says how the newest iterate enters.
    """

    own_trigger = "share"

    def __init__(self, config: AveragingConfig):
        self.config = config
        self.trigger = self.own_trigger if config.trigger == "auto" else config.trigger
        self.count = -1  # iterates in the mean; -1 before the start
        self.since = -1  # validations before the mean's first one
        self.mean: list[Tensor] = []

    @abstractmethod
    def newest_weight(self, count: int) -> float:
        """The weight of the newest iterate in the mean of `count` iterates (2 or more)."""

    def starts(self, share: float) -> bool:
        """Whether averaging starts when this share of training is done."""
        return self.trigger == "share" and share >= self.config.start

    def triggered(self, losses: list[float]) -> bool:
        """Whether averaging starts, or starts afresh, after these validation losses, the newest last.

        With v_1 .. v_t the losses, it starts at t when t - 1 > nonmono and v_t > min(v_1 .. v_{t-1-nonmono}), and when
        that was so at the `patience` validations before as well.
        """
        if self.count >= 0:
            return self.config.restart > 0 and nonmonotone(losses[max(0, self.since) :], self.config.restart)
        newest = (losses[: len(losses) - k] for k in range(self.config.patience + 1))
        return self.trigger == "nonmono" and all(nonmonotone(some, self.config.nonmono) for some in newest)

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
        """Takes note of the validation losses so far, the newest last; True when averaging starts (afresh) now."""
        if self.count > 0 and self.since < 0:
            self.since = len(losses) - 1
        if not self.triggered(losses):
            return False
        self.count, self.since = 0, len(losses)
        return True

    def weights(self) -> list[Tensor] | None:
        """The averaged weights in the parameters' order; None when the parameters themselves are meant."""
        return self.mean or None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) from which `restore` continues exactly."""
        return {str(i): mean for i, mean in enumerate(self.mean)}, {"count": self.count, "since": self.since}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continues from a saved `state`."""
        self.mean = [tensors[str(i)] for i in range(len(tensors))]
        self.count, self.since = values["count"], values.get("since", -1)


class NoAveraging(Averaging):
    """The last weights: it never starts."""

    own_trigger = "never"

    def __init__(self, config: AveragingConfig):
        super().__init__(config)
        self.trigger = self.own_trigger

    def newest_weight(self, count: int) -> float:
        return 1.0


class NTASGD(Averaging):
    """Non-monotonically triggered averaged SGD (Merity, Keskar & Socher 2018, algorithm 1).

    From the trigger on `weights` is the mean of all iterates. Every parameter takes part, and the update itself is
    untouched: the learning rate of a step is the one of that step.
    """

    own_trigger = "nonmono"

    def newest_weight(self, count: int) -> float:
        return 1.0 / count


class EMA(Averaging):
    """Exponential moving average: `decay` of the mean and 1 - decay of the newest iterate.

    While fewer than 1 / (1 - decay) iterates are in it, it is their plain mean, so that the first one weighs no more.
    """

    def newest_weight(self, count: int) -> float:
        return max(1.0 - self.config.decay, 1.0 / count)


class SWA(Averaging):
    """Stochastic weight averaging (Izmailov et al. 2018): the mean of the first iterate and of those after every
    `every`-th update."""

    def takes(self, step: int) -> bool:
        return step % self.config.every == 0

    def newest_weight(self, count: int) -> float:
        return 1.0 / count


class Tail(Averaging):
    """A mean that forgets: polynomial-decay averaging (Shamir & Zhang 2013, eq. 2).

    The t-th iterate enters with weight (g + 1) / (t + g), g = `forget`: 0 is the plain mean, larger g weighs the
    last 1 / (g + 1) or so of the iterates most.
    """

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
