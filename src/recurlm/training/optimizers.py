"""The optimisers by name. A new one is one function and one line; the learning rate is set at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from recurlm.config import OptimizerConfig
from recurlm.errors import ConfigError


def sgd(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Stochastic gradient descent; coupled L2."""
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )


def _betas(config: OptimizerConfig) -> tuple[float, float]:
    if len(config.betas) != 2:
        raise ConfigError(f"optimizer.betas = {list(config.betas)}: expected two numbers.")
    return config.betas[0], config.betas[1]


def adam(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015); coupled L2."""
    return torch.optim.Adam(
        parameters, lr=config.lr, betas=_betas(config), weight_decay=config.weight_decay, fused=True
    )


def adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); decoupled decay."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=_betas(config), weight_decay=config.weight_decay, fused=True
    )


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], OptimizerConfig], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
}
