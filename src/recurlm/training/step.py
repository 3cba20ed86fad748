"""One training step as the host sees it: an order goes in, and its numbers are read, at once or later."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch

from recurlm.config import Config
from recurlm.model.neural import NeuralModel
from recurlm.protocol import State, detach
from recurlm.text.batches import Window
from recurlm.training import objective
from recurlm.training.averaging import Averaging
from recurlm.training.cursor import seed_for_step


class Order(NamedTuple):
    """What the host decides of one step."""

    step: int
    """Updates before it."""
    window: Window
    position: int
    lr: float
    newest: float
    """The weight with which its iterate enters the mean."""


class Step(Protocol):
    """Takes orders. A step with a number that is not finite changes nothing, and neither do those after it until it was read."""

    lag: int
    """Orders that may wait to be read."""
    state: State
    """The carried state."""

    def take(self, order: Order) -> None:
        """Does what the order says."""

    def read(self) -> tuple[list[list[float]], str]:
        """(the numbers of each order since the last read: gradient norm, terms; why the one after them failed, or '')."""
        ...


class PlainStep:
    """Each operation by itself, on any device, with any layer, head and optimiser."""

    lag = 1

    def __init__(
        self, model: NeuralModel, optimizer: torch.optim.Optimizer, averaging: Averaging, config: Config, state: State
    ):
        self.model, self.optimizer, self.averaging, self.config, self.state = model, optimizer, averaging, config, state
        self.parameters = list(model.parameters())
        self.generator = torch.Generator(model.device)
        self.numbers: list[list[float]] = []
        self.failure = ""

    def take(self, order: Order) -> None:
        if self.failure:
            return
        cfg, window, device = self.config, order.window, self.model.device
        inputs, targets = (torch.from_numpy(a).to(device) for a in (window.inputs_TB, window.targets_TB))
        counted = None if window.counted_TB is None else torch.from_numpy(window.counted_TB).to(device)
        if window.fresh:
            self.state = self.model.initial_state(inputs.shape[1])
        self.generator.manual_seed(seed_for_step(cfg.train.seed, order.step))
        out = self.model(inputs, self.state, cfg.dropout, self.generator)
        terms = objective.terms(self.model, out, targets, cfg.objective, counted)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        (loss * window.weight).backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        numbers = torch.stack([norm, *(term.detach().float() for term in terms.values())]).tolist()
        if not all(map(math.isfinite, numbers)):
            named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            values = dict(zip(terms, numbers[1:], strict=True))
            self.failure = objective.explain_nonfinite(values, self.model, self.state, named)
            self.optimizer.zero_grad(set_to_none=True)
            return
        if cfg.optimizer.clip_value:
            torch.nn.utils.clip_grad_value_(self.parameters, cfg.optimizer.clip_value)
            norm = torch.nn.utils.get_total_norm(gradients)
        if cfg.optimizer.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, cfg.optimizer.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = order.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaging.move(self.parameters, order.newest)
        self.state = detach(out.state)
        self.numbers.append(numbers)

    def read(self) -> tuple[list[list[float]], str]:
        out, self.numbers, self.failure = (self.numbers, self.failure), [], ""
        return out
