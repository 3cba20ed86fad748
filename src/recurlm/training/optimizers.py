"""The optimisers by name. A new one is one function and one line; the learning rate is set at every step.

Weight decay is coupled (an L2 penalty, added to the clipped gradient) everywhere but in adamw, where it is decoupled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from recurlm.config import OptimizerConfig
from recurlm.errors import ConfigError

Parameters = list[nn.Parameter]


def sgd(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Stochastic gradient descent, with classical momentum or Nesterov's."""
    if config.nesterov and not config.momentum:
        raise ConfigError("optimizer.nesterov = true needs optimizer.momentum above 0, such as 0.9.")
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip


def _betas(config: OptimizerConfig) -> tuple[float, float]:
    if len(config.betas) != 2:
        raise ConfigError(f"optimizer.betas = {list(config.betas)}: expected two numbers.")
    return config.betas[0], config.betas[1]


def adam(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015)."""
    return torch.optim.Adam(
        parameters, lr=config.lr, betas=_betas(config), eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def amsgrad(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AMSGrad (Reddi, Kale & Kumar 2018): Adam with the largest second moment so far."""
    return torch.optim.Adam(
        parameters, lr=config.lr, betas=_betas(config), eps=config.eps, weight_decay=config.weight_decay,
        amsgrad=True, fused=True,
    )  # fmt: skip


def adamw(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); decoupled decay."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=_betas(config), eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def nadam(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """NAdam (Dozat 2016): Adam with Nesterov's momentum."""
    return torch.optim.NAdam(
        parameters, lr=config.lr, betas=_betas(config), eps=config.eps, weight_decay=config.weight_decay
    )


def rmsprop(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """RMSProp (Tieleman & Hinton 2012), with optional momentum."""
    return torch.optim.RMSprop(
        parameters, lr=config.lr, alpha=config.decay, eps=config.eps, momentum=config.momentum,
        weight_decay=config.weight_decay,
    )  # fmt: skip


def adagrad(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adagrad (Duchi, Hazan & Singer 2011)."""
    return torch.optim.Adagrad(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)


def adadelta(parameters: Parameters, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adadelta (Zeiler 2012); its natural learning rate is 1, its eps 1e-6."""
    return torch.optim.Adadelta(
        parameters, lr=config.lr, rho=config.decay, eps=config.eps, weight_decay=config.weight_decay
    )


OPTIMIZERS: dict[str, Callable[[Parameters, OptimizerConfig], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adam": adam,
    "amsgrad": amsgrad,
    "adamw": adamw,
    "nadam": nadam,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "adadelta": adadelta,
}
