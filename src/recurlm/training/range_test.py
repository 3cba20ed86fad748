"""The learning-rate range test (Smith 2017, section 3.3): the loss as the rate grows from step to step."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recurlm.config import Config, apply_assignments
from recurlm.errors import ConfigError, RequestError, RunError
from recurlm.model import precision
from recurlm.text.store import Store
from recurlm.training.trainer import Trainer

STEPS = 150
SPAN = (1e-3, 1e3)  # of the configured rate
SMOOTH = 0.9  # exponential smoothing of the losses, corrected for its start
DIVERGED = 1.3  # times the best smoothed loss: stop


class RangeTest(NamedTuple):
    """Rates and smoothed losses (nats) step by step, and what they suggest."""

    rates: list[float]
    losses: list[float]
    steepest: float
    """The rate at which the smoothed loss falls fastest per factor of the rate: a good first choice."""
    lowest: float
    """The rate of the lowest smoothed loss; a tenth of it is the cautious choice."""
    diverged: bool
    """Whether the test ended because the loss rose or was no longer finite."""


def range_test(config: Config, store: Store, steps: int = STEPS) -> RangeTest:
    """The RangeTest of the model and data of `config`; the rate grows by a constant factor a step. Nothing is kept.

    Dropout, window lengths, clipping and optimiser are those of the run; schedule, warm-up and rescaling are off.
    """
    if steps < 10:
        raise RequestError(f"steps = {steps}: expected 10 or more.")
    if not config.optimizer.lr:
        raise ConfigError("optimizer.lr = 0: the range test tries multiples of it; expected a rate above 0.")
    low, high = SPAN
    config = apply_assignments(config, ["data.rescale_lr=false"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config, store, Path(scratch), quiet=True)
        trainer.rate = lambda at: low * (high / low) ** (at.step / (steps - 1))
        rates, losses, mean, diverged = [], [], 0.0, False
        with precision.applied(trainer.precision):
            for step in range(steps):
                try:
                    numbers = trainer.step()
                except RunError:  # a number is not finite: the rate before was the last that could be borne
                    diverged = True
                    break
                mean = SMOOTH * mean + (1 - SMOOTH) * numbers["loss_nats"]
                rates.append(numbers["lr"])
                losses.append(mean / (1 - SMOOTH ** (step + 1)))
                if step > steps // 10 and losses[-1] > DIVERGED * min(losses):
                    diverged = True
                    break
    if len(losses) < 5:
        raise RunError(
            f"The loss was not finite after {len(losses)} steps, at a rate of {rates[-1] if rates else 0:g}; "
            "start the range test at a lower optimizer.lr."
        )
    best = int(np.argmin(losses))
    slopes = np.gradient(np.array(losses), np.log(rates))
    steepest = int(np.argmin(slopes[: best + 1]))
    return RangeTest(rates, losses, rates[steepest], rates[best], diverged)


def plot(test: RangeTest, path: Path) -> None:
    """Writes the picture of the test (the format follows the name: svg, png or pdf)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color="tab:blue")
    top = test.losses[0] + 0.1 * (test.losses[0] - min(test.losses))
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed (nats per token)")
    axes.set_ylim(min(test.losses) - 0.05 * (top - min(test.losses)), max(top, min(max(test.losses), 1.5 * top)))
    for rate, name, style in (
        (test.steepest, "steepest", "-"),
        (test.lowest / 10, "lowest / 10", "--"),
        (test.lowest, "lowest", ":"),
    ):
        axes.axvline(rate, color="tab:gray", linestyle=style, label=f"{name}: {rate:.2g}")
    axes.set_title("Learning-rate range test")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)
