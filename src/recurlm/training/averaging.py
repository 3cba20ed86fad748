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
    """Sees every update and every validation loss; `weights` are the ones to validate."""

    @abstractmethod
    def __init__(self, config: AveragingConfig): ...

    @abstractmethod
    def update(self, parameters: list[nn.Parameter]) -> None:
        """Takes note of the weights after one update."""

    @abstractmethod
    def observe(self, losses: list[float]) -> bool:
        """Takes note of the validation losses so far, the newest last; True when averaging starts now."""

    @abstractmethod
    def weights(self) -> list[Tensor] | None:
        """The averaged weights in the parameters' order; None when the parameters themselves are meant."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) from which `restore` continues exactly."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continues from a saved `state`."""


class NoAveraging(Averaging):
    """The last weights."""

    def __init__(self, config: AveragingConfig):
        pass

    def update(self, parameters: list[nn.Parameter]) -> None:
        pass

    def observe(self, losses: list[float]) -> bool:
        return False

    def weights(self) -> list[Tensor] | None:
        return None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        pass


class NTASGD(Averaging):
    """Non-monotonically triggered averaged SGD (Merity, Keskar & Socher 2018, algorithm 1).

    With v_1 .. v_t the validation losses, averaging starts at t when t - 1 > n and v_t > min(v_1 .. v_{t-1-n});
    from then on `weights` is the mean of all iterates after the start. Every parameter takes part, and the
    update itself is untouched: the learning rate of a step is the one of that step.
    """

    def __init__(self, config: AveragingConfig):
        self.n = config.nonmono
        self.count = -1  # iterates in the mean; -1 before the start
        self.mean: list[Tensor] = []

    def update(self, parameters: list[nn.Parameter]) -> None:
        if self.count < 0:
            return
        self.count += 1
        values = [p.detach() for p in parameters]
        if self.count == 1:
            self.mean = [v.clone() for v in values]
        else:
            torch._foreach_lerp_(self.mean, values, 1.0 / self.count)

    def observe(self, losses: list[float]) -> bool:
        if self.count >= 0 or len(losses) - 1 <= self.n or losses[-1] <= min(losses[: len(losses) - 1 - self.n]):
            return False
        self.count = 0
        return True

    def weights(self) -> list[Tensor] | None:
        return self.mean or None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {str(i): mean for i, mean in enumerate(self.mean)}, {"count": self.count}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.mean = [tensors[str(i)] for i in range(len(tensors))]
        self.count = values["count"]


AVERAGING: dict[str, type[Averaging]] = {"none": NoAveraging, "nt-asgd": NTASGD}


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
