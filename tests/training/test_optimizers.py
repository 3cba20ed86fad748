"""What is special to single optimisers."""

import pytest
import torch

from recurlm.config import OptimizerConfig
from recurlm.errors import ConfigError
from recurlm.training.optimizers import OPTIMIZERS


def step(name: str, grads: list[float], **settings) -> float:
    """Where a weight that starts at 1 is after these gradients, at a learning rate of 0.1."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([p], OptimizerConfig(name=name, lr=0.1, **settings))
    for grad in grads:
        p.grad = torch.full_like(p, grad)
        optimizer.step()
    return p.item()


def test_momentum_and_nesterov():
    assert step("sgd", [1, 1]) == pytest.approx(0.8)
    assert step("sgd", [1, 1], momentum=0.5) == pytest.approx(1 - 0.1 * (1 + 1.5))
    assert step("sgd", [1, 1], momentum=0.5, nesterov=True) == pytest.approx(1 - 0.1 * (1.5 + 1.75))
    with pytest.raises(ConfigError, match="momentum"):
        step("sgd", [1], nesterov=True)


def test_amsgrad_remembers_the_largest_gradient():
    grads = [10.0, *[0.1] * 50]
    far, near = step("adam", grads, betas=(0.0, 0.5)), step("amsgrad", grads, betas=(0.0, 0.5))
    assert far < near < 1


def test_weight_decay_is_coupled_but_in_adamw():
    assert step("sgd", [0], weight_decay=0.5) == pytest.approx(1 - 0.1 * 0.5)
    assert step("adamw", [0], weight_decay=0.5) == pytest.approx(1 - 0.1 * 0.5)
    assert step("adam", [0], weight_decay=0.5) == pytest.approx(1 - 0.1, abs=1e-6)


def test_two_betas_are_needed():
    with pytest.raises(ConfigError, match="two numbers"):
        step("adam", [1], betas=(0.9,))
